"""Broken, inconsistent and hostile checkpoints.

One error lists all that is wrong before any number is read, and nothing is written halfway.
"""

import json
import pathlib
import pickle
import shutil

import hf_models
import numpy as np
import pytest
import torch
import transformers
from layouts import TO_4X, apart, live_tensors, renamed, save_bin
from safetensors.numpy import load_file, save_file

from mod_jax.config import ConfigError
from mod_jax.interop import huggingface, loading, names, native

WEIGHTS = "model.safetensors"
BIN = "pytorch_model.bin"
INDEX = "model.safetensors.index.json"
SHARDS = [f"model-{n:05d}-of-00002.safetensors" for n in (1, 2)]
LAYER = "language_model.model.layers."


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folder with three good folders of one model: "whole", "shards" and "bin".

    The language model has 4 layers of width 48, of which 0 and 2 are sparse; the tower has 3 layers
    of width 32 and reads pictures of 12 px.
    """
    folder = tmp_path_factory.mktemp("saved")
    model = hf_models.build(hf_models.llava(hf_models.clip(), hf_models.qwen2_moe()))
    model.save_pretrained(folder / "whole")
    tensors = load_file(folder / "whole" / WEIGHTS)
    for other in ("shards", "bin"):
        shutil.copytree(folder / "whole", folder / other, ignore=shutil.ignore_patterns(WEIGHTS))
    shard_of = {name: SHARDS[name.startswith(LAYER)] for name in tensors}
    for shard in SHARDS:
        part = {name: x for name, x in tensors.items() if shard_of[name] == shard}
        save_file(part, folder / "shards" / shard)
    (folder / "shards" / INDEX).write_text(json.dumps({"weight_map": shard_of}))
    save_bin(renamed(apart(live_tensors(model)), TO_4X), folder / "bin")
    return folder


def assert_refused(folder: pathlib.Path, *parts: str):
    """Asserts that saving the model in `folder` raises one error, and leaves no other folder.

    Args:
      folder: Folder of a checkpoint.
      parts: Texts that the message contains.
    """
    before = set(folder.parent.iterdir())
    with pytest.raises(ConfigError) as stock, loading.open_pretrained(folder) as opened:
        huggingface.save(folder.parent / "target", opened.config, opened.params)
    with pytest.raises(ConfigError) as ours, loading.open_pretrained(folder) as opened:
        native.save_native(folder.parent / "target", opened)
    assert str(stock.value) == str(ours.value)
    assert set(folder.parent.iterdir()) == before
    assert "\n" not in str(stock.value)
    for part in parts:
        assert part in str(stock.value)


# Functions that return a fault: a function that changes a folder.


def cut(name: str, share: float):
    """Keeps the first `share` of a file's bytes."""

    def change(folder):
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: int(len(data) * share)])

    return change


def replace(name: str, data: bytes):
    """Replaces the contents of a file."""
    return lambda folder: (folder / name).write_bytes(data)


def remove(*names: str):
    """Removes files."""
    return lambda folder: [(folder / name).unlink() for name in names]


def edit(name: str, **values):
    """Sets values of a JSON file; a dict is merged into the one that is there."""

    def change(folder):
        found = json.loads((folder / name).read_text())
        merged = {
            key: found[key] | value if isinstance(found.get(key), dict) else value
            for key, value in values.items()
        }
        (folder / name).write_text(json.dumps(found | merged))

    return change


# Files

# Fault -> (good folder, function that breaks it, parts of the message).
FILES = {
    "safetensors cut in their numbers": ("whole", cut(WEIGHTS, 0.5), [WEIGHTS, "cannot be read"]),
    "safetensors cut in their header": ("whole", cut(WEIGHTS, 0.001), [WEIGHTS, "cannot be read"]),
    "empty safetensors": ("whole", replace(WEIGHTS, b""), [WEIGHTS, "cannot be read"]),
    "garbage safetensors": (
        "whole",
        replace(WEIGHTS, bytes(range(256)) * 9),
        [WEIGHTS, "cannot be read"],
    ),
    "a missing shard": ("shards", remove(SHARDS[1]), [f"{SHARDS[1]} is missing"]),
    "two missing shards": (
        "shards",
        remove(*SHARDS),
        [f"{SHARDS[0]} is missing", f"{SHARDS[1]} is missing"],
    ),
    "a cut shard": ("shards", cut(SHARDS[0], 0.9), [f"{SHARDS[0]} cannot be read"]),
    "a promised tensor": (
        "shards",
        edit(INDEX, weight_map={"lm_head.weight": SHARDS[0], "x": SHARDS[1]}),
        [f"{SHARDS[0]} lacks lm_head.weight", f"{SHARDS[1]} lacks x"],
    ),
    "an index without a map": (
        "shards",
        replace(INDEX, b'{"a": 1}'),
        [INDEX, "weight_map", "= None"],
    ),
    "an index of other files": (
        "shards",
        edit(INDEX, weight_map={"x": "x.gguf"}),
        [INDEX, "x.gguf"],
    ),
    "a broken index": ("shards", cut(INDEX, 0.5), [INDEX, "is not JSON"]),
    "no weights": ("whole", remove(WEIGHTS), ["weights = ", WEIGHTS, BIN]),
    "a cut .bin": ("bin", cut(BIN, 0.5), [BIN, "cut off"]),
    "a .bin without its end": ("bin", cut(BIN, 0.999), [BIN, "cut off"]),
    "an empty .bin": ("bin", replace(BIN, b""), [BIN, "cannot be read"]),
    "a garbage .bin": ("bin", replace(BIN, bytes(range(256)) * 9), [BIN, "cannot be read"]),
    "a .bin of more than tensors": (
        "bin",
        lambda folder: torch.save({"a": torch.ones(1), "step": 3}, folder / BIN),
        [BIN, "more than tensors: ['step']"],
    ),
    "a .bin of a list": (
        "bin",
        lambda folder: torch.save([torch.ones(1)], folder / BIN),
        [BIN, "more than tensors: ['list']"],
    ),
    "a .bin of a module": (
        "bin",
        lambda folder: torch.save(torch.nn.Linear(2, 2), folder / BIN),
        [BIN, "torch.nn.modules.linear.Linear: refused"],
    ),
    "a broken config": ("whole", cut("config.json", 0.5), ["config.json is not JSON"]),
    "a config that is a list": (
        "whole",
        replace("config.json", b"[]"),
        ["config.json", "a JSON object"],
    ),
    "a config in another encoding": (
        "whole",
        replace("config.json", "{}".encode("utf-16")),
        ["config.json is not JSON"],
    ),
    "no config": ("whole", remove("config.json"), ["with a config.json"]),
    "an adapter": ("whole", replace("adapter_config.json", b"{}"), ["not a LoRA", "Merge it"]),
}


@pytest.mark.parametrize("fault", FILES)
def test_a_broken_file_is_named(fault, saved, tmp_path):
    kind, change, parts = FILES[fault]
    folder = shutil.copytree(saved / kind, tmp_path / "source")
    change(folder)
    assert_refused(folder, *parts)


@pytest.fixture
def twice(saved, tmp_path):
    """The good folder "whole", with the shards of "shards" and their index beside its file."""
    folder = shutil.copytree(saved / "whole", tmp_path / "twice")
    for name in (*SHARDS, INDEX):
        shutil.copy(saved / "shards" / name, folder)
    return folder


def norm_of(folder: pathlib.Path) -> np.ndarray:
    """A small parameter of a folder."""
    with loading.open_pretrained(folder) as opened:
        return np.asarray(opened.params["language_model.norm.scale_d"])


def change_norm(path: pathlib.Path):
    """Adds 1 to that parameter in a file."""
    tensors = load_file(path)
    tensors["language_model.model.norm.weight"] += 1
    save_file(tensors, path, {"format": "pt"})


def test_one_file_comes_before_an_index_as_in_transformers(twice, caplog):
    """The index is then one of shards that are no longer there."""
    for shard in SHARDS:
        (twice / shard).unlink()
    change_norm(twice / WEIGHTS)
    theirs = transformers.LlavaForConditionalGeneration.from_pretrained(twice)
    wanted = theirs.model.language_model.norm.weight.detach().numpy()
    np.testing.assert_array_equal(norm_of(twice), wanted)
    assert f"{INDEX} is not used, as {WEIGHTS} is there" in caplog.text


def test_the_same_weights_twice_are_read_and_different_ones_are_refused(twice, saved):
    np.testing.assert_array_equal(norm_of(twice), norm_of(saved / "whole"))
    change_norm(twice / WEIGHTS)
    message = (
        r"holds weights twice.*model.safetensors, and the shards in model.safetensors.index.json "
        r"\(1 tensors differ, first language_model.model.norm.weight\)"
    )
    with pytest.raises(ConfigError, match=message):
        norm_of(twice)


def test_an_index_of_one_file_is_its_index(saved, tmp_path):
    folder = shutil.copytree(saved / "whole", tmp_path / "source")
    index = {"weight_map": {"language_model.model.norm.weight": WEIGHTS}}
    (folder / INDEX).write_text(json.dumps(index))
    assert norm_of(folder).shape == (48,)
    index["weight_map"]["x"] = WEIGHTS
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(ConfigError, match=f"{WEIGHTS} lacks x"):
        norm_of(folder)


class Code:
    """An object whose pickle writes a file when it is read."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return pathlib.Path.touch, (self.marker,)


@pytest.mark.parametrize("way", ["zip", "old format", "plain pickle"])
def test_a_pickle_with_code_is_refused_and_nothing_of_it_runs(way, saved, tmp_path):
    folder = shutil.copytree(saved / "bin", tmp_path / "source")
    marker = tmp_path / "marker"
    contents = {"lm_head.weight": torch.ones(2), "code": Code(marker)}
    if way == "plain pickle":
        (folder / BIN).write_bytes(pickle.dumps(contents))
    else:
        torch.save(contents, folder / BIN, _use_new_zipfile_serialization=way == "zip")
    assert_refused(folder, BIN, "no code of it was run" if way == "zip" else "not a zip archive")
    assert not marker.exists()
    pickle.loads(pickle.dumps(Code(marker)))
    assert marker.exists()  # as pickle would have done


# Tensors

F32 = np.float32
GATE = LAYER + "0.mlp.shared_expert.gate_proj.weight"
# Fault -> (changed tensors, where None removes one; parts of the message).
TENSORS = {
    "a missing one": (
        {LAYER + "3.mlp.up_proj.weight": None},
        [f"Tensors that differ (1): missing {LAYER}3.mlp.up_proj.weight"],
    ),
    "an unexpected one": (
        {LAYER + "1.self_attn.o_proj.bias": np.zeros(48, F32)},
        [f"Tensors that differ (1): unexpected {LAYER}1.self_attn.o_proj.bias"],
    ),
    "a wrong shape": (
        {"multi_modal_projector.linear_1.weight": np.zeros((48, 31), F32)},
        ["linear_1.weight has the shape (48, 31), expected (48, 32)"],
    ),
    "a scalar": (
        {"multi_modal_projector.linear_1.bias": np.zeros((), F32)},
        ["linear_1.bias has the shape (), expected (48,)"],
    ),
    "integers": (
        {LAYER + "2.mlp.gate.weight": np.zeros((4, 48), np.int8)},
        ["2.mlp.gate.weight has the dtype I8, expected one of"],
    ),
    "doubles": (
        {LAYER + "2.mlp.gate.weight": np.zeros((4, 48))},
        ["2.mlp.gate.weight has the dtype F64, expected one of"],
    ),
    "a shared expert that should be empty": (
        {GATE: np.zeros((8, 48), F32)},
        [f"unexpected {GATE}"],
    ),
    "many": (
        {
            LAYER + "3.mlp.up_proj.weight": None,
            "extra": np.zeros(2, F32),
            LAYER + "1.mlp.up_proj.weight": np.zeros((56, 48), np.int8),
            "language_model.lm_head.weight": np.zeros((9, 48), F32),
        },
        ["Tensors that differ (4): ", "missing", "unexpected extra", "dtype I8", "(9, 48)"],
    ),
}


@pytest.mark.parametrize("fault", TENSORS)
def test_all_tensors_that_do_not_fit_are_named(fault, saved, tmp_path):
    changes, parts = TENSORS[fault]
    folder = shutil.copytree(saved / "whole", tmp_path / "source")
    tensors = load_file(folder / WEIGHTS)
    assert all(name in tensors for name, x in changes.items() if x is None)
    changed = {name: x for name, x in (tensors | changes).items() if x is not None}
    save_file(changed, folder / WEIGHTS)
    assert_refused(folder, *parts)


# Numbers

# Name -> (number, what the message says about it).
BAD_NUMBERS = {"nan": (np.nan, "= nan at 1 of 48 places"), "inf": (-np.inf, "= -inf at 1 of 48")}


@pytest.mark.parametrize("kind", BAD_NUMBERS)
def test_numbers_that_are_not_finite_are_refused(kind, saved, tmp_path):
    number, part = BAD_NUMBERS[kind]
    folder = shutil.copytree(saved / "whole", tmp_path / "source")
    tensors = load_file(folder / WEIGHTS)
    tensors["language_model.model.norm.weight"][3] = number
    save_file(tensors, folder / WEIGHTS)
    assert_refused(folder, "language_model.model.norm.weight", str(folder), part)
    with pytest.raises(ConfigError, match="expected finite numbers"):
        hf_models.load(folder)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_parameters_that_are_not_finite_are_not_written(dtype, saved, tmp_path):
    """As a run leaves them that lost its numbers."""
    config, params = hf_models.load(saved / "whole")
    params["language_model.norm.scale_d"][5] = np.nan
    with pytest.raises(ConfigError, match=r"norm.weight in the model = nan.*expected finite"):
        huggingface.save(tmp_path / "target", config, params, dtype)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    "dtype, number, refused",
    [
        ("float16", 65504.0, False),
        ("float16", -65520.0, True),
        ("float16", 1e6, True),
        ("bfloat16", 3.38e38, False),
        ("bfloat16", 3.4e38, True),
        ("float32", 3.4e38, False),
    ],
)
def test_a_number_that_a_dtype_turns_into_infinity_is_refused(
    dtype, number, refused, saved, tmp_path
):
    config, params = hf_models.load(saved / "whole")
    params["language_model.norm.scale_d"][5] = number
    if not refused:
        huggingface.save(tmp_path / "target", config, params, dtype)
        return
    message = f"dtype = '{dtype}': expected one that holds .*norm.weight, whose numbers go up to"
    with pytest.raises(ConfigError, match=message):
        huggingface.save(tmp_path / "target", config, params, dtype)
    assert not any(tmp_path.iterdir())


# Configurations that contradict the tensors, or that the model does not compute

# Fault -> (changed values of config.json, parts of the message).
CONFIGS = {
    "fewer layers": (
        {"text_config": {"num_hidden_layers": 3}},
        [f"unexpected {LAYER}3.self_attn.q_proj.weight", f"unexpected {LAYER}3.mlp.up_proj.weight"],
    ),
    "more layers": (
        {"text_config": {"num_hidden_layers": 5}},
        [f"missing {LAYER}4.self_attn.q_proj.weight", f"missing {LAYER}4.mlp.gate.weight"],
    ),
    "more heads": (
        {"text_config": {"num_attention_heads": 6, "head_dim": 12}},
        ["q_proj.weight has the shape (48, 48), expected (72, 48)"],
    ),
    "fewer key heads": (
        {"text_config": {"num_key_value_heads": 1}},
        ["k_proj.weight has the shape (24, 48), expected (12, 48)"],
    ),
    "another vocabulary": (
        {"text_config": {"vocab_size": 102}},
        ["embed_tokens.weight has the shape (101, 48), expected (102, 48)", "lm_head.weight"],
    ),
    "more experts": (
        {"text_config": {"num_experts": 5}},
        [f"missing {LAYER}0.mlp.experts.4.up_proj.weight", "(4, 48), expected (5, 48)"],
    ),
    "another sparse layer": (
        {"text_config": {"mlp_only_layers": [3]}},
        [f"missing {LAYER}1.mlp.gate.weight", f"unexpected {LAYER}1.mlp.up_proj.weight"],
    ),
    "larger pictures": (
        {"vision_config": {"image_size": 16}},
        ["position_embedding.weight has the shape (10, 32), expected (17, 32)"],
    ),
    "a wider tower": (
        {"vision_config": {"hidden_size": 64}},
        ["patch_embedding.weight", "linear_1.weight has the shape (48, 32), expected (48, 64)"],
    ),
    "another family of towers": (
        {
            "vision_config": {"model_type": "siglip_vision_model"},
            "vision_feature_select_strategy": "full",
        },
        ["unexpected vision_tower"],
    ),
    "several faults": (
        {
            "text_config": {"num_hidden_layers": 5, "vocab_size": 102},
            "vision_config": {"image_size": 16},
        },
        [f"missing {LAYER}4.", "expected (102, 48)", "expected (17, 32)"],
    ),
    "words for sizes": (
        {"text_config": {"hidden_size": "48", "num_attention_heads": 0}},
        ["'hidden_size': '48'", "'num_attention_heads': 0"],
    ),
    "no sizes": (
        {"vision_config": {"image_size": None, "patch_size": [4, 4]}},
        ["'image_size': None", "'patch_size': [4, 4]"],
    ),
    "a word for a number": ({"text_config": {"rms_norm_eps": "small"}}, ["norm_eps = 'small'"]),
    "scaled positions": (
        {"text_config": {"rope_parameters": {"rope_type": "yarn"}}},
        ["rope_type = 'yarn'"],
    ),
    "quantised": (
        {"quantization_config": {"quant_method": "awq"}},
        ["'quantization_config': {'quant_method': 'awq'}"],
    ),
    "several layers of features": (
        {"vision_feature_layer": [-2, -5]},
        ["vision_feature_layer = [-2, -5]"],
    ),
}


@pytest.mark.parametrize("fault", CONFIGS)
def test_a_configuration_that_does_not_fit_is_refused(fault, saved, tmp_path):
    values, parts = CONFIGS[fault]
    folder = shutil.copytree(saved / "whole", tmp_path / "source")
    edit("config.json", **values)(folder)
    assert_refused(folder, *parts)


@pytest.mark.parametrize("key", ["text_config", "vision_config"])
def test_a_configuration_without_a_part(key, saved, tmp_path):
    folder = shutil.copytree(saved / "whole", tmp_path / "source")
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {key: 3}))
    assert_refused(folder, "text_config, vision_config", "3")


# The good folders


@pytest.mark.parametrize("kind", ["whole", "shards", "bin"])
def test_opening_reads_no_numbers(kind, saved, monkeypatch):
    monkeypatch.setattr(names.Piece, "read", lambda piece: pytest.fail("a tensor was read"))
    with loading.open_pretrained(saved / kind) as opened:
        assert opened.params["language_model.embedding.w_vd"].shape == (101, 48)


@pytest.mark.parametrize("kind", ["whole", "shards", "bin"])
def test_the_same_folders_are_fine_without_a_fault(kind, saved, tmp_path):
    with loading.open_pretrained(saved / kind) as opened:
        huggingface.save(tmp_path / "target", opened.config, opened.params)
    assert (tmp_path / "target" / WEIGHTS).is_file()
