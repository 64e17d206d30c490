"""preprocessor_config.json, read and written: how a picture becomes the input of a vision tower.

This module imports neither transformers nor Pillow.
"""

import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from mod_jax.config import VisionConfig, require
from mod_jax.interop.folder import JsonObject, read_json
from mod_jax.interop.stated import first_stated


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

    transformers 5.x writes it to a part of processor_config.json, 4.x to preprocessor_config.json.

    Raises:
      ConfigError: If both are there and prepare pictures in different ways.
    """
    folder = pathlib.Path(folder)
    places = {
        "processor_config.json": read_json(folder / "processor_config.json").get("image_processor"),
        "preprocessor_config.json": read_json(folder / "preprocessor_config.json"),
    }
    found = {place: values for place, values in places.items() if values}
    for place, values in found.items():
        require(
            isinstance(values, dict), f"image processor in {folder}/{place}", values, "an object"
        )
    completed = {place: _completed(values) for place, values in found.items()}
    for key in (*OTHER_STEPS, "do_pad", "do_center_crop", "size", "image_mean", "image_std"):
        stated = {place: values.get(key) for place, values in completed.items()}
        first_stated(f"{key} of the image processor in {folder}", stated)
    return next(iter(found.values()), {})


def fit_of(values: JsonObject, size: int) -> str:
    """Returns how an image processor makes a picture a square of `size` px: pad, crop or stretch.

    Without an image processor (empty `values`) pictures are padded, as in the method.

    Raises:
      ConfigError: If it prepares pictures in any other way.
    """
    if not values:
        return "pad"
    found = _completed(values)
    known = {fit: steps | OTHER_STEPS for fit, steps in _steps_of_fits(size).items()}
    fits = [fit for fit, steps in known.items() if steps.items() <= found.items()]
    require(
        bool(fits),
        "image processor",
        {key: found.get(key) for key in known["crop"]},
        f"one of {known}, the ways in which pictures can be prepared here",
    )
    return fits[0]


def _completed(values: JsonObject) -> JsonObject:
    """An image processor with what it leaves out, and sizes as objects, as transformers reads it.

    Old files have numbers for sizes; that of the picture is its shortest edge. A step is off if its
    key is null.
    """
    kind = values.get("image_processor_type") or values.get("feature_extractor_type")
    crops = values.get("crop_size") is not None and "siglip" not in str(kind).lower()
    found: JsonObject = {"do_pad": False, "do_center_crop": crops, **OTHER_STEPS}
    for key, value in values.items():
        if value is not None:
            found[key] = value
        elif key.startswith("do_"):
            found[key] = False
    for key, of_number in (("size", _shortest_edge), ("crop_size", _square)):
        if key in found:
            found[key] = _size(key, found[key], of_number)
    return found


def _shortest_edge(size: int) -> JsonObject:
    return {"shortest_edge": size}


def _size(key: str, value: Any, of_number: Callable[[int], JsonObject]) -> JsonObject:
    if isinstance(value, Mapping):
        return dict(value)
    if type(value) is int:
        return of_number(value)
    is_pair = isinstance(value, (list, tuple)) and len(value) == 2
    require(is_pair, f"{key} of the image processor", value, "an object, a number or two numbers")
    return {"height": value[0], "width": value[1]}
