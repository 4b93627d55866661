"""Training from trained weights, and probes on features that are kept."""

import dataclasses
import json
import os
import pathlib

import keras
import numpy as np
import pytest
import tensorflow as tf
from absl.testing import absltest
from absl.testing import parameterized

import keras_resnet
from keras_resnet import networks
from keras_resnet.data import datasets
from keras_resnet.data.augmentation import Augmentation
from keras_resnet.training import configs
from keras_resnet.training import loop
from keras_resnet.training import probes
from keras_resnet.training import recipes
from keras_resnet.training import start_weights
from keras_resnet.training import trained_networks
from keras_resnet.weights import shipped
from tests import images as images_lib
from tests import programs
from tests import records
from tests import tiny_runs


def recipe(**fields):
    base = recipes.RECIPES["fine_tune"].with_steps(6)
    return dataclasses.replace(base, batch_size=4, **fields)


def write_folder(root, count=6, size=40):
    """Two classes of small JPEG files, dark and light ones."""
    for i in range(2 * count):
        image = images_lib.noise(size, size, 3, seed=i) // 2
        image += 127 * (i % 2)
        images_lib.write_bytes(
            root,
            f"{'ab'[i % 2]}/{i}.jpg",
            tf.io.encode_jpeg(image.astype(np.uint8)).numpy(),
        )
    return f"folder:{root}"


class StartWeightsTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.root = pathlib.Path(records.scratch(self))
        self.dataset = write_folder(self.root / "photos")

    def config(self, freeze="none", weights="cifar10", **fields):
        return configs.Config(
            "resnet20",
            self.dataset,
            recipe(**fields),
            weights=weights,
            freeze=freeze,
        )

    def train(self, config, name="run"):
        return loop.train_and_evaluate(
            config, self.root / name, report=tiny_runs.quiet, log_every=3
        )

    def values(self, name="run"):
        trained = trained_networks.load_workdir(
            self.root / name, report=tiny_runs.quiet
        )
        return trained, {
            v.path: keras.ops.convert_to_numpy(v) for v in trained.model.weights
        }

    def test_network_without_its_classifier_is_that_of_the_weights(self):
        found = start_weights.read("cifar10", networks.get_network("resnet20"))
        model = keras_resnet.ResNet20(weights="cifar10")
        for variable in model.weights:
            if variable.path.startswith("predictions"):
                continue
            np.testing.assert_array_equal(found.arrays[variable.path], variable)
        np.testing.assert_array_equal(found.preprocessing.mean, shipped.mean())

    @pytest.mark.slow
    def test_frozen_layers_keep_their_weights_and_statistics(self):
        expected = start_weights.read(
            "cifar10", networks.get_network("resnet20")
        ).arrays
        for freeze, moved in (
            ("all", ("predictions",)),
            ("stem,stage1,stage2", ("stage3", "predictions")),
        ):
            self.train(self.config(freeze), freeze[:3])
            _, values = self.values(freeze[:3])
            for path, value in values.items():
                if not path.startswith(moved):
                    np.testing.assert_array_equal(value, expected[path], path)
            changed = [
                path
                for path, value in values.items()
                if path in expected and np.any(value != expected[path])
            ]
            self.assertEqual(bool(changed), "stage3" in moved)
            if changed:  # their statistics are those of the new images
                self.assertTrue(any("moving_mean" in p for p in changed))

    @pytest.mark.slow
    def test_preprocessing_is_that_of_the_weights(self):
        self.train(self.config())
        trained, _ = self.values()
        np.testing.assert_array_equal(
            trained.preprocessing.mean, shipped.mean()
        )
        self.assertEqual(trained.model.input_shape, (None, 32, 32, 3))
        self.assertEqual(trained.labels, ["a", "b"])

    @pytest.mark.slow
    def test_second_phase_starts_with_the_classifier_of_the_first(self):
        self.train(self.config("all", augmentation=Augmentation()), "first")
        _, first = self.values("first")
        config = self.config(weights=str(self.root / "first"))
        found = start_weights.read(
            config.weights, networks.get_network("resnet20")
        )
        model = configs.build_model(config, (32, 32, 3), 2)
        self.assertTrue(start_weights.assign(model, found, ["a", "b"]))
        for variable in model.weights:
            np.testing.assert_array_equal(first[variable.path], variable)
        self.assertFalse(start_weights.assign(model, found, ["c", "d"]))

    @pytest.mark.slow
    def test_a_file_is_needed_once(self):
        path = self.root / "start.weights.h5"
        keras_resnet.ResNet20().save_weights(path)
        flags = (
            "--model=resnet20",
            f"--dataset={self.dataset}",
            f"--weights={path}",
            f"--workdir={self.root}/run",
            "--batch_size=4",
            "--log_every=3",
        )
        outcome = programs.run("train", *flags, "--steps=4")
        self.assertEqual(outcome.code, 0, outcome.err)
        config = json.loads((self.root / "run/config.json").read_text())
        self.assertLen(config["weights_sha256"], 64)
        self.assertIn("planned for 10 images", config["recipe"]["source"])
        path.unlink()
        outcome = programs.run("train", *flags, "--steps=4")
        self.assertEqual(outcome.code, 0, outcome.err)
        self.assertIn("has all its 4 steps already", "\n".join(outcome.out))
        outcome = programs.run("train", *flags[:-3], f"--workdir={path}_new")
        self.assertEqual(outcome.code, 2)
        self.assertIn("--weights=", outcome.err[0])

    @pytest.mark.slow
    def test_weights_of_another_network_are_rejected(self):
        self.train(self.config("all", augmentation=Augmentation()), "first")
        with self.assertRaisesRegex(ValueError, "must be of resnet32"):
            start_weights.read(
                str(self.root / "first"), networks.get_network("resnet32")
            )

    def test_weights_of_a_run_keep_its_function(self):
        config = self.config("all", augmentation=Augmentation())
        given = {"padding": "same", "shortcut": "A(zeros='both')"}
        self.train(
            dataclasses.replace(config, weights=None, freeze="none",
                                model_arguments=given),
            "first",
        )  # fmt: skip
        network = networks.get_network("resnet20")
        path = str(self.root / "first")
        for same in ({}, given, {"padding": "same", "remat": True}):
            found = start_weights.read(path, network, same)
            self.assertEqual(found.arguments["padding"], "same")
        for name, value in (
            ("padding", "symmetric"),
            ("shortcut", "A"),
            ("unit", "relu_before_addition"),
            ("batch_norm_epsilon", 1e-3),
            ("looped", True),  # another layout
        ):
            with self.assertRaisesRegex(
                ValueError, f"were trained with {name}="
            ):
                start_weights.read(path, network, {name: value})

    @parameterized.parameters("stage9", "stage1,", "stem,nothing", "")
    def test_unknown_layers_are_rejected(self, freeze):
        with self.assertRaisesRegex(ValueError, "freeze must be all, none"):
            configs.freeze(keras_resnet.ResNet20(), freeze)

    @pytest.mark.slow
    def test_a_layer_must_be_trained(self):
        everything = "stem,stage,predictions"
        with self.assertRaisesRegex(ValueError, "must leave a layer to train"):
            configs.freeze(keras_resnet.ResNet20(), everything)
        for freeze in (everything, "stage9"):
            outcome = programs.run(
                *("train", "--model=resnet20", f"--dataset={self.dataset}"),
                *("--weights=cifar10", f"--freeze={freeze}"),
                f"--workdir={self.root}/run",
            )
            self.assertEqual(outcome.code, 2)
            self.assertIn(f"--freeze={freeze}: freeze must", outcome.err[0])

    @pytest.mark.slow
    def test_features_that_are_kept_train_as_images_do(self):
        config = self.config("all", augmentation=Augmentation())
        self.train(config, "kept")
        with absltest.mock.patch.object(
            probes, "is_cached", return_value=False
        ):
            self.train(config, "images")
        _, kept = self.values("kept")
        _, images = self.values("images")
        for path, value in kept.items():
            np.testing.assert_allclose(value, images[path], atol=1e-5)
        rows = [
            (self.root / name / "metrics.csv").read_text().splitlines()[-1]
            for name in ("kept", "images")
        ]
        numbers = [np.array(row.split(","), float) for row in rows]
        np.testing.assert_allclose(*numbers, rtol=1e-3)

    def test_network_runs_once_over_the_images(self):
        dataset = datasets.load(self.dataset)
        model = keras_resnet.ResNet20(classes=2, input_shape=(40, 40, 3))
        features, _ = probes.parts(model)
        found = probes.FeatureSet(dataset, features)
        calls = []
        found._features = lambda images: (
            calls.append(len(images)),
            features(images),
        )[1]
        for _ in range(2):
            list(found.train_batches(4, seed=0).take(9))
            list(found.padded_test_batches(4))
        self.assertLessEqual(len(calls), 2)

    @pytest.mark.slow
    def test_classifier_may_have_a_rate_of_its_own(self):
        """After one step, a change is the rate times the gradient."""
        start = start_weights.read("cifar10", networks.get_network("resnet20"))
        found = {}
        for name, rate in (("slow", None), ("fast", 0.05)):
            config = self.config(
                augmentation=Augmentation(), head_learning_rate=rate
            )
            one = config.recipe.with_steps(1)
            self.train(dataclasses.replace(config, recipe=one), name)
            _, found[name] = self.values(name)
        path = "predictions/bias"
        np.testing.assert_allclose(
            found["fast"][path], 5 * found["slow"][path], rtol=1e-4
        )
        self.assertTrue(np.any(found["slow"][path]))
        path = "stage3_unit3/conv2/kernel"
        np.testing.assert_array_equal(found["fast"][path], found["slow"][path])
        self.assertTrue(np.any(found["slow"][path] != start.arrays[path]))
        with self.assertRaisesRegex(ValueError, "head_learning_rate needs"):
            recipe(optimizer="adam", head_learning_rate=0.1)

    def test_run_without_a_checkpoint_does_not_block_its_directory(self):
        config = self.config("all", augmentation=Augmentation())
        os.makedirs(self.root / "run")
        (self.root / "run/config.json").write_text(
            json.dumps(dataclasses.replace(config, seed=3).to_json())
        )
        self.train(config)


if __name__ == "__main__":
    absltest.main()
