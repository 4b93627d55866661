"""Weights from files and from other models, loaded whole or not at all.

A file goes this way: `files` reads its arrays, `matching` gives each the path
of a weight here and checks that all fit, `model_paths` assigns them.

Some arguments of a network leave no trace in its arrays. Give them to the
builder:

    torchvision, 50 layers and more     bottleneck_stride="3x3"
    keras.applications                  batch_norm_epsilon=1.001e-5
    torch code for CIFAR, option A      shortcut=OptionA(zeros="both")
    TensorFlow's padding                padding="same"
    pre-activation networks that first
    normalize in their first unit       first_norm="unit"
"""

import math
import os
from collections.abc import Callable

import keras

from keras_resnet.weights import bounds
from keras_resnet.weights import files
from keras_resnet.weights import matching
from keras_resnet.weights import model_paths
from keras_resnet.weights.bounds import Arrays


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
    try:
        if rename is not None:
            arrays = _renamed(arrays, rename)
        matching.check_stacked(arrays)
        arrays = matching.canonical(arrays, shapes)
        matching.check_networks(arrays, shapes, is_file=True)
        arrays = matching.without_classifiers(arrays, shapes)
        matching.check_fit(arrays, shapes)
    except ValueError as error:
        raise ValueError(
            f"{os.fspath(path)} does not fit the model {model.name!r}: {error}"
        ) from None
    model_paths.assign(homes, arrays)


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


def imagenet_file(name: str, include_top: bool = True) -> str:
    """Returns the path of keras.applications' weights, downloaded once.

    Args:
        name: `"resnet50"`, `"resnet101"` or `"resnet152"`.
        include_top: Whether to take the file with the classifier.

    Returns:
        The path in Keras' cache of a file whose hash was checked.
    """
    # Keras' own module has the address and the hashes; importing it here
    # keeps them up to date.
    from keras.src.applications import resnet as published

    ending = "" if include_top else "_notop"
    file_name = f"{name}_weights_tf_dim_ordering_tf_kernels{ending}.h5"
    return keras.utils.get_file(
        file_name,
        published.BASE_WEIGHTS_PATH + file_name,
        cache_subdir="models",
        file_hash=published.WEIGHTS_HASHES[name][0 if include_top else 1],
    )


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
