"""Pictures as the vision tower takes them: RGB, square, resized (method, section 4)."""

import io
import pathlib
import struct

import numpy as np
from PIL import Image, ImageOps

from mod_jax.data.sources import BadSample

FILL = (122, 116, 104)  # CLIP's mean colour
MAX_PIXELS = 100_000_000  # a picture that claims more is taken for a decompression bomb


def load_image(picture: bytes | pathlib.Path, size: int) -> np.ndarray:
    """Decodes, turns upright (EXIF), pads to a centred square and resizes (bicubic, antialiased) one picture.

    Args:
      picture: encoded bytes or a file; whatever Pillow reads, in any colour mode.
      size: side in px.
    Returns:
      u8[size, size, 3], RGB.
    Raises:
      BadSample: if the file is missing, truncated, too large or no picture.
    """
    try:
        with Image.open(io.BytesIO(picture) if isinstance(picture, bytes) else picture) as image:
            if image.width * image.height > MAX_PIXELS:
                raise BadSample(f"picture of {image.width} x {image.height} px, more than {MAX_PIXELS}")
            return np.asarray(square(ImageOps.exif_transpose(image).convert("RGB"), size))
    except BadSample:
        raise
    except FileNotFoundError:
        raise BadSample(f"no such picture file: {picture}") from None
    except (OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError) as error:
        raise BadSample(f"unreadable picture: {error}") from None


def square(image: Image.Image, size: int) -> Image.Image:
    """An RGB picture padded to a centred square with FILL and resized; the same object where it fits already."""
    side = max(image.size)
    if image.width != image.height:
        canvas = Image.new("RGB", (side, side), FILL)
        canvas.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        image = canvas
    return image if side == size else image.resize((size, size), Image.Resampling.BICUBIC)
