"""Warm-up requests, which TensorFlow Serving runs before it serves a version.

    <version>/assets.extra/tf_serving_warmup_requests

is a TFRecord file of at most 1000 PredictionLog messages. The first request of
each signature and batch size is slow, and these requests take its place.

The messages are those of tensorflow_serving.apis, version 2.21, written in the
wire format of protocol buffers. That package is an optional extra: an export
must not depend on it, and a second writer that uses it would double this code.
The tests read the file with the official messages. The fields are:

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

from keras_resnet.serving import examples

PATH = os.path.join("assets.extra", "tf_serving_warmup_requests")
MAX_REQUESTS = 1000  # in a file; a limit of TensorFlow Serving


def write(
    directory: str,
    model_name: str,
    image: np.ndarray,
    batch_sizes: Sequence[int],
) -> None:
    """Writes a request to each signature for each batch size.

    Args:
        directory: Directory of the version.
        model_name: Name of the model in the requests; a server ignores it.
        image: A view, uint8 `[height, width, channels]`.
        batch_sizes: Numbers of images in a request; empty for no file.
    """
    if not batch_sizes:
        return
    path = os.path.join(directory, PATH)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with tf.io.TFRecordWriter(path) as file:
        for size in batch_sizes:
            for record in _requests(model_name, image, size):
                file.write(record)


def check_batch_sizes(batch_sizes: Sequence[int]) -> None:
    """Checks the batch sizes of warm-up requests.

    Raises:
        ValueError: If one is below 1, or if there are too many.

    >>> check_batch_sizes([1, 32])
    """
    for size in batch_sizes:
        if size < 1:
            raise ValueError(f"a batch size must be 1 or more, received {size}")
    allowed = MAX_REQUESTS // 4
    if len(batch_sizes) > allowed:
        raise ValueError(
            f"warm-up must have at most {allowed} batch sizes, four requests "
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
    example = examples.example(encoded)
    request = _model_spec(model_name, "classify") + _field(
        2, _field(1, _field(1, example) * size)
    )
    yield _field(2, _field(1, request))


def _model_spec(name: str, signature: str) -> bytes:
    # The name may be that of a directory, and not UTF-8.
    encoded = name.encode(errors="replace")
    return _field(1, _field(1, encoded) + _field(3, signature.encode()))


def _field(number: int, content: bytes) -> bytes:
    """A field with bytes, text or a message."""
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _varint(number: int) -> bytes:
    """Seven bits a byte, the lowest first; the last byte is below 128.

    >>> _varint(300).hex()
    'ac02'
    """
    if number < 128:
        return bytes([number])
    return bytes([number % 128 + 128]) + _varint(number // 128)
