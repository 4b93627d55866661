"""The weights that ship: whole, as their cards say, refused where they are not.

The error on all test images needs CIFAR-10, which KERAS_RESNET_DATA may name.
"""

import dataclasses
import json
import os
import pathlib
import re
import tempfile
from unittest import mock

import keras
import numpy as np
import tensorflow as tf
from absl.testing import absltest
from absl.testing import parameterized

import keras_resnet
from keras_resnet.data import datasets
from keras_resnet.data import views
from keras_resnet.papers import shipping
from keras_resnet.serving import client
from keras_resnet.training import configs
from keras_resnet.training import loop
from keras_resnet.training import recipes
from keras_resnet.training import trained_networks
from keras_resnet.weights import shipped
from tests import programs

ROOT = pathlib.Path(__file__).parent.parent
NETWORKS = [(name,) for name in shipped.networks("cifar10")]


def cifar10(test):
    """CIFAR-10 where it is; it is never downloaded."""
    root = pathlib.Path(os.environ.get("KERAS_RESNET_DATA", "")) / "tfds"
    if not (root / "cifar10").is_dir():
        test.skipTest("KERAS_RESNET_DATA has no tfds/cifar10")
    return datasets.load("cifar10", root)


def evaluate(*arguments):
    """What apps.evaluate says of all test images."""
    root = pathlib.Path(os.environ["KERAS_RESNET_DATA"]) / "tfds"
    outcome = programs.run(
        "evaluate", *arguments, "--dataset=cifar10", f"--data_dir={root}"
    )
    return json.loads(outcome.out[-1])


class CardsTest(parameterized.TestCase):
    def test_resnet20_ships(self):
        self.assertIn("resnet20", shipped.networks())

    @parameterized.parameters(*NETWORKS)
    def test_a_file_is_small_and_of_the_network_that_its_card_names(self, name):
        path = pathlib.Path(shipped.weights_file(name))
        self.assertLess(path.stat().st_size, 3e6)
        card = shipped.card(name)
        model = keras_resnet.resnet(name, weights="cifar10")
        self.assertEqual(
            sum(int(np.prod(w.shape)) for w in model.trainable_weights),
            card["parameters"],
        )
        self.assertEqual(model.output_shape, (None, len(card["labels"])))
        self.assertEqual((card["model"], card["dataset"]), (name, "cifar10"))
        self.assertIn(card["recipe"], recipes.RECIPES)
        self.assertEqual(card["test_images"], 10_000)
        confusion = np.array(card["confusion"])
        np.testing.assert_array_equal(confusion.sum(1), 1_000)
        self.assertEqual(10_000 - confusion.trace(), card["top1_errors"])

    def test_a_file_that_was_changed_is_refused(self):
        folder = pathlib.Path(self.enter_context(tempfile.TemporaryDirectory()))
        for path in pathlib.Path(shipped.__file__).parent.glob("resnet20*"):
            (folder / path.name).write_bytes(path.read_bytes())
        weights = folder / "resnet20_cifar10.weights.h5"
        content = bytearray(weights.read_bytes())
        content[len(content) // 2] ^= 1
        weights.write_bytes(content)
        with (
            mock.patch.object(shipped, "_FOLDER", folder),
            self.assertRaisesRegex(
                ValueError,
                "the sha256 of .* must be .* install the package again",
            ),
        ):
            keras_resnet.ResNet20(weights="cifar10")


class BuildersTest(parameterized.TestCase):
    """The rules of keras.applications, for weights of ours."""

    @parameterized.parameters(
        ("ResNet18", {}, "`weights='cifar10'` exist for .*resnet20"),
        ("ResNet20", {"classes": 100}, "`classes` should be 10"),
        ("ResNet20", {"input_shape": (64, 64, 3)}, r"should be \(32, 32, 3\)"),
        (
            "ResNet20",
            {"include_top": False, "input_shape": (32, 32, 1)},
            "3 channels",
        ),
        ("ResNet20", {"classifier_activation": "relu"}, "Only `None` and"),
        ("ResNet20", {"shortcut": "none"}, "trained with shortcut='A'"),
        (
            "ResNet20",
            {"unit": "pre_activation"},
            "trained with unit='original'",
        ),
        (
            "ResNet20",
            {"shortcut": keras_resnet.layers.OptionA(zeros="both")},
            "trained with shortcut='A'",
        ),
        ("ResNet20", {"padding": "same"}, "trained with padding='symmetric'"),
        (
            "ResNet20",
            {"batch_norm_epsilon": 1e-3},
            "trained with batch_norm_epsilon=1e-05",
        ),
    )
    def test_what_they_do_not_fit_is_refused(self, builder, arguments, message):
        with self.assertRaisesRegex(ValueError, message):
            getattr(keras_resnet, builder)(weights="cifar10", **arguments)

    def test_other_words_for_the_same_function_are_taken(self):
        x = np.random.default_rng(0).normal(size=(2, 32, 32, 3))
        model = keras_resnet.ResNet20(
            weights="cifar10",
            shortcut=keras_resnet.layers.OptionA(),
            unit=keras_resnet.layers.OriginalUnit,
            bottleneck_stride="3x3",  # it has no bottlenecks
        )
        np.testing.assert_array_equal(
            model(x), keras_resnet.ResNet20(weights="cifar10")(x)
        )

    def test_a_spec_with_the_name_of_another_function_is_refused(self):
        spec = dataclasses.replace(
            keras_resnet.MODELS["resnet20"], shortcut="none"
        )
        with self.assertRaisesRegex(ValueError, "trained with shortcut='A'"):
            keras_resnet.resnet(spec, weights="cifar10")

    def test_features_of_any_size_are_those_of_the_whole_network(self):
        whole = keras_resnet.ResNet20(weights="cifar10")
        features = keras_resnet.ResNet20(
            weights="cifar10", include_top=False, pooling="avg"
        )
        x = np.random.default_rng(0).normal(size=(2, 32, 32, 3))
        kernel, bias = whole.layers[-1].get_weights()
        logits = features(x).numpy() @ kernel + bias
        np.testing.assert_allclose(
            whole(x), keras.ops.softmax(logits), rtol=1e-4, atol=1e-6
        )
        self.assertEqual(features(np.zeros((1, 40, 48, 3))).shape, (1, 64))

    def test_preprocessing_is_that_of_training(self):
        images = np.random.default_rng(0).integers(
            0, 256, (2, 32, 32, 3), np.uint8
        )
        expected = views.Preprocessing(32, 3, None, shipped.mean())(images)
        for given in (images, tf.constant(images), list(images)):
            np.testing.assert_allclose(
                keras_resnet.preprocess_input(given, "cifar10"),
                expected,
                atol=1e-7,
            )
        first = keras_resnet.preprocess_input(
            np.moveaxis(images, -1, 1), "cifar10", "channels_first"
        )
        np.testing.assert_allclose(
            np.moveaxis(first, 1, -1), expected, atol=1e-7
        )

    def test_preprocessing_is_part_of_a_model(self):
        images = np.random.default_rng(0).integers(
            0, 256, (2, 32, 32, 3), np.uint8
        )
        for shape in ((32, 32, 3), (None, None, 3)):
            image = keras.Input(shape, dtype="uint8")
            model = keras.Model(
                image, keras_resnet.preprocess_input(image, "cifar10")
            )
            np.testing.assert_allclose(
                model(images),
                keras_resnet.preprocess_input(images, "cifar10"),
                atol=1e-7,
            )

    @parameterized.parameters(
        ((2, 32, 32, 1),), ((28, 28, 3),), ((2, 3, 32, 32),), ((3,),)
    )
    def test_preprocessing_wants_images_of_cifar_10(self, shape):
        for given in (np.zeros(shape), keras.Input(shape)):
            with self.assertRaisesRegex(
                ValueError, r"\[..., 32, 32, 3\] .*Received: shape=\("
            ):
                keras_resnet.preprocess_input(given, "cifar10")
        with self.assertRaisesRegex(ValueError, "data_format=last"):
            keras_resnet.preprocess_input(np.zeros(shape), "cifar10", "last")


class ErrorsTest(parameterized.TestCase):
    @parameterized.parameters(*NETWORKS)
    def test_card_is_right_to_the_image(self, name):
        dataset = cifar10(self)
        np.testing.assert_array_equal(
            dataset.preprocessing.mean, shipped.mean()
        )
        result = evaluate(f"--model={name}", "--weights=cifar10")
        card = shipped.card(name)
        for count in ("top1_errors", "top5_errors"):
            self.assertEqual(result[count], card[count])
        self.assertEqual(result["images"], card["test_images"])

    def test_a_cat_is_a_cat(self):
        """A picture of no data set: see tests/cat.txt."""
        content = (ROOT / "tests/cat.png").read_bytes()
        preprocessing = views.Preprocessing(32, 3, None, shipped.mean())
        image = preprocessing.decode(tf.constant(content))
        both = tf.stack([image, tf.image.flip_left_right(image)])
        model = keras_resnet.ResNet20(weights="cifar10")
        best = np.argmax(model(preprocessing(both)), axis=-1)
        labels = shipped.card("resnet20")["labels"]
        self.assertEqual([labels[i] for i in best], ["cat", "cat"])


class SavedModelTest(parameterized.TestCase):
    """savedmodels/resnet20_cifar10, and what its README says of it."""

    directory = ROOT / "savedmodels/resnet20_cifar10"

    def test_it_answers_as_the_network_does(self):
        network = client.SavedModel(self.directory)
        self.assertEqual(
            list(network.labels), shipped.card("resnet20")["labels"]
        )
        images = np.random.default_rng(0).integers(
            0, 256, (4, 32, 32, 3), np.uint8
        )
        model = keras_resnet.ResNet20(weights="cifar10")
        x = keras_resnet.preprocess_input(images, "cifar10")
        np.testing.assert_allclose(
            network.views(tf.constant(images)), model(x), atol=1e-4
        )

    def test_it_makes_the_errors_of_the_card(self):
        cifar10(self)
        result = evaluate(f"--saved_model={self.directory}")
        card = shipped.card("resnet20")
        # Folding rounds otherwise: an image between two classes may change.
        self.assertAlmostEqual(
            result["top1_errors"], card["top1_errors"], delta=2
        )

    def test_the_readme_has_a_row_with_the_numbers_of_its_card(self):
        text = (ROOT / "savedmodels/README.md").read_text()
        (row,) = re.findall(r"(?m)^\| `resnet20_cifar10/1` \|.*$", text)
        card = shipped.card("resnet20")
        error = 100 * card["top1_errors"] / card["test_images"]
        self.assertIn(f"| {card['top1_errors']:,} of 10,000, {error:.2f}%", row)
        self.assertIn(f"{card['parameters']:,}", row)
        self.assertIn(
            f"{card['steps']:,} of {card['recipe_steps']:,} steps", row
        )

    def test_prediction_asks_it_when_nothing_else_is_named(self):
        outcome = programs.run("predict", "--top=1", f"{ROOT}/tests/cat.png")
        self.assertEqual(outcome.code, 0, outcome.err)
        self.assertRegex(outcome.out[-1], r"cat\.png +[\d.]+% +cat")


class ShippingTest(parameterized.TestCase):
    TINY = keras_resnet.Spec(
        *("tiny", (1, 1), (8, 16)), stem="cifar", classes=10, image_size=8
    )

    def setUp(self):
        super().setUp()
        self.enter_context(
            mock.patch.dict(keras_resnet.MODELS, {"tiny": self.TINY})
        )
        directory = self.enter_context(tempfile.TemporaryDirectory())
        self.root = pathlib.Path(directory)

    def train(self, **fields):
        recipe = recipes.RECIPES["digits"].with_steps(4)
        config = configs.Config("tiny", "digits", recipe, **fields)
        loop.train_and_evaluate(config, self.root / "run")

    def test_what_is_written_is_read_as_it_was_trained(self):
        self.train()
        dataset = datasets.load("digits")
        card = shipping.ship(self.root / "run", dataset, self.root)
        trained = trained_networks.load_workdir(self.root / "run")
        with mock.patch.object(shipped, "_FOLDER", self.root):
            self.assertEqual(shipped.networks("digits"), ["tiny"])
            self.assertEqual(shipped.card("tiny", "digits"), card)
            model = keras_resnet.resnet(
                "tiny",
                input_shape=(8, 8, 1),
                weights=shipped.weights_file("tiny", "digits"),
            )
            np.testing.assert_array_equal(
                shipped.mean("digits"), dataset.preprocessing.mean
            )
        x = np.random.default_rng(0).normal(size=(3, 8, 8, 1))
        np.testing.assert_array_equal(model(x), trained.model(x))
        self.assertEqual(card["steps"], 4)
        images, labels = dataset.test_images(dataset.test_size)
        best = np.argmax(trained.model(dataset.preprocessing(images)), axis=-1)
        self.assertEqual(card["top1_errors"], np.sum(best != labels))
        confusion = np.zeros((10, 10), int)
        np.add.at(confusion, (labels, best), 1)
        np.testing.assert_array_equal(card["confusion"], confusion)

    def test_what_a_name_cannot_say_is_refused(self):
        self.train(model_arguments={"shortcut": "C"})
        with self.assertRaisesRegex(ValueError, "'shortcut': 'C'"):
            shipping.ship(self.root / "run", datasets.load("digits"), self.root)


if __name__ == "__main__":
    absltest.main()
