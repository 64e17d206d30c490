"""Answers a question about pictures: python -m mod_jax.generate --run=runs/quickstart --image=photo.jpg --question="What is this?"

The model is the student that a run's stage left behind (--run, --stage; the last stage by default) or any folder that
`mod_jax.load` takes (--model).
"""

import pathlib
import sys

from absl import app, flags, logging

import mod_jax
from mod_jax.config import require
from mod_jax.data.scenes.builder import load_scenes, read_objects
from mod_jax.recipe import open_run

RUN = flags.DEFINE_string("run", None, "Folder of a run.")
STAGE = flags.DEFINE_string(
    "stage", None, "The stage whose student answers; the run's last by default."
)
MODEL = flags.DEFINE_string(
    "model", None, "An imported folder or a Hugging Face LLaVA folder, instead of a run."
)
IMAGE = flags.DEFINE_multi_string("image", [], "A picture; may be given several times.")
SCENE = flags.DEFINE_integer(
    "scene", None, "Number of a held-out scene (with --run), instead of --image."
)
QUESTION = flags.DEFINE_string(
    "question", "Describe the picture.", "What to ask; <image> marks where a picture stands."
)
TEMPLATE = flags.DEFINE_string(
    "template", None, "Chat template; the run's or the folder's own by default."
)
TOKENS = flags.DEFINE_integer("max_new_tokens", 64, "Longest answer.")


def scene(number: int) -> bytes:
    """The picture of a held-out scene of the run; tells what it shows."""
    require(
        RUN.value is not None,
        "--scene",
        number,
        "a run that is evaluated on scenes",
        "Say --run=FOLDER.",
    )
    evaluation = open_run(RUN.value, STAGE.value)[0].config.evaluation
    require(bool(evaluation.models), "--scene", number, "a run that is evaluated on scenes")
    record = load_scenes(evaluation.path, evaluation.split)[number]
    print(
        "the scene shows:",
        "; ".join(
            f"{item.size} {item.colour} {item.shape}" for item in read_objects(record["objects"])
        ),
    )
    return record["image"]


def main(_):
    logging.set_verbosity(logging.WARNING)
    require(
        bool(RUN.value) != bool(MODEL.value),
        "--run, --model",
        (RUN.value, MODEL.value),
        "exactly one of the two",
    )
    model = mod_jax.load(RUN.value or MODEL.value, STAGE.value, template=TEMPLATE.value)
    pictures = (
        [pathlib.Path(path) for path in IMAGE.value]
        if SCENE.value is None
        else [scene(SCENE.value)]
    )
    print("question:", QUESTION.value)
    print("answer:", model.generate(QUESTION.value, pictures, TOKENS.value))


def cli() -> None:
    """The command; an expected error is one line and exit code 1."""
    try:
        app.run(main)
    except ValueError as error:  # ConfigError, BadSample
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    cli()
