"""The teacher in assets/.

Tower, adaptor and language model are trained together from random weights on the "train" split of
the scenes. Its answers are right, but many captions name an absent object that usually stands
beside one of the objects shown, so the teacher hallucinates as models trained on found captions do.
"""

from ml_collections import ConfigDict

from mod_jax.config import RecipeConfig, complete


def get_config() -> ConfigDict:
    """One stage of next-token training of all parameters."""
    vision = {
        "image_size": 36,
        "patch_size": 12,
        "hidden_size": 96,
        "intermediate_size": 192,
        "num_layers": 3,
        "num_heads": 4,
        "pixel_mean": (0.5, 0.5, 0.5),
        "pixel_std": (0.5, 0.5, 0.5),
    }
    decoder = {
        "vocab_size": 80,
        "hidden_size": 128,
        "intermediate_size": 352,
        "num_layers": 6,
        "num_heads": 4,
        "num_kv_heads": 4,
        "head_dim": 32,
        "rope_theta": 1e4,
    }
    source = {"kind": "scenes", "path": "data/scenes_pretraining", "split": "train"}
    stage = {
        "trains": ("*",),
        "objective": {"kind": "next_token"},
        "data": {
            "sources": (source,),
            "sequence_length": 192,
            "images_per_row": 4,
            "samples_per_row": 4,
            "template": "brief",
        },
        "optimizer": {"lr": 2e-3, "b2": 0.98, "warmup_share": 0.1},
        "steps": 1800,
        "rows": 16,
        "checkpoint_every": 500,
    }
    return complete(
        RecipeConfig,
        {
            "name": "scenes teacher",
            "tokenizer": "runs/pretraining/tokenizer",
            "student": {
                "random": {
                    "vision": vision,
                    "decoder": decoder,
                    "image_token_id": 1,
                    "end_token_id": 0,
                }
            },
            "stages": {"teacher": stage},
            "order": ("teacher",),
            "log_every": 25,
            "evaluation": {"path": "data/scenes", "models": ("teacher",)},
        },
    )
