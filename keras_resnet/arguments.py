"""The rules for the arguments of a network.

`resnet` calls `check` before it makes a layer, and a configuration calls it
when it is parsed, so that both reject the same values. No rule makes a layer.
The rules of keras.applications have their messages too.
"""

import contextlib
import dataclasses
import inspect
import os
import re
import typing
import warnings
from collections.abc import Callable
from typing import Any

import keras

from keras_resnet import specs
from keras_resnet.layers import convolutions
from keras_resnet.layers import identifiers
from keras_resnet.layers import units
from keras_resnet.layers.normalization import EPSILON
from keras_resnet.layers.shortcuts import OptionA
from keras_resnet.weights import cards
from keras_resnet.weights import hub
from keras_resnet.weights import origins
from keras_resnet.weights import published

FIRST_NORMS = ("stem", "unit", "both")

#: The papers' values of the arguments that weights decide.
OF_PAPERS: dict[str, Any] = {
    "bottleneck_stride": units.STRIDES[0],
    "padding": convolutions.PADDINGS[0],
    "first_norm": FIRST_NORMS[0],
    "batch_norm_epsilon": EPSILON,
}

# Names with the rules of keras.applications: the classes and the image are
# those of the training. Other weights are adapted (`weights.pretrained`).
_PRETRAINED_CLASSES = {"imagenet": 1000, "cifar10": 10}


@dataclasses.dataclass(frozen=True)
class Argument:
    """An argument that chooses a variant of a network.

    Attributes:
        name: Name in the signature.
        types: Types of its values.
        default: Default in the signature.
        description: Description in the docstring, in one line.
    """

    name: str
    types: tuple[type, ...]
    default: Any
    description: str

    def parse(self, text: str) -> Any:
        """Returns the value that a text stands for, as on a command line.

        Raises:
            ValueError: If the text is not a value of the argument's types.

        >>> Argument("remat", (bool,), False, "").parse("true")
        True
        """
        if float in self.types:
            try:
                return float(text)
            except ValueError:
                raise ValueError(
                    f"{self.name} must be a number, received {text!r}"
                ) from None
        if bool in self.types:
            words = {"true": True, "false": False}
            if type(None) in self.types:
                words["none"] = None  # type: ignore[assignment]
            if text.lower() not in words:
                raise ValueError(
                    f"{self.name} must be true or false, received {text!r}"
                )
            return words[text.lower()]
        return self.value(text)

    def value(self, given: Any) -> Any:
        """Returns the immutable value of one that JSON or a caller gives.

        Raises:
            ValueError: If it is not a value of the argument's types.
        """
        if given is None and type(None) in self.types:
            return None
        if identifiers.NamedShortcut in self.types:
            if isinstance(given, identifiers.NamedShortcut):
                return given
            if isinstance(given, str):
                return identifiers.NamedShortcut.from_text(given)
            return identifiers.NamedShortcut.from_json(given)
        if float in self.types and type(given) is int:
            with contextlib.suppress(OverflowError):
                given = float(given)
        if type(given) not in self.types:
            allowed = " or ".join(
                kind.__name__
                for kind in self.types
                if kind in (str, bool, float)
            )
            raise ValueError(
                f"{self.name} must be of type {allowed}, received "
                f"{repr(given)[:100]}"
            )
        return given


def of(function: Callable) -> dict[str, Argument]:
    """Returns the keyword-only arguments of a function, as it describes them.

    The names and defaults are those of the signature, the types those of the
    annotations, the descriptions those of the docstring.
    """
    hints = typing.get_type_hints(function)
    docstring = inspect.getdoc(function) or ""
    found = {}
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is not parameter.KEYWORD_ONLY:
            continue
        description = re.search(
            rf"(?s)\n    {name}: (.*?)\n(?!        )", docstring
        )
        found[name] = Argument(
            name,
            typing.get_args(hints[name]) or (hints[name],),
            parameter.default,
            " ".join(description[1].split()) if description else "",
        )
    return found


def check(
    spec: specs.Spec,
    *,
    shortcut,
    unit,
    bottleneck_stride: str | None,
    padding: str | None,
    first_norm: str | None,
    survival_probability: float,
    **others,
) -> None:
    """Raises ValueError unless a network can have these arguments.

    The arguments are those of `keras_resnet.resnet`. For `others`, any value of
    their types is allowed.
    """
    unit_class = units.get(unit)
    units.check_survival_probability(survival_probability)
    identifiers.parse(shortcut)
    for name, value, allowed in (
        ("bottleneck_stride", bottleneck_stride, units.STRIDES),
        ("padding", padding, convolutions.PADDINGS),
        ("first_norm", first_norm, FIRST_NORMS),
    ):
        if value is not None and value not in allowed:
            raise ValueError(
                f"{name} must be one of {allowed}, received {value!r}"
            )
    first_norm = first_norm or "stem"
    if first_norm != "stem" and not unit_class.activates_first:
        raise ValueError(
            f"first_norm={first_norm!r} is for unit='pre_activation', whose "
            f"units normalize first, received {unit_class.__name__}"
        )
    if first_norm == "unit" and spec.stem == "imagenet":
        raise ValueError(
            "first_norm='unit' is for the stem 'cifar', received 'imagenet': "
            "its pooling needs an activated signal"
        )


def check_weights(
    spec: specs.Spec, weights, include_top: bool, classes: int
) -> None:
    """Raises ValueError unless a network has these weights.

    The arguments are those of `keras_resnet.resnet`.
    """
    if weights is None:
        return
    if published.is_name(weights):
        published.find(spec.name, weights, include_top)  # raises if none
        of_file = _PRETRAINED_CLASSES.get(str(weights), classes)
        if include_top and classes != of_file:
            raise ValueError(
                f"If using `weights={weights!r}` with `include_top=True`, "
                f"`classes` should be {of_file}.  Received classes={classes}"
            )
    elif not hub.is_address(weights) and not (
        isinstance(weights, str | os.PathLike) and os.path.exists(weights)
    ):
        raise ValueError(
            "The `weights` argument should be either `None` (random "
            "initialization), 'imagenet' (pre-training on ImageNet), "
            "'cifar10' (weights that ship with this package), another name of "
            "`keras_resnet.weights.list()`, an address 'hf://OWNER/NAME', or "
            f"the path to the weights file to be loaded.  Received: "
            f"weights={weights}"
        )


def as_trained(
    spec: specs.Spec,
    weights,
    origin: origins.Origin | None,
    *,
    unit,
    shortcut,
    **given,
) -> dict[str, Any]:
    """Returns the arguments of a network as its weights were trained.

    Args:
        spec: The network.
        weights: The argument of `keras_resnet.resnet`.
        origin: Where the weights come from, or None without weights.
        unit: The unit.
        shortcut: The shortcut, parsed (`identifiers.parse`). Option A without
            `zeros` gets those of the training.
        **given: Values of the arguments in `OF_PAPERS`, None if they are not
            given.

    Returns:
        `shortcut` and the arguments in `OF_PAPERS`.

    Raises:
        ValueError: If a given value contradicts the weights.
    """
    decided: dict[str, Any] = {}
    doubts: dict[str, str] = {}
    if origin is not None:
        decided, doubts = origin.decided, dict(origin.doubts)
        if origin.is_published:
            _check_row(spec, weights, unit, shortcut, decided)
    settled = {}
    for name, default in OF_PAPERS.items():
        value, trained = given[name], decided.get(name)
        if value is None:
            settled[name] = default if trained is None else trained
            continue
        settled[name] = value
        if trained is None or doubts.pop(name, ""):
            continue
        if not cards.is_same(name, trained, value):
            raise _contradiction(weights, name, trained, repr(value))
    settled["shortcut"] = _with_zeros(weights, shortcut, decided, doubts)
    if origin is not None:
        _warn(weights, origin, settled, doubts)
    return settled


def untraced(
    spec: specs.Spec, settings: dict[str, Any], first_norm: str
) -> dict[str, Any]:
    """Returns the arguments of a network that its arrays do not show.

    Args:
        spec: The network.
        settings: From `as_trained`, without `first_norm`.
        first_norm: As in `keras_resnet.resnet`.

    Returns:
        Values by the names of `weights.published.Details`.
    """
    found = {name: settings[name] for name in OF_PAPERS if name in settings}
    if not spec.bottleneck:
        del found["bottleneck_stride"]
    shortcut = identifiers.get(settings["shortcut"])
    if isinstance(shortcut, OptionA):
        found["zeros"] = shortcut.zeros
    return {**found, "first_norm": first_norm}


def _check_row(spec, weights, unit, shortcut, decided) -> None:
    """Raises ValueError unless published weights have this function."""
    row = specs.MODELS.get(spec.name, spec)
    if units.get(unit) is not units.get(row.unit):
        raise _contradiction(weights, "unit", row.unit, repr(unit))
    trained = row.shortcut
    if trained == "A" and decided["zeros"] != "end":
        trained = f"A(zeros={decided['zeros']!r})"
    open_zeros = isinstance(shortcut, identifiers.NamedShortcut) and (
        shortcut == identifiers.NamedShortcut("A") and row.shortcut == "A"
    )
    if not open_zeros and not identifiers.is_same(shortcut, trained):
        shown = repr(shortcut)
        if isinstance(shortcut, identifiers.NamedShortcut):
            shown = repr(str(shortcut))
        raise _contradiction(weights, "shortcut", trained, shown)


def _contradiction(weights, name, trained, shown) -> ValueError:
    return ValueError(
        f"`weights={os.fspath(weights)!r}` were trained with {name}="
        f"{trained!r}. Received: {name}={shown}"
    )


def _with_zeros(weights, shortcut, decided, doubts):
    """Returns a shortcut, option A with the zeros of the training."""
    is_named = isinstance(shortcut, identifiers.NamedShortcut)
    doubt = doubts.pop("zeros", None)
    if "zeros" not in decided or not (
        isinstance(shortcut, OptionA)
        or shortcut is OptionA
        or (is_named and shortcut.name == "A")
    ):
        return shortcut
    trained = decided["zeros"]
    if is_named and not shortcut.arguments:
        if doubt:
            doubts["zeros"] = doubt
        return identifiers.NamedShortcut("A", (("zeros", trained),))
    same = identifiers.NamedShortcut("A", (("zeros", trained),))
    if not doubt and not identifiers.is_same(shortcut, same):
        shown = repr(str(shortcut)) if is_named else repr(shortcut)
        raise _contradiction(weights, "shortcut", str(same), shown)
    return shortcut


def _warn(weights, origin, settled, doubts) -> None:
    """Warns about what a file leaves open, once."""
    if origin.note:
        warnings.warn(origin.note, stacklevel=5)  # the caller of a builder
    doubts = {name: text for name, text in doubts.items() if text}
    if doubts:
        taken = [
            f"shortcut={str(settled['shortcut'])!r}"
            if name == "zeros"
            else f"{name}={settled[name]!r}"
            for name in doubts
        ]
        warnings.warn(
            f"{os.fspath(weights)} has the names of {origin.card.source}. They "
            f"leave arguments open. It is read with {' and '.join(taken)}. "
            f"Give {' and '.join(doubts.values())}. Pass the argument to avoid "
            "this warning",
            stacklevel=5,
        )


def as_configured(shape: tuple) -> tuple:
    """Returns `(height, width, channels)` in the order that Keras is set to."""
    if keras.config.image_data_format() == "channels_first":
        return (shape[2], *shape[:2])
    return tuple(shape)


def input_shape(
    spec: specs.Spec, input_shape, weights, include_top: bool
) -> tuple[int | None, int | None, int]:
    """Returns `(height, width, channels)` by the rules of keras.applications.

    The arguments are those of `keras_resnet.resnet`.

    Raises:
        ValueError: If the network cannot take images of the shape.
    """
    if not input_shape:
        size = spec.image_size if include_top else None
        return (size, size, 3)
    if len(input_shape) != 3:
        raise ValueError("`input_shape` must be a tuple of three integers.")
    height, width, channels = input_shape
    if keras.config.image_data_format() == "channels_first":
        channels, height, width = input_shape
    if weights in _PRETRAINED_CLASSES:
        default_shape = as_configured((spec.image_size, spec.image_size, 3))
        if include_top and tuple(input_shape) != default_shape:
            raise ValueError(
                f"When setting `include_top=True` and loading `{weights}` "
                f"weights, `input_shape` should be {default_shape}.  "
                f"Received: input_shape={input_shape}"
            )
        if channels != 3:
            raise ValueError(
                "The input must have 3 channels; Received "
                f"`input_shape={input_shape}`"
            )
    elif channels not in (1, 3):
        warnings.warn(
            "This model usually expects 1 or 3 input channels. However, it "
            f"was passed an input_shape with {channels} input channels.",
            stacklevel=4,  # the caller of a builder
        )
    least = spec.stride
    if any(size is not None and size < least for size in (height, width)):
        raise ValueError(
            f"Input size must be at least {least}x{least}; Received: "
            f"input_shape={input_shape}"
        )
    if include_top and None in input_shape:
        raise ValueError(
            "If `include_top` is True, you should specify a static "
            f"`input_shape`. Received: input_shape={input_shape}"
        )
    return (height, width, channels)


def warn_of(weights, notes: list[str]) -> None:
    """Warns about weights that were not loaded as they are, once."""
    if notes:
        warnings.warn(
            f"{os.fspath(weights)}: {'; '.join(notes)}",
            stacklevel=4,  # the caller of a builder
        )


def check_pooling(pooling) -> None:
    """Raises ValueError for an unknown pooling.

    keras.applications ignores it.
    """
    if pooling not in (None, "avg", "max"):
        raise ValueError(
            "The `pooling` argument should be one of None, 'avg' or 'max'. "
            f"Received: pooling={pooling}"
        )


def check_activation(classifier_activation) -> None:
    """Raises ValueError for an activation that trained weights do not fit."""
    allowed = [keras.activations.get(a) for a in ("softmax", None)]
    classifier_activation = keras.activations.get(classifier_activation)
    if classifier_activation not in allowed:
        raise ValueError(
            "Only `None` and `softmax` activations are allowed for the "
            "`classifier_activation` argument when using pretrained weights, "
            "with `include_top=True`; Received: "
            f"classifier_activation={classifier_activation}"
        )
