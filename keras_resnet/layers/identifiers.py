"""Shortcuts by name, as text, JSON and immutable values."""

import ast
import dataclasses
import inspect
from typing import Any

import keras

from keras_resnet import names
from keras_resnet.layers.shortcuts import SHORTCUTS
from keras_resnet.layers.shortcuts import Shortcut

_SET_BY_UNIT = {
    "name",
    "trainable",
    "dtype",
    "stride",
    "batch_norm",
    "batch_norm_momentum",
    "batch_norm_epsilon",
}


@dataclasses.dataclass(frozen=True)
class NamedShortcut:
    """A shortcut of `SHORTCUTS` with its arguments, as an immutable value.

    It describes a shortcut without a layer, so it can be compared, hashed and
    stored in JSON. `get` makes the layer.

    Attributes:
        name: A key of `SHORTCUTS`.
        arguments: Names and values of arguments that are given.

    Raises:
        ValueError: If the name is unknown, or the shortcut has no such
            argument, or its value is not allowed.

    >>> gate = NamedShortcut.from_text("exclusive_gating(gate_bias=-7)")
    >>> gate.to_json()
    {'name': 'exclusive_gating', 'gate_bias': -7.0}
    >>> str(gate)
    'exclusive_gating(gate_bias=-7.0)'
    """

    name: str
    arguments: tuple[tuple[str, Any], ...] = ()

    def __post_init__(self):
        if self.name not in SHORTCUTS:
            raise ValueError(_unknown(self.name))
        kind = SHORTCUTS[self.name]
        allowed = _arguments(kind)
        try:
            given = {
                name: _as(allowed[name].annotation, value)
                for name, value in self.arguments
            }
            kind.check(**given)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            text = self._text(self.arguments)
            raise ValueError(_misfit(self.name, text)) from error
        object.__setattr__(self, "arguments", tuple(given.items()))

    def __str__(self) -> str:
        return self._text(self.arguments)

    def _text(self, arguments) -> str:
        if not arguments:
            return self.name
        values = ", ".join(f"{name}={value!r}" for name, value in arguments)
        return f"{self.name}({values})"

    @classmethod
    def from_text(cls, text: str) -> "NamedShortcut":
        """Parses a name, or a name with arguments: `"A(zeros='both')"`."""
        name, parenthesis, rest = text.partition("(")
        if name not in SHORTCUTS:
            raise ValueError(_unknown(text))
        if not parenthesis:
            return cls(name)
        try:
            call = ast.parse(f"f({rest}", mode="eval").body
            if not (
                isinstance(call, ast.Call)
                and isinstance(call.func, ast.Name)  # not f(...)(...)
                and not call.args
            ):
                raise SyntaxError(text)
            given = tuple(
                (str(keyword.arg), ast.literal_eval(keyword.value))
                for keyword in call.keywords
            )
        except (SyntaxError, TypeError, ValueError) as error:
            raise ValueError(_misfit(name, text)) from error
        return cls(name, given)

    def to_json(self) -> str | dict[str, Any]:
        """Returns the name, or an object of the name and the arguments."""
        if not self.arguments:
            return self.name
        return {"name": self.name, **dict(self.arguments)}

    @classmethod
    def from_json(cls, value: Any) -> "NamedShortcut":
        """Returns the shortcut of `to_json`."""
        fields = {"name": value} if isinstance(value, str) else value
        if not isinstance(fields, dict) or not isinstance(
            fields.get("name"), str
        ):
            raise ValueError(_unknown(value))
        return cls(
            fields["name"],
            tuple((k, v) for k, v in fields.items() if k != "name"),
        )

    def layer(self) -> Shortcut:
        """Returns a new layer with these arguments."""
        return SHORTCUTS[self.name](**dict(self.arguments))


def _arguments(kind: type[Shortcut]) -> dict[str, inspect.Parameter]:
    """Returns the parameters of a shortcut that its unit does not set."""
    parameters = inspect.signature(kind.__init__).parameters
    return {
        name: parameter
        for name, parameter in parameters.items()
        if name not in _SET_BY_UNIT
        and name != "self"
        and parameter.kind is not parameter.VAR_KEYWORD
    }


def _as(kind: Any, value: Any) -> Any:
    """Returns a value of the annotated type of an argument."""
    if kind is float and type(value) is int:
        value = float(value)
    if kind in (bool, float, int, str) and type(value) is not kind:
        raise TypeError(f"expected {kind.__name__}, received {value!r}")
    return value


def _unknown(identifier) -> str:
    return (
        f"shortcut must be one of {', '.join(SHORTCUTS)} or an instance of "
        f"keras_resnet.layers.Shortcut, received {identifier!r}"
        + names.hint(str(identifier), SHORTCUTS)
    )


def _misfit(name: str, text: str) -> str:
    allowed = ", ".join(sorted(_arguments(SHORTCUTS[name]))) or "nothing"
    return (
        f"shortcut {name} takes {allowed}, as in {name}(argument=value), "
        f"received {text!r}"
    )


def parse(identifier):
    """Returns an identifier, as `get` takes it, with its text parsed.

    Raises:
        ValueError: If the identifier is unknown.

    >>> parse("A")
    NamedShortcut(name='A', arguments=())
    """
    if isinstance(identifier, dict):
        identifier = keras.saving.deserialize_keras_object(identifier)
    if isinstance(identifier, str):
        identifier = NamedShortcut.from_text(identifier)
    if not isinstance(identifier, NamedShortcut | Shortcut) and not (
        isinstance(identifier, type) and issubclass(identifier, Shortcut)
    ):
        raise ValueError(_unknown(identifier))
    return identifier


def get(identifier, **settings) -> Shortcut:
    """Returns a new shortcut from a name, class, config or instance.

    Args:
        identifier: A key of `SHORTCUTS`, with or without arguments
            (`"exclusive_gating(gate_bias=-7)"`), a `NamedShortcut`, a subclass
            of `Shortcut`, the dict of a serialized shortcut, or an instance.
            The configuration of an instance is copied, because units do not
            share shortcuts.
        **settings: Arguments that the unit sets (`stride`, `name`, `dtype`,
            `batch_norm`, ...). Arguments that the shortcut does not have are
            ignored.

    Returns:
        A shortcut that is not built yet.

    Raises:
        ValueError: If the identifier is unknown.

    >>> from keras_resnet.layers import ExclusiveGating
    >>> get(ExclusiveGating(gate_bias=-7.0), stride=2).gate_bias
    -7.0
    """
    identifier = parse(identifier)
    if isinstance(identifier, NamedShortcut):
        identifier = identifier.layer()
    elif isinstance(identifier, type):
        identifier = identifier()
    config = identifier.get_config()
    config.update({k: v for k, v in settings.items() if k in config})
    return type(identifier).from_config(config)


def is_same(identifier, other) -> bool:
    """Whether two identifiers, as `get` takes them, are one function.

    >>> from keras_resnet.layers import OptionA
    >>> is_same(OptionA(), "A"), is_same("A(zeros='both')", "A")
    (True, False)
    """
    return _function(identifier) == _function(other)


def _function(identifier) -> tuple[type[Shortcut], dict[str, Any]]:
    """Returns the class of a shortcut and all its arguments."""
    identifier = parse(identifier)
    kind, given = type(identifier), {}
    if isinstance(identifier, NamedShortcut):
        kind, given = (
            SHORTCUTS[identifier.name],
            dict(identifier.arguments),
        )
    elif isinstance(identifier, Shortcut):
        given = identifier.get_config()
    else:
        kind = identifier
    defaults = {n: p.default for n, p in _arguments(kind).items()}
    return kind, {name: given.get(name, defaults[name]) for name in defaults}
