"""A recipe run whole, stage by stage, and killed again and again; and everything that stops it before anything is compiled."""

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
from mod_jax.config import ConfigError, MeshConfig, ModelConfig, RecipeConfig, from_dict
from mod_jax.data.samples.tokenizer import scenes_tokenizer
from mod_jax.data.sources.record import Record
from mod_jax.export.folder import export
from mod_jax.interop import huggingface
from mod_jax.recipe import Recipe
from mod_jax.sharding import make_mesh
from mod_jax.storage.atomic import write_json
from mod_jax.training import step
from mod_jax.training.checkpoint import Checkpoints, abstract
from mod_jax.training.state import make_optimizer, new_state, split_trained

pytestmark = pytest.mark.usefixtures("quick_compilation")

ROOT = pathlib.Path(__file__).parents[1]
EXPERTS = ("language_model.layers.moe.*", "language_model.layers.mlp.*", "adaptor.*")
RECORDS, BAD = 12, 5  # the picture of record 5 is not there


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Tokenizer, student, teacher (with the student's tower) and a few chats."""
    folder = tmp_path_factory.mktemp("recipe")
    scenes_tokenizer().save_pretrained(folder / "tokenizer")
    tower = {
        name: array for name, array in params_of(DENSE).items() if name.startswith("vision_tower.")
    }
    teachers = {
        "teacher": params_of(TEACHER, 1) | tower,
        "another_teacher": params_of(TEACHER, 2) | tower,
        "stranger": params_of(TEACHER, 2),
    }
    huggingface.save(folder / "student", DENSE, params_of(DENSE))
    for name, params in teachers.items():
        huggingface.save(folder / name, TEACHER, params)
    rng = np.random.default_rng(0)
    for number in set(range(RECORDS)) - {BAD}:
        Image.fromarray(rng.integers(0, 256, (IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)).save(
            folder / f"{number}.png"
        )
    chat = lambda i: [
        {"from": "human", "value": "<image>\nhow many?"},
        {"from": "gpt", "value": " ".join(["red", "ring", "and", "cross"][: 1 + i % 4])},
    ]
    records = [
        {"id": f"chat-{i}", "image": f"{i}.png", "conversations": chat(i)} for i in range(RECORDS)
    ]
    (folder / "chats.json").write_text(json.dumps(records))
    (folder / "bad.json").write_text(
        json.dumps([record | {"image": "none.png"} for record in records])
    )
    return folder


def stage(folder, **changes) -> dict:
    data = {
        "sources": ({"path": f"{folder}/chats.json", "images": str(folder)},),
        "sequence_length": 32,
        "images_per_row": 2,
        "samples_per_row": 2,
    }
    data |= {"template": "brief", "look_ahead": 2}
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


def recipe(folder, **changes) -> dict:
    """First the adaptor, then an upcycled student that mimics the teacher."""
    mimic = {
        "starts_from": "adaptor",
        "upcycle": {"num_experts": 2},
        "trains": EXPERTS,
        "objective": {"kind": "mimic", "next_token_weight": 1.0},
    }
    values = {
        "name": "small",
        "tokenizer": f"{folder}/tokenizer",
        "student": {"folder": f"{folder}/student"},
        "teacher": {"folder": f"{folder}/teacher"},
    }
    values |= {
        "stages": {"adaptor": stage(folder), "mimic": stage(folder, **mimic)},
        "order": ("adaptor", "mimic"),
        "log_every": 2,
    }
    return values | changes


def changed(values: dict, path: str, value) -> dict:
    """A deep copy with the key a.b.c set."""
    copy = json.loads(json.dumps(values))
    *parents, last = path.split(".")
    place = copy
    for name in parents:
        place = place.setdefault(name, {})
    place[last] = value
    return copy


def make_recipe(values: dict, workdir) -> Recipe:
    return Recipe(
        from_dict(RecipeConfig, values), workdir, make_mesh(MeshConfig(), jax.devices()[:1])
    )


def run_stage(values: dict, workdir, name: str):
    made = make_recipe(values, workdir)
    with jax.set_mesh(made.mesh):
        return made.run(name)


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory):
    """The folder of a run of both stages, one after the other, and its students."""
    workdir = tmp_path_factory.mktemp("run")
    made = make_recipe(recipe(folder), workdir)
    with jax.set_mesh(made.mesh):
        return workdir, {name: made.run(name) for name in made.config.order}


@pytest.fixture
def nothing_compiled(monkeypatch):
    def traced(*args):
        raise AssertionError("a train step was traced")

    monkeypatch.setattr(step, "train_step", traced)


def checkpoints_of(workdir, name: str) -> Checkpoints:
    return Checkpoints(workdir / "stages" / name / "checkpoints", 2)


def rows_of(workdir, name) -> list[dict]:
    return [
        json.loads(line)
        for line in (workdir / "stages" / name / "metrics.jsonl").read_text().splitlines()
    ]


def final_state(made: Recipe, name: str):
    """Weights and optimizer of a finished stage's last checkpoint."""
    config, before = made.config.stages[name], made.student_before(name).params
    optimizer, one = (
        make_optimizer(config.optimizer, config.steps),
        jax.sharding.SingleDeviceSharding(jax.devices()[0]),
    )
    shapes = jax.eval_shape(
        lambda p: new_state(p, optimizer),
        {n: before[n] for n in split_trained(before, config.trains)[0]},
    )
    saved = checkpoints_of(made.workdir, name)
    state = saved.restore(config.steps, abstract(shapes, jax.tree.map(lambda _: one, shapes)), None)
    saved.close()
    return jax.tree.map(np.asarray, state)


def test_stages_follow_each_other(folder, finished):
    """The second begins where the first ended, upcycled; what it does not train stays."""
    workdir, students = finished
    adaptor, mimic = students["adaptor"], students["mimic"]
    start, before = params_of(DENSE), make_recipe(recipe(folder), workdir).student_before("mimic")
    moved = {name for name in start if (np.asarray(adaptor.params[name]) != start[name]).any()}
    assert moved == {name for name in start if name.startswith("adaptor.")}
    assert before.config == mimic.config and mimic.config.decoder.moe.num_experts == 2
    moved = {
        name
        for name in mimic.params
        if (np.asarray(mimic.params[name]) != np.asarray(before.params[name])).any()
    }
    assert moved == {
        name
        for name in before.params
        if ".mlp." in name
        and "vision" not in name
        or ".moe." in name
        or name.startswith("adaptor.")
    }
    assert all(
        np.array_equal(before.params[name], adaptor.params[name])
        for name in start
        if name.startswith(("adaptor.", "vision_tower."))
    )


def test_metrics_are_logged_and_learning_shows(finished):
    workdir, _ = finished
    for name in ("adaptor", "mimic"):
        rows = rows_of(workdir, name)
        assert [row["step"] for row in rows] == [2, 4, 6]
        assert rows[-1]["loss"] < rows[0]["loss"] and all(
            np.isfinite(value) for row in rows for value in row.values()
        )
    assert {"kl", "next_token", "balance", "gradient_norm", "lr", "padding"} <= rows[0].keys()


def test_the_last_two_checkpoints_stay(finished):
    workdir, _ = finished
    for name in ("adaptor", "mimic"):
        assert sorted(
            path.name
            for path in (workdir / "stages" / name / "checkpoints").iterdir()
            if path.name.isdigit()
        ) == ["4", "6"]


def test_a_bad_sample_is_skipped_counted_and_named(
    folder, finished, tmp_path, caplog, nothing_compiled
):
    """In the checkpoint, in the metrics and in the log; the others are read."""
    workdir, _ = finished
    streams = json.loads(
        (
            workdir / "stages" / "adaptor" / "checkpoints" / "6" / "data" / "process_0.json"
        ).read_text()
    )
    assert (
        sum(stream["bad"] for stream in streams.values()) == 1
        and sum(stream["seen"] for stream in streams.values()) == RECORDS
    )
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
    with pytest.raises(
        ConfigError,
        match=r"stage adaptor = 'step None': expected a checkpoint of its last step 6 under .*/stages/adaptor.*Run it first",
    ):
        run_stage(recipe(folder), tmp_path, "mimic")


def test_stages_alone_one_by_one_are_the_whole_recipe(folder, finished, tmp_path):
    for name in ("adaptor", "mimic"):
        found = run_stage(recipe(folder), tmp_path, name)
        jax.tree.map(np.testing.assert_array_equal, found.params, finished[1][name].params)


@pytest.mark.parametrize(
    "name, path, value, message",
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
            "another_teacher",
            r"teacher\.checksum: was '\w+', is '\w+'; teacher\.origin",
        ),
        ("adaptor", "dtype", "bfloat16", r"student\.config\.dtype: was 'float32', is 'bfloat16'"),
        (
            "adaptor",
            "student.folder",
            "teacher",
            r"student\.config\.decoder\.hidden_size: was 32, is 48",
        ),
    ],
)
def test_going_on_with_another_configuration_or_model_is_refused(
    folder, finished, nothing_compiled, name, path, value, message
):
    """Naming what differs, and how."""
    value = f"{folder}/{value}" if path.endswith("folder") else value
    with pytest.raises(
        ConfigError,
        match=r"was made with another configuration; use another --workdir or set back: .*"
        + message,
    ):
        run_stage(changed(recipe(folder), path, value), finished[0], name)


def test_the_refusal_comes_first_and_leaves_the_run_as_it_is(
    folder, finished, tmp_path, nothing_compiled
):
    """All stages are looked at before the first one runs."""
    workdir = shutil.copytree(finished[0], tmp_path / "copy")
    stopped(
        changed(recipe(folder), "stages.mimic.optimizer.lr", 0.5),
        workdir,
        r"stages/mimic.* config\.optimizer\.lr: was 0\.01, is 0\.5",
    )
    assert not (workdir / "config.json").exists()


@pytest.mark.parametrize(
    "path, value",
    [
        ("remat", "full"),
        ("stages.adaptor.checkpoint_every", 3),
        ("stages.adaptor.data.max_bad_share", 0.5),
        ("stages.adaptor.data.workers", 2),
        ("log_every", 1),
    ],
)
def test_what_changes_no_result_may_change(folder, finished, nothing_compiled, path, value):
    run_stage(changed(recipe(folder), path, value), finished[0], "adaptor")


def test_frozen_parts_that_have_changed_are_refused(folder, finished, tmp_path, nothing_compiled):
    """The checkpoint holds the adaptor only; the rest has to be what it was trained with."""
    workdir, student = shutil.copytree(finished[0], tmp_path / "copy"), tmp_path / "student"
    params = dict(params_of(DENSE))
    params["language_model.norm.scale_d"] = params["language_model.norm.scale_d"] * 1.001
    huggingface.save(student, DENSE, params)
    with pytest.raises(ConfigError, match=r"student\.checksum: was '\w{64}', is '\w{64}'"):
        run_stage(changed(recipe(folder), "student.folder", str(student)), workdir, "adaptor")


def other_model(folder, name: str, config: ModelConfig) -> str:
    path = folder / name
    if not path.exists():
        huggingface.save(path, config, params_of(config))
    return str(path)


def prepared_pairs(folder) -> str:
    if not (folder / "pairs").exists():
        write_prepared(folder / "pairs", [[Record("p", (), (("Q", "A"),), "B")]])
    return str(folder / "pairs")


WIDER_TOWER = dataclasses.replace(TEACHER, vision=dataclasses.replace(VISION, intermediate_size=48))
SHORT = dataclasses.replace(DENSE, decoder=dataclasses.replace(DENSE.decoder, max_positions=16))
FEW_WORDS = dataclasses.replace(DENSE, decoder=dataclasses.replace(DENSE.decoder, vocab_size=64))
BEFORE_COMPILATION = {
    "unknown key": (lambda f: ("stages.mimic.optimizer.learning_rate", 0.1), r"config\.stages\.mimic\.optimizer\.learning_rate = 0\.1: expected a known key"),
    "no data file": (lambda f: ("stages.adaptor.data.sources", [{"path": "none.json"}]), r"data\.sources\.path = 'none\.json': expected an existing JSON file"),
    "no picture folder": (
        lambda f: ("stages.adaptor.data.sources", [{"path": f"{f}/chats.json", "images": "none"}]), r"data\.sources\.images = 'none': expected an existing folder"),
    "no template": (lambda f: ("stages.adaptor.data.template", "alpaca"), r"data\.template = 'alpaca': expected one of \('qwen'"),
    "pictures longer than a row": (lambda f: ("stages.adaptor.data.images_per_row", 9), r"data\.images_per_row = 9: .*sequence_length 32"),
    "no tokenizer": (lambda f: ("tokenizer", "none"), r"tokenizer = 'none': expected a folder with tokenizer\.json"),
    "more words than rows": (lambda f: ("student.folder", other_model(f, "few", FEW_WORDS)), r"vocabulary of .*few = 64: .*tokenizer's largest id, 79"),
    "rows longer than the student's sequences": (
        lambda f: ("student.folder", other_model(f, "short", SHORT)), r"data\.sequence_length = .*'adaptor': 32.*: expected at most 16, the longest .*short"),
    "no student": (lambda f: ("student.folder", "none"), r"folder = 'none': expected a Hugging Face folder"),
    "no teacher": (lambda f: ("teacher", None), r"stages\.mimic\.objective\.kind = 'mimic': expected a teacher"),
    "pairs wanted": (lambda f: ("stages.adaptor.objective.kind", "preference"), r"stages\.adaptor\.data\.sources = \['chat'\]: expected pairs"),
    "pairs in a folder": (
        lambda f: ("stages.adaptor.data.sources", [{"kind": "prepared", "path": prepared_pairs(f)}]), r"stages\.adaptor\.data\.sources = \['.*pairs'\]: expected pairs"),
    "mesh": (lambda f: ("mesh", {"data": 1, "fsdp": 3}), r"mesh = .*expected sizes with the product 8"),
    "rows": (lambda f: ("stages.adaptor.rows", 6), r"rows / accumulation = 6: expected a multiple of data x fsdp x expert = 8"),
    "pattern": (lambda f: ("stages.adaptor.trains", ["adapter.*"]), r"trains = 'adapter\.\*': expected a pattern that matches a parameter name"),
}  # fmt: skip


def stopped(values: dict, workdir, message: str, stage=None) -> None:
    """The run ends with one line that matches."""
    with pytest.raises(ConfigError, match=message) as error:
        train.run(from_dict(RecipeConfig, values), workdir, stage)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("case", BEFORE_COMPILATION)
def test_bad_input_is_one_line_before_compilation(case, folder, tmp_path, nothing_compiled):
    change, message = BEFORE_COMPILATION[case]
    stopped(changed(recipe(folder), *change(folder)), tmp_path / "run", message)


@pytest.mark.parametrize(
    "teacher, message",
    [
        (
            lambda f: other_model(f, "wider", WIDER_TOWER),
            r"teacher vision tower = .*intermediate_size=48.*: expected the student's",
        ),
        (
            lambda f: f"{f}/stranger",
            r"teacher = .*stranger': expected a teacher with the same vision tower weights as .*student",
        ),
    ],
)
def test_a_teacher_with_another_tower_is_refused(
    teacher, message, folder, finished, nothing_compiled
):
    with pytest.raises(ConfigError, match=message) as error:
        run_stage(changed(recipe(folder), "teacher.folder", teacher(folder)), finished[0], "mimic")
    assert "\n" not in str(error.value)


def test_a_mimicking_stage_does_not_train_the_tower(folder, finished, nothing_compiled):
    with pytest.raises(
        ConfigError, match=r"stages\.mimic\.trains = .*expected the vision tower frozen"
    ):
        run_stage(changed(recipe(folder), "stages.mimic.trains", ["*"]), finished[0], "mimic")


@flagsaver.flagsaver
def test_an_override_of_an_unknown_key_is_refused_with_a_suggestion(folder, tmp_path, monkeypatch):
    arguments = command(
        folder, recipe(folder), tmp_path / "run", "--config.stages.adaptor.stepz=3"
    )[2:]
    monkeypatch.setattr(sys, "argv", arguments)  # ml_collections looks for overrides there
    with pytest.raises(
        ConfigError, match=r"--config: expected .*stepz.*Did you mean .steps."
    ) as error:
        train.parse(arguments)
    assert "\n" not in str(error.value)


def test_an_unknown_stage_is_refused(folder, tmp_path):
    stopped(
        recipe(folder),
        tmp_path,
        r"--stage = 'preference': expected one of \('adaptor', 'mimic'\)",
        "preference",
    )


def command(folder, values: dict, workdir, *options) -> list[str]:
    path = folder / f"{workdir.name}.py"
    path.write_text(
        f"from ml_collections import ConfigDict\n\n\ndef get_config():\n    return ConfigDict({values!r})\n"
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
    """One device, and the tests' compilation cache."""
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "jax"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    return os.environ | cache | {"XLA_FLAGS": "", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}


def start(arguments, log: pathlib.Path) -> subprocess.Popen:
    with log.open("a") as file:
        return subprocess.Popen(arguments, cwd=ROOT, env=environment(), stdout=file, stderr=file)


def steps_logged(workdir) -> int:
    return sum(
        len(path.read_text().splitlines()) for path in (workdir / "stages").glob("*/metrics.jsonl")
    )


def kill_at_random(process: subprocess.Popen, workdir, rng: random.Random, most: int) -> int:
    """SIGKILL a random moment after `most` further steps at most, or nothing if the run has ended by then. Returns the steps that were logged."""
    target, moment = steps_logged(workdir) + rng.randint(1, most), rng.uniform(0, 0.1)
    while process.poll() is None and steps_logged(workdir) < target:
        time.sleep(0.002)
    time.sleep(moment)
    process.kill()
    process.wait()
    return steps_logged(workdir)


@pytest.mark.parametrize("kills", [2, pytest.param(12, marks=pytest.mark.slow)])
def test_a_run_that_is_killed_again_and_again_ends_as_if_it_was_not(folder, tmp_path, kills):
    """Weights, optimizer and data order to the last bit; each logged step once."""
    values = changed(recipe(folder), "log_every", 1)
    for name, steps in [("adaptor", 12), ("mimic", 14)]:
        values["stages"][name]["steps"] = steps
    calm, killed = tmp_path / "calm", tmp_path / "killed"
    whole = start(command(folder, values, calm), tmp_path / "calm.log")
    rng, arguments = random.Random(kills), command(folder, values, killed)
    reached = [
        kill_at_random(start(arguments, tmp_path / "killed.log"), killed, rng, 1 + 24 // kills)
        for _ in range(kills)
    ]
    assert any(0 < steps < 26 for steps in reached), reached
    assert start(arguments, tmp_path / "killed.log").wait() == 0, (
        tmp_path / "killed.log"
    ).read_text()[-2000:]
    assert whole.wait() == 0, (tmp_path / "calm.log").read_text()[-2000:]
    for name, steps in [("adaptor", 12), ("mimic", 14)]:
        states = [final_state(make_recipe(values, workdir), name) for workdir in (calm, killed)]
        jax.tree.map(np.testing.assert_array_equal, *states)
        rows = [rows_of(workdir, name) for workdir in (calm, killed)]
        assert [row["step"] for row in rows[1]] == list(range(1, steps + 1))
        assert [row["loss"] for row in rows[0]] == [row["loss"] for row in rows[1]]


def test_too_many_bad_samples_are_one_line_and_a_failure(folder, tmp_path):
    values = changed(
        recipe(folder),
        "stages.adaptor.data.sources",
        [{"path": f"{folder}/bad.json", "images": str(folder)}],
    )
    done = subprocess.run(
        command(folder, values, tmp_path / "run"),
        check=False,
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert (
        last.startswith(
            "error: The last 50 samples are all bad, more than data.max_bad_share = 0.01"
        )
        and "no such picture file" in last
    )


def test_the_generate_command_answers_and_refuses(folder, finished):
    """From the run's folder alone; what cannot be is one line."""
    workdir, _ = finished
    write_json(
        workdir / "config.json", dataclasses.asdict(make_recipe(recipe(folder), workdir).config)
    )

    def generate(*options):
        arguments = [
            sys.executable,
            "-m",
            "mod_jax.generate",
            f"--run={workdir}",
            "--max_new_tokens=4",
            *options,
        ]
        return subprocess.run(
            arguments, check=False, cwd=ROOT, env=environment(), capture_output=True, text=True
        )

    done = generate(
        f"--image={folder}/0.png",
        f"--image={folder}/1.png",
        "--question=what <image> is <image> there?",
    )
    assert done.returncode == 0, done.stderr
    assert "question: what <image> is <image> there?" in done.stdout and "answer:" in done.stdout
    for options, message in [
        ((f"--image={folder}/none.png",), "no such picture file"),
        (("--stage=nothing",), "stage = 'nothing': expected one of"),
    ]:
        refused = generate(*options)
        assert refused.returncode == 1 and "Traceback" not in refused.stderr
        assert message in refused.stderr.splitlines()[-1]


def test_a_run_can_be_loaded_and_asked_on_other_devices_than_it_was_trained_on(
    folder, finished, tmp_path
):
    workdir, students = shutil.copytree(finished[0], tmp_path / "run"), finished[1]
    write_json(
        workdir / "config.json",
        dataclasses.asdict(make_recipe(changed(recipe(folder), "mesh.data", 512), workdir).config),
    )
    for name, stage in [("adaptor", "adaptor"), ("mimic", None)]:
        model = mod_jax.load(workdir, stage)
        assert model.config == students[name].config
        assert all(
            np.array_equal(model.params[parameter], x)
            for parameter, x in students[name].params.items()
        )
    assert (
        model.processor.render([{"role": "user", "content": "how many?"}])
        == "USER: how many? ASSISTANT:"
    )  # as the stage's template has it
    assert isinstance(model.generate("how many?", [folder / "0.png"], 2), str)


def test_every_stage_is_exported_with_its_weights_and_its_history(folder, finished, tmp_path):
    """From the run's folder alone, the last stage by default; the card tells the stages up to it, and their teacher."""
    workdir, students = finished
    write_json(
        workdir / "config.json", dataclasses.asdict(make_recipe(recipe(folder), workdir).config)
    )
    for stage, chosen, told in (
        ("adaptor", "adaptor", ["adaptor"]),
        ("mimic", None, ["adaptor", "mimic (upcycled before)"]),
    ):
        export(workdir, tmp_path / stage, stage=chosen)
        found, wanted = hf_models.load(tmp_path / stage)[1], students[stage].params
        assert found.keys() == wanted.keys() and all(
            np.array_equal(found[name], wanted[name]) for name in wanted
        )
        card = (tmp_path / stage / "README.md").read_text()
        assert [
            name for name in ("adaptor", "mimic (upcycled before)") if f"| {name} |" in card
        ] == told
        assert (f"{folder}/teacher" in card) == (stage == "mimic")


def test_a_stage_that_is_not_finished_is_not_exported(folder, finished, tmp_path):
    workdir = shutil.copytree(finished[0], tmp_path / "copy")
    shutil.rmtree(workdir / "stages" / "mimic")
    write_json(
        workdir / "config.json", dataclasses.asdict(make_recipe(recipe(folder), workdir).config)
    )
    with pytest.raises(
        ConfigError, match=r"stage mimic = 'step None': expected a checkpoint of its last step 6"
    ):
        export(workdir, tmp_path / "target")
    assert not (tmp_path / "target").exists()
