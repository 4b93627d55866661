"""The fields of a dataclass in JSON and in text, checked by their types."""

import dataclasses
import json
import typing
from collections.abc import Mapping
from typing import Any


def check_fields(types: Mapping[str, Any], fields: dict) -> None:
    """Checks that fields from JSON have the names and types of a dataclass.

    Args:
        types: The types by name.
        fields: The values by name.

    Raises:
        TypeError: If a field is missing or unknown.
        ValueError: If a value does not have the type of its field.
    """
    missing = sorted(types.keys() - fields.keys())
    unknown = sorted(fields.keys() - types.keys())
    if missing or unknown:
        raise TypeError(
            f"missing fields: {', '.join(missing) or 'none'}; "
            f"unknown fields: {', '.join(unknown)[:200] or 'none'}"
        )
    for name, value in fields.items():
        if not _is_of(value, types[name]):
            raise ValueError(
                f"{name} must be of type "
                f"{getattr(types[name], '__name__', types[name])}, received "
                f"{repr(value)[:100]}"
            )


def _is_of(value, kind):
    """Whether a value from JSON fits the type of a field."""
    arguments = typing.get_args(kind)
    if kind == Mapping[str, Any]:
        return isinstance(value, dict)
    if kind == tuple[int, ...]:
        return isinstance(value, list | tuple) and all(
            type(element) is int for element in value
        )
    if kind == dict[str, float]:
        return isinstance(value, dict) and all(
            type(number) in (int, float) for number in value.values()
        )
    if arguments:  # a type or None
        return any(_is_of(value, argument) for argument in arguments)
    if kind is float:
        return type(value) in (int, float)
    if dataclasses.is_dataclass(kind):
        return isinstance(value, dict)
    return type(value) is kind


def parse(kind, text: str):
    """Returns a value of a field's type from text."""
    try:
        if kind is str:
            return text
        if kind is bool:
            return {"true": True, "false": False}[text.lower()]
        value = json.loads(text if text != "None" else "null")
        if kind == tuple[int, ...]:
            value = value if isinstance(value, list) else [value]
            if all(type(v) is int for v in value):
                return tuple(value)
        elif kind == dict[str, float]:
            if isinstance(value, dict):
                return value
        elif value is None and type(None) in typing.get_args(kind):
            return None
        elif (kind is int or int in typing.get_args(kind)) and (
            type(value) is int
        ):
            return value
        elif (kind is float or float in typing.get_args(kind)) and (
            type(value) in (int, float)
        ):
            return float(value)
    except (KeyError, ValueError):
        pass
    name = getattr(kind, "__name__", str(kind))
    raise ValueError(f"expected a value of type {name}, received {text!r}")
