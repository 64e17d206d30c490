"""Reading and writing folders: names, layouts, configurations, dtypes, shards, errors.

What the models compute is tested in test_parity.py.
"""

import dataclasses
import json
import re
import subprocess
import sys

import hf_models
import jax
import ml_dtypes
import numpy as np
import pytest
import transformers
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from mod_jax.config import ConfigError, DecoderConfig, ModelConfig, MoEConfig, VisionConfig
from mod_jax.interop import folder as folders
from mod_jax.interop import hf_config, huggingface, names, original
from mod_jax.interop.image_processor import image_processor_to_json
from mod_jax.models import llava

LLAVA = hf_models.llava(hf_models.clip(), hf_models.qwen2_moe())


@pytest.fixture(scope="module")
def model():
    return hf_models.build(LLAVA)


@pytest.fixture
def theirs(model, tmp_path):
    """A folder written by transformers.

    The language model has 4 layers of width 48, of which 0 and 2 are sparse; the tower has 3 layers
    of width 32.
    """
    model.save_pretrained(tmp_path / "theirs")
    return tmp_path / "theirs"


def rewrite(folder, change):
    """Rewrites the tensors of a folder; `change` changes the dict of them in place."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def reconfigure(folder, **values):
    """Sets values of a folder's config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def assert_equal(found, wanted):
    assert found.keys() == wanted.keys()
    for name in wanted:
        np.testing.assert_array_equal(found[name], wanted[name], err_msg=name)


# Names and layouts


def test_names_shapes_and_dtypes_are_those_of_our_model(theirs):
    config, params = hf_models.load(theirs)
    wanted = {name: (x.shape, x.dtype) for name, x in llava.abstract(config).items()}
    assert {name: (x.shape, x.dtype) for name, x in params.items()} == wanted


def test_stacks_hold_the_layers_of_their_kind_in_ascending_order(theirs, model):
    _, params = hf_models.load(theirs)
    state = {name: x.numpy() for name, x in model.state_dict().items()}
    ours = "language_model.layers."
    layer = "model.language_model.layers.{}.mlp."
    up_of_3 = state[layer.format(3) + "up_proj.weight"]
    router_of_2 = state[layer.format(2) + "gate.weight"]
    np.testing.assert_array_equal(params[ours + "mlp.up.w_df"][1], up_of_3.T)
    np.testing.assert_array_equal(params[ours + "moe.router.w_de"][1], router_of_2.T)
    # [E, 2F, D]: gate, then up
    fused_of_0 = state[layer.format(0) + "experts.gate_up_proj"]
    fused_of_2 = state[layer.format(2) + "experts.gate_up_proj"]
    np.testing.assert_array_equal(params[ours + "moe.experts.up.w_edf"][1, 3], fused_of_2[3, 56:].T)
    np.testing.assert_array_equal(
        params[ours + "moe.experts.gate.w_edf"][0, 1], fused_of_0[1, :56].T
    )


def test_heads_and_patches_are_laid_out_as_their_names_say(theirs, model):
    _, params = hf_models.load(theirs)
    state = {name: x.numpy() for name, x in model.state_dict().items()}
    query = state["model.language_model.layers.1.self_attn.q_proj.weight"]  # [heads * size, D]
    assert params["language_model.layers.attention.query.w_dnh"][1, 5, 2, 3] == query[2 * 12 + 3, 5]
    out = state["model.language_model.layers.1.self_attn.o_proj.weight"]
    assert params["language_model.layers.attention.out.w_nhd"][1, 2, 3, 5] == out[5, 2 * 12 + 3]
    # [D, channel, row, column]
    convolution = state["model.vision_tower.embeddings.patch_embedding.weight"]
    row = 2
    column = 1
    channel = 0
    pixel = (row * 4 + column) * 3 + channel
    assert params["vision_tower.patches.w_pd"][pixel, 7] == convolution[7, channel, row, column]


def test_a_file_in_the_layout_of_5x_reads_the_same(theirs, model):
    """5.x names its modules with `model.` and without `vision_model.`, and fuses experts."""
    _, params = hf_models.load(theirs)
    save_file(
        {name: x.numpy() for name, x in model.state_dict().items() if x.numel()},
        theirs / "model.safetensors",
    )
    with safe_open(theirs / "model.safetensors", "numpy") as file:
        assert "model.language_model.layers.0.mlp.experts.gate_up_proj" in file.keys()  # noqa: SIM118 - a file, not a dict
    assert_equal(hf_models.load(theirs)[1], params)


def test_a_file_in_the_layout_of_4x_is_written(theirs, tmp_path):
    """transformers since 4.46 and vLLM read these names.

    They contain `vision_model.`; each expert has tensors of its own, and there is no shared expert.
    """
    config, params = hf_models.load(theirs)
    huggingface.save(tmp_path / "ours", config, params)
    written = load_file(tmp_path / "ours" / "model.safetensors")
    original = load_file(theirs / "model.safetensors")
    gates = {f"language_model.model.layers.{n}.mlp.shared_expert_gate.weight" for n in (0, 2)}
    assert all(not written[name].any() and written[name].shape == (1, 48) for name in gates)
    spelled = {
        name.replace("vision_tower.", "vision_tower.vision_model."): x
        for name, x in original.items()
        if ".shared_expert" not in name
    }
    assert_equal({name: x for name, x in written.items() if name not in gates}, spelled)
    with safe_open(tmp_path / "ours" / "model.safetensors", "numpy") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize("plain", ["vision_tower", "language_model"])
def test_a_part_of_a_model_is_saved_and_loaded_alone(plain, theirs, tmp_path):
    config, params = hf_models.load(theirs)
    part = {name: x for name, x in params.items() if name.startswith(f"{plain}.")}
    wanted = {"vision_tower": config.vision, "language_model": config.decoder}[plain]
    huggingface.save(tmp_path / plain, wanted, params)
    found, loaded = hf_models.load(tmp_path / plain)
    assert found == wanted
    assert_equal(loaded, part)


@pytest.mark.parametrize(
    "text, vision",
    [
        (transformers.CLIPTextConfig, hf_models.clip()),
        (transformers.SiglipTextConfig, hf_models.siglip()),
    ],
)
def test_the_text_side_of_a_clip_is_ignored(text, vision, tmp_path):
    sizes = {
        "vocab_size": 11,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    config_of_both = {
        transformers.CLIPTextConfig: transformers.CLIPConfig,
        transformers.SiglipTextConfig: transformers.SiglipConfig,
    }[text]
    both = config_of_both(
        text_config=text(**sizes).to_dict(),
        vision_config=vision.to_dict() | {"vision_use_head": True},
    )
    hf_models.build(both).save_pretrained(tmp_path / "both")
    config, params = hf_models.load(tmp_path / "both")
    assert params.keys() == {entry.ours for entry in names.vision_entries(config)}
    assert config.num_layers == 3 and config.hidden_size == 32


def test_a_head_that_repeats_the_embedding_is_read_as_tied(tmp_path):
    folder = tmp_path / "tied"
    hf_models.build(hf_models.qwen2()).save_pretrained(folder)
    _, params = hf_models.load(folder)

    def repeat(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]

    def differ(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1

    rewrite(folder, repeat)
    assert_equal(hf_models.load(folder)[1], params)
    rewrite(folder, differ)
    message = "tie_word_embeddings = True: expected False, as lm_head.weight in .* differs"
    with pytest.raises(ConfigError, match=message):
        hf_models.load(folder)


# Dtypes, shards, files


@pytest.mark.parametrize(
    "dtype, relative", [("float32", 0), ("bfloat16", 2**-8), ("float16", 2**-11)]
)
def test_dtypes_of_a_file(dtype, relative, theirs, tmp_path):
    config, params = hf_models.load(theirs)
    huggingface.save(tmp_path / "ours", config, params, dtype=dtype)
    with safe_open(tmp_path / "ours" / "model.safetensors", "numpy") as file:
        stored = {file.get_slice(name).get_dtype() for name in file.offset_keys()}
    assert stored == {{"float32": "F32", "bfloat16": "BF16", "float16": "F16"}[dtype]}
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["torch_dtype"] == dtype
    absolute = 1e-7 if relative else 0  # for the subnormal numbers of float16
    for name, x in hf_models.load(tmp_path / "ours")[1].items():
        assert x.dtype == np.float32
        np.testing.assert_allclose(x, params[name], rtol=relative, atol=absolute, err_msg=name)
        rounded = params[name].astype(folders.DTYPES[dtype]).astype(np.float32)
        np.testing.assert_array_equal(x, rounded)


def test_another_dtype_is_refused(theirs, tmp_path):
    with pytest.raises(ConfigError, match="dtype = 'int8': expected one of"):
        huggingface.save(tmp_path / "ours", *hf_models.load(theirs), dtype="int8")


def test_shards_and_their_index(theirs, model, tmp_path):
    config, params = hf_models.load(theirs)
    huggingface.save(tmp_path / "ours", config, params, shard_bytes=60_000)
    shards = sorted(tmp_path.glob("ours/*.safetensors"))
    index = json.loads((tmp_path / "ours" / "model.safetensors.index.json").read_text())
    assert len(shards) > 3 and shards[0].name == f"model-00001-of-{len(shards):05d}.safetensors"
    assert all(path.stat().st_size < 70_000 for path in shards)
    sizes = {shard.name: load_file(shard) for shard in shards}
    assert index["weight_map"] == {
        name: shard for shard, tensors in sizes.items() for name in tensors
    }
    assert index["metadata"]["total_size"] == sum(
        x.nbytes for tensors in sizes.values() for x in tensors.values()
    )
    assert_equal(hf_models.load(tmp_path / "ours")[1], params)
    _, loading_info = type(model).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert all("shared_expert." in name for name in loading_info["missing_keys"])
    shards[1].unlink()
    with pytest.raises(ConfigError, match=shards[1].name):
        hf_models.load(tmp_path / "ours")


def test_other_files_come_along(theirs, tmp_path):
    huggingface.save(
        tmp_path / "ours",
        *hf_models.load(theirs),
        others=lambda folder: (folder / "tokenizer.json").write_text("{}"),
    )
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {
        path.name for path in (tmp_path / "ours").iterdir()
    }


def test_a_folder_appears_whole_or_not_at_all(theirs, tmp_path):
    config, params = hf_models.load(theirs)

    class Broken:
        shape = params["adaptor.linear_2.b_o"].shape

        def __array__(self, *_, **__):
            raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        huggingface.save(tmp_path / "ours", config, params | {"adaptor.linear_2.b_o": Broken()})
    assert not (tmp_path / "ours").exists()
    huggingface.save(tmp_path / "ours", config, params)
    with pytest.raises(ConfigError, match="folder = .*ours.*does not exist yet"):
        huggingface.save(tmp_path / "ours", config, params)
    assert {path.name for path in tmp_path.iterdir()} == {"theirs", "ours"}


def test_loading_needs_neither_torch_nor_transformers():
    code = (
        "import sys; sys.modules.update(torch=None, transformers=None); "
        "import mod_jax.interop.huggingface"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# Errors


def test_one_error_lists_every_tensor_that_does_not_fit(theirs):
    def change(tensors):
        del tensors["language_model.model.layers.3.mlp.up_proj.weight"]
        tensors["language_model.model.layers.1.self_attn.o_proj.bias"] = np.zeros(48, np.float32)
        tensors["multi_modal_projector.linear_1.weight"] = np.zeros((48, 31), np.float32)
        tensors["language_model.model.layers.2.mlp.experts.3.down_proj.weight"] = np.zeros(
            (56, 48), np.float32
        )

    rewrite(theirs, change)
    with pytest.raises(ConfigError) as error:
        hf_models.load(theirs)
    message = str(error.value)
    assert str(theirs) in message and "Tensors that differ (4): " in message
    assert "missing language_model.model.layers.3.mlp.up_proj.weight" in message
    assert "unexpected language_model.model.layers.1.self_attn.o_proj.bias" in message
    assert (
        "multi_modal_projector.linear_1.weight has the shape (48, 31), expected (48, 32)" in message
    )
    assert "experts.3.down_proj.weight has the shape (56, 48), expected (48, 56)" in message


def test_parameters_that_do_not_fit_are_not_written(theirs, tmp_path):
    config, params = hf_models.load(theirs)
    wrong = params | {"extra": np.zeros(1), "adaptor.linear_2.b_o": np.zeros(3)}
    del wrong["adaptor.linear_1.b_o"]
    listed = (
        r"missing adaptor.linear_1.b_o; unexpected extra; "
        r"adaptor.linear_2.b_o has the shape \(3,\), expected \(48,\)"
    )
    with pytest.raises(ConfigError, match=listed):
        huggingface.save(tmp_path / "ours", config, wrong)


def test_folders_without_a_config_or_weights(theirs, tmp_path):
    with pytest.raises(ConfigError, match="config.json"):
        hf_models.load(tmp_path)
    (theirs / "model.safetensors").rename(theirs / "weights")
    with pytest.raises(ConfigError, match="model.safetensors"):
        hf_models.load(theirs)


def test_the_kind_is_read_from_the_config_not_from_the_name(theirs):
    reconfigure(theirs, model_type="bert")
    with pytest.raises(ConfigError, match="model_type = 'bert'"):
        hf_models.load(theirs)


REFUSED_TEXT = {
    "hidden_act": "gelu",
    "attention_bias": True,
    "quantization_config": {"quant_method": "gptq"},
    "rope_parameters": {"rope_type": "yarn", "factor": 4.0},
    "shared_expert_intermediate_size": 8,
    "moe_intermediate_size": 8,
    "model_type": "mamba",
}


@pytest.mark.parametrize("key", REFUSED_TEXT)
def test_a_text_option_that_the_decoder_does_not_have_is_refused(key):
    named = {"rope_parameters": "rope_type = 'yarn'"}.get(key, key)
    with pytest.raises(ConfigError, match=f"{named}.*expected"):
        hf_config.decoder_from_json(hf_models.qwen2_moe().to_dict() | {key: REFUSED_TEXT[key]})


def test_one_error_names_every_option_that_is_refused():
    changed = {
        "vision_config": LLAVA.vision_config.to_dict() | {"hidden_act": "relu"},
        "projector_hidden_act": "relu",
    }
    changed["text_config"] = (
        LLAVA.text_config.to_dict() | REFUSED_TEXT | {"model_type": "qwen2_moe"}
    )
    with pytest.raises(ConfigError) as error:
        hf_config.model_from_json(LLAVA.to_dict() | changed, {}, {})
    for expected in (
        "vision_config.hidden_act = 'relu'",
        "'projector_hidden_act': 'relu'",
        "'hidden_act': 'gelu', 'attention_bias': True",
        "'gptq'",
        "'yarn'",
    ):
        assert expected in str(error.value)


NO_SIZES = (0, -1, True, "8", 1.5, None)


@pytest.mark.parametrize("key", hf_config.TEXT_SIZES + hf_config.MOE_SIZES)
def test_a_size_of_a_text_config_is_a_positive_integer(key):
    values = hf_models.qwen2_moe().to_dict()
    if key == "num_local_experts":
        del values["num_experts"]
    for wrong in NO_SIZES[:-1] if key in ("num_key_value_heads", "head_dim") else NO_SIZES:
        message = re.escape(f"{key!r}: {wrong!r}}}: expected positive integers")
        with pytest.raises(ConfigError, match=message):
            hf_config.decoder_from_json(values | {key: wrong})


@pytest.mark.parametrize("key", hf_config.VISION_SIZES)
def test_a_size_of_a_vision_config_is_a_positive_integer(key):
    for wrong in NO_SIZES:
        message = re.escape(f"{key!r}: {wrong!r}}}: expected positive integers")
        with pytest.raises(ConfigError, match=message):
            hf_config.vision_from_json(hf_models.clip().to_dict() | {key: wrong}, {})


def test_scaled_rotary_angles_in_the_spelling_of_4x_are_refused():
    scaling = {"type": "linear", "factor": 2.0}
    with pytest.raises(ConfigError, match="rope_type = 'linear'"):
        hf_config.decoder_from_json(
            {"model_type": "llama", "rope_theta": 1e4, "rope_scaling": scaling}
        )


REFUSED_LLAVA = {
    "projector_hidden_act": "relu",
    "multimodal_projector_bias": False,
    "vision_feature_select_strategy": "full",
    "quantization_config": {"quant_method": "gptq"},
}


REFUSED_TOWER = {
    "model_type": "dinov2",
    "hidden_act": "relu",
    "quantization_config": {"quant_method": "gptq"},
}


@pytest.mark.parametrize("key", REFUSED_TOWER)
def test_a_tower_option_that_the_model_does_not_have_is_refused(key):
    values = hf_models.clip().to_dict() | {key: REFUSED_TOWER[key]}
    with pytest.raises(ConfigError, match=f"{key}.*expected"):
        hf_config.vision_from_json(values, {})


@pytest.mark.parametrize("layer", [[-2, -5], "-2", None, 1.0])
def test_a_tower_gives_the_features_of_one_layer(layer):
    with pytest.raises(ConfigError, match="vision_feature_layer = .*expected the number of one"):
        hf_config.vision_from_json(hf_models.clip().to_dict(), {}, layer)


@pytest.mark.parametrize("key", ["text_config", "vision_config"])
def test_a_part_of_a_llava_config_is_an_object(key):
    with pytest.raises(ConfigError, match="text_config, vision_config = .*a JSON object each"):
        hf_config.model_from_json(LLAVA.to_dict() | {key: "a-folder"}, {}, {})


@pytest.mark.parametrize("key", REFUSED_LLAVA)
def test_a_llava_option_that_the_model_does_not_have_is_refused(key):
    with pytest.raises(ConfigError, match=f"{key}.*expected"):
        hf_config.model_from_json(LLAVA.to_dict() | {key: REFUSED_LLAVA[key]}, {}, {})


MOE = MoEConfig(layers=(0, 2), num_experts=4, experts_per_token=2)


@pytest.mark.parametrize(
    "changes",
    [
        {"qkv_bias": True, "qk_norm": True},
        {"qkv_bias": True, "qk_norm": True, "moe": MOE},
        {"moe": dataclasses.replace(MOE, residual=True)},
        {"moe": dataclasses.replace(MOE, capacity_factor=1.5)},
    ],
)
def test_a_decoder_without_an_exact_match_is_not_exported(changes):
    with pytest.raises(ConfigError, match="decoder.qkv_bias|moe.residual|moe.capacity_factor"):
        hf_config.decoder_to_json(DecoderConfig(**changes), "float32")


def test_a_capacity_that_drops_no_token_is_exported_as_none():
    """With 2 experts per token, 4 experts and a factor of 2.0, an expert can take all tokens."""
    enough = DecoderConfig(moe=dataclasses.replace(MOE, capacity_factor=2.0))
    assert hf_config.decoder_to_json(enough, "float32") == hf_config.decoder_to_json(
        DecoderConfig(moe=MOE), "float32"
    )


# Configurations


@pytest.mark.parametrize("family", hf_config.TEXT_DEFAULTS)
def test_what_a_text_config_leaves_out_is_the_default_of_its_class(family):
    """Compares with the configuration class of transformers."""
    fixed = {"qwen2_moe": {"shared_expert_intermediate_size": 0}}.get(family, {})
    full = transformers.CONFIG_MAPPING[family](**fixed).to_dict()
    assert hf_config.decoder_from_json(
        {"model_type": family} | fixed
    ) == hf_config.decoder_from_json(full)
    needed = hf_config.TEXT_DEFAULTS[family].keys() - fixed.keys() - {"num_key_value_heads"}
    # qwen3_moe of 5.x calls num_experts num_local_experts.
    full = {"num_experts": full.get("num_local_experts")} | full
    assert {key: full[key] for key in needed} == {
        key: hf_config.TEXT_DEFAULTS[family][key] for key in needed
    }
    assert hf_config.END_TOKENS.get(family) == full["eos_token_id"]


def test_a_shared_expert_that_a_text_config_leaves_out_is_there_and_refused():
    size = transformers.Qwen2MoeConfig().shared_expert_intermediate_size
    with pytest.raises(ConfigError, match=rf"'shared_expert_intermediate_size': {size}\b"):
        hf_config.decoder_from_json({"model_type": "qwen2_moe"})


IMAGE_PROCESSORS = {
    "clip_vision_model": "CLIPImageProcessor",
    "siglip_vision_model": "SiglipImageProcessor",
}


@pytest.mark.parametrize("kind", hf_config.VISION_DEFAULTS)
def test_what_a_vision_config_leaves_out_is_the_default_of_its_class(kind):
    """Compares with the configuration class of transformers."""
    full = transformers.CONFIG_MAPPING[kind]().to_dict()
    defaults = hf_config.VISION_DEFAULTS[kind]
    assert {key: full[key] for key in defaults} == defaults
    vision = hf_config.vision_from_json({"model_type": kind}, {})
    processor = getattr(transformers, IMAGE_PROCESSORS[kind])()
    assert vision.pixel_mean == tuple(processor.image_mean)
    assert vision.pixel_std == tuple(processor.image_std)
    # a tower alone does not say which layer a LLaVA reads
    assert vision.feature_layer == transformers.LlavaConfig().vision_feature_layer


def test_an_old_llava_config_reads():
    """As transformers 4.3x writes it.

    rope_theta is a top-level key, the sizes of the 7B llama are left out, and the image token is
    given.
    """
    vision = {
        "model_type": "clip_vision_model",
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 336,
        "patch_size": 14,
        "projection_dim": 768,
        "vocab_size": 32000,
    }
    text = {
        "model_type": "llama",
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "vocab_size": 32064,
    }
    values = {
        "model_type": "llava",
        "image_token_index": 32000,
        "text_config": text,
        "vision_config": vision,
        "tie_word_embeddings": False,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
    }
    config = hf_config.model_from_json(values, {}, {})
    llama = DecoderConfig(
        vocab_size=32064,
        hidden_size=4096,
        intermediate_size=11008,
        num_layers=32,
        num_heads=32,
        num_kv_heads=32,
        head_dim=128,
        rope_theta=1e4,
        norm_eps=1e-5,
        qkv_bias=False,
        tie_embeddings=False,
        max_positions=4096,
    )
    assert config == ModelConfig(
        vision=VisionConfig(), decoder=llama, image_token_id=32000, end_token_id=2
    )


# Case -> eos_token_id of generation_config.json, of config.json and of its text_config.
END_TOKENS = {
    "all three": ([7, 5, 8], 5, [7, 9]),
    "a list and a number": ([5, 7], None, 7),
    "a number beside a list": (7, [7, 5], None),
    "config.json": (None, [6, 1], None),
    "config.json and its text_config": (None, 6, [1, 6]),
    "the text_config": (None, None, 5),
    "the text_config's list": (None, None, [5, 6]),
    "beside the default of the class, written out": ([7], 7, 2),
    "the class": (None, None, None),
    "the first word of a vocabulary": (0, None, [5, 0]),
}


def llava_files(generation, whole, text) -> tuple[dict, dict, dict]:
    """config.json, the image processor and generation_config.json with these end tokens."""
    values = {
        "model_type": "llava",
        "text_config": {"model_type": "mistral", "vocab_size": 32064},
        "vision_config": {"model_type": "clip_vision_model"},
    }
    for part, ids in ((values["text_config"], text), (values, whole)):
        if ids is not None:
            part["eos_token_id"] = ids
    return values, {}, {} if generation is None else {"eos_token_id": generation}


@pytest.mark.parametrize("case", END_TOKENS)
def test_an_answer_ends_at_all_tokens_at_which_transformers_ends_it(case):
    values, _, generation = files = llava_files(*END_TOKENS[case])
    if generation:
        theirs = transformers.GenerationConfig.from_dict(generation)
    else:
        config = transformers.LlavaConfig.from_dict(values)
        theirs = transformers.GenerationConfig.from_model_config(config)
    ends = theirs.eos_token_id
    found = hf_config.model_from_json(*files)
    assert sorted(found.end_token_ids) == sorted(ends if isinstance(ends, list) else [ends])


def test_training_learns_the_end_token_of_the_language_models_own_tokenizer():
    """Instruction-tuned Qwens end with <|im_end|> (here 7), and also at <|endoftext|> (here 5)."""
    for files in (([5, 7], None, 7), ([5, 7], 7, None), ([7, 5], None, None)):
        config = hf_config.model_from_json(*llava_files(*files))
        assert (config.end_token_id, config.other_end_token_ids) == (7, (5,))


@pytest.mark.parametrize("files", [(7, None, [5, 6]), ([7, 8], [5], None), (None, 6, 5)])
def test_end_tokens_that_contradict_each_other_are_refused(files):
    message = r"eos_token_id is stated in 2 places.*: [\[(]\d.*Correct or remove the wrong one"
    with pytest.raises(ConfigError, match=message):
        hf_config.model_from_json(*llava_files(*files))


@pytest.mark.parametrize("value", ["</s>", True, [2, None], -1, 2.0])
def test_end_tokens_that_are_no_ids_are_refused(value):
    with pytest.raises(ConfigError, match="eos_token_id of config.json = .*expected a token id"):
        hf_config.model_from_json(*llava_files(None, value, None))


@pytest.mark.parametrize(
    "key, value",
    [
        ("image_token_index", 32064),
        ("image_token_id", 40000),
        ("eos_token_id", 32064),
        ("eos_token_id", [2, 32064]),
    ],
)
def test_a_token_without_a_row_in_the_embedding_is_refused(key, value):
    values, *others = llava_files(None, None, None)
    hf_config.model_from_json(values | {key: 32063}, *others)
    named = {"image_token_index": "image_token_id", "eos_token_id": "end_token_id"}.get(key, key)
    if isinstance(value, list):
        named = "other_end_token_ids"
    with pytest.raises(ConfigError, match=f"{named} in config.json = .*expected less than 32064"):
        hf_config.model_from_json(values | {key: value}, *others)


# Ways to state the rotary angles that agree, and that contradict each other.
LINEAR = {"type": "linear", "factor": 2.0}
ROPE = {
    "nothing": {},
    "flat": {"rope_theta": 5e5},
    "flat, with a null": {"rope_theta": 5e5, "rope_scaling": None},
    "5.x": {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
    "5.x, without its kind": {"rope_parameters": {"rope_theta": 5e5}},
    "5.x, flat base": {"rope_parameters": {"rope_type": "default"}, "rope_theta": 5e5},
    "4.x": {"rope_scaling": {"rope_type": "default", "rope_theta": 5e5}},
    "both": {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}, "rope_theta": 500000},
    "nulls": {"rope_parameters": None, "rope_scaling": None, "rope_theta": None},
}


@pytest.mark.parametrize("case", ROPE)
def test_the_rotary_base_is_that_of_transformers(case):
    theirs = transformers.LlamaConfig(**{k: v for k, v in ROPE[case].items() if v is not None})
    found = hf_config.decoder_from_json({"model_type": "llama"} | ROPE[case])
    assert found.rope_theta == theirs.rope_parameters["rope_theta"]


BAD_ROPE = {
    "two bases": (
        {"rope_parameters": {"rope_theta": 5e5}, "rope_theta": 1e4},
        "rope_theta is stated in 2 places.*rope_parameters.rope_theta: 500000.0; rope_theta: 10000",
    ),
    "two bases, 4.x": (
        {"rope_scaling": {"type": "default", "rope_theta": 5e5}, "rope_theta": 1e4},
        "rope_theta is stated in 2 places",
    ),
    "scaled in one place": (
        {"rope_scaling": LINEAR, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
        "rope_type is stated in 2 places.*rope_scaling: 'linear'; rope_parameters: 'default'",
    ),
    "scaled in both": (
        {"rope_scaling": LINEAR, "rope_parameters": {"rope_type": "linear", "factor": 2.0}},
        "rope_type = 'linear': expected 'default'",
    ),
    "an own one for each layer": (
        {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e6}}},
        "rope_parameters = .*expected one object for all layers",
    ),
    "a word": ({"rope_scaling": "linear"}, "rope_scaling = 'linear': expected one object"),
}


@pytest.mark.parametrize("case", BAD_ROPE)
def test_rotary_angles_that_contradict_each_other_or_are_not_computed_are_refused(case):
    values, message = BAD_ROPE[case]
    with pytest.raises(ConfigError, match=message):
        hf_config.decoder_from_json({"model_type": "llama"} | values)


def test_other_facts_that_are_stated_twice_have_to_agree():
    values, *others = llava_files(None, None, None)
    tokens = {"image_token_index": 31000, "image_token_id": 31000}
    assert hf_config.model_from_json(values | tokens, *others).image_token_id == 31000
    message = "the id of <image> is stated in 2 places.*image_token_index: 31000; image_token_id: 7"
    with pytest.raises(ConfigError, match=message):
        hf_config.model_from_json(values | tokens | {"image_token_id": 7}, *others)
    experts = {"num_experts": 4, "num_local_experts": 4, "norm_topk_prob": True}
    experts["num_experts_per_tok"] = 2
    moe = hf_config.decoder_from_json({"model_type": "qwen3_moe"} | experts).moe
    assert moe is not None and moe.num_experts == 4
    message = "the number of experts is stated in 2 places.*num_local_experts: 4; num_experts: 8"
    with pytest.raises(ConfigError, match=message):
        hf_config.decoder_from_json({"model_type": "qwen3_moe"} | experts | {"num_experts": 8})


# Defaults of the llava class

LLAVA_KEYS = (
    "image_token_index",
    "projector_hidden_act",
    "vision_feature_select_strategy",
    "vision_feature_layer",
    "multimodal_projector_bias",
    "tie_word_embeddings",
)


def read_as_transformers_does(values: dict) -> tuple:
    """What `model_from_json` reads, from transformers' own class."""
    theirs = transformers.LlavaConfig.from_dict(values)
    full = theirs.to_dict() | {"image_token_index": theirs.image_token_index}
    assert full["vision_config"]["model_type"] and full["text_config"]["model_type"]
    return hf_config.model_from_json(full, {}, {})


@pytest.mark.parametrize("key", LLAVA_KEYS)
@pytest.mark.parametrize("null", [False, True])
def test_a_key_that_a_llava_config_leaves_out_is_the_default_of_its_class(key, null):
    values = {
        "model_type": "llava",
        "architectures": ["LlavaForConditionalGeneration"],
        "image_token_index": 7,
        "projector_hidden_act": "gelu",
        "vision_feature_select_strategy": "default",
        "vision_feature_layer": -3,
        "multimodal_projector_bias": True,
        "tie_word_embeddings": True,
        "text_config": {"model_type": "qwen2", "vocab_size": 152064, "eos_token_id": 3},
        "vision_config": {"model_type": "clip_vision_model", "num_hidden_layers": 5},
    }
    without = {name: value for name, value in values.items() if name != key}
    found = hf_config.model_from_json(without | ({key: None} if null else {}), {}, {})
    assert found == read_as_transformers_does(without)
    changed = key in ("image_token_index", "vision_feature_layer", "tie_word_embeddings")
    assert (found != hf_config.model_from_json(values, {}, {})) == changed


@pytest.mark.parametrize(
    "parts",
    [
        {"text_config": {"vocab_size": 32064}},
        {"text_config": {"vocab_size": 32064}, "vision_config": {"num_hidden_layers": 5}},
        {"text_config": {"vocab_size": 32064}, "vision_config": None},
        {"image_token_index": 7},
        {"image_token_index": 7, "text_config": None},
    ],
)
def test_a_part_that_a_llava_config_leaves_out_is_the_default_of_its_class(parts):
    values = {"model_type": "llava", "architectures": ["LlavaForConditionalGeneration"]} | parts
    assert not original.is_original(values)
    assert hf_config.model_from_json(values, {}, {}) == read_as_transformers_does(values)


@pytest.mark.parametrize("whole", [None, False, True])
@pytest.mark.parametrize("part", [None, False, True])
def test_the_head_is_tied_where_that_of_transformers_is(part, whole):
    def stated(place: dict, tied: bool | None) -> dict:
        return place if tied is None else place | {"tie_word_embeddings": tied}

    text = hf_models.qwen2().to_dict()
    del text["tie_word_embeddings"]
    tower = hf_models.clip().to_dict()
    values = {"model_type": "llava", "image_token_index": 7, "vision_config": tower}
    values = stated(values | {"text_config": stated(text, part)}, whole)
    model = transformers.LlavaForConditionalGeneration(transformers.LlavaConfig.from_dict(values))
    tied = model.lm_head.weight is model.get_input_embeddings().weight
    assert hf_config.model_from_json(values, {}, {}).decoder.tie_embeddings == tied


@pytest.mark.parametrize("layer", [-1, -2, -5, 1, 3, 5])
def test_a_feature_layer_counted_from_the_first_is_the_one_that_transformers_takes(layer):
    """hidden_states has the input of the first layer, and the output of each of the 5."""
    values, *others = llava_files(None, None, None)
    values["vision_config"] |= {"num_hidden_layers": 5}
    found = hf_config.model_from_json(values | {"vision_feature_layer": layer}, *others).vision
    assert range(6)[found.feature_layer] == range(6)[layer]


@pytest.mark.parametrize(
    "dense, step, wanted",
    [
        ([], 1, (0, 1, 2, 3, 4)),
        ([], 2, (1, 3)),
        ([], 3, (2,)),
        ([1], 2, (3,)),
        ([0], 1, (1, 2, 3, 4)),
    ],
)
@pytest.mark.parametrize("family", ["qwen2_moe", "qwen3_moe"])
def test_layers_are_sparse_where_those_of_transformers_are(family, dense, step, wanted):
    config = getattr(hf_models, family)(
        num_hidden_layers=5, decoder_sparse_step=step, mlp_only_layers=dense
    )
    model = getattr(transformers, hf_models.CLASSES[family])(config)
    is_sparse = [hasattr(layer.mlp, "experts") for layer in model.model.layers]
    assert tuple(np.flatnonzero(is_sparse)) == wanted
    assert hf_config.decoder_from_json(config.to_dict()).sparse_layers == wanted


NULLS = (
    "attention_bias",
    "mlp_bias",
    "rope_scaling",
    "quantization_config",
    "use_sliding_window",
    "mlp_only_layers",
    "tie_word_embeddings",
    "head_dim",
    "layer_types",
)


@pytest.mark.parametrize("key", NULLS)
def test_a_null_is_an_absent_key(key):
    values = hf_models.qwen2_moe(tie_word_embeddings=False, mlp_only_layers=[]).to_dict()
    values.pop(key, None)
    assert hf_config.decoder_from_json(values | {key: None}) == hf_config.decoder_from_json(values)


# Kind -> (options, longest sequence).
WINDOWS = {
    "mistral": ({"sliding_window": 4096}, 4096),
    "mistral of later versions": ({"sliding_window": None}, 32768),
    "mistral that does not say": ({}, 4096),
    "qwen2": ({"sliding_window": 4096, "use_sliding_window": False}, 32768),
    "qwen2 that slides": (
        {"sliding_window": 8192, "use_sliding_window": True, "max_window_layers": 2},
        8192,
    ),
    "llama": ({}, 32768),
}


@pytest.mark.parametrize("kind", WINDOWS)
def test_a_sequence_is_no_longer_than_the_sliding_window(kind):
    values, wanted = WINDOWS[kind]
    values = {"model_type": kind.split()[0], "max_position_embeddings": 32768} | values
    assert hf_config.decoder_from_json(values).max_positions == wanted


def test_experts_of_another_size_need_a_model_without_dense_layers():
    values = {
        "model_type": "qwen3_moe",
        "norm_topk_prob": True,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
    }
    assert hf_config.decoder_from_json(values).intermediate_size == 768
    with pytest.raises(
        ConfigError, match="'moe_intermediate_size': 768.*expected {'moe_intermediate_size': 6144}"
    ):
        hf_config.decoder_from_json(values | {"mlp_only_layers": [0]})


DECODERS = {
    "qwen2": DecoderConfig(),
    "llama": DecoderConfig(qkv_bias=False, rope_theta=5e5, tie_embeddings=False),
    "qwen3": DecoderConfig(qkv_bias=False, qk_norm=True, head_dim=128),
    "qwen2_moe": DecoderConfig(
        moe=MoEConfig(layers=(1, 2, 5), num_experts=8, experts_per_token=1),
        num_layers=6,
        max_positions=4096,
    ),
    "qwen3_moe": DecoderConfig(
        moe=MoEConfig(layers=(0, 2, 4), num_experts=8), num_layers=6, qkv_bias=False, qk_norm=True
    ),
}
SIGLIP = VisionConfig(
    family="siglip",
    image_size=384,
    hidden_act="gelu_tanh",
    norm_eps=1e-6,
    pixel_mean=(0.5,) * 3,
    pixel_std=(0.5,) * 3,
)


@pytest.mark.parametrize("family", DECODERS)
@pytest.mark.parametrize(
    "vision",
    [VisionConfig(pixel_mean=(0.1, 0.2, 0.3), feature_layer=-1), SIGLIP],
    ids=["clip", "siglip"],
)
def test_a_config_survives_the_way_out_and_in(family, vision):
    config = ModelConfig(vision=vision, decoder=DECODERS[family], image_token_id=7, end_token_id=8)
    written = json.loads(
        json.dumps(
            [hf_config.model_to_json(config, "bfloat16"), image_processor_to_json(vision), {}]
        )
    )
    assert hf_config.model_from_json(*written) == config
    assert written[0]["text_config"]["model_type"] == family
    # transformers reads the same.
    theirs = transformers.LlavaConfig(**written[0])
    assert theirs.text_config.rope_parameters["rope_theta"] == config.decoder.rope_theta
    assert theirs.get_text_config().tie_word_embeddings == config.decoder.tie_embeddings
    assert theirs.text_config.max_position_embeddings == config.decoder.max_positions
    if config.decoder.moe:
        assert theirs.text_config.num_experts == config.decoder.moe.num_experts


def test_an_export_says_what_each_version_of_transformers_reads():
    """4.57 reads the rotary base from a top-level `rope_theta`, and takes 10000 without it.

    vLLM chooses the text model by `architectures`.
    """
    config = ModelConfig(decoder=DECODERS["qwen2_moe"])
    text = hf_config.model_to_json(config, "bfloat16")["text_config"]
    assert text["rope_theta"] == text["rope_parameters"]["rope_theta"] == 1e6
    assert text["architectures"] == ["Qwen2MoeForCausalLM"]
    assert text["use_sliding_window"] is False
    assert text["mlp_only_layers"] == [0, 3, 4]
    assert text["decoder_sparse_step"] == 1
    assert text["norm_topk_prob"] is True
    assert (
        hf_config.decoder_to_json(
            DecoderConfig(moe=dataclasses.replace(MOE, norm_topk_prob=False)), "float32"
        )["norm_topk_prob"]
        is False
    )
    assert text["dtype"] == text["torch_dtype"] == "bfloat16"


def test_pixel_statistics_come_from_the_processors_file(theirs):
    assert hf_models.load(theirs)[0].vision.pixel_mean == VisionConfig().pixel_mean
    statistics = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    # as transformers 5.x writes it
    (theirs / "processor_config.json").write_text(json.dumps({"image_processor": statistics}))
    assert hf_models.load(theirs)[0].vision.pixel_std == (0.4, 0.5, 0.6)
    # as transformers 4.x writes it
    other = statistics | {"image_mean": [0.9, 0.2, 0.3]}
    (theirs / "preprocessor_config.json").write_text(json.dumps(other))
    message = "image_mean of the image processor in .* is stated in 2 places"
    with pytest.raises(ConfigError, match=message):
        hf_models.load(theirs)
    (theirs / "processor_config.json").unlink()
    assert hf_models.load(theirs)[0].vision.pixel_mean == (0.9, 0.2, 0.3)
    nulls = {"image_mean": None, "image_std": None}
    (theirs / "preprocessor_config.json").write_text(json.dumps(nulls))
    assert hf_models.load(theirs)[0].vision.pixel_mean == VisionConfig().pixel_mean


# Identity


def test_the_checksum_is_of_names_shapes_and_numbers_not_of_their_order():
    params = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b": np.ones(2, ml_dtypes.bfloat16),
    }
    wanted = huggingface.checksum(params)
    same = [
        dict(reversed(params.items())),
        {name: np.asfortranarray(x) for name, x in params.items()},
        {name: jax.numpy.asarray(x) for name, x in params.items()},
    ]
    assert all(huggingface.checksum(other) == wanted for other in same)
    changed = [
        params | {"a": params["a"].reshape(3, 2)},
        params | {"a": params["a"] + np.float32(1e-6)},
        {"c": params["a"], "b": params["b"]},
        params | {"a": params["a"].astype(np.float16)},
        {"a": params["a"]},
    ]
    assert len({wanted, *map(huggingface.checksum, changed)}) == 6
