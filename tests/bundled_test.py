import pathlib

import numpy as np
from absl.testing import absltest
from absl.testing import parameterized

from keras_resnet.data import datasets
from tests import images as images_lib


class DigitsTest(absltest.TestCase):
    def test_are_those_that_were_published(self):
        path = pathlib.Path(datasets.__file__).with_name("digits.npz")
        with np.load(path) as digits:
            images, labels = digits["images"], digits["labels"]
        self.assertEqual(
            np.bincount(labels).tolist(),
            [178, 182, 177, 183, 181, 182, 181, 179, 174, 180],
        )
        # The first one, a zero, as scikit-learn's documentation prints it.
        self.assertEqual(
            images[0].tolist(),
            [
                [0, 0, 5, 13, 9, 1, 0, 0],
                [0, 0, 13, 15, 10, 15, 5, 0],
                [0, 3, 15, 2, 0, 11, 8, 0],
                [0, 4, 12, 0, 0, 8, 8, 0],
                [0, 5, 8, 0, 0, 9, 8, 0],
                [0, 4, 11, 0, 1, 12, 7, 0],
                [0, 2, 14, 5, 10, 12, 0, 0],
                [0, 0, 6, 13, 10, 0, 0, 0],
            ],
        )
        self.assertEqual(images.max(), 16)
        self.assertTrue(path.with_suffix(".txt").read_text().count("CC BY 4.0"))

    def test_a_fifth_of_each_class_is_for_test(self):
        digits = datasets.load("digits")
        counts = np.zeros(10, int)
        for _, labels in digits.test_batches(100):
            counts += np.bincount(labels, minlength=10)
        published = [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
        self.assertEqual(counts.tolist(), [count // 5 for count in published])
        self.assertEqual(digits.train_size + digits.test_size, 1797)

    def test_are_scaled_to_0_to_255(self):
        images, _ = datasets.load("digits").test_images(355)
        self.assertEqual(
            sorted(set(images.ravel())),
            [round(level * 255 / 16) for level in range(17)],
        )

    def test_mean_is_that_of_each_pixel_of_the_training_images(self):
        digits = datasets.load("digits")
        size = digits.train_size
        ((images, _),) = images_lib.batches(digits.train_batches(size, 0), 1)
        np.testing.assert_allclose(images.mean(0), 0.0, atol=1e-6)
        self.assertEqual(digits.preprocessing.mean.shape, (8, 8, 1))
        self.assertIsNone(digits.preprocessing.standard_deviation)

    def test_take_another_image_size(self):
        digits = datasets.load("digits", image_size=20)
        self.assertEqual(digits.image_shape, (20, 20, 1))
        ((images, _),) = images_lib.batches(
            digits.train_batches(digits.train_size, 0), 1
        )
        self.assertEqual(digits.preprocessing.mean.shape, (1,))
        self.assertAlmostEqual(float(images.mean()), 0.0, delta=1e-2)

    def test_take_the_preprocessing_of_another_network(self):
        digits = datasets.load("digits", preprocessing=images_lib.PHOTO)
        images, _ = digits.test_images(3)
        self.assertEqual(images.shape, (3, 224, 224, 3))
        self.assertIs(digits.preprocessing, images_lib.PHOTO)
        with self.assertRaisesRegex(ValueError, "not both"):
            datasets.load(
                "digits", image_size=8, preprocessing=images_lib.PHOTO
            )


class SyntheticTest(parameterized.TestCase):
    @parameterized.parameters((None, 32), (20, 20))
    def test_can_be_learnt(self, image_size, size):
        dataset = datasets.load("synthetic", image_size=image_size)
        self.assertEqual(dataset.image_shape, (size, size, 3))
        ((images, labels),) = images_lib.batches(
            dataset.train_batches(dataset.train_size, 0), 1
        )
        means = np.stack([images[labels == c].mean(0) for c in range(10)])
        ((tests, wanted),) = images_lib.batches(
            dataset.test_batches(dataset.test_size), 1
        )
        distance = ((tests[:, None] - means) ** 2).sum((2, 3, 4))
        np.testing.assert_array_equal(distance.argmin(1), wanted)


if __name__ == "__main__":
    absltest.main()
