"""The requests that TensorFlow Serving asks a version before it serves it.

    <version>/assets.extra/tf_serving_warmup_requests

is a TFRecord file of PredictionLog, at most 1000: the first request of each
kind and batch size is slow, and these are it.

The messages are those of tensorflow_serving/apis, version 2.21, in protocol
buffers' wire format: an export then needs no package of TensorFlow Serving.
The numbers are the fields':

    PredictionLog          classify_log = 2, predict_log = 6
    ClassifyLog            request = 1
    PredictLog             request = 1
    ClassificationRequest  model_spec = 1, input = 2
    PredictRequest         model_spec = 1, inputs = 2
    ModelSpec              name = 1, signature_name = 3
    Input                  example_list = 1
    ExampleList            examples = 1
"""

import os
from collections.abc import Iterator
from collections.abc import Sequence

import numpy as np
import tensorflow as tf

PATH = os.path.join("assets.extra", "tf_serving_warmup_requests")
MAX_REQUESTS = 1000  # of a file, by TensorFlow Serving


def write(
    directory: str,
    model_name: str,
    image: np.ndarray,
    batch_sizes: Sequence[int],
) -> None:
    """Writes requests for every signature, of these batch sizes.

    Args:
        directory: of the version.
        model_name: what the requests call the model; the server that replays
            them does not look.
        image: one view, uint8 [height, width, channels].
        batch_sizes: as many images has a request; empty for no file.
    """
    if not batch_sizes:
        return
    path = os.path.join(directory, PATH)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with tf.io.TFRecordWriter(path) as file:
        for size in batch_sizes:
            for record in _requests(model_name, image, size):
                file.write(record)


def check(batch_sizes: Sequence[int]) -> None:
    """Says what is no batch size.

    Raises:
        ValueError: one is below 1, or there are too many.
    """
    for size in batch_sizes:
        if size < 1:
            raise ValueError(f"a batch size must be 1 or more, received {size}")
    allowed = MAX_REQUESTS // 4
    if len(batch_sizes) > allowed:
        raise ValueError(
            f"at most {allowed} batch sizes can be warmed up, four requests "
            f"each, received {len(batch_sizes)}"
        )


def _requests(model_name, image, size) -> Iterator[bytes]:
    encoded = tf.io.encode_png(image).numpy()
    images = np.repeat(image[None], size, 0)
    for signature, name, value in (
        ("serving_default", "image_bytes", [encoded] * size),
        ("images", "images", images),
        ("features", "images", images),
    ):
        tensor = tf.make_tensor_proto(value).SerializeToString()
        request = _model_spec(model_name, signature) + _field(
            2, _field(1, name.encode()) + _field(2, tensor)
        )
        yield _field(6, _field(1, request))
    feature = tf.train.Feature(bytes_list=tf.train.BytesList(value=[encoded]))
    example = tf.train.Example(
        features=tf.train.Features(feature={"image/encoded": feature})
    ).SerializeToString()
    request = _model_spec(model_name, "classify") + _field(
        2, _field(1, _field(1, example) * size)
    )
    yield _field(2, _field(1, request))


def _model_spec(name: str, signature: str) -> bytes:
    return _field(1, _field(1, name.encode()) + _field(3, signature.encode()))


def _field(number: int, content: bytes) -> bytes:
    """A field of bytes, text or a message."""
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _varint(number: int) -> bytes:
    """Seven bits a byte, the lowest first; the last byte is below 128.

    >>> _varint(300).hex()
    'ac02'
    """
    if number < 128:
        return bytes([number])
    return bytes([number % 128 + 128]) + _varint(number // 128)
