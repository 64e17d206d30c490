"""Configurations: what is accepted.

Everything else is refused; the error names the key, its value, what was expected and the remedy.
"""

import dataclasses
import math
import pathlib
import runpy
import sys
import typing

import pytest
from absl import flags
from absl.testing import flagsaver
from ml_collections import ConfigDict, config_flags

from mod_jax import config as config_module
from mod_jax import train
from mod_jax.config import (
    ConfigError,
    DataConfig,
    DecoderConfig,
    MeshConfig,
    ModelConfig,
    ModelSource,
    MoEConfig,
    ObjectiveConfig,
    OptimizerConfig,
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
        ({"steps": 0}, "steps = 0: expected a number of at least 1"),
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
        ({"optimizer": {"lr": -1.0}}, r"optimizer\.lr = -1\.0: expected a positive number"),
        (
            {"optimizer": {"warmup_share": 1}},
            r"warmup_share = 1\.0: expected .* below 1",
        ),
    ],
)
def test_a_stage_that_cannot_run_is_refused(changes, message):
    assert_refused(StageConfig, stage(**changes), message)


def classes() -> list[type]:
    """All dataclasses of the configuration."""
    members = [x for x in vars(config_module).values() if dataclasses.is_dataclass(x)]
    return [x for x in members if x.__module__ == config_module.__name__]


def number_fields() -> list[tuple[type, str, type]]:
    """(class, name, int or float) of every key that is a number, or holds numbers."""
    found = []
    for cls in classes():
        for name, hint in typing.get_type_hints(cls).items():
            kinds = {hint, *typing.get_args(hint)}
            kinds |= {part for kind in kinds for part in typing.get_args(kind)}
            found += [(cls, name, kind) for kind in (int, float) if kind in kinds]
    return found


def made_with(cls: type, name: str, value: object):
    """An instance of `cls`, valid but for one key."""
    required = {
        StageConfig: {"trains": ("*",), "objective": ObjectiveConfig(), "steps": 1}
        | {"data": DataConfig((SourceConfig(),))},
        DataConfig: {"sources": (SourceConfig(),)},
        ModelSource: {"folder": "f"},
        RecipeConfig: {"name": "r", "tokenizer": "t", "student": ModelSource("f"), "stages": {}}
        | {"order": ()},
    }
    is_tuple = typing.get_origin(typing.get_type_hints(cls)[name]) is tuple
    return cls(**required.get(cls, {}) | {name: (value,) * 3 if is_tuple else value})


@pytest.mark.parametrize(
    ("cls", "name", "kind"), number_fields(), ids=lambda x: getattr(x, "__name__", x)
)
def test_every_number_has_a_range(cls, name, kind):
    """Neither NaN nor infinity, nor what is far below any use, gets past a key of any kind."""
    impossible = [-(10**9)] if kind is int else [math.nan, math.inf, -math.inf]
    if name == "layers":
        impossible = [(-(10**9),)]
    for value in impossible:
        with pytest.raises(ConfigError, match=rf"{name} = .*: expected") as error:
            made_with(cls, name, value)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("cls", "values", "message"),
    [
        (OptimizerConfig, {"clip_norm": -1}, r"optimizer\.clip_norm = -1\.0: .* at least 0"),
        (OptimizerConfig, {"b1": 1.0}, r"optimizer\.b1 = 1\.0: .* at least 0 and below 1"),
        (OptimizerConfig, {"b2": 1.5}, r"optimizer\.b2 = 1\.5: .* at least 0 and below 1"),
        (OptimizerConfig, {"weight_decay": -0.1}, r"weight_decay = -0\.1: .* at least 0"),
        (OptimizerConfig, {"lr": math.inf}, r"lr = inf: expected a positive number"),
        (OptimizerConfig, {"lr": 0}, r"lr = 0\.0: expected a positive number"),
        (ObjectiveConfig, {"balance_weight": -1.0}, r"balance_weight = -1\.0: .* at least 0"),
        (
            ObjectiveConfig,
            {"kind": "preference", "preference": "sigmoid", "label_smoothing": 0.5},
            r"label_smoothing = 0\.5: .* below 0\.5",
        ),
        (MoEConfig, {"capacity_factor": 0}, r"capacity_factor = 0\.0: expected a positive"),
        (MoEConfig, {"num_experts": 0}, r"num_experts = 0: expected a number of at least 1"),
        (MoEConfig, {"layers": (-1, 2)}, r"layers = \(-1, 2\): expected a number of at least 0"),
        (VisionConfig, {"patch_size": 0}, r"patch_size = 0: expected a number of at least 1"),
        (VisionConfig, {"pixel_std": (1.0, 0.0, 1.0)}, r"pixel_std = .*: expected a positive"),
        (VisionConfig, {"pixel_mean": (0.5,)}, r"pixel_mean = \(0\.5,\): expected three numbers"),
        (DecoderConfig, {"num_kv_heads": 0}, r"num_kv_heads = 0: expected a number of at least 1"),
        (DecoderConfig, {"head_dim": 7}, r"head_dim = 7: expected an even number"),
        (MeshConfig, {"fsdp": 0}, r"mesh\.fsdp = 0: expected at least 1, or -1"),
        (MeshConfig, {"data": -2}, r"mesh\.data = -2: expected at least 1, or -1"),
        (MeshConfig, {"fsdp": -1}, r"mesh = \{'data': -1, .*: expected at most one size of -1"),
        (StageConfig, stage(rows=0), r"rows = 0: expected a number of at least 1"),
        (StageConfig, stage(accumulation=0), r"accumulation = 0: expected a number of at least 1"),
        (StageConfig, stage(checkpoint_every=0), r"checkpoint_every = 0: .* at least 1"),
        (StageConfig, stage(max_nonfinite_steps=0), r"max_nonfinite_steps = 0: .* at least 1"),
        (
            StageConfig,
            stage(upcycle={"experts_per_token": 1}),
            r"experts_per_token = 1: expected at least 2 with norm_topk_prob.*norm_topk_prob=False",
        ),
        (StageConfig, stage(seed=-1), r"seed = -1: expected a number within 0\.\.2\^32-1"),
        (StageConfig, stage(seed=2**32), r"seed = 4294967296: expected a number within"),
        (ModelSource, {"folder": "f", "seed": -1}, r"seed = -1: expected a number within"),
    ],
)
def test_a_number_out_of_its_range_is_refused(cls, values, message):
    assert_refused(cls, values, message)


@pytest.mark.parametrize("changes", [{"log_every": 0}, {"keep_checkpoints": 0}])
def test_a_recipes_numbers_have_ranges_too(changes):
    message = r"(log_every|keep_checkpoints) = 0: expected a number of at least 1"
    assert_refused(RecipeConfig, recipe({"a": stage()}, **changes), message)


def test_the_ends_of_the_ranges_are_allowed():
    """What switches something off, and the smallest and largest values that work."""
    from_dict(OptimizerConfig, {"clip_norm": 0, "b1": 0, "b2": 0.0, "weight_decay": 0})
    from_dict(StageConfig, stage(seed=2**32 - 1, rows=1, steps=1, checkpoint_every=1))
    from_dict(ObjectiveConfig, {"balance_weight": 0, "z_weight": 0})
    from_dict(MeshConfig, {"data": 1, "fsdp": -1})


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        (
            {"kind": "preference", "preference": "sigmoid", "next_token_weight": 1.0},
            r"next_token_weight = 1\.0: expected 0\.0, as the objective preference \(sigmoid\)",
        ),
        (
            {"kind": "preference", "label_smoothing": 0.1},
            r"label_smoothing = 0\.1: expected 0\.0, as the objective preference \(kto_pair\)",
        ),
        ({"kind": "preference", "all_tokens": True}, r"all_tokens = True: expected False"),
        ({"next_token_weight": 0.5}, r"next_token_weight = 0\.5: .* objective next_token does not"),
        ({"beta": 0.2}, r"beta = 0\.2: expected 0\.1, as the objective next_token"),
        ({"kind": "mimic", "beta": 0.2}, r"beta = 0\.2: expected 0\.1, as the objective mimic"),
        ({"kind": "mimic", "preference": "ipo"}, r"preference = 'ipo': expected 'kto_pair'"),
        ({"compat": True}, r"compat = True: expected False, as the objective next_token"),
        (
            {"kind": "preference", "preference": "ipo", "compat": True},
            r"compat = True: expected False, as the objective preference \(ipo\)",
        ),
    ],
)
def test_a_key_that_the_objective_does_not_read_is_refused(objective, message):
    assert_refused(ObjectiveConfig, objective, message)


@pytest.mark.parametrize(
    "objective",
    [
        {"kind": "mimic", "next_token_weight": 1.0, "all_tokens": True, "compat": True},
        {"kind": "preference", "preference": "sigmoid", "label_smoothing": 0.1, "beta": 0.5},
        {"kind": "preference", "compat": True},
        {"kind": "next_token", "beta": 0.1, "balance_weight": 0.0},
    ],
)
def test_a_key_that_it_reads_or_that_has_its_default_is_not(objective):
    assert from_dict(ObjectiveConfig, objective)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"kind": "tfds", "images": "pictures"}, r"images = 'pictures': .* kind tfds does not"),
        ({"kind": "chat", "split": "train"}, r"split = 'train': .* kind chat does not"),
        ({"kind": "scenes", "images": "i"}, r"images = 'i': .* kind scenes does not"),
    ],
)
def test_a_key_that_the_kind_of_source_does_not_read_is_refused(source, message):
    assert_refused(SourceConfig, source, message)


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
    """A config may take an argument, which has a default."""
    get_config = runpy.run_path(str(path))["get_config"]
    made = from_dict(RecipeConfig, get_config().to_dict())
    assert from_dict(RecipeConfig, dataclasses.asdict(made)) == made


def from_command_line(*arguments: str) -> RecipeConfig:
    """The quickstart with these flags, read as `mod_jax.train` reads them."""
    path = next(str(path) for path in CONFIGS if path.stem == "quickstart")
    values = flags.FlagValues()
    command = ["train", f"--config={path}", *arguments]
    holder = config_flags.DEFINE_config_file(
        "config", None, "", flag_values=values, lock_config=True, sys_argv=command
    )
    values(command)
    return from_dict(RecipeConfig, holder.value.to_dict())


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("stages.sparse_mimic.upcycle.layers=(0,2)", (0, 2)),
        ("stages.sparse_mimic.upcycle.layers=all", "all"),
        ("stages.sparse_mimic.upcycle.capacity_factor=1.5", 1.5),
        ("stages.sparse_mimic.upcycle.capacity_factor=2", 2.0),
        ("stages.sparse_mimic.upcycle.capacity_factor=None", None),
        ("stages.sparse_mimic.upcycle.residual=true", True),
        ("stages.sparse_mimic.upcycle=None", None),
        ("stages.preference.upcycle={'layers': (1,)}", MoEConfig((1,))),
        ("stages.fine_tuned.upcycle.layers=(1,3)", (1, 3)),
        ("stages.fine_tuned.upcycle.num_experts=8", 8),
        ("stages.fine_tuned.trains=('adaptor.*','*norm*')", ("adaptor.*", "*norm*")),
        ("stages.fine_tuned.data.sources[0].weight=2.0", 2.0),
        ("stages.fine_tuned.optimizer.lr=1", 1.0),
        ("teacher.folder=elsewhere", "elsewhere"),
        ("teacher.folder=123", "123"),
        ("student.adaptor=folder", "folder"),
        ("mesh.fsdp=4", 4),
        ("evaluation.models=()", ()),
    ],
)
def test_every_key_can_be_set_from_the_command_line(argument, value):
    made = from_command_line(f"--config.{argument}")
    path = argument.split("=")[0].replace("[0]", ".0")
    for key in path.split("."):
        if isinstance(made, dict | tuple):
            made = made[int(key) if key.isdigit() else key]
        else:
            made = getattr(made, key)
    assert made == value and type(made) is type(value)


def test_a_part_that_is_not_given_can_be_set_key_by_key():
    made = from_command_line(
        "--config.student.language_model=",
        "--config.student.vision_tower=",
        "--config.student.random.decoder.num_layers=3",
    )
    assert made.student.random == ModelConfig(decoder=DecoderConfig(num_layers=3))
    sparse = from_command_line("--config.stages.fine_tuned.upcycle.residual")
    assert sparse.stages["fine_tuned"].upcycle == MoEConfig(residual=True)


def test_nothing_set_changes_nothing():
    path = next(path for path in CONFIGS if path.stem == "quickstart")
    made = from_command_line()
    assert made.stages["fine_tuned"].upcycle is None and made.student.random is None
    assert made == from_dict(RecipeConfig, runpy.run_path(str(path))["get_config"]().to_dict())


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("stages.sparse_mimic.upcycle.layers=(0,", r"moe\.layers = '\(0,': expected one of"),
        ("stages.sparse_mimic.upcycle.layers=(0,9.5)", r"layers\[1\] = 9\.5: expected .* int"),
        ("stages.sparse_mimic.upcycle.capacity_factor=x", r"capacity_factor = 'x': .* type float"),
        ("stages.fine_tuned.upcycle={'layer': 1}", r"Did you mean .*upcycle\.layers\?"),
    ],
)
def test_a_literal_of_the_wrong_type_is_refused(argument, message):
    with pytest.raises(ConfigError, match=message):
        from_command_line(f"--config.{argument}")


@flagsaver.flagsaver
@pytest.mark.parametrize(
    ("recipe_file", "arguments", "message"),
    [
        (
            "from_dict(OptimizerConfig, {'clip_norm': -1})",
            (),
            r"^config: optimizer\.clip_norm = -1\.0",
        ),
        ("int('x')", (), r"^--config: .*invalid literal for int\(\) with base 10: 'x'"),
        ("ConfigDict({'a': 1})", ("--config.b.c=1",), r"^--config: expected .*'b'"),
        (
            "ConfigDict({'a': 1})",
            ("--config.a=x",),
            r"^flag --config\.a=x: invalid literal for int",
        ),
        ("ConfigDict({'a': (1,)})", ("--config.a[3]=1",), r"^--config: .*index out of range"),
        ("ConfigDict({'a': (1,)})", ("--config.a.b=1",), r"^--config: .*tuple indices must be"),
        ("ConfigDict({})", ("--confi",), r"^Unknown command line flag 'confi'"),
    ],
)
def test_a_wrong_recipe_or_flag_is_one_line(recipe_file, arguments, message, tmp_path, monkeypatch):
    path = tmp_path / "recipe.py"
    path.write_text(
        "from ml_collections import ConfigDict\n"
        "from mod_jax.config import OptimizerConfig, from_dict\n"
        f"def get_config():\n    return {recipe_file}\n"
    )
    command = ["train", f"--config={path}", *arguments]
    monkeypatch.setattr(sys, "argv", command)  # where ml_collections looks for overrides
    with pytest.raises(ConfigError, match=message) as error:
        train.parse(command)
    assert "\n" not in str(error.value)
