"""Typed configuration behind the ml_collections files: every key, its meaning, and every check of a value.

A file in `configs/` returns a `ConfigDict`; `from_dict` turns it into the frozen dataclasses below, refusing unknown
keys and wrong types before anything is compiled.
"""

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping

from ml_collections import ConfigDict


class ConfigError(ValueError):
    """A configuration that cannot run. The message names the key, its value, what was expected and the remedy."""


def require(ok: bool, key: str, value, expected: str, remedy: str = "") -> None:
    """Raises ConfigError unless `ok`."""
    if not ok:
        raise ConfigError(
            f"{key} = {value!r}: expected {expected}." + (f" {remedy}" if remedy else "")
        )


CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """A CLIP or SigLIP vision tower (sizes of CLIP ViT-L/14 at 336 px by default)."""

    family: str = "clip"  # clip: CLS token and a norm before the layers; siglip: neither, a biased patch projection
    image_size: int = 336  # px
    patch_size: int = 14  # px
    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_layers: int = 24
    num_heads: int = 16
    hidden_act: str = "quick_gelu"  # quick_gelu | gelu | gelu_tanh
    norm_eps: float = 1e-5
    feature_layer: int = (
        -2
    )  # which hidden state is the feature, counted from the end; -1 is the last layer's output
    pixel_mean: tuple[float, ...] = CLIP_MEAN
    pixel_std: tuple[float, ...] = CLIP_STD

    def __post_init__(self):
        require(self.family in ("clip", "siglip"), "vision.family", self.family, "clip or siglip")
        require(
            self.hidden_act in ("quick_gelu", "gelu", "gelu_tanh"),
            "vision.hidden_act",
            self.hidden_act,
            "quick_gelu, gelu or gelu_tanh",
        )
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
        require(
            -self.num_layers <= self.feature_layer < 0,
            "vision.feature_layer",
            self.feature_layer,
            f"-{self.num_layers}..-1",
        )

    @property
    def num_features(self) -> int:
        """Feature vectors of one picture (CLS is dropped)."""
        return (self.image_size // self.patch_size) ** 2


@dataclasses.dataclass(frozen=True)
class MoEConfig:
    """Which feed-forward layers become mixtures of experts, and how they route (method, section 1)."""

    layers: str | tuple[int, ...] = (
        "sparse"  # sparse (0, 2, 4, ...) | first_half | second_half | all | explicit numbers
    )
    num_experts: int = 4
    experts_per_token: int = 2
    capacity_factor: float | None = (
        None  # None: dropless. Else an expert has ceil(K * factor * N / E) places for N tokens
    )
    residual: bool = (
        False  # a shared expert beside the routed ones, mixed by a learned softmax of two
    )

    def __post_init__(self):
        named = ("sparse", "first_half", "second_half", "all")
        require(
            not isinstance(self.layers, str) or self.layers in named,
            "moe.layers",
            self.layers,
            f"one of {named} or layer numbers",
        )
        require(
            1 <= self.experts_per_token <= self.num_experts,
            "moe.experts_per_token",
            self.experts_per_token,
            f"1..num_experts ({self.num_experts})",
        )
        require(
            self.capacity_factor is None or self.capacity_factor > 0,
            "moe.capacity_factor",
            self.capacity_factor,
            "None (dropless) or a positive number",
        )

    @property
    def dropless(self) -> bool:
        """Whether every token finds a place: there is no capacity, or so much that one expert could take all."""
        return (
            self.capacity_factor is None
            or self.experts_per_token * self.capacity_factor >= self.num_experts
        )

    def layer_numbers(self, num_layers: int) -> tuple[int, ...]:
        """The sparse layers of a decoder of `num_layers`, ascending."""
        half = num_layers // 2
        named = {
            "sparse": range(0, num_layers, 2),
            "first_half": range(half),
            "second_half": range(half, num_layers),
            "all": range(num_layers),
        }
        numbers = (
            tuple(named[self.layers])
            if isinstance(self.layers, str)
            else tuple(sorted(set(self.layers)))
        )
        require(
            bool(numbers) and 0 <= numbers[0] and numbers[-1] < num_layers,
            "moe.layers",
            self.layers,
            f"layers within 0..{num_layers - 1}",
        )
        return numbers


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """One decoder for Qwen1.5/2/2.5 (the defaults are Qwen2-0.5B), Llama and Mistral (no QKV bias) and Qwen3 (q/k norms)."""

    vocab_size: int = 151936
    hidden_size: int = 896
    intermediate_size: int = 4864
    num_layers: int = 24
    num_heads: int = 14
    num_kv_heads: int = 2
    head_dim: int = 64
    rope_theta: float = 1e6
    norm_eps: float = 1e-6
    qkv_bias: bool = True
    qk_norm: bool = False
    tie_embeddings: bool = True
    max_positions: int = 32768  # of the longest sequence it was made for; a sliding window is not computed, so no longer than the window
    moe: MoEConfig | None = None

    def __post_init__(self):
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
class ModelConfig:
    """A multimodal model: vision tower -> two-layer adaptor -> decoder."""

    vision: VisionConfig = VisionConfig()
    decoder: DecoderConfig = DecoderConfig()
    image_token_id: int = 151646
    end_token_id: int = 151643  # ends an answer, and pads
    dtype: str = "float32"  # of the activations; parameters and whatever decides (router, softmax, norms, losses) are float32
    remat: str = "none"  # what the backward pass recomputes in a layer: none | dots (keep matmul results) | full

    def __post_init__(self):
        require(
            self.dtype in ("float32", "bfloat16"), "model.dtype", self.dtype, "float32 or bfloat16"
        )
        require(
            self.remat in ("none", "dots", "full"), "model.remat", self.remat, "none, dots or full"
        )


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; one of them may be -1: all that are left."""

    data: int = -1  # replicas (across slices)
    fsdp: int = 1  # rows and dense weights
    expert: int = 1  # rows, dense weights, and experts
    tensor: int = 1  # heads, feed-forward and vocabulary


@dataclasses.dataclass(frozen=True)
class SourceConfig:
    """One source of records."""

    kind: str = "chat"  # chat, preference (LLaVA's JSON) | rlaif (RLAIF-V's parquet) | tfds | prepared (by mod_jax.prepare) | scenes (the built-in set)
    path: str = ""  # chat, preference: a JSON list, or JSON Lines (.jsonl); rlaif: a file, a folder or a pattern; tfds: a folder or a name; else a folder
    images: str = ""  # of a JSON source's pictures: a folder, gs://..., a .zip or a .tar
    split: str = ""  # tfds: one of its own; scenes: train | crowd | preference | test
    weight: float = 1.0  # share in the mixture
    text_only: bool = False  # drop the pictures (to train a language model on the texts)

    def __post_init__(self):
        kinds = ("chat", "preference", "rlaif", "tfds", "prepared", "scenes")
        require(self.kind in kinds, "data.sources.kind", self.kind, f"one of {kinds}")
        require(self.weight > 0, "data.sources.weight", self.weight, "a positive share")

    @property
    def holds_pairs(self) -> bool | None:
        """Whether its records are preference pairs; None where only the data say: tfds, prepared."""
        known = {
            "chat": False,
            "preference": True,
            "rlaif": True,
            "scenes": self.split == "preference",
        }
        return known.get(self.kind)


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What a stage reads and how rows are packed. All but `workers` and `max_bad_share` decides what the batches are."""

    sources: tuple[SourceConfig, ...] = ()
    sequence_length: int = 2048  # positions a row, pictures included
    images_per_row: int = 3
    samples_per_row: int = 16
    template: str = "qwen"
    fit: str = "pad"  # how a picture becomes a square: pad | crop | stretch
    seed: int = 0
    max_bad_share: float = 0.01  # share of skipped samples above which the run stops
    streams: int = 0  # independent streams that make the rows, on any number of hosts that divides it; 0: one a row, 64 at most
    look_ahead: int = (
        32  # samples of a stream that a row is chosen from: more of them, less padding, more memory
    )
    workers: int = 0  # processes that read and decode, on each host, of about 0.5 GB each; 0: threads of the process that trains

    def __post_init__(self):
        require(len(self.sources) > 0, "data.sources", self.sources, "at least one source")
        require(
            0 <= self.max_bad_share <= 1,
            "data.max_bad_share",
            self.max_bad_share,
            "a share within 0..1",
        )
        for key, least in (
            ("samples_per_row", 1),
            ("look_ahead", 1),
            ("streams", 0),
            ("workers", 0),
        ):
            require(
                getattr(self, key) >= least,
                f"data.{key}",
                getattr(self, key),
                f"a count of at least {least}",
            )


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
    """What a stage minimises (method, section 2)."""

    kind: str = "next_token"  # next_token | mimic | preference
    next_token_weight: float = 0.0  # mimic: weight of the next-token loss beside the KL
    all_tokens: bool = False  # mimic: also the instruction and picture positions
    preference: str = "kto_pair"  # kto_pair | sigmoid | hinge | ipo
    beta: float = 0.1
    label_smoothing: float = 0.0  # sigmoid only
    balance_weight: float = 0.01  # of the router's load-balance loss
    z_weight: float = 0.0  # of the router's z-loss
    compat: bool = False  # reproduce the reference code's differences 1 to 4 (method, section 3)

    def __post_init__(self):
        require(
            self.kind in ("next_token", "mimic", "preference"),
            "objective.kind",
            self.kind,
            "next_token, mimic or preference",
        )
        require(
            self.preference in ("kto_pair", "sigmoid", "hinge", "ipo"),
            "objective.preference",
            self.preference,
            "kto_pair, sigmoid, hinge or ipo",
        )
        require(
            0 <= self.label_smoothing < 0.5,
            "objective.label_smoothing",
            self.label_smoothing,
            "a number within 0..0.5",
        )
        require(self.beta > 0, "objective.beta", self.beta, "a positive number")

    @property
    def needs_teacher(self) -> bool:
        """Whether the objective reads a teacher's hidden states."""
        return self.kind in ("mimic", "preference")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with a linear warm-up and a cosine decay to 0."""

    lr: float = 2e-5
    warmup_share: float = 0.03  # of the steps
    b1: float = 0.9
    b2: float = 0.999
    weight_decay: float = 0.0
    clip_norm: float = 1.0  # of the global gradient; 0 switches it off

    def __post_init__(self):
        require(self.lr > 0, "optimizer.lr", self.lr, "a positive learning rate")
        require(
            0 <= self.warmup_share < 1,
            "optimizer.warmup_share",
            self.warmup_share,
            "a share within 0..1",
        )


@dataclasses.dataclass(frozen=True)
class StageConfig:
    """One stage of a recipe; its name is its key in `RecipeConfig.stages`."""

    trains: tuple[
        str, ...
    ]  # patterns (fnmatch) over parameter names; one that matches nothing is an error
    objective: ObjectiveConfig
    data: DataConfig
    steps: int
    starts_from: str = ""  # a stage's name; empty: the recipe's student parts
    upcycle: MoEConfig | None = None  # make the dense student sparse before this stage
    optimizer: OptimizerConfig = OptimizerConfig()
    rows: int = 8  # rows of the global batch
    accumulation: int = 1  # micro-batches a step
    seed: int = 0
    checkpoint_every: int = 100  # steps

    def __post_init__(self):
        require(self.steps > 0, "steps", self.steps, "a positive number of steps")
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
class ModelSource:
    """Where a model comes from: a whole folder, parts (with a new adaptor if none is named), or sizes with random weights."""

    folder: str = ""  # a whole model: a LLaVA folder, or an imported one
    language_model: str = ""  # or: a language model's folder, with vision_tower
    vision_tower: str = ""  # a CLIP or SigLIP folder; beside `folder` where that lacks its tower, as original LLaVA's do
    adaptor: str = ""  # with language_model: a folder or file that holds an adaptor
    random: ModelConfig | None = None  # or: sizes
    seed: int = 0  # of what is initialised: the adaptor, or everything

    def __post_init__(self):
        ways = [bool(self.folder), bool(self.language_model), self.random is not None]
        require(
            sum(ways) == 1,
            "folder, language_model, random",
            ways,
            "exactly one of the three ways to name a model",
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
            "it beside language_model and vision_tower",
            "A whole folder has its own.",
        )


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """What is measured when the stages are done, on held-out scenes."""

    models: tuple[str, ...] = ()  # stage names, and "teacher"; empty: nothing is measured
    path: str = "data/scenes"  # the TFDS data folder
    split: str = "test"
    template: str = "brief"
    pictures: int = 256
    rows: int = 256  # prompts answered at a time


@dataclasses.dataclass(frozen=True)
class RecipeConfig:
    """A list of stages, and the models they start from."""

    name: str
    tokenizer: str  # folder of a tokenizer, or a built-in one: scenes | bytes
    student: ModelSource
    stages: dict[str, StageConfig]
    order: tuple[str, ...]  # of the stages; a ConfigDict sorts its keys
    teacher: ModelSource | None = None
    mesh: MeshConfig = MeshConfig()
    dtype: str = "float32"  # of the activations of student and teacher
    remat: str = "none"
    keep_checkpoints: int = 2
    log_every: int = 10  # steps
    evaluation: EvaluationConfig = EvaluationConfig()

    def __post_init__(self):
        done = []
        require(len(self.order) > 0, "order", self.order, "at least one stage")
        for name in self.order:
            require(
                name in self.stages and name not in done,
                "order",
                self.order,
                f"each name once, out of {sorted(self.stages)}",
            )
            stage = self.stages[name]
            require(
                not stage.starts_from or stage.starts_from in done,
                f"stages.{name}.starts_from",
                stage.starts_from,
                f"an earlier stage {done}, or empty",
            )
            require(
                not stage.objective.needs_teacher or self.teacher is not None,
                f"stages.{name}.objective.kind",
                stage.objective.kind,
                "a teacher",
                "Set config.teacher.",
            )
            pairs = {source.holds_pairs for source in stage.data.sources} - {None}
            wanted = {stage.objective.kind == "preference"}
            require(
                pairs <= wanted,
                f"stages.{name}.data.sources",
                [s.kind for s in stage.data.sources],
                "pairs for a preference objective and chats for the others",
            )
            done.append(name)
        for model in self.evaluation.models:
            require(
                model in (*done, "teacher"),
                "evaluation.models",
                model,
                f"a stage {done} or teacher",
            )


def from_dict(cls, values: Mapping, path: str = "config"):
    """Builds the dataclass `cls` from a mapping, its fields' types from the annotations.

    Args:
      cls: one of the dataclasses of this module.
      values: a dict (of a ConfigDict, its to_dict()).
      path: the key of `values`, for messages.
    Raises:
      ConfigError: for an unknown or missing key, a wrong type, or a value that a check refuses.
    """
    hints, fields = typing.get_type_hints(cls), {f.name: f for f in dataclasses.fields(cls)}
    for key in values:
        near = difflib.get_close_matches(key, fields, 1)
        require(
            key in fields,
            f"{path}.{key}",
            values[key],
            f"a known key ({', '.join(fields)})",
            f"Did you mean {path}.{near[0]}?" if near else "",
        )
    missing = [
        n
        for n, f in fields.items()
        if n not in values
        and f.default is dataclasses.MISSING
        and f.default_factory is dataclasses.MISSING
    ]
    require(not missing, path, dict(values), f"the keys {missing} as well")
    made = {key: _convert(hints[key], values[key], f"{path}.{key}") for key in values}
    try:
        return cls(**made)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def complete(cls, values: Mapping) -> ConfigDict:
    """`values` with every default of `cls` filled in, so that each key can be set on the command line; checked as in from_dict."""
    return ConfigDict(dataclasses.asdict(from_dict(cls, values)))


def _convert(hint, value, path: str):
    if dataclasses.is_dataclass(hint):
        if isinstance(value, hint):
            return value
        require(isinstance(value, Mapping), path, value, f"a mapping of {hint.__name__}'s keys")
        return from_dict(hint, value, path)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return _convert_union(arguments, value, path)
    if origin is dict:
        require(isinstance(value, Mapping), path, value, "a mapping")
        return {key: _convert(arguments[1], value[key], f"{path}.{key}") for key in value}
    if origin is tuple:
        require(isinstance(value, (tuple, list)), path, value, "a tuple")
        return tuple(_convert(arguments[0], v, f"{path}[{i}]") for i, v in enumerate(value))
    exact = isinstance(value, hint) and not (hint is int and isinstance(value, bool))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    require(exact, path, value, f"a value of type {hint.__name__}")
    return value


def _convert_union(options, value, path: str):
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
