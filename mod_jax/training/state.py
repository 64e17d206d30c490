"""What a stage trains and what it only reads: two flat dicts, told apart by name patterns."""

import dataclasses
import fnmatch

import jax
import jax.numpy as jnp
import optax

from mod_jax.config import ConfigError, OptimizerConfig


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that a step changes, and all that a checkpoint keeps of the weights.

    Attributes:
      step: i32[], steps done.
      params: name -> f32 array, the trained part of the student.
      optimizer: optax state over `params`.
    """

    step: jax.Array
    params: dict
    optimizer: optax.OptState


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Frozen:
    """What a step reads: no gradient, no optimizer state, not in the checkpoint (its origin and checksum are).

    Attributes:
      student: name -> array, the part of the student that the stage does not train.
      teacher: name -> array without the vision tower (the student's features serve both); empty without a teacher.
    """

    student: dict
    teacher: dict


def split_trained(names, patterns: tuple[str, ...]) -> tuple[list[str], list[str]]:
    """Tells trained from frozen parameter names.

    Args:
      names: all parameter names of the student.
      patterns: fnmatch patterns over them.
    Returns:
      (trained, frozen) names.
    Raises:
      ConfigError: for a pattern that matches nothing.
    """
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise ConfigError(
                f"trains = {pattern!r}: expected a pattern that matches a parameter name. The names are: "
                + ", ".join(sorted(names))
            )
    trained = [
        name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
    ]
    return trained, [name for name in names if name not in set(trained)]


def make_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Linear warm-up over the configured share of `steps` (from lr / warm-up steps, so the first step counts), then cosine to 0."""
    warmup = max(1, round(config.warmup_share * steps))
    ramp = optax.linear_schedule(config.lr / warmup, config.lr, max(1, warmup - 1))
    return optax.join_schedules(
        [ramp, optax.cosine_decay_schedule(config.lr, max(1, steps - warmup))], [warmup]
    )


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """AdamW after clipping by the global norm (where configured)."""
    adamw = optax.adamw(
        make_schedule(config, steps), b1=config.b1, b2=config.b2, weight_decay=config.weight_decay
    )
    return (
        optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw)
        if config.clip_norm
        else adamw
    )


def new_state(params: dict, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step."""
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))


def state_shardings(
    optimizer: optax.GradientTransformation, params: dict, shardings: dict, replicated
) -> TrainState:
    """Shardings of a whole TrainState: moments lie where their parameters lie.

    Args:
      optimizer: whose state is laid out.
      params: name -> anything with shape and dtype.
      shardings: name -> sharding of that parameter.
      replicated: sharding of the counters.
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
