"""Answers a question about pictures: python -m mod_jax.generate --run=runs/quickstart --image=photo.jpg --question="What is this?"

The model is the student that a run's stage left behind (--run, --stage; the last stage by default) or a Hugging Face LLaVA
folder (--model).
"""

import json
import pathlib
import sys

from absl import app, flags, logging

from mod_jax.config import ConfigError, ModelSource, RecipeConfig, from_dict, require
from mod_jax.data.images import load_image
from mod_jax.data.scenes import load_scenes, read_objects
from mod_jax.data.sources import BadSample
from mod_jax.data.tokenizer import load_tokenizer
from mod_jax.generation import Question, answer
from mod_jax.recipe import Recipe, load_model
from mod_jax.sharding import make_mesh

RUN = flags.DEFINE_string("run", None, "Folder of a run.")
STAGE = flags.DEFINE_string("stage", None, "The stage whose student answers; the run's last by default.")
MODEL = flags.DEFINE_string("model", None, "A Hugging Face LLaVA folder, instead of a run.")
IMAGE = flags.DEFINE_multi_string("image", [], "A picture; may be given several times.")
SCENE = flags.DEFINE_integer("scene", None, "Number of a held-out scene (with --run), instead of --image.")
QUESTION = flags.DEFINE_string("question", "Describe the picture.", "What to ask; <image> marks where a picture stands.")
TEMPLATE = flags.DEFINE_string("template", None, "Chat template; a run's own by default, else qwen.")
TOKENS = flags.DEFINE_integer("max_new_tokens", 64, "Longest answer.")


def main(_):
    logging.set_verbosity(logging.WARNING)
    require(bool(RUN.value) != bool(MODEL.value), "--run, --model", (RUN.value, MODEL.value), "exactly one of the two")
    if RUN.value:
        path = pathlib.Path(RUN.value) / "config.json"
        require(path.is_file(), "--run", RUN.value, "a folder of a run, with its config.json")
        config = from_dict(RecipeConfig, json.loads(path.read_text()))
        mesh = make_mesh(config.mesh)
        recipe = Recipe(config, pathlib.Path(RUN.value), mesh)
        stage = STAGE.value or config.order[-1]
        require(stage in config.stages, "--stage", stage, f"one of {config.order}")
        model, tokenizer, template = recipe.student_after(stage), recipe.tokenizer, config.stages[stage].data.template
    else:
        tokenizer, template = load_tokenizer(MODEL.value), "qwen"
        model = load_model(ModelSource(folder=MODEL.value), tokenizer, "float32", "none")
    size = model.config.vision.image_size
    if SCENE.value is not None:
        require(RUN.value is not None and bool(config.evaluation.models), "--scene", SCENE.value, "a run that is evaluated on scenes")
        record = load_scenes(config.evaluation.path, config.evaluation.split)[SCENE.value]
        pictures = [record["image"]]
        print("the scene shows:", "; ".join(f"{item.size} {item.colour} {item.shape}" for item in read_objects(record["objects"])))
    else:
        pictures = [pathlib.Path(path) for path in IMAGE.value]
    question = Question(QUESTION.value, tuple(load_image(picture, size) for picture in pictures))
    print("question:", QUESTION.value)
    print("answer:", answer(model.config, model.params, tokenizer, TEMPLATE.value or template, [question], 1, TOKENS.value)[0])


def cli() -> None:
    """The command; an expected error is one line and exit code 1."""
    try:
        app.run(main)
    except (ConfigError, BadSample, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    cli()
