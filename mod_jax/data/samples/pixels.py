"""Pictures as the vision tower takes them: RGB, square, resized (method, section 4)."""

import contextlib
import io
import logging
import pathlib
import warnings
from collections.abc import Iterator

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from mod_jax.config import VisionConfig, require
from mod_jax.data.sources.record import BadSample

MAX_PIXELS = 100_000_000  # a picture that claims more is taken for a decompression bomb
MAX_SIDE = 30_000  # px; one as high takes seconds to pad
STRIP_PIXELS = 2**22  # of a picture that are padded at once
# Of pixels, and known by their first bytes: no PostScript, which Pillow has run by another program, and none that could be anything (TGA).
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM", "ICO")

# What Pillow says of odd metadata would be said once a picture. What is wrong with the pixels is an error.
warnings.filterwarnings("ignore", module=r"PIL\.")
logging.getLogger("PIL").setLevel(logging.ERROR)

Picture = bytes | str | pathlib.Path | np.ndarray | Image.Image


def load_image(picture: Picture, vision: VisionConfig, fit: str = "pad") -> np.ndarray:
    """Decodes one picture and makes it a square of the tower's size.

    Bit for bit what transformers 5 makes of a picture with Pillow (4.x, and 5 from a file, ignore transparency), except that 16-bit gray is scaled to
    8 bits instead of clipped to white.

    Args:
      picture: see `decode`.
      vision: gives the side in px, and the colour to pad with: its mean.
      fit: pad (the method's) | crop | stretch; see FITS.
    Returns:
      u8[size, size, 3], RGB.
    Raises:
      BadSample: if the file is missing, truncated, too large or no picture.
    """
    require(fit in FITS, "fit", fit, f"one of {tuple(FITS)}")
    return np.asarray(FITS[fit](decode(picture), vision))


def decode(picture: Picture) -> Image.Image:
    """A whole picture in RGB: turned upright (EXIF), laid on white where it is transparent; of an animation the first frame. Colour profiles are not applied.

    Damage within a JPEG that still ends as one cannot be seen: libjpeg fills it up and does not say so.

    Args:
      picture: encoded bytes or a file in one of FORMATS, in any colour mode; u8[H,W], u8[H,W,3] or u8[H,W,4]; or Pillow's.
    Raises:
      BadSample: if the file is missing, truncated, too large or no picture.
    """
    with picture_faults(picture):
        image = _open(picture)
        if image.width * image.height > MAX_PIXELS or max(image.size) > MAX_SIDE:
            raise BadSample(
                f"picture too large: {image.width} x {image.height} px, more than {MAX_PIXELS} in all or {MAX_SIDE} on a side"
            )
        image.load()
        with contextlib.suppress(
            Exception
        ):  # a broken block of metadata does not spoil the picture
            ImageOps.exif_transpose(image, in_place=True)
        return _rgb(image)


@contextlib.contextmanager
def picture_faults(picture: Picture) -> Iterator[None]:
    """Whatever reading a picture raises, as a BadSample that says what is wrong with it."""
    try:
        yield
    except (BadSample, MemoryError):
        raise
    except FileNotFoundError:
        raise BadSample(f"no such picture file: {picture}") from None
    except Exception as error:  # on broken bytes a decoder may raise anything
        raise BadSample(f"unreadable picture: {str(error) or type(error).__name__}") from error


def _open(picture) -> Image.Image:
    if isinstance(picture, Image.Image):
        return picture.copy()  # the caller's stays as it is
    if isinstance(picture, np.ndarray):
        return Image.fromarray(picture)
    encoded = picture if isinstance(picture, bytes) else pathlib.Path(picture).read_bytes()
    try:
        return Image.open(io.BytesIO(encoded), formats=FORMATS)
    except UnidentifiedImageError:
        raise BadSample(
            f"unreadable picture: {len(encoded)} bytes, none of {', '.join(FORMATS)}; they begin with {encoded[:16]!r}"
        ) from None


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("F", "I"):
        raise BadSample(
            "unreadable picture: pixels of 32 bits, of which nothing says what is white"
        )
    if image.mode.startswith(
        "I;16"
    ):  # Pillow's convert would make all but the darkest 256 of the grays white
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if not image.has_transparency_data:
        return image if image.mode == "RGB" else image.convert("RGB")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def pad(image: Image.Image, vision: VisionConfig) -> Image.Image:
    """A square as large as the longer side, the picture in its middle on the mean colour, then resized.

    Pillow resizes rows, then columns. So does this, with only the picture's own rows and strip by strip: the square itself, 1.6 GB for a panorama
    20,000 px wide, is never made.
    """
    size, side, fill = (
        vision.image_size,
        max(image.size),
        tuple(int(255 * mean) for mean in vision.pixel_mean),
    )
    left, top = ((side - length) // 2 for length in image.size)
    square, height = Image.new("RGB", (size, side), fill), max(1, STRIP_PIXELS // side)
    for y in range(0, image.height, height):
        strip = (
            image
            if image.height <= height
            else image.crop((0, y, image.width, min(y + height, image.height)))
        )
        if image.width < side:
            rows = Image.new("RGB", (side, strip.height), fill)
            rows.paste(strip, (left, 0))
            strip = rows
        square.paste(_resize(strip, (size, strip.height)), (0, top + y))
    return stretch(square, vision)


def crop(image: Image.Image, vision: VisionConfig) -> Image.Image:
    """Resized by the shorter side, then the middle of the longer one (CLIP's own way). Raises BadSample for a line of a picture."""
    size, short = vision.image_size, min(image.size)
    width, height = (int(size * side / short) for side in image.size)
    if width * height > MAX_PIXELS:
        raise BadSample(
            f"picture too long: {image.width} x {image.height} px, more than {MAX_PIXELS} in all once its shorter side fits"
        )
    image = _resize(image, (width, height))
    left, top = (width - size) // 2, (height - size) // 2
    return image.crop((left, top, left + size, top + size))


def stretch(image: Image.Image, vision: VisionConfig) -> Image.Image:
    """Resized to the square, whatever its proportions (SigLIP's own way)."""
    return _resize(image, (vision.image_size, vision.image_size))


FITS = {"pad": pad, "crop": crop, "stretch": stretch}


def _resize(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    return image if image.size == size else image.resize(size, Image.Resampling.BICUBIC)
