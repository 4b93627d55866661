"""Networks from `.keras` files, which may come from strangers.

Keras builds a network from the file's configuration before it reads a weight.
The configuration can be deep, name code, or describe weights of any size. Here
both are checked first. Keras' safe mode is always on, so that no code in a file
runs, even if the session has enabled unsafe deserialization.
"""

import contextlib
import math
import os
import re
import sys
import threading
from collections.abc import Iterator
from typing import Any
from typing import Protocol

import keras
from keras.src.saving import serialization_lib

from keras_resnet import names
from keras_resnet.weights import archives
from keras_resnet.weights import bounds
from keras_resnet.weights import hdf5

_MEMBERS = {"config.json", "metadata.json", "model.weights.h5"}

_MOST_REASON = 200
_NUMBERS = re.compile(r"(u?int|b?float|complex)\d{1,3}|bool")

# The bound on new variables is one for the whole process.
_LOCK = threading.Lock()


def load(path: str | os.PathLike) -> keras.Model:
    """Loads a network without its optimizer.

    Args:
        path: A `.keras` file. Layers of its own must be registered with
            `keras.saving.register_keras_serializable`.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged, exceeds the bounds of this module,
            or describes anything but a network that Keras can build safely.
    """
    path = os.fspath(path)
    size = bounds.regular_size(path)
    try:
        with open(path, "rb") as file:
            stored_bytes = _check(file, size)
        with (
            bounded_variables(stored_bytes + bounds.FREE_ELEMENTS),
            serialization_lib.SafeModeScope(True),
        ):
            model = keras.models.load_model(path, compile=False)
        if not isinstance(model, keras.Model):
            raise ValueError(
                f"it must describe a network, received {type(model).__name__}"
            )
    except Exception as error:  # Keras raises nearly everything
        raise ValueError(
            f"{path} cannot be loaded as a network: {_reason(error)}"
        ) from error
    return model


def _check(file: Any, size: int) -> int:
    """Checks the archive, and returns the bytes of its weights."""
    with archives.opened(file, size) as archive:
        names = set(archive.namelist())
        if names - _MEMBERS:
            name = min(names - _MEMBERS)
            reason = ""
            if name.startswith("assets/"):
                reason = (
                    ", the file of a lookup layer: save the network of images "
                    "without that layer"
                )
            raise ValueError(
                f"it must hold {', '.join(sorted(_MEMBERS))} alone, received "
                f"{bounds.short(name)}{reason}"
            )
        config = archives.read(archive, "config.json", bounds.MOST_CONFIG_BYTES)
        _check_config(bounds.parse_json(config))
        contents = archives.read(archive, "model.weights.h5", sys.maxsize)
    return hdf5.array_bytes(contents)


def _check_config(config: dict[str, Any]) -> None:
    """Checks what a configuration describes, before Keras builds it."""
    layers = objects = 0
    pending: list[tuple[Any, int]] = [(config, 1)]
    while pending:
        value, depth = pending.pop()
        if depth > bounds.MOST_CONFIG_DEPTH:
            raise ValueError(
                "its configuration must be at most "
                f"{bounds.MOST_CONFIG_DEPTH} deep"
            )
        if isinstance(value, dict):
            if "class_name" in value:
                objects += 1
                _check_object(value)
            if isinstance(value.get("layers"), list):
                layers += len(value["layers"])
            pending += [(inner, depth + 1) for inner in value.values()]
        elif isinstance(value, list):
            pending += [(inner, depth + 1) for inner in value]
    if layers > bounds.MOST_LAYERS or objects > bounds.MOST_OBJECTS:
        raise ValueError(
            f"its configuration must have at most {bounds.MOST_LAYERS:,} "
            f"layers and {bounds.MOST_OBJECTS:,} objects, received "
            f"{layers:,} and {objects:,}"
        )


def _check_object(value: dict[str, Any]) -> None:
    """Checks the class of an object in a configuration, and its numbers."""
    name, module = value["class_name"], value.get("module")
    if not isinstance(name, str) or not isinstance(module, str | None):
        raise ValueError(
            f"a class must have a name, received {bounds.short(name)} of "
            f"{bounds.short(module)}"
        )
    is_of_keras = (module or "keras").partition(".")[0] == "keras"
    if name == "__lambda__" or (name == "Lambda" and is_of_keras):
        raise ValueError(
            "a network must not have a Lambda, since code in a file never "
            "runs: write a layer, register it by "
            "@keras.saving.register_keras_serializable(), and save the network "
            "again"
        )
    if name in ("__numpy__", "__tensor__"):
        inner = value.get("config")
        dtype = inner.get("dtype") if isinstance(inner, dict) else None
        if not isinstance(dtype, str) or not _NUMBERS.fullmatch(dtype):
            raise ValueError(
                f"an array must hold numbers, received {bounds.short(dtype)}"
            )


class TooManyWeightsError(ValueError):
    """A network of more weights than are allowed."""


class _Initialize(Protocol):
    def __call__(self, variable: Any, *args: Any, **kwargs: Any) -> None: ...


@contextlib.contextmanager
def bounded_variables(elements: int) -> Iterator[None]:
    """Bounds the elements of the variables that this thread creates.

    A variable takes its memory at once, and Keras cannot bound it. Other
    threads wait.

    Args:
        elements: Number of elements of all new variables together.

    Raises:
        TooManyWeightsError: From the variable that exceeds the bound.
    """
    thread = threading.get_ident()
    left = elements

    def bounded(
        variable: Any, initializer: Any, shape: Any = None, *args, **kwargs
    ) -> None:
        nonlocal left
        if shape is not None and threading.get_ident() == thread:
            left -= math.prod(int(size) for size in shape)
            if left < 0:
                raise TooManyWeightsError(
                    "its configuration must not describe more weights than "
                    "the file holds"
                )
        initialize(variable, initializer, shape, *args, **kwargs)

    with _LOCK:
        initialize: _Initialize = keras.Variable.__init__
        keras.Variable.__init__ = bounded
        try:
            yield
        finally:
            keras.Variable.__init__ = initialize


def _reason(error: Exception) -> str:
    """Returns an error's message without the configuration Keras quotes."""
    text = str(error)
    for start in ("Exception encountered: ", "Error when deserializing "):
        text = text.rpartition(start)[2]
    text = re.split(r"Full object config|Full config|config=", text)[0]
    text = names.escaped(" ".join(text.split())) or type(error).__name__
    return text if len(text) < _MOST_REASON else f"{text[:_MOST_REASON]}..."
