"""A recipe: stages over one student and one teacher, run in order, each resumable.

A stage's checkpoint holds only what it trains. The rest of its student comes from where the stage
started: from the stage before, or from the folders that the recipe names. `Recipe.student_after`
follows that chain.
"""

import contextlib
import dataclasses
import functools
import json
import pathlib
from collections.abc import Sequence

import jax
from jax.sharding import Mesh

from mod_jax.config import (
    ConfigError,
    MeshConfig,
    ModelSource,
    RecipeConfig,
    StageConfig,
    from_dict,
    require,
)
from mod_jax.data.batches.pipeline import Batches
from mod_jax.data.samples.tokenizer import load_tokenizer
from mod_jax.data.sources.kinds import Source
from mod_jax.interop.model import Model, load_model
from mod_jax.models.upcycle import upcycle
from mod_jax.models.vision import TOWER_PREFIX
from mod_jax.sharding import make_mesh
from mod_jax.storage.atomic import write_json
from mod_jax.storage.place import moved
from mod_jax.training import checkpoint, loop
from mod_jax.training.state import Frozen, make_optimizer, new_state, split_trained

# Key of config.json: the current folder of the command that wrote it.
STARTED_IN = "started_in"


class Recipe:
    """Runs stages, and finds the students that they leave behind.

    Args:
      config: Configuration of the recipe.
      workdir: Folder of the run; a stage writes to stages/NAME/{checkpoints, metrics.jsonl, events,
        parameters.txt}.
      mesh: Mesh to run on; while stages run it has to be the ambient one too (`jax.set_mesh`).
      start: Folder from which relative paths start; "" is the current one. What is not there is
        looked for around `workdir` (`storage.place.moved`).
    """

    def __init__(self, config: RecipeConfig, workdir: pathlib.Path, mesh: Mesh, start: str = ""):
        self.config = config
        self.workdir = pathlib.Path(workdir).absolute()
        self.mesh = mesh
        self._start = start
        self.tokenizer = load_tokenizer(self.find(config.tokenizer))
        self._students: dict[str, Model] = {}

    @functools.cached_property
    def teacher(self) -> Model:
        """The recipe's teacher.

        Raises:
          ConfigError: if the recipe names none, or if its vision tower is not the student's.
        """
        source = self.config.teacher
        if source is None:
            raise ConfigError("teacher = None: expected a model source. Set config.teacher.")
        model = self._load(source, "none")
        student = self._first_student
        require(
            model.config.vision == student.config.vision,
            "teacher vision tower",
            model.config.vision,
            f"the student's, {student.config.vision}",
        )
        same = source.random is not None or _tower_checksum(model) == _tower_checksum(student)
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

    def find(self, path: str) -> str:
        """Returns where a path of the configuration is."""
        return moved(path, self._start, self.workdir)

    def _load(self, source: ModelSource, remat: str) -> Model:
        source = dataclasses.replace(
            source,
            folder=self.find(source.folder),
            language_model=self.find(source.language_model),
            vision_tower=self.find(source.vision_tower),
            adaptor=self.find(source.adaptor),
        )
        model = load_model(source, self.tokenizer, self.config.dtype, remat)
        positions = model.config.decoder.max_positions
        lengths = {
            name: self.config.stages[name].data.sequence_length for name in self.config.order
        }
        require(
            max(lengths.values()) <= positions,
            "data.sequence_length",
            lengths,
            f"at most {positions}, the longest sequence that {model.origin} supports",
        )
        return model

    def student_before(self, name: str) -> Model:
        """Returns the student that stage `name` starts from, upcycled if the stage says so."""
        stage = self.config.stages[name]
        model = self.student_after(stage.starts_from) if stage.starts_from else self._first_student
        if stage.upcycle is None:
            return model
        params, config = upcycle(
            model.params, model.config, stage.upcycle, jax.random.key(stage.seed)
        )
        return Model(config, params, f"{model.origin}, upcycled with seed {stage.seed}")

    def student_after(self, name: str) -> Model:
        """Returns the student that stage `name` left behind.

        Raises:
          ConfigError: if the stage is not finished.
        """
        if name not in self._students:
            self._students[name] = self._restore(name)
        return self._students[name]

    def _restore(self, name: str) -> Model:
        """Puts the student of a finished stage together, on one device."""
        before = self.student_before(name)
        stage = self.config.stages[name]
        with contextlib.closing(self._checkpoints(name)) as saved:
            require(
                saved.latest == stage.steps,
                f"stage {name}",
                f"step {saved.latest}",
                f"a checkpoint of its last step {stage.steps} under {saved.folder}",
                "Run it first.",
            )
            # The teacher's identity is not compared: it is not needed to put the student together.
            loop.check_same(saved.metadata(stage.steps), self._metadata(name, before), saved.folder)
            trained, _ = split_trained(before.params, stage.trains)
            optimizer = make_optimizer(stage.optimizer, stage.steps)
            shapes = jax.eval_shape(
                lambda params: new_state(params, optimizer),
                {name: before.params[name] for name in trained},
            )
            device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
            shardings = jax.tree.map(lambda _: device, shapes)
            state = saved.restore(stage.steps, checkpoint.abstract(shapes, shardings), None)
        return _after(name, before, state.params)

    def _checkpoints(self, name: str) -> checkpoint.Checkpoints:
        folder = self.workdir / "stages" / name / "checkpoints"
        return checkpoint.Checkpoints(folder, self.config.keep_checkpoints)

    def _metadata(self, name: str, student: Model, teacher: Model | None = None) -> dict:
        """Returns the metadata of a stage's checkpoints.

        They are the stage's configuration, and the identity of the parameters that it only reads.
        """
        _, frozen = split_trained(student.params, self.config.stages[name].trains)
        metadata = {"config": self._resolved(name), "student": student.identity(frozen)}
        if teacher:
            metadata["teacher"] = teacher.identity(teacher.params)
        return metadata

    def _resolved(self, name: str) -> dict:
        """Returns the stage's configuration without what may change while it runs."""
        config = json.loads(json.dumps(dataclasses.asdict(self.config.stages[name])))
        del config["checkpoint_every"], config["max_nonfinite_steps"]
        del config["data"]["max_bad_share"], config["data"]["workers"]
        return config

    def check(self) -> None:
        """Compares the configuration with that of every checkpoint that is there.

        Raises:
          ConfigError: naming each difference.
        """
        for name in self.config.order:
            with contextlib.closing(self._checkpoints(name)) as saved:
                if saved.latest is not None:
                    metadata = {"config": self._resolved(name)}
                    loop.check_same(saved.metadata(saved.latest), metadata, saved.folder)

    def run(self, name: str) -> Model:
        """Runs a stage to its end, or finds that it has ended, and returns its student."""
        stage = self.config.stages[name]
        before = self.student_before(name)
        teacher = self.teacher if stage.objective.needs_teacher else None
        trained, frozen = split_trained(before.params, stage.trains)
        if teacher and any(name.startswith(TOWER_PREFIX) for name in trained):
            raise ConfigError(
                f"stages.{name}.trains = {stage.trains!r}: expected the vision tower frozen, as "
                "the teacher reads its features too."
            )
        shard = (jax.process_index(), jax.process_count())
        data = Batches(stage.data, self.tokenizer, before.config, stage.rows, shard)
        with contextlib.closing(data):
            check_pairs(name, stage, data.sources)
            work = loop.Stage(
                name=name,
                config=stage,
                student=before.config,
                teacher=teacher.config if teacher else None,
                trained={name: before.params[name] for name in trained},
                frozen=Frozen(
                    {name: before.params[name] for name in frozen},
                    _without_tower(teacher.params) if teacher else {},
                ),
                data=data,
                folder=self.workdir / "stages" / name,
                metadata={**self._metadata(name, before, teacher), "data": _identities(data)},
            )
            params = loop.run(work, self.mesh, self.config.keep_checkpoints, self.config.log_every)
        self._students[name] = _after(name, before, params)
        return self._students[name]


def _after(stage: str, before: Model, trained: dict) -> Model:
    """Returns the student after a stage: what the stage trained, and the rest as it was."""
    return Model(before.config, {**before.params, **trained}, f"stage {stage}")


def _identities(data: Batches) -> dict:
    """Returns the identity of each source: one that grew since a stop would change the batches."""
    return {str(number): source.identity for number, source in enumerate(data.sources)}


def _without_tower(params: dict) -> dict:
    return {name: value for name, value in params.items() if not name.startswith(TOWER_PREFIX)}


def _tower_checksum(model: Model) -> str:
    tower = [name for name in model.params if name.startswith(TOWER_PREFIX)]
    return model.identity(tower)["checksum"]


def check_pairs(name: str, stage: StageConfig, sources: Sequence[Source]) -> None:
    """Checks that open sources hold pairs where the objective wants pairs, and chats elsewhere.

    Some kinds of sources say what they hold only when they are open.

    Raises:
      ConfigError: if one does not.
    """
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


def write_config(config: RecipeConfig, workdir: pathlib.Path) -> None:
    """Writes config.json of a run, and the folder from which its relative paths start."""
    start = str(pathlib.Path().absolute())
    write_json(workdir / "config.json", dataclasses.asdict(config) | {STARTED_IN: start})


def is_run(path) -> bool:
    """Returns whether a folder is one that `mod_jax.train` made."""
    path = pathlib.Path(path) / "config.json"
    return path.is_file() and "stages" in json.loads(path.read_text())


def open_run(folder, stage: str | None = None) -> tuple[Recipe, str]:
    """Opens a run to read its students on one device, whatever it was trained on.

    Args:
      folder: Folder of the run.
      stage: Name of a stage; None for the last one.
    Returns:
      The recipe, and the name of the stage.
    Raises:
      ConfigError: if the folder is no run, or has no such stage.
    """
    require(
        is_run(folder), "run", str(folder), "a folder that mod_jax.train made, with its config.json"
    )
    values = json.loads((pathlib.Path(folder) / "config.json").read_text())
    start = values.pop(STARTED_IN, "")
    config = from_dict(RecipeConfig, values)
    stage = stage or config.order[-1]
    require(stage in config.stages, "stage", stage, f"one of {config.order}")
    mesh = make_mesh(MeshConfig(), jax.local_devices()[:1])
    return Recipe(config, pathlib.Path(folder), mesh, start), stage
