"""The whole method at a small size, on the built-in scenes: minutes on two CPU cores.

| stage | trains | objective | starts from |
|---|---|---|---|
| adaptor | adaptor | next token | pretrained tower and language model |
| fine_tuned (baseline) | language model, adaptor | next token | adaptor |
| dense_mimic | language model, adaptor | KL to the teacher | adaptor |
| sparse_mimic | FFNs, routers, adaptor | KL, next token, balance | dense_mimic, upcycled |
| preference | the same | KTO on pairs (the teacher is the reference), balance | sparse_mimic |
"""

from ml_collections import ConfigDict

from mod_jax.config import RecipeConfig, complete

LANGUAGE = ("language_model.*", "adaptor.*")
SPARSE = ("language_model.layers.mlp.*", "language_model.layers.moe.*", "adaptor.*")


def data(split: str, samples: int) -> dict:
    """Rows of at most `samples` scenes; a chat has about 90 positions, a pair about 45."""
    source = {"kind": "scenes", "path": "data/scenes", "split": split}
    return {
        "sources": (source,),
        "sequence_length": 192,
        "images_per_row": samples,
        "samples_per_row": samples,
        "template": "brief",
    }


def get_config() -> ConfigDict:
    """The recipe: keys of `mod_jax.config.RecipeConfig`."""
    mimic = {"kind": "mimic"}
    stages = {
        "adaptor": {
            "trains": ("adaptor.*",),
            "objective": {"kind": "next_token"},
            "data": data("crowd", 2),
            "optimizer": {"lr": 5e-3},
            "steps": 60,
            "rows": 16,
        },
        "fine_tuned": {
            "starts_from": "adaptor",
            "trains": LANGUAGE,
            "objective": {"kind": "next_token"},
            "data": data("crowd", 2),
            "optimizer": {"lr": 3e-3},
            "steps": 500,
            "rows": 16,
        },
        "dense_mimic": {
            "starts_from": "adaptor",
            "trains": LANGUAGE,
            "objective": mimic,
            "data": data("crowd", 2),
            "optimizer": {"lr": 3e-3},
            "steps": 500,
            "rows": 16,
        },
        "sparse_mimic": {
            "starts_from": "dense_mimic",
            "upcycle": {"layers": "sparse", "num_experts": 4, "experts_per_token": 2},
            "trains": SPARSE,
            "objective": {**mimic, "next_token_weight": 1.0},
            "data": data("crowd", 2),
            "optimizer": {"lr": 2e-3},
            "steps": 400,
            "rows": 16,
        },
        "preference": {
            "starts_from": "sparse_mimic",
            "trains": SPARSE,
            "objective": {"kind": "preference", "preference": "kto_pair"},
            "data": data("preference", 4),
            "optimizer": {"lr": 3e-5},
            "steps": 60,
            "rows": 16,
        },
    }
    return complete(
        RecipeConfig,
        {
            "name": "quickstart",
            "tokenizer": "assets/scenes/language_model",
            "student": {
                "vision_tower": "assets/scenes/vision_tower",
                "language_model": "assets/scenes/language_model",
            },
            "teacher": {"folder": "assets/scenes/teacher"},
            "stages": stages,
            "order": ("adaptor", "fine_tuned", "dense_mimic", "sparse_mimic", "preference"),
            "evaluation": {
                "models": ("teacher", "fine_tuned", "dense_mimic", "sparse_mimic", "preference")
            },
        },
    )
