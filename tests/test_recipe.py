"""Runs a small recipe stage by stage, kills it, continues it, and stops it with bad input."""

import dataclasses
import json
import logging
import os
import pathlib
import random
import shutil
import subprocess
import sys
import time

import hf_models
import jax
import numpy as np
import pytest
from absl.testing import flagsaver
from PIL import Image
from small import DENSE, IMAGE_SIZE, TEACHER, VISION, params_of
from source_files import write_prepared

import mod_jax
from mod_jax import train
from mod_jax.config import ConfigError, MeshConfig, RecipeConfig, from_dict
from mod_jax.data.samples.tokenizer import scenes_tokenizer
from mod_jax.data.scenes.builder import prepare as prepare_scenes
from mod_jax.data.sources.record import Record
from mod_jax.export.folder import export
from mod_jax.interop import huggingface
from mod_jax.interop.model import Model
from mod_jax.recipe import Recipe
from mod_jax.runs import folder as run_folder
from mod_jax.sharding import make_mesh
from mod_jax.storage.lock import locked
from mod_jax.training import loop, step
from mod_jax.training.checkpoint import Checkpoints, abstract
from mod_jax.training.state import TrainState, make_optimizer, new_state, split_trained

ROOT = pathlib.Path(__file__).parents[1]
# What the second stage trains.
EXPERTS = ("language_model.layers.moe.*", "language_model.layers.mlp.*", "adaptor.*")
RECORDS = 12
# Number of the record whose picture file is missing.
BAD = 5

# Models that do not fit the recipe.
FEW_WORDS = dataclasses.replace(DENSE, decoder=dataclasses.replace(DENSE.decoder, vocab_size=64))
SHORT = dataclasses.replace(DENSE, decoder=dataclasses.replace(DENSE.decoder, max_positions=16))
WIDER_TOWER = dataclasses.replace(TEACHER, vision=dataclasses.replace(VISION, intermediate_size=48))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a tokenizer, models, chats and pairs.

    The teachers `teacher` and `another_teacher` have the student's vision tower, `stranger` has
    another one. No picture of bad.json exists.
    """
    folder = tmp_path_factory.mktemp("recipe")
    scenes_tokenizer().save_pretrained(folder / "tokenizer")
    student = params_of(DENSE)
    tower = {name: array for name, array in student.items() if name.startswith("vision_tower.")}
    models = {
        "student": (DENSE, student),
        "teacher": (TEACHER, params_of(TEACHER, 1) | tower),
        "another_teacher": (TEACHER, params_of(TEACHER, 2) | tower),
        "stranger": (TEACHER, params_of(TEACHER, 2)),
        "few_words": (FEW_WORDS, params_of(FEW_WORDS)),
        "short": (SHORT, params_of(SHORT)),
        "wider_tower": (WIDER_TOWER, params_of(WIDER_TOWER)),
        "other_words": (TEACHER, params_of(TEACHER, 1) | tower),
    }
    for name, (config, params) in models.items():
        huggingface.save(folder / name, config, params)
    write_other_words(folder / "tokenizer", folder / "other_words")

    rng = np.random.default_rng(0)
    for number in set(range(RECORDS)) - {BAD}:
        pixels = rng.integers(0, 256, (IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    words = ["red", "ring", "and", "cross"]
    chats = []
    for number in range(RECORDS):
        question = {"from": "human", "value": "<image>\nhow many?"}
        answer = {"from": "gpt", "value": " ".join(words[: 1 + number % 4])}
        record = {"id": f"chat-{number}", "image": f"{number}.png"}
        chats.append(record | {"conversations": [question, answer]})
    without_pictures = [record | {"image": "none.png"} for record in chats]
    (folder / "chats.json").write_text(json.dumps(chats))
    (folder / "bad.json").write_text(json.dumps(without_pictures))
    write_prepared(folder / "pairs", [[Record("p", (), (("Q", "A"),), "B")]])
    return folder


def write_other_words(tokenizer: pathlib.Path, target: pathlib.Path) -> None:
    """Writes a tokenizer to a model's folder in which two words have each other's ids."""
    shutil.copytree(tokenizer, target, dirs_exist_ok=True)
    values = json.loads((target / "tokenizer.json").read_text())
    words = values["model"]["vocab"]
    words["red"], words["cross"] = words["cross"], words["red"]
    (target / "tokenizer.json").write_text(json.dumps(values))


def stage(folder, **changes) -> dict:
    """Configuration of a stage of six steps that trains the adaptor."""
    data = {
        "sources": ({"path": f"{folder}/chats.json", "images": str(folder)},),
        "sequence_length": 32,
        "images_per_row": 2,
        "samples_per_row": 2,
        "template": "brief",
        "look_ahead": 2,
        "max_bad_share": 0.1,
    }
    values = {
        "trains": ("adaptor.*",),
        "objective": {},
        "data": data,
        "steps": 6,
        "rows": 8,
        "checkpoint_every": 2,
        "optimizer": {"lr": 1e-2},
    }
    return values | changes


def recipe(folder) -> dict:
    """Configuration that trains the adaptor, then an upcycled student that mimics the teacher."""
    mimic = {
        "starts_from": "adaptor",
        "upcycle": {"num_experts": 2},
        "trains": EXPERTS,
        "objective": {"kind": "mimic", "next_token_weight": 1.0},
    }
    return {
        "name": "small",
        "tokenizer": f"{folder}/tokenizer",
        "student": {"folder": f"{folder}/student"},
        "teacher": {"folder": f"{folder}/teacher"},
        "stages": {"adaptor": stage(folder), "mimic": stage(folder, **mimic)},
        "order": ("adaptor", "mimic"),
        "log_every": 2,
    }


def changed(values: dict, key: str, value) -> dict:
    """Returns a deep copy in which the nested key, "a.b.c", has another value."""
    copy = json.loads(json.dumps(values))
    *parents, last = key.split(".")
    parent = copy
    for name in parents:
        parent = parent.setdefault(name, {})
    parent[last] = value
    return copy


def in_folder(folder, value):
    """Replaces "{folder}" in the strings of a JSON value by the path of the folder."""
    return json.loads(json.dumps(value).replace("{folder}", str(folder)))


def make_recipe(values: dict, workdir) -> Recipe:
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    return Recipe(from_dict(RecipeConfig, values), workdir, mesh)


def run_stage(values: dict, workdir, name: str) -> Model:
    """Runs one stage on one device."""
    made = make_recipe(values, workdir)
    with jax.set_mesh(made.mesh):
        return made.run(name)


def write_config(workdir, values: dict) -> None:
    """Writes config.json, as the command does before it runs the stages."""
    run_folder.write_config(from_dict(RecipeConfig, values), workdir)


@pytest.fixture(scope="module")
def compilations() -> list[tuple[str, int]]:
    """(stage, batches read before) of every compilation while a stage of `finished` ran."""
    return []


@pytest.fixture(scope="module")
def finished(folder, compilations, tmp_path_factory) -> tuple[pathlib.Path, dict[str, Model]]:
    """A run of both stages without config.json: its folder, and the student after each stage."""
    workdir = tmp_path_factory.mktemp("run")
    made = make_recipe(recipe(folder), workdir)
    batches = [0]

    def count_batches(batch, mesh, to_devices=loop.to_devices):
        batches[0] += 1
        return to_devices(batch, mesh)

    def note(event: str, seconds: float, **_) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compilations.append((name, batches[0]))

    students = {}
    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        with jax.set_mesh(made.mesh), pytest.MonkeyPatch.context() as patch:
            patch.setattr(loop, "to_devices", count_batches)
            for name in made.config.order:
                batches[0] = 0
                students[name] = made.run(name)
    finally:
        jax.monitoring.unregister_event_duration_listener(note)
    return workdir, students


def test_nothing_is_compiled_after_the_second_step(finished, compilations):
    """Whatever the batches hold, shapes and shardings stay; saving compiles nothing either."""
    assert {1} <= {batch for _, batch in compilations}  # the step itself
    assert [(stage, batch) for stage, batch in compilations if batch > 2] == []


@pytest.fixture(scope="module")
def finished_by_command(folder, finished, tmp_path_factory) -> pathlib.Path:
    """The folder of the same run with config.json, from which it can be opened."""
    workdir, _ = finished
    copy = shutil.copytree(workdir, tmp_path_factory.mktemp("command") / "run")
    write_config(copy, recipe(folder))
    return copy


def with_relative_models(values: dict) -> dict:
    """The recipe, with its tokenizer and models in the folder models/ of the current folder."""
    values = changed(values, "tokenizer", "models/tokenizer")
    values = changed(values, "student.folder", "models/student")
    return changed(values, "teacher.folder", "models/teacher")


# How a project is moved: where the project is then, and its run.
MOVES = {
    "not at all": ("project", "project/runs/mine"),
    "as a whole": ("elsewhere/project", "elsewhere/project/runs/mine"),
    "the run alone": ("project", "elsewhere/mine"),
}


@pytest.mark.parametrize("move", MOVES)
def test_a_run_with_relative_paths_loads_from_any_folder_moved_or_not(
    move, folder, finished, tmp_path, monkeypatch
):
    run, students = finished
    project = tmp_path / "project"
    shutil.copytree(folder, project / "models")
    shutil.copytree(run, project / "runs" / "mine")
    monkeypatch.chdir(project)
    config = from_dict(RecipeConfig, with_relative_models(recipe(folder)))
    run_folder.write_config(config, project / "runs" / "mine")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    place, moved_run = (tmp_path / part for part in MOVES[move])
    if place != project:
        shutil.move(project, place)
    elif moved_run != project / "runs" / "mine":
        shutil.move(project / "runs" / "mine", moved_run)
    params = mod_jax.load(moved_run, "adaptor").params
    wanted = students["adaptor"].params
    assert all(np.array_equal(params[name], wanted[name]) for name in wanted)


def test_other_weights_at_the_place_of_a_student_are_refused(
    folder, finished, tmp_path, monkeypatch
):
    """Identity is content: a folder of the same name is not the same model."""
    shutil.copytree(folder, tmp_path / "models")
    shutil.copytree(finished[0], tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    config = from_dict(RecipeConfig, with_relative_models(recipe(folder)))
    run_folder.write_config(config, tmp_path / "run")
    shutil.rmtree(tmp_path / "models" / "student")
    with pytest.raises(ConfigError, match="folder = .*models/student': expected"):
        mod_jax.load("run")
    huggingface.save(tmp_path / "models" / "student", DENSE, params_of(DENSE, 5))
    with pytest.raises(ConfigError, match=r"student.checksum: was '\w+.*, is '"):
        mod_jax.load("run", "adaptor")


@pytest.fixture
def nothing_compiled(monkeypatch):
    """Fails the test if a train step is traced."""

    def train_step(*args):
        raise AssertionError("a train step was traced")

    monkeypatch.setattr(step, "train_step", train_step)


def checkpoints_of(workdir, name: str) -> Checkpoints:
    return Checkpoints(workdir / "stages" / name / "checkpoints", 2)


def rows_of(workdir, name: str) -> list[dict]:
    """Returns the metrics of a stage, a dict for each row."""
    text = (workdir / "stages" / name / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def moved(before: dict, after: dict) -> set[str]:
    """Returns the names of the parameters of `before` whose values differ in `after`."""
    return {name for name in before if (np.asarray(after[name]) != np.asarray(before[name])).any()}


def final_state(made: Recipe, name: str) -> TrainState:
    """Returns parameters and optimizer state of the last checkpoint of a finished stage."""
    config = made.config.stages[name]
    before = made.student_before(name).params
    optimizer = make_optimizer(config.optimizer, config.steps)
    trained, _ = split_trained(before, config.trains)
    shapes = jax.eval_shape(
        lambda params: new_state(params, optimizer),
        {parameter: before[parameter] for parameter in trained},
    )
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shardings = jax.tree.map(lambda _: device, shapes)
    saved = checkpoints_of(made.workdir, name)
    state = saved.restore(config.steps, abstract(shapes, shardings), None)
    saved.close()
    return jax.tree.map(np.asarray, state)


def test_stages_follow_each_other(folder, finished):
    """The second stage begins with the first one's student, upcycled.

    Each stage changes what it trains and nothing else.
    """
    workdir, students = finished
    adaptor = students["adaptor"]
    mimic = students["mimic"]
    start = params_of(DENSE)
    before = make_recipe(recipe(folder), workdir).student_before("mimic")

    assert moved(start, adaptor.params) == {name for name in start if name.startswith("adaptor.")}
    assert before.config == mimic.config
    assert mimic.config.decoder.moe.num_experts == 2

    def is_trained(name: str) -> bool:
        is_dense = ".mlp." in name and "vision" not in name
        return is_dense or ".moe." in name or name.startswith("adaptor.")

    assert mimic.params.keys() == before.params.keys()
    assert moved(before.params, mimic.params) == {
        name for name in before.params if is_trained(name)
    }
    for name in start:
        if name.startswith(("adaptor.", "vision_tower.")):
            assert np.array_equal(before.params[name], adaptor.params[name])


def test_metrics_are_logged_and_learning_shows(finished):
    workdir, _ = finished
    for name in ("adaptor", "mimic"):
        rows = rows_of(workdir, name)
        assert [row["step"] for row in rows] == [2, 4, 6]
        assert rows[-1]["loss"] < rows[0]["loss"]
        assert all(np.isfinite(value) for row in rows for value in row.values())
    mimic = rows_of(workdir, "mimic")[0]
    assert {"kl", "next_token", "balance", "gradient_norm", "lr", "padding"} <= mimic.keys()


def test_the_last_two_checkpoints_stay(finished):
    workdir, _ = finished
    for name in ("adaptor", "mimic"):
        paths = (workdir / "stages" / name / "checkpoints").iterdir()
        assert sorted(path.name for path in paths if path.name.isdigit()) == ["4", "6"]


def test_a_bad_sample_is_skipped_counted_and_named(
    folder, finished, tmp_path, caplog, nothing_compiled
):
    """The checkpoint and the metrics count it, the log names it, and the others are read."""
    workdir, _ = finished
    checkpoint = workdir / "stages" / "adaptor" / "checkpoints" / "6"
    streams = json.loads((checkpoint / "data" / "process_0.json").read_text())
    counts = [source for stream in streams.values() for source in stream["counts"]]
    assert sum(source["bad"] for source in counts) == 1
    assert sum(source["seen"] for source in counts) == RECORDS
    assert rows_of(workdir, "adaptor")[-1]["skipped"] == 1
    with caplog.at_level(logging.WARNING), pytest.raises(AssertionError, match="traced"):
        run_stage(recipe(folder), tmp_path, "adaptor")
    assert f"skipped record {BAD} (chat-{BAD}): no such picture file" in caplog.text


def test_a_finished_stage_is_not_run_again(folder, finished, nothing_compiled):
    workdir, students = finished
    for name, student in students.items():
        again = run_stage(recipe(folder), workdir, name)
        assert again.config == student.config
        jax.tree.map(np.testing.assert_array_equal, again.params, student.params)


def test_a_stage_alone_needs_what_it_starts_from(folder, tmp_path, nothing_compiled):
    message = (
        r"stage adaptor = 'step None': expected a checkpoint of its last step 6 under "
        r".*/stages/adaptor.*Run it first"
    )
    with pytest.raises(ConfigError, match=message):
        run_stage(recipe(folder), tmp_path, "mimic")


def test_stages_alone_one_by_one_are_the_whole_recipe(folder, finished, tmp_path):
    _, students = finished
    for name in ("adaptor", "mimic"):
        found = run_stage(recipe(folder), tmp_path, name)
        jax.tree.map(np.testing.assert_array_equal, found.params, students[name].params)


@pytest.mark.parametrize(
    "name, key, value, message",
    [
        (
            "mimic",
            "stages.mimic.optimizer.lr",
            1e-3,
            r"config\.optimizer\.lr: was 0\.01, is 0\.001$",
        ),
        (
            "mimic",
            "stages.mimic.objective.next_token_weight",
            0.5,
            r"config\.objective\.next_token_weight: was 1\.0, is 0\.5$",
        ),
        ("mimic", "stages.mimic.data.seed", 1, r"config\.data\.seed: was 0, is 1$"),
        (
            "mimic",
            "teacher.folder",
            "{folder}/another_teacher",
            r"teacher\.checksum: was '\w+', is '\w+'$",
        ),
        ("adaptor", "dtype", "bfloat16", r"student\.config\.dtype: was 'float32', is 'bfloat16'"),
        (
            "adaptor",
            "student.folder",
            "{folder}/teacher",
            r"student\.config\.decoder\.hidden_size: was 32, is 48",
        ),
    ],
)
def test_going_on_with_another_configuration_or_model_is_refused(
    folder, finished, nothing_compiled, name, key, value, message
):
    """The error names each difference, with its old and its new value."""
    workdir, _ = finished
    values = changed(recipe(folder), key, in_folder(folder, value))
    refusal = r"was made with other settings, models or data; .* again with --redo=(\w+): .*"
    with pytest.raises(ConfigError, match=refusal + message):
        run_stage(values, workdir, name)


def test_going_on_with_a_source_that_grew_is_refused(folder, finished, nothing_compiled):
    workdir, _ = finished
    values = recipe(folder)
    path = pathlib.Path(values["stages"]["mimic"]["data"]["sources"][0]["path"])
    before = path.read_bytes()
    entries = json.loads(before)
    message = rf"data\.0\.records: was {len(entries)}, is {len(entries) + 1}"
    try:
        path.write_text(json.dumps([*entries, entries[0]]))
        with pytest.raises(ConfigError, match=message):
            run_stage(values, workdir, "mimic")
    finally:
        path.write_bytes(before)


def test_a_run_that_another_process_works_in_is_refused(folder, tmp_path, nothing_compiled):
    with locked(tmp_path):
        assert_stops(recipe(folder), tmp_path, "expected a folder that no other process writes to")
    assert not (tmp_path / "config.json").exists()


def test_the_refusal_comes_first_and_leaves_the_run_as_it_is(
    folder, finished, tmp_path, nothing_compiled
):
    """All stages are compared before the first one runs."""
    workdir = shutil.copytree(finished[0], tmp_path / "copy")
    values = changed(recipe(folder), "stages.mimic.optimizer.lr", 0.5)
    message = r"stages/mimic.* config\.optimizer\.lr: was 0\.01, is 0\.5"
    assert_stops(values, workdir, message)
    assert not (workdir / "config.json").exists()


@pytest.mark.parametrize(
    "key, value",
    [
        ("remat", "full"),
        ("stages.adaptor.checkpoint_every", 3),
        ("stages.adaptor.data.max_bad_share", 0.5),
        ("stages.adaptor.data.workers", 2),
        ("log_every", 1),
    ],
)
def test_what_changes_no_result_may_change(folder, finished, nothing_compiled, key, value):
    workdir, _ = finished
    run_stage(changed(recipe(folder), key, value), workdir, "adaptor")


def test_frozen_parts_that_have_changed_are_refused(folder, finished, tmp_path, nothing_compiled):
    """A checkpoint holds only the adaptor, which was trained with the rest as it was then."""
    workdir = shutil.copytree(finished[0], tmp_path / "copy")
    student = tmp_path / "student"
    params = dict(params_of(DENSE))
    params["language_model.norm.scale_d"] = params["language_model.norm.scale_d"] * 1.001
    huggingface.save(student, DENSE, params)
    with pytest.raises(ConfigError, match=r"student\.checksum: was '\w{64}', is '\w{64}'"):
        run_stage(changed(recipe(folder), "student.folder", str(student)), workdir, "adaptor")


def retrained(folder, finished, workdir, **changes) -> dict:
    """Copies a finished run, and trains its first stage again with another seed of its data.

    Returns:
      The recipe that the first stage follows now.
    """
    shutil.copytree(finished[0], workdir)
    shutil.rmtree(workdir / "stages" / "adaptor")
    values = changed(recipe(folder), "stages.adaptor.data.seed", 1)
    run_stage(values, workdir, "adaptor")
    return values


def test_a_stage_whose_start_was_trained_again_is_refused(folder, finished, tmp_path, monkeypatch):
    """Its own settings are the same: what it started from is no longer there."""
    workdir = tmp_path / "run"
    values = retrained(folder, finished, workdir)
    message = (
        r"stages/mimic was made with other settings, models or data; .* again with --redo=mimic: "
        r"starts_from\.adaptor: was '\w{32}', is '\w{32}'$"
    )
    monkeypatch.setattr(step, "train_step", pytest.fail)
    assert_stops(values, workdir, message)
    write_config(workdir, values)
    with pytest.raises(ConfigError, match=message):
        mod_jax.load(workdir)
    mod_jax.load(workdir, "adaptor")


def contents(path: pathlib.Path) -> dict[str, bytes]:
    """Returns the files of a folder, name -> content."""
    return {
        str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()
    }


def test_redo_trains_a_stage_and_what_follows_from_it(folder, finished, tmp_path):
    """The others keep their checkpoints; the result is that of a run that began so."""
    workdir = shutil.copytree(finished[0], tmp_path / "run")
    (workdir / "results.json").write_text("{}")
    first = contents(workdir / "stages" / "adaptor")
    values = changed(recipe(folder), "stages.mimic.data.seed", 1)
    assert_stops(values, workdir, r"--redo=mimic: config\.data\.seed: was 0, is 1$")
    train.run(from_dict(RecipeConfig, values), workdir, redo="mimic")
    assert contents(workdir / "stages" / "adaptor") == first
    assert not (workdir / "results.json").exists()
    seeds = [rows_of(run, "mimic")[0]["loss"] for run in (workdir, finished[0])]
    assert seeds[0] != seeds[1]
    assert [row["step"] for row in rows_of(workdir, "mimic")] == [2, 4, 6]
    assert make_recipe(values, workdir).student_after("mimic")


@pytest.mark.parametrize(
    "redo, stage, again",
    [("adaptor", None, ["adaptor", "mimic"]), ("mimic", None, ["mimic"])],
)
def test_the_check_says_what_would_run_and_changes_nothing(
    folder, finished_by_command, redo, stage, again
):
    before = contents(finished_by_command)
    values = changed(recipe(folder), "stages.mimic.optimizer.lr", 0.5)
    config = from_dict(RecipeConfig, values)
    _, names, found = train.plan(config, finished_by_command, stage, redo)
    assert (tuple(names), list(found)) == (config.order, again)
    assert contents(finished_by_command) == before


# Name -> (key that is set, its value, the message). The first stage is right in all of them.
BAD_LATER = {
    "data": (
        "stages.mimic.data.sources",
        [{"path": "none.json"}],
        r"stage mimic: data\.sources\.path = 'none\.json'",
    ),
    "records": (
        "stages.mimic.data.sources",
        [{"path": "{folder}/bad.json", "images": "{folder}"}],
        r"stages\.mimic\.data\.sources = .*bad\.json': .* all 12 .* are bad\. .*t-0\): no such p",
    ),
    "template": (
        "stages.mimic.data.template",
        "alpaca",
        r"stage mimic: data\.template = 'alpaca'",
    ),
    "pattern": (
        "stages.mimic.trains",
        ["*.expert.*"],
        r"stage mimic: trains = '\*\.expert\.\*': expected a pattern that matches",
    ),
    "upcycled layers": (
        "stages.mimic.upcycle.layers",
        [1, 7],
        r"stage mimic: .*layers",
    ),
    "rows": (
        "stages.mimic.rows",
        6,
        r"stage mimic: rows / accumulation = 6: expected a multiple of .* 8",
    ),
    "sequences": (
        "stages.mimic.data.sequence_length",
        10**6,
        r"stages\.mimic\.data\.sequence_length = 1000000: expected at most",
    ),
    "teacher": (
        "teacher.folder",
        "none",
        r"stage mimic: folder = 'none'",
    ),
    "teacher's words": (
        "teacher.folder",
        "{folder}/other_words",
        r"stage mimic: tokenizer = .* of the teacher .*, but 2 differ: 'red' is \d+ here and \d+",
    ),
    "evaluation": (
        "evaluation",
        {"models": ["mimic"], "path": "none"},
        r"evaluation\.path = 'none': expected a folder with a prepared scenes set",
    ),
}


@pytest.mark.parametrize("case", BAD_LATER)
def test_a_later_stage_is_checked_before_the_first_trains(case, folder, tmp_path, nothing_compiled):
    key, value, message = BAD_LATER[case]
    values = changed(recipe(folder), key, in_folder(folder, value))
    assert_stops(values, tmp_path / "run", message)
    assert not (tmp_path / "run").exists()


def test_shapes_are_followed_through_every_step_before_the_first_trains(
    folder, tmp_path, monkeypatch
):
    """What no other check knows shows when the steps are traced, without compiling any."""

    def train_step(config, student, *args):
        raise TypeError(f"dot_general requires shapes that fit, of {student.decoder.moe is None}")

    monkeypatch.setattr(step, "train_step", train_step)
    message = "stage adaptor: the train step does not fit its models and mesh: dot_general requires"
    assert_stops(recipe(folder), tmp_path / "run", message)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("order", [("adaptor",), ("mimic", "adaptor")])
def test_another_order_of_trained_stages_is_refused(order, folder, finished_by_command):
    """The last stage answers, so generate would answer from another one."""
    before = contents(finished_by_command)
    values = changed(recipe(folder), "order", order)
    values["stages"]["mimic"]["starts_from"] = "adaptor" if order[-1] == "mimic" else ""
    values["stages"] = {name: values["stages"][name] for name in order}
    message = r"order = .*: expected the stages that .* has trained, \('adaptor', 'mimic'\)"
    assert_stops(values, finished_by_command, message)
    assert contents(finished_by_command) == before


def test_accumulation_may_change_between_stop_and_resume(folder, finished, tmp_path, caplog):
    """Running out of memory costs no restart: the gradients are the same but for rounding."""
    workdir = shutil.copytree(finished[0], tmp_path / "run")
    shutil.rmtree(workdir / "stages" / "mimic")
    shutil.rmtree(workdir / "stages" / "adaptor" / "checkpoints" / "6")
    values = changed(recipe(folder), "stages.adaptor.accumulation", 2)
    with caplog.at_level(logging.WARNING):
        found = run_stage(values, workdir, "adaptor").params
    assert "accumulation was 1 and is 2. Gradients stay the same but for rounding" in caplog.text
    for name, wanted in finished[1]["adaptor"].params.items():
        np.testing.assert_allclose(found[name], wanted, rtol=2e-4, atol=2e-6)


def test_stages_start_afresh_on_a_mesh_of_eight_devices(folder, tmp_path):
    """Each command reads from disk what the one before left, upcycles it, and measures it."""
    values = recipe(folder)
    values["mesh"] = {"data": 2, "fsdp": 2, "expert": 2}
    config = from_dict(RecipeConfig, values)
    for name in ("adaptor", "mimic"):
        train.run(config, tmp_path / "run", stage=name)
    made = Recipe(config, tmp_path / "run", make_mesh(config.mesh))
    before = made.student_before("mimic").params
    after = made.student_after("mimic").params
    assert moved(before, after)
    with jax.set_mesh(made.mesh):
        assert made.run("mimic").params.keys() == after.keys()


def assert_stops(values: dict, workdir, message: str, name: str | None = None) -> None:
    """Asserts that the run, or its stage `name`, ends with an error of one line that matches."""
    with pytest.raises(ConfigError, match=message) as error:
        train.run(from_dict(RecipeConfig, values), workdir, name)
    assert "\n" not in str(error.value)


# Name -> (key that is set, its value, the message).
BAD_INPUT = {
    "unknown key": (
        "stages.mimic.optimizer.learning_rate",
        0.1,
        r"config\.stages\.mimic\.optimizer\.learning_rate = 0\.1: expected a known key",
    ),
    "no data file": (
        "stages.adaptor.data.sources",
        [{"path": "none.json"}],
        r"data\.sources\.path = 'none\.json': expected an existing JSON file",
    ),
    "no picture folder": (
        "stages.adaptor.data.sources",
        [{"path": "{folder}/chats.json", "images": "none"}],
        r"data\.sources\.images = 'none': expected an existing folder",
    ),
    "no template": (
        "stages.adaptor.data.template",
        "alpaca",
        r"data\.template = 'alpaca': expected one of \('qwen'",
    ),
    "pictures longer than a row": (
        "stages.adaptor.data.images_per_row",
        9,
        r"data\.images_per_row = 9: .*sequence_length 32",
    ),
    "no tokenizer": (
        "tokenizer",
        "none",
        r"tokenizer = 'none': expected a folder with tokenizer\.json",
    ),
    "more words than rows": (
        "student.folder",
        "{folder}/few_words",
        r"vocabulary of .*few_words = 64: .*tokenizer's largest id, 79",
    ),
    "rows longer than the student's sequences": (
        "student.folder",
        "{folder}/short",
        r"stages\.adaptor\.data\.sequence_length = 32: expected at most 16, the longest .*short",
    ),
    "no student": (
        "student.folder",
        "none",
        r"folder = 'none': expected a Hugging Face folder",
    ),
    "no teacher": (
        "teacher",
        None,
        r"stages\.mimic\.objective\.kind = 'mimic': expected a teacher",
    ),
    "pairs wanted": (
        "stages.adaptor.objective.kind",
        "preference",
        r"stages\.adaptor\.data\.sources = \['chat'\]: expected pairs",
    ),
    "pairs in a folder": (
        "stages.adaptor.data.sources",
        [{"kind": "prepared", "path": "{folder}/pairs"}],
        r"stages\.adaptor\.data\.sources = \['.*pairs'\]: expected pairs",
    ),
    "mesh": (
        "mesh",
        {"data": 1, "fsdp": 3},
        r"mesh = .*expected sizes with the product 8",
    ),
    "rows": (
        "stages.adaptor.rows",
        6,
        r"rows / accumulation = 6: expected a multiple of data x fsdp x expert = 8",
    ),
    "pattern": (
        "stages.adaptor.trains",
        ["adapter.*"],
        r"trains = 'adapter\.\*': expected a pattern that matches a parameter name",
    ),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_line_before_compilation(case, folder, tmp_path, nothing_compiled):
    key, value, message = BAD_INPUT[case]
    values = changed(recipe(folder), key, in_folder(folder, value))
    assert_stops(values, tmp_path / "run", message)


@pytest.mark.parametrize(
    "teacher, message",
    [
        (
            "wider_tower",
            r"teacher vision tower = .*intermediate_size=48.*: expected the student's",
        ),
        (
            "stranger",
            (
                r"teacher = .*stranger': expected a teacher with the same vision tower weights "
                r"as .*student"
            ),
        ),
    ],
)
def test_a_teacher_with_another_tower_is_refused(
    teacher, message, folder, finished, nothing_compiled
):
    workdir, _ = finished
    values = changed(recipe(folder), "teacher.folder", f"{folder}/{teacher}")
    with pytest.raises(ConfigError, match=message) as error:
        run_stage(values, workdir, "mimic")
    assert "\n" not in str(error.value)


def test_a_mimicking_stage_does_not_train_the_tower(folder, finished, nothing_compiled):
    workdir, _ = finished
    values = changed(recipe(folder), "stages.mimic.trains", ["*"])
    message = r"stages\.mimic\.trains = .*expected the vision tower frozen"
    with pytest.raises(ConfigError, match=message):
        run_stage(values, workdir, "mimic")


@flagsaver.flagsaver
def test_an_override_of_an_unknown_key_is_refused_with_a_suggestion(folder, tmp_path, monkeypatch):
    override = "--config.stages.adaptor.stepz=3"
    arguments = train_command(folder, recipe(folder), tmp_path / "run", override)[2:]
    monkeypatch.setattr(sys, "argv", arguments)  # where ml_collections looks for overrides
    message = r"--config: expected .*stepz.*Did you mean .steps."
    with pytest.raises(ConfigError, match=message) as error:
        train.parse(arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "stage, redo, message",
    [
        (None, "nothing", r"--redo = 'nothing': expected one of \('adaptor', 'mimic'\)"),
        ("mimic", "adaptor", r"--redo = 'adaptor': expected no --stage beside it"),
    ],
)
def test_what_cannot_be_redone_is_refused(stage, redo, message, folder, finished_by_command):
    before = contents(finished_by_command)
    with pytest.raises(ConfigError, match=message):
        train.run(from_dict(RecipeConfig, recipe(folder)), finished_by_command, stage, redo)
    assert contents(finished_by_command) == before


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("template", "alpaca", r"evaluation\.template = 'alpaca': expected one of"),
        ("split", "crowd", r"evaluation\.split = 'crowd': expected"),
        ("models", ["nobody"], r"evaluation\.models = .*'nobody'"),
    ],
)
def test_an_evaluation_is_checked_before_the_first_stage_trains(
    key, value, message, folder, tmp_path, nothing_compiled
):
    path = prepare_scenes(tmp_path / "scenes", train=0, crowd=0, preference=0, test=2)
    values = changed(recipe(folder), "evaluation", {"models": ["mimic"], "path": str(path)})
    assert_stops(changed(values, f"evaluation.{key}", value), tmp_path / "run", message)
    assert not (tmp_path / "run").exists()


def test_an_unknown_stage_is_refused(folder, tmp_path):
    message = r"--stage = 'preference': expected one of \('adaptor', 'mimic'\)"
    assert_stops(recipe(folder), tmp_path, message, "preference")


def train_command(folder, values: dict, workdir, *options) -> list[str]:
    """Writes the recipe to a file and returns the command that runs it."""
    path = folder / f"{workdir.name}.py"
    path.write_text(
        "from ml_collections import ConfigDict\n\n\n"
        f"def get_config():\n    return ConfigDict({values!r})\n"
    )
    return [
        sys.executable,
        "-m",
        "mod_jax.train",
        f"--config={path}",
        f"--workdir={workdir}",
        *options,
    ]


def environment() -> dict:
    """Environment of the commands: one device, and every program in the compilation cache.

    The cache is that of this process, see conftest.py.
    """
    return os.environ | {
        "XLA_FLAGS": "",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


def start(command: list[str], log: pathlib.Path) -> subprocess.Popen:
    """Starts a command whose output is appended to the file `log`."""
    with log.open("a") as file:
        return subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=file, stderr=file)


def run_commands(*commands: list[str]) -> list[subprocess.CompletedProcess]:
    """Runs commands at the same time, as starting Python and JAX takes most of their time."""
    processes = [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for command in commands
    ]
    results = []
    for process in processes:
        stdout, stderr = process.communicate()
        results.append(
            subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)
        )
    return results


def steps_logged(workdir) -> int:
    """Returns the number of rows in the metrics of all stages."""
    paths = (workdir / "stages").glob("*/metrics.jsonl")
    return sum(len(path.read_text().splitlines()) for path in paths)


def kill_at_random(process: subprocess.Popen, workdir, rng: random.Random, most_steps: int) -> int:
    """Kills a run with SIGKILL, at most 0.1 s after 1..most_steps further steps were logged.

    A run that ends before that is not killed.

    Returns:
      The number of steps that were logged.
    """
    target = steps_logged(workdir) + rng.randint(1, most_steps)
    delay = rng.uniform(0, 0.1)
    while process.poll() is None and steps_logged(workdir) < target:
        time.sleep(0.002)
    time.sleep(delay)
    process.kill()
    process.wait()
    return steps_logged(workdir)


@pytest.mark.parametrize("kills", [1, pytest.param(12, marks=pytest.mark.slow)])
def test_a_run_that_is_killed_again_and_again_ends_as_if_it_was_not(folder, tmp_path, kills):
    """Weights, optimizer state and losses are equal to the last bit; each step is logged once."""
    steps = {"adaptor": 12, "mimic": 14}
    total = sum(steps.values())
    values = changed(recipe(folder), "log_every", 1)
    for name, last in steps.items():
        values["stages"][name]["steps"] = last
    calm = tmp_path / "calm"
    calm_log = tmp_path / "calm.log"
    killed = tmp_path / "killed"
    killed_log = tmp_path / "killed.log"

    calm_process = start(train_command(folder, values, calm), calm_log)
    rng = random.Random(kills)
    command = train_command(folder, values, killed)
    most_steps = 1 + 24 // kills
    reached = [
        kill_at_random(start(command, killed_log), killed, rng, most_steps) for _ in range(kills)
    ]
    assert any(0 < logged < total for logged in reached), reached
    assert start(command, killed_log).wait() == 0, killed_log.read_text()[-2000:]
    assert calm_process.wait() == 0, calm_log.read_text()[-2000:]

    for name, last in steps.items():
        calm_state = final_state(make_recipe(values, calm), name)
        killed_state = final_state(make_recipe(values, killed), name)
        jax.tree.map(np.testing.assert_array_equal, calm_state, killed_state)
        calm_rows = rows_of(calm, name)
        killed_rows = rows_of(killed, name)
        assert [row["step"] for row in killed_rows] == list(range(1, last + 1))
        assert [row["loss"] for row in calm_rows] == [row["loss"] for row in killed_rows]


def test_a_source_without_a_good_record_is_one_line_and_a_failure(folder, tmp_path):
    sources = [{"path": f"{folder}/bad.json", "images": str(folder)}]
    values = changed(recipe(folder), "stages.adaptor.data.sources", sources)
    (done,) = run_commands(train_command(folder, values, tmp_path / "run"))
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    last_line = done.stderr.strip().splitlines()[-1]
    assert last_line.startswith(
        f"error: stages.adaptor.data.sources = '{folder}/bad.json': expected records that can be "
        "used, but all 12 that were tried are bad"
    )
    assert "no such picture file" in last_line


def test_the_generate_command_answers_and_refuses(folder, finished_by_command):
    """It needs the run's folder alone, and refuses with one line."""
    generate = [
        sys.executable,
        "-m",
        "mod_jax.generate",
        f"--run={finished_by_command}",
        "--max_new_tokens=4",
    ]
    pictures = [f"--image={folder}/0.png", f"--image={folder}/1.png"]
    question = "--question=what <image> is <image> there?"
    done, *refusals = run_commands(
        [*generate, *pictures, question],
        [*generate, f"--image={folder}/none.png"],
        [*generate, "--stage=nothing"],
    )
    assert done.returncode == 0, done.stderr
    assert "question: what <image> is <image> there?" in done.stdout
    assert "answer:" in done.stdout
    messages = ["no such picture file", "stage = 'nothing': expected one of"]
    for refused, message in zip(refusals, messages, strict=True):
        assert refused.returncode == 1
        assert "Traceback" not in refused.stderr
        assert message in refused.stderr.splitlines()[-1]


def test_a_run_can_be_loaded_and_asked_on_other_devices_than_it_was_trained_on(
    folder, finished, tmp_path
):
    trained_on, students = finished
    workdir = shutil.copytree(trained_on, tmp_path / "run")
    write_config(workdir, changed(recipe(folder), "mesh.data", 512))
    for name, chosen in [("adaptor", "adaptor"), ("mimic", None)]:
        model = mod_jax.load(workdir, chosen)
        assert model.config == dataclasses.replace(students[name].config, remat="none")
        for parameter, array in students[name].params.items():
            assert np.array_equal(model.params[parameter], array)
    rendered = model.processor.render([{"role": "user", "content": "how many?"}])
    assert rendered == "USER: how many? ASSISTANT:"  # the template of the stage
    assert isinstance(model.generate("how many?", [folder / "0.png"], 2), str)


def test_every_stage_is_exported_with_its_weights_and_its_history(
    folder, finished, finished_by_command, tmp_path
):
    """Exporting needs the run's folder alone, and takes the last stage by default.

    The card lists the stages up to the exported one, and their teacher.
    """
    _, students = finished
    titles = ["adaptor", "mimic (upcycled before)"]
    cases = [("adaptor", "adaptor", titles[:1]), ("mimic", None, titles)]
    for name, chosen, listed in cases:
        target = tmp_path / name
        export(finished_by_command, target, stage=chosen)
        _, found = hf_models.load(target)
        expected = students[name].params
        assert found.keys() == expected.keys()
        for parameter, array in expected.items():
            assert np.array_equal(found[parameter], array)
        card = (target / "README.md").read_text()
        assert [title for title in titles if f"| {title} |" in card] == listed
        assert (f"{folder}/teacher" in card) == (name == "mimic")


def test_a_stage_that_is_not_finished_is_not_exported(folder, finished, tmp_path):
    workdir = shutil.copytree(finished[0], tmp_path / "copy")
    shutil.rmtree(workdir / "stages" / "mimic")
    write_config(workdir, recipe(folder))
    message = r"stage mimic = 'step None': expected a checkpoint of its last step 6"
    with pytest.raises(ConfigError, match=message):
        export(workdir, tmp_path / "target")
    assert not (tmp_path / "target").exists()
