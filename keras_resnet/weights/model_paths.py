"""Paths of a model's weights, such as `stage2_unit1/conv1/kernel`.

A looped network holds the weights of many units in one variable. Here each of
them has the path that it has in an unrolled network. The only network of a
model may have any name, and its paths leave that name out; the paths of several
networks start with their names.
"""

import collections
import re
from collections.abc import Iterable
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np

from keras_resnet.layers import UnitStack
from keras_resnet.weights.bounds import Arrays

Shapes = dict[str, tuple[int, ...]]
# Each variable with the path of its weight, or of those stacked in it.
Homes = list[tuple[Any, str | list[str]]]

# Layers that only a network of this package has.
OWN_LAYER = re.compile(
    r"(?:^|/)(?:stem_conv|stem_norm|stage\d+_(?:unit\d+|stack)|final_norm)/"
)


# --- Variables of a model ----------------------------------------------------


def unit_names(stack: UnitStack) -> list[str]:
    """Returns the names of a stack's units in an unrolled network.

    >>> from keras_resnet.layers import OriginalUnit
    >>> unit_names(UnitStack(OriginalUnit(16), 2, name="stage3_stack"))
    ['stage3_unit2', 'stage3_unit3']
    """
    stage = stack.name.removesuffix("_stack")
    return [f"{stage}_unit{i}" for i in range(2, stack.count + 2)]


def homes_of(model: keras.Model) -> Homes:
    """Returns each variable with the path of its weight, or of those in it.

    A weight that several layers share has the path of the first one.

    Raises:
        ValueError: If two weights have one path.
    """
    found: dict[int, tuple[Any, str | list[str]]] = {}
    for variable, paths in _variables(model):
        found.setdefault(id(variable), (variable, paths))
    every = [
        path
        for _, paths in found.values()
        for path in ([paths] if isinstance(paths, str) else paths)
    ]
    twice = [path for path, n in collections.Counter(every).items() if n > 1]
    if twice:
        raise ValueError(
            "model must have one weight of each name, received "
            f"{model.name!r}, which has several called {twice[0]}"
        )
    names = without_only_network(every)
    return [
        (
            variable,
            names[paths]
            if isinstance(paths, str)
            else [names[path] for path in paths],
        )
        for variable, paths in found.values()
    ]


def _variables(
    layer: keras.Layer, path: str = ""
) -> Iterator[tuple[Any, str | list[str]]]:
    """Yields the weights of a layer, by the names of the layers around them.

    Keras' own paths of weights leave out the names of models, so that two
    networks in one model share them.

    Args:
        layer: The layer.
        path: The names down to the layer, each followed by a slash.
    """
    if isinstance(layer, UnitStack):
        prefix = path.removesuffix(f"{layer.name}/")
        pattern = layer.pattern()
        parts = {id(variable): part for variable, part in _variables(pattern)}
        for home, variable in zip(
            layer.stacked, pattern.variables, strict=True
        ):
            part = parts.get(id(variable))  # None for a random state
            if part is not None:
                yield home, [f"{prefix}{u}/{part}" for u in unit_names(layer)]
        return
    inner = (
        layer.layers
        if isinstance(layer, keras.Model)
        else layer._flatten_layers(include_self=False, recursive=False)
    )
    inside = {id(weight) for part in inner for weight in part.weights}
    for weight in layer.weights:
        if id(weight) not in inside:
            yield weight, path + weight.name
    for part in inner:
        yield from _variables(part, f"{path}{part.name}/")


def shapes_of(homes: Homes) -> Shapes:
    """Returns the shape of each weight by its path."""
    shapes: Shapes = {}
    for variable, paths in homes:
        if isinstance(paths, str):
            shapes[paths] = tuple(variable.shape)
        else:
            shapes.update(dict.fromkeys(paths, tuple(variable.shape[1:])))
    return shapes


def arrays_of(homes: Homes) -> Arrays:
    """Returns the value of each weight by its path."""
    arrays: Arrays = {}
    for variable, paths in homes:
        value = keras.ops.convert_to_numpy(variable)
        arrays.update(
            zip(paths, value, strict=True)
            if isinstance(paths, list)
            else [(paths, value)]
        )
    return arrays


def assign(homes: Homes, arrays: Arrays) -> None:
    """Gives every variable the arrays of its paths."""
    for variable, paths in homes:
        value = (
            arrays[paths]
            if isinstance(paths, str)
            else np.stack([arrays[path] for path in paths])
        )
        variable.assign(keras.ops.cast(value, variable.dtype))


# --- Networks inside models --------------------------------------------------


def networks_in(paths: Iterable[str]) -> list[str]:
    """Returns the networks' prefixes: "" or the models around, "left/".

    >>> networks_in(["left/stem_conv/kernel", "right/stem_conv/kernel", "a/b"])
    ['left/', 'right/']
    """
    found: dict[str, None] = {}
    for path in paths:
        match = OWN_LAYER.search(path)
        if match:
            start = match.start()
            found[path[: start + 1] if path[start] == "/" else ""] = None
    return list(found)


def without_only_network(paths: Iterable[str]) -> dict[str, str]:
    """Returns the paths without the name of the only network.

    >>> without_only_network(["left/stem_conv/kernel", "top/kernel"])
    {'left/stem_conv/kernel': 'stem_conv/kernel', 'top/kernel': 'top/kernel'}
    """
    paths = list(paths)
    networks = networks_in(paths)
    if len(networks) != 1:
        return {path: path for path in paths}
    (network,) = networks
    inside = {p: p[len(network) :] for p in paths if p.startswith(network)}
    layers = {path.rpartition("/")[0] for path in inside.values()}
    return {
        # A network and the model around it may each have a classifier.
        path: inside.get(
            path, f"../{path}" if path.rpartition("/")[0] in layers else path
        )
        for path in paths
    }


def within(network: str, others: Iterable[str], entries: dict) -> dict:
    """Returns the entries of one network, by their paths in it.

    >>> within("left/", ["left/", "right/"], {"left/a": 1, "right/a": 2})
    {'a': 1}
    """
    others = [other for other in others if len(other) > len(network)]
    return {
        path[len(network) :]: entry
        for path, entry in entries.items()
        if path.startswith(network) and not path.startswith(tuple(others))
    }
