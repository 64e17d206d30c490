"""The published recipes: the paper's tables, and what they plan without and with their folders."""

import dataclasses
import json
import math
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
from PIL import Image
from small import DENSE, TEACHER, params_of
from source_files import rlaif_row, write_json, write_rlaif

from configs import llava_mod
from mod_jax.config import ConfigError, ModelConfig, RecipeConfig, VisionConfig, from_dict
from mod_jax.data.samples.tokenizer import scenes_tokenizer
from mod_jax.interop import huggingface
from mod_jax.models import llava
from mod_jax.models.vision import TOWER_PREFIX
from mod_jax.recipe import Recipe
from mod_jax.rehearsal.recipe import PUBLISHED, planned
from mod_jax.runs.check import check
from mod_jax.sharding import make_mesh

ROOT = pathlib.Path(__file__).parents[1]
STUDENTS = [size for size in llava_mod.MODELS if not size.endswith("-7b")]
TEACHERS = [size for size in llava_mod.MODELS if size.endswith("-7b")]
SPARSE = ("language_model.layers.mlp.*", "language_model.layers.moe.*", "adaptor.*")
# Stage -> what it trains, objective, learning rate, global batch, and samples of one epoch; the
# paper's table, with the authors' learning rate for the adaptor. 0.6 M captions are LLaVA's 558,128
# and 80 k pairs are the 83,132 of RLAIF-V.
PAPER = {
    "adaptor": (("adaptor.*",), "next_token", 1e-3, 512, 558_128),
    "dense_mimic": (("language_model.*", "adaptor.*"), "mimic", 2e-5, 256, 2_400_000),
    "sparse_mimic": (SPARSE, "mimic", 2e-5, 256, 1_400_000),
    "preference": (SPARSE, "preference", 2e-6, 256, 83_132),
}
# Width, feed-forward width, layers, heads, key/value heads, rows of the vocabulary, tied head, and
# billions of parameters as the model cards say them.
CARDS = {
    "qwen1.5-0.5b": (1024, 2816, 24, 16, 16, 151936, True, 0.46),
    "qwen1.5-1.8b": (2048, 5504, 24, 16, 16, 151936, False, 1.84),
    "qwen1.5-7b": (4096, 11008, 32, 32, 32, 151936, False, 7.72),
    "qwen2-0.5b": (896, 4864, 24, 14, 2, 151936, True, 0.49),
    "qwen2-1.5b": (1536, 8960, 28, 12, 2, 151936, True, 1.54),
    "qwen2-7b": (3584, 18944, 28, 28, 4, 152064, False, 7.62),
    "qwen2.5-0.5b": (896, 4864, 24, 14, 2, 151936, True, 0.49),
    "qwen2.5-1.5b": (1536, 8960, 28, 12, 2, 151936, True, 1.54),
    "qwen2.5-7b": (3584, 18944, 28, 28, 4, 152064, False, 7.62),
}


def recipe_of(argument: str) -> RecipeConfig:
    return from_dict(RecipeConfig, llava_mod.get_config(argument).to_dict())


def language_model_size(size: str) -> int:
    """Parameters of a dense Qwen, from its width (D), feed-forward width (F), heads and so on."""
    D, F, layers, heads, kv_heads, words, tied, _ = CARDS[size]
    kv = D // heads * kv_heads
    attention = (
        D * D + D + 2 * (D * kv + kv) + D * D
    )  # queries, keys and values with biases, output
    return layers * (attention + 3 * D * F + 2 * D) + (1 if tied else 2) * words * D + D


def sizes_of(model: ModelConfig) -> dict[str, int]:
    """Part of a model -> its parameters."""
    sizes = {"vision_tower": 0, "adaptor": 0, "language_model": 0}
    for name, array in llava.abstract(model).items():
        sizes[name.partition(".")[0]] += math.prod(array.shape)
    return sizes


@pytest.mark.parametrize("size", STUDENTS)
def test_hyperparameters_are_the_papers(size):
    config = recipe_of(size)
    assert config.order == tuple(PAPER)
    assert (config.dtype, config.remat) == ("bfloat16", "auto")
    before = ""
    for name, (trains, kind, lr, batch, samples) in PAPER.items():
        stage = config.stages[name]
        assert (stage.trains, stage.objective.kind, stage.starts_from) == (trains, kind, before)
        optimizer = stage.optimizer
        assert (optimizer.lr, optimizer.b1, optimizer.b2) == (lr, 0.9, 0.999)
        assert (optimizer.weight_decay, optimizer.warmup_share) == (0, 0.03)
        assert stage.steps == math.ceil(samples / batch)
        assert stage.rows * stage.data.samples_per_row == batch
        assert (stage.data.sequence_length, stage.data.template) == (2048, "qwen")
        before = name
    sparse, preference = config.stages["sparse_mimic"], config.stages["preference"]
    assert [name for name in PAPER if config.stages[name].upcycle] == ["sparse_mimic"]
    moe = sparse.upcycle
    assert (moe.layers, moe.num_experts, moe.experts_per_token) == ("sparse", 4, 2)
    assert (moe.dropless, moe.norm_topk_prob, moe.residual) == (True, True, False)
    assert config.stages["dense_mimic"].objective.next_token_weight == 0
    assert sparse.objective.next_token_weight == 1
    assert (preference.objective.preference, preference.objective.beta) == ("kto_pair", 0.1)
    assert {s.objective.balance_weight for s in (sparse, preference)} == {0.01}


@pytest.mark.parametrize("size", TEACHERS)
def test_a_teacher_is_made_by_the_recipe_of_llava(size):
    config = recipe_of(size)
    first, second = (config.stages[name] for name in config.order)
    assert (config.teacher, second.starts_from) == (None, "adaptor")
    batches = [stage.rows * stage.data.samples_per_row for stage in (first, second)]
    assert (batches, first.optimizer.lr, second.optimizer.lr) == ([256, 128], 1e-3, 2e-5)
    assert (first.steps, second.steps) == (math.ceil(558_128 / 256), math.ceil(665_000 / 128))


def test_sources_are_mixed_by_size_and_lie_below_the_root():
    config = recipe_of("qwen2-0.5b,/data/mod")
    sources = config.stages["dense_mimic"].data.sources
    weights = {pathlib.Path(source.path).name: source.weight for source in sources}
    captions = weights["share-captioner_coco_lcs_sam_1246k_1107.json"]
    assert captions / weights["svit_tune_157k.json"] == 1246 / 157
    paths = [config.tokenizer, config.teacher.folder, config.student.vision_tower]
    for stage in config.stages.values():
        paths += [path for source in stage.data.sources for path in (source.path, source.images)]
    assert all(path.startswith("/data/mod/") for path in paths if path)


def test_an_unknown_size_is_one_line_that_lists_the_known_ones():
    with pytest.raises(
        ConfigError, match="SIZE = 'qwen3-8b': expected one of qwen1.5-0.5b, .*ROOT"
    ):
        llava_mod.get_config("qwen3-8b")


@pytest.mark.parametrize("size", CARDS)
def test_published_models_have_the_published_numbers_of_parameters(size):
    config = recipe_of(size)
    sizes = sizes_of(planned(config, "adaptor").student)
    D = CARDS[size][0]
    assert sizes["language_model"] == language_model_size(size)
    assert round(sizes["language_model"] / 1e9, 2) == CARDS[size][-1]
    assert sizes["adaptor"] == 1024 * D + D + D * D + D
    assert round(sizes["vision_tower"] / 1e9, 2) == 0.30


@pytest.mark.parametrize("size", STUDENTS)
def test_stages_follow_each_other_and_have_the_teacher_of_their_series(size):
    config = recipe_of(size)
    plans = {name: planned(config, name) for name in config.order}
    teacher = size.rpartition("-")[0] + "-7b"
    assert plans["adaptor"].teacher is None
    assert {plan.student.decoder.moe is None for plan in plans.values()} == {True, False}
    for name in ("dense_mimic", "sparse_mimic", "preference"):
        assert sizes_of(plans[name].teacher)["language_model"] == language_model_size(teacher)
    assert plans["sparse_mimic"].student == plans["preference"].student
    D, F, layers = CARDS[size][:3]
    added = layers // 2 * (3 * 3 * D * F + 4 * D)  # three more experts and a router
    sparse = sizes_of(plans["sparse_mimic"].student)["language_model"]
    assert sparse == language_model_size(size) + added


def test_the_sparse_student_of_1_8b_activates_2_2_of_3_0_billion():
    """Figures of the paper, which count the language model."""
    student = planned(recipe_of("qwen1.5-1.8b"), "preference").student
    shapes = llava.abstract(student)
    language_model = {name: x for name, x in shapes.items() if name.startswith("language_model.")}
    counts = llava.count(student.decoder.moe, language_model)
    assert 3.0e9 < counts["total"] < 3.1e9
    assert 2.2e9 < counts["activated"] < 2.3e9


def test_a_batch_has_the_shapes_of_the_stage_or_of_other_rows():
    config = recipe_of("qwen2-0.5b")
    batch = planned(config, "preference").batch
    assert batch.tokens == jax.ShapeDtypeStruct((128, 2048), np.int32)
    assert batch.images == jax.ShapeDtypeStruct((128, 2, 336, 336, 3), np.uint8)
    assert batch.samples == jax.ShapeDtypeStruct((128, 2), np.int32)
    other = planned(config, "preference", rows=8)
    assert (other.stage.rows, other.batch.branch_ids.shape) == (8, (8, 2048))


def test_an_unknown_name_is_one_line_with_the_remedy():
    config = recipe_of("qwen2-0.5b")
    student = dataclasses.replace(config.student, language_model="models/Qwen9-1B")
    with pytest.raises(ConfigError, match=r"student\.language_model = 'models/Qwen9-1B'.*download"):
        planned(dataclasses.replace(config, student=student), "adaptor")
    with pytest.raises(ConfigError, match="stage = 'last': expected one of"):
        planned(config, "last")
    with pytest.raises(ConfigError, match="rows = 9: expected a multiple of accumulation 2"):
        halves = dataclasses.replace(config.stages["adaptor"], accumulation=2)
        stages = config.stages | {"adaptor": halves}
        planned(dataclasses.replace(config, stages=stages), "adaptor", rows=9)


def test_published_configurations_say_where_they_are_from():
    for path in PUBLISHED.glob("*.json"):
        source = json.loads(path.read_text())["_source"]
        assert source.startswith("https://huggingface.co/") or "Not on the Hub" in source, path


# A recipe with all its folders, of models and data that are tiny but have the published names.


def long(config: ModelConfig) -> ModelConfig:
    return dataclasses.replace(
        config, decoder=dataclasses.replace(config.decoder, max_positions=4096)
    )


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> pathlib.Path:
    """A folder like that of a user who has downloaded everything for qwen2-0.5b."""
    root = tmp_path_factory.mktemp("llava_mod")
    config = recipe_of(f"qwen2-0.5b,{root}")
    student = params_of(DENSE)
    tower = {name: array for name, array in student.items() if name.startswith(TOWER_PREFIX)}
    folder = pathlib.Path(config.student.language_model)
    folder.parent.mkdir()
    huggingface.save(folder, long(DENSE).decoder, student)
    scenes_tokenizer().save_pretrained(folder)
    pathlib.Path(config.student.vision_tower).parent.mkdir()
    huggingface.save(config.student.vision_tower, DENSE.vision, student)
    pathlib.Path(config.teacher.folder).parent.mkdir()
    huggingface.save(config.teacher.folder, long(TEACHER), params_of(TEACHER, 1) | tower)

    for stage in config.stages.values():
        for source in stage.data.sources:
            path = pathlib.Path(source.path)
            if source.kind == "rlaif":
                path.mkdir(parents=True)
                answers = {"chosen": "one ring", "rejected": "two rings"}
                write_rlaif(path / "RLAIF-V-Dataset_000.parquet", [rlaif_row(0, **answers)], 1)
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            pathlib.Path(source.images).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8)).save(pathlib.Path(source.images) / "1.png")
            write_json(path, [record()])
    return root


def record() -> dict:
    """A record with the keys of ALLaVA's."""
    return {
        "id": "allava_laion_cap_1",
        "image": "1.png",
        "conversations": [
            {"from": "human", "value": "<image>\nhow many rings?"},
            {"from": "gpt", "value": "one ring"},
        ],
        "original_caption": "a ring",
        "url": "https://example.com/1.jpg",
    }


def without_ends(model: ModelConfig) -> ModelConfig:
    """Tokens that end an answer when a model is asked are not planned, as no step reads them."""
    return dataclasses.replace(model, other_end_token_ids=())


def test_the_plan_of_real_folders_is_that_of_the_recipe(root, tmp_path):
    values = llava_mod.get_config(f"qwen2-0.5b,{root}")
    for stage in values.stages.values():
        stage.rows, stage.data.workers = 8, 0  # which only saves time
    config = from_dict(RecipeConfig, values.to_dict())
    mesh = make_mesh(config.mesh, jax.devices()[:8])
    with jax.set_mesh(mesh):
        recipe = Recipe(config, tmp_path, mesh)
        check(recipe, config.order)
        for name in config.order:
            found, plan = planned(config, name), recipe.plan(name)
            assert found.student == without_ends(plan.student)
            assert (found.teacher is None) == (plan.teacher is None)
            if found.teacher and plan.teacher:
                assert found.teacher == without_ends(plan.teacher.config)
            shapes = {**plan.trained, **plan.frozen.student}
            assert shapes == llava.abstract(found.student)
            before = jax.eval_shape(lambda params: params, recipe.student_before("adaptor").params)
            assert plan.student.decoder.moe or shapes == before
            real = next(plan.data)
            assert jax.tree.map(lambda x: (x.shape, x.dtype), real) == jax.tree.map(
                lambda x: (x.shape, x.dtype), found.batch
            )
            plan.data.close()


def test_a_config_json_alone_is_enough(root, tmp_path):
    config = recipe_of(f"qwen2-0.5b,{root}")
    folder = tmp_path / "Qwen2-0.5B"
    folder.mkdir()
    huggingface.save(tmp_path / "whole", long(DENSE).decoder, params_of(DENSE))
    (tmp_path / "whole" / "config.json").rename(folder / "config.json")
    student = dataclasses.replace(config.student, language_model=str(folder))
    moved = dataclasses.replace(config, student=student)
    assert planned(moved, "preference") == planned(config, "preference")
    alone = planned(dataclasses.replace(moved, tokenizer=str(folder)), "preference").student
    assert alone.decoder == planned(config, "preference").student.decoder


def test_towers_that_differ_are_refused(root, tmp_path):
    config = recipe_of(f"qwen2-0.5b,{root}")
    student = dataclasses.replace(config.student, vision_tower="clip-vit-large-patch14-336")
    with pytest.raises(ConfigError, match="teacher vision tower"):
        planned(dataclasses.replace(config, student=student), "dense_mimic")
    assert planned(dataclasses.replace(config, student=student), "adaptor").student.vision == (
        VisionConfig()
    )


def test_a_missing_folder_is_one_line_that_says_how_to_get_it():
    command = ["-m", "mod_jax.train", "--config=configs/llava_mod.py:qwen2-0.5b,nowhere", "--check"]
    done = subprocess.run(
        [sys.executable, *command], check=False, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 1
    (line,) = done.stderr.strip().splitlines()[-1:]
    assert line.startswith("error: tokenizer = 'nowhere/Qwen/Qwen2-0.5B': expected an existing f")
    assert "hf download OWNER/NAME --local-dir nowhere/Qwen/Qwen2-0.5B (missing as well:" in line
    assert "nowhere/openai/clip-vit-large-patch14-336, nowhere/teachers/llava-qwen2-7b)" in line
