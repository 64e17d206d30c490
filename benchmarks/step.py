"""Time and memory of one train step: python -m benchmarks.step --preset=real-vocab --work=mimic

With --config=configs/quickstart.py --stage=sparse_mimic it is a step of a recipe. Weights are drawn
at random, and every step reads the same batch. The presets are those of the PyTorch peer (`sizes`);
a pair is one row with a shared question here, and two rows there.

Model FLOP utilisation is the dense FLOPs that the step needs (`flops` says how they are counted)
divided by its time and by --peak-flops.

On CPU, large buffers that are fresh in every step cost page faults, so the allocator matters:
preload tcmalloc (LD_PRELOAD=.../libtcmalloc_minimal.so.4), as `benchmarks.compare` does.
"""

import time

import jax
from absl import flags

from benchmarks import flops, measure
from benchmarks import setting as settings
from benchmarks.peak import peak_flops
from benchmarks.setting import JSON, STEPS, WARMUP, Setting
from benchmarks.sizes import WORK
from mod_jax.training.loop import in_use, make_program, to_devices
from mod_jax.training.state import Frozen, new_state, split_trained

WORK_FLAG = flags.DEFINE_enum("work", "mimic", WORK, "With --preset: what the step does.")
PEAK = flags.DEFINE_float(
    "peak_flops", None, "FLOPs per second of all devices; by default those of a matrix product."
)


def measured(setting: Setting, warmup: int, steps: int) -> dict:
    """Runs a step `warmup` + `steps` times.

    Returns:
      What `measure.repeat` returns, and
      compilation_seconds; weights_gib: Of weights and optimizer state, over all devices;
      planned_gib: Buffers that the compiler plans for a step on one device.
      tokens_per_second, batch (rows and positions), flops, loss_first, loss_last.
      device_peak_gib, device_before_gib: What the first device reports, or null: the most that was
        used since the process began, and what was used before the steps.
    """
    shapes = settings.student_shapes(setting)
    teacher = settings.teacher_shapes(setting)
    trained, rest = split_trained(shapes, setting.stage.trains)
    with jax.set_mesh(setting.mesh):
        program = make_program(
            setting.stage,
            setting.student,
            setting.teacher,
            setting.mesh,
            {name: shapes[name] for name in trained},
            Frozen({name: shapes[name] for name in rest}, teacher),
        )
        init = jax.jit(
            lambda params: new_state(params, program.optimizer),
            donate_argnums=0,
            out_shardings=program.state,
        )
        state = init(settings.drawn(setting.student, trained, 0, program.state.params))
        frozen = Frozen(
            settings.drawn(setting.student, rest, 0, program.frozen.student),
            settings.drawn(setting.teacher, teacher, 1, program.frozen.teacher)
            if setting.teacher
            else {},
        )
        frozen = in_use(frozen, program.dtype, program.int8_teacher)
        batch = to_devices(setting.batch, setting.mesh)
        start = time.perf_counter()
        step = program.step.lower(state, frozen, batch).compile()
        compilation = time.perf_counter() - start
        jax.block_until_ready((state, frozen, batch))
        held = sum(x.nbytes for x in jax.tree.leaves((state, frozen)))
        before = _device_memory("bytes_in_use")
        losses = []

        def one() -> None:
            nonlocal state
            state, metrics = jax.block_until_ready(step(state, frozen, batch))
            losses.append(metrics["loss"][0])

        found = measure.repeat(one, warmup, steps)
    needed = flops.of_step(
        setting.stage.objective, setting.student, setting.teacher, trained, setting.batch
    )
    return found | {
        "compilation_seconds": compilation,
        "weights_gib": held / measure.GIB,
        "planned_gib": step.memory_analysis().temp_size_in_bytes / measure.GIB,
        "device_before_gib": before,
        "device_peak_gib": _device_memory("peak_bytes_in_use"),
        "tokens_per_second": setting.positions / found["seconds"],
        "batch": list(setting.batch.tokens.shape),
        "flops": needed,
        "loss_first": float(losses[0]),
        "loss_last": float(losses[-1]),
    }


def _device_memory(key: str) -> float | None:
    """GiB of the first device, or None where the backend does not say."""
    statistics = jax.local_devices()[0].memory_stats() or {}
    return statistics[key] / measure.GIB if key in statistics else None


def main(_) -> None:
    setting = settings.of_flags(WORK_FLAG.value)
    found = measured(setting, WARMUP.value, STEPS.value)
    peak = PEAK.value or peak_flops(setting.student.dtype, setting.mesh.size)
    utilisation = found["flops"]["dense"] / found["seconds"] / peak
    more = {"peak_flops": peak, "utilisation": utilisation, "device": jax.devices()[0].device_kind}
    measure.report({"side": "project", **setting.about, **found, **more}, JSON.value)


if __name__ == "__main__":
    settings.run(main)
