"""What a run tells: events, first images, profile, the table at its end."""

import dataclasses

import numpy as np
import tensorflow as tf
from absl.testing import absltest
from absl.testing import parameterized

import keras_resnet
from keras_resnet.data import datasets
from keras_resnet.data.augmentation import Augmentation
from keras_resnet.training import configs
from keras_resnet.training import profiles
from keras_resnet.training import recipe_table
from keras_resnet.training import recipes
from keras_resnet.training import summaries
from tests import images as images_lib
from tests import tiny_runs


def events(workdir):
    """Values and images by name, of all event files."""
    found = {}
    for path in sorted((workdir / "events").glob("events*")):
        for record in tf.data.TFRecordDataset(str(path)):
            event = tf.compat.v1.Event.FromString(record.numpy())
            for value in event.summary.value:
                tensor = tf.make_ndarray(value.tensor)
                found.setdefault(value.tag, []).append((event.step, tensor))
    return found


class EventsTest(tiny_runs.TestCase):
    def test_rows_have_the_gradient_the_speed_and_the_rate(self):
        self.train(tiny_runs.config())
        found = events(self.workdir)
        steps = [step for step, _ in found["gradient_norm"]]
        self.assertEqual(steps, [2, 4, 6, 8])
        for _, norm in found["gradient_norm"]:
            self.assertBetween(float(norm), 1e-3, 1e3)
        self.assertEqual([step for step, _ in found["learning_rate"]], steps)
        self.assertNotEmpty(found["images_per_second"])
        header = (self.workdir / "metrics.csv").read_text().splitlines()[0]
        self.assertNotIn("gradient_norm", header)

    def test_first_batch_is_shown_as_the_network_sees_it(self):
        recipe = dataclasses.replace(
            tiny_runs.RECIPE,
            batch_size=32,
            augmentation=Augmentation("pad_crop", mixup_alpha=1.0),
        )
        config = tiny_runs.config(recipe)
        self.train(config)
        ((step, strings),) = events(self.workdir)["first_batch"]
        self.assertEqual(step, 0)
        shown = [tf.io.decode_png(text).numpy() for text in strings[2:]]
        self.assertLen(shown, 16)
        dataset = datasets.load("digits")
        batches = dataset.train_batches(32, 0, augmentation=recipe.augmentation)
        images, _ = next(iter(batches))
        expected = images[:16] + dataset.preprocessing.mean
        expected = np.clip(expected, 0, 1) * 255
        np.testing.assert_allclose(np.stack(shown), expected, atol=1)

    def test_photos_are_shown_without_their_normalization(self):
        name = images_lib.photos(self)
        dataset = datasets.load(name, image_size=16)
        config = dataclasses.replace(tiny_runs.config(), dataset=name)
        images = summaries.first_images(config, dataset)
        self.assertEqual(images.shape, (16, 16, 16, 3))
        self.assertBetween(images.min(), 0, 1)
        self.assertBetween(images.max(), 0, 1)

    def test_some_steps_are_profiled(self):
        self.train(tiny_runs.config(), profile_steps=(3, 5))
        found = list((self.workdir / "events").rglob("*.xplane.pb"))
        self.assertLen(found, 1)

    @parameterized.parameters((5, 5), (-1, 3))
    def test_profiles_go_from_a_step_to_a_later_one(self, *steps):
        with self.assertRaisesRegex(ValueError, "A,B with 0 <= A < B"):
            profiles.Profiler(self.workdir, steps)

    def test_table_has_the_errors_the_time_and_the_device(self):
        result = self.train(tiny_runs.config())
        lines = summaries.table(result)
        for name in (
            *("last test error", "best test error", "device", "speed"),
            "multiply-adds",
        ):
            self.assertLen([line for line in lines if name in line], 1)
        self.assertTrue(result["device"])
        self.assertLessEqual(
            result["best_test_top1_error"], result["test_top1_error"]
        )
        self.assertIn(result["best_step"], (2, 4, 6, 8))

    @parameterized.parameters((), (16,), (16, 32, 32))
    def test_cost_of_a_run_is_that_of_the_list_of_recipes(self, *sizes):
        recipe = dataclasses.replace(
            recipes.RECIPES["cifar10"], progressive_sizes=sizes
        )
        config = configs.Config("resnet20", "cifar10", recipe)
        self.assertEqual(
            summaries.multiply_adds(config, keras_resnet.ResNet20()),
            recipe_table.multiply_adds(recipe, "resnet20"),
        )


if __name__ == "__main__":
    absltest.main()
