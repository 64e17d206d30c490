"""The convert command: sources and parts, folders that it writes, and errors on one line.

What the models in the folders compute is tested in test_families.py.
"""

import dataclasses
import json
import shutil

import hf_models
import numpy as np
import pytest
from safetensors.numpy import load_file
from small import SPARSE, params_of
from transformers import GenerationConfig

import mod_jax
from mod_jax import convert
from mod_jax.config import ConfigError, MeshConfig, MoEConfig
from mod_jax.data.samples.tokenizer import scenes_tokenizer
from mod_jax.interop import huggingface, loading
from mod_jax.interop.native import open_native, save_native
from mod_jax.interop.pretrained import InMemory, Pretrained

# A config.json gives the sparse layers by number.
READ = dataclasses.replace(
    SPARSE,
    decoder=dataclasses.replace(SPARSE.decoder, moe=MoEConfig(layers=SPARSE.decoder.sparse_layers)),
)


def run(monkeypatch, *arguments) -> None:
    """Runs the command."""
    monkeypatch.setattr("sys.argv", ["convert", *map(str, arguments)])
    convert.cli()


def error_of(monkeypatch, *arguments) -> str:
    """Runs the command, and returns its error message, which is one line."""
    with pytest.raises(SystemExit) as stopped:
        run(monkeypatch, *arguments)
    # Python prints a string, and exits with code 1.
    assert isinstance(stopped.value.code, str)
    assert "\n" not in stopped.value.code
    return stopped.value.code


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Folder with a vision tower, and a language model with its tokenizer."""
    folder = tmp_path_factory.mktemp("parts")
    hf_models.build(hf_models.clip()).save_pretrained(folder / "tower")
    text = hf_models.qwen2(vocab_size=len(scenes_tokenizer()), eos_token_id=0, pad_token_id=0)
    hf_models.build(text).save_pretrained(folder / "text")
    scenes_tokenizer().save_pretrained(folder / "text")
    return folder


def test_a_student_of_parts_is_imported_and_exported(parts, tmp_path, monkeypatch, capsys):
    options = [f"--language-model={parts / 'text'}", f"--vision-tower={parts / 'tower'}"]
    run(monkeypatch, "import", *options, "--seed=1", tmp_path / "student")
    with open_native(tmp_path / "student") as student:
        config = student.config
        params = {name: np.asarray(x) for name, x in student.params.items()}
    assert (config.image_token_id, config.end_token_id) == (1, 0)
    for part in ("tower", "text"):
        for name, array in hf_models.load(parts / part)[1].items():
            np.testing.assert_array_equal(params[name], array, err_msg=name)
    run(monkeypatch, "export", tmp_path / "student", tmp_path / "theirs")
    again, exported = hf_models.load(tmp_path / "theirs")
    assert again == config
    assert all(np.array_equal(exported[name], params[name]) for name in params)
    assert {
        "config.json",
        "tokenizer.json",
        "preprocessor_config.json",
        "chat_template.jinja",
        "generation_config.json",
        "README.md",
    } <= {path.name for path in (tmp_path / "theirs").iterdir()}
    # The adaptor is that of the exported folder instead of a new one.
    run(monkeypatch, "import", *options, f"--adaptor={tmp_path / 'theirs'}", tmp_path / "same")
    with open_native(tmp_path / "same") as same:
        assert all(np.array_equal(np.asarray(same.params[name]), params[name]) for name in params)
    assert "imported" in capsys.readouterr().out


@pytest.mark.parametrize("part", ["tower", "text"])
def test_a_part_is_imported_and_exported_alone(part, parts, tmp_path, monkeypatch):
    run(monkeypatch, "import", parts / part, tmp_path / "ours")
    run(monkeypatch, "export", tmp_path / "ours", tmp_path / "theirs")
    original = load_file(parts / part / "model.safetensors")
    exported = load_file(tmp_path / "theirs" / "model.safetensors")
    spelled = {
        name if part == "text" or name.startswith("vision_model.") else f"vision_model.{name}": x
        for name, x in original.items()
    }
    assert exported.keys() == spelled.keys()
    assert all(np.array_equal(exported[name], x) for name, x in spelled.items())


def end_tokens_of(folder) -> list:
    """End tokens that stock transformers reads, and those in each config.json."""
    config = json.loads((folder / "config.json").read_text())
    places = [config, config.get("text_config", config)]
    if (folder / "generation_config.json").exists():
        places.append(GenerationConfig.from_pretrained(folder).to_dict())
    return [place["eos_token_id"] for place in places]


def test_all_end_tokens_come_in_and_go_out(parts, tmp_path, monkeypatch):
    """A language model that ends a text at three tokens becomes a student, and is exported."""
    text = shutil.copytree(parts / "text", tmp_path / "text")
    (text / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 0, 9]}))
    run(monkeypatch, "import", text, tmp_path / "ours")
    options = [f"--language-model={tmp_path / 'ours'}", f"--vision-tower={parts / 'tower'}"]
    run(monkeypatch, "import", *options, tmp_path / "student")
    run(monkeypatch, "export", tmp_path / "student", tmp_path / "theirs")
    run(monkeypatch, "import", tmp_path / "theirs", tmp_path / "again")
    for folder in ("student", "theirs", "again"):
        with loading.open_whole(tmp_path / folder) as found:
            assert found.config.end_token_ids == (0, 7, 9)
    assert mod_jax.load(tmp_path / "again").config.end_token_ids == (0, 7, 9)
    assert end_tokens_of(tmp_path / "theirs") == [[0, 7, 9]] * 3


def test_a_language_model_alone_keeps_its_end_tokens(parts, tmp_path, monkeypatch):
    """Also if only config.json names them."""
    text = shutil.copytree(parts / "text", tmp_path / "text")
    (text / "generation_config.json").unlink()
    config = json.loads((text / "config.json").read_text())
    (text / "config.json").write_text(json.dumps(config | {"eos_token_id": [5, 3]}))
    run(monkeypatch, "import", text, tmp_path / "ours")
    run(monkeypatch, "export", tmp_path / "ours", tmp_path / "theirs")
    assert end_tokens_of(tmp_path / "theirs") == [[5, 3]] * 2


@pytest.fixture
def sparse(tmp_path):
    """Hugging Face folder with a sparse model that has the vocabulary of the scenes."""
    folder = tmp_path / "sparse"
    save_tokenizer = scenes_tokenizer().save_pretrained
    huggingface.save(folder, SPARSE, params_of(SPARSE), others=save_tokenizer)
    return folder


def test_dtypes_and_shards_of_an_export(sparse, tmp_path, monkeypatch):
    run(monkeypatch, "export", sparse, tmp_path / "out", "--dtype=bfloat16", "--shard-gb=1e-5")
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    with loading.open_pretrained(tmp_path / "out") as found:
        assert found.dtype == "bfloat16"
        assert found.config == READ
    # The default dtype is the stored one.
    run(monkeypatch, "export", tmp_path / "out", tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_an_import_onto_a_mesh_is_the_same_model(sparse, tmp_path, monkeypatch):
    run(monkeypatch, "import", sparse, tmp_path / "ours", "--mesh=fsdp=2,expert=2,tensor=2")
    with open_native(tmp_path / "ours") as found:
        assert all(
            np.array_equal(np.asarray(found.params[name]), x)
            for name, x in params_of(SPARSE).items()
        )


def test_a_student_with_a_capacity_is_exported_only_if_that_is_exact_or_asked_for(
    tmp_path, monkeypatch
):
    scenes_tokenizer().save_pretrained(tmp_path / "files")
    params = {name: InMemory(x) for name, x in params_of(SPARSE).items()}

    def student(factor):
        decoder = dataclasses.replace(SPARSE.decoder, moe=MoEConfig(capacity_factor=factor))
        config = dataclasses.replace(SPARSE, decoder=decoder)
        folder = tmp_path / f"at {factor}"
        save_native(folder, Pretrained(config, params, "here", tmp_path / "files"))
        return folder

    # With 4 experts, 2 per token, and a factor of 2.0, every expert can take all tokens.
    tight = student(1.5)
    wide = student(2.0)
    assert "capacity_factor" in error_of(monkeypatch, "export", tight, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    run(monkeypatch, "export", tight, tmp_path / "out", "--dropless")
    run(monkeypatch, "export", wide, tmp_path / "wide")
    assert hf_models.load(tmp_path / "out")[0] == hf_models.load(tmp_path / "wide")[0] == READ


def test_errors_are_one_line(parts, sparse, tmp_path, monkeypatch):
    assert "one source and a target" in error_of(monkeypatch, "import", tmp_path / "target")
    assert "--adaptor" in error_of(
        monkeypatch, "import", sparse, tmp_path / "target", f"--adaptor={sparse}"
    )
    assert "--mesh" in error_of(monkeypatch, "import", sparse, tmp_path / "target", "--mesh=rows=2")
    options = [
        f"--language-model={parts / 'tower'}",
        f"--vision-tower={parts / 'tower'}",
        f"--tokenizer={parts / 'text'}",
    ]
    assert "It holds a vision tower" in error_of(
        monkeypatch, "import", *options, tmp_path / "target"
    )
    assert "--stage" in error_of(
        monkeypatch, "export", sparse, tmp_path / "target", "--stage=sparse_mimic"
    )
    assert "config.json" in error_of(monkeypatch, "export", tmp_path, tmp_path / "target")
    assert "template" in error_of(
        monkeypatch, "export", sparse, tmp_path / "target", "--template=morse"
    )
    assert not (tmp_path / "target").exists()


def test_a_tokenizer_with_more_tokens_than_the_embedding_has_rows_is_refused(
    sparse, tmp_path, monkeypatch
):
    """JAX would read the last row for the others, in training and in answers."""
    rows = SPARSE.decoder.vocab_size
    tokenizer = scenes_tokenizer()
    tokenizer.add_tokens([f"more{number}" for number in range(rows + 1 - len(tokenizer))])
    tokenizer.save_pretrained(sparse)
    message = (
        f"= {rows}: expected more embedding rows than the tokenizer's largest id, {rows} ('more"
    )
    for command in ("import", "export"):
        assert message in error_of(monkeypatch, command, sparse, tmp_path / "out")
    with pytest.raises(ConfigError, match="expected more embedding rows"):
        mod_jax.load(sparse)
    assert [path.name for path in tmp_path.iterdir()] == ["sparse"]


def test_mesh_sizes_are_read():
    assert convert.mesh_sizes("fsdp=4,expert=2") == MeshConfig(data=1, fsdp=4, expert=2, tensor=1)
    assert convert.mesh_sizes("data=-1").data == -1
