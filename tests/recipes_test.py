"""Recipes: the numbers of the papers, and how they are changed."""

import dataclasses
from unittest import mock

import numpy as np
from absl.testing import absltest
from absl.testing import parameterized

from keras_resnet import networks
from keras_resnet.data.augmentation import Augmentation
from keras_resnet.training import recipe_table
from keras_resnet.training import recipes
from keras_resnet.training.recipe import Recipe

# What the table of RSB has in common, and what the three procedures have.
_RSB = {
    "batch_size": 2048,
    "schedule": "cosine",
    "warmup_learning_rate": None,
    "optimizer": "lamb",
    "momentum": 0.9,
    "clip_norm": None,
    "decay_norms": False,
    "loss": "binary_cross_entropy",
    "target_threshold": 0.2,
    "average_momentum": 0.0,
    "augmentation": "scale_aspect",
    "colour_jitter": 0.0,
    "erase_probability": 0.0,
    "cutmix_alpha": 1.0,
    "image_size": 224,
    "test_crop_ratio": 0.95,
}
PUBLISHED = {
    "imagenet_rsb_a1": {
        **_RSB,
        "epochs": (600, 5),
        "learning_rate": 5e-3,
        "weight_decay": 0.01,
        "label_smoothing": 0.1,
        "policy": "rand_augment_7",
        "mixup_alpha": 0.2,
        "repeats": 3,
        "train_image_size": None,
        "model_arguments": {
            "bottleneck_stride": "3x3",
            "survival_probability": 1 - 0.05,
        },
        "expected_errors": {"resnet50": 19.6},  # 80.4%
    },
    "imagenet_rsb_a2": {
        **_RSB,
        "epochs": (300, 5),
        "learning_rate": 5e-3,
        "weight_decay": 0.02,
        "label_smoothing": 0.0,
        "policy": "rand_augment_7",
        "mixup_alpha": 0.1,
        "repeats": 3,
        "train_image_size": None,
        "model_arguments": {
            "bottleneck_stride": "3x3",
            "survival_probability": 1 - 0.05,
        },
        "expected_errors": {"resnet50": 20.2},  # 79.8%
    },
    "imagenet_rsb_a3": {
        **_RSB,
        "epochs": (100, 5),
        "learning_rate": 8e-3,
        "weight_decay": 0.02,
        "label_smoothing": 0.0,
        "policy": "rand_augment_6",
        "mixup_alpha": 0.1,
        "repeats": 1,
        "train_image_size": 160,
        "model_arguments": {"bottleneck_stride": "3x3"},
        "expected_errors": {"resnet50": 21.9},  # 78.1%
    },
    "imagenet_torchvision_v2": {
        "batch_size": 8 * 128,
        "epochs": (600, 5),
        "learning_rate": 0.5,
        "schedule": "cosine",
        "warmup_learning_rate": None,
        "optimizer": "momentum",
        "momentum": 0.9,
        "clip_norm": None,
        "weight_decay": 2e-5,
        "decay_norms": False,
        "loss": "cross_entropy",
        "label_smoothing": 0.1,
        "target_threshold": None,
        "average_momentum": 0.99996585,
        "augmentation": "scale_aspect",
        "policy": "trivial_augment_wide",
        "colour_jitter": 0.0,
        "erase_probability": 0.1,
        "mixup_alpha": 0.2,
        "cutmix_alpha": 1.0,
        "repeats": 4,
        "image_size": 224,
        "train_image_size": 176,
        "test_crop_ratio": 224 / 232,
        "model_arguments": {"bottleneck_stride": "3x3"},
        # IMAGENET1K_V2: 80.858%, 81.886%, 82.284%.
        "expected_errors": {
            "resnet50": 19.14,
            "resnet101": 18.11,
            "resnet152": 17.72,
        },
    },
}


class RecipesTest(parameterized.TestCase):
    def test_cifar_recipe_is_that_of_the_paper(self):
        """[1, Sec. 4.2]."""
        recipe = recipes.RECIPES["cifar10"]
        self.assertEqual(recipe.batch_size, 128)
        self.assertEqual(recipe.steps, 64_000)
        self.assertEqual(recipe.decay_at_steps, (32_000, 48_000))
        self.assertEqual(recipe.weight_decay, 1e-4)
        self.assertEqual(recipe.momentum, 0.9)
        rates = recipe.learning_rates()
        for step, rate in (
            *((0, 0.1), (31_999, 0.1), (32_000, 0.01), (47_999, 0.01)),
            *((48_000, 0.001), (63_999, 0.001)),
        ):
            np.testing.assert_allclose(rates(step), rate, rtol=1e-6)

    def test_warm_up_of_the_second_paper_is_constant(self):
        """[2, Sec. 4]: 0.01 for the first 400 iterations."""
        rates = recipes.RECIPES["cifar10_warmup"].learning_rates()
        for step, rate in ((0, 0.01), (399, 0.01), (400, 0.1)):
            np.testing.assert_allclose(rates(step), rate, rtol=1e-6)

    def test_modern_recipe_warms_up_linearly_and_ends_at_zero(self):
        recipe = recipes.RECIPES["imagenet_modern"]
        rates = recipe.learning_rates()
        w, n = recipe.warmup_steps, recipe.steps
        np.testing.assert_allclose(rates(0), 0.4 / w, rtol=1e-5)
        np.testing.assert_allclose(rates(w - 1), 0.4, rtol=1e-5)
        np.testing.assert_allclose(rates((w + n) // 2), 0.2, rtol=1e-3)
        np.testing.assert_allclose(rates(n), 0.0, atol=1e-6)

    @parameterized.parameters(*recipes.RECIPES)
    def test_every_row_can_be_trained(self, name):
        recipe = recipes.RECIPES[name]
        self.assertEqual(recipe.name, name)
        self.assertTrue(recipe.source)
        is_measured = name not in (
            *("cifar10_modern", "cifar10_fast", "folder", "fine_tune"),
        )
        self.assertEqual(bool(recipe.expected_errors), is_measured)
        for network in recipe.expected_errors:
            networks.get_network(network)
        points = (recipe.warmup_steps, *recipe.decay_at_steps, recipe.steps)
        self.assertEqual(points, tuple(sorted(set(points))))

    @parameterized.parameters(*PUBLISHED)
    def test_every_number_is_the_published_one(self, name):
        """Wightman et al. 2021, Table 2; pytorch/vision, issue 3995."""
        recipe, published = recipes.RECIPES[name], PUBLISHED[name]
        steps = 1_281_167 // published["batch_size"]  # of an epoch
        expected = {
            field.name: field.default
            for kind in (Recipe, Augmentation)
            for field in dataclasses.fields(kind)
            if field.default is not dataclasses.MISSING
        }
        epochs, warmup_epochs = published["epochs"]
        expected.update(published)
        del expected["epochs"]
        expected["steps"] = epochs * steps
        expected["warmup_steps"] = warmup_epochs * steps
        expected["name"], expected["source"] = name, recipe.source
        self.assertEqual(recipe.fields(), expected)

    def test_average_of_torchvision_has_its_time_constant(self):
        """Its train.py: every 32 steps, alpha = 2e-5 * images * 32 / epochs."""
        recipe = recipes.RECIPES["imagenet_torchvision_v2"]
        alpha = (1 - 0.99998) * 8 * 128 * 32 / 600
        self.assertAlmostEqual(recipe.average_momentum**32, 1 - alpha, places=7)

    def test_table_has_the_errors_the_steps_and_the_costs(self):
        """[1, Table 6]: ResNet-20 has 40.6 million multiply-adds."""
        some = {n: recipes.RECIPES[n] for n in ("digits", "cifar10_fast")}
        heading, digits, fast = recipe_table.lines(some)
        self.assertEqual(heading.split()[0], "recipe")
        cost = 3 * 40.6e6 * 64 * 800
        self.assertEqual(
            digits.split(), ["digits", "resnet20", "3", "800", f"{cost:.1e}"]
        )
        self.assertEqual(
            fast.split(), ["cifar10_fast", "any", "not", "measured", "7,000"]
        )

    def test_one_cycle_is_a_triangle(self):
        """Smith and Topin 2018."""
        recipe = recipes.RECIPES["cifar10_fast"].with_steps(100)
        rates = [float(recipe.learning_rates()(t)) for t in range(101)]
        w = recipe.warmup_steps
        up = recipe.learning_rate * np.arange(1, w + 1) / w
        down = recipe.learning_rate * (1 - np.arange(101 - w) / (100 - w))
        np.testing.assert_allclose(rates, [*up, *down], rtol=1e-5, atol=1e-8)

    def test_other_lengths_keep_the_shape(self):
        recipe = recipes.RECIPES["cifar10_warmup"].with_steps(6400)
        self.assertEqual(recipe.steps, 6400)
        self.assertEqual(recipe.warmup_steps, 40)
        self.assertEqual(recipe.decay_at_steps, (3200, 4800))

    @parameterized.parameters(
        ("learning_rate", "0.05", 0.05),
        ("learning_rate", "1", 1.0),
        ("steps", "10", 10),
        ("decay_at_steps", "[5, 7]", (5, 7)),
        ("decay_at_steps", "5", (5,)),
        ("decay_norms", "false", False),
        ("schedule", "cosine", "cosine"),
        ("image_size", "None", None),
        ("image_size", "64", 64),
        ("warmup_learning_rate", "0.02", 0.02),
        ("augmentation", "pad_crop", "pad_crop"),
        ("mixup_alpha", "0.2", 0.2),
        ("train_image_size", "160", 160),
        ("progressive_sizes", "[128, 160]", (128, 160)),
        ("expected_errors", '{"resnet20": 9}', {"resnet20": 9}),
    )
    def test_fields_are_set_from_text(self, name, text, value):
        recipe = recipes.RECIPES["imagenet"].with_field(name, text)
        self.assertEqual(recipe.fields()[name], value)
        self.assertIs(type(recipe.fields()[name]), type(value))

    @parameterized.parameters(
        ("larning_rate", "1", "did you mean 'learning_rate'"),
        ("name", "x", "unknown recipe field"),
        ("learning_rate", "fast", "type float, received 'fast'"),
        ("steps", "1.5", "type int, received '1.5'"),
        ("steps", "0", "at least 1"),
        ("decay_norms", "maybe", "type bool"),
        ("decay_at_steps", "[1.5]", "received"),
        ("schedule", "linear", "'step', 'cosine'.*'linear'"),
        ("optimizer", "sgd", "optimizer must be one of .*'lamb'.*'sgd'"),
        ("loss", "mse", "loss must be one of .*received 'mse'"),
        ("clip_norm", "0", "clip_norm must be finite and above 0"),
        ("target_threshold", "1.0", "less than 1, received 1.0"),
        ("test_crop_ratio", "2", "test_crop_ratio must be in"),
        ("train_image_size", "0", "train_image_size must be at least 1"),
        ("progressive_sizes", "[0]", "sizes of at least 1 pixel"),
        ("policy", "trivial", "unknown policy 'trivial'"),
        ("mixup_alpha", "-1", "mixup_alpha must be finite"),
        ("repeats", "0", "repeats must be at least 1"),
        ("model_arguments", "{}", "unknown recipe field"),
        ("expected_errors", "[]", "received"),
        ("micro_batches", "3", "micro_batches must divide batch_size"),
        ("average_momentum", "1.0", "less than 1, received 1.0"),
        ("momentum", "2", "momentum must be .* less than 1, received 2.0"),
        ("label_smoothing", "7", "label_smoothing must be .*received 7.0"),
        ("learning_rate", "-1", "finite and at least 0, received -1.0"),
        ("learning_rate", "NaN", "finite and at least 0, received nan"),
        ("weight_decay", "-5", "weight_decay must be finite and at least 0"),
        ("warmup_steps", "-3", "warmup_steps must be finite and at least 0"),
        ("decay_at_steps", "[-4]", "decay_at_steps must be finite"),
        ("image_size", "0", "image_size must be at least 1, received 0"),
        ("augmentation", "pad_flip", "did you mean pad_crop_flip"),
    )
    def test_wrong_fields_and_values_are_refused(self, name, text, message):
        with self.assertRaisesRegex(ValueError, message):
            recipes.RECIPES["cifar10"].with_field(name, text)

    def test_progressive_sizes_and_another_training_size_are_refused(self):
        with self.assertRaisesRegex(ValueError, "cannot be combined"):
            recipes.RECIPES["imagenet_rsb_a3"].with_field(
                "progressive_sizes", "[128, 160]"
            )

    @parameterized.parameters((12, 4), (7, 3), (2, 3), (1, 1), (1000, 7))
    def test_progressive_sizes_have_equal_parts_of_the_steps(
        self, steps, count
    ):
        sizes = tuple(range(100, 100 + count))
        recipe = dataclasses.replace(
            recipes.RECIPES["imagenet"], steps=steps, progressive_sizes=sizes
        )
        seen = [
            recipe.augmentation_at(step).train_image_size
            for step in range(steps)
        ]
        # By fractions of the run: the size of part i from i / count on.
        expected = [sizes[int(count * step / steps)] for step in range(steps)]
        self.assertEqual(seen, expected)
        step, starts = 0, []
        while step is not None and step < steps:
            starts.append(step)
            step = recipe.same_size_until(step)
        changes = [0] + [i for i in range(1, steps) if seen[i] != seen[i - 1]]
        self.assertEqual(starts, changes)

    def test_cost_of_progressive_sizes_is_the_mean_over_the_run(self):
        recipe = recipes.RECIPES["imagenet"]
        costs = [
            recipe_table.multiply_adds(
                dataclasses.replace(recipe, progressive_sizes=sizes),
                "resnet18",
            )
            for sizes in ((128,), (224,), (128, 224))
        ]
        self.assertEqual(costs[2], (costs[0] + costs[1]) // 2)

    def test_linear_scaling_is_that_of_goyal(self):
        """Goyal et al. 2017, Table 1: 0.1 for 256, 3.2 for 8,192, 90 epochs."""
        recipe = recipes.RECIPES["imagenet_identity_mappings"]
        for batch_size in (512, 8192):
            scaled = recipe.scaled_to(batch_size)
            k = batch_size / 256
            np.testing.assert_allclose(scaled.learning_rate, 0.1 * k)
            np.testing.assert_allclose(
                scaled.steps * batch_size, 90 * 1_281_167, rtol=1e-3
            )
            np.testing.assert_allclose(
                scaled.warmup_steps * batch_size, 5 * 1_281_167, rtol=1e-3
            )
            rates = scaled.learning_rates()
            w = scaled.warmup_steps
            np.testing.assert_allclose(rates(w - 1), 0.1 * k, rtol=1e-6)
            np.testing.assert_allclose(rates(0), 0.1 * k / w, rtol=1e-5)

    def test_smaller_batches_need_no_warm_up(self):
        scaled = recipes.RECIPES["cifar10"].scaled_to(64)
        self.assertEqual(scaled.warmup_steps, 0)
        self.assertEqual(scaled.steps, 128_000)
        np.testing.assert_allclose(scaled.learning_rate, 0.05)

    def test_a_constant_warm_up_is_never_hotter_than_what_follows(self):
        scaled = recipes.RECIPES["cifar10_warmup"].scaled_to(8)
        np.testing.assert_allclose(scaled.learning_rate, 0.1 / 16)
        np.testing.assert_allclose(scaled.warmup_learning_rate, 0.01 / 16)

    def test_a_linear_warm_up_keeps_its_epochs(self):
        modern = recipes.RECIPES["imagenet_modern"]
        self.assertEqual(modern.scaled_to(2048).warmup_steps, 3128)

    def test_recipes_come_back_from_json(self):
        for recipe in recipes.RECIPES.values():
            fields = recipe.to_json()
            self.assertEqual(Recipe.from_json(fields), recipe)

    @parameterized.parameters(
        ("digits", 8, "resnet20", "digits"),
        ("digits", 8, "nin", "digits"),
        ("cifar10", 32, "resnet56", "cifar10"),
        ("cifar10", 32, "resnet110", "cifar10_warmup"),
        ("cifar100", 32, "resnet20", "cifar100"),
        ("mnist", 28, "resnet20", "cifar10"),
        ("imagenet2012", 224, "resnet50", "imagenet"),
        ("cifar10", 32, "highway19", "cifar10_unnormalized"),
        ("cifar10", 32, "maxout", "cifar10_maxout"),
    )
    def test_data_sets_have_a_default_recipe(
        self, dataset, size, network, name
    ):
        network = networks.get_network(network)
        recipe = recipes.default_recipe(dataset, size, network)
        self.assertEqual(recipe.name, name)

    def test_the_default_recipe_does_not_depend_on_published_errors(self):
        for recipe in recipes.RECIPES.values():
            recipe = dataclasses.replace(recipe, expected_errors={})
            self.enter_context(
                mock.patch.dict(recipes.RECIPES, {recipe.name: recipe})
            )
        found = recipes.default_recipe(
            "cifar10", 32, networks.get_network("highway19")
        )
        self.assertEqual(found.name, "cifar10_unnormalized")

    def test_unknown_recipe_is_refused_with_a_near_one(self):
        with self.assertRaisesRegex(ValueError, "did you mean 'cifar10'"):
            recipes.get_recipe("cifar-10")


if __name__ == "__main__":
    absltest.main()
