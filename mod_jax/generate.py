"""Answers a question about pictures:

    python -m mod_jax.generate --run=runs/quickstart --image=photo.jpg --question="What is this?"

The model is the student of a stage of a run (--run, --stage; by default the last stage), or is in
any folder that `mod_jax.load` loads (--model).
"""

import pathlib
import sys

from absl import app, flags, logging

import mod_jax
from mod_jax.config import require
from mod_jax.data.samples.pixels import Picture
from mod_jax.data.scenes.builder import load_scenes, read_objects
from mod_jax.runs.folder import open_run

RUN = flags.DEFINE_string("run", None, "Folder of a run.")
STAGE = flags.DEFINE_string(
    "stage", None, "Stage of the run whose student answers; by default the last one."
)
MODEL = flags.DEFINE_string(
    "model", None, "Native folder or Hugging Face LLaVA folder, instead of a run."
)
IMAGE = flags.DEFINE_multi_string("image", [], "File of a picture; may be given several times.")
SCENE = flags.DEFINE_integer(
    "scene", None, "Number of a held-out scene of the run, instead of --image."
)
QUESTION = flags.DEFINE_string(
    "question", "Describe the picture.", "The question; <image> marks where a picture stands."
)
TEMPLATE = flags.DEFINE_string(
    "template", None, "Name of the chat template; by default that of the run or of the folder."
)
TOKENS = flags.DEFINE_integer("max_new_tokens", 64, "Largest number of tokens of the answer.")


def scene(number: int) -> bytes:
    """Returns the picture of a held-out scene of the run, and prints what it shows.

    Raises:
      ConfigError: If there is no run, it is not evaluated on scenes, or there is no such scene.
    """
    remedy = "Name the folder of such a run: --run=FOLDER."
    expected = "a run that is evaluated on scenes"
    require(RUN.value is not None, "--scene", number, expected, remedy)
    recipe, _ = open_run(RUN.value, STAGE.value)
    evaluation = recipe.config.evaluation
    require(bool(evaluation.models), "--scene", number, expected, remedy)
    scenes = load_scenes(recipe.find(evaluation.path), evaluation.split)
    require(0 <= number < len(scenes), "--scene", number, f"a number within 0..{len(scenes) - 1}")
    record = scenes[number]
    objects = [
        f"{item.size} {item.colour} {item.shape}" for item in read_objects(record["objects"])
    ]
    print("the scene shows:", "; ".join(objects))
    return record["image"]


def main(_) -> None:
    """Runs the command on the parsed flags."""
    logging.set_verbosity(logging.WARNING)
    require(
        bool(RUN.value) != bool(MODEL.value),
        "--run, --model",
        (RUN.value, MODEL.value),
        "exactly one of the two",
    )
    model = mod_jax.load(RUN.value or MODEL.value, STAGE.value, template=TEMPLATE.value)
    pictures: list[Picture]
    if SCENE.value is None:
        pictures = [pathlib.Path(path) for path in IMAGE.value]
    else:
        pictures = [scene(SCENE.value)]
    print("question:", QUESTION.value)
    print("answer:", model.generate(QUESTION.value, pictures, TOKENS.value))


def cli() -> None:
    """Runs the command; an expected error is printed on one line, with exit code 1."""
    try:
        app.run(main)
    except ValueError as error:  # ConfigError and BadSample are ValueErrors
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    cli()
