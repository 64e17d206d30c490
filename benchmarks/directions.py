"""Do the paper's claims hold on the scenes? python -m benchmarks.directions --seeds 3

Runs the quickstart's stages, and the stages that they are compared with, once per seed. The seed
changes the new adaptor, the order of the data and the new routers; the pretrained parts stay the
same. A stopped run continues where it stopped. Prints means and spreads as the tables in
benchmarks/LOG.md.

The stages that are added to the quickstart's to compare with (DIRECTIONS):

    sparse_alone    made sparse right after `adaptor`, for the steps of both mimic stages
    all_active      two experts, both always active: the activated compute of sparse_mimic
    dense_longer    the student stays dense and is trained as long as sparse_mimic
    preference_dpo  DPO instead of KTO
"""

import argparse
import copy
import pathlib
import time
from collections.abc import Sequence

import numpy as np

from configs import quickstart
from mod_jax import train
from mod_jax.config import RecipeConfig, from_dict
from mod_jax.storage.atomic import write_json

# claim -> (model, the model that it should be better than, metric, +1 if more is better, else -1)
DIRECTIONS = {
    "mimic beats fine-tuning": ("dense_mimic", "fine_tuned", "accuracy", 1),
    "dense then sparse beats sparse alone": ("sparse_mimic", "sparse_alone", "accuracy", 1),
    "sparse beats dense at equal activated compute": ("sparse_mimic", "all_active", "accuracy", 1),
    "sparse beats dense trained as long": ("sparse_mimic", "dense_longer", "accuracy", 1),
    "preference lowers hallucination below the teacher's": (
        "preference",
        "teacher",
        "hallucination",
        -1,
    ),
    "preference lowers hallucination": ("preference", "sparse_mimic", "hallucination", -1),
    "preference keeps accuracy": ("preference", "sparse_mimic", "accuracy", 1),
    "KTO hallucinates less than DPO": ("preference", "preference_dpo", "hallucination", -1),
}


def recipe(seed: int) -> RecipeConfig:
    """The quickstart's recipe with the stages to compare with, everything seeded by `seed`."""
    config = quickstart.get_config().to_dict()
    stages = config["stages"]
    dense = stages["dense_mimic"]
    sparse = stages["sparse_mimic"]
    preference = stages["preference"]
    stages["sparse_alone"] = {
        **sparse,
        "starts_from": "adaptor",
        "steps": dense["steps"] + sparse["steps"],
        "trains": dense["trains"],
        "optimizer": dense["optimizer"],
    }
    stages["all_active"] = {**sparse, "upcycle": {**sparse["upcycle"], "num_experts": 2}}
    stages["dense_longer"] = {
        **sparse,
        "upcycle": None,
        "trains": ("language_model.layers.mlp.*", "adaptor.*"),
    }
    stages["preference_dpo"] = {
        **preference,
        "objective": {**preference["objective"], "preference": "sigmoid"},
    }
    for stage in stages.values():
        stage["seed"] = seed
        stage["data"] = {**copy.deepcopy(stage["data"]), "seed": 1000 * seed}
    comparisons = ("sparse_alone", "all_active", "dense_longer", "preference_dpo")
    config["student"]["seed"] = seed
    config["order"] = (*config["order"], *comparisons)
    config["evaluation"] = {
        **config["evaluation"],
        "models": ("teacher", *config["order"][1:]),
        "pictures": 500,
    }
    config["name"] = f"directions, seed {seed}"
    return from_dict(RecipeConfig, config)


def summary(runs: list[dict], minutes: float) -> str:
    """Markdown: a table of the models and a table of the claims, over the runs of all seeds.

    Args:
      runs: The results of each seed, as in results.json.
      minutes: Duration of all runs.
    """
    rows = {
        model: [next(row for row in run["rows"] if row["model"] == model) for run in runs]
        for model in (row["model"] for row in runs[0]["rows"])
    }
    questions = rows["teacher"][0]["questions"]
    lines = [f"{len(runs)} seeds, {questions} questions, {minutes:.0f} minutes.", ""]
    lines += [*_model_table(rows), "", *_claim_table(rows, len(runs))]
    return "\n".join(lines)


def _model_table(rows: dict[str, list[dict]]) -> list[str]:
    kinds = list(rows["teacher"][0]["by_type"])
    headings = [
        "model",
        "accuracy",
        *kinds,
        "hallucination",
        "objects named",
        "yes rate",
        "F1",
    ]
    lines = [f"| {' | '.join(headings)} |", "|---" * len(headings) + "|"]
    for model, found in rows.items():
        columns = [
            [row["accuracy"] for row in found],
            *([row["by_type"][kind] for row in found] for kind in kinds),
            [row["hallucination"] for row in found],
            [row["named"] for row in found],
            [row["existence"]["yes_rate"] for row in found],
            [row["existence"]["f1"] for row in found],
        ]
        lines.append(f"| {model} | {' | '.join(map(spread, columns))} |")
    return lines


def _claim_table(rows: dict[str, list[dict]], seeds: int) -> list[str]:
    lines = [
        "| direction | measured | difference by seed, points | holds |",
        "|---|---|---|---|",
    ]
    for claim, (better, than, metric, sign) in DIRECTIONS.items():
        ours = np.array([row[metric] for row in rows[better]])
        theirs = np.array([row[metric] for row in rows[than]])
        difference = ours - theirs
        by_seed = ", ".join(f"{100 * points:+.1f}" for points in difference)
        holds = int(np.sum(sign * difference > 0))
        lines.append(
            f"| {claim} | {metric}: {better} {spread(ours)}, {than} {spread(theirs)} | {by_seed} "
            f"| {holds} of {seeds} seeds, mean {100 * np.mean(difference):+.1f} |"
        )
    return lines


def spread(values: Sequence[float] | np.ndarray) -> str:
    """Mean (smallest to largest), in percent."""
    percent = 100 * np.asarray(values)
    mean = f"{percent.mean():.1f}"
    if np.ptp(percent) == 0:
        return mean
    return f"{mean} ({percent.min():.1f} to {percent.max():.1f})"


def main() -> None:
    """Runs all seeds and prints the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workdir", type=pathlib.Path, default=pathlib.Path("runs/directions"))
    options = parser.parse_args()
    start = time.perf_counter()
    runs = [
        train.run(recipe(seed), options.workdir / f"seed{seed}") for seed in range(options.seeds)
    ]
    text = summary(runs, (time.perf_counter() - start) / 60)
    write_json(options.workdir / "results.json", runs)
    print(text)


if __name__ == "__main__":
    main()
