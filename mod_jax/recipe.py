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
import uuid
from collections.abc import Sequence

import jax
from jax.sharding import Mesh

from mod_jax.config import (
    ConfigError,
    ModelConfig,
    ModelSource,
    RecipeConfig,
    StageConfig,
    require,
)
from mod_jax.data.batches.pipeline import Batches
from mod_jax.data.samples.tokenizer import load_tokenizer
from mod_jax.data.sources.kinds import Source
from mod_jax.interop.model import Model, load_model
from mod_jax.interop.vocabulary import check_vocabulary
from mod_jax.models import llava
from mod_jax.models.upcycle import sparse_config, upcycle
from mod_jax.models.vision import TOWER_PREFIX, without_tower
from mod_jax.storage.place import moved
from mod_jax.training import checkpoint, loop
from mod_jax.training.identity import ACCUMULATION, TRAINING, check_same
from mod_jax.training.state import Frozen, make_optimizer, new_state, split_trained


@dataclasses.dataclass(frozen=True)
class Plan:
    """A stage, as far as it is known before the stages ahead of it have run.

    Attributes:
      student: Configuration of its student.
      teacher: Its teacher; None if the objective needs none.
      trained: Name -> ShapeDtypeStruct, the parameters that it trains.
      frozen: Shapes of its student's other parameters, and the teacher's parameters.
      data: Its batches; none has been read.
      program: Its train step, not compiled.
    """

    student: ModelConfig
    teacher: Model | None
    trained: dict
    frozen: Frozen
    data: Batches
    program: loop.Program


class Recipe:
    """Runs stages, and finds the students that they leave behind.

    Args:
      config: Configuration of the recipe.
      workdir: Folder of the run; a stage writes to stages/NAME/{checkpoints, metrics.jsonl, events,
        parameters.txt}.
      mesh: Mesh to run on; while stages run it has to be the ambient one too (`jax.set_mesh`).
      start: Of a run that is only read, the folder from which its relative paths start; what is
        not there is looked for around `workdir` (`storage.place.moved`). None takes all paths as
        they are, from the current folder.
    """

    def __init__(
        self, config: RecipeConfig, workdir: pathlib.Path, mesh: Mesh, start: str | None = None
    ):
        self.config = config
        self.workdir = pathlib.Path(workdir).absolute()
        self.mesh = mesh
        self._start = start
        self.tokenizer = load_tokenizer(self.find(config.tokenizer))
        self._students: dict[str, Model] = {}
        self._plans: dict[str, Plan] = {}

    @functools.cached_property
    def teacher(self) -> Model:
        """The recipe's teacher.

        Raises:
          ConfigError: if the recipe names none, or if its vision tower or its vocabulary is not
            the student's.
        """
        source = self.config.teacher
        if source is None:
            raise ConfigError("teacher = None: expected a model source. Set config.teacher.")
        model = self._load("teacher", source, "none")
        student = self._first_student
        check_towers(student.config, model.config)
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
        return self._load("student", self.config.student, self.config.remat)

    @functools.cached_property
    def _student_identity(self) -> dict:
        return self._first_student.identity(self._first_student.params)

    @functools.cached_property
    def _teacher_identity(self) -> dict:
        return self.teacher.identity(self.teacher.params)

    def find(self, path: str) -> str:
        """Returns where a path of the configuration is."""
        return path if self._start is None else moved(path, self._start, self.workdir)

    def _load(self, key: str, source: ModelSource, remat: str) -> Model:
        source = dataclasses.replace(
            source,
            folder=self.find(source.folder),
            language_model=self.find(source.language_model),
            vision_tower=self.find(source.vision_tower),
            adaptor=self.find(source.adaptor),
        )
        check_vocabulary(key, source, self.tokenizer)
        return load_model(source, self.tokenizer, self.config.dtype, remat)

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
        """Puts the student of a finished stage together, in the memory of the host."""
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
            # Teacher and data are not compared: they are not needed to put the student together.
            check_same(saved.metadata(stage.steps), self._identity(name), name, self._folder(name))
            trained, _ = split_trained(before.params, stage.trains)
            optimizer = make_optimizer(stage.optimizer, stage.steps)
            shapes = jax.eval_shape(
                lambda params: new_state(params, optimizer),
                {name: before.params[name] for name in trained},
            )
            device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
            shardings = jax.tree.map(lambda _: device, shapes)
            state = saved.restore(stage.steps, checkpoint.abstract(shapes, shardings), None)
        # Arrays of one device could not be used together with those of a mesh of several.
        return _after(name, before, jax.device_get(state.params))

    def _folder(self, name: str) -> pathlib.Path:
        return self.workdir / "stages" / name

    def _checkpoints(self, name: str) -> checkpoint.Checkpoints:
        folder = self._folder(name) / "checkpoints"
        return checkpoint.Checkpoints(folder, self.config.keep_checkpoints)

    def saved(self, name: str) -> tuple[int, dict] | None:
        """Returns step and metadata of a stage's newest checkpoint that can be read, or None.

        Raises:
          Unreadable: if there are checkpoints, but none can be read.
        """
        with contextlib.closing(self._checkpoints(name)) as saved:
            return saved.newest()

    def is_finished(self, name: str) -> bool:
        """Returns whether a stage has a checkpoint of its last step."""
        saved = self.saved(name)
        return saved is not None and saved[0] == self.config.stages[name].steps

    def _training(self, name: str) -> str | None:
        """Returns the id of a stage's training: it is another one whenever the stage begins anew.

        None if the stage has not saved anything.
        """
        saved = self.saved(name)
        return saved[1].get(TRAINING) if saved else None

    def _identity(self, name: str) -> dict:
        """Returns metadata that a stage's checkpoints share with any run that may continue them.

        They are the stage's configuration, the content of the recipe's student, and the training of
        the stage before, which its own metadata tie to all that it started from.
        """
        before = self.config.stages[name].starts_from
        return {
            "config": self._resolved(name),
            "student": self._student_identity,
            "starts_from": {before: self._training(before)} if before else {},
        }

    def _identity_of_inputs(self, plan: Plan) -> dict:
        """Returns the part of the metadata that only training needs: of the data and the teacher.

        A source that grew since a stop would change the batches.
        """
        sources = enumerate(plan.data.sources)
        metadata = {"data": {str(number): source.identity for number, source in sources}}
        return metadata | ({"teacher": self._teacher_identity} if plan.teacher else {})

    def _resolved(self, name: str) -> dict:
        """Returns the stage's configuration without what may change while it runs."""
        config = json.loads(json.dumps(dataclasses.asdict(self.config.stages[name])))
        del config["accumulation"], config["checkpoint_every"], config["max_nonfinite_steps"]
        del config["data"]["max_bad_share"], config["data"]["workers"]
        return config

    def compare_settings(self, name: str) -> None:
        """Compares a stage's configuration with its newest checkpoint; opens nothing else.

        Raises:
          ConfigError: naming each difference.
        """
        self._compare(name, {"config": self._resolved(name)})

    def compare(self, name: str, inputs: bool) -> None:
        """Compares a stage with its newest checkpoint, if it has any.

        Args:
          name: Name of the stage.
          inputs: Whether its data and its teacher are compared too.
        Raises:
          ConfigError: naming each difference.
        """
        read = self._identity_of_inputs(self.plan(name)) if inputs else {}
        self._compare(name, self._identity(name) | read)

    def _compare(self, name: str, metadata: dict) -> None:
        saved = self.saved(name)
        if saved is not None:
            check_same(saved[1], metadata, name, self._folder(name))

    def plan(self, name: str) -> Plan:
        """Opens all that a stage reads, and checks that it fits together; trains nothing.

        Raises:
          ConfigError: for whatever does not fit.
        """
        if name not in self._plans:
            self._plans[name] = self._plan(name)
        return self._plans[name]

    def _plan(self, name: str) -> Plan:
        stage = self.config.stages[name]
        student = student_at(self.config, name, self._first_student.config)
        shapes = llava.abstract(student)
        names, others = split_trained(shapes, stage.trains)
        teacher = self.teacher if stage.objective.needs_teacher else None
        if teacher and any(trained.startswith(TOWER_PREFIX) for trained in names):
            raise ConfigError(
                f"stages.{name}.trains = {stage.trains!r}: expected the vision tower frozen, as "
                "the teacher reads its features too."
            )
        check_length(name, stage, student, self._first_student.origin)
        if teacher:
            check_length(name, stage, teacher.config, teacher.origin)
        shard = (jax.process_index(), jax.process_count())
        data = Batches(stage.data, self.tokenizer, student, stage.rows, shard)
        check_pairs(name, stage, data.sources)
        trained = {name: shapes[name] for name in names}
        frozen = Frozen(
            {name: shapes[name] for name in others},
            without_tower(teacher.params) if teacher else {},
        )
        program = loop.make_program(
            stage, student, teacher.config if teacher else None, self.mesh, trained, frozen
        )
        return Plan(student, teacher, trained, frozen, data, program)

    def run(self, name: str) -> Model:
        """Runs a stage to its end, or finds that it has ended, and returns its student."""
        plan = self.plan(name)
        del self._plans[name]  # its batches can be read only once
        with contextlib.closing(plan.data):
            before = self.student_before(name)
            stage = self.config.stages[name]
            work = loop.Stage(
                name=name,
                config=stage,
                program=plan.program,
                trained={parameter: before.params[parameter] for parameter in plan.trained},
                frozen=Frozen(
                    {parameter: before.params[parameter] for parameter in plan.frozen.student},
                    plan.frozen.teacher,
                ),
                data=plan.data,
                folder=self._folder(name),
                metadata={
                    **self._identity(name),
                    **self._identity_of_inputs(plan),
                    TRAINING: self._training(name) or uuid.uuid4().hex,
                    ACCUMULATION: stage.accumulation,
                },
            )
            params = loop.run(work, self.mesh, self.config.keep_checkpoints, self.config.log_every)
        self._students[name] = _after(name, before, params)
        return self._students[name]


def _after(stage: str, before: Model, trained: dict) -> Model:
    """Returns the student after a stage: what the stage trained, and the rest as it was."""
    return Model(before.config, {**before.params, **trained}, f"stage {stage}")


def student_at(config: RecipeConfig, name: str, first: ModelConfig) -> ModelConfig:
    """Returns the configuration of the student that a stage trains; no stage needs to have run.

    Args:
      config: Configuration of the recipe.
      name: Name of the stage.
      first: Configuration of the recipe's student.
    Raises:
      ConfigError: if a student would be upcycled that is sparse already.
    """
    stage = config.stages[name]
    before = student_at(config, stage.starts_from, first) if stage.starts_from else first
    return before if stage.upcycle is None else sparse_config(before, stage.upcycle)


def check_towers(student: ModelConfig, teacher: ModelConfig) -> None:
    """Raises ConfigError unless both have the same vision tower."""
    require(
        teacher.vision == student.vision,
        "teacher vision tower",
        teacher.vision,
        f"the student's, {student.vision}",
    )


def check_length(name: str, stage: StageConfig, model: ModelConfig, origin: str) -> None:
    """Refuses rows that are longer than the sequences that a model supports.

    Args:
      name: Name of the stage.
      stage: Its configuration.
      model: Configuration of its student or its teacher.
      origin: Where the model comes from, for the message.
    Raises:
      ConfigError: if they are.
    """
    require(
        stage.data.sequence_length <= model.decoder.max_positions,
        f"stages.{name}.data.sequence_length",
        stage.data.sequence_length,
        f"at most {model.decoder.max_positions}, the longest sequence that {origin} supports",
    )


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
