"""Networks to export: weights that others made keep their preprocessing."""

import dataclasses
import os

import keras
import numpy as np
import pytest
import tensorflow as tf
from absl.testing import absltest
from absl.testing import parameterized

import keras_resnet
from keras_resnet.serving import errors
from keras_resnet.serving import model_sources
from keras_resnet.weights import cards
from keras_resnet.weights import published
from keras_resnet.weights import shipped
from tests import exports
from tests import images as images_lib
from tests import records


class SourceTest(parameterized.TestCase):
    """Published weights and Keras files keep their preprocessing and labels."""

    def test_weights_that_ship_have_their_mean_and_their_labels(self):
        source = model_sources.from_model("resnet20", "cifar10")
        self.assertEqual(source.labels[3], "cat")
        self.assertIsNone(source.preprocessing.shorter_side)
        np.testing.assert_array_equal(source.preprocessing.mean, shipped.mean())
        with open(exports.CAT, "rb") as file:
            view = source.preprocessing.decode(tf.constant(file.read()))
        (row,) = np.asarray(source.model(source.preprocessing(view[None])))
        self.assertEqual(source.labels[row.argmax()], "cat")
        self.assertGreater(row.max(), 0.99)

    def test_labels_of_the_weights_that_ship_can_be_others(self):
        names = [f"class {i}" for i in range(10)]
        source = model_sources.from_model("resnet20", "cifar10", labels=names)
        self.assertEqual(source.labels, names)

    def test_images_of_other_classes_do_not_name_those_of_the_weights(self):
        """A folder sorts its classes, and may have as many as CIFAR-10."""
        root = records.scratch(self)
        names = shipped.card("resnet20")["labels"]
        names = [*names[1:], "zeppelin"]
        for name in names:
            for i in range(2):
                content = tf.io.encode_png(images_lib.noise(32, 32, 3, seed=i))
                images_lib.write_bytes(root, f"{name}/{i}.png", content.numpy())
        flags = {"dataset": f"folder:{root}"}
        source = model_sources.from_model("resnet20", "cifar10", **flags)
        self.assertEqual(source.labels[0], "airplane")
        self.assertIsNone(source.images(3).labels)
        path = os.path.join(exports.scratch(self), "trained.keras")
        source.model.save(path)  # its training may have been on the folder
        source = model_sources.from_model(path, **flags)
        self.assertEqual(source.labels, names)

    def test_a_card_with_other_labels_than_classes_is_an_error(self):
        model = keras_resnet.ResNet20(weights="cifar10")
        card = cards.card(model)
        cards.attach(
            model,
            dataclasses.replace(card, label_set="", labels=("cat", "dog")),
        )
        path = os.path.join(exports.scratch(self), "model.keras")
        model.save(path)
        with self.assertRaisesRegex(
            errors.ArgumentError, "a label for each of 10 classes, received 2"
        ):
            model_sources.from_model(path)

    @parameterized.parameters(".weights.h5", ".keras")
    @pytest.mark.slow
    def test_files_of_keras_applications_see_what_they_were_trained_on(
        self, ending
    ):
        shape = (224, 224, 3)
        theirs = keras.applications.ResNet50(
            weights=None, input_shape=shape, classes=5
        )
        path = os.path.join(exports.scratch(self), "theirs" + ending)
        save = theirs.save if ending == ".keras" else theirs.save_weights
        save(path)
        arguments = {"batch_norm_epsilon": 1.001e-5}
        source = model_sources.from_model(
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
        source = model_sources.from_model(
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
        path = os.path.join(exports.scratch(self), "model.keras")
        model.save(path)
        source = model_sources.from_model(path, preprocessing=name)
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
        self.assertEqual(
            model_sources._takes_pixels(keras.Model(image, x)), expected
        )

    def test_a_model_brings_its_preprocessing_and_labels(self):
        pixels = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3))
        pixels = pixels.astype("uint8")
        model = keras_resnet.ResNet20(weights="cifar10")
        path = os.path.join(exports.scratch(self), "model.keras")
        model.save(path)
        source = model_sources.from_model(path)
        self.assertEqual(source.labels, shipped.card("resnet20")["labels"])
        np.testing.assert_allclose(
            source.model(source.preprocessing(pixels)),
            model(keras_resnet.preprocess(model)(pixels)),
            atol=1e-6,
        )
        stated = model_sources.from_model(path, preprocessing="torch")
        self.assertIsNotNone(stated.preprocessing.standard_deviation)

    @parameterized.parameters("rgb", "bgr")
    def test_a_card_gives_the_size_the_numbers_and_the_order(self, order):
        preparation = published.Preparation(
            224, 232, mean=(0.1, 0.2, 0.3), deviation=(0.4, 0.5, 0.6),
            order=order,
        )  # fmt: skip
        model = keras_resnet.ResNet18(input_shape=(112, 112, 3), classes=4)
        card = published.Card("x", "resnet18", "y", preparation=preparation)
        cards.attach(model, card)
        path = os.path.join(exports.scratch(self), "model.keras")
        model.save(path)
        source = model_sources.from_model(path, labels=list("abcd"))
        self.assertEqual(source.preprocessing.shorter_side, 116)
        pixels = np.random.default_rng(0).integers(0, 256, (1, 112, 112, 3))
        view = source.preprocessing.view(
            np.random.default_rng(0).integers(0, 256, (200, 151, 3), np.uint8)
        )
        for x in (pixels.astype("uint8"), view[None]):
            layer = keras_resnet.preprocess(model)
            layer.preparation = published.dataclasses.replace(
                preparation, shorter_side=None
            )
            np.testing.assert_allclose(
                source.model(source.preprocessing(x)),
                model(layer(x)),
                atol=1e-5,
            )

    def test_preprocessing_that_contradicts_what_is_known(self):
        with self.assertRaisesRegex(errors.ArgumentError, "must be cifar10"):
            model_sources.from_model(
                "resnet20", "cifar10", preprocessing="torch"
            )


if __name__ == "__main__":
    absltest.main()
