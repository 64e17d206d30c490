"""Configurations: what is accepted.

Everything else is refused; the error names the key, its value, what was expected and the remedy.
"""

import dataclasses
import inspect
import pathlib
import runpy

import pytest
from ml_collections import ConfigDict

from mod_jax.config import (
    ConfigError,
    DecoderConfig,
    ModelConfig,
    ModelSource,
    MoEConfig,
    RecipeConfig,
    SourceConfig,
    StageConfig,
    VisionConfig,
    from_dict,
)

CONFIGS = sorted(
    path
    for path in (pathlib.Path(__file__).parents[1] / "configs").rglob("*.py")
    if path.name != "__init__.py"
)
CHAT = {"kind": "chat", "path": "chats.json"}
PAIRS = {"kind": "preference", "path": "pairs.json"}


def stage(**changes) -> dict:
    """A small valid stage; `changes` replace its keys."""
    return {
        "trains": ("adaptor.*",),
        "objective": {},
        "data": {"sources": (CHAT,)},
        "steps": 3,
    } | changes


def recipe(stages: dict, **changes) -> dict:
    """A small valid recipe of these stages; `changes` replace its keys."""
    values = {
        "name": "r",
        "tokenizer": "tokenizer",
        "student": {"folder": "student"},
        "teacher": {"folder": "teacher"},
        "stages": stages,
    }
    return values | {"order": tuple(stages)} | changes


def assert_refused(cls, values, message):
    """`from_dict` raises a ConfigError of one line that matches `message`."""
    with pytest.raises(ConfigError, match=message) as error:
        from_dict(cls, values)
    assert "\n" not in str(error.value)


def test_values_become_typed_dataclasses_all_the_way_down():
    values = {
        "decoder": {"num_layers": 6, "rope_theta": 10000, "moe": {"layers": [1, 3]}},
        "dtype": "bfloat16",
    }
    made = from_dict(ModelConfig, values)
    assert made == ModelConfig(
        decoder=DecoderConfig(num_layers=6, rope_theta=1e4, moe=MoEConfig(layers=(1, 3))),
        dtype="bfloat16",
    )
    assert isinstance(made.decoder.rope_theta, float)
    assert from_dict(ModelConfig, dataclasses.asdict(made)) == made, "as a run's config.json"
    assert hash(made) == hash(from_dict(ModelConfig, values)), "jit needs hashable configurations"


def test_stages_keep_the_configured_order():
    """A ConfigDict sorts its keys, `order` keeps them."""
    stages = {"second": stage(starts_from="first"), "first": stage()}
    made = from_dict(RecipeConfig, ConfigDict(recipe(stages, order=("first", "second"))).to_dict())
    assert made.order == ("first", "second") and made.stages["second"].starts_from == "first"


@pytest.mark.parametrize(
    "values, message",
    [
        (
            {"decoder": {"num_layer": 4}},
            (
                r"config\.decoder\.num_layer = 4: expected a known key .*"
                r"Did you mean config\.decoder\.num_layers\?"
            ),
        ),
        ({"zzz": 1}, r"config\.zzz = 1: expected a known key \(vision, decoder, .*\)\.$"),
        (
            {"decoder": {"num_layers": "4"}},
            r"config\.decoder\.num_layers = '4': expected a value of type int",
        ),
        ({"decoder": {"num_layers": 4.0}}, r"num_layers = 4\.0: expected a value of type int"),
        ({"decoder": {"num_layers": True}}, r"num_layers = True: expected a value of type int"),
        ({"decoder": {"qkv_bias": 1}}, r"qkv_bias = 1: expected a value of type bool"),
        ({"decoder": {"rope_theta": False}}, r"rope_theta = False: expected a value of type float"),
        ({"decoder": 4}, r"config\.decoder = 4: expected a mapping of DecoderConfig's keys"),
        ({"vision": {"pixel_mean": 0.5}}, r"config\.vision\.pixel_mean = 0\.5: expected a tuple"),
        (
            {"vision": {"pixel_mean": (0.5, "x", 0.5)}},
            r"config\.vision\.pixel_mean\[1\] = 'x': expected a value of type float",
        ),
        (
            {"decoder": {"moe": {"layers": (0, "1")}}},
            r"config\.decoder\.moe\.layers\[1\] = '1': expected a value of type int",
        ),
        (
            {"decoder": {"moe": {"capacity_factor": "big"}}},
            r"moe\.capacity_factor = 'big': expected a value of type float",
        ),
        (
            {"decoder": {"num_heads": 14, "num_kv_heads": 4}},
            r"config\.decoder: decoder\.num_heads = 14: expected a multiple of num_kv_heads 4",
        ),
        (
            {"decoder": {"moe": {"experts_per_token": 5}}},
            r"moe\.experts_per_token = 5: expected 1\.\.num_experts \(4\)",
        ),
        (
            {"decoder": {"num_layers": 4, "moe": {"layers": (2, 4)}}},
            r"moe\.layers = \(2, 4\): expected layers within 0\.\.3",
        ),
        ({"decoder": {"moe": {"layers": "odd"}}}, r"moe\.layers = 'odd': expected one of"),
        ({"vision": {"family": "dino"}}, r"vision\.family = 'dino': expected clip or siglip"),
        ({"vision": {"feature_layer": 0}}, r"vision\.feature_layer = 0: expected -24\.\.-1"),
        ({"dtype": "float16"}, r"model\.dtype = 'float16': expected float32 or bfloat16"),
    ],
)
def test_a_model_that_cannot_be_is_refused(values, message):
    assert_refused(ModelConfig, values, message)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"steps": 0}, "steps = 0: expected a positive number"),
        ({"rows": 6, "accumulation": 4}, "rows = 6: expected a multiple of accumulation 4"),
        ({"trains": ()}, r"trains = \(\): expected at least one pattern. Use e.g."),
        (
            {"data": {"sources": ()}},
            r"config\.data: data\.sources = \(\): expected at least one source",
        ),
        (
            {"data": {"sources": ({"kind": "csv"},)}},
            r"config\.data\.sources\[0\]: data\.sources\.kind = 'csv'",
        ),
        (
            {"data": {"sources": (CHAT,), "max_bad_share": 2.0}},
            r"data\.max_bad_share = 2\.0: expected a share within 0\.\.1",
        ),
        (
            {"objective": {"kind": "mimik"}},
            r"objective\.kind = 'mimik': expected next_token, mimic or preference",
        ),
        (
            {"objective": {"preference": "dpo"}},
            r"objective\.preference = 'dpo': expected kto_pair, sigmoid, hinge or ipo",
        ),
        ({"objective": {"beta": 0}}, r"objective\.beta = 0\.0: expected a positive number"),
        ({"optimizer": {"lr": -1.0}}, r"optimizer\.lr = -1\.0: expected a positive learning rate"),
        ({"optimizer": {"warmup_share": 1}}, r"optimizer\.warmup_share = 1\.0: expected a share"),
    ],
)
def test_a_stage_that_cannot_run_is_refused(changes, message):
    assert_refused(StageConfig, stage(**changes), message)


def test_a_missing_key_is_named():
    assert_refused(
        StageConfig,
        {"steps": 3},
        r"config = \{'steps': 3\}: expected the keys \['trains', 'objective', 'data'\] as well",
    )


MIMIC = stage(objective={"kind": "mimic"})
PREFERENCE = stage(objective={"kind": "preference"})


@pytest.mark.parametrize(
    "values, message",
    [
        (recipe({"a": stage()}, order=()), r"order = \(\): expected at least one stage"),
        (
            recipe({"a": stage()}, order=("a", "b")),
            r"order = \('a', 'b'\): expected each name once, out of \['a'\]",
        ),
        (
            recipe({"a": stage()}, order=("a", "a")),
            r"order = \('a', 'a'\): expected each name once",
        ),
        (
            recipe({"a": stage(starts_from="b"), "b": stage()}),
            r"stages\.a\.starts_from = 'b': expected an earlier stage \[\], or empty",
        ),
        (
            recipe({"a": MIMIC}, teacher=None),
            r"stages\.a\.objective\.kind = 'mimic': expected a teacher\. Set config\.teacher",
        ),
        (
            recipe({"a": PREFERENCE}),
            r"stages\.a\.data\.sources = \['chat'\]: expected pairs for a preference objective",
        ),
        (
            recipe({"a": stage(data={"sources": (CHAT, PAIRS)})}),
            r"stages\.a\.data\.sources = \['chat', 'preference'\]",
        ),
        (
            recipe({"a": stage()}, evaluation={"models": ("b",)}),
            r"evaluation\.models = 'b': expected a stage \['a'\] or teacher",
        ),
        (
            recipe({"a": stage()}, student={}),
            r"config\.student: .*expected exactly one of the three ways",
        ),
        (
            recipe({"a": stage()}, student={"folder": "f", "random": {}}),
            "exactly one of the three ways to name a model",
        ),
        (
            recipe({"a": stage()}, student={"language_model": "f"}),
            r"language_model, vision_tower = \('f', ''\): expected both parts",
        ),
        (
            recipe({"a": stage()}, student={"vision_tower": "f"}),
            r"exactly one of the three ways to name a model",
        ),
        (
            recipe({"a": stage()}, student={"folder": "f", "adaptor": "a"}),
            r"adaptor = 'a': expected an adaptor only with language_model and vision_tower",
        ),
        (
            recipe({"a": stage(step=1)}),
            r"config\.stages\.a\.step = 1: .*Did you mean config\.stages\.a\.steps\?",
        ),
    ],
)
def test_a_recipe_that_cannot_run_is_refused(values, message):
    assert_refused(RecipeConfig, values, message)


def test_pairs_and_scenes_pairs_serve_a_preference_objective():
    scenes = SourceConfig("scenes", "data", split="preference")
    for source in (PAIRS, dataclasses.asdict(scenes)):
        stages = {"a": {**PREFERENCE, "data": {"sources": (source,)}}}
        assert from_dict(RecipeConfig, recipe(stages)).stages["a"].objective.needs_teacher


@pytest.mark.parametrize(
    "layers, numbers",
    [
        ("sparse", (0, 2, 4)),
        ("first_half", (0, 1)),
        ("second_half", (2, 3, 4)),
        ("all", (0, 1, 2, 3, 4)),
        ((3, 1, 3), (1, 3)),
    ],
)
def test_sparse_layers_by_name_or_number(layers, numbers):
    assert MoEConfig(layers).layer_numbers(5) == numbers


def test_the_defaults_are_the_published_models():
    """CLIP ViT-L/14 at 336 px and Qwen2-0.5B."""
    assert VisionConfig().num_features == 576
    decoder = DecoderConfig()
    assert (decoder.hidden_size, decoder.vocab_size, decoder.sparse_layers) == (896, 151936, ())


def test_a_model_source_has_no_default():
    with pytest.raises(ConfigError, match="exactly one"):
        ModelSource()


def test_there_are_configs():
    assert "quickstart" in {path.stem for path in CONFIGS}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_of_the_project_is_a_recipe(path):
    """A config may take an argument: photos.py takes the folder of the pictures."""
    get_config = runpy.run_path(str(path))["get_config"]
    arguments = ["folder"] if inspect.signature(get_config).parameters else []
    made = from_dict(RecipeConfig, get_config(*arguments).to_dict())
    assert from_dict(RecipeConfig, dataclasses.asdict(made)) == made
