"""How much memory and time converting a 7B folder takes: python -m benchmarks.conversion --workdir runs/conversion

Writes a folder of random numbers with the sizes of LLaVA on Qwen2-7B (CLIP ViT-L/14 at 336 px; bfloat16, 15.9 GB in shards of 5 GB, layer by
layer as transformers orders them), runs the two commands on it in processes of their own, and compares all numbers bit by bit:

    import (one device)        -> export, compared with the folder tensor by tensor
    import --mesh=fsdp=8       compared with the folder parameter by parameter

A process may have so many GiB (--limit) of memory of its own: RLIMIT_DATA, which bounds anonymous memory whether it is used or only reserved. Pages of files
that are mapped (the source's) come on top in the resident size; the kernel takes them back when it needs them. Linux; 50 GB of disk,
freed at the end.
"""

import argparse
import dataclasses
import os
import pathlib
import re
import resource
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping

import ml_dtypes
import numpy as np

from mod_jax.config import DecoderConfig, ModelConfig
from mod_jax.data.samples.tokenizer import load_tokenizer
from mod_jax.interop import hf_config, names
from mod_jax.interop.folder import SHARD_BYTES, open_tensors, write
from mod_jax.interop.loading import open_pretrained
from mod_jax.interop.processor import chat_template, write_processor

QWEN2_7B = DecoderConfig(
    vocab_size=152064,
    hidden_size=3584,
    intermediate_size=18944,
    num_layers=28,
    num_heads=28,
    num_kv_heads=4,
    head_dim=128,
    tie_embeddings=False,
)
GIB = 2**30


def random_tensors(config: ModelConfig) -> Iterator[tuple[str, np.ndarray]]:
    """Names of transformers 4.x, layer by layer, and random bf16 numbers (any bits below 2 in size)."""
    shapes = {
        name: entry.their_shape
        for entry in names.llava_entries(config)
        for _, name in entry.places()
    }
    rng = np.random.default_rng(0)
    for name in sorted(
        shapes,
        key=lambda name: [
            int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)
        ],
    ):
        bits = rng.integers(0, 2**16, shapes[name], np.uint16)
        bits &= 0xBFFF
        yield name, bits.view(ml_dtypes.bfloat16)


def write_source(folder: pathlib.Path, config: ModelConfig) -> None:
    """The folder to convert."""
    processor = lambda folder: write_processor(
        folder, config, load_tokenizer("assets/byte_tokenizer"), chat_template("qwen")
    )
    write(
        folder,
        hf_config.to_files(config, "bfloat16"),
        random_tensors(config),
        "bfloat16",
        processor,
        SHARD_BYTES,
    )


@dataclasses.dataclass(frozen=True)
class Measured:
    """What a process took.

    Attributes:
      seconds: of wall time.
      resident: its greatest resident size, bytes (VmHWM), mapped pages of files included.
      anonymous: the greatest size of its own memory that was seen, bytes (RssAnon, every 20 ms).
    """

    seconds: float
    resident: int
    anonymous: int


def measure(arguments: list[str], limit: int, **environment: str) -> Measured:
    """Runs `python -m mod_jax.convert ARGUMENTS` with at most `limit` bytes of memory of its own. Raises CalledProcessError if it fails."""
    command = [sys.executable, "-m", "mod_jax.convert", *arguments]
    start, seen = time.perf_counter(), [0]
    process = subprocess.Popen(command, env=os.environ | environment, stdout=subprocess.DEVNULL)
    resource.prlimit(process.pid, resource.RLIMIT_DATA, (limit, limit))

    def watch() -> None:
        while (now := anonymous(process.pid)) is not None:
            seen.append(now)
            time.sleep(0.02)

    watcher = threading.Thread(target=watch)
    watcher.start()
    watcher.join()  # until the process is a zombie, which has no memory
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return Measured(time.perf_counter() - start, usage.ru_maxrss * 1024, max(seen))


def anonymous(pid: int) -> int | None:
    """RssAnon of a process, bytes; None once it has ended."""
    status = pathlib.Path(f"/proc/{pid}/status").read_text()
    found = re.search(r"RssAnon:\s+(\d+) kB", status)
    return int(found[1]) * 1024 if found else None


def differing(one: Mapping, other: Mapping, read: Callable) -> list[str]:
    """Names under which two models do not have the same bits, or one of them nothing; two arrays at a time are in memory."""
    return [
        name
        for name in sorted(one | other)
        if not (name in one and name in other and same_bits(read(one[name]), read(other[name])))
    ]


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two arrays of bf16 are the same to the bit."""
    return (a.shape, a.dtype) == (b.shape, b.dtype) and np.array_equal(
        a.view(np.uint16), b.view(np.uint16)
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", type=pathlib.Path, default=pathlib.Path("runs/conversion"))
    parser.add_argument(
        "--layers",
        type=int,
        default=QWEN2_7B.num_layers,
        help="of the language model; fewer for a try",
    )
    parser.add_argument(
        "--limit", type=float, default=16, help="GiB of memory of its own that a process may have"
    )
    options = parser.parse_args()
    config = ModelConfig(decoder=dataclasses.replace(QWEN2_7B, num_layers=options.layers))
    source, native, exported = (options.workdir / name for name in ("source", "native", "exported"))
    options.workdir.mkdir(parents=True)
    try:
        write_source(source, config)
        size = sum(path.stat().st_size for path in source.glob("*.safetensors"))
        print(
            f"{size / 1e9:.1f} GB, at most {options.limit:g} GiB of anonymous memory\n\n| command | time | GB/s | peak resident | of it anonymous |\n|---|---|---|---|---|",
            flush=True,
        )

        def row(*arguments, **environment) -> None:
            found = measure(
                [str(argument) for argument in arguments], int(options.limit * GIB), **environment
            )
            rate, shown = (
                size / found.seconds / 1e9,
                " ".join(getattr(a, "name", a) for a in arguments),
            )
            print(
                f"| {shown} | {found.seconds:.0f} s | {rate:.2f} | {found.resident / GIB:.1f} GiB | {found.anonymous / GIB:.1f} GiB |",
                flush=True,
            )

        row("import", source, native)
        row("export", native, exported)
        with open_tensors(source) as wanted, open_tensors(exported) as found:
            print(
                "differing tensors:",
                differing(wanted, found, lambda tensor: tensor[...]),
                "of",
                len(wanted),
                flush=True,
            )
        shutil.rmtree(native)
        shutil.rmtree(exported)
        row(
            "import",
            source,
            native,
            "--mesh=fsdp=8",
            XLA_FLAGS="--xla_force_host_platform_device_count=8",
        )
        with open_pretrained(source) as wanted, open_pretrained(native) as found:
            print(
                "differing parameters:",
                differing(wanted.params, found.params, np.asarray),
                "of",
                len(wanted.params),
            )
    finally:
        shutil.rmtree(options.workdir)


if __name__ == "__main__":
    main()
