"""Images, folders and batches for tests of `keras_resnet.data`."""

import pathlib

import numpy as np
import tensorflow as tf

from keras_resnet.data import views
from tests import records

PHOTO = views.Preprocessing(
    224, 3, 256, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
)


def numpy_resize(image, height, width):
    """Bilinear with antialiasing, by its definition, one axis at a time."""

    def weights(old, new):
        scale = old / new
        centre = (np.arange(new)[:, None] + 0.5) * scale - 0.5
        distance = np.abs(np.arange(old) - centre) / max(scale, 1.0)
        triangle = np.maximum(1.0 - distance, 0.0)
        return triangle / triangle.sum(1, keepdims=True)

    rows = weights(image.shape[0], height)
    columns = weights(image.shape[1], width)
    return np.einsum("yh,xw,hwc->yxc", rows, columns, image.astype(float))


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def batches(dataset, count):
    return [
        tuple(array.numpy() for array in batch) for batch in dataset.take(count)
    ]


def assert_same(actual, expected):
    assert len(actual) == len(expected)
    for a, b in zip(actual, expected, strict=True):
        for x, y in zip(a, b, strict=True):
            np.testing.assert_array_equal(x, y)


def photos(test, colours=False, count=12):
    """folder:PATH of PNG files of several sizes, each unlike the others."""
    root = pathlib.Path(records.scratch(test))
    for i in range(count):
        height, width = 240 + 7 * (i % 5), 230 + 11 * (i % 3)
        image = np.full((height, width, 3), 20 * i, np.uint8)
        if not colours:
            image[..., 0] = np.linspace(0, 255, width)
        path = root / f"class_{i % 2}" / f"{i:02d}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(tf.io.encode_png(image).numpy())
    return f"folder:{root}"


def write_bytes(root, name, content):
    """Writes a file into a folder of a folder."""
    path = pathlib.Path(root) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path
