"""Layouts of checkpoints: original LLaVA, the LLaVA-MoD authors', `.bin`, and adaptors alone.

What is read has to equal what a llava-hf folder of the same model gives. test_parity.py tests that
it computes what transformers computes.
"""

import json
import re
import sys

import hf_models
import ml_dtypes
import numpy as np
import pytest
import torch
from layouts import (
    DEEPSPEED,
    TO_4X,
    TO_AUTHORS,
    TO_ORIGINAL,
    Checkpoint,
    apart,
    live_tensors,
    renamed,
    save_bin,
    save_safetensors,
)
from layouts import original as save_original
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from mod_jax.config import ConfigError, DecoderConfig, ModelSource, MoEConfig, VisionConfig
from mod_jax.data.samples.tokenizer import load_tokenizer
from mod_jax.interop import huggingface, loading, names, native, original
from mod_jax.interop.folder import open_tensors
from mod_jax.interop.model import load_model
from mod_jax.interop.pretrained import Adaptor, join, read

LLAMA = hf_models.llava(hf_models.clip(), hf_models.llama())
MISTRAL = hf_models.llava(hf_models.clip(), hf_models.mistral())
QWEN = hf_models.llava(hf_models.clip(), hf_models.qwen2())
SPARSE = hf_models.llava(hf_models.clip(), hf_models.qwen2_moe())
# Name -> (stock model, further values of config.json, changes of the tensors' names).
LAYOUTS = {
    "original LLaVA": (
        LLAMA,
        {"model_type": "llava", "architectures": ["LlavaLlamaForCausalLM"]},
        TO_ORIGINAL,
    ),
    "original LLaVA, later": (LLAMA, {"model_type": "llava_llama"}, TO_ORIGINAL),
    "LlavaMistral": (MISTRAL, {"model_type": "llava_mistral"}, TO_ORIGINAL),
    "LlavaQwen": (QWEN, {"model_type": "llava_qwen"}, TO_ORIGINAL),
    "authors, dense Qwen2": (
        QWEN,
        {"model_type": "llava_qwen2", "moe": {}, "lora": {}},
        TO_AUTHORS,
    ),
    "authors, dense Qwen1.5": (QWEN, {"model_type": "llava_qwen1_5"}, TO_AUTHORS),
    "authors, sparse Qwen2": (
        SPARSE,
        {"model_type": "moe_llava_qwen2", "moe": DEEPSPEED},
        TO_AUTHORS,
    ),
    "authors, sparse Qwen1.5": (
        SPARSE,
        {"model_type": "moe_llava_qwen1_5", "moe": DEEPSPEED},
        TO_AUTHORS,
    ),
}


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    """Function: configuration -> (model of transformers, its loaded configuration and parameters).

    They are loaded from the folder that the model saves.
    """
    made = {}

    def get(config):
        if id(config) not in made:
            folder = tmp_path_factory.mktemp("stock")
            model = hf_models.build(config)
            model.save_pretrained(folder)
            made[id(config)] = model, hf_models.load(folder)
        return made[id(config)]

    return get


def tokenizer(words: int = hf_models.IMAGE_TOKEN) -> PreTrainedTokenizerFast:
    """A tokenizer without `<image>`, as of a plain language model; its last word ends a text."""
    vocabulary = {str(number): number for number in range(words)}
    end = str(words - 1)
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="0")),
        eos_token=end,
        unk_token="0",
    )


def write_original(
    folder,
    model,
    values: dict,
    spelling,
    own_tower: bool = True,
    save=save_bin,
    words: int = hf_models.IMAGE_TOKEN,
    **more,
):
    """Writes a model as original LLaVA or the authors save it, and returns the folder.

    `values` and `more` are further values of config.json.
    """
    checkpoint = Checkpoint(model, None, tokenizer(words))
    save_original(checkpoint, folder, save, spelling, values | more, own_tower)
    return folder


def assert_equal(found: dict, wanted: dict):
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)


# Original LLaVA, and the LLaVA-MoD authors


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_reads_as_the_same_model(layout, stock, tmp_path):
    config, values, spelling = LAYOUTS[layout]
    model, (wanted, params) = stock(config)
    folder = write_original(tmp_path, model, values, spelling)
    found, loaded = hf_models.load(folder)
    assert found == wanted
    assert_equal(loaded, params)
    (tmp_path / "pytorch_model.bin").unlink()  # its configuration alone needs no weights
    assert loading.read_model_config(folder, None, load_tokenizer(folder)) == wanted


@pytest.mark.parametrize("save", [save_bin, save_safetensors])
def test_a_tower_that_is_not_in_the_file_comes_from_its_folder(save, stock, tmp_path):
    model, (wanted, params) = stock(LLAMA)
    folder = write_original(
        tmp_path, model, *LAYOUTS["original LLaVA"][1:], own_tower=False, save=save
    )
    assert_equal(hf_models.load(folder)[1], params)  # the folder that mm_vision_tower names
    write_original(
        tmp_path,
        model,
        *LAYOUTS["original LLaVA"][1:],
        own_tower=False,
        save=save,
        mm_image_tower=None,
        mm_vision_tower="openai/clip-vit-large-patch14-336",
    )
    found, loaded = hf_models.load(folder, vision_tower=folder / "tower")
    assert found == wanted
    assert_equal(loaded, params)
    with pytest.raises(
        ConfigError,
        match="the weights of openai/clip-vit-large-patch14-336.*--vision-tower FOLDER",
    ):
        hf_models.load(folder)
    hf_models.build(hf_models.qwen2()).save_pretrained(tmp_path / "text")
    with pytest.raises(ConfigError, match="vision tower = .*It holds a language model"):
        hf_models.load(folder, vision_tower=tmp_path / "text")


def test_a_tower_in_the_file_is_used_with_the_sizes_of_its_published_name(
    stock, tmp_path, monkeypatch
):
    model, (wanted, params) = stock(LLAMA)
    folder = write_original(
        tmp_path, model, *LAYOUTS["original LLaVA"][1:], mm_image_tower="openai/small"
    )
    with pytest.raises(ConfigError, match="vision tower = 'openai/small'.*--vision-tower FOLDER"):
        hf_models.load(folder)
    monkeypatch.setitem(original.TOWERS, "openai/small", hf_models.clip().to_dict())
    found, loaded = hf_models.load(folder)
    assert found == wanted
    assert_equal(loaded, params)


@pytest.mark.parametrize("name", original.TOWERS)
def test_published_towers_have_the_patches_and_pixels_that_their_names_say(name):
    tower = original.published_tower({"mm_vision_tower": name})
    kind, patch, size = re.match(r".*-(\w+)-patch(\d+)(?:-(\d+))?$", name).groups()
    assert (tower.patch_size, tower.image_size) == (int(patch), int(size or 224))
    assert tower.hidden_size == {"base": 768, "large": 1024, "so400m": 1152}[kind]
    assert tower.family == ("clip" if name.startswith("openai") else "siglip")


def test_the_tower_of_llava_1_5_is_the_default_one():
    assert (
        original.published_tower({"mm_vision_tower": "openai/clip-vit-large-patch14-336"})
        == VisionConfig()
    )


def test_the_configuration_of_llava_1_5():
    """As in the config.json of the 7B; what that leaves out is the default of Llama."""
    values = {
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava",
        "mm_vision_tower": "openai/clip-vit-large-patch14-336",
        "mm_hidden_size": 1024,
        "mm_projector_type": "mlp2x_gelu",
        "mm_resampler_type": None,
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "use_mm_proj": True,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "image_aspect_ratio": "pad",
        "tune_mm_mlp_adapter": False,
        "vocab_size": 32000,
        "hidden_size": 4096,
        "num_key_value_heads": 32,
        "rms_norm_eps": 1e-5,
        "rope_scaling": None,
        "max_position_embeddings": 4096,
        "pretraining_tp": 1,
    }
    wanted = DecoderConfig(
        vocab_size=32000,
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
    assert original.language_model_from_json(values) == wanted
    assert original.with_features(original.published_tower(values), values) == VisionConfig()


def test_a_tokenizer_from_elsewhere(stock, tmp_path):
    model, (wanted, _) = stock(LLAMA)
    folder = write_original(tmp_path, model, *LAYOUTS["original LLaVA"][1:])
    (folder / "elsewhere").mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).rename(folder / "elsewhere" / name)
    with pytest.raises(ConfigError, match="tokenizer = .*--tokenizer FOLDER"):
        hf_models.load(folder)
    with loading.open_pretrained(folder, tokenizer=folder / "elsewhere") as pretrained:
        assert pretrained.config == wanted and pretrained.folder == folder / "elsewhere"


def test_a_picture_token_beyond_the_vocabulary_gets_a_row(stock, tmp_path):
    model, (_, params) = stock(LLAMA)
    folder = write_original(tmp_path, model, *LAYOUTS["original LLaVA"][1:], words=101)
    config, loaded = hf_models.load(folder)
    assert config.image_token_id == 101
    assert config.end_token_id == 100
    assert config.decoder.vocab_size == 128
    for name in ("language_model.embedding.w_vd", "language_model.head.w_vd"):
        np.testing.assert_array_equal(loaded[name][:101], params[name])
        mean = np.tile(params[name].mean(0), (27, 1))
        np.testing.assert_allclose(loaded[name][101:], mean, rtol=1e-5, atol=1e-7)


def test_what_such_files_carry_beside_is_ignored_and_nothing_else_is(stock, tmp_path):
    model, (_, params) = stock(QWEN)
    folder = write_original(tmp_path, model, *LAYOUTS["authors, dense Qwen2"][1:])
    tensors = torch.load(folder / "pytorch_model.bin", weights_only=True)
    embeddings = "model.image_tower.image_tower.vision_model.embeddings."
    ignored = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(6),
        "lm_head.weight": tensors["model.embed_tokens.weight"],
        embeddings + "position_ids": torch.arange(10)[None],
    }
    torch.save(tensors | ignored, folder / "pytorch_model.bin")
    assert_equal(hf_models.load(folder)[1], params)
    torch.save(
        tensors | {"model.mm_projector.video_patch_proj.weight": torch.ones(3)},
        folder / "pytorch_model.bin",
    )
    with pytest.raises(ConfigError, match=r"differ \(1\): unexpected .*video_patch_proj"):
        hf_models.load(folder)


# Option -> (values of config.json, pattern of the message).
REFUSED = {
    "a single linear projection": (
        {"image_projector_type": None, "mm_projector_type": None},
        "'mm_projector_type': None",
    ),
    "pictures that are cropped": (
        {"image_aspect_ratio": "square"},
        "'image_aspect_ratio': 'square'",
    ),
    "pictures in pieces": (
        {"image_aspect_ratio": "anyres", "mm_patch_merge_type": "spatial"},
        "'image_aspect_ratio': 'anyres', 'mm_patch_merge_type': 'spatial'",
    ),
    "tokens around a picture": ({"mm_use_im_start_end": True}, "'mm_use_im_start_end': True"),
    "videos": (
        {"mm_video_tower": "LanguageBind_Video_merge"},
        "'mm_video_tower': 'LanguageBind_Video_merge'",
    ),
    "two scales": ({"s2": True}, "'s2': True"),
    "a LoRA": ({"lora": {"lora_enable": True}}, "lora = .*Merge it"),
    "quantised weights": ({"quantization_config": {"bits": 4}}, "'quantization_config'"),
    "the CLS feature": (
        {"mm_vision_select_feature": "cls_patch"},
        "mm_vision_select_feature = 'cls_patch'",
    ),
    "no layer of features": ({"mm_vision_select_layer": None}, "mm_vision_select_layer = None"),
    "one expert a token": (
        {"moe": DEEPSPEED | {"top_k_experts": 1}},
        "moe.top_k_experts = 1.*by its probability",
    ),
    "layers of different experts": (
        {"moe": DEEPSPEED | {"num_experts": [4, 2]}},
        r"moe.num_experts = \[4, 2\]",
    ),
    "a least capacity": (
        {"moe": DEEPSPEED | {"eval_capacity_factor": 1.0, "min_capacity": 4}},
        "moe.min_capacity = 4",
    ),
    "an unknown family": (
        {"model_type": "llava", "architectures": ["LlavaMptForCausalLM"]},
        "architectures = 'LlavaMptForCausalLM'",
    ),
}


@pytest.mark.parametrize("option", REFUSED)
def test_what_the_model_does_not_compute_is_refused(option, stock, tmp_path):
    changes, message = REFUSED[option]
    folder = write_original(
        tmp_path, stock(SPARSE)[0], *LAYOUTS["authors, sparse Qwen2"][1:], **changes
    )
    with pytest.raises(ConfigError, match=message):
        hf_models.load(folder)


def test_one_error_names_everything_that_is_refused(stock, tmp_path):
    changes = {
        "hidden_act": "gelu",
        "s2": True,
        "lora": {"lora_enable": True},
        "moe": DEEPSPEED | {"top_k_experts": 1},
    }
    folder = write_original(
        tmp_path, stock(SPARSE)[0], *LAYOUTS["authors, sparse Qwen2"][1:], **changes
    )
    message = "(?s)'hidden_act': 'gelu'.*moe.top_k_experts = 1.*'s2': True.*lora = "
    with pytest.raises(ConfigError, match=message):
        hf_models.load(folder)


def test_the_first_feature_of_siglip_is_a_patch_and_may_not_be_dropped():
    siglip = original.published_tower({"mm_vision_tower": "google/siglip-so400m-patch14-384"})
    with pytest.raises(ConfigError, match="mm_vision_select_feature = 'patch'.*'cls_patch'"):
        original.with_features(siglip, {"mm_vision_select_layer": -2})
    values = {"mm_vision_select_layer": -1, "mm_vision_select_feature": "cls_patch"}
    assert original.with_features(siglip, values).feature_layer == -1


@pytest.mark.parametrize("factor, wanted", [(1.0, 1.0), (1.5, 1.5), (2.0, None), (4, None)])
def test_capacity_is_that_of_inference_and_none_where_nothing_can_be_dropped(
    factor, wanted, stock, tmp_path
):
    """In DeepSpeed an expert takes at most ceil(2 * factor * N / 4) of N tokens here."""
    folder = write_original(
        tmp_path,
        stock(SPARSE)[0],
        *LAYOUTS["authors, sparse Qwen2"][1:],
        moe=DEEPSPEED | {"eval_capacity_factor": factor},
    )
    assert hf_models.load(folder)[0].decoder.moe == MoEConfig(
        layers=(0, 2), num_experts=4, experts_per_token=2, capacity_factor=wanted
    )


def test_a_residual_layer_has_its_shared_expert_and_its_mix(stock, tmp_path):
    """deepspeed/moe/layer.py mixes the two by the softmax of two weights.

    The output is experts * softmax(coefficient)[0] + mlp * softmax(coefficient)[1]. test_moe.py
    tests that ours is the same.
    """
    model, (_, params) = stock(SPARSE)
    folder = write_original(
        tmp_path,
        model,
        *LAYOUTS["authors, sparse Qwen2"][1:],
        moe=DEEPSPEED | {"use_residual": True},
    )
    tensors = torch.load(folder / "pytorch_model.bin", weights_only=True)
    rng = torch.Generator().manual_seed(0)
    shapes = {
        "mlp.gate_proj.weight": (56, 48),
        "mlp.up_proj.weight": (56, 48),
        "mlp.down_proj.weight": (48, 56),
        "coefficient.weight": (2, 48),
        "coefficient.bias": (2,),
    }
    added = {
        f"model.layers.{layer}.mlp.{name}": torch.randn(shape, generator=rng)
        for layer in (0, 2)
        for name, shape in shapes.items()
    }
    torch.save(tensors | added, folder / "pytorch_model.bin")
    config, loaded = hf_models.load(folder)
    assert config.decoder.moe.residual
    assert_equal({name: loaded[name] for name in params}, params)
    # (our name, index in the stack, their name)
    for ours, index, theirs in (
        ("mix.w_d2", 1, "2.mlp.coefficient.weight"),
        ("mix.b_2", 0, "0.mlp.coefficient.bias"),
        ("up.w_df", 0, "0.mlp.mlp.up_proj.weight"),
        ("down.w_fd", 1, "2.mlp.mlp.down_proj.weight"),
        ("gate.w_df", 1, "2.mlp.mlp.gate_proj.weight"),
    ):
        found = loaded[f"language_model.layers.moe.residual.{ours}"][index]
        np.testing.assert_array_equal(found, added[f"model.layers.{theirs}"].numpy().T)
    with pytest.raises(ConfigError, match="moe.residual = True"):
        huggingface.save(tmp_path / "out", config, loaded)
    assert not (tmp_path / "out").exists()


# `.bin`


def as_bin(folder, model, tensors: dict) -> None:
    """Writes a folder of transformers with the weights in a PyTorch file."""
    model.save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    save_bin(tensors, folder)


def in_shards(folder, shards: int) -> None:
    """Splits the PyTorch file of a folder into shards with an index."""
    tensors = torch.load(folder / "pytorch_model.bin", weights_only=True)
    (folder / "pytorch_model.bin").unlink()
    shard_of = {
        name: f"pytorch_model-{n % shards + 1:05d}-of-{shards:05d}.bin"
        for n, name in enumerate(tensors)
    }
    for shard in set(shard_of.values()):
        part = {name: tensors[name] for name in tensors if shard_of[name] == shard}
        torch.save(part, folder / shard)
    index = {"metadata": {}, "weight_map": shard_of}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def test_pytorch_files_of_a_llava_hf_folder(stock, tmp_path):
    model, (wanted, params) = stock(SPARSE)
    as_bin(tmp_path, model, renamed(apart(live_tensors(model)), TO_4X))
    assert hf_models.load(tmp_path)[0] == wanted
    assert_equal(hf_models.load(tmp_path)[1], params)
    in_shards(tmp_path, 3)
    assert_equal(hf_models.load(tmp_path)[1], params)


@pytest.mark.parametrize(
    "kind, wanted",
    [
        (torch.bfloat16, ml_dtypes.bfloat16),
        (torch.float16, np.float16),
        (torch.float32, np.float32),
    ],
)
def test_pytorch_dtypes_arrive_as_they_are_stored(kind, wanted, stock, tmp_path):
    model = stock(QWEN)[0]
    tensors = {
        name: tensor.to(kind)
        for name, tensor in model.state_dict().items()
        if not name.startswith("lm_head")
    }
    as_bin(tmp_path, model, tensors)
    with loading.open_pretrained(tmp_path) as pretrained:
        assert {parameter.dtype for parameter in pretrained.params.values()} == {np.dtype(wanted)}
        embedding = np.asarray(pretrained.params["language_model.embedding.w_vd"])
        assert pretrained.dtype == np.dtype(wanted).name
    assert embedding.dtype == wanted
    np.testing.assert_array_equal(
        embedding.astype(np.float32), tensors["model.language_model.embed_tokens.weight"].float()
    )


def test_views_and_shared_tensors_of_a_pytorch_file_read_right(tmp_path):
    whole = torch.arange(24.0).reshape(4, 6)
    tensors = {
        "turned": whole.T,
        "column": whole[:, 2],
        "part": whole[1:3, 1:4],
        "tied": whole,
        "bfloat16": whole.bfloat16().T,
        "fused": whole.reshape(2, 3, 4).mT,
    }
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    with open_tensors(tmp_path) as opened:
        for name, tensor in tensors.items():
            np.testing.assert_array_equal(opened[name][...].astype(np.float32), tensor.float())
        np.testing.assert_array_equal(opened["fused"][1, slice(1, 3)], tensors["fused"][1, 1:3])


def test_safetensors_are_read_where_both_are_there(stock, tmp_path):
    model, (_, params) = stock(QWEN)
    model.save_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").write_text("not read")
    assert_equal(hf_models.load(tmp_path)[1], params)


def test_without_torch_a_pytorch_file_says_what_to_install(stock, tmp_path, monkeypatch):
    model = stock(QWEN)[0]
    as_bin(tmp_path, model, model.state_dict())
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ConfigError, match=r"not installed.*pip install '\.\[bin\]'"):
        hf_models.load(tmp_path)


# Adaptors alone, and students from parts

# Source -> function that writes it and returns its path.
ADAPTORS = {
    "original LLaVA's file": lambda folder, model: save_adaptor(
        folder / "mm_projector.bin", model, TO_ORIGINAL
    ),
    "original LLaVA's folder": lambda folder, model: (
        save_adaptor(folder / "mm_projector.bin", model, TO_ORIGINAL).parent
    ),
    "the authors' file": lambda folder, model: save_adaptor(
        folder / "any_name.bin", model, TO_AUTHORS
    ),
    "a whole original LLaVA": lambda folder, model: write_original(
        folder, model, *LAYOUTS["original LLaVA"][1:], own_tower=False
    ),
    "a whole llava-hf": lambda folder, model: model.save_pretrained(folder) or folder,
    "an imported folder": lambda folder, model: import_stock(folder, model),
}


def save_adaptor(path, model, spelling):
    """Writes the adaptor of a model to a PyTorch file, and returns its path."""
    tensors = renamed(live_tensors(model), spelling)
    torch.save({name: tensor for name, tensor in tensors.items() if "mm_projector" in name}, path)
    return path


def import_stock(folder, model):
    """Imports a model, and returns the native folder."""
    model.save_pretrained(folder / "stock")
    with loading.open_pretrained(folder / "stock") as pretrained:
        native.save_native(folder / "imported", pretrained)
    return folder / "imported"


@pytest.mark.parametrize("source", ADAPTORS)
def test_an_adaptor_alone(source, stock, tmp_path):
    model, (_, params) = stock(LLAMA)
    with loading.open_adaptor(ADAPTORS[source](tmp_path, model)) as adaptor:
        assert isinstance(adaptor, Adaptor)
        assert_equal(
            read(adaptor), {name: x for name, x in params.items() if name.startswith("adaptor.")}
        )


def test_a_folder_without_an_adaptor(stock, tmp_path):
    hf_models.build(hf_models.qwen2()).save_pretrained(tmp_path / "text")
    with (
        pytest.raises(ConfigError, match="adaptor = .*text"),
        loading.open_adaptor(tmp_path / "text"),
    ):
        pass
    torch.save(
        {
            "model.mm_projector.0.weight": torch.ones(48, 32),
            "model.mm_projector.2.weight": torch.ones(48, 3),
        },
        tmp_path / "mm_projector.bin",
    )
    listed = (
        r"missing .*linear_1.bias; missing .*linear_2.bias; "
        r".*linear_2.weight has the shape \(48, 3\), expected \(48, 48\)"
    )
    with pytest.raises(ConfigError, match=listed), loading.open_adaptor(tmp_path):
        pass


# Name of a tensor that is not the two layers' -> function that adds it to a saved adaptor.
MORE = ("mm_projector.4.weight", "mm_projector.image_spatial_proj.4.bias", "image_newline")


@pytest.mark.parametrize("name", MORE)
@pytest.mark.parametrize("file", ["mm_projector.bin", "pytorch_model.bin"])
def test_an_adaptor_of_more_than_two_layers_is_refused(name, file, stock, tmp_path):
    """Alone and within a whole model, whose other parts are not looked at."""
    model, _ = stock(LLAMA)
    tensors = renamed(live_tensors(model), TO_ORIGINAL)
    if file == "mm_projector.bin":
        tensors = {key: tensor for key, tensor in tensors.items() if "mm_projector" in key}
    torch.save(tensors | {f"model.{name}": torch.ones(48)}, tmp_path / file)
    with (
        pytest.raises(ConfigError, match=rf"differ \(1\): unexpected model.{name}"),
        loading.open_adaptor(tmp_path),
    ):
        pass


def test_token_rows_beside_an_adaptor_are_refused(stock, tmp_path):
    """`mm_use_im_start_end` trains tokens around a picture, which this model does not have."""
    model, _ = stock(LLAMA)
    path = save_adaptor(tmp_path / "mm_projector.bin", model, TO_ORIGINAL)
    torch.save(torch.load(path) | {"model.embed_tokens.weight": torch.ones(101, 48)}, path)
    with (
        pytest.raises(ConfigError, match="unexpected model.embed_tokens.weight"),
        loading.open_adaptor(path),
    ):
        pass


def test_the_adaptor_of_a_lora_is_read_alone(stock, tmp_path):
    """PEFT puts a prefix before the names of what is trained beside a LoRA."""
    model, (_, params) = stock(LLAMA)
    path = save_adaptor(tmp_path / "non_lora_trainables.bin", model, TO_ORIGINAL)
    torch.save({f"base_model.model.{name}": x for name, x in torch.load(path).items()}, path)
    with loading.open_adaptor(tmp_path) as adaptor:
        assert_equal(
            read(adaptor), {name: x for name, x in params.items() if name.startswith("adaptor.")}
        )


# What a LLaVA folder holds -> (files in it, parts of the message).
OF_ANOTHER_KIND = {
    "a first stage": (
        ["config.json", "mm_projector.bin"],
        ["it holds an adaptor alone (mm_projector.bin)", "--adaptor"],
    ),
    "a first stage without its config": (["mm_projector.bin"], ["an adaptor alone", "--adaptor"]),
    "a LoRA": (
        ["config.json", "adapter_config.json", "non_lora_trainables.bin"],
        ["not a LoRA (adapter_config.json)", "non_lora_trainables.bin holds the adaptor alone"],
    ),
    "what a LoRA trained beside it": (
        ["config.json", "non_lora_trainables.bin"],
        ["an adaptor alone (non_lora_trainables.bin)", "--adaptor"],
    ),
}


@pytest.mark.parametrize("kind", OF_ANOTHER_KIND)
def test_a_folder_of_another_kind_says_what_it_holds(kind, tmp_path):
    files, parts = OF_ANOTHER_KIND[kind]
    for name in files:
        (tmp_path / name).write_text('{"model_type": "llava_llama"}')
    with pytest.raises(ConfigError) as error, loading.open_pretrained(tmp_path):
        pass
    assert "\n" not in str(error.value)
    assert all(part in str(error.value) for part in parts), str(error.value)


@pytest.mark.parametrize("alone", [True, False])
def test_an_adaptor_that_zero_3_left_empty_is_named_as_such(alone, stock, tmp_path):
    model, _ = stock(LLAMA)
    if alone:
        folder = save_adaptor(tmp_path / "mm_projector.bin", model, TO_ORIGINAL).parent
        weights = folder / "mm_projector.bin"
    else:
        folder = write_original(tmp_path, model, *LAYOUTS["original LLaVA"][1:])
        weights = folder / "pytorch_model.bin"
    tensors = torch.load(weights)
    empty = {name: torch.ones(0) if "mm_projector" in name else x for name, x in tensors.items()}
    torch.save(empty, weights)
    opened = loading.open_adaptor(folder) if alone else loading.open_pretrained(folder)
    message = r"linear_1.weight has the shape \(0,\).*ZeRO-3.*zero_to_fp32.py"
    with pytest.raises(ConfigError, match=message), opened:
        pass


@pytest.mark.parametrize("with_adaptor", [True, False])
def test_a_student_from_parts(with_adaptor, stock, tmp_path):
    model, (wanted, params) = stock(LLAMA)
    model.model.vision_tower.save_pretrained(tmp_path / "tower")
    text = hf_models.build(hf_models.llama(), seed=3)
    text.save_pretrained(tmp_path / "text")
    tokenizer().save_pretrained(tmp_path / "text")
    save_adaptor(tmp_path / "mm_projector.bin", model, TO_ORIGINAL)
    with (
        loading.open_pretrained(tmp_path / "tower") as tower,
        loading.open_pretrained(tmp_path / "text") as language_model,
        loading.open_adaptor(tmp_path / "mm_projector.bin") as adaptor,
    ):
        made = join(
            tower,
            language_model,
            adaptor if with_adaptor else None,
            0,
            load_tokenizer(tmp_path / "text"),
        )
        assert made.config == wanted
        found = read(made)
        parts = read(tower) | read(language_model)
    assert_equal({name: found[name] for name in parts}, parts)
    same = all(
        np.array_equal(found[name], params[name]) for name in params if name.startswith("adaptor.")
    )
    assert same == with_adaptor and found.keys() == params.keys()
    np.testing.assert_array_equal(
        found["language_model.norm.scale_d"], text.model.norm.weight.detach()
    )


def test_a_recipe_names_such_folders(stock, tmp_path):
    """A whole model, imported or not, or parts with an adaptor."""
    model, (_, params) = stock(SPARSE)
    (tmp_path / "authors").mkdir()
    folder = write_original(tmp_path / "authors", model, *LAYOUTS["authors, sparse Qwen2"][1:])
    with loading.open_pretrained(folder) as pretrained:
        native.save_native(tmp_path / "imported", pretrained)
    for whole in (folder, tmp_path / "imported"):
        source = ModelSource(folder=str(whole))
        found = load_model(source, load_tokenizer(whole), "bfloat16", "dots")
        assert_equal(found.params, params)
        assert found.config.dtype == "bfloat16"
        assert found.config.remat == "dots"
        assert found.origin == str(whole)
    hf_models.build(hf_models.llama()).save_pretrained(tmp_path / "text")
    tokenizer().save_pretrained(tmp_path / "text")
    parts = ModelSource(
        language_model=str(tmp_path / "text"),
        vision_tower=str(folder / "tower"),
        adaptor=str(folder),
    )
    text_tokenizer = load_tokenizer(tmp_path / "text")
    student = load_model(parts, text_tokenizer, "float32", "none")
    adaptor = {name: x for name, x in params.items() if name.startswith("adaptor.")}
    assert_equal({name: student.params[name] for name in adaptor}, adaptor)
    message = "folder = .*It holds a language model. In a recipe, name it as `language_model`"
    with pytest.raises(ConfigError, match=message):
        load_model(ModelSource(folder=str(tmp_path / "text")), text_tokenizer, "float32", "none")


# Families of language models alone


@pytest.mark.parametrize("family", ["mistral", "qwen3_moe"])
def test_a_family_comes_in_and_goes_out(family, tmp_path):
    """Mistral is written as a llama, which has the same numbers under the same names."""
    hf_models.build(getattr(hf_models, family)()).save_pretrained(tmp_path / "theirs")
    config, params = hf_models.load(tmp_path / "theirs")
    huggingface.save(tmp_path / "ours", config, params)
    again, loaded = hf_models.load(tmp_path / "ours")
    assert again == config
    assert_equal(loaded, params)
    values = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert values["model_type"] == {"mistral": "llama", "qwen3_moe": "qwen3_moe"}[family]
    with open_tensors(tmp_path / "ours") as ours:
        assert not [name for name in ours if "shared_expert" in name]
        assert ours.keys() == names.canonical(ours, "language_model").keys()
