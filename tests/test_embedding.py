"""Embedding tables that are split over devices: values and gradients are those of an index."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from mod_jax.config import MeshConfig
from mod_jax.ops.embedding import lookup
from mod_jax.sharding import ROWS, make_mesh, partition

AXES = ("vocab", "embed")
MESHES = {
    "8 fsdp": MeshConfig(1, 8, 1, 1),
    "2 fsdp x 4 expert": MeshConfig(1, 2, 4, 1),
    "2 data x 2 expert x 2 tensor": MeshConfig(2, 1, 2, 2),
}
TABLES = {"all split": (10, 16), "some columns split": (10, 12), "nothing split": (9, 5)}


def problem(table):
    """(table, tokens with repetitions, cotangent)."""
    rng = np.random.default_rng(0)
    words, width = TABLES[table]
    tokens = rng.integers(0, words, (8, 7))
    tokens[:, 0], tokens[:, 1] = 0, words - 1
    return (
        rng.normal(size=(words, width)).astype(np.float32),
        tokens.astype(np.int32),
        rng.normal(size=(8, 7, width)).astype(np.float32),
    )


def with_gradient(table, tokens, dy, dtype):
    def run(table, tokens, dy):
        y, pull = jax.vjp(lambda table: lookup(table, tokens, dtype), table)
        return y, *pull(dy.astype(dtype))

    return jax.jit(run)(table, tokens, dy)


@pytest.mark.parametrize("mesh", [None, *MESHES])
@pytest.mark.parametrize("case", TABLES)
def test_values_and_gradients_are_those_of_an_index(case, mesh):
    table, tokens, dy = problem(case)
    gradient = np.zeros(table.shape, np.float64)
    np.add.at(gradient, tokens, dy)
    if mesh is None:
        y, d_table = with_gradient(table, tokens, dy, "float32")
    else:
        mesh = make_mesh(MESHES[mesh])
        lies = NamedSharding(mesh, partition(mesh, table.shape, AXES))
        rows = NamedSharding(mesh, PartitionSpec(ROWS))
        given = (jax.device_put(a, to) for a, to in ((table, lies), (tokens, rows), (dy, rows)))
        with jax.set_mesh(mesh):
            y, d_table = with_gradient(*given, "float32")
        assert d_table.sharding.is_equivalent_to(lies, 2)
        assert y.sharding.is_equivalent_to(rows, 3)
    np.testing.assert_array_equal(y, table[tokens])
    np.testing.assert_allclose(d_table, gradient, rtol=1e-5, atol=1e-6)


def test_a_gradient_is_summed_in_float32_under_bfloat16_activations():
    """One word 4096 times: a sum in bfloat16 would stop at 256."""
    tokens = np.zeros((8, 512), np.int32)
    dy = jnp.ones((8, 512, 16))
    mesh = make_mesh(MESHES["2 fsdp x 4 expert"])
    with jax.set_mesh(mesh):
        _, d_table = with_gradient(np.ones((10, 16), np.float32), tokens, dy, "bfloat16")
    np.testing.assert_array_equal(d_table[0], 4096)


def test_no_device_holds_the_whole_table():
    table, tokens, _ = problem("all split")
    mesh = make_mesh(MESHES["2 fsdp x 4 expert"])
    lies = NamedSharding(mesh, partition(mesh, table.shape, AXES))
    rows = NamedSharding(mesh, PartitionSpec(ROWS))
    with jax.set_mesh(mesh):
        run = jax.jit(lambda t, i: lookup(t, i, "float32"), in_shardings=(lies, rows))
        text = run.lower(table, tokens).compile().as_text()
    assert "f32[10,2]" in text and "f32[10,16]" not in text
