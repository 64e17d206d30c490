"""Native folders are written completely or not at all, in the original dtype, and read bitwise.

Parameters are sharded as on the mesh that they are written on.
"""

import dataclasses
import json
import pathlib
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp
from small import DENSE, SPARSE, params_of

from mod_jax.config import ConfigError, MeshConfig
from mod_jax.interop import native
from mod_jax.interop.native import open_native, place, save_native
from mod_jax.interop.pretrained import Adaptor, InMemory, Pretrained, join, read, with_vocabulary
from mod_jax.models import llava
from mod_jax.sharding import make_mesh, parameter_shardings


def pretrained(config, dtype=np.float32, folder=pathlib.Path("nowhere")) -> Pretrained:
    """A model in memory."""
    params = {name: InMemory(x.astype(dtype)) for name, x in params_of(config).items()}
    return Pretrained(config, params, "somewhere", folder)


def assert_same(found: Pretrained, wanted: Pretrained) -> None:
    assert found.config == wanted.config and found.params.keys() == wanted.params.keys()
    for name, parameter in wanted.params.items():
        assert found.params[name].dtype == parameter.dtype, name
        assert found.params[name].shape == parameter.shape, name
        np.testing.assert_array_equal(
            np.asarray(found.params[name]), np.asarray(parameter), err_msg=name
        )


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
def test_numbers_come_back_bitwise_in_the_dtype_they_came_in(dtype, tmp_path):
    wanted = pretrained(SPARSE, dtype)
    save_native(tmp_path / "model", wanted)
    with open_native(tmp_path / "model") as found:
        assert_same(found, wanted)
        assert found.dtype == str(np.dtype(dtype)) and found.origin == "somewhere"
        assert {x.dtype for x in read(found).values()} == {np.dtype(np.float32)}


@pytest.mark.parametrize(
    "part, prefix", [("vision", "vision_tower."), ("decoder", "language_model.")]
)
def test_a_part_of_a_model_is_written_alone(part, prefix, tmp_path):
    whole = pretrained(SPARSE)
    params = {name: x for name, x in whole.params.items() if name.startswith(prefix)}
    wanted = dataclasses.replace(whole, config=getattr(SPARSE, part), params=params)
    save_native(tmp_path / "part", wanted)
    with open_native(tmp_path / "part") as found:
        assert_same(found, wanted)


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshConfig(data=1, fsdp=2, expert=2, tensor=2))


def test_on_a_mesh_each_parameter_is_cut_as_it_lies_there(mesh, tmp_path):
    wanted = pretrained(SPARSE, ml_dtypes.bfloat16)
    save_native(tmp_path / "model", wanted, mesh)
    with open_native(tmp_path / "model") as found:
        assert_same(found, wanted)
    stored = ocp.metadata(tmp_path / "model" / "params").metadata
    shardings = parameter_shardings(mesh, wanted.params, llava.axes(SPARSE))
    for name, array in stored.items():
        shard = shardings[name].shard_shape(array.shape)
        chunk = array.storage_metadata.chunk_shape
        assert all(size % step == 0 for size, step in zip(shard, chunk)), name
    gates = "language_model.layers.moe.experts.gate.w_edf"
    assert stored[gates].storage_metadata.chunk_shape < stored[gates].shape
    targets = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=shardings[name])
        for name, x in stored.items()
    }
    restored = ocp.load(tmp_path / "model" / "params", targets)
    for name, array in restored.items():
        assert array.sharding == shardings[name]
        np.testing.assert_array_equal(array, np.asarray(wanted.params[name]), err_msg=name)


def test_place_gives_every_device_its_block_and_reads_each_once(mesh):
    requests = []

    class Counted(InMemory):
        def blocks(self, indices):
            requests.extend(indices)
            return super().blocks(indices)

    array = np.arange(16 * 6, dtype=np.float32).reshape(16, 6)
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(("fsdp", "expert")))
    placed = place(Counted(array), sharding)
    assert placed.sharding == sharding
    assert len(requests) == 4  # each block is on two of the eight devices
    for shard in placed.addressable_shards:
        np.testing.assert_array_equal(shard.data, array[shard.index])


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    def fails(*_):
        raise OSError("disk full")

    monkeypatch.setattr(native, "_save_params", fails)
    with pytest.raises(OSError, match="disk full"):
        save_native(tmp_path / "model", pretrained(DENSE), make_mesh(MeshConfig()))
    assert not list(tmp_path.iterdir())


def test_a_folder_that_exists_is_left_alone(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="target = .*does not exist yet"):
        save_native(tmp_path / "model", pretrained(DENSE))
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["notes.txt"]


def test_a_failure_in_the_middle_leaves_nothing(tmp_path):
    class Broken(InMemory):
        def blocks(self, indices):
            raise OSError("gone")

    whole = pretrained(DENSE)
    last = list(whole.params)[-1]
    params = {**whole.params, last: Broken(np.asarray(whole.params[last]))}
    with pytest.raises(OSError, match="gone"):
        save_native(tmp_path / "model", dataclasses.replace(whole, params=params))
    assert not list(tmp_path.iterdir())


def test_the_processors_files_come_along(tmp_path):
    (tmp_path / "source").mkdir()
    for name in ("tokenizer.json", "preprocessor_config.json", "pytorch_model.bin"):
        (tmp_path / "source" / name).write_text(name)
    save_native(tmp_path / "model", pretrained(DENSE, folder=tmp_path / "source"))
    assert {path.name for path in (tmp_path / "model").iterdir()} == {
        "model.json",
        "params",
        "tokenizer.json",
        "preprocessor_config.json",
    }


def test_a_folder_of_another_version_is_refused(tmp_path):
    save_native(tmp_path / "model", pretrained(DENSE))
    about = tmp_path / "model" / "model.json"
    about.write_text(json.dumps(json.loads(about.read_text()) | {"format": 99}))
    with (
        pytest.raises(ConfigError, match="format of .* = 99: expected 1"),
        open_native(tmp_path / "model"),
    ):
        pass


def edit_about(folder, change):
    """Rewrites the model.json of a native folder."""
    about = folder / "model.json"
    values = json.loads(about.read_text())
    change(values)
    about.write_text(json.dumps(values))


def change_decoder(**changes):
    """Function that changes the language model in the values of a model.json."""
    return lambda values: values["model"]["config"]["decoder"].update(changes)


# What is wrong with model.json -> (function that changes its values, the message).
NOT_OF_THE_ARRAYS = {
    "fewer layers": (
        change_decoder(num_layers=1),
        r"attention.query.w_dnh has the shape \(2, 32, 4, 8\), expected \(1, 32, 4, 8\)",
    ),
    "an untied head": (
        change_decoder(tie_embeddings=False),
        r"differ \(1\): missing language_model.head.w_vd",
    ),
    "more rows": (change_decoder(vocab_size=96), r"\(80, 32\), expected \(96, 32\)"),
    "another kind": (
        lambda values: values.update(
            model={"kind": "language_model", "config": values["model"]["config"]["decoder"]}
        ),
        "unexpected vision_tower",
    ),
    "a picture token without a row": (
        lambda values: values["model"]["config"].update(image_token_id=80),
        "image_token_id in .*model.json = 80: expected less than 80",
    ),
    "an unknown kind": (
        lambda values: values["model"].update(kind="speech"),
        "model in .*model.json = .*expected an object with a config and a kind of",
    ),
    "no model": (lambda values: values.pop("model"), "model in .* = None: expected an object"),
    "no format": (lambda values: values.pop("format"), "format of .* = None: expected 1"),
}


@pytest.mark.parametrize("fault", NOT_OF_THE_ARRAYS)
def test_a_model_json_that_is_not_of_its_arrays_is_refused(fault, tmp_path):
    change, message = NOT_OF_THE_ARRAYS[fault]
    save_native(tmp_path / "model", pretrained(DENSE))
    edit_about(tmp_path / "model", change)
    with pytest.raises(ConfigError, match=message), open_native(tmp_path / "model"):
        pass


def test_a_broken_native_folder_is_one_line(tmp_path):
    folder = tmp_path / "model"
    save_native(folder, pretrained(DENSE))
    shutil.rmtree(folder / "params")
    with pytest.raises(ConfigError, match="params: expected an Orbax checkpoint") as error:
        open_native(folder).__enter__()
    assert "\n" not in str(error.value)
    (folder / "model.json").write_text("{")
    with pytest.raises(ConfigError, match="model.json is not JSON"), open_native(folder):
        pass


def test_numbers_that_are_not_finite_are_refused(tmp_path):
    model = pretrained(DENSE)
    name = "language_model.norm.scale_d"
    broken = model.params[name].array.copy()
    broken[0] = np.nan
    params = {**model.params, name: InMemory(broken)}
    save_native(tmp_path / "model", dataclasses.replace(model, params=params))
    with (
        open_native(tmp_path / "model") as found,
        pytest.raises(ConfigError, match=f"{name} in .* = nan at 1 of 32 places: expected finite"),
    ):
        read(found)


class Vocabulary:
    """The part of a tokenizer that `with_vocabulary` uses: `size` tokens, the last is <image>."""

    eos_token_id = 2

    def __init__(self, size: int):
        self.size = size

    def get_vocab(self):
        return {str(i): i for i in range(self.size - 1)} | {"<image>": self.size - 1}


def test_rows_that_a_tokenizer_lacks_are_added_as_means_that_never_win():
    untied = dataclasses.replace(
        DENSE, decoder=dataclasses.replace(DENSE.decoder, tie_embeddings=False)
    )
    before = pretrained(untied)
    rows = DENSE.decoder.vocab_size
    after = with_vocabulary(before, Vocabulary(rows + 1))
    assert after.config.decoder.vocab_size == -(-(rows + 1) // 64) * 64
    assert after.config.image_token_id == rows
    assert after.config.end_token_id == 2
    for name in ("language_model.embedding.w_vd", "language_model.head.w_vd"):
        old = np.asarray(before.params[name])
        new = np.asarray(after.params[name])
        assert new.shape == (after.config.decoder.vocab_size, old.shape[1])
        np.testing.assert_array_equal(new[:rows], old)
        mean = np.broadcast_to(old.astype(np.float64).mean(0), new[rows:].shape)
        np.testing.assert_allclose(new[rows:], mean, rtol=1e-5, atol=1e-6)
    hidden = np.random.default_rng(0).normal(size=(100, DENSE.decoder.hidden_size))
    logits = hidden @ np.asarray(after.params["language_model.head.w_vd"]).T
    assert logits.argmax(1).max() < rows


def test_a_vocabulary_that_is_large_enough_stays():
    before = pretrained(DENSE)
    after = with_vocabulary(before, Vocabulary(DENSE.decoder.vocab_size))
    assert after.config.decoder == DENSE.decoder and after.params == before.params


def test_an_end_token_of_the_language_model_without_a_row_is_refused():
    """The tokenizer's own ids have rows by then; those of a generation_config.json may not."""
    before = dataclasses.replace(pretrained(DENSE), end_token_ids=(2, 9999))
    with pytest.raises(ConfigError, match=r"other_end_token_ids in .*9999.*less than"):
        with_vocabulary(before, Vocabulary(DENSE.decoder.vocab_size))


@pytest.mark.parametrize(
    "name, shape",
    [("linear_1.w_io", (8, 32)), ("linear_2.w_io", (32, 48)), ("linear_3.b_o", (32,))],
)
def test_an_adaptor_that_does_not_fit_between_the_parts_is_refused(name, shape):
    model = pretrained(DENSE)

    def part(prefix, config):
        params = {n: x for n, x in model.params.items() if n.startswith(prefix)}
        return Pretrained(config, params, f"the {prefix}", pathlib.Path("nowhere"))

    tower, text = part("vision_tower.", DENSE.vision), part("language_model.", DENSE.decoder)
    fits = Adaptor(dict(part("adaptor.", DENSE).params), "the adaptor")
    vocabulary = Vocabulary(DENSE.decoder.vocab_size)
    assert join(tower, text, fits, 0, vocabulary).params.keys() == model.params.keys()
    wrong = {**fits.params, f"adaptor.{name}": InMemory(np.zeros(shape, np.float32))}
    with pytest.raises(ConfigError, match=f"shapes of the adaptor = .*{name}.*expected"):
        join(tower, text, Adaptor(wrong, "the adaptor"), 0, vocabulary)


def test_a_relative_path_is_a_folder_below_the_current_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    wanted = pretrained(SPARSE)
    save_native("model", wanted)
    with open_native("model") as found:
        assert_same(found, wanted)
    assert (tmp_path / "model").is_dir()
