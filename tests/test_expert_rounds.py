"""How rows come to their slots and back; whole rounds are tested in test_expert_exchange."""

import jax
import jax.numpy as jnp
import numpy as np

from mod_jax.ops.expert_rounds import collect, permute, spread


def test_spread_and_collect_are_transposes():
    rng = np.random.default_rng(0)
    n, K, r, D = 5, 2, 12, 3
    slot = rng.permutation(r)[: n * K].reshape(n, K)
    slot[1, 1] = slot[3, 0] = r
    matrix = np.zeros((r, n))
    source = np.full(r, n)
    for token, k in np.ndindex(n, K):
        if slot[token, k] < r:
            matrix[slot[token, k], token] = 1
            source[slot[token, k]] = token
    x, rows = rng.random((n, D)), rng.random((r, D))
    source, slot = jnp.array(source), jnp.array(slot)
    out, pullback = jax.vjp(lambda x: spread(x, source, slot), jnp.array(x, jnp.float32))
    np.testing.assert_allclose(out, matrix @ x, rtol=1e-6)
    np.testing.assert_allclose(
        pullback(jnp.array(rows, jnp.float32))[0], matrix.T @ rows, rtol=1e-6
    )
    out, pullback = jax.vjp(lambda rows: collect(rows, source, slot), jnp.array(rows, jnp.float32))
    np.testing.assert_allclose(out, matrix.T @ rows, rtol=1e-6)
    np.testing.assert_allclose(pullback(jnp.array(x, jnp.float32))[0], matrix @ x, rtol=1e-6)


def test_permute_is_indexing_with_its_gradient():
    x, dy = jax.random.normal(jax.random.key(0), (2, 50, 3))
    order = jax.random.permutation(jax.random.key(1), 50)
    ours, pullback = jax.vjp(lambda x: permute(x, order, jnp.argsort(order)), x)
    expected, expected_pullback = jax.vjp(lambda x: x[order], x)
    np.testing.assert_array_equal(ours, expected)
    np.testing.assert_array_equal(pullback(dy)[0], expected_pullback(dy)[0])
