"""All stages of the method for a few steps on real pictures: --config=configs/photos.py:FOLDER

FOLDER holds chat.json (LLaVA's JSON), preference.json (preference pairs) and images/. The tower has
the full size of CLIP ViT-L/14 at 336 px, and the vocabulary has Qwen's 151,936 rows. The decoders
are small and all weights are random: the run shows that a machine can train at these sizes, not
what the method learns.
"""

from ml_collections import ConfigDict

from mod_jax.config import RecipeConfig, complete

LANGUAGE = ("language_model.*", "adaptor.*")
SPARSE = ("language_model.layers.mlp.*", "language_model.layers.moe.*", "adaptor.*")


def model(width: int, layers: int, seed: int) -> dict:
    """A model with random weights and a decoder of `layers` layers of width `width`."""
    decoder = {
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_layers": layers,
        "num_heads": width // 64,
        "num_kv_heads": 2,
    }
    return {"random": {"vision": {}, "decoder": decoder}, "seed": seed}


def get_config(folder: str = "photos") -> ConfigDict:
    """The recipe; `folder` is what stands after the colon of --config."""

    def data(kind: str) -> dict:
        source = {"kind": kind, "path": f"{folder}/{kind}.json", "images": f"{folder}/images"}
        return {
            "sources": (source,),
            "sequence_length": 1536,
            "images_per_row": 2,
            "samples_per_row": 2,
        }

    def stage(trains, objective, lr, kind="chat", **more) -> dict:
        return {
            "trains": trains,
            "objective": objective,
            "data": data(kind),
            "optimizer": {"lr": lr},
            "steps": 2,
            "rows": 2,
            **more,
        }

    sparse = {"layers": "sparse", "num_experts": 4, "experts_per_token": 2}
    return complete(
        RecipeConfig,
        {
            "name": "photos",
            "tokenizer": "assets/byte_tokenizer",
            "student": model(128, 4, seed=0),
            "teacher": model(256, 4, seed=1),
            "stages": {
                "adaptor": stage(("adaptor.*",), {"kind": "next_token"}, 1e-3),
                "dense_mimic": stage(LANGUAGE, {"kind": "mimic"}, 2e-5, starts_from="adaptor"),
                "sparse_mimic": stage(
                    SPARSE,
                    {"kind": "mimic", "next_token_weight": 1.0},
                    2e-5,
                    starts_from="dense_mimic",
                    upcycle=sparse,
                ),
                "preference": stage(
                    SPARSE,
                    {"kind": "preference"},
                    2e-6,
                    kind="preference",
                    starts_from="sparse_mimic",
                ),
            },
            "order": ("adaptor", "dense_mimic", "sparse_mimic", "preference"),
            "log_every": 1,
        },
    )
