"""Operations on images against Pillow, policies against their papers."""

import dataclasses
import math

import numpy as np
import pytest
import tensorflow as tf
from absl.testing import absltest
from absl.testing import parameterized

from keras_resnet.data import operations
from tests import images as images_lib

try:
    import PIL.Image
    import PIL.ImageEnhance
    import PIL.ImageOps
except ImportError:
    PIL = None

FILL = (124, 116, 104)


def photo(side=40, channels=3):
    """A picture with dark, bright and narrow channels, and with edges."""
    rng = np.random.default_rng(1)
    image = rng.integers(30, 200, (side, side, channels))
    image[: side // 2] //= 2
    image[:, side // 3 : side // 2, 0] = 220
    return image.astype(np.uint8)


def enhanced(name):
    return lambda image, value: getattr(PIL.ImageEnhance, name)(image).enhance(
        value
    )


def moved(*matrix):
    """Pillow's affine map, with `value` in place of None."""

    def apply(image, value):
        numbers = [value if number is None else number for number in matrix]
        return image.transform(
            image.size,
            PIL.Image.Transform.AFFINE,
            numbers,
            PIL.Image.Resampling.BILINEAR,
            fillcolor=FILL,
        )

    return apply


def rotated(image, value):
    return image.rotate(value, PIL.Image.Resampling.BILINEAR, fillcolor=FILL)


def solarize_added(image, value):
    table = [min(i + value, 255) if i < 128 else i for i in range(256)]
    return image.point(table * 3)


# Operation: values, Pillow's function, largest difference of a pixel.
POINTWISE = {
    "auto_contrast": ([0], lambda i, _: PIL.ImageOps.autocontrast(i), 1),
    "equalize": ([0], lambda i, _: PIL.ImageOps.equalize(i), 0),
    "invert": ([0], lambda i, _: PIL.ImageOps.invert(i), 0),
    "posterize": ([1, 2, 4, 8], lambda i, v: PIL.ImageOps.posterize(i, v), 0),
    "solarize": (
        [0, 1, 100, 255, 256],
        lambda i, v: PIL.ImageOps.solarize(i, v),
        0,
    ),
    "solarize_add": ([0, 33, 110], solarize_added, 0),
    "brightness": ([0.1, 0.5, 1.0, 1.9], enhanced("Brightness"), 1),
    "saturation": ([0.01, 0.5, 1.0, 1.9], enhanced("Color"), 1),
    "contrast": ([0.1, 0.5, 1.0, 1.9], enhanced("Contrast"), 1),
    "sharpness": ([0.1, 0.5, 1.0, 1.9], enhanced("Sharpness"), 1),
}
GEOMETRIC = {
    "shear_x": ([-0.9, 0.0, 0.21], moved(1, None, 0, 0, 1, 0)),
    "shear_y": ([-0.9, 0.0, 0.21], moved(1, 0, 0, None, 1, 0)),
    "translate_x": ([-7.3, 0.0, 4.0], moved(1, 0, None, 0, 1, 0)),
    "translate_y": ([-7.3, 0.0, 4.0], moved(1, 0, 0, 0, 1, None)),
    "rotate": ([-130.0, 0.0, 21.0], rotated),
}


@absltest.skipIf(PIL is None, "needs Pillow")
class PillowTest(parameterized.TestCase):
    @parameterized.parameters(*POINTWISE)
    def test_pixels_are_those_of_pillow(self, name):
        values, expected_of, most = POINTWISE[name]
        image = photo()
        for value in values:
            got = getattr(operations, name)(
                tf.constant(image), tf.constant(value, tf.float32)
            ).numpy()
            expected = np.asarray(
                expected_of(PIL.Image.fromarray(image), value)
            )
            difference = np.abs(got.astype(int) - expected)
            self.assertLessEqual(difference.max(), most)
            self.assertLess(np.mean(difference > 0), 0.01)

    @parameterized.parameters(*GEOMETRIC)
    def test_moved_pixels_are_those_of_pillow(self, name):
        values, expected_of = GEOMETRIC[name]
        # A smooth picture: a place is rounded to 1/256 of a pixel by Pillow.
        image = images_lib.numpy_resize(photo(8), 64, 64).astype(np.uint8)
        for value in values:
            got = getattr(operations, name)(
                tf.constant(image), tf.constant(value, tf.float32), FILL
            ).numpy()
            expected = np.asarray(
                expected_of(PIL.Image.fromarray(image), value)
            )
            difference = np.abs(got.astype(int) - expected).max(-1)
            # Pillow repeats the pixels of the edge for half a pixel;
            # TensorFlow moves to the colour outside there.
            self.assertLess(np.mean(difference > 2), 0.06)
            inside = difference[16:-16, 16:-16]
            self.assertLess(np.mean(inside > 2), 0.03)

    def test_grey_is_that_of_pillow(self):
        image = photo()
        np.testing.assert_array_equal(
            operations.grey(tf.constant(image))[..., 0],
            np.asarray(PIL.Image.fromarray(image).convert("L")),
        )


# Pillow's result for a magnitude of 0 to 1, in the order of the choices: what
# torchvision's TrivialAugmentWide applies for a positive sign.
TRIVIAL = [
    lambda i, m: i,
    lambda i, m: moved(1, None, 0, 0, 1, 0)(i, 0.99 * m),
    lambda i, m: moved(1, 0, 0, None, 1, 0)(i, 0.99 * m),
    lambda i, m: moved(1, 0, None, 0, 1, 0)(i, int(32 * m)),
    lambda i, m: moved(1, 0, 0, 0, 1, None)(i, int(32 * m)),
    lambda i, m: rotated(i, 135 * m),
    lambda i, m: enhanced("Brightness")(i, 1 + 0.99 * m),
    lambda i, m: enhanced("Color")(i, 1 + 0.99 * m),
    lambda i, m: enhanced("Contrast")(i, 1 + 0.99 * m),
    lambda i, m: enhanced("Sharpness")(i, 1 + 0.99 * m),
    lambda i, m: PIL.ImageOps.posterize(i, 8 - round(6 * m)),
    lambda i, m: PIL.ImageOps.solarize(i, 255 - 255 * m),
    lambda i, m: PIL.ImageOps.autocontrast(i),
    lambda i, m: PIL.ImageOps.equalize(i),
]
# The same for timm's rand-m7-mstd0.5-inc1.
RAND = [
    lambda i, m: PIL.ImageOps.autocontrast(i),
    lambda i, m: PIL.ImageOps.equalize(i),
    lambda i, m: PIL.ImageOps.invert(i),
    lambda i, m: rotated(i, 30 * m),
    lambda i, m: PIL.ImageOps.posterize(i, 4 - int(4 * m)),
    lambda i, m: PIL.ImageOps.solarize(i, 256 - int(256 * m)),
    lambda i, m: solarize_added(i, int(110 * m)),
    lambda i, m: enhanced("Color")(i, 1 + 0.9 * m),
    lambda i, m: enhanced("Contrast")(i, 1 + 0.9 * m),
    lambda i, m: enhanced("Brightness")(i, 1 + 0.9 * m),
    lambda i, m: enhanced("Sharpness")(i, 1 + 0.9 * m),
    lambda i, m: moved(1, None, 0, 0, 1, 0)(i, 0.3 * m),
    lambda i, m: moved(1, 0, 0, None, 1, 0)(i, 0.3 * m),
    lambda i, m: moved(1, 0, None, 0, 1, 0)(i, 0.45 * m * i.size[0]),
    lambda i, m: moved(1, 0, 0, 0, 1, None)(i, 0.45 * m * i.size[1]),
]


class PolicyTest(parameterized.TestCase):
    @parameterized.parameters(
        ("trivial_augment_wide", TRIVIAL), ("rand_augment_7", RAND)
    )
    @absltest.skipIf(PIL is None, "needs Pillow")
    def test_choices_are_those_of_the_authors(self, name, expected):
        policy = operations.get_policy(name)
        policy = dataclasses.replace(policy, fill=FILL)
        self.assertLen(policy.choices, len(expected))
        image = images_lib.numpy_resize(photo(8), 64, 64).astype(np.uint8)
        applied = tf.function(policy.applied)
        for index, expected_of in enumerate(expected):
            for magnitude in (0.2, 0.7):
                got = applied(
                    tf.constant(image),
                    tf.constant(index),
                    tf.constant(magnitude),
                    tf.constant(1.0),
                ).numpy()
                seen = np.asarray(
                    expected_of(PIL.Image.fromarray(image), magnitude)
                )
                difference = np.abs(got.astype(int) - seen)[16:-16, 16:-16]
                self.assertLess(np.mean(difference > 2), 0.03, index)

    def test_signed_operations_are_negated_for_a_negative_sign(self):
        policy = operations.get_policy("trivial_augment_wide")
        image = tf.constant(photo())
        dark = policy.applied(
            image, tf.constant(6), tf.constant(1.0), tf.constant(-1.0)
        )
        np.testing.assert_allclose(dark, 0.01 * image.numpy(), atol=1.0)

    @parameterized.parameters(
        ("trivial_augment_wide", 14, 1, 1.0),
        ("rand_augment_6", 15, 2, 0.5),
        ("rand_augment_7", 15, 2, 0.5),
    )
    @pytest.mark.slow
    def test_draws_have_the_distribution_of_the_paper(
        self, name, choices, count, probability
    ):
        """Uniform operations, and magnitudes of 31 or of a normal noise."""
        policy = operations.get_policy(name)
        drawn = []

        class Recorder(operations.Policy):
            def applied(self, image, index, magnitude, sign):
                drawn[-1].append(
                    tf.stack([tf.cast(index, "float32"), magnitude, sign])
                )
                return image

        recorder = Recorder(
            **{
                field.name: getattr(policy, field.name)
                for field in dataclasses.fields(policy)
            }
        )
        image = tf.zeros([4, 4, 3], tf.uint8)

        def draw(key):
            drawn.append([])
            recorder(image, tf.stack([tf.constant(3, tf.int64), key]))
            return tf.stack(drawn[-1])

        keys = tf.range(4000, dtype=tf.int64)
        draws = tf.map_fn(draw, keys, fn_output_signature=tf.float32).numpy()
        self.assertEqual(draws.shape, (4000, count, 3))
        index, magnitude, sign = (draws[..., i].ravel() for i in range(3))
        is_applied = index < choices
        deviation = math.sqrt(0.25 / len(index))
        self.assertAlmostEqual(
            is_applied.mean(), probability, delta=5 * deviation
        )
        _, counts = np.unique(index[is_applied], return_counts=True)
        self.assertLen(counts, choices)
        mean = is_applied.sum() / choices
        np.testing.assert_allclose(counts, mean, atol=5 * math.sqrt(mean))
        self.assertAlmostEqual(np.mean(sign < 0), 0.5, delta=5 * deviation)
        if policy.magnitude is None:
            found, counts = np.unique(magnitude.round(5), return_counts=True)
            np.testing.assert_allclose(found, np.arange(31) / 30, atol=1e-5)
            mean = len(magnitude) / 31
            np.testing.assert_allclose(counts, mean, atol=5 * math.sqrt(mean))
        else:
            expected = int(name[-1]) / 10
            self.assertAlmostEqual(magnitude.mean(), expected, delta=0.005)
            self.assertAlmostEqual(magnitude.std(), 0.05, delta=0.005)

    @parameterized.parameters(1, 3)
    @pytest.mark.slow
    def test_same_key_gives_the_same_image(self, channels):
        image = tf.constant(photo(20, channels))
        for name in ("trivial_augment_wide", "rand_augment_9"):
            policy = tf.function(operations.get_policy(name))
            key = tf.constant([1, 2], tf.int64)
            first, second = policy(image, key), policy(image, key)
            self.assertEqual(first.shape, image.shape)
            np.testing.assert_array_equal(first, second)

    def test_unknown_policy_is_an_error_with_near_names(self):
        with self.assertRaisesRegex(ValueError, "mean trivial_augment_wide"):
            operations.get_policy("trivial_augment")


if __name__ == "__main__":
    absltest.main()
