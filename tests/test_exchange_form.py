"""Which form of exchange a mesh gets, and what each of them delivers."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from ragged import ragged_all_to_all

from mod_jax.config import MeshConfig
from mod_jax.ops.exchange_form import exchange_form, swap
from mod_jax.sharding import make_mesh


def mesh_of(kind, expert, size):
    """What `exchange_form` reads of a mesh, of devices that need not be here."""
    device = types.SimpleNamespace(device_kind=kind)
    return types.SimpleNamespace(
        empty=False,
        shape={"data": 1, "fsdp": size // expert, "expert": expert, "tensor": 1},
        size=size,
        abstract_mesh=types.SimpleNamespace(abstract_device=device),
    )


@pytest.mark.parametrize(
    ("kind", "expert", "size", "form"),
    [
        ("cpu", 4, 8, "capacity"),
        ("TPU v5 lite", 1, 64, "local"),
        ("TPU v5 lite", 4, 16, "ragged"),
        ("TPU v5 lite", 4, 64, "capacity"),
        ("TPU v5", 4, 64, "ragged"),
        ("TPU v6 lite", 4, 16, "ragged"),
        ("NVIDIA H100 80GB HBM3", 4, 8, "ragged"),
    ],
)
def test_the_form_goes_by_platform_and_mesh(kind, expert, size, form):
    assert exchange_form(mesh_of(kind, expert, size)) == form


def test_the_form_of_real_meshes():
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, expert=4))
    assert exchange_form(mesh) == exchange_form(mesh.abstract_mesh) == "capacity"
    assert exchange_form(make_mesh(MeshConfig(data=1, fsdp=8))) == "local"
    assert exchange_form(jax.sharding.get_abstract_mesh()) == "local"


@pytest.mark.parametrize("form", ["capacity", "ragged"])
def test_each_peer_gets_its_rows_and_their_gradients_go_back(form, monkeypatch):
    """Two independent groups (data 0 and 1) of four devices; numbered rows tell where each went."""
    monkeypatch.setattr(jax.lax, "ragged_all_to_all", ragged_all_to_all)
    c = 3
    rng = np.random.default_rng(1)
    sizes = rng.integers(0, c + 1, (2, 4, 4))  # [group, sender, receiver]
    sizes[0, :, 2] = 0  # a device that receives nothing
    sizes[1, 1, :] = 0  # a device that sends nothing
    in_use = np.arange(c) < sizes[..., None]
    rows = np.arange(1, 2 * 4 * 4 * c * 2 + 1, dtype=np.float32).reshape(2, 4, 4, c, 2)
    rows = rows * in_use[..., None]
    seeds = rng.random(rows.shape, np.float32) * in_use.swapaxes(1, 2)[..., None]
    spec = PartitionSpec("data", "expert")

    @functools.partial(
        jax.shard_map,
        mesh=make_mesh(MeshConfig(data=2, expert=4)),
        in_specs=(spec, spec, spec),
        out_specs=spec,
    )
    def deliver(rows, sent, received):
        out = swap(form, rows.reshape(4 * c, 2), sent[0, 0], received[0, 0])
        return out.reshape(rows.shape)

    sent, received = jnp.array(sizes), jnp.array(sizes.swapaxes(1, 2))
    got, pullback = jax.vjp(lambda rows: jax.jit(deliver)(rows, sent, received), jnp.array(rows))
    np.testing.assert_array_equal(got, rows.swapaxes(1, 2))
    np.testing.assert_array_equal(pullback(jnp.array(seeds))[0], seeds.swapaxes(1, 2))
