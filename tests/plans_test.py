"""The plan of a folder follows the number of its images."""

import math

from absl.testing import absltest
from absl.testing import parameterized

from keras_resnet import networks
from keras_resnet.training import configs
from keras_resnet.training import memory
from keras_resnet.training import plans


def plan(images, model="resnet18", size=64, **kwargs):
    network = networks.get_network(model)
    return plans.plan(images, size, network, **kwargs)


class PlansTest(parameterized.TestCase):
    @parameterized.parameters(2, 17, 292, 999, 1_000, 9_999, 50_000, 10**6)
    def test_steps_are_the_epochs_of_the_row(self, images):
        row = next(r for r in plans.SIZES if images < r.below)
        recipe = plan(images).recipe
        self.assertLessEqual(recipe.batch_size, images)
        seen = recipe.steps * recipe.batch_size
        self.assertBetween(
            seen, row.epochs * images, row.epochs * images + recipe.batch_size
        )
        self.assertLess(recipe.warmup_steps, recipe.steps)

    def test_rows_cover_all_sizes_with_larger_batches(self):
        below = [row.below for row in plans.SIZES]
        self.assertEqual(below, sorted(below))
        self.assertEqual(below[-1], math.inf)
        batches = [row.batch_size for row in plans.SIZES]
        self.assertEqual(batches, sorted(batches))

    def test_rate_of_imagenets_size_is_that_of_the_paper(self):
        """[1, Sec. 3.4]: 0.1 for 256 images."""
        recipe = plan(1_281_167, "resnet50", 224, has_photos=True).recipe
        self.assertEqual(recipe.batch_size, 256)
        self.assertAlmostEqual(recipe.learning_rate, 0.1)
        self.assertEqual(recipe.image_size, 224)

    def test_photos_of_several_sizes_have_a_size(self):
        self.assertEqual(plan(292, has_photos=True).recipe.image_size, 128)
        cifar = plan(292, "resnet20", has_photos=True).recipe
        self.assertEqual(cifar.image_size, 64)
        self.assertIsNone(plan(292).recipe.image_size)
        kept = plan(292, has_photos=True, keeps_size=True).recipe
        self.assertIsNone(kept.image_size)

    def test_reason_is_in_the_recipe(self):
        found = plan(2_000)
        self.assertIn("2,000 images: 30 epochs of 32", found.reason)
        self.assertIn("2,000 images: 30 epochs of 32", found.recipe.source)

    @parameterized.parameters(
        (False, "none", "train", "folder"),
        (True, "none", "fine_tune", "fine_tune"),
        (True, "stem,stage1", "fine_tune", "fine_tune"),
        (True, "all", "probe", "fine_tune"),
    )
    def test_mode_decides_the_recipe(self, is_tuned, freeze, mode, name):
        self.assertEqual(plans.mode(is_tuned, freeze), mode)
        recipe = plan(2_000, mode=mode).recipe
        self.assertEqual(recipe.name, name)
        self.assertEqual(recipe.augmentation.name == "none", mode == "probe")

    def test_batch_that_should_not_fit_is_halved(self):
        recipe = plan(1_281_167, "resnet50", 224, has_photos=True).recipe
        config = configs.Config("resnet20", "digits", recipe)
        model = configs.build_model(config, (32, 32, 3), 10)
        self.assertEqual(memory.planned_batch(config, model, 10**12), 256)
        found = memory.planned_batch(config, model, 2 * 10**8)
        self.assertIn(found, (8, 16, 32, 64, 128))
        self.assertEqual(memory.planned_batch(config, model, 1), 1)


if __name__ == "__main__":
    absltest.main()
