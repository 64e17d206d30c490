"""Do the paper's directions hold on scenes? python -m benchmarks.directions --seeds 3

The quickstart's stages and what they are compared with, once a seed (new adaptor, order of data, routers; the pretrained
parts are the same). Continues where it stopped. Prints means and spreads as the tables that benchmarks/LOG.md keeps.

| direction | better | than |
|---|---|---|
| mimic beats plain fine-tuning at equal steps | dense_mimic | fine_tuned |
| dense then sparse beats sparse alone, at equal steps | sparse_mimic | sparse_alone |
| sparse beats dense at equal activated compute | sparse_mimic | all_active: two experts, both always active |
| (and dense, trained as long) | sparse_mimic | dense_longer |
| preference lowers hallucination below the teacher's | preference | teacher |
| without losing accuracy | preference | sparse_mimic |
"""

import argparse
import copy
import pathlib
import time

import numpy as np

from configs import quickstart
from mod_jax import train
from mod_jax.config import RecipeConfig, from_dict
from mod_jax.storage.atomic import write_json

# name: (better, than, what is compared, +1 if more of it is better)
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
    """The quickstart with its comparisons, everything drawn from `seed`."""
    config = quickstart.get_config().to_dict()
    stages = config["stages"]
    dense, sparse, preference = (
        stages[name] for name in ("dense_mimic", "sparse_mimic", "preference")
    )
    together = dense["steps"] + sparse["steps"]
    stages["sparse_alone"] = {
        **sparse,
        "starts_from": "adaptor",
        "steps": together,
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
        stage["seed"], stage["data"] = seed, {**copy.deepcopy(stage["data"]), "seed": 1000 * seed}
    more = ("sparse_alone", "all_active", "dense_longer", "preference_dpo")
    config["student"]["seed"], config["order"] = seed, (*config["order"], *more)
    config["evaluation"] = {
        **config["evaluation"],
        "models": ("teacher", *config["order"][1:]),
        "pictures": 500,
    }
    config["name"] = f"directions, seed {seed}"
    return from_dict(RecipeConfig, config)


def summary(runs: list[dict], minutes: float) -> str:
    """Markdown: a table of models, a table of directions; mean and (spread: smallest to largest) over seeds."""
    rows = {
        row["model"]: [next(r for r in run["rows"] if r["model"] == row["model"]) for run in runs]
        for row in runs[0]["rows"]
    }
    lines = [
        f"{len(runs)} seeds, {rows['teacher'][0]['questions']} questions, {minutes:.0f} minutes.",
        "",
    ]
    kinds = list(rows["teacher"][0]["by_type"])
    lines += [
        "| model | accuracy | "
        + " | ".join(kinds)
        + " | hallucination | objects named | yes rate | F1 |",
        "|---" * (len(kinds) + 6) + "|",
    ]
    for model, found in rows.items():
        columns = [
            [r["accuracy"] for r in found],
            *([r["by_type"][kind] for r in found] for kind in kinds),
            [r["hallucination"] for r in found],
            [r["named"] for r in found],
            [r["existence"]["yes_rate"] for r in found],
            [r["existence"]["f1"] for r in found],
        ]
        lines.append(f"| {model} | " + " | ".join(map(spread, columns)) + " |")
    lines += [
        "",
        "| direction | measured | difference by seed, points | holds |",
        "|---|---|---|---|",
    ]
    for name, (better, than, what, sign) in DIRECTIONS.items():
        a, b = (np.array([r[what] for r in rows[model]]) for model in (better, than))
        by_seed = ", ".join(f"{100 * d:+.1f}" for d in a - b)
        holds = int(np.sum(sign * (a - b) > 0))
        lines.append(
            f"| {name} | {what}: {better} {spread(a)}, {than} {spread(b)} | {by_seed} | {holds} of {len(runs)} seeds, mean {100 * np.mean(a - b):+.1f} |"
        )
    return "\n".join(lines)


def spread(values) -> str:
    """Mean (smallest to largest), in percent."""
    values = 100 * np.asarray(values)
    return f"{values.mean():.1f}" + (
        f" ({values.min():.1f} to {values.max():.1f})" if np.ptp(values) > 0 else ""
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workdir", type=pathlib.Path, default=pathlib.Path("runs/directions"))
    options, start = parser.parse_args(), time.perf_counter()
    runs = [
        train.run(recipe(seed), options.workdir / f"seed{seed}") for seed in range(options.seeds)
    ]
    text = summary(runs, (time.perf_counter() - start) / 60)
    write_json(options.workdir / "results.json", runs)
    print(text)


if __name__ == "__main__":
    main()
