import dataclasses

import numpy as np
import PIL.Image
import tensorflow as tf
from absl.testing import absltest
from absl.testing import parameterized

from keras_resnet.data import views
from tests import images as images_lib


class PreprocessingTest(parameterized.TestCase):
    @parameterized.product(
        deviation=[None, [0.25, 0.5, 2.0]], per_pixel=[False, True]
    )
    def test_is_pixels_over_255_less_the_mean_over_the_deviation(
        self, deviation, per_pixel
    ):
        mean = np.random.default_rng(1).random((6, 6, 3) if per_pixel else 3)
        preprocessing = views.Preprocessing(6, 3, None, mean, deviation)
        images = images_lib.noise(2, 6, 6, 3)
        np.testing.assert_allclose(
            preprocessing(images),
            (images / 255 - mean) / (deviation or 1.0),
            atol=1e-6,
        )

    def test_normalizes_images_of_any_size_by_the_mean_of_each_channel(self):
        images = images_lib.noise(2, 10, 14, 3)
        expected = (
            images / 255 - images_lib.PHOTO.mean
        ) / images_lib.PHOTO.standard_deviation
        of_unknown_size = tf.function(
            images_lib.PHOTO,
            input_signature=[tf.TensorSpec([None, None, None, 3], tf.uint8)],
        )
        for answer in (images_lib.PHOTO(images), of_unknown_size(images)):
            np.testing.assert_allclose(answer, expected, atol=1e-5)

    @parameterized.parameters(None, 40)
    def test_goes_through_json_without_losing_a_bit(self, shorter_side):
        mean = np.random.default_rng(2).random((32, 32, 3)).astype(np.float32)
        deviation = np.float32([0.1, 1 / 3, 0.7]) if shorter_side else None
        before = views.Preprocessing(32, 3, shorter_side, mean, deviation)
        after = views.Preprocessing.from_json(before.to_json())
        self.assertEqual(after.mean.tobytes(), mean.tobytes())
        self.assertEqual(after.mean.dtype, np.float32)
        self.assertEqual(after.image_shape, (32, 32, 3))
        self.assertEqual(after.shorter_side, shorter_side)
        if shorter_side is None:
            self.assertIsNone(after.standard_deviation)
        else:
            np.testing.assert_array_equal(after.standard_deviation, deviation)

    @parameterized.parameters(
        ({"channels": 2}, "channels must be 1 or 3, received 2"),
        ({"image_size": 0}, "image_size must be 1 to 16384, received 0"),
        ({"shorter_side": 200}, r"times image_size \(224\), received 200"),
        ({"mean": [0.5]}, r"shape \(3,\) or \(224, 224, 3\), received \(1,\)"),
        ({"standard_deviation": [1, 0, 1]}, "3 numbers above 0"),
        ({"standard_deviation": [1]}, "3 numbers above 0"),
        ({"interpolation": "lanczos"}, "one of bilinear, bicubic, received"),
    )
    def test_refuses_what_does_not_fit_together(self, change, message):
        with self.assertRaisesRegex(ValueError, message):
            dataclasses.replace(images_lib.PHOTO, **change)

    @parameterized.parameters((37, 50), (50, 37), (16, 16), (9, 90), (200, 120))
    def test_view_is_the_centre_of_the_whole_image_resized(self, *sides):
        """Of which only the part that is needed is resized."""
        preprocessing = views.Preprocessing(16, 3, 20, [0.0] * 3)
        image = images_lib.noise(*sides, 3)
        whole = [20 * side // min(sides) for side in sides]
        # Half of the rest, rounded to even as by torchvision.
        top, left = (round((side - 16) / 2) for side in whole)
        expected = tf.image.resize(image, whole, antialias=True)
        expected = expected[top : top + 16, left : left + 16]
        view = tf.cast(preprocessing.view(image), tf.float32)
        self.assertLess(np.abs(view - expected).max(), 0.52)

    @parameterized.parameters((2, 60_000), (60_000, 2))
    def test_view_of_a_strip_is_its_middle(self, height, width):
        image = np.zeros([height, width, 1], np.uint8)
        image[height // 2 - 1 : height // 2 + 1] = 200
        image[:, width // 2 - 1 : width // 2 + 1] = 200
        view = views.Preprocessing(8, 1, 8, [0.0]).view(image)
        np.testing.assert_array_equal(view, np.full([8, 8, 1], 200))
        whole = views.Preprocessing(8, 1, None, [0.0]).view(image).numpy()
        self.assertEqual(whole.shape, (8, 8, 1))

    @parameterized.product(
        interpolation=("bilinear", "bicubic"),
        sides=((37, 50), (61, 40), (200, 120), (15, 11), (16, 300)),
        shorter_side=(20, None),
    )
    def test_views_are_those_of_pillow(
        self, interpolation, sides, shorter_side
    ):
        """To two levels: Pillow rounds after each axis."""
        preprocessing = views.Preprocessing(
            16, 3, shorter_side, [0.0] * 3, interpolation=interpolation
        )
        # Of middle values: Pillow also clips after each axis.
        image = images_lib.noise(*sides, 3) // 2 + 64
        whole = [16, 16]
        if shorter_side:
            whole = [20 * side // min(sides) for side in sides]
        method = PIL.Image.Resampling[interpolation.upper()]
        resized = PIL.Image.fromarray(image).resize(whole[::-1], method)
        top, left = (round((side - 16) / 2) for side in whole)
        expected = np.asarray(resized)[top : top + 16, left : left + 16]
        view = preprocessing.view(image).numpy().astype(int)
        difference = np.abs(view - expected)
        self.assertLess(difference.max(), 3)
        self.assertLess(np.mean(difference > 1), 0.01)

    @parameterized.parameters("bilinear", "bicubic")
    def test_ten_crops_are_resized_in_the_same_way(self, interpolation):
        preprocessing = views.Preprocessing(
            16, 3, 20, [0.0] * 3, interpolation=interpolation
        )
        image = images_lib.noise(50, 40, 3)
        centre = preprocessing.views(image, "ten_crop")[4].numpy().astype(int)
        view = preprocessing.view(image).numpy().astype(int)
        self.assertLess(np.abs(centre - view).max(), 2)

    def test_view_of_an_image_of_its_size_is_the_image(self):
        preprocessing = views.Preprocessing(32, 3, None, [0.0] * 3)
        image = images_lib.noise(32, 32, 3)
        np.testing.assert_array_equal(preprocessing.view(image), image)

    @parameterized.parameters((9, 40), (40, 9), (20, 20))
    def test_view_without_shorter_side_is_both_sides_resized(self, *sides):
        preprocessing = views.Preprocessing(16, 3, None, [0.0] * 3)
        image = images_lib.noise(*sides, 3)
        np.testing.assert_allclose(
            preprocessing.view(image),
            images_lib.numpy_resize(image, 16, 16),
            atol=0.51,
        )

    @parameterized.parameters((30, 47), (47, 30), (300, 201), (64, 64))
    def test_view_is_the_centre_of_the_resized_image(self, height, width):
        preprocessing = views.Preprocessing(28, 3, 32, [0.0] * 3)
        image = images_lib.noise(height, width, 3)
        shorter = min(height, width)
        resized = images_lib.numpy_resize(
            image, 32 * height // shorter, 32 * width // shorter
        )
        top = round((resized.shape[0] - 28) / 2)
        left = round((resized.shape[1] - 28) / 2)
        view = preprocessing.view(image)
        self.assertEqual(view.dtype, tf.uint8)
        np.testing.assert_allclose(
            view, resized[top : top + 28, left : left + 28], atol=0.51
        )


if __name__ == "__main__":
    absltest.main()
