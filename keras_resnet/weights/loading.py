"""Weights from files and from other models, loaded whole or not at all.

A file goes this way: `files` reads its arrays, `matching` gives each the path
of a weight here and checks that all fit, `model_paths` assigns them.

Some arguments of a network leave no trace in its arrays. A builder takes them
from the source of the file (`origins`). `load` gets a model that is built, and
warns if the model has others.
"""

import contextlib
import math
import os
import warnings
from collections.abc import Callable
from collections.abc import Collection
from collections.abc import Iterator

import keras

from keras_resnet.layers import OptionA
from keras_resnet.layers import UnitStack
from keras_resnet.layers import units
from keras_resnet.specs import Spec
from keras_resnet.weights import bounds
from keras_resnet.weights import cards
from keras_resnet.weights import files
from keras_resnet.weights import matching
from keras_resnet.weights import model_paths
from keras_resnet.weights import origins
from keras_resnet.weights.bounds import Arrays
from keras_resnet.weights.model_paths import Shapes


def load(
    model: keras.Model,
    path: str | os.PathLike,
    rename: Callable[[str], str] | None = None,
) -> None:
    """Gives the weights of `model` the values of a file.

    Weights are matched by name. If one array does not match, the model is left
    unchanged. There are two exceptions: a file with a classifier
    loads into a model without one, and biases of convolutions that batch
    normalization follows are folded into its moving mean.

    The only network of a file may have any name in the model. Several networks
    are matched by their names.

    A warning follows if the source of the file trained another function, such
    as a stride on another convolution. A builder does not need it: its
    `weights` argument builds the function of the source.

    Args:
        model: A network of this package, or a model with such networks inside.
        path: A `.weights.h5`, `.keras` or `.h5` file of such a network or of
            `keras.applications`' ResNet50, 101 or 152. Or a torch checkpoint
            (`.pth`, `.pt`, `.th`) or a `.safetensors` file with the names of
            torchvision, timm, transformers, pytorchcv or the usual code for
            CIFAR. The first bytes of the file determine its format.
        rename: Function from a name in the file to one of a known source, for
            files with other names.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged, of no known format, or fits another
            network: the message names the weight, its shape, and a network
            that fits.

    Example:

    >>> import os, tempfile, keras_resnet
    >>> trained, model = keras_resnet.ResNet20(), keras_resnet.ResNet20()
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = os.path.join(folder, "trained.weights.h5")
    ...     trained.save_weights(path)
    ...     load(model, path)
    >>> bool((model.weights[0].numpy() == trained.weights[0].numpy()).all())
    True
    """
    homes = model_paths.homes_of(model)
    shapes = model_paths.shapes_of(homes)
    needed = 8 * sum(math.prod(shape) for shape in shapes.values())
    arrays = files.read(path, max(bounds.MOST_BYTES, needed))
    if rename is not None:
        with _misfit(path, model):
            arrays = _renamed(arrays, rename)
    load_arrays(model, path, arrays)
    _describe(model, path, arrays)


def load_arrays(
    model: keras.Model,
    path: str | os.PathLike,
    arrays: Arrays,
    adapted: Callable[[Arrays, Shapes], Arrays] = lambda arrays, _: arrays,
    may_miss: Collection[str] = (),
) -> None:
    """Gives the weights of `model` the arrays of a file.

    Args:
        model: As in `load`.
        path: The file, for the messages.
        arrays: The arrays by their names in the file.
        adapted: Changes the arrays for the shapes of the model. Both have the
            paths of this package.
        may_miss: Paths of weights that keep their values if they are missing.

    Raises:
        ValueError: If the arrays fit another network.
    """
    homes = model_paths.homes_of(model)
    shapes = model_paths.shapes_of(homes)
    arrays = {
        name: array
        for name, array in arrays.items()
        if not name.endswith(f"/{cards.NETWORK}")
    }
    with _misfit(path, model):
        matching.check_stacked(arrays)
        arrays = matching.canonical(arrays, shapes)
        matching.check_networks(arrays, shapes, is_file=True)
        arrays = matching.without_classifiers(arrays, shapes)
        arrays = adapted(arrays, shapes)
        missing = [p for p in may_miss if p not in arrays]
        matching.check_fit(
            arrays, {p: s for p, s in shapes.items() if p not in missing}
        )
    model_paths.assign(
        [home for home in homes if home[1] not in missing], arrays
    )


@contextlib.contextmanager
def _misfit(path: str | os.PathLike, model: keras.Model) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(
            f"{os.fspath(path)} does not fit the model {model.name!r}: {error}"
        ) from None


def _describe(
    model: keras.Model, path: str | os.PathLike, arrays: Arrays
) -> None:
    """Attaches the card of a file, and warns about another function."""
    found = [
        layer.pattern() if isinstance(layer, UnitStack) else layer
        for layer in model._flatten_layers()
        if isinstance(layer, units.Unit | UnitStack)
    ]
    if not found:
        return
    unit = found[0]
    is_v2 = isinstance(unit, units.PreActivationUnit) and unit.activates_first
    kernel = model_paths.arrays_of(
        [h for h in model_paths.homes_of(model) if h[1] == "stem_conv/kernel"]
    ).get("stem_conv/kernel")
    if kernel is None:
        return  # several networks
    spec = Spec(
        model.name,
        (1,),
        (1,),
        bottleneck=unit.bottleneck,
        stem="imagenet" if kernel.shape[0] == 7 else "cifar",
        unit="pre_activation" if is_v2 else "original",
    )
    origin = origins.of_file(path, arrays, spec)
    cards.attach(model, origin.card)
    zeros = [
        part.shortcut.zeros
        for part in found
        if isinstance(part.shortcut, OptionA)
        and getattr(part, "changes_dimension", False)
    ]
    has = {
        "padding": unit.padding,
        "batch_norm_epsilon": unit.batch_norm_epsilon,
        **({"zeros": zeros[0]} if zeros else {}),
    }
    if unit.bottleneck:
        has["bottleneck_stride"] = unit.bottleneck_stride
    others = [
        f"{name}={origin.decided[name]!r} and not {value!r}"
        for name, value in has.items()
        if not cards.is_same(name, origin.decided.get(name, value), value)
    ]
    if others:
        warnings.warn(
            f"{os.fspath(path)} has the names of {origin.card.source}, which "
            f"has {', '.join(others)}: the model may be another function than "
            f"the one that was trained. Give the file to the builder: weights=",
            stacklevel=3,
        )


def copy(source: keras.Model, target: keras.Model) -> None:
    """Gives the weights of `target` the values of those of `source`.

    The two must be the same network, but may be looped and unrolled. Either may
    be a model with the network inside, under any name. Several networks in one
    model are matched by their names.

    Args:
        source: The model to copy from.
        target: The model to copy to.

    Raises:
        ValueError: If the two have different weights, or several networks
            with different names.

    Example:

    >>> import keras_resnet
    >>> looped = keras_resnet.ResNet20(looped=True)
    >>> unrolled = keras_resnet.ResNet20(looped=False)
    >>> copy(looped, unrolled)
    >>> image = keras.ops.ones((1, 32, 32, 3))
    >>> difference = keras.ops.abs(looped(image) - unrolled(image))
    >>> bool(keras.ops.max(difference) < 1e-5)
    True
    """
    arrays = model_paths.arrays_of(model_paths.homes_of(source))
    homes = model_paths.homes_of(target)
    shapes = model_paths.shapes_of(homes)
    try:
        matching.check_networks(arrays, shapes, is_file=False)
        matching.check_fit(arrays, shapes)
    except ValueError as error:
        raise ValueError(
            f"{source.name!r} does not fit the model {target.name!r}: {error}"
        ) from None
    model_paths.assign(homes, arrays)


def _renamed(arrays: Arrays, rename: Callable[[str], str]) -> Arrays:
    before: dict[str, str] = {}
    for name in arrays:
        new = rename(name)
        if new in before:
            raise ValueError(
                "rename must give every array of the file a name of its own, "
                f"received {new!r} for {before[new]!r} and for {name!r}"
            )
        before[new] = name
    return {new: arrays[name] for new, name in before.items()}
