"""The recipes of LLaVA-MoD (arXiv 2408.15881): --config=configs/llava_mod.py:SIZE[,ROOT]

| SIZE | student | teacher |
|---|---|---|
| qwen1.5-0.5b, qwen1.5-1.8b | Qwen1.5-0.5B, Qwen1.5-1.8B | llava-qwen1.5-7b |
| qwen2-0.5b, qwen2-1.5b | Qwen2-0.5B, Qwen2-1.5B | llava-qwen2-7b |
| qwen2.5-0.5b, qwen2.5-1.5b | Qwen2.5-0.5B, Qwen2.5-1.5B | llava-qwen2.5-7b |
| qwen1.5-7b, qwen2-7b, qwen2.5-7b | makes that teacher, which nobody has published | |

The folder ROOT (data/llava_mod) has all models and data below it. A path that begins with an owner
and a name, such as Qwen/Qwen2-0.5B, is that repository of the Hugging Face Hub:

    hf download OWNER/NAME --local-dir ROOT/OWNER/NAME      # --repo-type dataset for data

`images` holds the pictures of all others, in the folders that LLaVA-1.5, ShareGPT4V and InternVL
agree on; `teachers` holds exported teachers. docs/recipes.md says where each comes from.
"""

import math
from typing import NamedTuple

from ml_collections import ConfigDict

from mod_jax.config import RecipeConfig, complete, require

SERIES = {
    "qwen1.5": ("Qwen1.5-0.5B", "Qwen1.5-1.8B", "Qwen1.5-7B"),
    "qwen2": ("Qwen2-0.5B", "Qwen2-1.5B", "Qwen2-7B"),
    "qwen2.5": ("Qwen2.5-0.5B", "Qwen2.5-1.5B", "Qwen2.5-7B"),
}
MODELS = {name.lower(): name for names in SERIES.values() for name in names}
TOWER = "openai/clip-vit-large-patch14-336"

# A sample has 576 positions of its picture and some 65 to 450 of text, so rows of 2048 hold two.
# `rows` follows: a batch has the published number of samples. Three captions would fit as well, but
# 512 / 3 rows divide over no slice.
SEQUENCE_LENGTH = 2048
SAMPLES_PER_ROW = 2


class Source(NamedTuple):
    """A file or folder of records, in thousands, and the folder of their pictures, below ROOT."""

    thousands: float
    path: str
    images: str = ""
    kind: str = "chat"


LCS = Source(
    558.128,
    "liuhaotian/LLaVA-Pretrain/blip_laion_cc_sbu_558k.json",
    "images/llava/llava_pretrain/images",
)
CAPTIONS = (LCS,)
# Captions and chats that the authors list for the dense mimic. They hold 2.72 M records where the
# paper counts 2.4 M and does not say which are left out: they are mixed by size.
GENERAL = (
    Source(1246, "Lin-Chen/ShareGPT4V/share-captioner_coco_lcs_sam_1246k_1107.json", "images"),
    Source(
        505.588,
        "FreedomIntelligence/ALLaVA-4V/allava_laion/ALLaVA-Caption-LAION-4V.json",
        "FreedomIntelligence/ALLaVA-4V",
    ),
    *(
        Source(thousands, f"LanguageBind/MoE-LLaVA/train_json/{name}", "LanguageBind/MoE-LLaVA")
        for thousands, name in (
            (157, "svit_tune_157k.json"),
            (220, "lvis_tune_220k_.json"),
            (331, "lrv_tune_331k.json"),
            (256, "la_tune_256k.json"),  # MIMIC-IT
        )
    ),
)
# Questions of many kinds that the authors list for the sparse mimic: 1.11 M of the paper's 1.4 M.
# The others (IconQA, ScienceQA, SBU, more of TextVQA) are published in one file with data that the
# authors do not list, mtgv/MobileVLM_V2_FT_Mix2M: with your own split of it, add a source.
MULTI_TASK = (
    Source(102.025, "Lin-Chen/ShareGPT4V/sharegpt4v_instruct_gpt4-vision_cap100k.json", "images"),
    Source(  # LLaVA-1.5's 665K, with better captions
        665.058,
        "Lin-Chen/ShareGPT4V/sharegpt4v_mix665k_cap23k_coco-ap9k_lcs3k_sam9k_div2k.json",
        "images",
    ),
    *(
        Source(thousands, f"OpenGVLab/InternVL-Chat-V1-2-SFT-Data/{name}", f"images/{images}")
        for thousands, name, images in (
            (200, "dvqa_train_200k.jsonl", "dvqa"),
            (18.317, "chartqa_train_18k.jsonl", "chartqa"),
            (12.413, "ai2d_train_12k.jsonl", "ai2d"),
            (10.211, "docvqa_train_10k.jsonl", "docvqa"),
            (72.318, "geoqa+.jsonl", "geoqa+"),
            (29.765, "synthdog_en.jsonl", "synthdog-en"),
        )
    ),
)
PAIRS = (Source(83.132, "openbmb/RLAIF-V-Dataset", kind="rlaif"),)
INSTRUCTIONS = (Source(665, "liuhaotian/LLaVA-Instruct-150K/llava_v1_5_mix665k.json", "images"),)

ADAPTOR = ("adaptor.*",)
LANGUAGE = ("language_model.*", "adaptor.*")
SPARSE = ("language_model.layers.mlp.*", "language_model.layers.moe.*", "adaptor.*")
UPCYCLE = {"layers": "sparse", "num_experts": 4, "experts_per_token": 2}
NEXT_TOKEN = {"kind": "next_token"}
MIMIC = {"kind": "mimic"}
MIMIC_AND_NEXT_TOKEN = {"kind": "mimic", "next_token_weight": 1.0, "balance_weight": 0.01}
KTO = {"kind": "preference", "preference": "kto_pair", "beta": 0.1, "balance_weight": 0.01}


class Stage(NamedTuple):
    """A row of the paper's tables: `thousands` of samples, once, in batches of `batch`."""

    trains: tuple[str, ...]
    objective: dict
    lr: float
    batch: int
    thousands: float
    sources: tuple[Source, ...]
    template: str = "qwen"
    upcycle: dict | None = None


STUDENT = {
    # The learning rate is that of the authors' script; the paper's table says 1e-4.
    "adaptor": Stage(ADAPTOR, NEXT_TOKEN, 1e-3, 512, 558.128, CAPTIONS),
    "dense_mimic": Stage(LANGUAGE, MIMIC, 2e-5, 256, 2400, GENERAL),
    "sparse_mimic": Stage(
        SPARSE, MIMIC_AND_NEXT_TOKEN, 2e-5, 256, 1400, MULTI_TASK, upcycle=UPCYCLE
    ),
    "preference": Stage(SPARSE, KTO, 2e-6, 256, 83.132, PAIRS),
}
# The recipe of LLaVA-1.5 (arXiv 2310.03744, table 9) with Qwen in place of Vicuna.
TEACHER = {
    "adaptor": Stage(ADAPTOR, NEXT_TOKEN, 1e-3, 256, 558.128, CAPTIONS, template="plain"),
    "fine_tuned": Stage(LANGUAGE, NEXT_TOKEN, 2e-5, 128, 665, INSTRUCTIONS),
}


def stage(row: Stage, starts_from: str, root: str) -> dict:
    """The configuration of a stage; the sources are mixed by their numbers of records."""
    sources = tuple(
        {
            "kind": source.kind,
            "path": f"{root}/{source.path}",
            "images": f"{root}/{source.images}" if source.images else "",
            "weight": source.thousands,
        }
        for source in row.sources
    )
    return {
        "trains": row.trains,
        "objective": row.objective,
        "data": {
            "sources": sources,
            "sequence_length": SEQUENCE_LENGTH,
            "images_per_row": SAMPLES_PER_ROW,
            "samples_per_row": SAMPLES_PER_ROW,
            "template": row.template,
            "workers": 8,
        },
        "steps": math.ceil(row.thousands * 1000 / row.batch),
        "starts_from": starts_from,
        "upcycle": row.upcycle,
        # The second moment decays as in the authors' script; the paper's table says 0.98.
        "optimizer": {"lr": row.lr, "b1": 0.9, "b2": 0.999, "warmup_share": 0.03},
        "rows": row.batch // SAMPLES_PER_ROW,
        "checkpoint_every": 500,
    }


def get_config(argument: str = "qwen2-0.5b") -> ConfigDict:
    """The recipe; `argument` is what stands after the colon of --config: SIZE or SIZE,ROOT."""
    size, _, root = argument.partition(",")
    root = root or "data/llava_mod"
    require(size in MODELS, "SIZE", size, f"one of {', '.join(MODELS)}", "Write :SIZE,ROOT.")
    series = size.rpartition("-")[0]
    makes_teacher = size.endswith("-7b")
    stages = TEACHER if makes_teacher else STUDENT
    order = tuple(stages)
    language_model = f"{root}/Qwen/{MODELS[size]}"
    return complete(
        RecipeConfig,
        {
            "name": f"LLaVA-MoD {size}",
            "tokenizer": language_model,
            "student": {"language_model": language_model, "vision_tower": f"{root}/{TOWER}"},
            "teacher": None if makes_teacher else {"folder": f"{root}/teachers/llava-{series}-7b"},
            "stages": {
                name: stage(row, before, root)
                for (name, row), before in zip(stages.items(), ("", *order))
            },
            "order": order,
            # As many devices as there are, in groups of one expert of each layer.
            "mesh": {"data": 1, "fsdp": -1, "expert": 1 if makes_teacher else 4, "tensor": 1},
            "dtype": "bfloat16",
            "remat": "auto",
        },
    )
