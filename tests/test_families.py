"""Every family and every layout computes what transformers computes; what comes in goes out as it was, and what goes out comes back.

What is measured, and on what, is in `families`, which also writes it into docs/checkpoints.md.
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
    pytest.mark.usefixtures("quick_compilation"),
    pytest.mark.filterwarnings("ignore:Initializing zero-element tensors"),
]

MESH = "data=1,fsdp=2,expert=2,tensor=2"


@pytest.mark.parametrize("model, folder", families.CASES)
def test_logits_and_greedy_answers_are_those_of_transformers(model, folder, tmp_path):
    """With pictures at several places and without, alone and in batches padded on either side; 32 tokens of an answer to each."""
    found = families.CASES[model, folder](tmp_path)
    assert max(found.alone, found.left, found.right) <= TOLERANCE, found
    assert found.same == 1, found


def command(*arguments) -> None:
    """mod_jax.convert."""
    options = convert.parser().parse_args([str(argument) for argument in arguments])
    options.run(options)


def stored(folder) -> dict[str, torch.Tensor]:
    """The tensors of a folder's files."""
    return {
        name: tensor
        for path in folder.glob("*.safetensors")
        for name, tensor in load_file(path).items()
    }


# How a sparse model comes in and goes out: dtype -> (options of import, of export)
WAYS = {
    "float32": ([], []),
    "bfloat16": ([f"--mesh={MESH}"], []),
    "float16": ([], ["--shard-gb=1e-4"]),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Of each dtype: "theirs", in the names of 4.x, and "ours", imported."""
    whole, checkpoint = tmp_path_factory.mktemp("whole"), families.checkpoint_of("CLIP + Qwen2-MoE")
    for dtype, (how, _) in WAYS.items():
        theirs = whole / dtype / "theirs"
        theirs.mkdir(parents=True)
        LAYOUTS["llava-hf, names of 4.x"](
            dataclasses.replace(
                checkpoint, model=copy.deepcopy(checkpoint.model).to(getattr(torch, dtype))
            ),
            theirs,
        )
        command("import", theirs, whole / dtype / "ours", *how)
    return whole


@pytest.mark.parametrize("dtype", WAYS)
def test_what_is_imported_is_exported_with_the_same_tensors_bitwise(dtype, folders, tmp_path):
    """From one device and from eight, in one file and in shards. Beside them are the gates of shared experts, that qwen2_moe has of size zero too."""
    command("export", folders / dtype / "ours", tmp_path / "theirs", *WAYS[dtype][1])
    found, wanted = stored(tmp_path / "theirs"), stored(folders / dtype / "theirs")
    assert (len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1) == bool(WAYS[dtype][1])
    assert found.keys() - wanted.keys() == {
        name for name in found if name.endswith(".shared_expert_gate.weight")
    }
    assert all(
        tensor.dtype == getattr(torch, dtype) and torch.equal(found[name], tensor)
        for name, tensor in wanted.items()
    )
    assert hf_models.load(tmp_path / "theirs")[0] == hf_models.load(folders / dtype / "theirs")[0]


def test_what_is_exported_in_float32_is_imported_with_the_same_numbers_bitwise(tmp_path):
    families.student_of("CLIP + sparse Qwen2", tmp_path / "ours")
    command("export", tmp_path / "ours", tmp_path / "theirs")
    command("import", tmp_path / "theirs", tmp_path / "again")
    with open_native(tmp_path / "ours") as wanted, open_native(tmp_path / "again") as found:
        numbered = MoEConfig(
            layers=wanted.config.decoder.sparse_layers
        )  # as config.json names them
        assert found.config == dataclasses.replace(
            wanted.config, decoder=dataclasses.replace(wanted.config.decoder, moe=numbered)
        )
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
    assert all(sharding.num_devices == 8 for sharding in shardings.values()) and not all(
        sharding.is_fully_replicated for sharding in shardings.values()
    )
    restored = ocp.load(
        ours,
        {
            name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=shardings[name])
            for name, x in saved.items()
        },
    )
    assert restored.keys() == wanted.keys()
    for name, array in restored.items():
        assert array.sharding == shardings[name] and array.dtype == jax.numpy.bfloat16
        np.testing.assert_array_equal(np.asarray(array, np.float32), wanted[name], err_msg=name)
