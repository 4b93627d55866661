"""Files of a network for runtimes other than TensorFlow.

    model.tflite  LiteRT, for phones and small computers; float32, or int8 with
                  ranges of activations that calibration images determine
    model.onnx    ONNX Runtime and others; float32

Both take `images`, uint8 [batch, height, width, channels], and return
`probabilities`, float32 [batch, classes]. The preprocessing is included.

`keras.Model.export(format=...)` calls the same converters, but on the model
alone. Clients would have to preprocess images, and the normalizations would not
be folded. The names would be Keras' own, and int8 would not be available.
"""

import contextlib
import logging
import os
import tempfile
import warnings
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence

import numpy as np
import tensorflow as tf

FILES = {"litert": "model.tflite", "onnx": "model.onnx"}
PRECISIONS = {"litert": ("float32", "int8"), "onnx": ("float32",)}

_ONNX_OPSET = 17  # of 2022; current runtimes read it

Function = Callable[[np.ndarray], np.ndarray]


def check_formats(formats: Sequence[str], precision: str) -> None:
    """Checks formats before anything is written.

    Raises:
        ValueError: If a format is unknown, does not have the precision, or
            needs a package that is not installed.

    >>> check_formats(["saved_model", "litert"], "int8")
    """
    for name in formats:
        if name not in ("saved_model", *FILES):
            raise ValueError(
                "a format must be one of saved_model, "
                f"{', '.join(FILES)}, received {name!r}"
            )
        if name in FILES and precision not in PRECISIONS[name]:
            raise ValueError(
                f"{name} must be written in {' or '.join(PRECISIONS[name])}, "
                f"received the precision {precision}"
            )
    if "onnx" in formats:
        _onnx_packages()


def write_litert(
    path: str,
    probabilities: Callable[[tf.Tensor], tf.Tensor],
    images: tf.TensorSpec,
    calibration: np.ndarray | None = None,
) -> None:
    """Writes a network for LiteRT, with the signature `images`.

    Args:
        path: The file.
        probabilities: Function from images to probabilities, over constants.
        images: uint8 `[None, height, width, channels]`, named "images".
        calibration: None for float32. For int8, views as uint8 `[count,
            height, width, channels]`.
    """

    def of_images(images):
        return {"probabilities": probabilities(images)}

    with tempfile.TemporaryDirectory() as scratch, without_notes():
        function = tf.function(of_images, [images], autograph=False)
        tf.saved_model.save(tf.Module(), scratch, {"images": function})
        converter = tf.lite.TFLiteConverter.from_saved_model(
            scratch, signature_keys=["images"]
        )
        if calibration is not None:
            converter.optimizations = [tf.lite.Optimize.DEFAULT]
            converter.representative_dataset = lambda: (
                {"images": view[None]} for view in calibration
            )
        content = converter.convert()
    with open(path, "wb") as file:
        file.write(content)


def litert(path: str) -> Function:
    """Returns the function of a file of `write_litert`, in this process."""
    with without_notes():
        runner = tf.lite.Interpreter(path).get_signature_runner("images")
    return lambda images: runner(images=images)["probabilities"]


def write_onnx(
    path: str,
    probabilities: Callable[[tf.Tensor], tf.Tensor],
    images: tf.TensorSpec,
) -> None:
    """Writes a network for ONNX Runtime; see `write_litert` for arguments."""

    def of_images(images):
        return {"probabilities": probabilities(images)}

    tf2onnx, _ = _onnx_packages()
    with without_notes():
        tf2onnx.convert.from_function(
            tf.function(of_images, [images], autograph=False),
            [images],
            opset=_ONNX_OPSET,
            output_path=path,
        )


def onnx(path: str) -> Function:
    """Returns the function of a file of `write_onnx`, in this process."""
    _, onnxruntime = _onnx_packages()
    session = onnxruntime.InferenceSession(
        path, providers=["CPUExecutionProvider"]
    )
    return lambda images: session.run(["probabilities"], {"images": images})[0]


def _onnx_packages():
    try:
        import onnxruntime
        import tf2onnx
    except ImportError as error:
        raise ValueError(
            f"onnx needs the package {error.name}: "
            "pip install onnxruntime tf2onnx"
        ) from error
    return tf2onnx, onnxruntime


@contextlib.contextmanager
def without_notes() -> Iterator[None]:
    """Silences TensorFlow's notes about its own converters and sessions.

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
    return os.path.join(directory, FILES[name])
