"""Small networks and images for the tests of exports."""

import base64
import os
import tempfile

import keras
import numpy as np
import tensorflow as tf

import keras_resnet
from keras_resnet.data import views
from keras_resnet.serving import examples
from tests import saved_models

CAT = os.path.join(os.path.dirname(__file__), "cat.png")
LABELS = ["red kite", "Gämse", "3", "lion", "yak"]

# Four squares of 8x8 pixels: red and green above, blue and white below.
SQUARES = np.zeros([16, 16, 3], np.uint8)
SQUARES[:8, :8, 0] = 255
SQUARES[:8, 8:, 1] = 255
SQUARES[8:, :8, 2] = 255
SQUARES[8:, 8:] = 255

# The same, written by another program (Pillow 13).
GIF = (  # the second of its two frames is upside down
    "R0lGODdhEAAQAIEAAP///wD/AP8AAAAA/ywAAAAAEAAQAAAIRgAFCBwoMIDBgwYJEkSIUOFA"
    "hgcdFoQYQKIAihUlYrS4USPFASBDggRAsiRJkSJNmkQZUmVJliNdAoA5QOZMmDZp5sQpMyAA"
    "IfkEAQAABAAsAAAAABAAEACB////AP8A/wAAAAD/CEYABwgcKBCAwYMGCRJEiFDhQIYHHRaE"
    "CEDiAIoVJWK0uFEjRQEgQ4IMQLIkSZEiTZpEGVJlSZYjXQaAKUDmTJg2aebEKTMgADs="
)
PALETTE_PNG = (
    "iVBORw0KGgoAAAANSUhEUgAAABAAAAAQAgMAAABinRfyAAAADFBMVEX///8A/wD/AAAAAP8X"
    "AUDqAAAAHUlEQVR4nGNcxbCagYmBgYEAwfD/PyElTAwMDAwAuZgDccdWlBQAAAAASUVORK5C"
    "YII="
)
WEBP = (
    "UklGRjYAAABXRUJQVlA4TCoAAAAvD8ADAB8gEEjeHzqN+RcQFPwf3fxHZA+AMNtokpOc5L3P"
    "IKL/UfrB9gE="
)
WEBP_WITH_EXIF = (
    "UklGRlIAAABXRUJQVlA4WAoAAAAIAAAADwAADwAAVlA4TCoAAAAvD8ADAB8gEEjeHzqN+RcQ"
    "FPwf3fxHZA+AMNtokpOc5L3PIKL/UfrB9gFFWElGAQAAAHgA"
)


def bmp(image):
    """Uncompressed, 24 bits, the lowest row first."""
    height, width, _ = image.shape
    header = (
        b"BM"
        + np.array(
            [54 + image.size, 0, 54, 40, width, height, 1 + (24 << 16)]
            + [0, image.size, 0, 0, 0, 0],
            "<u4",
        ).tobytes()
    )
    return header + image[::-1, :, ::-1].tobytes()


def encoded_squares():
    opaque = np.full([16, 16, 1], 255, np.uint8)
    return {
        "bmp": bmp(SQUARES),
        "gif": base64.b64decode(GIF),
        "jpeg": tf.io.encode_jpeg(
            SQUARES, quality=100, chroma_downsampling=False
        ).numpy(),
        "palette_png": base64.b64decode(PALETTE_PNG),
        "png": tf.io.encode_png(SQUARES).numpy(),
        "rgba_png": tf.io.encode_png(
            np.concatenate([SQUARES, opaque], -1)
        ).numpy(),
        "webp": base64.b64decode(WEBP),
        "webp_with_exif": base64.b64decode(WEBP_WITH_EXIF),
    }


def small_network(channels=3, activation="softmax", dtype="float32"):
    """A residual network of three units that tells images apart."""
    spec = keras_resnet.Spec(
        name="small",
        units=(1, 1, 1),
        filters=(4, 8, 16),
        stem="cifar",
        shortcut="A",
        classes=len(LABELS),
        image_size=16,
    )
    previous = keras.config.dtype_policy()
    keras.config.set_dtype_policy(dtype)
    try:
        model = keras_resnet.resnet(
            spec,
            input_shape=(16, 16, channels),
            classifier_activation=activation,
        )
    finally:
        keras.config.set_dtype_policy(previous)
    rng = np.random.default_rng(1)
    for weight in model.weights:
        fan_in = np.prod(weight.shape[:-1])
        value = rng.normal(0.0, fan_in**-0.5, weight.shape)
        if weight.name in ("gamma", "moving_variance"):
            value = rng.uniform(0.5, 1.5, weight.shape)
        weight.assign(value)
    # A classifier of standardized features: its answers are spread out.
    examples = small_preprocessing(channels)(images_of_noise(64, channels))
    features = np.asarray(pooled(model)(examples), np.float64)
    kernel, bias = model.get_layer("predictions").weights
    value = rng.normal(size=kernel.shape) / features.std(0).clip(0.05)[:, None]
    kernel.assign(value)
    bias.assign(-features.mean(0) @ value)
    return model


def pooled(model):
    return keras.Model(model.input, model.get_layer("pool").output)


def small_preprocessing(channels=3):
    mean = np.array([0.3, 0.5, 0.4], np.float32)[:channels]
    return views.Preprocessing(
        image_size=16,
        channels=channels,
        shorter_side=None,
        mean=mean,
        standard_deviation=np.array([0.2, 0.3, 0.25], np.float32)[:channels],
    )


def images_of_noise(count=3, channels=3):
    rng = np.random.default_rng(2)
    return rng.integers(0, 256, [count, 16, 16, channels], np.uint8)


def serialized(images):
    """tf.train.Example, as TensorFlow Serving's Classify sends it."""
    encoded = (tf.io.encode_png(image).numpy() for image in images)
    return np.array([examples.example(image) for image in encoded], object)


class Server:
    """Answers as the saved graph does, without a server's own checks."""

    def __init__(self, directory):
        self.session, self.signatures = saved_models.load(directory)

    def ask(self, signature, **inputs):
        names = self.signatures[signature]
        return self.session.run(
            {key: value.name for key, value in names.outputs.items()},
            {names.inputs[key].name: inputs[key] for key in inputs},
        )

    def ask_encoded(self, images):
        return self.ask("serving_default", image_bytes=np.array(images, object))


def served(test, path):
    server = Server(path)
    test.addCleanup(server.session.close)
    return server


def scratch(test):
    folder = tempfile.TemporaryDirectory()
    test.addCleanup(folder.cleanup)
    return folder.name
