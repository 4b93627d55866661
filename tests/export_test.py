"""Exported signatures are asked the way a server asks them.

Truth is the Keras model itself, called on the same pixels.
"""

import base64
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from unittest import mock

import keras
import numpy as np
import pytest
import tensorflow as tf
from absl.testing import absltest
from absl.testing import parameterized
from tensorflow.core.protobuf import saved_model_pb2

import keras_resnet
from keras_resnet.data import datasets
from keras_resnet.data import limits
from keras_resnet.data import views
from keras_resnet.serving import client
from keras_resnet.serving import export as export_lib
from keras_resnet.serving import folding
from keras_resnet.serving import sources
from keras_resnet.serving import versions
from keras_resnet.serving import warmup
from keras_resnet.weights import shipped
from tests import programs
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
    return np.array(
        [
            tf.train.Example(
                features=tf.train.Features(
                    feature={
                        "image/encoded": tf.train.Feature(
                            bytes_list=tf.train.BytesList(
                                value=[tf.io.encode_png(image).numpy()]
                            )
                        )
                    }
                )
            ).SerializeToString()
            for image in images
        ],
        object,
    )


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


class SignatureTest(parameterized.TestCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.model = small_network()
        cls.preprocessing = small_preprocessing()
        folder = tempfile.TemporaryDirectory()
        cls.addClassCleanup(folder.cleanup)
        cls.export_dir = os.path.join(folder.name, "new", "exported")
        cls.path = export_lib.export(
            cls.model, cls.preprocessing, LABELS, cls.export_dir
        )
        cls.server = Server(cls.path)
        cls.addClassCleanup(cls.server.session.close)

    def probabilities(self, images):
        return np.asarray(self.model(self.preprocessing(images)))

    def features(self, images):
        return np.asarray(pooled(self.model)(self.preprocessing(images)))

    def test_first_version_is_1_and_stands_alone(self):
        self.assertEqual(self.path, os.path.join(self.export_dir, "1"))
        self.assertEqual(os.listdir(self.export_dir), ["1"])

    def test_images_get_the_probabilities_of_the_model(self):
        images = images_of_noise()
        answer = self.server.ask("images", images=images)
        self.assertEqual(set(answer), {"probabilities", "classes"})
        np.testing.assert_allclose(
            answer["probabilities"], self.probabilities(images), atol=1e-4
        )

    def test_classes_are_the_most_probable_labels(self):
        images = images_of_noise(50)
        best = self.probabilities(images).argmax(-1)
        self.assertGreater(len(set(best)), 1)
        answer = self.server.ask("images", images=images)
        self.assertEqual(
            [name.decode() for name in answer["classes"]],
            [LABELS[index] for index in best],
        )

    def test_features_are_those_before_the_classifier(self):
        images = images_of_noise()
        answer = self.server.ask("features", images=images)
        self.assertEqual(set(answer), {"features"})
        self.assertEqual(answer["features"].shape, (3, 16))
        np.testing.assert_allclose(
            answer["features"], self.features(images), rtol=1e-4
        )

    @parameterized.named_parameters(
        (k, v) for k, v in encoded_squares().items()
    )
    def test_encoded_image_gets_the_answer_of_its_pixels(self, image_bytes):
        answer = self.server.ask_encoded([image_bytes, image_bytes])
        expected = self.probabilities(SQUARES[None])
        upside_down = self.probabilities(SQUARES[None, ::-1])
        self.assertGreater(np.abs(expected - upside_down).max(), 0.02)
        np.testing.assert_allclose(
            answer["probabilities"], np.repeat(expected, 2, 0), atol=2e-3
        )

    def test_examples_get_every_label_with_its_score(self):
        images = images_of_noise()
        answer = self.server.ask("classify", inputs=serialized(images))
        self.assertEqual(
            [[c.decode() for c in row] for row in answer["classes"]],
            [LABELS] * 3,
        )
        np.testing.assert_allclose(
            answer["scores"], self.probabilities(images), atol=1e-4
        )

    def test_signatures_have_the_method_names_that_a_server_asks_for(self):
        names = {
            name: signature.method_name
            for name, signature in self.server.signatures.items()
            if not name.startswith("__")
        }
        self.assertEqual(
            names,
            {
                "serving_default": "tensorflow/serving/predict",
                "images": "tensorflow/serving/predict",
                "features": "tensorflow/serving/predict",
                "classify": "tensorflow/serving/classify",
            },
        )

    def test_card_says_what_the_network_is_and_how_it_was_checked(self):
        card = export_lib.read_card(self.path)
        self.assertEqual(card["network"]["name"], "small")
        self.assertEqual(
            card["network"]["parameters"],
            sum(np.prod(w.shape) for w in self.model.trainable_weights),
        )
        self.assertEqual(
            card["checked_on"], "64 stand-in images (bundled digits)"
        )
        check = card["checks"]["saved_model"]
        self.assertEqual((check["images"], check["same_class"]), (64, 64))
        self.assertEqual(card["max_pixels"], limits.MAX_PIXELS)
        self.assertEqual(card["precision"], "float32")
        self.assertEqual(
            views.Preprocessing.from_json(
                json.dumps(card["preprocessing"])
            ).mean.tolist(),
            self.preprocessing.mean.tolist(),
        )
        with open(os.path.join(self.path, export_lib.CARD)) as file:
            self.assertRegex(file.read(), r'"mean": \[.*\],\n')  # on one line
        for name, digest in card["sha256"].items():
            with open(os.path.join(self.path, name), "rb") as file:
                content = file.read()
            self.assertEqual(hashlib.sha256(content).hexdigest(), digest)
        self.assertContainsSubset(
            {"saved_model.pb", "assets/labels.txt", warmup.PATH}, card["sha256"]
        )

    def test_images_of_several_formats_go_into_one_batch(self):
        batch = list(encoded_squares().values())
        answer = self.server.ask_encoded(batch)
        self.assertEqual(answer["probabilities"].shape, (len(batch), 5))

    @parameterized.parameters(b"", b"no image", bmp(SQUARES)[:200])
    def test_what_is_no_image_is_an_invalid_argument(self, image_bytes):
        with self.assertRaises(tf.errors.InvalidArgumentError):
            self.server.ask_encoded([image_bytes])

    def test_inputs_and_outputs_have_the_promised_types(self):
        def described(tensors):
            return {
                key: (
                    tf.as_dtype(value.dtype).name,
                    [d.size for d in value.tensor_shape.dim],
                )
                for key, value in tensors.items()
            }

        signatures = {
            name: (described(s.inputs), described(s.outputs))
            for name, s in self.server.signatures.items()
            if not name.startswith("__")
        }
        images = {"images": ("uint8", [-1, 16, 16, 3])}
        answer = {
            "probabilities": ("float32", [-1, 5]),
            "classes": ("string", [-1]),
        }
        self.assertEqual(
            signatures,
            {
                "serving_default": (
                    {"image_bytes": ("string", [-1])},
                    answer,
                ),
                "images": (images, answer),
                "features": (images, {"features": ("float32", [-1, 16])}),
                "classify": (
                    {"inputs": ("string", [-1])},
                    {
                        "classes": ("string", [-1, 5]),
                        "scores": ("float32", [-1, 5]),
                    },
                ),
            },
        )

    def test_labels_are_an_asset(self):
        path = os.path.join(self.path, "assets", "labels.txt")
        with open(path, encoding="utf-8") as file:
            self.assertEqual(file.read(), "red kite\nGämse\n3\nlion\nyak\n")

    def test_another_user_can_read_it(self):
        umask = os.umask(0)
        os.umask(umask)
        mode = os.stat(self.path).st_mode & 0o777
        self.assertEqual(mode, 0o777 & ~umask)

    def test_saved_model_cli_without_keras_gets_the_answers_of_the_model(self):
        folder = scratch(self)
        images = images_of_noise()
        encoded = [tf.io.encode_png(image).numpy() for image in images]
        np.save(os.path.join(folder, "images.npy"), images)
        np.save(os.path.join(folder, "image_bytes.npy"), np.array(encoded))
        # An array of bytes loses the zeros at the end of its elements.
        examples = np.array(serialized(images).tolist())
        self.assertEqual(examples.tolist(), serialized(images).tolist())
        np.save(os.path.join(folder, "inputs.npy"), examples)
        script = """
import sys
sys.modules["keras"] = sys.modules["keras_resnet"] = None  # not importable
from tensorflow.python.tools import saved_model_cli
directory = sys.argv.pop()
for signature, name in (
    ("serving_default", "image_bytes"), ("images", "images"),
    ("features", "images"), ("classify", "inputs"),
):
    sys.argv[1:] = [
        "run", f"--dir={directory}", "--tag_set=serve",
        f"--signature_def={signature}", f"--inputs={name}={name}.npy",
        f"--outdir={signature}"]
    try:
        saved_model_cli.main()
    except SystemExit as end:
        assert not end.code, end.code
"""
        subprocess.run(
            [sys.executable, "-c", script, self.path],
            cwd=folder,
            check=True,
            capture_output=True,
        )
        for signature, output, expected in (
            ("serving_default", "probabilities", self.probabilities),
            ("images", "probabilities", self.probabilities),
            ("features", "features", self.features),
            ("classify", "scores", self.probabilities),
        ):
            np.testing.assert_allclose(
                np.load(os.path.join(folder, signature, output + ".npy")),
                expected(images),
                atol=1e-4,
            )

    def test_next_export_is_the_next_version(self):
        export_dir = scratch(self)
        for version in ("7", "notes"):
            os.mkdir(os.path.join(export_dir, version))
        path = export_lib.export(
            self.model, self.preprocessing, LABELS, export_dir
        )
        self.assertEqual(path, os.path.join(export_dir, "8"))

    def test_version_that_stands_is_not_replaced(self):
        with self.assertRaisesRegex(FileExistsError, "next free one is 2"):
            export_lib.export(
                self.model, self.preprocessing, LABELS, self.export_dir, 1
            )
        self.assertEqual(os.listdir(self.export_dir), ["1"])


class VariantTest(parameterized.TestCase):
    def test_grey_network_takes_grey_and_coloured_images(self):
        model, preprocessing = small_network(1), small_preprocessing(1)
        path = export_lib.export(model, preprocessing, LABELS, scratch(self))
        server = served(self, path)
        images = images_of_noise(2, channels=1)
        expected = np.asarray(model(preprocessing(images)))
        for signature, inputs in {
            "images": {"images": images},
            "serving_default": {
                "image_bytes": np.array(
                    [
                        tf.io.encode_png(images[0]).numpy(),
                        # The grey of three equal colours is that colour.
                        bmp(np.repeat(images[1], 3, -1)),
                    ],
                    object,
                )
            },
        }.items():
            answer = server.ask(signature, **inputs)
            np.testing.assert_allclose(
                answer["probabilities"], expected, atol=2e-3
            )

    @parameterized.parameters("mixed_bfloat16", "float16")
    def test_network_of_another_policy_is_exported_in_float32(self, policy):
        model = small_network(dtype=policy)
        reference = small_network()
        reference.set_weights(model.get_weights())
        path = export_lib.export(
            model,
            small_preprocessing(),
            LABELS,
            scratch(self),
        )
        images = images_of_noise()
        answer = served(self, path).ask("images", images=images)
        np.testing.assert_allclose(
            answer["probabilities"],
            np.asarray(reference(small_preprocessing()(images))),
            atol=1e-4,
        )

    def test_images_above_the_pixel_limit_are_refused(self):
        path = export_lib.export(
            small_network(),
            small_preprocessing(),
            LABELS,
            scratch(self),
            max_pixels=256,
        )
        images = [SQUARES, np.zeros([1, 257, 3], np.uint8)]
        fits, large = (tf.io.encode_png(image).numpy() for image in images)
        server = served(self, path)
        server.ask_encoded([fits])
        with self.assertRaisesRegex(
            tf.errors.InvalidArgumentError, "at most 256 pixels"
        ):
            server.ask_encoded([large])

    @parameterized.parameters(True, False)
    def test_network_on_another_one_is_exported(self, is_nested):
        """As docs/fine_tuning.md builds it, and on Keras' own pooling."""
        base = keras.Model(
            (whole := small_network()).input,
            whole.get_layer("pool" if is_nested else "stage3_unit1").output,
        )
        x = image = keras.Input((8, 8, 1))
        x = keras.layers.RandomFlip()(x * 2.0 - 1.0)
        x = keras.layers.UpSampling2D(2, interpolation="bilinear")(x)
        x = keras.layers.Concatenate()([x, x, x])
        features = base(x)
        if not is_nested:
            features = keras.layers.GlobalAveragePooling2D()(features)
        classify = keras.layers.Dense(5, "softmax")
        model = keras.Model(image, classify(features))
        preprocessing = views.Preprocessing(8, 1, None, [0.5], [0.2])
        path = export_lib.export(model, preprocessing, LABELS, scratch(self))
        images = images_of_noise(3, channels=1)[:, :8, :8]
        server = served(self, path)
        inputs = preprocessing(images)
        np.testing.assert_allclose(
            server.ask("images", images=images)["probabilities"],
            model(inputs, training=False),
            atol=1e-4,
        )
        expected = np.asarray(
            keras.Model(image, features)(inputs, training=False)
        )
        np.testing.assert_allclose(
            server.ask("features", images=images)["features"],
            expected,
            atol=1e-4 * np.abs(expected).max(),
        )

    def test_pixels_and_several_ways_to_hold_them_are_exported(self):
        """Integers, and dicts of one image and one output."""
        base = small_network()
        image = keras.Input((16, 16, 3), dtype="uint8", name="pixels")
        x = keras.ops.cast(keras.ops.cast(image, "int32") // 3, "float32")
        x = base(keras.layers.Rescaling(1 / 30)(x))
        model = keras.Model({"pixels": image}, {"p": x})
        preprocessing = views.Preprocessing(
            16, 3, None, [0.0] * 3, [1 / 255] * 3
        )
        path = export_lib.export(model, preprocessing, LABELS, scratch(self))
        images = images_of_noise()
        np.testing.assert_allclose(
            served(self, path).ask("images", images=images)["probabilities"],
            model({"pixels": images})["p"],
            atol=1e-4,
        )

    def test_pixels_that_need_no_preprocessing_are_not_rounded(self):
        preprocessing = views.Preprocessing(
            16, 3, None, [0.0] * 3, [1 / 255] * 3
        )
        pixels = np.arange(768).reshape([1, 16, 16, 3]) % 256
        np.testing.assert_array_equal(preprocessing(pixels), pixels)


class SourceTest(parameterized.TestCase):
    """What is known of weights that others made is used."""

    def test_weights_that_ship_have_their_mean_and_their_labels(self):
        source = sources.of_model("resnet20", "cifar10")
        self.assertEqual(source.labels[3], "cat")
        self.assertIsNone(source.preprocessing.shorter_side)
        np.testing.assert_array_equal(source.preprocessing.mean, shipped.mean())
        with open(CAT, "rb") as file:
            view = source.preprocessing.decode(tf.constant(file.read()))
        (row,) = np.asarray(source.model(source.preprocessing(view[None])))
        self.assertEqual(source.labels[row.argmax()], "cat")
        self.assertGreater(row.max(), 0.99)

    def test_labels_of_the_weights_that_ship_can_be_others(self):
        names = [f"class {i}" for i in range(10)]
        source = sources.of_model("resnet20", "cifar10", labels=names)
        self.assertEqual(source.labels, names)

    @parameterized.parameters(".weights.h5", ".keras")
    def test_files_of_keras_applications_see_what_they_were_trained_on(
        self, ending
    ):
        shape = (224, 224, 3)
        theirs = keras.applications.ResNet50(
            weights=None, input_shape=shape, classes=5
        )
        path = os.path.join(scratch(self), "theirs" + ending)
        save = theirs.save if ending == ".keras" else theirs.save_weights
        save(path)
        arguments = {"batch_norm_epsilon": 1.001e-5}
        source = sources.of_model(
            "resnet50", path, arguments, labels=list("abcde")
        )
        images = np.random.default_rng(0).integers(0, 256, (1, *shape))
        images = images.astype("float32")
        prepared = keras.applications.resnet.preprocess_input(images.copy())
        np.testing.assert_allclose(
            source.model(source.preprocessing(images)),
            theirs(prepared),
            atol=1e-5,
        )
        source = sources.of_model(
            "resnet50", path, arguments, labels=list("abcde"), mean=[0.5] * 3
        )
        np.testing.assert_allclose(
            source.model(source.preprocessing(images)),
            theirs(images / 255.0 - 0.5),
            atol=1e-5,
        )

    @parameterized.parameters("caffe", "tf", "torch", "cifar10", "none")
    def test_preprocessing_that_is_stated_is_that_of_preprocess_input(
        self, name
    ):
        rng = np.random.default_rng(0)
        pixels = rng.integers(0, 256, (2, 32, 32, 3)).astype("float32")
        image = keras.Input((32, 32, 3))
        x = image[:, ::4, ::4] * keras.ops.array([1.0, 2.0, 3.0])
        x = keras.layers.Flatten()(x) / 1000.0
        model = keras.Model(image, keras.ops.softmax(x))
        path = os.path.join(scratch(self), "model.keras")
        model.save(path)
        source = sources.of_model(path, preprocessing=name)
        expected = pixels
        if name != "none":
            expected = keras_resnet.preprocess_input(pixels, name)
        np.testing.assert_allclose(
            source.model(source.preprocessing(pixels)),
            model(expected),
            rtol=1e-3,
        )

    @parameterized.named_parameters(
        ("nothing", lambda x: x, False),
        ("pixels_to_1", keras.layers.Rescaling(1 / 255), True),
        ("pixels_to_2", keras.layers.Rescaling(1 / 127.5, -1.0), True),
        ("from_0_to_1", keras.layers.Rescaling(2.0, -1.0), False),
        (
            "standardized",
            keras.layers.Normalization(mean=120, variance=9),
            True,
        ),
        ("of_1", keras.layers.Normalization(mean=0.4, variance=0.1), False),
        (
            "behind_augmentation",
            lambda x: keras.layers.Rescaling(1 / 255)(
                keras.layers.RandomFlip()(x)
            ),
            True,
        ),
        (
            "behind_weights",
            lambda x: keras.layers.Rescaling(1 / 255)(
                keras.layers.Conv2D(3, 1)(x)
            ),
            False,
        ),
        (
            "nested",
            keras.Sequential(
                [keras.Input((16, 16, 3)), keras.layers.Rescaling(1 / 255)]
            ),
            True,
        ),
    )
    def test_layers_in_front_tell_that_a_network_takes_pixels(
        self, layer, expected
    ):
        image = keras.Input((16, 16, 3))
        x = keras.layers.Conv2D(2, 3)(layer(image))
        self.assertEqual(sources._takes_pixels(keras.Model(image, x)), expected)

    def test_preprocessing_that_contradicts_what_is_known(self):
        with self.assertRaisesRegex(sources.ArgumentError, "must be cifar10"):
            sources.of_model("resnet20", "cifar10", preprocessing="torch")


class PrecisionTest(parameterized.TestCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        folder = tempfile.TemporaryDirectory()
        cls.addClassCleanup(folder.cleanup)
        cls.folder = folder.name
        cls.model = small_network()
        cls.paths = {}

    def exported(self, precision):
        """A version of the network, of each precision one."""
        if precision not in self.paths:
            self.paths[precision] = export_lib.export(
                self.model,
                small_preprocessing(),
                LABELS,
                self.folder,
                precision=precision,
            )
        return self.paths[precision]

    def test_signatures_in_bfloat16_answer_nearly_as_the_model(self):
        server = served(self, self.exported("bfloat16"))
        images = images_of_noise(20)
        inputs = small_preprocessing()(images)
        probabilities = np.asarray(self.model(inputs))
        features = np.asarray(pooled(self.model)(inputs))
        encoded = [tf.io.encode_png(image).numpy() for image in images]
        for answer in (
            server.ask("images", images=images),
            server.ask_encoded(encoded),
        ):
            error = np.abs(answer["probabilities"] - probabilities)
            self.assertBetween(error.max(), 1e-5, 0.2)
            self.assertEqual(
                [name.decode() for name in answer["classes"]],
                [LABELS[i] for i in answer["probabilities"].argmax(-1)],
            )
        error = server.ask("features", images=images)["features"] - features
        self.assertBetween(np.abs(error).max() / features.max(), 1e-5, 0.05)

    @parameterized.parameters("float32", "bfloat16")
    def test_graph_has_neither_variables_nor_normalizations(self, precision):
        path = self.exported(precision)
        with open(os.path.join(path, "saved_model.pb"), "rb") as file:
            saved = saved_model_pb2.SavedModel.FromString(file.read())
        graph = saved.meta_graphs[0].graph_def
        nodes = list(graph.node)
        for function in graph.library.function:
            nodes.extend(function.node_def)
        used = {node.op for node in nodes}
        self.assertContainsSubset({"Conv2D", "BiasAdd"}, used)
        self.assertNotIn("FusedBatchNormV3", used)
        variables = {
            tf.as_dtype(node.attr["dtype"].type)
            for node in nodes
            if node.op == "VarHandleOp"
        }
        # TensorFlow itself keeps the name of a file in one.
        self.assertContainsSubset(variables, {tf.string})
        kernels = [
            tf.as_dtype(node.attr["dtype"].type).name
            for node in nodes
            if node.op == "Const"
            and len(node.attr["value"].tensor.tensor_shape.dim) == 4
        ]
        self.assertEqual(kernels, [precision] * 7)

    def test_kernels_of_int8_are_near_those_of_the_model(self):
        path = self.exported("int8")
        images = images_of_noise(20)
        inputs = small_preprocessing()(images)
        features = np.asarray(pooled(self.model)(inputs))
        error = served(self, path).ask("features", images=images)["features"]
        error = np.abs(error - features).max() / features.max()
        self.assertBetween(error, 1e-5, 0.05)
        with open(os.path.join(path, "saved_model.pb"), "rb") as file:
            saved = saved_model_pb2.SavedModel.FromString(file.read())
        kernels = [
            tf.as_dtype(node.attr["dtype"].type).name
            for function in saved.meta_graphs[0].graph_def.library.function
            for node in function.node_def
            if node.op == "Const"
            and len(node.attr["value"].tensor.tensor_shape.dim) == 4
        ]
        self.assertEqual(kernels, ["int8"] * 7)

    def test_errors_on_images_with_labels_are_on_the_card(self):
        views = images_of_noise(70)
        model = small_network()
        best = np.argmax(model(small_preprocessing()(views)), -1)
        labels = np.where(np.arange(70) < 7, (best + 1) % 5, best)
        path = export_lib.export(
            model,
            small_preprocessing(),
            LABELS,
            scratch(self),
            images=export_lib.Images(views, labels, source="70 of noise"),
            about={"recipe": {"steps": 3}, "network": {"shortcut": "A"}},
        )
        card = export_lib.read_card(path)
        check = card["checks"]["saved_model"]
        self.assertEqual((check["top1_errors"], check["images"]), (7, 70))
        self.assertAlmostEqual(check["top1_error"], 10.0)
        self.assertEqual(card["checked_on"], "70 of noise")
        self.assertEqual(card["recipe"], {"steps": 3})
        self.assertEqual(card["network"]["shortcut"], "A")

    @parameterized.parameters("bfloat16", "int8")
    def test_precision_that_classes_otherwise_is_not_published(self, precision):
        def of_the_next_class(model, precision="float32"):
            copy = keras.models.clone_model(model)
            copy.set_weights(model.get_weights())
            for weight in copy.get_layer("predictions").weights:
                weight.assign(np.roll(weight.numpy(), 1, -1))
            return fold(copy, precision)

        fold = folding.fold
        export_dir = scratch(self)
        with (
            mock.patch.object(folding, "fold", of_the_next_class),
            self.assertRaisesRegex(
                export_lib.DisagreementError, "nothing was exported"
            ),
        ):
            export_lib.export(
                small_network(),
                small_preprocessing(),
                LABELS,
                export_dir,
                precision=precision,
            )
        self.assertEmpty(os.listdir(export_dir))

    def test_looped_network_is_exported(self):
        spec = keras_resnet.Spec(
            name="looped",
            units=(2, 3),
            filters=(4, 8),
            stem="cifar",
            classes=len(LABELS),
            image_size=16,
        )
        model = keras_resnet.resnet(spec, looped=True)
        path = export_lib.export(
            model, small_preprocessing(), LABELS, scratch(self)
        )
        images = images_of_noise()
        np.testing.assert_allclose(
            served(self, path).ask("images", images=images)["probabilities"],
            model(small_preprocessing()(images)),
            atol=1e-4,
        )


def family(name, image_size, **arguments):
    spec = keras_resnet.MODELS.get(name) or keras_resnet.Spec(
        name, (2, 3), (8, 16), stem="cifar", image_size=image_size
    )
    shape = (image_size, image_size, 3)
    return keras_resnet.resnet(
        spec, input_shape=shape, classes=len(LABELS), **arguments
    )


FAMILIES = {
    "cifar": ("resnet20", 32, {}),
    "cifar_pre_activation": ("resnet20v2", 32, {}),
    "bottleneck_cifar": ("resnet164", 32, {}),
    "bottleneck_cifar_pre_activation": ("resnet164v2", 32, {}),
    "looped": ("resnet56", 32, {"looped": True}),
    "looped_pre_activation": ("resnet56v2", 32, {"looped": True}),
    "imagenet": ("resnet18", 64, {}),
    "imagenet_pre_activation": ("resnet18v2", 64, {}),
    "imagenet_bottleneck": ("resnet50", 64, {}),
    "torchvision": ("resnet50", 64, {"bottleneck_stride": "3x3"}),
    "plain": ("plainnet20", 32, {}),
    "plain_imagenet": ("plainnet18", 64, {}),
    **{
        f"shortcut_{shortcut}": ("small", 16, {"shortcut": shortcut})
        for shortcut in keras_resnet.layers.shortcuts.SHORTCUTS
    },
    **{
        f"unit_{unit}": ("small", 16, {"unit": unit})
        for unit in keras_resnet.layers.units.UNITS
    },
}


class FamilyTest(parameterized.TestCase):
    """Every kind of network, asked where there is no Keras."""

    SCRIPT = """
import sys
sys.modules["keras"] = sys.modules["keras_resnet"] = None  # not importable
import numpy as np, tensorflow as tf
directory, questions, answers = sys.argv[1:]
found = {}
with tf.Graph().as_default(), tf.compat.v1.Session() as session:
    signatures = tf.compat.v1.saved_model.loader.load(
        session, ["serve"], directory).signature_def
    with np.load(questions, allow_pickle=True) as inputs:
        for key in inputs:
            signature, name = key.split(":")
            described = signatures[signature]
            outputs = {k: v.name for k, v in described.outputs.items()}
            found.update({
                f"{signature}:{k}": v for k, v in session.run(
                    outputs, {described.inputs[name].name: inputs[key]}
                ).items()})
np.savez(answers, **found)
"""

    @parameterized.named_parameters(
        (key, *value) for key, value in FAMILIES.items()
    )
    @pytest.mark.large
    def test_every_signature_answers_as_the_model(self, name, size, arguments):
        self.check(name, size, arguments)

    def test_a_looped_network_of_bottlenecks_answers_as_the_model(self):
        self.check("small", 16, {"looped": True, "shortcut": "B"})

    def check(self, name, size, arguments):
        model = family(name, size, **arguments)
        rng = np.random.default_rng(3)
        for weight in model.weights:  # statistics that are not 0 and 1
            if weight.name in ("gamma", "moving_variance"):
                weight.assign(rng.uniform(0.8, 1.2, weight.shape))
            elif weight.name in ("beta", "moving_mean"):
                weight.assign(rng.normal(0.0, 0.1, weight.shape))
        preprocessing = views.photo_preprocessing(size, resizes_whole=True)
        folder = scratch(self)
        path = export_lib.export(model, preprocessing, LABELS, folder)
        images = rng.integers(0, 256, [3, size, size, 3], np.uint8)
        encoded = [tf.io.encode_png(image).numpy() for image in images]
        questions = {
            "serving_default:image_bytes": np.array(encoded, object),
            "images:images": images,
            "features:images": images,
            "classify:inputs": serialized(images),
        }
        np.savez(os.path.join(folder, "questions.npz"), **questions)
        answers = os.path.join(folder, "answers.npz")
        subprocess.run(
            [sys.executable, "-c", self.SCRIPT, path]
            + [os.path.join(folder, "questions.npz"), answers],
            check=True,
            capture_output=True,
        )
        inputs = preprocessing(images)
        probabilities = np.asarray(model(inputs))
        features = np.asarray(pooled(model)(inputs))
        best = [LABELS[i].encode() for i in probabilities.argmax(-1)]
        with np.load(answers, allow_pickle=True) as found:
            for key in (
                "serving_default:probabilities",
                "images:probabilities",
                "classify:scores",
            ):
                np.testing.assert_allclose(found[key], probabilities, atol=1e-4)
            for key in ("serving_default:classes", "images:classes"):
                self.assertEqual(found[key].tolist(), best)
            np.testing.assert_allclose(
                found["features:features"],
                features,
                atol=1e-4 * np.abs(features).max(),
            )


class KilledTest(parameterized.TestCase):
    @pytest.mark.large
    def test_export_that_is_killed_leaves_no_version_that_does_not_load(self):
        self.kill(times=20, seed=0)

    def kill(self, times, seed):
        """Exports one version after the other, until it is killed."""
        script = """
import sys
from tests import colours
print("ready", flush=True)
while True:
    print(colours.export(sys.argv[1]), flush=True)
"""
        export_dir = scratch(self)
        rng = np.random.default_rng(seed)
        for _ in range(times):
            process = subprocess.Popen(
                [sys.executable, "-c", script, export_dir],
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
            process.stdout.readline()  # until it starts to export
            time.sleep(rng.uniform(0.0, 8.0))
            process.kill()
            process.communicate()
        paths = versions.numbered(export_dir)
        for path in paths.values():
            with export_lib._loaded(path) as ask:
                images = np.zeros([1, 4, 4, 3], np.uint8)
                answer = ask("images", {"images": images})
                self.assertEqual(answer["classes"].tolist(), [b"dark"])
            self.assertEqual(export_lib.read_card(path)["classes"], 4)
        left = len(os.listdir(export_dir)) - len(paths)
        print(f"{times} kills: {len(paths)} versions, all load; {left} begun")
        self.assertNotEmpty(paths)


class RefusalTest(parameterized.TestCase):
    """What cannot be served is said, and leaves nothing behind."""

    def assert_refused(self, error, message, model=None, **changes):
        export_dir = scratch(self)
        arguments = {
            "preprocessing": small_preprocessing(),
            "labels": LABELS,
            **changes,
        }
        with self.assertRaisesRegex(error, message):
            export_lib.export(
                model or small_network(), export_dir=export_dir, **arguments
            )
        self.assertEmpty(os.listdir(export_dir))

    def test_logits_are_no_probabilities(self):
        self.assert_refused(
            ValueError, "softmax", small_network(activation=None)
        )

    def test_network_that_answers_nan(self):
        model = small_network()
        model.get_layer("predictions").bias.assign(np.full([5], np.nan))
        self.assert_refused(ValueError, "received outputs from nan", model)

    def test_labels_of_another_data_set(self):
        self.assert_refused(
            ValueError, r"classes \(5\), received 4", labels=LABELS[:4]
        )

    @parameterized.parameters("two\nlines", "two\rlines", "", "end\n")
    def test_label_that_is_not_one_line(self, label):
        self.assert_refused(ValueError, "one line", labels=LABELS[:4] + [label])

    def test_preprocessing_of_another_network(self):
        self.assert_refused(
            ValueError, r"\(16, 16, 1\)", preprocessing=small_preprocessing(1)
        )

    def test_network_without_pool(self):
        x = keras.Input((16, 16, 3))
        y = keras.layers.Dense(5, activation="softmax")(
            keras.layers.Flatten()(x)
        )
        self.assert_refused(ValueError, '"pool"', keras.Model(x, y))

    def test_precision_that_is_not_known(self):
        self.assert_refused(ValueError, "'float8'", precision="float8")

    @parameterized.named_parameters(
        ("flat", {"shape": (768,)}, "must take images of the shape"),
        ("rank_3", {"shape": (16, 48)}, "must take images of the shape"),
        ("not_square", {"shape": (8, 32, 3)}, "square images"),
        ("four_channels", {"shape": (16, 16, 4)}, "channels must be 1 or 3"),
        ("open_channels", {"shape": (16, 16, None)}, "channels must be 1 or"),
        (
            "channels_first",
            {"shape": (3, 16, 16)},
            "square images|channels must be 1 or 3",
        ),
        ("fixed_batch", {"batch_shape": (4, 16, 16, 3)}, "of any size"),
    )
    def test_input_that_is_no_square_image(self, arguments, message):
        image = keras.Input(**arguments)
        x = keras.layers.Flatten()(image)
        x = x[:, :1] * keras.ops.ones((5,))
        model = keras.Model(image, keras.ops.softmax(x))
        self.assert_refused(folding.ModelError, message, model)

    @parameterized.named_parameters(
        ("two", lambda p: [p, 1.0 * p], "one with 1 and 2"),
        ("dict", lambda p: {"p": p, "q": 1.0 * p}, "one with 1 and 2"),
        ("sigmoid", lambda p: keras.ops.sigmoid(p[:, :1]), "one output for"),
        ("vector", lambda p: p[:, 0], "one output for each class"),
        ("map", lambda p: p[:, None, None], "one output for each class"),
        ("logits", lambda p: keras.ops.log(p), "must be probabilities"),
        ("labels", lambda p: keras.ops.sigmoid(p), "must be probabilities"),
    )
    def test_output_that_is_no_distribution(self, make, message):
        model = small_network()
        model = keras.Model(model.input, make(model.output))
        self.assert_refused(folding.ModelError, message, model)

    def test_two_inputs(self):
        model = small_network()
        other = keras.Input((16, 16, 3))
        model = keras.Model([model.input, other], model(other) / 1.0)
        self.assert_refused(folding.ModelError, "one with 2 and 1", model)

    def test_network_that_is_random(self):
        class Noise(keras.layers.Layer):
            def call(self, x):
                return x + tf.random.normal(tf.shape(x))

        model = small_network()
        image = keras.Input((16, 16, 3))
        model = keras.Model(image, model(Noise()(image)))
        self.assert_refused(
            export_lib.DisagreementError, "random at inference", model
        )

    def test_variable_that_no_layer_has(self):
        scale = tf.Variable(2.0)
        model = small_network()
        image = keras.Input((16, 16, 3))
        x = keras.layers.Lambda(lambda x: x * scale)(image)
        self.assert_refused(
            folding.ModelError,
            "weights of its layers",
            keras.Model(image, model(x)),
        )

    def test_integers_that_are_no_pixels(self):
        model = small_network()
        image = keras.Input((16, 16, 3), dtype="uint8")
        model = keras.Model(image, model(keras.layers.Rescaling(0.01)(image)))
        self.assert_refused(ValueError, "leave the pixels as they are", model)

    def test_error_that_contradicts_the_training(self):
        model, views = small_network(), images_of_noise(200)
        best = np.argmax(model(small_preprocessing()(views)), -1)
        labels = np.where(np.arange(200) < 40, (best + 1) % 5, best)
        for error, count in (
            (10.0, 200),  # of the same images: it must be 20%
            (24.0, 200),
            (5.0, 10_000),  # of a sample: 20 +- 2.8%
            (35.0, 10_000),
            (80.0, 201),
        ):
            recorded = export_lib.Recorded(error, count, "metrics.csv")
            self.assert_refused(
                export_lib.DisagreementError,
                f"received 20.00%, where metrics.csv has {error:.2f}%",
                model,
                images=export_lib.Images(views, labels, recorded=recorded),
            )
        for error, count in ((20.0, 200), (20.5, 200), (14.0, 10_000)):
            recorded = export_lib.Recorded(error, count, "metrics.csv")
            probabilities = np.asarray(model(small_preprocessing()(views)))
            export_lib._check_recorded(
                probabilities,
                export_lib.Images(views, labels, recorded=recorded),
            )

    @parameterized.parameters(
        ("gs://bucket/m", "local directory.*received gs://bucket/m"),
        (__file__, "must be a directory, received the file"),
    )
    def test_place_that_is_no_local_directory(self, place, message):
        with self.assertRaisesRegex(ValueError, message):
            export_lib.export(
                small_network(), small_preprocessing(), LABELS, place
            )
        self.assertFalse(os.path.exists("gs:"))

    def test_graph_that_answers_otherwise_than_the_model(self):
        class Drifting(views.Preprocessing):
            def __call__(self, images):
                images = super().__call__(images)
                return images if tf.executing_eagerly() else images + 1.0

        preprocessing = Drifting(**vars(small_preprocessing()))
        self.assert_refused(
            export_lib.DisagreementError,
            # In one line of numbers that help.
            "^the exported signature serving_default must answer as the model "
            "does, received probabilities up to 0[.][0-9]+ apart .{,200}$",
            preprocessing=preprocessing,
        )


class ProgramTest(parameterized.TestCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        folder = tempfile.TemporaryDirectory()
        cls.addClassCleanup(folder.cleanup)
        cls.folder = folder.name
        cls.workdir = os.path.join(cls.folder, "run")
        spec = keras_resnet.Spec(
            "small", (1,), (8,), stem="cifar", classes=10, image_size=8
        )
        cls.spec = mock.patch.dict(keras_resnet.MODELS, {"small": spec})
        cls.spec.start()
        cls.addClassCleanup(cls.spec.stop)
        outcome = programs.run(
            "train",
            "--model=small",
            f"--workdir={cls.workdir}",
            "--steps=30",
        )
        assert outcome.code == 0, outcome.err
        model = keras_resnet.resnet("small", input_shape=(8, 8, 1))
        model.save(os.path.join(cls.folder, "network.keras"))
        model.save_weights(os.path.join(cls.folder, "some.weights.h5"))
        keras_resnet.resnet("small").save(
            os.path.join(cls.folder, "colour.keras")
        )

    def export(self, *arguments, source=None):
        """The outcome, and the directory of versions."""
        export_dir = os.path.join(scratch(self), "exported")
        source = source or [f"--workdir={self.workdir}"]
        source = [argument.format(self.folder) for argument in source]
        outcome = programs.run(
            "export", f"--export_dir={export_dir}", *source, *arguments
        )
        return outcome, export_dir

    @parameterized.parameters("float32", "bfloat16", "int8")
    def test_program_exports_a_work_directory_that_is_checked(self, precision):
        outcome, export_dir = self.export(f"--precision={precision}")
        self.assertEqual((outcome.code, outcome.err), (0, []))
        self.assertIn("small after 30 steps, 10 labels", outcome.out[0])
        self.assertRegex(
            outcome.out[1],
            "saved_model: the class of the network for 3[45]. of 355 of the "
            "test images of digits",
        )
        self.assertRegex(
            outcome.out[2],
            "error on 355 of the test images of digits: [0-9.]+%, by chance "
            "89[.][0-9]+%, in training [0-9.]+%",
        )
        self.assertEqual(outcome.out[-2], f"exported {export_dir}/1")
        self.assertIn(f"--saved_model={export_dir}", outcome.out[-1])
        server = served(self, os.path.join(export_dir, "1"))
        images = datasets.load("digits").test_images(2)[0]
        self.assertLen(server.ask("images", images=images)["classes"], 2)
        card = export_lib.read_card(os.path.join(export_dir, "1"))
        self.assertEqual(card["data"], "digits")
        self.assertEqual(card["recipe"]["steps_done"], 30)
        self.assertEqual(card["precision"], precision)
        self.assertEqual(card["checks"]["saved_model"]["images"], 355)

    @parameterized.parameters(
        (
            [
                "--model={}/network.keras",
                "--dataset=digits",
                "--preprocessing=dataset",
            ],
            "network.keras, preprocessing dataset, 10 labels",
        ),
        (
            ["--model={}/colour.keras"],
            "colour.keras, preprocessing none, 10 labels",
        ),
        (["--model=small"], "small with random weights"),
        (
            [
                "--model=small",
                "--weights={}/some.weights.h5",
                "--dataset=digits",
                "--mean=0.5",
            ],
            "small with .*some.weights.h5",
        ),
        (
            ["--model=small", "--set=model.shortcut=C", "--labels={}/labels"],
            "3 labels, views of 8x8",
        ),
    )
    def test_program_exports_files_and_names(self, source, title):
        with open(os.path.join(self.folder, "labels"), "w") as file:
            file.write("one\ntwo\nthree\n")
        outcome, export_dir = self.export("--check_images=40", source=source)
        self.assertEqual((outcome.code, outcome.err), (0, []))
        self.assertRegex(outcome.out[0], title)
        card = export_lib.read_card(os.path.join(export_dir, "1"))
        has_digits = "--dataset=digits" in source
        self.assertEqual(
            card["checked_on"],
            "40 of the test images of digits"
            if has_digits
            else "64 stand-in images (bundled digits)",
        )
        text = "\n".join(outcome.out)
        if has_digits:  # of a network that was never trained
            self.assertIn("is not below chance", text)
        else:
            self.assertIn("accuracy was not checked", text)
        self.assertEqual(
            "does not tell which preprocessing" in text,
            "--model={}/colour.keras" in source,
        )
        if "--mean=0.5" in source:
            self.assertEqual(card["preprocessing"]["mean"], [0.5])

    def test_error_that_is_not_that_of_the_training_is_refused(self):
        workdir = os.path.join(scratch(self), "run")
        shutil.copytree(self.workdir, workdir)
        path = os.path.join(workdir, "metrics.csv")
        with open(path) as file:
            *rows, last = file.read().splitlines()
        values = last.split(",")
        place = rows[0].split(",").index("test_top1_error")
        values[place] = str(float(values[place]) / 2.0)
        with open(path, "w") as file:
            file.write("\n".join([*rows, ",".join(values)]) + "\n")
        outcome, export_dir = self.export(source=[f"--workdir={workdir}"])
        self.assertEqual(outcome.code, 1)
        self.assertLen(outcome.err, 1)
        self.assertRegex(outcome.err[0], "metrics.csv has .* nothing was expor")
        self.assertFalse(os.path.exists(export_dir))

    def test_program_that_is_stopped_leaves_nothing_half_written(self):
        def stop(*_):
            self.assertLen(os.listdir(export_dir), 1)  # in progress
            os.kill(os.getpid(), signal.SIGTERM)

        export_dir = os.path.join(scratch(self), "exported")
        with mock.patch.object(warmup, "write", stop):
            outcome = programs.run(
                "export",
                f"--workdir={self.workdir}",
                f"--export_dir={export_dir}",
            )
        self.assertEqual(outcome.code, 143)
        self.assertEmpty(os.listdir(export_dir))

    def test_preprocessing_is_never_guessed(self):
        labels = os.path.join(scratch(self), "labels")
        with open(labels, "w") as file:
            file.write("\n".join("abcdefghij") + "\n")
        network = "--model={}/network.keras"
        weights = ["--model=small", "--weights={}/some.weights.h5"]
        for source in (
            [network, f"--labels={labels}"],
            [network, "--dataset=digits"],
            [*weights, "--dataset=digits"],
        ):
            outcome, export_dir = self.export(source=source)
            self.assertEqual(outcome.code, 2, source)
            self.assertLen(outcome.err, 1)
            self.assertIn("--preprocessing", outcome.err[0])
            for way in ("caffe, tf or torch", "none", "--mean"):
                self.assertIn(way, outcome.err[0])
            self.assertFalse(os.path.exists(export_dir))

    def test_weights_that_ship_are_exported_by_their_name(self):
        outcome, export_dir = self.export(
            source=["--model=resnet20", "--weights=cifar10"]
        )
        self.assertEqual((outcome.code, outcome.err), (0, []))
        network = client.Client(client.SavedModel(export_dir))
        with open(CAT, "rb") as file:
            (answer,) = network.predict([file.read()])
        self.assertEqual(answer.best[0][0], "cat")

    @parameterized.parameters(
        (["--export_dir=x"], "--workdir"),
        *(
            (["--workdir=x", "--export_dir=x", flag], f"{flag}: cannot be")
            for flag in (
                "--weights=cifar10",
                "--set=model.shortcut=C",
                "--dataset=digits",
                "--labels=x",
                "--preprocessing=none",
                "--mean=0.5,0.4,0.3",
                "--standard_deviation=0.2",
            )
        ),
        *(
            (
                ["--model=a.keras", "--export_dir=x", flag],
                f"{flag}: cannot be combined",
            )
            for flag in ("--weights=cifar10", "--set=model.shortcut=C")
        ),
        *(
            (["--model=small", "--export_dir=x", flag], f"{flag}: {reason}")
            for flag, reason in (
                ("--mean=abc", "must be numbers"),
                ("--mean=0.5", "mean must have the shape"),
                ("--preprocessing=dataset", "no data set is named"),
                ("--preprocessing=timm", "value should be one of"),
                ("--preprocessing=cifar10", "mean must have the shape"),
                ("--standard_deviation=0,0,0", "standard_deviation must be 3"),
                ("--dataset=nosuch", "unknown data set"),
                ("--weights=/nowhere.h5", "The `weights` argument"),
                ("--labels=/nowhere", "No such file"),
                ("--warmup_batch_sizes=a", "must be numbers"),
                ("--warmup_batch_sizes=1.5", "must be numbers"),
            )
        ),
        (
            ["--model=/nowhere.keras", "--export_dir=x"],
            "--model=/nowhere.keras: there is no such file",
        ),
        (
            ["--workdir=x", "--export_dir=gs://bucket/m"],
            "--export_dir=gs://bucket/m: ",
        ),
        (
            ["--workdir=x", f"--export_dir={__file__}"],
            f"--export_dir={__file__}: it must be a directory",
        ),
        (["--workdir=x", "--model=x", "--export_dir=x"], "--workdir=x"),
        (["--workdir=x", "--export_dir=x", "--precision=int4"], "int4"),
        (["--workdir=x", "--export_dir=x", "--formats=tflite"], "litert"),
        (
            [
                "--workdir=x",
                "--export_dir=x",
                "--formats=onnx",
                "--precision=bfloat16",
            ],
            "--formats=onnx: onnx is written in float32",
        ),
        (
            ["--workdir=x", "--export_dir=x", "--warmup_batch_sizes=1,0"],
            "--warmup_batch_sizes=1,0: a batch size must be 1 or more",
        ),
        (["--workdir=nowhere"], "--export_dir"),
        (["--workdir=nowhere", "--export_dir=x"], "--workdir=nowhere"),
        (["--model=resnet21", "--export_dir=x"], "--model=resnet21"),
        (["--workdir=nowhere", "--export_dir=x", "more"], "more"),
        (["--work_dir=x"], "did you mean --workdir"),
        (
            [
                "--model=resnet20",
                "--export_dir=x",
                "--precision=int8",
                "--formats=litert",
            ],
            "--precision=int8: needs training images",
        ),
    )
    def test_usage_error_is_one_line_and_exit_code_2(self, arguments, message):
        code, _, err = programs.run("export", *arguments)
        self.assertEqual(code, 2)
        self.assertLen(err, 1)
        self.assertIn(message, err[0])
        self.assertFalse(os.path.exists("x"))


if __name__ == "__main__":
    absltest.main()
