"""Recipes of today on synthetic photos: devices, micro-batches, resuming."""

import dataclasses
import pathlib
from unittest import mock

import numpy as np
import pytest
import tensorflow as tf
from absl.testing import absltest
from absl.testing import parameterized

import keras_resnet
from keras_resnet.training import configs
from keras_resnet.training import interrupts
from keras_resnet.training import recipes
from keras_resnet.training import strategies
from keras_resnet.training import tensorflow_trainer
from tests import records
from tests import runs
from tests import tiny_runs
from tests.loop_test import stop_after

# The recipes, with a number of micro-batches.
PARTS = {"imagenet_rsb_a3": 2, "imagenet_torchvision_v2": 1}
# A bottleneck network of few weights, which the recipes have arguments for.
SMALL = keras_resnet.Spec(
    "tiny", (1, 1), (4, 8), stem="imagenet", bottleneck=True
)


def small(name, **fields):
    """The recipe for a few small images; its other fields are as they are."""
    recipe = recipes.RECIPES[name].with_steps(4)
    augmentation = recipe.augmentation
    if augmentation.train_image_size:
        augmentation = dataclasses.replace(augmentation, train_image_size=24)
    return dataclasses.replace(
        recipe,
        batch_size=12,
        image_size=32,
        augmentation=augmentation,
        **fields,
    )


class ModernRecipesTest(tiny_runs.TestCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        root = pathlib.Path(records.scratch(cls))
        rng = np.random.default_rng(0)
        for i in range(24):
            sides = rng.integers(40, 60, 2)
            image = rng.integers(0, 256, (*sides, 3), np.uint8)
            path = root / f"class_{i % 3}" / f"{i:02d}.jpg"
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(tf.io.encode_jpeg(image).numpy())
        cls.dataset = f"folder:{root}"

    def setUp(self):
        super().setUp()
        self.enter_context(
            mock.patch.dict(keras_resnet.MODELS, {"tiny": SMALL})
        )

    def config(self, recipe, **fields):
        return configs.Config("tiny", self.dataset, recipe, **fields)

    @parameterized.parameters(*PARTS.items())
    @pytest.mark.slow
    def test_stopped_run_ends_with_the_bits_of_one_that_was_not(
        self, name, micro_batches
    ):
        """Law 5 of the design."""
        recipe = small(name, micro_batches=micro_batches)
        config = self.config(recipe, deterministic=True)
        whole = self.workdir.with_name("whole")
        result = self.train(config, whole)
        self.assertTrue(np.isfinite(result["train_loss"]))
        with self.assertRaises(interrupts.Interrupted), stop_after(2):
            self.train(config)
        self.train(config)
        self.assert_same_run(self.workdir, whole)

    @pytest.mark.slow
    def test_run_of_growing_images_that_was_stopped_ends_with_the_same_bits(
        self,
    ):
        """Law 5 of the design, stopped inside of a size and between two."""
        config = self.config(growing(), deterministic=True)
        whole = self.workdir.with_name("whole")
        self.train(config, whole)
        for step in (3, 4):
            with self.assertRaises(interrupts.Interrupted), stop_after(step):
                self.train(config)
        self.train(config)
        self.assert_same_run(self.workdir, whole)

    def test_each_size_has_its_batches_and_its_graph(self):
        config = self.config(growing())
        trainer = tensorflow_trainer.TensorFlowTrainer(
            config, configs.load_dataset(config), tf.distribute.get_strategy()
        )
        seen = []
        while trainer.completed_steps < config.recipe.steps:
            trainer.take(2, False, 0.0)
            spec, *_ = tf.nest.flatten(trainer.batches.element_spec)
            seen.append((trainer.completed_steps, spec.shape[1]))
        self.assertEqual(seen, [(2, 16), (3, 16), (5, 24), (7, 24)])
        self.assertEqual(trainer.advance.experimental_get_tracing_count(), 2)

    @pytest.mark.slow
    def test_two_devices_with_synchronized_norms_are_one(self):
        """Law 6 of the design, with mixed images and micro-batches."""
        self.assertEqual(runs.call(_difference, self.dataset, PARTS), "same")


def growing():
    """A recipe of three steps with small images, and three with larger ones."""
    recipe = small("imagenet_modern").with_steps(6)
    return dataclasses.replace(recipe, progressive_sizes=(16, 24))


def _difference(dataset, parts):
    """Compares one and two devices in float64; runs in its own process."""
    keras_resnet.MODELS["tiny"] = SMALL
    two = strategies.get_strategy("mirrored", num_devices=2)
    one = tf.distribute.OneDeviceStrategy("CPU:0")
    from keras_resnet.data import datasets

    for name, count in parts.items():
        recipe = small(
            name,
            learning_rate=1e-3,
            model_arguments={},
            micro_batches=count,
        )
        config = configs.Config(
            "tiny", dataset, recipe, dtype="float64", sync_batch_norm=True
        )
        images = datasets.load(
            dataset, image_size=32, test_crop_ratio=recipe.test_crop_ratio
        )
        weights = []
        for strategy in (one, two):
            trainer = tensorflow_trainer.TensorFlowTrainer(
                config, images, strategy
            )
            trainer.take(2, False, 0.0)
            weights.append(trainer.model.get_weights())
        for a, b in zip(*weights, strict=True):
            difference = np.abs(a - b).max()
            if difference > 1e-7:
                return f"{name}: {difference}"
    return "same"


if __name__ == "__main__":
    absltest.main()
