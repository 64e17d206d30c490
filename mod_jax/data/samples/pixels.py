"""Decodes pictures and makes them the squares that the vision tower takes."""

import contextlib
import io
import logging
import pathlib
import warnings
from collections.abc import Iterator

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from mod_jax.config import VisionConfig, require
from mod_jax.data.sources.record import BadSample, shortened

MAX_PIXELS = 100_000_000  # a larger picture is taken for a decompression bomb
MAX_SIDE = 30_000  # px; a picture of this height takes seconds to pad
STRIP_PIXELS = 2**22  # number of pixels that are padded at once
# Pixels of the square that the shorter side of a padded picture has to fill. With less, the colour
# of the padding changes by less than a twentieth.
LEAST_SHOWN = 0.05
PNG = b"\x89PNG\r\n\x1a\n"
PNG_TEXTS = (b"tEXt", b"zTXt", b"iTXt")  # chunks of a PNG that hold texts
# Pixel formats that are recognized by their first bytes. This leaves out PostScript, for which
# Pillow runs another program, and TGA, which any bytes could be.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM", "ICO")

# Pillow warns of odd metadata, which would be once for each picture. Damaged pixels are errors.
warnings.filterwarnings("ignore", module=r"PIL\.")
logging.getLogger("PIL").setLevel(logging.ERROR)

Picture = bytes | str | pathlib.Path | np.ndarray | Image.Image


def load_image(picture: Picture, vision: VisionConfig, fit: str = "pad") -> np.ndarray:
    """Decodes a picture and makes it a square of the tower's size.

    Bit for bit, the result is that of transformers 5 for a picture opened with Pillow, except that
    16-bit gray is scaled to 8 bits instead of clipped to white. (transformers 4 ignores
    transparency, and so does 5 when it opens the file itself.)

    Args:
      picture: As for `decode`.
      vision: Gives the side in px, and the mean, which is the colour of the padding.
      fit: "pad" (the method's way), "crop" or "stretch"; see FITS.
    Returns:
      u8[size,size,3], RGB.
    Raises:
      BadSample: If the file is missing, truncated or too large, or is not a picture.
    """
    require(fit in FITS, "fit", fit, f"one of {tuple(FITS)}")
    return np.asarray(FITS[fit](decode(picture), vision))


def decode(picture: Picture) -> Image.Image:
    """Decodes a picture completely and converts it to RGB.

    It is turned upright according to its EXIF data, and laid on white where it is transparent. Only
    the first frame of an animation is used. Colour profiles are not applied.

    Damage within a JPEG that still has a proper end goes unnoticed, because libjpeg fills the gap
    and does not report it.

    Args:
      picture: The encoded bytes or the path of a file in one of FORMATS, in any colour mode; an
        array u8[H,W], u8[H,W,3] or u8[H,W,4]; or a Pillow image.
    Raises:
      BadSample: If the file is missing, truncated or too large, or is not a picture.
    """
    with picture_faults(picture):
        try:
            return _decoded(picture)
        except ValueError:
            # Pillow limits the texts in a PNG, which a picture does not need.
            encoded = _without_texts(picture)
            if encoded is None:
                raise
            return _decoded(encoded)


def _decoded(picture: Picture) -> Image.Image:
    image = _open(picture)
    if image.width * image.height > MAX_PIXELS or max(image.size) > MAX_SIDE:
        raise BadSample(
            f"picture too large: {image.width} x {image.height} px, "
            f"more than {MAX_PIXELS} in all or {MAX_SIDE} on a side"
        )
    image.load()
    with contextlib.suppress(Exception):  # broken metadata do not spoil the picture
        ImageOps.exif_transpose(image, in_place=True)
    return _to_rgb(image)


def _without_texts(picture: Picture) -> bytes | None:
    """Returns the bytes of a PNG without the chunks of PNG_TEXTS; None if there are none."""
    if not isinstance(picture, (bytes, str, pathlib.Path)):
        return None
    encoded = _encoded(picture)
    if not encoded.startswith(PNG):
        return None
    kept = [PNG]
    start = len(PNG)
    while start < len(encoded):
        end = start + 12 + int.from_bytes(encoded[start : start + 4])  # length, name, data, CRC
        if encoded[start + 4 : start + 8] not in PNG_TEXTS:
            kept.append(encoded[start:end])
        start = end
    whole = b"".join(kept)
    return whole if len(whole) < len(encoded) else None


@contextlib.contextmanager
def picture_faults(picture: Picture) -> Iterator[None]:
    """Turns every error of reading a picture into a BadSample that names the fault."""
    try:
        yield
    except (BadSample, MemoryError):
        raise
    except FileNotFoundError:
        raise BadSample(f"no such picture file: {shortened(str(picture))}") from None
    except Exception as error:  # decoders raise errors of many types on broken bytes
        reason = shortened(str(error) or type(error).__name__)
        raise BadSample(f"unreadable picture: {reason}") from error


def _open(picture: Picture) -> Image.Image:
    if isinstance(picture, Image.Image):
        return picture.copy()  # `exif_transpose` would change the caller's
    if isinstance(picture, np.ndarray):
        return Image.fromarray(picture)
    encoded = _encoded(picture)
    try:
        return Image.open(io.BytesIO(encoded), formats=FORMATS)
    except UnidentifiedImageError:
        raise BadSample(
            f"unreadable picture: {len(encoded)} bytes, none of {', '.join(FORMATS)}; "
            f"they begin with {encoded[:16]!r}"
        ) from None


def _encoded(picture: bytes | str | pathlib.Path) -> bytes:
    return picture if isinstance(picture, bytes) else pathlib.Path(picture).read_bytes()


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("F", "I"):
        raise BadSample("unreadable picture: pixels of 32 bits, whose value for white is unknown")
    if image.mode.startswith("I;16"):
        # Pillow's conversion clips: all but the darkest 256 of the 65,536 grays would become white.
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if not image.has_transparency_data:
        return image if image.mode == "RGB" else image.convert("RGB")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def pad(image: Image.Image, vision: VisionConfig) -> Image.Image:
    """Centres the picture in a square of its longer side, filled with the mean colour, and resizes.

    Pillow resizes rows first, then columns. This function does the same, but only for the picture's
    own rows and strip by strip, so the square itself is never made: it would take 1.6 GB for a
    panorama 20,000 px wide.

    Raises:
      BadSample: If the picture is so narrow that nothing but padding would be left of it.
    """
    size = vision.image_size
    side = max(image.size)
    if min(image.size) * size < LEAST_SHOWN * side:
        raise BadSample(
            f"picture too narrow: {image.width} x {image.height} px becomes nothing but padding in "
            f"a square of {size} px"
        )
    fill = tuple(int(255 * mean) for mean in vision.pixel_mean)
    left, top = ((side - length) // 2 for length in image.size)
    square = Image.new("RGB", (size, side), fill)
    strip_height = max(1, STRIP_PIXELS // side)
    for y in range(0, image.height, strip_height):
        bottom = min(y + strip_height, image.height)
        whole = image.height <= strip_height
        strip = image if whole else image.crop((0, y, image.width, bottom))
        if image.width < side:
            rows = Image.new("RGB", (side, strip.height), fill)
            rows.paste(strip, (left, 0))
            strip = rows
        square.paste(_resize(strip, (size, strip.height)), (0, top + y))
    return stretch(square, vision)


def crop(image: Image.Image, vision: VisionConfig) -> Image.Image:
    """Resizes by the shorter side and cuts the square out of the middle, as CLIP does.

    Raises:
      BadSample: If the picture is so narrow that it would become too large.
    """
    size = vision.image_size
    short = min(image.size)
    width, height = (int(size * side / short) for side in image.size)
    if width * height > MAX_PIXELS:
        raise BadSample(
            f"picture too long: {image.width} x {image.height} px, more than {MAX_PIXELS} in all "
            f"when its shorter side is resized to {size}"
        )
    image = _resize(image, (width, height))
    left = (width - size) // 2
    top = (height - size) // 2
    return image.crop((left, top, left + size, top + size))


def stretch(image: Image.Image, vision: VisionConfig) -> Image.Image:
    """Resizes both sides to the square, whatever the proportions, as SigLIP does."""
    return _resize(image, (vision.image_size, vision.image_size))


FITS = {"pad": pad, "crop": crop, "stretch": stretch}


def _resize(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    return image if image.size == size else image.resize(size, Image.Resampling.BICUBIC)
