"""preprocessor_config.json, read and written: how a picture becomes the input of a vision tower.

This module imports neither transformers nor Pillow.
"""

import pathlib

from mod_jax.config import VisionConfig, require
from mod_jax.interop.folder import JsonObject, read_json


def _square(size: int) -> JsonObject:
    return {"height": size, "width": size}


def _center_crop(size: int) -> JsonObject:
    return {"do_center_crop": True, "crop_size": _square(size)}


def _steps_of_fits(size: int) -> dict[str, JsonObject]:
    """Image processor settings of each of data.samples.pixels.FITS, for squares of `size` px."""
    return {
        "pad": {"do_pad": True, "size": {"shortest_edge": size}, **_center_crop(size)},
        "crop": {"do_pad": False, "size": {"shortest_edge": size}, **_center_crop(size)},
        "stretch": {"do_pad": False, "size": _square(size), "do_center_crop": False},
    }


# Settings that all fits share.
OTHER_STEPS = {
    "do_resize": True,
    "resample": 3,  # bicubic
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
}


def image_processor_to_json(vision: VisionConfig, fit: str = "pad") -> JsonObject:
    """Contents of preprocessor_config.json.

    They say that a picture is made a square, resized and normalised.

    Args:
      vision: Vision tower that the pictures are for.
      fit: How a picture is made a square, a key of data.samples.pixels.FITS.
    """
    return {
        **_steps_of_fits(vision.image_size)[fit],
        **OTHER_STEPS,
        "image_processor_type": "LlavaImageProcessor",
        "processor_class": "LlavaProcessor",
        "do_convert_rgb": True,
        "image_mean": list(vision.pixel_mean),
        "image_std": list(vision.pixel_std),
    }


def read_image_processor(folder) -> JsonObject:
    """Reads the image processor of a folder; empty if there is none.

    transformers 4.x writes it to preprocessor_config.json, 5.x to a part of processor_config.json.
    """
    folder = pathlib.Path(folder)
    values = read_json(folder / "preprocessor_config.json")
    return values or read_json(folder / "processor_config.json").get("image_processor", {})


def fit_of(values: JsonObject, size: int) -> str:
    """Returns how an image processor makes a picture a square of `size` px: pad, crop or stretch.

    Without an image processor (empty `values`) pictures are padded, as in the method.

    Raises:
      ConfigError: If it prepares pictures in any other way.
    """
    if not values:
        return "pad"
    defaults = {"do_pad": False, "do_center_crop": "crop_size" in values, **OTHER_STEPS}
    found = defaults | values
    known = {fit: steps | OTHER_STEPS for fit, steps in _steps_of_fits(size).items()}
    fits = [fit for fit, steps in known.items() if steps.items() <= found.items()]
    require(
        bool(fits),
        "image processor",
        {key: found.get(key) for key in known["crop"]},
        f"one of {known}, the ways in which pictures can be prepared here",
    )
    return fits[0]
