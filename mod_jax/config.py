"""Typed configuration: the meaning, default, and check of every key.

A file in `configs/` returns an ml_collections `ConfigDict`. `from_dict` converts it to the frozen
dataclasses below and refuses unknown keys, wrong types and impossible values before anything is
compiled.
"""

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Protocol, TypeVar

from ml_collections import ConfigDict

from mod_jax.ranges import (
    AnyInt,
    AnyNumber,
    BelowOne,
    Count,
    CountOrZero,
    Devices,
    NotNegative,
    Positive,
    Range,
    Seed,
    Share,
    ranges,
)
from mod_jax.settable import settable


class ConfigError(ValueError):
    """A configuration that cannot run.

    The message names the key, its value, what was expected, and the remedy.
    """


def require(ok: bool, key: str, value: object, expected: str, remedy: str = "") -> None:
    """Raises ConfigError("KEY = VALUE: expected EXPECTED. REMEDY") unless `ok`."""
    if not ok:
        message = f"{key} = {value!r}: expected {expected}."
        raise ConfigError(f"{message} {remedy}" if remedy else message)


def _require_read(config: object, key: str, reads: Mapping[str, bool], by: str) -> None:
    """Refuses keys that nothing reads: they have to keep their defaults.

    Args:
      config: A dataclass.
      key: Key under which it stands.
      reads: Name of a field -> whether it is read.
      by: What would read it.
    """
    for field in dataclasses.fields(config):  # type: ignore[arg-type]
        require(
            reads.get(field.name, True) or getattr(config, field.name) == field.default,
            f"{key}.{field.name}",
            getattr(config, field.name),
            f"{field.default!r}, as {by} does not read this key",
            "Remove it.",
        )


def _require_choice(key: str, value: str, choices: Sequence[str]) -> None:
    *others, last = choices
    require(value in choices, key, value, f"{', '.join(others)} or {last}")


class Checked:
    """Base of the configurations: refuses a number that is not in the range of its key.

    Attributes:
      KEY: Key under which a configuration usually stands, for error messages; "" at the top.
      RANGES: Name of each number -> its range.
    """

    KEY: ClassVar[str] = ""
    RANGES: ClassVar[dict[str, Range]]

    def __init_subclass__(cls) -> None:
        cls.RANGES = ranges(cls)

    def __post_init__(self) -> None:
        for name, accepted in self.RANGES.items():
            value = getattr(self, name)
            key = f"{self.KEY}.{name}" if self.KEY else name
            numbers = value if isinstance(value, tuple) else (value,)
            ok = all(number in accepted for number in numbers if not isinstance(number, str | None))
            require(ok, key, value, accepted.text)


CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclasses.dataclass(frozen=True)
class VisionConfig(Checked):
    """A CLIP or SigLIP vision tower. The defaults are CLIP ViT-L/14 at 336 px.

    Attributes:
      family: "clip" (a class token, and a norm before the layers) or "siglip" (neither, and a bias
        in the patch projection).
      image_size: Height and width of a picture, px.
      patch_size: Height and width of a patch, px.
      hidden_size: Width of the tower.
      intermediate_size: Width of the feed-forward layers.
      num_layers: Number of transformer layers.
      num_heads: Number of attention heads.
      hidden_act: Activation: "quick_gelu", "gelu" (exact) or "gelu_tanh".
      norm_eps: Epsilon of the layer norms.
      feature_layer: Hidden state that is used as the feature, counted from the end; -1 is the
        output of the last layer.
      pixel_mean: Mean of each colour channel (RGB, within 0..1), subtracted from the pixels.
      pixel_std: Standard deviation of each channel, by which the pixels are divided.
    """

    KEY = "vision"

    family: str = "clip"
    image_size: Count = 336
    patch_size: Count = 14
    hidden_size: Count = 1024
    intermediate_size: Count = 4096
    num_layers: Count = 24
    num_heads: Count = 16
    hidden_act: str = "quick_gelu"
    norm_eps: Positive = 1e-5
    feature_layer: AnyInt = -2
    pixel_mean: tuple[AnyNumber, ...] = CLIP_MEAN
    pixel_std: tuple[Positive, ...] = CLIP_STD

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_choice("vision.family", self.family, ("clip", "siglip"))
        activations = ("quick_gelu", "gelu", "gelu_tanh")
        _require_choice("vision.hidden_act", self.hidden_act, activations)
        require(
            self.image_size >= self.patch_size,
            "vision.image_size",
            self.image_size,
            f"at least patch_size {self.patch_size}",
        )
        require(
            self.hidden_size % self.num_heads == 0,
            "vision.hidden_size",
            self.hidden_size,
            f"a multiple of num_heads {self.num_heads}",
        )
        for key in ("pixel_mean", "pixel_std"):
            channels = getattr(self, key)
            require(len(channels) == 3, f"vision.{key}", channels, "three numbers, for RGB")
        require(
            -self.num_layers <= self.feature_layer < 0,
            "vision.feature_layer",
            self.feature_layer,
            f"-{self.num_layers}..-1",
        )

    @property
    def num_features(self) -> int:
        """Number of feature vectors per picture, one per patch; CLIP's class token is dropped."""
        return (self.image_size // self.patch_size) ** 2


@dataclasses.dataclass(frozen=True)
class MoEConfig(Checked):
    """Which feed-forward layers become mixtures of experts, and how they route.

    Attributes:
      layers: Sparse layers: "sparse" (0, 2, 4, ...), "first_half", "second_half", "all", or the
        layer numbers themselves.
      num_experts: Number of experts of a layer (E).
      experts_per_token: Number of experts that process a token (K).
      capacity_factor: None routes without drops. Otherwise an expert accepts
        ceil(K * capacity_factor * N / E) of the N tokens and drops the others.
      norm_topk_prob: Whether the weights of a token's experts, the router's probabilities, are
        divided by their sum. If not, an upcycled model does not compute what the dense one did,
        as the weights sum to less than 1. With one expert per token, a stage that trains the
        router needs False: a single weight divided by itself is always 1.
      residual: Whether a shared expert processes every token too; a learned softmax over the two
        mixes its output with that of the routed experts (DeepSpeed-MoE, arXiv 2201.05596).
    """

    KEY = "moe"

    layers: str | tuple[CountOrZero, ...] = "sparse"
    num_experts: Count = 4
    experts_per_token: Count = 2
    capacity_factor: Positive | None = None
    norm_topk_prob: bool = True
    residual: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        names = ("sparse", "first_half", "second_half", "all")
        require(
            not isinstance(self.layers, str) or self.layers in names,
            "moe.layers",
            self.layers,
            f"one of {names} or layer numbers",
        )
        require(
            1 <= self.experts_per_token <= self.num_experts,
            "moe.experts_per_token",
            self.experts_per_token,
            f"1..num_experts ({self.num_experts})",
        )

    def require_router_that_learns(self) -> None:
        """Raises ConfigError if the loss of the task has no gradient in the router."""
        require(
            self.experts_per_token > 1 or not self.norm_topk_prob,
            "moe.experts_per_token",
            self.experts_per_token,
            "at least 2 with norm_topk_prob: a single weight divided by itself is always 1, so the "
            "router would learn nothing from the task",
            "Set norm_topk_prob=False to weight the expert by its probability.",
        )

    @property
    def dropless(self) -> bool:
        """Whether no token is ever dropped.

        True without a capacity, or with one so large that a single expert could accept all tokens.
        """
        if self.capacity_factor is None:
            return True
        return self.experts_per_token * self.capacity_factor >= self.num_experts

    def layer_numbers(self, num_layers: int) -> tuple[int, ...]:
        """Numbers of the sparse layers in a decoder of `num_layers`, ascending.

        Raises:
          ConfigError: If there are none, or one of them is not a layer of the decoder.
        """
        half = num_layers // 2
        named = {
            "sparse": range(0, num_layers, 2),
            "first_half": range(half),
            "second_half": range(half, num_layers),
            "all": range(num_layers),
        }
        if isinstance(self.layers, str):
            numbers = tuple(named[self.layers])
        else:
            numbers = tuple(sorted(set(self.layers)))
        require(
            bool(numbers) and 0 <= numbers[0] and numbers[-1] < num_layers,
            "moe.layers",
            self.layers,
            f"layers within 0..{num_layers - 1}",
        )
        return numbers


@dataclasses.dataclass(frozen=True)
class DecoderConfig(Checked):
    """A language model. The defaults are Qwen2-0.5B.

    One decoder computes Qwen1.5, Qwen2 and Qwen2.5 (QKV biases), Llama and Mistral (no QKV biases),
    and Qwen3 (q/k norms).

    Attributes:
      vocab_size: Rows of the embedding table.
      hidden_size: Width of the decoder.
      intermediate_size: Width of a dense feed-forward layer, and of each expert.
      num_layers: Number of layers, dense and sparse.
      num_heads: Number of query heads.
      num_kv_heads: Number of key/value heads.
      head_dim: Size of a head.
      rope_theta: Base of the rotary angles.
      norm_eps: Epsilon of the RMS norms.
      qkv_bias: Whether query, key and value projections have biases.
      qk_norm: Whether queries and keys are RMS-normalised per head.
      tie_embeddings: Whether the output head is the embedding table.
      max_positions: Longest supported sequence; capped at the sliding window, which is not
        implemented.
      moe: Mixture-of-experts layers; None for a dense decoder.
    """

    KEY = "decoder"

    vocab_size: Count = 151936
    hidden_size: Count = 896
    intermediate_size: Count = 4864
    num_layers: Count = 24
    num_heads: Count = 14
    num_kv_heads: Count = 2
    head_dim: Count = 64
    rope_theta: Positive = 1e6
    norm_eps: Positive = 1e-6
    qkv_bias: bool = True
    qk_norm: bool = False
    tie_embeddings: bool = True
    max_positions: Count = 32768
    moe: MoEConfig | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.num_heads % self.num_kv_heads == 0,
            "decoder.num_heads",
            self.num_heads,
            f"a multiple of num_kv_heads {self.num_kv_heads}",
        )
        require(
            self.head_dim % 2 == 0,
            "decoder.head_dim",
            self.head_dim,
            "an even number (rotary pairs)",
        )
        if self.moe:
            self.moe.layer_numbers(self.num_layers)

    @property
    def sparse_layers(self) -> tuple[int, ...]:
        """Numbers of the mixture-of-experts layers, ascending; empty for a dense decoder."""
        return self.moe.layer_numbers(self.num_layers) if self.moe else ()


@dataclasses.dataclass(frozen=True)
class ModelConfig(Checked):
    """A multimodal model: vision tower -> two-layer adaptor -> decoder.

    Attributes:
      vision: The vision tower.
      decoder: The language model.
      image_token_id: Token that marks a position of a picture.
      end_token_id: Token that ends an answer in training; it also fills padding.
      other_end_token_ids: Further tokens that end an answer when the model is asked.
      dtype: Dtype of the activations, "float32" or "bfloat16". Parameters, the router, softmax,
        norms and losses are always float32.
      remat: What the backward pass recomputes in each layer: "none", "dots" (all but the results of
        matrix products and of attention), "full", or "auto", which is "dots" on CPU and "full"
        elsewhere.
    """

    KEY = "model"

    vision: VisionConfig = VisionConfig()
    decoder: DecoderConfig = DecoderConfig()
    image_token_id: CountOrZero = 151646
    end_token_id: CountOrZero = 151643
    other_end_token_ids: tuple[CountOrZero, ...] = ()
    dtype: str = "float32"
    remat: str = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_choice("model.dtype", self.dtype, ("float32", "bfloat16"))
        _require_choice("model.remat", self.remat, ("auto", "none", "dots", "full"))

    @property
    def end_token_ids(self) -> tuple[int, ...]:
        """All tokens that end an answer when the model is asked."""
        return (self.end_token_id, *self.other_end_token_ids)


@dataclasses.dataclass(frozen=True)
class MeshConfig(Checked):
    """Number of devices along each mesh axis; one of them may be -1, for all remaining devices.

    Rows of a batch are split over data x fsdp x expert.

    Attributes:
      data: Replicas of the parameters, which may be in different TPU slices.
      fsdp: Splits dense weights, and the width of the experts' weights.
      expert: Splits the experts, and dense weights further.
      tensor: Splits heads, feed-forward layers and the vocabulary.
    """

    KEY = "mesh"

    data: Devices = -1
    fsdp: Devices = 1
    expert: Devices = 1
    tensor: Devices = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        sizes = dataclasses.asdict(self)
        free = [axis for axis, size in sizes.items() if size == -1]
        require(len(free) <= 1, "mesh", sizes, "at most one size of -1")


@dataclasses.dataclass(frozen=True)
class SourceConfig(Checked):
    """One source of records.

    Attributes:
      kind: "chat" and "preference" (LLaVA's JSON), "rlaif" (RLAIF-V's parquet), "tfds", "prepared"
        (written by `mod_jax.prepare`), or "scenes" (the built-in data set).
      path: chat and preference: a file with a JSON list, or JSON Lines (.jsonl). rlaif: a file, a
        folder or a glob pattern. tfds: the folder of a prepared data set, or its name. Otherwise a
        folder.
      images: Where the pictures are that a JSON source, or a parquet row without bytes, names: a
        folder, gs://..., a .zip or a .tar.
      split: tfds: one of the data set's splits. scenes: "train", "crowd", "preference" or "test".
      weight: Share of the mixture, relative to the weights of the other sources.
      text_only: Whether pictures are dropped, to train a language model on the texts.
    """

    KEY = "data.sources"

    kind: str = "chat"
    path: str = ""
    images: str = ""
    split: str = ""
    weight: Positive = 1.0
    text_only: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        kinds = ("chat", "preference", "rlaif", "tfds", "prepared", "scenes")
        require(self.kind in kinds, "data.sources.kind", self.kind, f"one of {kinds}")
        reads = {
            "images": self.kind in ("chat", "preference", "rlaif"),
            "split": self.kind in ("tfds", "scenes"),
        }
        _require_read(self, "data.sources", reads, f"a source of kind {self.kind}")

    @property
    def holds_pairs(self) -> bool | None:
        """Whether the records are preference pairs.

        None for the kinds whose data have to be opened to tell (tfds, prepared).
        """
        known = {
            "chat": False,
            "preference": True,
            "rlaif": True,
            "scenes": self.split == "preference",
        }
        return known.get(self.kind)


@dataclasses.dataclass(frozen=True)
class DataConfig(Checked):
    """What a stage reads, and how samples are packed into rows.

    All keys except `workers` and `max_bad_share` determine the batches.

    Attributes:
      sources: The mixture of sources.
      sequence_length: Positions of a row, those of pictures included.
      images_per_row: Largest number of pictures in a row.
      samples_per_row: Largest number of samples in a row.
      template: Chat template: "qwen", "vicuna", "brief", "plain" or "chatml".
      fit: How a picture becomes a square: "pad", "crop" or "stretch".
      seed: Seed of the order of samples.
      max_bad_share: Share of skipped samples above which the run stops.
      streams: Number of independent streams that make the rows; the number of hosts has to divide
        it. 0 means one stream per row of the batch, at most 64.
      look_ahead: Number of samples of a stream that a row is chosen from. More of them leave less
        padding and need more memory.
      workers: Number of processes that read and decode on each host, at about 0.5 GB each. 0 means
        threads of the training process.
    """

    KEY = "data"

    sources: tuple[SourceConfig, ...] = ()
    sequence_length: Count = 2048
    images_per_row: CountOrZero = 3
    samples_per_row: Count = 16
    template: str = "qwen"
    fit: str = "pad"
    seed: Seed = 0
    max_bad_share: Share = 0.01
    streams: CountOrZero = 0
    look_ahead: Count = 32
    workers: CountOrZero = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        require(len(self.sources) > 0, "data.sources", self.sources, "at least one source")


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig(Checked):
    """What a stage minimises (arXiv 2408.15881, sections 3.2 and 3.3).

    A key that the objective does not read is refused unless it has its default.

    Attributes:
      kind: "next_token", "mimic" (KL from the teacher) or "preference".
      next_token_weight: mimic: weight of the next-token loss, which is added to the KL.
      all_tokens: mimic: whether instruction and picture positions are compared too.
      preference: Preference loss: "kto_pair", "sigmoid" (DPO), "hinge" or "ipo".
      beta: Scale of the preference loss.
      label_smoothing: preference "sigmoid": label smoothing.
      balance_weight: Weight of the router's load-balance loss.
      z_weight: Weight of the router's z-loss.
      compat: Whether to reproduce four differences of the authors' code: the KL mask is taken from
        unshifted labels, so the first token of an answer is not distilled and the position after
        the last one is (not after the last answer of a sample: the authors' code distills there
        too, but here the last end token is no input); cross-entropy replaces the KL; a mimic
        objective with a next-token loss counts the balance loss twice; the KL of KTO is that of the
        micro-batch and has a gradient.
    """

    KEY = "objective"

    kind: str = "next_token"
    next_token_weight: NotNegative = 0.0
    all_tokens: bool = False
    preference: str = "kto_pair"
    beta: Positive = 0.1
    label_smoothing: NotNegative = 0.0
    balance_weight: NotNegative = 0.01
    z_weight: NotNegative = 0.0
    compat: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_choice("objective.kind", self.kind, ("next_token", "mimic", "preference"))
        preferences = ("kto_pair", "sigmoid", "hinge", "ipo")
        _require_choice("objective.preference", self.preference, preferences)
        mimics = self.kind == "mimic"
        prefers = self.kind == "preference"
        reads = {
            "next_token_weight": mimics,
            "all_tokens": mimics,
            "preference": prefers,
            "beta": prefers,
            "label_smoothing": prefers and self.preference == "sigmoid",
            "compat": mimics or (prefers and self.preference == "kto_pair"),
        }
        name = f"{self.kind} ({self.preference})" if prefers else self.kind
        _require_read(self, "objective", reads, f"the objective {name}")
        require(
            self.label_smoothing < 0.5,
            "objective.label_smoothing",
            self.label_smoothing,
            "a number of at least 0 and below 0.5",
        )

    @property
    def needs_teacher(self) -> bool:
        """Whether the objective reads a teacher's hidden states."""
        return self.kind in ("mimic", "preference")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig(Checked):
    """AdamW with a linear warm-up and a cosine decay to 0.

    Attributes:
      lr: Peak learning rate.
      warmup_share: Share of the steps that warm up.
      b1: Decay rate of the first moment.
      b2: Decay rate of the second moment.
      weight_decay: Decoupled weight decay of the weights of matrix products; norms, biases, routers
        and the tower's positions do not decay.
      clip_norm: Largest norm of the whole gradient; 0 switches clipping off.
    """

    KEY = "optimizer"

    lr: Positive = 2e-5
    warmup_share: BelowOne = 0.03
    b1: BelowOne = 0.9
    b2: BelowOne = 0.999
    weight_decay: NotNegative = 0.0
    clip_norm: NotNegative = 1.0


@dataclasses.dataclass(frozen=True)
class StageConfig(Checked):
    """One stage of a recipe. Its name is its key in `RecipeConfig.stages`.

    Attributes:
      trains: Patterns (fnmatch) for the names of the parameters to train. A pattern that matches no
        parameter is an error.
      objective: What the stage minimises.
      data: What the stage reads.
      steps: Number of optimizer steps.
      starts_from: Name of the stage whose student is trained further; "" for the recipe's student.
      upcycle: Makes the dense student sparse before the stage; None leaves it as it is.
      optimizer: The optimizer.
      rows: Rows of the global batch.
      accumulation: Number of micro-batches of a step.
      int8_teacher: Whether the weights of the teacher's layers are held as int8, one scale for the
        numbers along the first dimension of each; `training.int8` says what it costs.
      seed: Seed of the routers that upcycling adds.
      checkpoint_every: Steps between two checkpoints.
      max_nonfinite_steps: Number of steps in a row with a loss or gradient that is not finite at
        which the run stops. The update of each such step is skipped.
    """

    trains: tuple[str, ...]
    objective: ObjectiveConfig
    data: DataConfig
    steps: Count
    starts_from: str = ""
    upcycle: MoEConfig | None = None
    optimizer: OptimizerConfig = OptimizerConfig()
    rows: Count = 8
    accumulation: Count = 1
    int8_teacher: bool = False
    seed: Seed = 0
    checkpoint_every: Count = 100
    max_nonfinite_steps: Count = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.upcycle:
            self.upcycle.require_router_that_learns()
        require(
            self.rows % self.accumulation == 0,
            "rows",
            self.rows,
            f"a multiple of accumulation {self.accumulation}",
        )
        require(
            len(self.trains) > 0,
            "trains",
            self.trains,
            "at least one pattern",
            "Use e.g. ('adaptor.*',).",
        )


@dataclasses.dataclass(frozen=True)
class ModelSource(Checked):
    """Where a model comes from: one folder, parts, or random weights.

    Exactly one of `folder`, `language_model` and `random` is given.

    Attributes:
      folder: Folder of a whole model: a LLaVA folder, or one written by `mod_jax.convert import`.
      language_model: Folder of a language model, to be joined with `vision_tower`.
      vision_tower: Folder of a CLIP or SigLIP tower. With `folder`, the tower of a model that is
        stored without one, as original LLaVA is.
      adaptor: With `language_model`: a folder or file that holds an adaptor; "" makes a new one.
      random: Sizes of a model whose weights are drawn at random.
      seed: Seed of what is initialised: the new adaptor, or all random weights.
    """

    folder: str = ""
    language_model: str = ""
    vision_tower: str = ""
    adaptor: str = ""
    random: ModelConfig | None = None
    seed: Seed = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        ways = {
            "folder": bool(self.folder),
            "language_model": bool(self.language_model),
            "random": self.random is not None,
        }
        given = [name for name, is_given in ways.items() if is_given]
        require(
            len(given) == 1,
            "given keys",
            given,
            f"exactly one of the three ways to name a model: {', '.join(ways)}",
        )
        parts = (self.language_model, self.vision_tower)
        require(
            not self.language_model or all(parts),
            "language_model, vision_tower",
            parts,
            "both parts",
        )
        require(
            not self.adaptor or all(parts),
            "adaptor",
            self.adaptor,
            "an adaptor only with language_model and vision_tower",
            "A whole model has its own.",
        )


@dataclasses.dataclass(frozen=True)
class EvaluationConfig(Checked):
    """What is measured on held-out scenes when the stages are done.

    Attributes:
      models: Models to measure: names of stages, and "teacher". Empty measures nothing.
      path: The data folder (`data_dir`) of the scenes.
      split: The split that is asked about.
      template: Chat template of the questions.
      pictures: Number of scenes.
      rows: Number of prompts that are answered at a time.
    """

    KEY = "evaluation"

    models: tuple[str, ...] = ()
    path: str = "data/scenes"
    split: str = "test"
    template: str = "brief"
    pictures: Count = 256
    rows: Count = 256


@dataclasses.dataclass(frozen=True)
class RecipeConfig(Checked):
    """A list of stages, and the models that they start from.

    Attributes:
      name: Name of the recipe, for people.
      tokenizer: Folder of the tokenizer.
      student: Where the student comes from.
      stages: The stages by name.
      order: Names of the stages in the order in which they run; a ConfigDict sorts its keys.
      teacher: Where the teacher comes from; None if no stage needs one.
      mesh: Mesh of devices.
      dtype: `ModelConfig.dtype` of student and teacher.
      remat: `ModelConfig.remat` of the student.
      keep_checkpoints: Number of checkpoints that each stage keeps.
      log_every: Steps between two lines of metrics.
      evaluation: What is measured at the end.
    """

    name: str
    tokenizer: str
    student: ModelSource
    stages: dict[str, StageConfig]
    order: tuple[str, ...]
    teacher: ModelSource | None = None
    mesh: MeshConfig = MeshConfig()
    dtype: str = "float32"
    remat: str = "auto"
    keep_checkpoints: Count = 2
    log_every: Count = 10
    evaluation: EvaluationConfig = EvaluationConfig()

    def __post_init__(self) -> None:
        super().__post_init__()
        require(len(self.order) > 0, "order", self.order, "at least one stage")
        earlier: list[str] = []
        for name in self.order:
            require(
                name in self.stages and name not in earlier,
                "order",
                self.order,
                f"each name once, out of {sorted(self.stages)}",
            )
            self._check_stage(name, earlier)
            earlier.append(name)
        for model in self.evaluation.models:
            require(
                model in (*earlier, "teacher"),
                "evaluation.models",
                model,
                f"a stage {earlier} or teacher",
            )

    def _check_stage(self, name: str, earlier: list[str]) -> None:
        stage = self.stages[name]
        require(
            not stage.starts_from or stage.starts_from in earlier,
            f"stages.{name}.starts_from",
            stage.starts_from,
            f"an earlier stage {earlier}, or empty",
        )
        require(
            not stage.objective.needs_teacher or self.teacher is not None,
            f"stages.{name}.objective.kind",
            stage.objective.kind,
            "a teacher",
            "Set config.teacher.",
        )
        wants_pairs = stage.objective.kind == "preference"
        require(
            all(source.holds_pairs in (wants_pairs, None) for source in stage.data.sources),
            f"stages.{name}.data.sources",
            [source.kind for source in stage.data.sources],
            "pairs for a preference objective and chats for the others",
        )


class _Dataclass(Protocol):
    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]


DataclassT = TypeVar("DataclassT", bound=_Dataclass)


def from_dict(cls: type[DataclassT], values: Mapping[str, Any], path: str = "config") -> DataclassT:
    """Builds a dataclass from a mapping; the annotations of its fields decide the types.

    Args:
      cls: One of the dataclasses of this module.
      values: A dict; of a ConfigDict, its `to_dict()`.
      path: Key under which `values` stands, for error messages.

    Returns:
      The instance, nested mappings converted to the dataclasses of their fields.

    Raises:
      ConfigError: For an unknown or a missing key, a wrong type, or a value that a check refuses.
    """
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for key in values:
        near = difflib.get_close_matches(key, fields, 1)
        require(
            key in fields,
            f"{path}.{key}",
            values[key],
            f"a known key ({', '.join(fields)})",
            f"Did you mean {path}.{near[0]}?" if near else "",
        )
    missing = [name for name in fields if name not in values and _is_required(fields[name])]
    require(not missing, path, dict(values), f"the keys {missing} as well")
    converted = {key: _convert(hints[key], values[key], f"{path}.{key}") for key in values}
    try:
        return cls(**converted)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def complete(cls: type[_Dataclass], values: Mapping[str, Any]) -> ConfigDict:
    """Adds every default of `cls` to `values`, so that the command line can set each key.

    Raises:
      ConfigError: As `from_dict`.
    """
    return settable(from_dict(cls, values))


def _is_required(field: dataclasses.Field) -> bool:
    missing = dataclasses.MISSING
    return field.default is missing and field.default_factory is missing


def _convert(hint: Any, value: Any, path: str) -> Any:
    """Converts `value` to the type annotation `hint`, or raises ConfigError naming `path`."""
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        if isinstance(value, hint):
            return value
        require(isinstance(value, Mapping), path, value, f"a mapping of {hint.__name__}'s keys")
        return from_dict(hint, value, path)
    origin = typing.get_origin(hint)
    arguments = typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return _convert_union(arguments, value, path)
    if origin is dict:
        require(isinstance(value, Mapping), path, value, "a mapping")
        return {key: _convert(arguments[1], value[key], f"{path}.{key}") for key in value}
    if origin is tuple:
        require(isinstance(value, (tuple, list)), path, value, "a tuple")
        return tuple(_convert(arguments[0], v, f"{path}[{i}]") for i, v in enumerate(value))
    is_bool = isinstance(value, bool)
    if hint is float and isinstance(value, int) and not is_bool:
        return float(value)
    # bool is a subclass of int, but True is no number of layers
    matches = isinstance(value, hint) and not (hint is int and is_bool)
    require(matches, path, value, f"a value of type {hint.__name__}")
    return value


def _convert_union(options: tuple[Any, ...], value: Any, path: str) -> Any:
    """Converts `value` to the first option that accepts it, or raises the last option's error."""
    if value is None and type(None) in options:
        return None
    errors = []
    for option in options:
        if option is not type(None):
            try:
                return _convert(option, value, path)
            except ConfigError as error:
                errors.append(error)
    raise errors[-1]
