"""preprocessor_config.json in both directions: how a picture becomes what a tower reads. Brings neither transformers nor Pillow."""

import pathlib

from mod_jax.config import VisionConfig, require
from mod_jax.interop.folder import read_json

# The ways of data.images.FITS in an image processor's words, for a size in px.
FIT_STEPS = {
    "pad": lambda size: {"do_pad": True, "size": {"shortest_edge": size}, **_cropped(size)},
    "crop": lambda size: {"do_pad": False, "size": {"shortest_edge": size}, **_cropped(size)},
    "stretch": lambda size: {
        "do_pad": False,
        "size": {"height": size, "width": size},
        "do_center_crop": False,
    },
}
OTHER_STEPS = {
    "do_resize": True,
    "resample": 3,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
}  # 3: bicubic


def _cropped(size: int) -> dict:
    return {"do_center_crop": True, "crop_size": {"height": size, "width": size}}


def image_processor_to_json(vision: VisionConfig, fit: str = "pad") -> dict:
    """What the file says of a picture: made a square (`images.FITS`), resized, normalised (method, section 4)."""
    return (
        FIT_STEPS[fit](vision.image_size)
        | OTHER_STEPS
        | {
            "image_processor_type": "LlavaImageProcessor",
            "processor_class": "LlavaProcessor",
            "do_convert_rgb": True,
            "image_mean": list(vision.pixel_mean),
            "image_std": list(vision.pixel_std),
        }
    )


def read_image_processor(folder) -> dict:
    """The image processor of a folder: its own file (4.x), or a part of the processor's (5.x); empty if there is neither."""
    own, whole = (
        pathlib.Path(folder) / "preprocessor_config.json",
        pathlib.Path(folder) / "processor_config.json",
    )
    return read_json(own) or read_json(whole).get("image_processor", {})


def fit_of(values: dict, size: int) -> str:
    """How an image processor makes a picture a square of `size` px; without one pictures are padded, as the method does.

    Raises:
      ConfigError: for a way that is not in FIT_STEPS.
    """
    if not values:
        return "pad"
    said = {"do_pad": False, "do_center_crop": "crop_size" in values} | OTHER_STEPS | values
    known = {fit: steps(size) | OTHER_STEPS for fit, steps in FIT_STEPS.items()}
    fit = next((fit for fit, wanted in known.items() if wanted.items() <= said.items()), None)
    require(
        fit is not None,
        "image processor",
        {key: said.get(key) for key in known["crop"]},
        f"one of {known}, all that the vision tower is fed with",
    )
    return fit
