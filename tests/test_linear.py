"""Products and sums with float32 parameters: values of einsum, gradients summed in float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from mod_jax.config import MeshConfig
from mod_jax.ops.linear import add, linear
from mod_jax.sharding import ROWS, make_mesh, partition

B, S = 8, 96
CASES = {  # shapes of x and w, the dimensions that are contracted, and the einsum
    "matrix": ((B, S, 6), (6, 5), 1, "bsd,df->bsf"),
    "into heads": ((B, S, 6), (6, 2, 3), 1, "bsd,dnh->bsnh"),
    "from heads": ((B, S, 2, 3), (2, 3, 5), 2, "bsnh,nhd->bsd"),
    "up": ((B, S, 16), (16, 6), 1, "bsd,df->bsf"),
    "down": ((B, S, 6), (6, 16), 1, "bsd,df->bsf"),
    "out": ((B, S, 4, 3), (4, 3, 16), 2, "bsnh,nhd->bsd"),
}
AXES = {  # logical axes of the weight
    "matrix": ("embed", "mlp"),  # of sizes that no mesh axis divides: whole on every device
    "into heads": ("embed", "heads", None),
    "from heads": ("heads", None, "embed"),
    "up": ("embed", "mlp"),
    "down": ("mlp", "embed"),
    "out": ("heads", None, "embed"),
}
MESHES = {
    "8 fsdp": MeshConfig(1, 8, 1, 1),
    "2 fsdp x 4 expert": MeshConfig(1, 2, 4, 1),
    "2 data x 2 expert x 2 tensor": MeshConfig(2, 1, 2, 2),
}


def problem(case, dtype):
    """(x, w, cotangent of the product); all have values of bfloat16, whose products are exact."""
    rng = np.random.default_rng(0)
    x_shape, w_shape, inputs, _ = CASES[case]
    shapes = (x_shape, w_shape, (*x_shape[:-inputs], *w_shape[inputs:]))
    # products of one sign: a sum of them in bfloat16 would stall
    x, w, dy = (jnp.asarray(1 + rng.random(shape), jnp.bfloat16) for shape in shapes)
    return x.astype(dtype), w.astype(jnp.float32), dy.astype(dtype)


def by_einsum(case, x, w, dy):
    """The product and its gradients in numpy float64."""
    equation = CASES[case][3]
    x, w, dy = (np.asarray(a.astype(jnp.float32), np.float64) for a in (x, w, dy))
    factors, out = equation.split("->")
    of_x, of_w = factors.split(",")
    return (
        np.einsum(equation, x, w),
        np.einsum(f"{out},{of_w}->{of_x}", dy, w),
        np.einsum(f"{of_x},{out}->{of_w}", x, dy),
    )


def with_gradients(case, x, w, dy, axes=None):
    def run(x, w, dy):
        y, pull = jax.vjp(lambda x, w: linear(x, w, CASES[case][2], axes), x, w)
        return y, *pull(dy)

    return jax.jit(run)(x, w, dy)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_are_those_of_einsum(case, dtype):
    given = problem(case, dtype)
    y, dx, dw = with_gradients(case, *given)
    assert (y.dtype, dx.dtype, dw.dtype) == (dtype, dtype, jnp.float32)
    rounded = 1e-6 if dtype == jnp.float32 else 2**-8
    for ours, wanted, rtol in zip((y, dx, dw), by_einsum(case, *given), (rounded, rounded, 1e-6)):
        np.testing.assert_allclose(ours.astype(jnp.float32), wanted, rtol=rtol)


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("case", CASES)
def test_a_mesh_changes_no_value_and_sums_gradients_in_float32(case, mesh):
    """In bfloat16 the gradient of the weight would be off by up to 4e-3."""
    x, w, dy = problem(case, jnp.bfloat16)
    mesh = make_mesh(MESHES[mesh])
    rows = NamedSharding(mesh, PartitionSpec(ROWS))
    w_lies = NamedSharding(mesh, partition(mesh, w.shape, AXES[case]))
    given = (jax.device_put(a, to) for a, to in ((x, rows), (w, w_lies), (dy, rows)))
    with jax.set_mesh(mesh):
        y, dx, dw = with_gradients(case, *given, AXES[case])
    assert dw.sharding.is_equivalent_to(w_lies, w.ndim)
    twice = 2**-7  # partial products along `tensor` are rounded to bfloat16 before they are summed
    for ours, wanted, rtol in zip((y, dx, dw), by_einsum(case, x, w, dy), (twice, twice, 1e-6)):
        np.testing.assert_allclose(ours.astype(jnp.float32), wanted, rtol=rtol)


def test_a_frozen_weight_sends_no_gradient():
    """And of what does not train at all, neither product nor sum of a backward pass is there."""
    mesh = make_mesh(MESHES["8 fsdp"])
    x, w, dy = problem("up", jnp.float32)

    def run(x, w, dy):
        return jax.vjp(lambda x: linear(x, w, axes=AXES["up"]), x)[1](dy)

    with jax.set_mesh(mesh):
        text = jax.jit(run).lower(x, w, dy).compile().as_text()
    assert "all-gather(" in text and "reduce-scatter(" not in text and "all-reduce(" not in text


def test_a_bias_is_added_in_float32_too():
    rng = np.random.default_rng(0)
    x, bias, dy = (rng.normal(size=n).astype(np.float32) for n in ((B, S, 5), 5, (B, S, 5)))
    y, pull = jax.vjp(add, jnp.asarray(x), jnp.asarray(bias))
    np.testing.assert_array_equal(y, x + bias)
    np.testing.assert_allclose(pull(jnp.asarray(dy))[1], dy.sum((0, 1)), rtol=1e-5)


def test_the_gradient_of_a_bias_is_summed_in_float32():
    rng = np.random.default_rng(0)
    x, dy = (jnp.asarray(1 + rng.random((B, S, 5)), jnp.bfloat16) for _ in range(2))
    bias = jnp.asarray(rng.normal(size=5), jnp.float32)
    y, pull = jax.vjp(add, x, bias)
    np.testing.assert_array_equal(y, x + bias.astype(jnp.bfloat16))
    dx, d_bias = jax.jit(pull)(dy)
    np.testing.assert_array_equal(dx, dy)
    wanted = np.asarray(dy.astype(jnp.float32), np.float64).sum((0, 1))
    assert d_bias.dtype == jnp.float32
    np.testing.assert_allclose(d_bias, wanted, rtol=1e-6)
