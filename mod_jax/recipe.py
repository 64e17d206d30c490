"""A recipe: a list of stages over one student and one teacher, run in order, each continuing where it stopped.

A stage's checkpoint keeps only what it trains. The rest of its student is where it came from: the stage before, or the
folders the recipe names. `Recipe.student_after` follows that chain.
"""

import contextlib
import dataclasses
import functools
import json
import pathlib
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from mod_jax.config import (
    ConfigError,
    MeshConfig,
    ModelConfig,
    ModelSource,
    RecipeConfig,
    StageConfig,
    from_dict,
    require,
)
from mod_jax.data.batches.pipeline import Batches
from mod_jax.data.samples.tokenizer import load_tokenizer
from mod_jax.data.sources.kinds import Source
from mod_jax.interop import huggingface, loading
from mod_jax.interop.pretrained import read
from mod_jax.models import llava
from mod_jax.models.upcycle import upcycle
from mod_jax.sharding import make_mesh
from mod_jax.training import checkpoint, loop
from mod_jax.training.state import Frozen, make_optimizer, new_state, split_trained

TOWER = "vision_tower."


@dataclasses.dataclass(frozen=True)
class Model:
    """A model with its weights, and where they came from.

    Attributes:
      config: of the model.
      params: name -> array.
      origin: for people and checkpoints: folder or stage.
    """

    config: ModelConfig
    params: dict
    origin: str


def check_tokenizer(config: ModelConfig, origin: str, tokenizer) -> None:
    """Raises ConfigError if a model does not know the tokenizer's ids."""
    for name, value in {
        "image_token_id": tokenizer.convert_tokens_to_ids("<image>"),
        "end_token_id": tokenizer.eos_token_id,
    }.items():
        require(
            getattr(config, name) == value,
            f"{name} of {origin}",
            getattr(config, name),
            f"the tokenizer's, {value}",
            "Name the tokenizer it was trained with.",
        )
    rows, largest = config.decoder.vocab_size, max(tokenizer.get_vocab().values())
    require(
        largest < rows,
        f"vocabulary of {origin}",
        rows,
        f"more embedding rows than the tokenizer's largest id, {largest}",
    )


def load_model(source: ModelSource, tokenizer, dtype: str, remat: str) -> Model:
    """Makes the model that a configuration names (folder, parts, or random weights).

    Raises:
      ConfigError: if it does not fit the tokenizer, or as `open_pretrained`.
    """
    if source.random:
        config, params, origin = (
            source.random,
            jax.jit(functools.partial(llava.init, source.random))(jax.random.key(source.seed)),
            f"random weights, seed {source.seed}",
        )
    else:
        with loading.open_source(source, tokenizer) as pretrained:
            config, params, origin = pretrained.config, read(pretrained), pretrained.origin
    check_tokenizer(config, origin, tokenizer)
    return Model(dataclasses.replace(config, dtype=dtype, remat=remat), params, origin)


class Recipe:
    """Runs stages and finds the students they leave behind.

    Args:
      config: of the recipe.
      workdir: the run's folder: stages/NAME/{checkpoints, metrics.jsonl, events}.
      mesh: to run on; it has to be the ambient one too (`jax.set_mesh`) while stages run.
    """

    def __init__(self, config: RecipeConfig, workdir: pathlib.Path, mesh: Mesh):
        self.config, self.workdir, self.mesh = config, pathlib.Path(workdir).absolute(), mesh
        self.tokenizer = load_tokenizer(config.tokenizer)
        self._students: dict[str, Model] = {}

    @functools.cached_property
    def teacher(self) -> Model:
        """The recipe's teacher.

        Raises:
          ConfigError: if it cannot teach this student: another tower.
        """
        require(
            self.config.teacher is not None,
            "teacher",
            None,
            "a model source",
            "Set config.teacher.",
        )
        model = self._load(self.config.teacher, "none")
        student = self._first_student
        require(
            model.config.vision == student.config.vision,
            "teacher vision tower",
            model.config.vision,
            f"the student's, {student.config.vision}",
        )
        same = self.config.teacher.random is not None or _tower(model) == _tower(student)
        require(
            same,
            "teacher",
            model.origin,
            f"a teacher with the same vision tower weights as {student.origin}",
            "Features are computed once for both.",
        )
        return model

    @functools.cached_property
    def _first_student(self) -> Model:
        return self._load(self.config.student, self.config.remat)

    def _load(self, source: ModelSource, remat: str) -> Model:
        model = load_model(source, self.tokenizer, self.config.dtype, remat)
        positions, lengths = (
            model.config.decoder.max_positions,
            {name: self.config.stages[name].data.sequence_length for name in self.config.order},
        )
        require(
            max(lengths.values()) <= positions,
            "data.sequence_length",
            lengths,
            f"at most {positions}, the longest sequence that {model.origin} was made for",
        )
        return model

    def student_before(self, name: str) -> Model:
        """The student as stage `name` finds it: after the stage it starts from, upcycled if the stage says so."""
        stage = self.config.stages[name]
        model = self.student_after(stage.starts_from) if stage.starts_from else self._first_student
        if stage.upcycle is None:
            return model
        params, config = upcycle(
            model.params, model.config, stage.upcycle, jax.random.key(stage.seed)
        )
        return Model(config, params, f"{model.origin}, upcycled with seed {stage.seed}")

    def student_after(self, name: str) -> Model:
        """The student that stage `name` left behind.

        Raises:
          ConfigError: if the stage is not finished.
        """
        if name not in self._students:
            before, stage, saved = (
                self.student_before(name),
                self.config.stages[name],
                self._checkpoints(name),
            )
            steps, latest = stage.steps, saved.latest
            require(
                latest == steps,
                f"stage {name}",
                f"step {latest}",
                f"a checkpoint of its last step {steps} under {saved.folder}",
                "Run it first.",
            )
            trained, _ = split_trained(before.params, stage.trains)
            loop.check_same(
                saved.metadata(steps), self._about(name, before), saved.folder
            )  # the teacher is not needed to put the student together
            params = {n: before.params[n] for n in trained}
            shapes = jax.eval_shape(
                lambda p: new_state(p, make_optimizer(stage.optimizer, steps)), params
            )
            one = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
            state = saved.restore(
                steps, checkpoint.abstract(shapes, jax.tree.map(lambda _: one, shapes)), None
            )
            saved.close()
            self._students[name] = Model(
                before.config, {**before.params, **state.params}, f"stage {name}"
            )
        return self._students[name]

    def _checkpoints(self, name: str) -> checkpoint.Checkpoints:
        return checkpoint.Checkpoints(
            self.workdir / "stages" / name / "checkpoints", self.config.keep_checkpoints
        )

    def _teacher_of(self, name: str) -> Model | None:
        return self.teacher if self.config.stages[name].objective.needs_teacher else None

    def _about(self, name: str, student: Model, teacher: Model | None = None) -> dict:
        """What a checkpoint of the stage says of itself: its configuration, and the identity of what it trains and reads."""
        _, frozen = split_trained(student.params, self.config.stages[name].trains)
        about = {"config": self._resolved(name), "student": _identity(student, frozen)}
        return about | ({"teacher": _identity(teacher, teacher.params)} if teacher else {})

    def _resolved(self, name: str) -> dict:
        """The stage's configuration, without what may change while it runs."""
        config = _json(self.config.stages[name])
        del config["checkpoint_every"], config["data"]["max_bad_share"], config["data"]["workers"]
        return config

    def check(self) -> None:
        """Raises ConfigError, naming each difference, if a stage's checkpoint was made with another configuration."""
        for name in self.config.order:
            saved = self._checkpoints(name)
            if saved.latest is not None:
                loop.check_same(
                    saved.metadata(saved.latest), {"config": self._resolved(name)}, saved.folder
                )
            saved.close()

    def run(self, name: str) -> Model:
        """Runs a stage to its end (at once, if it is there) and returns its student."""
        stage, before, teacher = (
            self.config.stages[name],
            self.student_before(name),
            self._teacher_of(name),
        )
        trained, frozen = split_trained(before.params, stage.trains)
        if teacher and any(n.startswith(TOWER) for n in trained):
            raise ConfigError(
                f"stages.{name}.trains = {stage.trains!r}: expected the vision tower frozen, as the teacher reads its features too."
            )
        work = loop.Stage(
            name=name,
            config=stage,
            student=before.config,
            teacher=teacher.config if teacher else None,
            trained={n: before.params[n] for n in trained},
            frozen=Frozen(
                {n: before.params[n] for n in frozen},
                {n: p for n, p in teacher.params.items() if not n.startswith(TOWER)}
                if teacher
                else {},
            ),
            data=Batches(
                stage.data,
                self.tokenizer,
                before.config,
                stage.rows,
                (jax.process_index(), jax.process_count()),
            ),
            folder=self.workdir / "stages" / name,
            about=self._about(name, before, teacher),
        )
        with contextlib.closing(work.data):
            check_pairs(name, stage, work.data.sources)
            params = loop.run(work, self.mesh, self.config.keep_checkpoints, self.config.log_every)
        self._students[name] = Model(before.config, {**before.params, **params}, f"stage {name}")
        return self._students[name]


def check_pairs(name: str, stage: StageConfig, sources: Sequence[Source]) -> None:
    """Raises ConfigError if open sources hold chats where the objective wants pairs, or the reverse; some kinds say it only when they are open."""
    wanted = stage.objective.kind == "preference"
    wrong = [
        source.path
        for source, opened in zip(stage.data.sources, sources)
        if opened.holds_pairs != wanted
    ]
    require(
        not wrong,
        f"stages.{name}.data.sources",
        wrong,
        "pairs for a preference objective and chats for the others",
    )


def is_run(path) -> bool:
    """Whether a folder is one that `mod_jax.train` made."""
    path = pathlib.Path(path) / "config.json"
    return path.is_file() and "stages" in json.loads(path.read_text())


def open_run(folder, stage: str | None = None) -> tuple[Recipe, str]:
    """The recipe of a run, to read its students on one device, whatever it was trained on; and the name of the stage: its last one if None.

    Raises:
      ConfigError: if the folder is no run, or has no such stage.
    """
    require(
        is_run(folder), "run", str(folder), "a folder that mod_jax.train made, with its config.json"
    )
    config = from_dict(RecipeConfig, json.loads((pathlib.Path(folder) / "config.json").read_text()))
    stage = stage or config.order[-1]
    require(stage in config.stages, "stage", stage, f"one of {config.order}")
    return Recipe(
        config, pathlib.Path(folder), make_mesh(MeshConfig(), jax.local_devices()[:1])
    ), stage


def _json(config) -> dict:
    """A dataclass in JSON types, as a checkpoint gives it back."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def _identity(model: Model, names) -> dict:
    """Where a model came from, its configuration, and the SHA-256 of the parameters `names`."""
    config = _json(model.config)
    del config["remat"]  # what is recomputed may change while a stage runs
    return {
        "origin": model.origin,
        "config": config,
        "checksum": huggingface.checksum({name: np.asarray(model.params[name]) for name in names}),
    }


def _tower(model: Model) -> str:
    return _identity(model, [name for name in model.params if name.startswith(TOWER)])["checksum"]
