"""Models of every family in every layout compute what transformers computes.

`families` defines and measures these cases, and writes them into docs/checkpoints.md. Exporting
what was imported gives the same tensors, and importing what was exported the same parameters.
"""

import copy
import dataclasses

import families
import hf_models
import jax
import numpy as np
import pytest
import torch
from layouts import LAYOUTS
from orbax.checkpoint import v1 as ocp
from safetensors.torch import load_file
from stock.check import TOLERANCE

from mod_jax import convert
from mod_jax.config import MoEConfig
from mod_jax.interop.native import open_native
from mod_jax.models import llava
from mod_jax.sharding import make_mesh, parameter_shardings

pytestmark = [
    pytest.mark.filterwarnings("ignore:Initializing zero-element tensors"),
]

MESH = "data=1,fsdp=2,expert=2,tensor=2"


@pytest.mark.parametrize("model, folder", families.CASES)
def test_logits_and_greedy_answers_are_those_of_transformers(model, folder, tmp_path):
    """With and without pictures, alone and in batches padded on either side; 32 tokens each."""
    found = families.CASES[model, folder](tmp_path)
    assert max(found.alone, found.left, found.right) <= TOLERANCE, found
    assert found.same == 1, found


def command(*arguments) -> None:
    """Runs `python -m mod_jax.convert` with these arguments, in this process."""
    options = convert.parser().parse_args([str(argument) for argument in arguments])
    options.run(options)


def stored(folder) -> dict[str, torch.Tensor]:
    """The tensors of a folder's files."""
    return {
        name: tensor
        for path in folder.glob("*.safetensors")
        for name, tensor in load_file(path).items()
    }


# dtype of a sparse model -> (options of its import, options of its export)
OPTIONS = {
    "float32": ([], []),
    "bfloat16": ([f"--mesh={MESH}"], []),
    "float16": ([], ["--shard-gb=1e-4"]),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """For each dtype, "theirs" with the tensor names of transformers 4.x, and "ours", imported."""
    root = tmp_path_factory.mktemp("folders")
    checkpoint = families.checkpoint_of("CLIP + Qwen2-MoE")
    for dtype, (import_options, _) in OPTIONS.items():
        theirs = root / dtype / "theirs"
        theirs.mkdir(parents=True)
        model = copy.deepcopy(checkpoint.model).to(getattr(torch, dtype))
        LAYOUTS["llava-hf, names of 4.x"](dataclasses.replace(checkpoint, model=model), theirs)
        command("import", theirs, root / dtype / "ours", *import_options)
    return root


@pytest.mark.parametrize("dtype", OPTIONS)
def test_what_is_imported_is_exported_with_the_same_tensors_bitwise(dtype, folders, tmp_path):
    """Imported on one device and on eight; exported in one file and in shards.

    The export also has the gates of the shared experts, which qwen2_moe needs even at size 0.
    """
    _, export_options = OPTIONS[dtype]
    command("export", folders / dtype / "ours", tmp_path / "theirs", *export_options)
    found, wanted = stored(tmp_path / "theirs"), stored(folders / dtype / "theirs")
    in_shards = len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1
    assert in_shards == bool(export_options)
    gates = {name for name in found if name.endswith(".shared_expert_gate.weight")}
    assert found.keys() - wanted.keys() == gates
    for name, tensor in wanted.items():
        assert tensor.dtype == getattr(torch, dtype), name
        assert torch.equal(found[name], tensor), name
    assert hf_models.load(tmp_path / "theirs")[0] == hf_models.load(folders / dtype / "theirs")[0]


def test_what_is_exported_in_float32_is_imported_with_the_same_numbers_bitwise(tmp_path):
    families.student_of("CLIP + sparse Qwen2", tmp_path / "ours")
    command("export", tmp_path / "ours", tmp_path / "theirs")
    command("import", tmp_path / "theirs", tmp_path / "again")
    with open_native(tmp_path / "ours") as wanted, open_native(tmp_path / "again") as found:
        # config.json lists the sparse layers by number
        numbered = MoEConfig(layers=wanted.config.decoder.sparse_layers)
        decoder = dataclasses.replace(wanted.config.decoder, moe=numbered)
        assert found.config == dataclasses.replace(wanted.config, decoder=decoder)
        assert found.params.keys() == wanted.params.keys() and found.dtype == "float32"
        for name in wanted.params:
            np.testing.assert_array_equal(
                np.asarray(found.params[name]), np.asarray(wanted.params[name]), err_msg=name
            )


def test_what_is_imported_onto_a_mesh_is_restored_there_sharded_and_bitwise(folders):
    theirs, ours = folders / "bfloat16" / "theirs", folders / "bfloat16" / "ours" / "params"
    config, wanted = hf_models.load(theirs)
    saved = ocp.metadata(ours).metadata
    shardings = parameter_shardings(make_mesh(convert.mesh_sizes(MESH)), saved, llava.axes(config))
    assert all(sharding.num_devices == 8 for sharding in shardings.values())
    assert not all(sharding.is_fully_replicated for sharding in shardings.values())
    abstract = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=shardings[name])
        for name, x in saved.items()
    }
    restored = ocp.load(ours, abstract)
    assert restored.keys() == wanted.keys()
    for name, array in restored.items():
        assert array.sharding == shardings[name] and array.dtype == jax.numpy.bfloat16
        np.testing.assert_array_equal(np.asarray(array, np.float32), wanted[name], err_msg=name)
