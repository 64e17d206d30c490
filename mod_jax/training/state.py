"""The state of a stage: flat dicts of the parameters it trains and of those it only reads."""

import dataclasses
import fnmatch
from collections.abc import Collection, Mapping

import jax
import jax.numpy as jnp
import optax

from mod_jax.batch import Array
from mod_jax.config import ConfigError, OptimizerConfig


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that a step changes; of the weights, a checkpoint keeps nothing else.

    Attributes:
      step: i32[], steps done, those whose update was skipped included.
      params: Name -> f32 array, the trained part of the student.
      optimizer: Optax state over `params`.
    """

    step: jax.Array
    params: dict
    optimizer: optax.OptState


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Frozen:
    """What a step reads only: without gradients and optimizer state.

    A checkpoint does not hold these arrays, but their origin and checksum.

    Attributes:
      student: Name -> array, the part of the student that the stage does not train.
      teacher: Name -> array or `Int8`, the teacher without its vision tower, as it reads the
        student's features; empty without a teacher.
    """

    student: dict
    teacher: dict


def split_trained(names: Collection[str], patterns: tuple[str, ...]) -> tuple[list[str], list[str]]:
    """Splits parameter names into trained and frozen ones.

    Args:
      names: All parameter names of the student.
      patterns: Patterns (`fnmatch`) of the names to train.

    Returns:
      (trained, frozen) names.

    Raises:
      ConfigError: If a pattern matches no name.
    """
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise ConfigError(
                f"trains = {pattern!r}: expected a pattern that matches a parameter name. "
                "The names are: " + ", ".join(sorted(names))
            )
    trained = [
        name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
    ]
    return trained, [name for name in names if name not in set(trained)]


def make_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """The learning rate of each step: a linear warm-up, then a cosine decay to 0.

    The warm-up takes the configured share of `steps`, at least one step, and starts at
    lr / (warm-up steps) instead of 0, so that the first step trains too.
    """
    warmup = max(1, round(config.warmup_share * steps))
    ramp = optax.linear_schedule(config.lr / warmup, config.lr, max(1, warmup - 1))
    decay = optax.cosine_decay_schedule(config.lr, max(1, steps - warmup))
    return optax.join_schedules([ramp, decay], [warmup])


# Parts of names of weights that are used in float32, whatever the dtype of the activations is.
IN_FLOAT32 = (".router.", ".mix.")

# Parts of names of weights that no matrix product of the network's width multiplies: the choice of
# experts, the mixture with the residual expert, and the positions of the tower, which are added.
NOT_DECAYED = (*IN_FLOAT32, ".positions.")


def decays(name: str) -> bool:
    """Whether weight decay reaches a parameter: the weights of matrix products.

    The embedding table is one, as it is the output head too where the two are tied. Biases, scales
    of norms, the class embedding and `NOT_DECAYED` are none.
    """
    return _is_weight(name) and not any(part in name for part in NOT_DECAYED)


def _is_weight(name: str) -> bool:
    return name.rpartition(".")[2].startswith("w_")


def in_dtype_of_use(name: str, x: Array, dtype: str) -> Array:
    """Casts a parameter that a step only reads to the dtype in which the step uses it.

    Models cast weights to the dtype of their activations wherever they use them. Cast beforehand,
    they give the same numbers, take half of the memory under bfloat16, and are not cast again in
    every step. The others stay: norms and `IN_FLOAT32` are used in float32, and biases are small.

    Args:
      name: Name of the parameter.
      x: The parameter.
      dtype: Dtype of the activations.
    """
    is_cast = _is_weight(name) and not any(part in name for part in IN_FLOAT32)
    return x.astype(jnp.dtype(dtype), copy=False) if is_cast else x


def may_be_int8(name: str) -> bool:
    """Whether a parameter of a frozen model may be held as int8: the weights of its layers.

    The embedding table is only looked up, and the loss reads the head in the dtype of its products.
    """
    in_layers = name.startswith("language_model.layers.")
    return in_layers and _is_weight(name) and not any(part in name for part in IN_FLOAT32)


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """AdamW, after clipping by the global norm unless `clip_norm` is 0.

    It is for flat dicts of parameters, whose names say what decays.
    """

    def decay(updates: dict, params: dict) -> dict:
        return {
            name: update + config.weight_decay * params[name] if decays(name) else update
            for name, update in updates.items()
        }

    # optax.adamw with a mask, but the mask would add a level to the state in every checkpoint
    adamw = optax.chain(
        optax.scale_by_adam(config.b1, config.b2),
        optax.stateless(decay),
        optax.scale_by_learning_rate(make_schedule(config, steps)),
    )
    if not config.clip_norm:
        return adamw
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw)


def updates_done(state: optax.OptState) -> jax.Array:
    """i32[], the number of updates in a state of `make_optimizer`: what its schedule counts."""
    return optax.tree.get(
        state, "count", filtering=lambda path, _: path[-1].tuple_name == "ScaleByScheduleState"
    )


def new_state(params: dict, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step."""
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))


def state_shardings(
    optimizer: optax.GradientTransformation,
    params: Mapping,
    shardings: dict,
    replicated,
) -> TrainState:
    """Shardings of a whole TrainState: moments are sharded like their parameters.

    Args:
      optimizer: The optimizer whose state is sharded.
      params: Name -> anything with a shape and a dtype.
      shardings: Name -> sharding of that parameter.
      replicated: Sharding of the counters.
    """
    shapes = jax.eval_shape(optimizer.init, params)
    moments = optax.tree_map_params(
        optimizer,
        lambda _, sharding: sharding,
        shapes,
        shardings,
        transform_non_params=lambda _: replicated,
    )
    return TrainState(replicated, shardings, moments)
