"""What compilers for accelerators make of a train step: python -m benchmarks.compiled --on=h100-1

It needs no accelerator, but its compiler (`make check-compilers` installs both in environments of
their own). It compiles the sparse mimic of the method at full size in bfloat16: a student of
Qwen1.5-1.8B's shape with four experts in every second layer, a teacher of Qwen1.5-7B's, CLIP-L/14
at 336 px, one picture and 2048 positions a row. Figures are those of one device (`compiled_step`).
"""

import dataclasses

import jax
from absl import app, flags, logging

from benchmarks import measure, models
from benchmarks.compiled_step import TRAINS, Step, figures
from benchmarks.sizes import Sizes, draw
from mod_jax.config import MeshConfig, ModelConfig
from mod_jax.rehearsal import topology
from mod_jax.sharding import AXES, make_mesh, row_ways

ON = flags.DEFINE_enum("on", "h100-1", topology.NAMES, "The accelerator.")
MESH = flags.DEFINE_list("mesh", ["1", "-1", "1", "1"], f"Devices along {AXES}.")
ROWS = flags.DEFINE_list("rows", ["1", "4", "8"], "Rows of a device.")
REMAT = flags.DEFINE_list("remat", ["full", "dots"], "What the backward pass recomputes.")
WORK = flags.DEFINE_enum("work", "mimic", models.OBJECTIVES, "What the step does.")
JSON = flags.DEFINE_string("json", None, "A file that the figures are written to as well.")

STUDENT = Sizes(2048, 24, 16, 16, 5504, 151936, 2048, 1, 336, 14, 1024, 24, 16, 4096)
TEACHER = {"hidden_size": 4096, "intermediate_size": 11008, "num_layers": 32, "num_heads": 32}


def full_size(rows: int, work: str, remat: str) -> Step:
    """The step of the module's docstring, with `rows` rows."""
    sizes = dataclasses.replace(STUDENT, samples=rows)
    student = models.student(sizes, dtype="bfloat16", remat=remat)
    student = _with_decoder(student, tie_embeddings=False)
    teacher = _with_decoder(student, **TEACHER, num_kv_heads=32, head_dim=128, moe=None)
    stage = models.stage(work, rows, TRAINS)
    return Step(stage, student, teacher, models.batch(work, draw(sizes)))


def _with_decoder(config: ModelConfig, **changes) -> ModelConfig:
    return dataclasses.replace(config, decoder=dataclasses.replace(config.decoder, **changes))


def markdown(table: list[dict]) -> list[str]:
    """The lines of a table for docs/benchmarks.md."""
    lines = [
        "| accelerator | mesh | remat | rows | peak GiB | of that weights | FLOPs over needed |",
        "|---|---|---|---|---|---|---|",
    ]
    for found in table:
        mesh = ", ".join(map(str, found["mesh"].values()))
        figures = ("peak_gib", "weights_gib", "ratio")
        cells = [f"{found[key]:.2f}" for key in figures if key in found] or ["does not fit", "", ""]
        cells = [found["on"], mesh, found["remat"], str(found["rows"]), *cells]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def main(_) -> None:
    logging.set_verbosity(logging.WARNING)
    topology.prepare()
    config = MeshConfig(**dict(zip(AXES, map(int, MESH.value), strict=True)))
    mesh = make_mesh(config, topology.devices(ON.value))
    table = []
    for remat in REMAT.value:
        for rows in map(int, ROWS.value):
            step = full_size(rows * row_ways(mesh), WORK.value, remat)
            about = {"on": ON.value, "mesh": dict(mesh.shape), "remat": remat, "rows": rows}
            try:
                found = figures(step, mesh)
                del found["program"]
            except jax.errors.JaxRuntimeError as error:
                found = {"error": str(error).splitlines()[0][:300]}
            table.append(about | found)
            measure.report(table, JSON.value)
    print("\n".join(markdown(table)))


if __name__ == "__main__":
    app.run(main)
