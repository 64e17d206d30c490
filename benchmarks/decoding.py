"""Throughput from JPEG to Batch on one core: python -m benchmarks.decoding [--photos=FOLDER]

Compares the input pipeline on prepared array_record with a plain loop over the same files (Pillow
and numpy), and with the JPEG decoder alone (libjpeg, through Pillow). Times are CPU time of this
process, so that other work on the machine does not count; each figure is the median of several
rounds.
"""

import argparse
import io
import json
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable

import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table

from mod_jax import prepare
from mod_jax.config import DataConfig, DecoderConfig, ModelConfig, SourceConfig
from mod_jax.data.batches.pipeline import Batches
from mod_jax.data.samples.pixels import load_image
from mod_jax.data.samples.tokenizer import byte_tokenizer
from mod_jax.data.sources.record import MARKER

SAMPLES = 480
ROUNDS = 5
ROWS = 8  # rows of a batch
SIZES = ((640, 480), (640, 427), (480, 640))  # px; COCO's, landscape more often than portrait
QUALITY = 90  # of the JPEGs
ANSWER = (
    "A street with people, a bus and two dogs, one of which looks at the camera while the other "
    "sleeps in the sun. "
)


def drawn(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """A random picture that compresses like a photo: its spectrum falls as 1 / frequency."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = np.inf
    noise = np.fft.rfft2(rng.normal(size=(3, height, width))) / frequency
    planes = np.fft.irfft2(noise, s=(height, width))
    planes = 0.8 * planes[:1] + 0.2 * planes  # mostly grey, as photos are
    pixels = (127 + 55 * planes / planes.std()).clip(0, 255).astype(np.uint8)
    return Image.fromarray(pixels.transpose(1, 2, 0))


def write_source(folder: pathlib.Path, photos: pathlib.Path | None) -> list[pathlib.Path]:
    """Writes a chat source of SAMPLES samples with one JPEG each.

    Args:
      folder: Where the JPEGs and chat.json are written.
      photos: Folder of JPEGs to resize for the samples; None draws random pictures.

    Returns:
      The paths of the JPEGs.
    """
    rng = np.random.default_rng(0)
    found = []
    if photos:
        found = [Image.open(path).convert("RGB") for path in sorted(photos.glob("*.jpg"))]
    files = []
    for number in range(SAMPLES):
        size = SIZES[number % len(SIZES)]
        picture = found[number % len(found)].resize(size) if found else drawn(rng, *size)
        files.append(folder / f"{number}.jpg")
        picture.save(files[-1], quality=QUALITY)
    turns = [
        {"from": "human", "value": "<image>\nWhat does the picture show?"},
        {"from": "gpt", "value": 3 * ANSWER},
    ]
    entries = [{"id": path.stem, "image": path.name, "conversations": turns} for path in files]
    (folder / "chat.json").write_text(json.dumps(entries))
    return files


def plain(path: pathlib.Path, model: ModelConfig) -> np.ndarray:
    """Decodes, pads and resizes as a hand-written data loader would; u8[H,W,3]."""
    image = Image.open(path).convert("RGB")
    side = max(image.size)
    colour = tuple(int(255 * mean) for mean in model.vision.pixel_mean)
    canvas = Image.new("RGB", (side, side), colour)
    canvas.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return np.asarray(canvas.resize((model.vision.image_size,) * 2, Image.Resampling.BICUBIC))


def rate(work: Callable[[], int]) -> float:
    """Samples per second of CPU time, median over ROUNDS; `work` returns its number of samples."""
    rates = []
    for _ in range(ROUNDS):
        start = time.process_time()
        done = work()
        rates.append(done / (time.process_time() - start))
    return statistics.median(rates)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--photos",
        type=pathlib.Path,
        help="folder of JPEGs to resize for the samples; without it pictures are drawn",
    )
    options = parser.parse_args()
    tokenizer = byte_tokenizer()
    model = ModelConfig(
        decoder=DecoderConfig(),
        image_token_id=tokenizer.convert_tokens_to_ids(MARKER),
        end_token_id=tokenizer.eos_token_id,
    )
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        files = write_source(folder, options.photos)
        encoded = [path.read_bytes() for path in files]
        arguments = [
            f"--source={folder}/chat.json",
            f"--images={folder}",
            f"--output={folder}/prepared",
            "--workers=1",
        ]
        prepare.run(prepare.parser().parse_args(arguments))
        source = SourceConfig(kind="prepared", path=str(folder / "prepared"))
        batches = Batches(DataConfig((source,)), tokenizer, model, ROWS)
        next(batches)  # starts the reading threads

        def decode() -> int:
            return len([Image.open(io.BytesIO(data)).load() for data in encoded])

        def pipeline() -> int:
            # a row holds three of these samples
            filled = [next(batches).samples >= 0 for _ in range(SAMPLES // (3 * ROWS))]
            return sum(int(samples.sum()) for samples in filled)

        rates = {
            "decoder alone (libjpeg)": rate(decode),
            "plain loop: decode, pad, resize": rate(lambda: len([plain(f, model) for f in files])),
            "load_image": rate(lambda: len([load_image(data, model.vision) for data in encoded])),
            "array_record to Batch": rate(pipeline),
        }
        batches.close()
    kilobytes = sum(map(len, encoded)) / SAMPLES / 1e3
    title = f"one core, {model.vision.image_size} px, {kilobytes:.0f} kB per JPEG"
    table = Table(title=title, title_justify="left")
    for column in ("", "samples per second", "ms per sample"):
        table.add_column(column, justify="right" if column else "left")
    for way, per_second in rates.items():
        table.add_row(way, f"{per_second:.0f}", f"{1e3 / per_second:.2f}")
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
