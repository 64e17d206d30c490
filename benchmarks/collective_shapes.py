"""What XLA for TPUs makes of gathers and scatters by shape: python -m benchmarks.collective_shapes

It needs the TPU compiler alone (`make check-compilers` installs it). Each line compiles one
`all_gather` of bfloat16 or `psum_scatter` of float32 in `jax.shard_map`, and names the collectives
in the program: `ops/weights.py` rests on what it prints.
"""

import functools
import re

import jax
import jax.numpy as jnp
from absl import app, flags
from jax.sharding import NamedSharding, PartitionSpec

from mod_jax.config import MeshConfig
from mod_jax.rehearsal import topology
from mod_jax.rehearsal.stage import QUICK
from mod_jax.sharding import AXES, make_mesh

ON = flags.DEFINE_enum("on", "v5e-64", topology.NAMES, "The slice.")
MESH = flags.DEFINE_list("mesh", ["1", "16", "4", "1"], f"Devices along {AXES}.")

KINDS = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
TOGETHER, IN_TURN = "both axes at once", "one axis after the other"
# Rows and columns of a device's part.
PARTS = [
    (14, 4864),
    (56, 18944),
    (56, 4864),
    (8, 1024),
    (8, 9216),
    (8, 4864),
    (8, 3456),
    (128, 4864),
]


def gathered(order: str, part: jax.Array) -> jax.Array:
    """[n * rows, columns] on every device."""
    for axes in [("fsdp", "expert")] if order == TOGETHER else ["expert", "fsdp"]:
        part = jax.lax.all_gather(part, axes, tiled=True)
    return part


def scattered(order: str, gradient: jax.Array) -> jax.Array:
    """[rows, columns] of the sum over devices."""
    for axes in [("fsdp", "expert")] if order == TOGETHER else ["fsdp", "expert"]:
        gradient = jax.lax.psum_scatter(gradient, axes, tiled=True)
    return gradient


def collectives(run, mesh, *shapes: jax.ShapeDtypeStruct) -> str:
    """Names of the collectives in the compiled program."""
    specs = tuple(PartitionSpec(AXES) for _ in shapes)
    with jax.set_mesh(mesh):
        mapped = jax.shard_map(run, in_specs=specs, out_specs=PartitionSpec(AXES), check_vma=False)
        jitted = jax.jit(mapped, in_shardings=tuple(NamedSharding(mesh, spec) for spec in specs))
        text = jitted.lower(*shapes).compile(compiler_options=QUICK).as_text()
    return ", ".join(sorted(set(re.findall(rf" ({KINDS})(?:-start)?\(", text or ""))))


def main(_) -> None:
    topology.prepare()
    config = MeshConfig(**dict(zip(AXES, map(int, MESH.value), strict=True)))
    mesh = make_mesh(config, topology.devices(ON.value))
    n = mesh.shape["fsdp"] * mesh.shape["expert"]
    print("| part | order | gather | scatter |\n|---|---|---|---|")
    for rows, columns in PARTS:
        for order in (TOGETHER, IN_TURN):
            # Products before and after: a collective of arguments alone may be made another way.
            def gather(part, x, order=order):
                return x @ gathered(order, part)

            def scatter(x, y, order=order):
                product = jnp.einsum("nd,nf->df", x, y, preferred_element_type=jnp.float32)
                return scattered(order, product)

            of = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
            tokens = 512 * mesh.size
            made = [
                collectives(gather, mesh, of((rows * mesh.size, columns)), of((tokens, rows * n))),
                collectives(scatter, mesh, of((tokens, rows * n)), of((tokens, columns))),
            ]
            print(f"| {rows} x {columns} | {order} | {' | '.join(made)} |", flush=True)


if __name__ == "__main__":
    app.run(main)
