"""The command, with eight CPU devices in the place of accelerators that are not here."""

import dataclasses
import json
import multiprocessing
import os
import pathlib
import runpy
import sys

import jax
import pytest
from absl import flags
from absl.testing import flagsaver
from rich.console import Console
from small import DECODER, IDS, TEACHER, VISION

from mod_jax import rehearse
from mod_jax.command_line import parse, read_recipe
from mod_jax.config import ConfigError, MeshConfig, RecipeConfig, from_dict
from mod_jax.rehearsal import apart, search, topology
from mod_jax.rehearsal.candidates import Candidate
from mod_jax.rehearsal.hardware import hardware
from mod_jax.rehearsal.recipe import planned
from mod_jax.rehearsal.stage import CompilerFailed
from mod_jax.rehearsal.stage import rehearse as rehearse_stage
from mod_jax.sharding import make_mesh

RECIPE = f"""
import dataclasses
from mod_jax.config import DecoderConfig, ModelConfig, RecipeConfig, VisionConfig, complete

def get_config():
    vision = VisionConfig(**{VISION.__dict__})
    student = ModelConfig(vision, DecoderConfig(**{DECODER}), **{IDS})
    teacher = ModelConfig(vision, DecoderConfig(**{TEACHER.decoder.__dict__}), **{IDS})
    source = {{"kind": "scenes", "path": "data", "split": "train"}}
    data = {{"sources": (source,), "sequence_length": 32, "images_per_row": 2}}
    stages = {{
        "adaptor": {{
            "trains": ("adaptor.*",), "objective": {{}}, "data": data, "steps": 10, "rows": 16
        }},
        "mimic": {{
            "trains": ("language_model.layers.m*", "adaptor.*"), "objective": {{"kind": "mimic"}},
            "starts_from": "adaptor", "upcycle": {{}}, "data": data, "steps": 3600, "rows": 16,
        }},
    }}
    return complete(RecipeConfig, {{
        "name": "small", "tokenizer": "none", "order": ("adaptor", "mimic"), "stages": stages,
        "student": {{"random": dataclasses.asdict(student)}},
        "teacher": {{"random": dataclasses.asdict(teacher)}},
    }})
"""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """The step of the stage mimic, compiled for eight CPU devices."""
    path = tmp_path_factory.mktemp("recipe") / "recipe.py"
    path.write_text(RECIPE)
    recipe = from_dict(RecipeConfig, runpy.run_path(str(path))["get_config"]().to_dict())
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, expert=2, tensor=2))
    return rehearse_stage(planned(recipe, "mimic"), mesh, hardware("v5e-4"))


@pytest.fixture
def command(tmp_path, monkeypatch, compiled):
    """Runs the command with arguments; returns its exit code. Every step is the compiled one."""
    (tmp_path / "recipe.py").write_text(RECIPE)
    monkeypatch.setattr(topology, "prepare", lambda: None)
    here = topology.devices
    monkeypatch.setattr(
        topology, "devices", lambda name, slices=1: jax.devices() if slices == 1 else here(name, 2)
    )
    monkeypatch.setattr(
        rehearse, "rehearse_apart", lambda plan, *_: dataclasses.replace(compiled, plan=plan)
    )

    def run(*arguments):
        read(tmp_path, monkeypatch, *arguments)
        with pytest.raises(SystemExit) as stop:
            rehearse.main([])
        return stop.value.code

    with flagsaver.flagsaver():
        yield run
    forget_overrides()


def read(folder, monkeypatch, *arguments):
    line = ["rehearse", f"--config={folder}/recipe.py", *arguments]
    monkeypatch.setattr(sys, "argv", line)  # where ml_collections looks for overrides
    parse(line)


def forget_overrides():
    for name in [name for name in flags.FLAGS if name.startswith("config.")]:
        delattr(flags.FLAGS, name)


def test_what_the_compiled_step_says(compiled):
    assert sum(compiled.memory.parts.values()) == compiled.memory.needed
    # 2 moments of each weight that trains, and the two counters of optax
    parts = compiled.memory.parts
    assert parts["optimizer"] == 2 * parts["weights that train"] + 2 * 4
    assert parts["batch"] > 0 and parts["activations and temporaries"] > 0
    costs = compiled.costs
    # 3 products of 48 x 64 in 2 layers, 16 rows of 32 positions, on 8 devices
    assert costs.flops["teacher mlp"] == 2 * 16 * 32 * 3 * 48 * 64 * 2 / 8
    assert sum(costs.sent("axes").values()) == pytest.approx(sum(costs.sent("kind").values()))
    assert sum(costs.sent("module").values()) == pytest.approx(sum(costs.sent("kind").values()))
    assert costs.sent("axes")["expert"] > 0
    assert costs.sent("module")["student experts"] > 0
    assert "unnamed" not in costs.sent("module")


def test_a_recipe_is_rehearsed(command, compiled, tmp_path, capsys):
    output = tmp_path / "found.json"
    code = command(
        "--topology=v5e-4", "--mesh=1,2,2,2", "--price=2", f"--output={output}",
        "--config.stages.mimic.accumulation=2",
    )  # fmt: skip
    printed = capsys.readouterr().out
    assert code == 0
    needed = compiled.memory.needed
    assert printed.splitlines()[-1] == f"fits: {needed / 2**30:.2f} of 15.75 GiB a chip"
    found = json.loads(output.read_text())
    assert found["mesh"] == {"data": 1, "fsdp": 2, "expert": 2, "tensor": 2}
    assert [stage["stage"] for stage in found["stages"]] == ["adaptor", "mimic"]
    mimic = found["stages"][1]
    assert (mimic["accumulation"], mimic["memory"]["needed"]) == (2, needed)
    assert mimic["sent"]["axes"] == compiled.costs.sent("axes")
    time = mimic["time"]
    assert time["step"] == max(time["seconds"].values())
    assert time["tokens_a_second"] == 16 * 32 / time["step"]
    assert time["chip_hours"] == pytest.approx(time["step"] * 8)  # 3600 steps, 8 chips
    assert time["cost"] == 2 * time["chip_hours"]
    assert found["total"]["chip_hours"] == sum(s["time"]["chip_hours"] for s in found["stages"])


def test_what_does_not_fit_is_the_exit_code(command, capsys, monkeypatch):
    tiny = hardware("v5e-4")._replace(memory=2**16)
    monkeypatch.setattr(rehearse, "hardware", lambda name: tiny)
    assert command("--topology=v5e-4", "--mesh=8,1,1,1", "--stage=adaptor") == 1
    assert capsys.readouterr().out.splitlines()[-1].startswith("does not fit: 0.0")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--topology=v9-8"], r"--topology = 'v9-8': expected one of v5e-4, v5e-16"),
        (["--topology=v5e-4", "--stage=x"], r"--stage = 'x': expected one of \('adaptor', 'mimic"),
        (["--topology=v5e-4", "--mesh=1,2"], r"--mesh = '1,2': expected 4 numbers, for data, fsdp"),
        (["--topology=v5e-4", "--mesh=1,3,1,1"], r"mesh = .*expected sizes with the product 8"),
        (["--topology=v5e-4", "--mesh=8,1,1,1", "--rows=12"], r"stage adaptor: rows / accumulati"),
        (["--topology=v5e-4", "--write=x"], r"--write = 'x': expected --search beside it"),
        (["--topology=h100-8", "--slices=2"], r"slices = 2: expected 1, as h100-8 is one host"),
        (["--topology=v5e-4", "--slices=0"], r"--slices = 0: expected at least 1"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_compiled(
    command, tmp_path, monkeypatch, arguments, message
):
    read(tmp_path, monkeypatch, *arguments)
    with pytest.raises(ConfigError, match=message) as error:
        rehearse.main([])
    assert "\n" not in str(error.value)


def test_a_search_writes_flags_that_every_command_reads(command, tmp_path, capsys, monkeypatch):
    file = tmp_path / "mesh.flags"
    code = command(
        "--topology=v5e-4", "--stage=mimic", "--search", "--candidates=2", f"--write={file}"
    )
    assert code == 0
    printed = capsys.readouterr().out
    forget_overrides()
    read(tmp_path, monkeypatch, "--topology=v5e-4", f"--flagfile={file}")
    config = read_recipe()
    sizes = config.mesh
    assert sizes.data * sizes.fsdp * sizes.expert * sizes.tensor == 8
    assert config.remat in ("full", "dots", "none")
    for line in file.read_text().splitlines()[1:]:
        assert line in printed


def abort(*arguments):
    pathlib.Path(arguments[-1]).write_text("a line\nF1 emitter.cc:676] Check failed: a >= 2\nmore")
    os._exit(134)


def test_a_compiler_that_aborts_is_one_line(monkeypatch):
    monkeypatch.setattr(apart, "_run", abort)
    fork = multiprocessing.get_context("fork")  # the function above is known there
    monkeypatch.setattr(multiprocessing, "get_context", lambda _: fork)
    with pytest.raises(CompilerFailed, match=r"^the compiler aborted: F1 .*Check failed: a >= 2$"):
        apart.rehearse_apart(None, MeshConfig(), "v5e-4")


def test_a_candidate_that_fails_is_no_winner(compiled, capsys):
    device = hardware("v5e-4")
    small, wide = (Candidate(MeshConfig(data=data), 1, "full", 0.0, 0.0) for data in (4, 8))

    def run(candidate):
        if candidate == small:
            raise CompilerFailed("the compiler aborted: Check failed")
        return compiled

    console = Console(width=120)
    tried = search.try_all([small, wide], run, device, console)
    assert [one.candidate for one in tried] == [wide, small]
    search.print_tried(tried, device, console)
    printed = capsys.readouterr().out
    assert "the compiler aborted: Check failed" in printed and "refused" in printed
