"""Files of a network for runtimes other than TensorFlow.

    model.tflite          LiteRT, for phones and small computers
                          (`serving.litert_files`)
    model.onnx            ONNX Runtime and others (`serving.onnx_files`)
    model.xml, model.bin  OpenVINO (`serving.openvino_files`)

All take `images`, uint8 [batch, height, width, channels], and return
`probabilities`, float32 [batch, classes]. The normalization is included, and
the labels and the preprocessing are in the file's metadata. In int8, the
kernels and activations are int8, with ranges of the activations that
calibration images determine.

`keras.Model.export(format=...)` calls the same converters, but on the model
alone. Clients would have to normalize images, and the normalizations would not
be folded. The names would be Keras' own, and int8 would not be available.
"""

import contextlib
import logging
import os
import warnings
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from keras_resnet.serving import litert_files
from keras_resnet.serving import onnx_files
from keras_resnet.serving import openvino_files
from keras_resnet.serving.metadata import Metadata

Function = Callable[[np.ndarray], np.ndarray]


class Format(NamedTuple):
    """A format beside the SavedModel.

    Attributes:
        file: Name of the file in a version's directory.
        precisions: Precisions of an export that the format has.
        runtime: Package that runs the file.
        module: Module with `check_packages`, `write` and `load`.
    """

    file: str
    precisions: tuple[str, ...]
    runtime: str
    module: ModuleType


FORMATS = {
    "litert": Format(
        "model.tflite", ("float32", "int8"), "tensorflow", litert_files
    ),
    "onnx": Format(
        "model.onnx", ("float32", "int8"), "onnxruntime", onnx_files
    ),
    "openvino": Format(
        "model.xml", ("float32", "int8"), "openvino", openvino_files
    ),
}


def check_formats(formats: Sequence[str], precision: str) -> None:
    """Checks formats before anything is written.

    Raises:
        ValueError: If a format is unknown, does not have the precision, or
            needs a package that is not installed.

    >>> check_formats(["saved_model", "litert"], "int8")
    """
    for name in formats:
        if name == "saved_model":
            continue
        if name not in FORMATS:
            raise ValueError(
                "a format must be one of saved_model, "
                f"{', '.join(FORMATS)}, received {name!r}"
            )
        precisions = FORMATS[name].precisions
        if precision not in precisions:
            raise ValueError(
                f"{name} must be written in {' or '.join(precisions)}, "
                f"received the precision {precision}"
            )
        FORMATS[name].module.check_packages(precision)


def write(
    name: str,
    directory: str,
    probabilities: Callable[[tf.Tensor], tf.Tensor],
    images: tf.TensorSpec,
    metadata: Metadata,
    calibration: np.ndarray | None = None,
) -> None:
    """Writes the file of a format.

    Args:
        name: A key of `FORMATS`.
        directory: The directory of the version.
        probabilities: Function from images to probabilities, over constants.
        images: uint8 `[None, height, width, channels]`, named "images".
        metadata: Labels and preprocessing.
        calibration: None for float32. For int8, views as uint8 `[count,
            height, width, channels]`.
    """
    with without_notes():
        FORMATS[name].module.write(
            path(directory, name), probabilities, images, metadata, calibration
        )


def load(name: str, directory: str) -> Function | None:
    """Returns the function of a format's file, or None without its runtime.

    Args:
        name: A key of `FORMATS`.
        directory: The directory of the version.
    """
    with without_notes():
        return FORMATS[name].module.load(path(directory, name))


@contextlib.contextmanager
def without_notes() -> Iterator[None]:
    """Silences notes of TensorFlow and of the converters about themselves.

    They say that tf.lite.Interpreter moves to another package, that the loader
    of sessions is deprecated, and that a uint8 input lacks statistics.
    """
    logger = tf.get_logger()
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def path(directory: str, name: str) -> str:
    """Returns the path of a format in a version's directory."""
    return os.path.join(directory, FORMATS[name].file)
