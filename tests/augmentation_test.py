import math

import numpy as np
import pytest
import tensorflow as tf
from absl.testing import absltest
from absl.testing import parameterized

from keras_resnet.data import augmentation
from keras_resnet.data import datasets
from tests import images as images_lib


class AugmentationTest(parameterized.TestCase):
    @parameterized.parameters(((8, 8, 1),), ((32, 32, 3),), ((16, 40, 3),))
    def test_pad_crop_is_a_crop_of_the_zero_padded_image(self, shape):
        rng = np.random.default_rng(3)
        images = rng.normal(size=(50, *shape)).astype(np.float32)
        height, width, _ = shape
        above, beside = height // 8, width // 8
        top = rng.integers(0, 2 * above + 1, 50)
        left = rng.integers(0, 2 * beside + 1, 50)
        is_flipped = rng.random(50) < 0.5
        cropped = augmentation.pad_crop(
            tf.constant(images),
            tf.constant(top, tf.int32),
            tf.constant(left, tf.int32),
            tf.constant(is_flipped),
        ).numpy()
        for i in range(50):
            expected = np.pad(
                images[i], [[above, above], [beside, beside], [0, 0]]
            )[top[i] : top[i] + height, left[i] : left[i] + width]
            if is_flipped[i]:
                expected = expected[:, ::-1]
            np.testing.assert_array_equal(cropped[i], expected)

    def test_pad_crop_shows_every_crop_equally_often(self):
        crops = self.crops_of("pad_crop", 20_000)
        _, counts = np.unique(crops, return_counts=True)
        self.assertLen(counts, 9)  # 1 pixel of 8 on each side, no flips
        # 2222 expected of each, with a standard deviation of 44.
        np.testing.assert_array_less(np.abs(counts - 20_000 / 9), 220)

    def test_pad_crop_flip_shows_every_crop_and_its_flip_equally_often(self):
        crops = self.crops_of("pad_crop_flip", 20_000)
        _, counts = np.unique(crops, return_counts=True)
        self.assertLen(counts, 18)
        np.testing.assert_array_less(np.abs(counts - 20_000 / 18), 165)

    @parameterized.parameters({"seed": 6}, {"first_step": 3})
    def test_every_seed_and_step_draws_anew(self, **change):
        before = self.crops_of("pad_crop_flip", 1000)
        after = self.crops_of("pad_crop_flip", 1000, **change)
        # 56 of 1000 are expected to agree, with a standard deviation of 7.
        self.assertAlmostEqual(np.sum(before == after), 1000 / 18, delta=36)

    def crops_of(self, augmentation, count, seed=5, first_step=0):
        """Which of the 18 crops of the digits a batch has, found by search.

        The image is the normalized one, so that what was padded is zero: the
        mean is subtracted before.
        """
        digits = datasets.load("digits")
        ((plain, labels), (images, same)) = (
            images_lib.batches(
                digits.train_batches(count, seed, first_step, name), 1
            )[0]
            for name in ("none", augmentation)
        )
        np.testing.assert_array_equal(labels, same)
        padded = np.pad(plain, [[0, 0], [1, 1], [1, 1], [0, 0]])
        crops = np.stack(
            [
                padded[:, y : y + 8, x : x + 8][:, :, ::direction]
                for direction in (1, -1)
                for y in range(3)
                for x in range(3)
            ]
        )
        is_same = np.all(crops == images, axis=(2, 3, 4))
        np.testing.assert_array_equal(is_same.sum(0), 1)
        return is_same.argmax(0)

    @parameterized.parameters((375, 500), (500, 375), (256, 256))
    def test_scale_jitter_is_a_224_crop_of_a_shorter_side_of_256_to_480(
        self, height, width
    ):
        windows = self.windows_of(augmentation.scale_jitter, height, width)
        top, left, rows, columns = windows.T
        np.testing.assert_array_equal(rows, columns)
        scale = 224 * min(height, width) / rows
        self.assertAlmostEqual(scale.min(), 256, delta=1)
        self.assertAlmostEqual(scale.max(), 480, delta=2)
        self.assertAlmostEqual(scale.mean(), 368, delta=4)
        # Anywhere: the free space is divided uniformly.
        for before, free in ((top, height - rows), (left, width - columns)):
            self.assertAlmostEqual(np.mean(before / free), 0.5, delta=0.02)
            self.assertEqual(before.min(), 0)
            self.assertEqual((free - before).min(), 0)

    @parameterized.parameters((375, 500), (1000, 1000))
    def test_scale_aspect_is_8_to_100_percent_of_the_area(self, height, width):
        windows = self.windows_of(augmentation.scale_aspect, height, width)
        _, _, rows, columns = windows.T
        area = rows * columns / (height * width)
        aspect = columns / rows
        self.assertBetween(area.min(), 0.079, 0.09)
        self.assertBetween(area.max(), 0.95, 1.0)
        self.assertBetween(aspect.min(), 0.745, 0.76)
        self.assertBetween(aspect.max(), 1.32, 1.345)

    def test_scale_aspect_of_a_square_has_uniform_areas(self):
        # Areas up to 3/4 fit into a square at any aspect ratio of 3/4 to 4/3,
        # so that the draw is uniform there.
        windows = self.windows_of(augmentation.scale_aspect, 1000, 1000)
        area = windows[:, 2] * windows[:, 3] / 1e6
        counts, _ = np.histogram(area, bins=4, range=(0.08, 0.75))
        np.testing.assert_allclose(counts / counts.mean(), 1.0, atol=0.15)
        is_wide = windows[:, 3] > windows[:, 2]
        self.assertAlmostEqual(np.mean(is_wide), 0.5, delta=0.04)

    def test_scale_aspect_falls_back_to_the_square_in_the_centre(self):
        for window in self.windows_of(
            augmentation.scale_aspect, 1000, 10, count=5
        ):
            np.testing.assert_array_equal(window, [495, 0, 10, 10])

    def windows_of(self, choose, height, width, count=2000):
        random = np.random.default_rng(7).random((count, 32), np.float32)

        @tf.function
        def choose_all(height, width):
            return tf.map_fn(
                lambda numbers: choose(height, width, numbers),
                tf.constant(random),
                fn_output_signature=tf.int32,
            )

        windows = choose_all(tf.constant(height), tf.constant(width)).numpy()
        top, left, rows, columns = windows.T
        self.assertGreaterEqual(windows.min(), 0)
        self.assertTrue(np.all(top + rows <= height))
        self.assertTrue(np.all(left + columns <= width))
        return windows

    def test_colour_shift_has_the_principal_components_of_alexnet(self):
        normal = np.random.default_rng(8).normal(size=(100_000, 3))
        shift = augmentation.colour_shift(
            tf.constant(normal, tf.float32)
        ).numpy()
        # The covariance is E diag((0.1 lambda)^2) E': its eigenvalues are the
        # squares, its first eigenvector is nearly grey.
        values, vectors = np.linalg.eigh(np.cov(shift.T))
        np.testing.assert_allclose(
            np.sqrt(values[::-1]), [0.02175, 0.00188, 0.00045], rtol=0.01
        )
        np.testing.assert_allclose(
            np.abs(vectors[:, ::-1].T),
            [
                [0.5675, 0.5808, 0.5836],
                [0.7192, 0.0045, 0.6948],
                [0.4009, 0.8140, 0.4203],
            ],
            atol=3e-3,
        )
        np.testing.assert_allclose(shift.mean(0), 0.0, atol=3e-4)

    def test_scale_jitter_shifts_the_colours_of_each_image_of_a_batch(self):
        folder = images_lib.photos(self, colours=True)
        dataset = datasets.load(folder, image_size=32)
        deviation = dataset.preprocessing.standard_deviation
        ((plain, _),) = images_lib.batches(dataset.train_batches(64, seed=1), 1)
        ((images, _),) = images_lib.batches(
            dataset.train_batches(64, 1, augmentation="scale_jitter"), 1
        )
        # The photos are of one colour each: only the shift can be seen.
        shift = (images - plain) * deviation
        np.testing.assert_allclose(
            shift, np.broadcast_to(shift[:, :1, :1], shift.shape), atol=1e-5
        )
        shift = shift[:, 0, 0]
        self.assertLen(np.unique(shift[:, 0].round(6)), 64)
        self.assertBetween(np.linalg.norm(shift, axis=1).mean(), 0.012, 0.024)

    def test_scale_aspect_flips_half_of_the_images(self):
        dataset = datasets.load(images_lib.photos(self), image_size=32)
        ((images, _),) = images_lib.batches(
            dataset.train_batches(200, 2, augmentation="scale_aspect"), 1
        )
        # The photos are brighter from left to right.
        left, right = images[:, :, :3], images[:, :, -3:]
        is_flipped = left.mean((1, 2, 3)) > right.mean((1, 2, 3))
        self.assertBetween(is_flipped.mean(), 0.38, 0.62)

    def test_erased_rectangles_have_the_distribution_of_the_paper(self):
        """Zhong et al. 2020: area 2% to 33%, aspect ratio 0.3 to 3.3."""
        count, side = 4000, 50
        random = np.random.default_rng(2).random((count, 23), np.float32)
        images = tf.ones([count, side, side, 1])
        erased = augmentation.erase(images, tf.constant(random)).numpy()
        is_zero = erased[..., 0] == 0
        rows, columns = is_zero.any(2), is_zero.any(1)
        heights, widths = rows.sum(1), columns.sum(1)
        np.testing.assert_array_equal(is_zero.sum((1, 2)), heights * widths)
        self.assertLess(max(heights.max(), widths.max()), side)
        area = heights * widths / side**2
        self.assertBetween(area.min(), 0.017, 0.023)
        self.assertBetween(area.max(), 0.32, 0.345)
        # Independent draws by NumPy, with the same rule.
        rng = np.random.default_rng(9)
        expected = []
        while len(expected) < count:
            for _ in range(10):
                target = rng.uniform(0.02, 0.33) * side**2
                ratio = np.exp(rng.uniform(np.log(0.3), np.log(3.3)))
                height = round(np.sqrt(target * ratio))
                width = round(np.sqrt(target / ratio))
                if height < side and width < side:
                    expected.append((height, width))
                    break
        expected = np.array(expected)
        for got, numbers in zip((heights, widths), expected.T, strict=True):
            self.assertAlmostEqual(got.mean(), numbers.mean(), delta=0.7)
            self.assertAlmostEqual(got.std(), numbers.std(), delta=0.7)
        for one, sizes in ((rows, heights), (columns, widths)):
            free = side - sizes
            self.assertAlmostEqual(
                np.mean(one.argmax(1) / free), 0.5, delta=0.03
            )

    def test_cutout_is_a_square_anywhere(self):
        """DeVries and Taylor 2017: the centre is uniform in the image."""
        random = np.random.default_rng(2).random((3000, 2), np.float32)
        images = tf.ones([3000, 32, 32, 3])
        cut = augmentation.cutout(images, 16, tf.constant(random)).numpy()
        expected = np.ones([3000, 32, 32, 3], np.float32)
        for image, (y, x) in zip(
            expected, (random * 32).astype(int), strict=True
        ):
            image[max(y - 8, 0) : y + 8, max(x - 8, 0) : x + 8] = 0
        np.testing.assert_array_equal(cut, expected)

    def mixed(self, count=8, step=0, **alphas):
        rng = np.random.default_rng(1)
        images = rng.normal(size=(count, 32, 24, 3)).astype(np.float32)
        labels = np.arange(count, dtype=np.int32)
        key = tf.stack([tf.constant(7, tf.int64), tf.constant(step, tf.int64)])
        row = augmentation.Augmentation(**alphas)
        mixed, marks = augmentation.mix(
            row, tf.constant(images), tf.constant(labels), key
        )
        pairs = np.arange(count) ^ 1
        np.testing.assert_array_equal(marks[0], labels)
        np.testing.assert_array_equal(marks[1], labels[pairs])
        shares = marks[2].numpy()
        self.assertLen(np.unique(shares), 1)
        return images, images[pairs], mixed.numpy(), shares[0]

    def test_mixup_is_a_share_of_both_images(self):
        for step in range(5):
            images, others, mixed, share = self.mixed(
                step=step, mixup_alpha=0.4
            )
            np.testing.assert_allclose(
                mixed, share * images + (1 - share) * others, atol=1e-5
            )

    def test_cutmix_is_a_rectangle_of_the_other_image(self):
        shares = []
        for step in range(60):
            images, others, mixed, share = self.mixed(
                step=step, cutmix_alpha=1.0
            )
            is_other = np.all(mixed == others, (0, 3))
            np.testing.assert_array_equal(
                mixed, np.where(is_other[None, :, :, None], others, images)
            )
            rows, columns = is_other.any(1), is_other.any(0)
            np.testing.assert_array_equal(is_other, rows[:, None] & columns)
            for line in (rows, columns):
                self.assertLessEqual(np.sum(np.diff(line.astype(int)) == 1), 1)
            self.assertAlmostEqual(share, 1 - is_other.mean(), places=5)
            shares.append(share)
        self.assertGreater(np.std(shares), 0.1)

    @parameterized.parameters(0.1, 0.2, 1.0)
    @pytest.mark.slow
    def test_shares_have_the_beta_distribution(self, alpha):
        shares = tf.map_fn(
            lambda i: augmentation.beta(
                alpha, tf.stack([tf.constant(5, tf.int64), i])
            ),
            tf.range(4000, dtype=tf.int64),
            fn_output_signature=tf.float32,
        ).numpy()
        expected = np.random.default_rng(0).beta(alpha, alpha, 400_000)
        self.assertTrue(np.all(np.isfinite(shares)))
        levels = np.linspace(0.05, 0.95, 10)
        np.testing.assert_allclose(
            np.searchsorted(np.sort(shares), levels) / len(shares),
            np.searchsorted(np.sort(expected), levels) / len(expected),
            atol=0.035,
        )

    def test_half_of_the_batches_are_mixed_by_each_kind(self):
        both = {"mixup_alpha": 0.2, "cutmix_alpha": 1.0}
        kinds = []
        for step in range(200):
            images, others, mixed, share = self.mixed(2, step, **both)
            is_cut = np.all((mixed == images) | (mixed == others))
            kinds.append(is_cut)
            if not is_cut:
                np.testing.assert_allclose(
                    mixed, share * images + (1 - share) * others, atol=1e-5
                )
        self.assertBetween(np.mean(kinds), 0.36, 0.68)

    def test_colour_jitter_changes_brightness_contrast_and_saturation(self):
        row = augmentation.Augmentation(colour_jitter=0.4)
        view = np.random.default_rng(3).integers(60, 120, (8, 8, 3), np.uint8)
        keys = tf.constant([[1, i] for i in range(300)], tf.int64)
        changed = tf.map_fn(
            lambda key: augmentation.changed_view(row, tf.constant(view), key),
            keys,
            fn_output_signature=tf.uint8,
        ).numpy()
        ratio = changed.mean((1, 2, 3)) / view.mean()
        self.assertBetween(ratio.min(), 0.58, 0.64)
        self.assertBetween(ratio.max(), 1.36, 1.42)
        self.assertAlmostEqual(ratio.mean(), 1.0, delta=0.05)

    @parameterized.parameters(
        ({"colour_jitter": 2.0}, "colour_jitter must be in .0, 1.*2.0"),
        ({"erase_probability": -1.0}, "erase_probability must be in"),
        ({"mixup_alpha": math.inf}, "mixup_alpha must be finite"),
        ({"cutout_size": -1}, "cutout_size must be"),
        ({"repeats": 0}, "repeats must be at least 1, received 0"),
        ({"policy": "rand_augment_8"}, "did you mean rand_augment_9"),
    )
    def test_wrong_values_are_errors(self, fields, message):
        with self.assertRaisesRegex(ValueError, message):
            augmentation.Augmentation(**fields)

    def test_unknown_augmentation_is_an_error_with_near_names(self):
        with self.assertRaisesRegex(ValueError, "'pad_corp'.*mean pad_crop"):
            datasets.load("digits").train_batches(8, 0, augmentation="pad_corp")


if __name__ == "__main__":
    absltest.main()
