import numpy as np
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

    def test_unknown_augmentation_is_an_error_with_near_names(self):
        with self.assertRaisesRegex(ValueError, "'pad_corp'.*mean pad_crop"):
            datasets.load("digits").train_batches(8, 0, augmentation="pad_corp")


if __name__ == "__main__":
    absltest.main()
