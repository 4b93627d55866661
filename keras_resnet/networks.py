"""One registry of networks: residual ones, plain ones and the baselines.

[1] He et al. 2016, "Deep Residual Learning for Image Recognition".

Training, tuning and the papers' experiments build networks by this registry,
so they do not depend on the kind of a network.
"""

import dataclasses
import functools
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from typing import Any

import keras

from keras_resnet import arguments as rules
from keras_resnet import baselines
from keras_resnet import models
from keras_resnet import names
from keras_resnet import specs
from keras_resnet.analysis import complexity
from keras_resnet.layers import identifiers


@dataclasses.dataclass(frozen=True, eq=False)
class Arguments(Mapping[str, Any]):
    """The arguments that choose a variant of a network, checked and immutable.

    A mapping from names to values, only of the arguments that were given.
    `Network.arguments` makes it.

    >>> given = {"shortcut": "exclusive_gating(gate_bias=-7)", "remat": True}
    >>> arguments = get_network("resnet20").arguments(given)
    >>> arguments["shortcut"].arguments
    (('gate_bias', -7.0),)
    """

    pairs: tuple[tuple[str, Any], ...] = ()

    def __getitem__(self, name: str) -> Any:
        return dict(self.pairs)[name]

    def __iter__(self) -> Iterator[str]:
        return iter(dict(self.pairs))

    def __len__(self) -> int:
        return len(self.pairs)

    def __hash__(self) -> int:
        return hash(frozenset(self.pairs))


def texts(arguments: Mapping[str, Any]) -> dict[str, str]:
    """Returns arguments of a network as `--set=model.NAME=VALUE` takes them.

    >>> given = {"shortcut": "exclusive_gating(gate_bias=-7)", "remat": True}
    >>> texts(get_network("resnet20").arguments(given))
    {'shortcut': 'exclusive_gating(gate_bias=-7.0)', 'remat': 'true'}
    """
    return {
        name: str(value).lower() if isinstance(value, bool) else str(value)
        for name, value in arguments.items()
    }


def to_json(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Returns arguments of a network as JSON has them.

    >>> to_json({"shortcut": identifiers.NamedShortcut("A"), "looped": None})
    {'shortcut': 'A', 'looped': None}
    """
    return {
        name: value.to_json()
        if isinstance(value, identifiers.NamedShortcut)
        else value
        for name, value in arguments.items()
    }


@dataclasses.dataclass(frozen=True)
class Network:
    """A network by name, with what can be asked of it.

    Attributes:
        name: Lower-case name.
        depth: Number of weighted layers, shortcuts not counted.
        build: Builds the network. It takes `input_shape`, `classes` and
            `classifier_activation`, as `keras_resnet.resnet`, and the arguments
            in `takes`.
        takes: The arguments that choose a variant, by name.
        check: Raises ValueError unless the network can have some arguments.
        multiply_adds: Counts the multiply-adds of a square image of three
            channels: `multiply_adds(image_size, classes, arguments)`. None
            for `classes` is the default of `build`.
        recipe: Name of the recipe that trains it on small images. None is the
            recipe that [1, Sec. 4.2] gives for its depth.
        companion_logits: Returns the weight and the logits of each companion
            classifier in the last call of a model (`baselines.Companion`).
    """

    name: str
    depth: int
    build: Callable[..., keras.Model]
    takes: Mapping[str, rules.Argument]
    check: Callable[[Mapping[str, Any]], None]
    multiply_adds: Callable[[int, int | None, Mapping[str, Any]], int]
    recipe: str | None = None
    companion_logits: Callable[[keras.Model], list[tuple[float, Any]]] = (
        lambda model: []
    )

    def parse(self, name: str, text: str) -> Any:
        """Returns the value of an argument from text, as on a command line.

        Raises:
            ValueError: If there is no such argument, or the text is not a
                value of its types.

        >>> get_network("resnet20").parse("survival_probability", "0.8")
        0.8
        """
        return self._argument(name, text).parse(text)

    def arguments(self, given: Mapping[str, Any]) -> Arguments:
        """Returns arguments as checked and immutable values.

        Args:
            given: Values by name. A shortcut is a text, the JSON of a
                `NamedShortcut` or one itself.

        Raises:
            ValueError: If the network does not take an argument or its value.
        """
        values = {
            name: self._argument(name, value).value(value)
            for name, value in given.items()
        }
        self.check(values)
        return Arguments(tuple(values.items()))

    def _argument(self, name: str, value: Any) -> rules.Argument:
        if not self.takes:
            raise ValueError(
                f"{self.name} takes no arguments, received {name}={value}"
            )
        if name not in self.takes:
            raise ValueError(names.unknown("model argument", name, self.takes))
        return self.takes[name]


def _check(spec: specs.Spec, given: Mapping[str, Any]) -> None:
    """Checks arguments of a residual network, those not given included."""
    defaults = {n: a.default for n, a in models.ARGUMENTS.items()}
    values = {**defaults, **given}
    for name in ("shortcut", "unit"):
        if values[name] is None:
            values[name] = getattr(spec, name)
    rules.check(spec, **values)


def _multiply_adds(
    spec: specs.Spec,
    image_size: int,
    classes: int | None,
    given: Mapping[str, Any],
) -> int:
    shortcut = given.get("shortcut")
    return complexity.spec_multiply_adds(
        spec,
        image_size,
        spec.classes if classes is None else classes,
        spec.shortcut if shortcut is None else shortcut.name,
        given.get("bottleneck_stride") or "1x1",
    )


def _built_multiply_adds(
    build: Callable[..., keras.Model],
    image_size: int,
    classes: int | None,
    given: Mapping[str, Any],
) -> int:
    chosen = {} if classes is None else {"classes": classes}
    model = build(input_shape=(image_size, image_size, 3), **chosen)
    return complexity.complexity(model)["multiply_adds"]


def get_network(name: str) -> Network:
    """Returns the network of `keras_resnet.MODELS` or `BASELINES`.

    Args:
        name: A name in either table. `"resnet20x2"` is ResNet-20 with twice as
            many filters.

    Raises:
        ValueError: If the name is unknown. The message suggests near names.

    >>> get_network("resnet20").depth, get_network("highway19").depth
    (20, 19)
    """
    row = baselines.BASELINES.get(name.lower())
    if row is not None:
        return Network(
            row.name,
            row.depth,
            row.build,
            {},
            lambda given: None,
            functools.partial(_built_multiply_adds, row.build),
            row.recipe,
            row.companion_logits,
        )
    spec = specs.get_spec(name)
    return Network(
        spec.name,
        spec.depth,
        functools.partial(models.resnet, spec),
        models.ARGUMENTS,
        functools.partial(_check, spec),
        functools.partial(_multiply_adds, spec),
    )


def build(name: str, **arguments) -> keras.Model:
    """Builds a network of `keras_resnet.MODELS` or `BASELINES`.

    Args:
        name: A name in either table.
        **arguments: `input_shape`, `classes`, `classifier_activation`, and the
            arguments that the network takes.

    Returns:
        A `keras.Model` from `[batch, height, width, channels]` to
        `[batch, classes]`.

    Raises:
        ValueError: If an argument has a value that is not allowed.

    >>> build("nin").count_params()
    966986
    """
    return get_network(name).build(**arguments)
