"""Files of a network for LiteRT, with labels and preprocessing inside.

A file carries the metadata of LiteRT's own schema, version 1.0: a flatbuffer
with the identifier "M001" in the buffer "TFLITE_METADATA", and a ZIP archive at
the end of the file. The archive has

    labels.txt          one label a line, in the order of `probabilities`
    preprocessing.json  `data.Preprocessing.to_json`

Tools for phones read both, and `zipfile.ZipFile(path)` reads the archive.
"""

import io
import tempfile
import zipfile
from collections.abc import Callable
from collections.abc import Sequence

import flatbuffers
import numpy as np
import tensorflow as tf

from keras_resnet.serving.metadata import Metadata

LABELS = "labels.txt"
PREPROCESSING = "preprocessing.json"

_NAME = b"TFLITE_METADATA"
_IDENTIFIER = b"M001"
_UNKNOWN_FILE, _TENSOR_AXIS_LABELS = 0, 2  # AssociatedFileType
_IMAGE_PROPERTIES = 2  # ContentProperties
_RGB, _GRAYSCALE = 1, 2  # ColorSpaceType


def check_packages(precision: str) -> None:
    """Does nothing: TensorFlow has the converter and the runtime."""


def write(
    path: str,
    probabilities: Callable[[tf.Tensor], tf.Tensor],
    images: tf.TensorSpec,
    metadata: Metadata,
    calibration: np.ndarray | None = None,
) -> None:
    """Writes a network for LiteRT, with the signature `images`.

    Args:
        path: The file.
        probabilities: Function from images to probabilities, over constants.
        images: uint8 `[None, height, width, channels]`, named "images".
        metadata: Labels and preprocessing.
        calibration: None for float32. For int8, views as uint8 `[count,
            height, width, channels]`.
    """

    def of_images(images):
        return {"probabilities": probabilities(images)}

    with tempfile.TemporaryDirectory() as scratch:
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
        file.write(described(content, metadata))


def load(path: str) -> Callable[[np.ndarray], np.ndarray]:
    """Returns the function of a file of `write`, in this process."""
    runner = tf.lite.Interpreter(path).get_signature_runner("images")
    return lambda images: runner(images=images)["probabilities"]


def described(content: bytes, metadata: Metadata) -> bytes:
    """Returns a file of LiteRT with the metadata; it replaces earlier ones."""
    from tensorflow.lite.python import schema_py_generated as schema
    from tensorflow.lite.tools import flatbuffer_utils

    model = flatbuffer_utils.convert_bytearray_to_object(bytearray(content))
    buffer = schema.BufferT()
    buffer.data = np.frombuffer(_model_metadata(metadata), np.uint8)
    entry = schema.MetadataT()
    entry.name, entry.buffer = _NAME, len(model.buffers)
    model.buffers.append(buffer)
    others = [m for m in model.metadata or [] if m.name != _NAME]
    model.metadata = [*others, entry]
    archive = io.BytesIO()
    labels = "".join(f"{label}\n" for label in metadata.labels)
    with zipfile.ZipFile(archive, "w") as file:
        # ZipInfo has a fixed date, so that equal networks give equal files.
        file.writestr(zipfile.ZipInfo(LABELS), labels)
        file.writestr(
            zipfile.ZipInfo(PREPROCESSING), metadata.texts()["preprocessing"]
        )
    body = flatbuffer_utils.convert_object_to_bytearray(model)
    return bytes(body) + archive.getvalue()


def _model_metadata(metadata: Metadata) -> bytes:
    """The table ModelMetadata of LiteRT's metadata_schema.fbs, as bytes.

    The numbers are the places of the fields in the schema.
    """
    builder = flatbuffers.Builder()
    text = builder.CreateString
    is_grey = metadata.preprocessing.channels == 1
    color_space = _GRAYSCALE if is_grey else _RGB
    image = _table(builder, 2, {0: (builder.PrependInt8Slot, color_space)})
    content = _table(
        builder,
        3,
        {0: (builder.PrependUint8Slot, _IMAGE_PROPERTIES), 1: image},
    )
    size = metadata.preprocessing.image_size
    images = _table(
        builder,
        7,
        {
            0: text("images"),
            1: text(
                f"uint8 pixels of 0 to 255, {size} x {size}. The network "
                "normalizes them."
            ),
            3: content,
        },
    )
    labels = _associated_file(
        builder, LABELS, "One label of each class.", _TENSOR_AXIS_LABELS
    )
    probabilities = _table(
        builder,
        7,
        {
            0: text("probabilities"),
            1: text("The probability of each class."),
            6: _vector(builder, [labels]),
        },
    )
    graph = _table(
        builder,
        5,
        {
            2: _vector(builder, [images]),
            3: _vector(builder, [probabilities]),
        },
    )
    preprocessing = _associated_file(
        builder,
        PREPROCESSING,
        "How an image becomes a view, and how the network normalizes it.",
        _UNKNOWN_FILE,
    )
    model = _table(
        builder,
        8,
        {
            0: text("keras_resnet"),
            1: text("A residual network that classifies images."),
            3: _vector(builder, [graph]),
            6: _vector(builder, [preprocessing]),
            7: text("1.0.0"),
        },
    )
    builder.Finish(model, file_identifier=_IDENTIFIER)
    return bytes(builder.Output())


def _associated_file(builder, name: str, about: str, kind: int) -> int:
    fields = {
        0: builder.CreateString(name),
        1: builder.CreateString(about),
        2: (builder.PrependInt8Slot, kind),
    }
    return _table(builder, 5, fields)


def _table(builder, places: int, fields: dict) -> int:
    """Writes a table; a field is an offset, or a function and its value."""
    builder.StartObject(places)
    for place, field in fields.items():
        if isinstance(field, tuple):
            prepend, value = field
            prepend(place, value, 0)
        else:
            builder.PrependUOffsetTRelativeSlot(place, field, 0)
    return builder.EndObject()


def _vector(builder, offsets: Sequence[int]) -> int:
    builder.StartVector(4, len(offsets), 4)
    for offset in reversed(offsets):
        builder.PrependUOffsetTRelative(offset)
    return builder.EndVector()
