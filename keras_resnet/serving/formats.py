"""A network in the formats of other runtimes than TensorFlow's.

    model.tflite  LiteRT, of phones and small computers; float32, or int8 with
                  activations whose ranges calibration images have shown
    model.onnx    ONNX Runtime and others; float32

Both take `images`, uint8 [batch, height, width, channels], and give
`probabilities`, float32 [batch, classes]; the preprocessing is inside.
"""

import contextlib
import logging
import os
import tempfile
import warnings
from collections.abc import Callable
from collections.abc import Iterator

import numpy as np
import tensorflow as tf

FILES = {"litert": "model.tflite", "onnx": "model.onnx"}
PRECISIONS = {"litert": ("float32", "int8"), "onnx": ("float32",)}

_ONNX_OPSET = 17  # of 2022: what runtimes of today read

Function = Callable[[np.ndarray], np.ndarray]


def check(formats: tuple[str, ...], precision: str) -> None:
    """Says what cannot be written, before anything is.

    Raises:
        ValueError: a format is unknown, has no such precision, or needs a
            package that is not installed.
    """
    for name in formats:
        if name not in ("saved_model", *FILES):
            raise ValueError(
                "a format must be one of saved_model, "
                f"{', '.join(FILES)}, received {name!r}"
            )
        if name in FILES and precision not in PRECISIONS[name]:
            raise ValueError(
                f"{name} is written in {' or '.join(PRECISIONS[name])}, "
                f"received the precision {precision}"
            )
    if "onnx" in formats:
        _onnx_packages()


def write_litert(
    path: str,
    answer: Callable[[tf.Tensor], tf.Tensor],
    images: tf.TensorSpec,
    calibration: np.ndarray | None = None,
) -> None:
    """Writes a network for LiteRT; its signature is `images`.

    Args:
        path: the file.
        answer: from images to probabilities, over constants.
        images: uint8, [None, height, width, channels], named "images".
        calibration: None for float32; for int8 some views, uint8 [count,
            height, width, channels].
    """

    def of_images(images):
        return {"probabilities": answer(images)}

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
    """The function of a file that `write_litert` wrote, in this process."""
    with without_notes():
        runner = tf.lite.Interpreter(path).get_signature_runner("images")
    return lambda images: runner(images=images)["probabilities"]


def write_onnx(
    path: str,
    answer: Callable[[tf.Tensor], tf.Tensor],
    images: tf.TensorSpec,
) -> None:
    """Writes a network for ONNX Runtime; the arguments of `write_litert`."""

    def of_images(images):
        return {"probabilities": answer(images)}

    tf2onnx, _ = _onnx_packages()
    with without_notes():
        tf2onnx.convert.from_function(
            tf.function(of_images, [images], autograph=False),
            [images],
            opset=_ONNX_OPSET,
            output_path=path,
        )


def onnx(path: str) -> Function:
    """The function of a file that `write_onnx` wrote, in this process."""
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
    """Without what TensorFlow says of its own converters and sessions.

    That tf.lite.Interpreter moves to another package, that the loader of
    sessions is deprecated, that an input of uint8 has no statistics.
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
    """Where a format stands in a version's directory."""
    return os.path.join(directory, FILES[name])
