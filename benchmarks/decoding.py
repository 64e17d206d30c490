"""From JPEG to Batch, measured: python -m benchmarks.decoding [--photos=FOLDER]

Samples a second of one core's time: the input pipeline from prepared array_record, a plain loop over the same files with Pillow and numpy, and the decoder
alone (libjpeg, by Pillow). Time is this process's CPU time, so that other work on the machine does not count, the median of several rounds.
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
from mod_jax.data.samples.tokenizer import IMAGE, byte_tokenizer

SAMPLES, ROUNDS, ROWS = 480, 5, 8
SIZES = ((640, 480), (640, 427), (480, 640))  # px; COCO's, landscape more often than portrait
QUALITY = 90
ANSWER = "A street with people, a bus and two dogs, one of which looks at the camera while the other sleeps in the sun. "


def drawn(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """A picture whose spectrum falls as a photo's does (1 / frequency), so that it compresses like one."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = np.inf
    noise = np.fft.rfft2(rng.normal(size=(3, height, width))) / frequency
    planes = np.fft.irfft2(noise, s=(height, width))
    planes = 0.8 * planes[:1] + 0.2 * planes  # mostly grey, as photos are
    return Image.fromarray(
        (127 + 55 * planes / planes.std()).clip(0, 255).astype(np.uint8).transpose(1, 2, 0)
    )


def write_source(folder: pathlib.Path, photos: pathlib.Path | None) -> list[pathlib.Path]:
    """A chat source of SAMPLES samples with a JPEG each."""
    rng, files = np.random.default_rng(0), []
    found = (
        [Image.open(path).convert("RGB") for path in sorted(photos.glob("*.jpg"))] if photos else []
    )
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
    """What a data loader by hand does: decode, pad, resize."""
    image = Image.open(path).convert("RGB")
    side = max(image.size)
    canvas = Image.new(
        "RGB", (side, side), tuple(int(255 * mean) for mean in model.vision.pixel_mean)
    )
    canvas.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return np.asarray(canvas.resize((model.vision.image_size,) * 2, Image.Resampling.BICUBIC))


def rate(work: Callable[[], int]) -> float:
    """Samples a second of CPU time: the median round; `work` returns how many it did."""
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
        help="folder of JPEGs to make the files of; without it they are drawn",
    )
    options = parser.parse_args()
    tokenizer = byte_tokenizer()
    model = ModelConfig(
        decoder=DecoderConfig(),
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE),
        end_token_id=tokenizer.eos_token_id,
    )
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        files = write_source(folder, options.photos)
        prepare.run(
            prepare.parser().parse_args(
                [
                    f"--source={folder}/chat.json",
                    f"--images={folder}",
                    f"--output={folder}/prepared",
                    "--workers=1",
                ]
            )
        )
        encoded = [path.read_bytes() for path in files]
        batches = Batches(
            DataConfig((SourceConfig(kind="prepared", path=str(folder / "prepared")),)),
            tokenizer,
            model,
            ROWS,
        )
        next(batches)

        def pipeline() -> int:
            return sum(
                int((next(batches).samples >= 0).sum()) for _ in range(SAMPLES // (3 * ROWS))
            )

        rates = {
            "decoder alone (libjpeg)": rate(
                lambda: len([Image.open(io.BytesIO(data)).load() for data in encoded])
            ),
            "plain loop: decode, pad, resize": rate(
                lambda: len([plain(path, model) for path in files])
            ),
            "load_image": rate(lambda: len([load_image(data, model.vision) for data in encoded])),
            "array_record to Batch": rate(pipeline),
        }
        batches.close()
    table = Table(
        title=f"samples a second a core, {model.vision.image_size} px, {sum(map(len, encoded)) / SAMPLES / 1e3:.0f} kB a JPEG",
        title_justify="left",
    )
    for column in ("", "samples/s", "ms a sample"):
        table.add_column(column, justify="right" if column else "left")
    for way, found in rates.items():
        table.add_row(way, f"{found:.0f}", f"{1e3 / found:.2f}")
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
