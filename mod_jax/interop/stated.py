"""Facts that a model folder may state in several places.

All places are read. The first that says something decides, in the order in which transformers 5
reads them; a place that contradicts it is an error, because other programs read in another order.
`None` says nothing. The orders are:

| fact | order |
|---|---|
| end tokens | generation_config.json, config.json, its text_config, the class's default |
| rotary base | `rope_theta` in `rope_scaling`, in `rope_parameters`, then alone |
| kind of rotary angles | `rope_type` or `type` in `rope_scaling`, then in `rope_parameters` |
| `<image>` | `image_token_index`, `image_token_id` |
| experts | `num_local_experts`, `num_experts` |
| weights | model.safetensors, its index, pytorch_model.bin, its index |
| chat template | processor_config.json, chat_template.json, chat_template.jinja, the tokenizer's |
| pictures | `image_processor` of processor_config.json, preprocessor_config.json |
"""

from collections.abc import Mapping
from typing import Any

from mod_jax.config import ConfigError, require


def first_stated(fact: str, stated: Mapping[str, Any]) -> Any:
    """Returns the value of a fact; None if no place states it.

    Args:
      fact: Name of the fact, for the error message.
      stated: Place -> what it says, the deciding place first.

    Raises:
      ConfigError: If two places contradict each other.
    """
    said = {place: value for place, value in stated.items() if value is not None}
    for value in said.values():
        if value != next(iter(said.values())):
            raise _contradiction(fact, said)
    return next(iter(said.values()), None)


def _contradiction(fact: str, said: Mapping[str, Any]) -> ConfigError:
    quoted = "; ".join(f"{place}: {repr(value)[:80]}" for place, value in said.items())
    return ConfigError(
        f"{fact} is stated in {len(said)} places that contradict each other ({quoted}): expected "
        "one value. Correct or remove the wrong one."
    )


def token_ids(place: str, value: Any) -> tuple[int, ...]:
    """Returns token ids that are stated as one number, as a list, or as None for none.

    Raises:
      ConfigError: If it is anything else.
    """
    ids = () if value is None else tuple(value) if isinstance(value, (list, tuple)) else (value,)
    ok = all(type(number) is int and number >= 0 for number in ids)
    require(ok, f"eos_token_id of {place}", value, "a token id, or a list of them")
    return tuple(dict.fromkeys(ids))


def end_tokens(stated: Mapping[str, Any], default: int | None = None) -> tuple[int, ...]:
    """Returns all tokens that end an answer, the one that training learns first.

    The first place that names any has all of them, as in transformers. Training learns the first
    one that the last place names, as this is the token of the language model's own tokenizer.

    Args:
      stated: Place -> its `eos_token_id`, in the order of transformers.
      default: Default of the language model's class. It decides if no place says anything, and a
        place that only repeats it contradicts nothing.

    Returns:
      The ids, without repetitions; empty if there are none.

    Raises:
      ConfigError: If a place names none of the tokens that the deciding place names.
    """
    said = {place: ids for place, value in stated.items() if (ids := token_ids(place, value))}
    if not said:
        return () if default is None else (default,)
    ends, *_ = said.values()
    for ids in said.values():
        if ids != (default,) and not set(ids) & set(ends):
            raise _contradiction("eos_token_id", said)
    learnt = next(number for ids in reversed(said.values()) for number in ids if number in ends)
    return (learnt, *(number for number in ends if number != learnt))
