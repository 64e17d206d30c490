"""A configuration as a ConfigDict in which the command line can set each key.

ml_collections takes the type of a key from its value, and refuses other types. So "all" could not
become (0, 2), None could not become 1.5, and a part that is None has no keys at all. Here these
keys take any literal, and a part that is None has all its keys, none of them given.
"""

import dataclasses
import typing
from typing import Any

from ml_collections import ConfigDict, FieldReference


class NotGiven(ConfigDict):
    """An optional part that is None until one of its keys is set; the others have no value then."""

    def to_dict(self, *args, **kwargs) -> dict | None:
        """The keys that were set, or None if there are none."""
        given = {
            key: value
            for key, value in super().to_dict(*args, **kwargs).items()
            if value is not None
        }
        return given or None


def settable(config: Any) -> ConfigDict:
    """The ConfigDict of a dataclass; its `to_dict` gives what `dataclasses.asdict` does."""
    hints = typing.get_type_hints(type(config))
    names = [field.name for field in dataclasses.fields(config)]
    return ConfigDict({name: _settable(hints[name], getattr(config, name)) for name in names})


def _settable(hint: Any, value: Any) -> Any:
    options = typing.get_args(hint)
    if dataclasses.is_dataclass(value):
        given = settable(value)
        return _any_literal(given) if type(None) in options else given
    if isinstance(value, dict):
        return ConfigDict({key: _settable(options[1], item) for key, item in value.items()})
    if isinstance(value, tuple):
        value = tuple(_plain(item) for item in value)
    part = _part(hint)
    if value is None and part:
        return _any_literal(_not_given(part))
    is_union = typing.get_origin(hint) not in (None, tuple, dict)
    return _any_literal(value) if is_union else value


def _not_given(cls: type) -> NotGiven:
    keys: dict[str, FieldReference] = {}
    for name, hint in typing.get_type_hints(cls).items():
        part = _part(hint)
        if part:
            keys[name] = _any_literal(_not_given(part))
        elif hint in (bool, int, float, str):
            keys[name] = FieldReference(None, field_type=hint)
        else:
            keys[name] = _any_literal(None)
    return NotGiven(keys)


def _part(hint: Any) -> type | None:
    """The dataclass in a type annotation: `MoEConfig` or `MoEConfig | None`."""
    options = (hint, *typing.get_args(hint))
    return next((x for x in options if isinstance(x, type) and dataclasses.is_dataclass(x)), None)


def _plain(item: Any) -> Any:
    """An item of a tuple: dataclasses become dicts."""
    is_part = dataclasses.is_dataclass(item) and not isinstance(item, type)
    return dataclasses.asdict(item) if is_part else item


def _any_literal(value: Any) -> FieldReference:
    """A value in whose place the command line may put any other."""
    return FieldReference(value, field_type=object)
