"""Time and memory of one train step: python -m benchmarks.step --preset=real-vocab --work=mimic

The sizes and the work are those of the PyTorch step that this project is compared with: a dense
teacher twice as wide as the sparse student, of which experts, routers and the adaptor train; one
picture per sample, and answers that take half of the text. A preference pair is one row with a
shared prefix here, and two rows there.

Large buffers that are fresh in every step cost page faults, so the allocator matters: preload
tcmalloc (LD_PRELOAD=.../libtcmalloc_minimal.so.4), on both sides of a comparison.
"""

import argparse
import ctypes
import json
import pathlib
import statistics
import time
from typing import NamedTuple

import jax
import numpy as np

from mod_jax.batch import Batch
from mod_jax.config import (
    DataConfig,
    DecoderConfig,
    MeshConfig,
    ModelConfig,
    MoEConfig,
    ObjectiveConfig,
    SourceConfig,
    StageConfig,
    VisionConfig,
)
from mod_jax.models import llava
from mod_jax.sharding import make_mesh
from mod_jax.training.loop import make_program, to_devices
from mod_jax.training.state import Frozen, new_state, split_trained

TRAINS = ("language_model.layers.moe.*", "adaptor.*")
PICTURE_TOKEN, END_TOKEN = 1, 0
FIRST_TEXT = 4  # tokens before the picture


class Preset(NamedTuple):
    """Sizes of the student and of a batch; the teacher's decoder is twice as wide.

    Attributes:
      layers: Layers of both decoders; those of the tower are always 4.
      words: Rows of both vocabularies.
      positions: Of a sample with one answer.
      samples: Samples of a batch.
      image_size: Of a picture, px, in patches of 14.
    """

    layers: int
    words: int
    positions: int
    samples: int
    image_size: int


PRESETS = {
    "small": Preset(layers=8, words=8192, positions=256, samples=4, image_size=112),
    "real-vocab": Preset(layers=4, words=151936, positions=512, samples=2, image_size=224),
}
WORK = {
    "mimic": ObjectiveConfig("mimic", next_token_weight=1.0),
    "preference": ObjectiveConfig("preference", preference="kto_pair"),
}


def model(preset: Preset, scale: int) -> ModelConfig:
    """The sparse student (scale 1), or the dense teacher (scale 2)."""
    vision = VisionConfig(
        image_size=preset.image_size,
        hidden_size=128,
        intermediate_size=512,
        num_layers=4,
        num_heads=4,
    )
    decoder = DecoderConfig(
        vocab_size=preset.words,
        hidden_size=256 * scale,
        intermediate_size=704 * scale,
        num_layers=preset.layers,
        num_heads=8 * scale,
        num_kv_heads=2 * scale,
        head_dim=32,
        tie_embeddings=scale == 1,
        moe=MoEConfig() if scale == 1 else None,
    )
    return ModelConfig(vision, decoder, PICTURE_TOKEN, END_TOKEN)


def batch(preset: Preset, work: str, features: int) -> Batch:
    """A batch of random tokens and pictures, one sample per row.

    Answers take half of the positions that the picture leaves. A pair has two answers.
    """
    random = np.random.default_rng(0)
    answer = (preset.positions - features) // 2
    prefix, answers = preset.positions - answer, 2 if work == "preference" else 1
    length = prefix + answers * answer
    shape = (preset.samples, length)
    position = np.arange(length)
    is_picture = (position >= FIRST_TEXT) & (position < FIRST_TEXT + features)
    tokens, targets = random.integers(2, preset.words, (2, *shape), np.int32)

    def rows(x, dtype=np.int32):
        return np.ascontiguousarray(np.broadcast_to(x, shape), dtype)

    return Batch(
        tokens=np.where(is_picture, PICTURE_TOKEN, tokens).astype(np.int32),
        targets=targets,
        loss_weights=rows(position >= prefix, np.float32),
        positions=rows(
            np.where(position < prefix, position, prefix + (position - prefix) % answer)
        ),
        segment_ids=rows(1),
        branch_ids=rows(np.maximum(0, 1 + (position - prefix) // answer) if answers == 2 else 0),
        picture_index=rows(np.where(is_picture, position - FIRST_TEXT, -1)),
        images=random.integers(0, 256, (preset.samples, 1, *[preset.image_size] * 2, 3), np.uint8),
        samples=np.arange(preset.samples, dtype=np.int32)[:, None],
    )


def resident(key: str) -> float:
    """GiB of this process: "VmRSS" is what is resident, "VmHWM" its peak since `reset_peak`."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith(key + ":")]
    return int(line.split()[1]) / 2**20


def reset_peak() -> None:
    """Returns what was freed to the system, and starts a new peak."""
    process = ctypes.CDLL(None)
    if hasattr(process, "MallocExtension_ReleaseFreeMemory"):  # tcmalloc
        process.MallocExtension_ReleaseFreeMemory()
    process.malloc_trim(0)
    pathlib.Path("/proc/self/clear_refs").write_text("5")


def measure(preset: Preset, work: str, steps: int, warmup: int) -> dict:
    """Runs a step `warmup` + `steps` times on one device.

    Returns:
      Seconds of a step (median and least), of the processors in a step, and of compilation;
      positions per second; GiB above what was resident before the steps, and of the buffers that
      the compiler plans; and the losses.
    """
    student, teacher = model(preset, 1), model(preset, 2)
    data = DataConfig((SourceConfig(),))
    stage = StageConfig(TRAINS, WORK[work], data, steps=1000, rows=preset.samples)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    with jax.set_mesh(mesh):
        params = jax.jit(lambda: llava.init(student, jax.random.key(0)))()
        others = jax.jit(lambda: llava.init(teacher, jax.random.key(1)))()
        others = {n: x for n, x in others.items() if not n.startswith("vision_tower.")}
        names, rest = split_trained(params, stage.trains)
        trained = {name: params[name] for name in names}
        frozen = Frozen({name: params[name] for name in rest}, others)
        program = make_program(stage, student, teacher, mesh, trained, frozen)
        state = jax.device_put(new_state(trained, program.optimizer), program.state)
        frozen = jax.device_put(frozen, program.frozen)
        del params, others, trained
        given = to_devices(batch(preset, work, student.vision.num_features), mesh)
        start = time.perf_counter()
        step = program.step.lower(state, frozen, given).compile()
        compilation = time.perf_counter() - start
        jax.block_until_ready((state, frozen, given))
        reset_peak()
        before = resident("VmRSS")
        seconds, processor, losses = [], [], []
        for _ in range(warmup + steps):
            start, start_processor = time.perf_counter(), time.process_time()
            state, metrics = jax.block_until_ready(step(state, frozen, given))
            seconds.append(time.perf_counter() - start)
            processor.append(time.process_time() - start_processor)
            losses.append(float(metrics["loss"][0]))
    median = statistics.median(seconds[warmup:])
    return {
        "seconds": median,
        "seconds_least": min(seconds[warmup:]),
        "processor_seconds": statistics.median(processor[warmup:]),
        "compilation_seconds": compilation,
        "positions_per_second": given.tokens.size / median,
        "gib_above_resident": resident("VmHWM") - before,
        "gib_temporary": step.memory_analysis().temp_size_in_bytes / 2**30,
        "loss_first": losses[0],
        "loss_last": losses[-1],
    }


def main() -> None:
    """Prints the measurement as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--preset", choices=PRESETS, default="small")
    parser.add_argument("--work", choices=WORK, default="mimic")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--json", type=pathlib.Path, help="also writes the JSON here")
    options = parser.parse_args()
    found = measure(PRESETS[options.preset], options.work, options.steps, options.warmup)
    found = {"preset": options.preset, "work": options.work, **found}
    text = json.dumps(found, indent=1)
    print(text)
    if options.json:
        options.json.write_text(text)


if __name__ == "__main__":
    main()
