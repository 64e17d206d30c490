"""The small language model in assets/, from which students start.

It is trained on the texts of scenes without their pictures.
"""

from ml_collections import ConfigDict

from mod_jax.config import RecipeConfig, complete


def get_config() -> ConfigDict:
    """One stage of next-token training.

    The vision tower has the sizes of the teacher's, but no picture is read.
    """
    vision = {
        "image_size": 36,
        "patch_size": 12,
        "hidden_size": 96,
        "intermediate_size": 192,
        "num_layers": 3,
        "num_heads": 4,
    }
    decoder = {
        "vocab_size": 80,
        "hidden_size": 96,
        "intermediate_size": 256,
        "num_layers": 4,
        "num_heads": 4,
        "num_kv_heads": 4,
        "head_dim": 24,
        "rope_theta": 1e4,
    }
    source = {
        "kind": "scenes",
        "path": "data/scenes_pretraining",
        "split": "train",
        "text_only": True,
    }
    stage = {
        "trains": ("language_model.*",),
        "objective": {"kind": "next_token"},
        "data": {
            "sources": (source,),
            "sequence_length": 192,
            "images_per_row": 0,
            "samples_per_row": 4,
            "template": "brief",
        },
        "optimizer": {"lr": 3e-3, "b2": 0.98},
        "steps": 300,
        "rows": 16,
        "checkpoint_every": 200,
    }
    return complete(
        RecipeConfig,
        {
            "name": "scenes language model",
            "tokenizer": "runs/pretraining/tokenizer",
            "student": {
                "random": {
                    "vision": vision,
                    "decoder": decoder,
                    "image_token_id": 1,
                    "end_token_id": 0,
                }
            },
            "stages": {"language_model": stage},
            "order": ("language_model",),
            "log_every": 25,
        },
    )
