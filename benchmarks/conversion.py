"""Memory and time of converting a 7B folder: python -m benchmarks.conversion [--workdir=FOLDER]

Writes a folder of random numbers with the sizes of LLaVA on Qwen2-7B (CLIP ViT-L/14 at 336 px;
bfloat16, 15.9 GB in shards of 5 GB at most, layer by layer as transformers orders them). Then runs
the commands, each in a process of its own, and compares all numbers bit by bit:

    import (one device)     then export, compared with the folder tensor by tensor
    import --mesh=fsdp=8    compared with the folder parameter by parameter

Each process is limited to --limit GiB of memory of its own (RLIMIT_DATA, which bounds anonymous
memory, used or only reserved). Pages of mapped files, here the source's, are not limited: they add
to the resident size, but the kernel takes them back when it needs them.

Needs Linux and 50 GB of disk, which is freed at the end.
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
    """Yields names of transformers 4.x, layer by layer, with random bf16 numbers.

    The bits are random, but for the highest one of the exponent: every number is finite and below
    2.
    """
    shapes = {
        name: entry.their_shape
        for entry in names.llava_entries(config)
        for _, name in entry.places()
    }
    rng = np.random.default_rng(0)
    for name in sorted(shapes, key=_with_numbers):
        bits = rng.integers(0, 2**16, shapes[name], np.uint16)
        bits &= 0xBFFF
        yield name, bits.view(ml_dtypes.bfloat16)


def _with_numbers(name: str) -> list[int | str]:
    """Sort key that orders the numbers in names as numbers: layer 2 before layer 10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def write_source(folder: pathlib.Path, config: ModelConfig) -> None:
    """Writes the folder to convert."""

    def processor(folder: pathlib.Path) -> None:
        tokenizer = load_tokenizer("assets/byte_tokenizer")
        write_processor(folder, config, tokenizer, chat_template("qwen"))

    files = hf_config.to_files(config, "bfloat16")
    write(folder, files, random_tensors(config), "bfloat16", processor, SHARD_BYTES)


@dataclasses.dataclass(frozen=True)
class Measured:
    """Time and memory of a process.

    Attributes:
      seconds: Wall time.
      resident: Peak resident size, bytes (ru_maxrss), with the pages of mapped files.
      anonymous: Largest sampled size of its own memory, bytes (RssAnon, every 20 ms).
    """

    seconds: float
    resident: int
    anonymous: int


def measure(arguments: list[str], limit: int, **environment: str) -> Measured:
    """Runs `python -m mod_jax.convert ARGUMENTS`.

    Args:
      arguments: Arguments of the command.
      limit: Bytes of memory of its own that the process may have.
      **environment: Environment variables to add.

    Raises:
      CalledProcessError: If the command fails.
    """
    command = [sys.executable, "-m", "mod_jax.convert", *arguments]
    sizes = [0]
    start = time.perf_counter()
    process = subprocess.Popen(command, env=os.environ | environment, stdout=subprocess.DEVNULL)
    resource.prlimit(process.pid, resource.RLIMIT_DATA, (limit, limit))

    def watch() -> None:
        while (size := anonymous(process.pid)) is not None:
            sizes.append(size)
            time.sleep(0.02)

    watcher = threading.Thread(target=watch)
    watcher.start()
    watcher.join()  # ends when the process is a zombie, which has no memory any more
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return Measured(time.perf_counter() - start, usage.ru_maxrss * 1024, max(sizes))


def anonymous(pid: int) -> int | None:
    """RssAnon of a process, bytes; None after its end."""
    status = pathlib.Path(f"/proc/{pid}/status").read_text()
    found = re.search(r"RssAnon:\s+(\d+) kB", status)
    return int(found[1]) * 1024 if found else None


def differing(one: Mapping, other: Mapping, read: Callable) -> list[str]:
    """Names under which two models differ in a bit, or that only one of them has.

    `read` loads an entry; two arrays at a time are in memory.
    """
    common = one.keys() & other.keys()
    return [
        name
        for name in sorted(one | other)
        if name not in common or not same_bits(read(one[name]), read(other[name]))
    ]


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two arrays of bf16 are bitwise the same."""
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    return np.array_equal(a.view(np.uint16), b.view(np.uint16))


def main() -> None:
    """Prints the table, and whether all numbers came back."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", type=pathlib.Path, default=pathlib.Path("runs/conversion"))
    parser.add_argument(
        "--layers",
        type=int,
        default=QWEN2_7B.num_layers,
        help="layers of the language model; fewer make a quick trial",
    )
    parser.add_argument(
        "--limit", type=float, default=16, help="GiB of anonymous memory that a process may have"
    )
    options = parser.parse_args()
    config = ModelConfig(decoder=dataclasses.replace(QWEN2_7B, num_layers=options.layers))
    source = options.workdir / "source"
    native = options.workdir / "native"
    exported = options.workdir / "exported"
    options.workdir.mkdir(parents=True)
    try:
        write_source(source, config)
        size = sum(path.stat().st_size for path in source.glob("*.safetensors"))
        print(f"{size / 1e9:.1f} GB, at most {options.limit:g} GiB of anonymous memory\n")
        print("| command | time | GB/s | peak resident | peak anonymous |")
        print("|---|---|---|---|---|", flush=True)

        def row(*arguments: str | pathlib.Path, **environment: str) -> None:
            command = [str(argument) for argument in arguments]
            measured = measure(command, int(options.limit * GIB), **environment)
            shown = " ".join(getattr(argument, "name", argument) for argument in arguments)
            print(
                f"| {shown} | {measured.seconds:.0f} s | {size / measured.seconds / 1e9:.2f} "
                f"| {measured.resident / GIB:.1f} GiB | {measured.anonymous / GIB:.1f} GiB |",
                flush=True,
            )

        row("import", source, native)
        row("export", native, exported)
        with open_tensors(source) as wanted, open_tensors(exported) as found:
            wrong = differing(wanted, found, lambda tensor: tensor[...])
            print("differing tensors:", wrong, "of", len(wanted), flush=True)
        shutil.rmtree(native)
        shutil.rmtree(exported)
        eight_devices = "--xla_force_host_platform_device_count=8"
        row("import", source, native, "--mesh=fsdp=8", XLA_FLAGS=eight_devices)
        with open_pretrained(source) as wanted, open_pretrained(native) as found:
            wrong = differing(wanted.params, found.params, np.asarray)
            print("differing parameters:", wrong, "of", len(wanted.params))
    finally:
        shutil.rmtree(options.workdir)


if __name__ == "__main__":
    main()
