"""Weights by name, by address on the hub or by file, as `weights=` takes them.

`known` returns what a name says without a download. `read` finds the file,
reads its arrays and recognizes its source. `assign` gives them to the network.
"""

import dataclasses
import math
import os

import keras
import numpy as np

from keras_resnet.specs import Spec
from keras_resnet.weights import bounds
from keras_resnet.weights import cards
from keras_resnet.weights import downloads
from keras_resnet.weights import files
from keras_resnet.weights import hub
from keras_resnet.weights import loading
from keras_resnet.weights import origins
from keras_resnet.weights import published
from keras_resnet.weights import shipped
from keras_resnet.weights.bounds import Arrays

# Bytes that a weight of a network may have in a file.
_BYTES = 8


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """Weights that were read.

    Attributes:
        path: The file.
        arrays: Its arrays, by their names in the file.
        origin: Their source, with the arguments that they decide.
    """

    path: str
    arrays: Arrays
    origin: origins.Origin


def known(
    spec: Spec, weights: str | os.PathLike | None, include_top: bool = True
) -> origins.Origin | None:
    """Returns the origin of named weights, or None for others.

    Raises:
        ValueError: If the name stands for weights of other networks only.
    """
    if not published.is_name(weights):
        return None
    row = published.find(spec.name, str(weights), include_top)
    return origins.of_row(row, spec)


def read(
    spec: Spec, weights: str | os.PathLike, include_top: bool = True
) -> Pretrained:
    """Returns weights with their arrays, downloaded if they are not here.

    Args:
        spec: The network.
        weights: A name, an address or a file.
        include_top: Whether the classifier is needed.

    Raises:
        ValueError: If there are no such weights, or the file is damaged.
        downloads.DownloadError: If they cannot be downloaded.
    """
    origin = known(spec, weights, include_top)
    if origin is not None:
        path = _path_of(origin.card)
        return Pretrained(path, _arrays(path), origin)
    if hub.is_address(weights):
        card = hub.read_card(str(weights), spec)
        path = hub.weights_file(str(weights))
        card = hub.with_digest(card, path)
        return Pretrained(path, _arrays(path), origins.of_row(card, spec))
    path = os.fspath(weights)
    arrays = _arrays(path)
    return Pretrained(path, arrays, origins.of_file(path, arrays, spec))


def _path_of(row: published.Card) -> str:
    if not row.url:
        return shipped.weights_file(row.network)
    return str(downloads.get(row.url, row.digest))


def _arrays(path: str) -> Arrays:
    return files.read(path, bounds.MOST_BYTES)


def find_downloaded(row: published.Card) -> str | None:
    """Returns the path of published weights on this machine, or None."""
    if not row.url:
        return shipped.weights_file(row.network)
    found = downloads.find(row.file_name, row.digest)
    return None if found is None else str(found)


def assign(
    model: keras.Model, given: Pretrained, replaces_classifier: bool
) -> list[str]:
    """Gives a network the weights, and their card.

    A classifier of another number of classes keeps its initial weights, if
    `replaces_classifier`. A stem of 3 channels is adapted to others, as timm
    does it: for 1 channel the kernels are summed; for n channels they repeat
    and are multiplied by 3 / n.

    Returns:
        A sentence about each weight that was not loaded as it is in the file.

    Raises:
        ValueError: If the weights do not fit.
    """
    notes: list[str] = []

    def adapted(arrays: Arrays, shapes: dict[str, tuple]) -> Arrays:
        arrays = dict(arrays)
        stem = "stem_conv/kernel"
        kernel, shape = arrays.get(stem), shapes.get(stem)
        if kernel is not None and shape is not None and kernel.ndim == 4:
            channels = shape[2]
            if kernel.shape[2] == 3 and channels != 3:
                how = "summed" if channels == 1 else "repeated"
                notes.append(f"{stem} was {how} for {channels} channels")
                arrays[stem] = of_channels(kernel, channels)
        dense = [f"predictions/{leaf}" for leaf in ("kernel", "bias")]
        if replaces_classifier and any(
            path in arrays
            and path in shapes
            and arrays[path].shape != shapes[path]
            for path in dense
        ):
            found = arrays[dense[0]].shape[-1] if dense[0] in arrays else "?"
            notes.append(
                f"predictions was not loaded: the file has {found} classes, "
                f"the model {shapes[dense[0]][-1]}"
            )
            for path in dense:
                arrays.pop(path, None)
        return arrays

    allowed = {"predictions/kernel", "predictions/bias"}
    loading.load_arrays(
        model,
        given.path,
        given.arrays,
        adapted=adapted,
        may_miss=allowed if replaces_classifier else set(),
    )
    cards.attach(model, given.origin.card)
    return notes


def of_channels(kernel: np.ndarray, channels: int) -> np.ndarray:
    """Returns a stem's kernel of 3 channels for another number, as timm.

    Args:
        kernel: `[size, size, 3, filters]`.
        channels: Number of channels.

    >>> float(of_channels(np.ones((7, 7, 3, 64)), 1)[0, 0, 0, 0])
    3.0
    >>> float(of_channels(np.ones((7, 7, 3, 64)), 4)[0, 0, 0, 0])
    0.75
    """
    if channels == 1:
        return kernel.sum(axis=2, keepdims=True)
    times = math.ceil(channels / 3)
    repeated = np.tile(kernel, (1, 1, times, 1))[:, :, :channels]
    return repeated * np.asarray(3 / channels, kernel.dtype)
