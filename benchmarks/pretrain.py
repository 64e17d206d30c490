"""Trains everything that assets/ ships, from scratch: python -m benchmarks.pretrain

A real user starts from a pretrained tower, a small pretrained language model and a trained teacher.
The quickstart must work without a network and cannot download them, so they are trained here on
scenes, with the project's own train step.
"""

import argparse
import json
import pathlib
import shutil
import time

from configs import scenes_language_model, scenes_teacher
from mod_jax import train
from mod_jax.config import RecipeConfig, from_dict
from mod_jax.data.samples.tokenizer import byte_tokenizer, scenes_tokenizer
from mod_jax.data.scenes.builder import prepare
from mod_jax.export.folder import export
from mod_jax.interop import huggingface
from mod_jax.recipe import Recipe
from mod_jax.sharding import make_mesh

WORK = pathlib.Path("runs/pretraining")


def trained(module, name: str):
    """Runs a one-stage recipe, unless it is done, and returns its model and results."""
    config = from_dict(RecipeConfig, module.get_config().to_dict())
    results = train.run(config, WORK / name)
    return Recipe(config, WORK / name, make_mesh(config.mesh)).student_after(name), results


def main() -> None:
    """Trains the models and replaces the folder of assets."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("assets"))
    output = parser.parse_args().output
    start = time.perf_counter()
    prepare("data/scenes_pretraining", train=60000, crowd=0, preference=0)
    prepare("data/scenes", train=0)
    tokenizer = scenes_tokenizer()
    tokenizer.save_pretrained(WORK / "tokenizer")
    language_model, _ = trained(scenes_language_model, "language_model")
    teacher, results = trained(scenes_teacher, "teacher")
    shutil.rmtree(output, ignore_errors=True)
    byte_tokenizer().save_pretrained(output / "byte_tokenizer")
    huggingface.save(output / "scenes" / "vision_tower", teacher.config.vision, teacher.params)
    huggingface.save(
        output / "scenes" / "language_model",
        language_model.config.decoder,
        language_model.params,
        others=tokenizer.save_pretrained,
    )
    export(WORK / "teacher", output / "scenes" / "teacher")
    size = sum(file.stat().st_size for file in output.rglob("*") if file.is_file())
    report = {
        "minutes": (time.perf_counter() - start) / 60,
        "megabytes": size / 1e6,
        "teacher": results["rows"][0],
    }
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
