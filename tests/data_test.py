import base64
import dataclasses
import io
import json
import os
import pathlib
import shutil
import socket
import sys
import urllib.error
from unittest import mock

import numpy as np
import tensorflow as tf
from absl.testing import absltest
from absl.testing import parameterized
from PIL import Image

from keras_resnet.data import augmentation
from keras_resnet.data import datasets
from keras_resnet.data import sources
from keras_resnet.data import views
from keras_resnet.data import views as views_lib
from keras_resnet.serving import model_sources
from keras_resnet.training import configs
from keras_resnet.training import memory
from keras_resnet.training import workdirs
from tests import programs
from tests import records
from tests import tiny_runs

PHOTO = views.Preprocessing(
    224, 3, 256, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
)

# A picture of 3 x 4 pixels, and files of it that Pillow wrote.
PICTURE = np.array(
    [
        [[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255]],
        [[0, 0, 0], [10, 20, 30], [200, 100, 50], [128, 128, 128]],
        [[1, 2, 3], [250, 5, 99], [77, 88, 66], [40, 240, 140]],
    ],
    np.uint8,
)
FILES = {
    "bmp": (
        "Qk1aAAAAAAAAADYAAAAoAAAABAAAAAMAAAABABgAAAAAACQAAADEDgAAxA4AAAAAAAAAAAAA"
        "AwIBYwX6QlhNjPAoAAAAHhQKMmTIgICAAAD/AP8A/wAA////"
    ),
    "gif_of_two_frames": (
        "R0lGODdhBAADAIMAAP///yjwjICAgAD/AMhkMk1YQgoUHvoFY/8AAAECAwAA/wAAAAAAAAAA"
        "AAAAAAAAACwAAAAABAADAAAIEAARDFAAYIEBAgISHCgQICAAIfkEAQAADAAsAAAAAAQAAwCD"
        "////KPCMgICAAP8AyGQyTVhCChQe+gVj/wAAAQIDAAD/AAAAAAAAAAAAAAAAAAAACA8AExwo"
        "EICBQQYIBigAEBAAOw=="
    ),
    "webp": (
        "UklGRmIAAABXRUJQVlA4TFYAAAAvA4AAAF+gppEU6J6WCuXIwwMVCs6GmbZton4lUzzlMozj"
        "MgZT1EgKQ3OBAoRgHEX1f/MfgAIIjE8CWKbt/tIlTN9uqWkgCCCBiSSTJZZYYfGI/gfmHQ=="
    ),
    "webp_with_alpha": (
        "UklGRm4AAABXRUJQVlA4TGEAAAAvA4AAEF9gJAASYAIrmOZwm8kF3FALSRK0Gx7Ipb/E+ZOc"
        "waqKbIO6lxgSKOFP4Wc9ZAEmf/cgwhl0OEEEhJSAeCpAElG12f7TC+/4PRvbq4MggEQhlphW"
        "GGKWhSP6H5h3AA=="
    ),
    "webp_of_two_frames": (
        "UklGRgIBAABXRUJQVlA4WAoAAAASAAAAAwAAAgAAQU5JTQYAAAAAAAAAAABBTk1GbgAAAAAA"
        "AAAAAAMAAAIAAAAAAAJWUDhMVgAAAC8DgAAAX6Aqsg3qooEUoqmll08tnjVURbZBh683Jfwp"
        "QAkKIVuBOjCiSCCkjJI49f78B0ABeDAhpWWyk8+zC/Ut1rWVB4AggMQniihm2WOSbSP6H9wu"
        "QU5NRmAAAAAAAAAAAAADAAACAAAAAAAAVlA4TEcAAAAvA4AAEEegkJEk5orsy73aC1QNBW3b"
        "MOkZlGnox1EhADRMhyTcIKYxveY/AIB9yLK6in350XOeAUG2bW42IxnJSR7R/1jgAQA="
    ),
}


def numpy_resize(image, height, width):
    """Bilinear with antialiasing, by its definition, one axis at a time."""

    def weights(old, new):
        scale = old / new
        centre = (np.arange(new)[:, None] + 0.5) * scale - 0.5
        distance = np.abs(np.arange(old) - centre) / max(scale, 1.0)
        triangle = np.maximum(1.0 - distance, 0.0)
        return triangle / triangle.sum(1, keepdims=True)

    rows = weights(image.shape[0], height)
    columns = weights(image.shape[1], width)
    return np.einsum("yh,xw,hwc->yxc", rows, columns, image.astype(float))


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def batches(dataset, count):
    return [
        tuple(array.numpy() for array in batch) for batch in dataset.take(count)
    ]


def seen(preprocessing, image):
    """What the network sees of an image that is stored."""
    return preprocessing(preprocessing.view(views_lib.decode(image)))


def assert_same(actual, expected):
    assert len(actual) == len(expected)
    for a, b in zip(actual, expected, strict=True):
        for x, y in zip(a, b, strict=True):
            np.testing.assert_array_equal(x, y)


class PreprocessingTest(parameterized.TestCase):
    @parameterized.product(
        deviation=[None, [0.25, 0.5, 2.0]], per_pixel=[False, True]
    )
    def test_is_pixels_over_255_less_the_mean_over_the_deviation(
        self, deviation, per_pixel
    ):
        mean = np.random.default_rng(1).random((6, 6, 3) if per_pixel else 3)
        preprocessing = views.Preprocessing(6, 3, None, mean, deviation)
        images = noise(2, 6, 6, 3)
        np.testing.assert_allclose(
            preprocessing(images),
            (images / 255 - mean) / (deviation or 1.0),
            atol=1e-6,
        )

    def test_normalizes_images_of_any_size_by_the_mean_of_each_channel(self):
        images = noise(2, 10, 14, 3)
        expected = (images / 255 - PHOTO.mean) / PHOTO.standard_deviation
        of_unknown_size = tf.function(
            PHOTO,
            input_signature=[tf.TensorSpec([None, None, None, 3], tf.uint8)],
        )
        for answer in (PHOTO(images), of_unknown_size(images)):
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
        ({"shorter_side": 200}, r"at least image_size \(224\), received 200"),
        ({"mean": [0.5]}, r"shape \(3,\) or \(224, 224, 3\), received \(1,\)"),
        ({"standard_deviation": [1, 0, 1]}, "3 numbers above 0"),
        ({"standard_deviation": [1]}, "3 numbers above 0"),
    )
    def test_refuses_what_does_not_fit_together(self, change, message):
        with self.assertRaisesRegex(ValueError, message):
            dataclasses.replace(PHOTO, **change)

    @parameterized.parameters((37, 50), (50, 37), (16, 16), (9, 90), (200, 120))
    def test_view_is_the_centre_of_the_whole_image_resized(self, *sides):
        """Of which only the part that is needed is resized."""
        preprocessing = views.Preprocessing(16, 3, 20, [0.0] * 3)
        image = noise(*sides, 3)
        whole = [20 * side // min(sides) for side in sides]
        top, left = ((side - 16) // 2 for side in whole)
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

    @parameterized.parameters(
        ("JPEG", "L", 3),
        ("JPEG", "CMYK", 3),
        ("PNG", "L", 0),
        ("PNG", "LA", 0),
        ("PNG", "RGBA", 0),
        ("PNG", "P", 0),
        ("PNG", "1", 0),
        ("GIF", "P", 0),
        ("BMP", "RGBA", 0),
        ("WEBP", "RGBA", 3),
    )
    def test_every_kind_of_file_is_seen_as_pillow_sees_it(
        self, kind, mode, tolerance
    ):
        image = Image.fromarray(noise(4, 5, 3)).resize((20, 16)).convert(mode)
        file = io.BytesIO()
        image.save(file, kind)
        view = views.Preprocessing(16, 3, 16, [0.0] * 3).decode(
            tf.constant(file.getvalue())
        )
        # Alpha is dropped, not laid on black.
        plain = Image.open(file).convert("RGBA").convert("RGB")
        error = np.abs(
            tf.cast(view, tf.float32) - np.asarray(plain, np.float32)[:, 2:18]
        )
        self.assertLessEqual(error.mean(), tolerance)

    def test_16_bits_are_cut_to_8(self):
        deep = noise(8, 8, 1).astype(np.uint16) * 257
        file = io.BytesIO()
        Image.fromarray(deep[..., 0]).save(file, "PNG")
        view = views.Preprocessing(8, 1, None, [0.0]).decode(
            tf.constant(file.getvalue())
        )
        np.testing.assert_array_equal(view, deep // 257)

    def test_colours_of_a_bmp_with_a_palette_are_looked_up(self):
        """As Pillow, which wrote it, reads it."""
        image = Image.fromarray(noise(6, 7, 3)).quantize(5)
        file = io.BytesIO()
        image.save(file, "BMP")
        decoded = views_lib.decode(tf.constant(file.getvalue()))
        np.testing.assert_array_equal(decoded, image.convert("RGB"))

    def test_view_of_an_image_of_its_size_is_the_image(self):
        preprocessing = views.Preprocessing(32, 3, None, [0.0] * 3)
        image = noise(32, 32, 3)
        np.testing.assert_array_equal(preprocessing.view(image), image)

    @parameterized.parameters((9, 40), (40, 9), (20, 20))
    def test_view_without_shorter_side_is_both_sides_resized(self, *sides):
        preprocessing = views.Preprocessing(16, 3, None, [0.0] * 3)
        image = noise(*sides, 3)
        np.testing.assert_allclose(
            preprocessing.view(image),
            numpy_resize(image, 16, 16),
            atol=0.51,
        )

    @parameterized.parameters((30, 47), (47, 30), (300, 201), (64, 64))
    def test_view_is_the_centre_of_the_resized_image(self, height, width):
        preprocessing = views.Preprocessing(28, 3, 32, [0.0] * 3)
        image = noise(height, width, 3)
        shorter = min(height, width)
        resized = numpy_resize(
            image, 32 * height // shorter, 32 * width // shorter
        )
        top = (resized.shape[0] - 28) // 2
        left = (resized.shape[1] - 28) // 2
        view = preprocessing.view(image)
        self.assertEqual(view.dtype, tf.uint8)
        np.testing.assert_allclose(
            view, resized[top : top + 28, left : left + 28], atol=0.51
        )

    @parameterized.parameters(*FILES)
    def test_decodes(self, name):
        image = views_lib.decode(tf.constant(base64.b64decode(FILES[name])))
        np.testing.assert_array_equal(image[..., :3], PICTURE)

    @parameterized.parameters(1, 2, 3, 4)
    def test_decodes_png_of_any_channels_to_what_is_wanted(self, channels):
        image = noise(5, 5, channels)
        encoded = tf.io.encode_png(image)
        for wanted in (1, 3):
            preprocessing = views.Preprocessing(5, wanted, None, [0.0] * wanted)
            colours = image[..., : 3 if channels > 2 else 1].astype(float)
            if wanted == 1 and channels > 2:
                colours = colours @ [[0.299], [0.587], [0.114]]
            np.testing.assert_allclose(
                preprocessing.decode(encoded),
                np.broadcast_to(colours, (5, 5, wanted)),
                atol=1.0 if wanted == 1 and channels > 2 else 0.0,
            )

    def test_decodes_16_bits_to_the_upper_8(self):
        image = np.arange(25, dtype=np.uint16).reshape(5, 5, 1) * 2600
        preprocessing = views.Preprocessing(5, 1, None, [0.0])
        np.testing.assert_array_equal(
            preprocessing.decode(tf.io.encode_png(image)), image >> 8
        )

    def test_decodes_in_a_graph_as_outside_of_it(self):
        signature = [tf.TensorSpec([], tf.string)]
        decode = tf.function(PHOTO.decode, input_signature=signature)
        for image in (noise(250, 300, 3), noise(500, 260, 1)):
            encoded = tf.io.encode_jpeg(image)
            view = decode(encoded)
            self.assertEqual(view.shape, (224, 224, 3))
            np.testing.assert_array_equal(view, PHOTO.decode(encoded))

    # An animation without alpha makes TensorFlow 2.21 write beyond its memory
    # where it is left to find the number of channels.
    def test_animation_without_alpha_is_an_error_and_no_crash(self):
        animation = bytearray(base64.b64decode(FILES["webp_of_two_frames"]))
        self.assertEqual(animation[20], 0x12)
        animation[20] = 0x02
        with self.assertRaises(tf.errors.InvalidArgumentError):
            PHOTO.decode(tf.constant(bytes(animation)))

    @parameterized.parameters(
        b"", b"no image", b"RIFF", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0"
    )
    def test_what_is_no_image_is_an_error(self, encoded):
        with self.assertRaises(tf.errors.InvalidArgumentError):
            PHOTO.decode(tf.constant(encoded))


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
            batches(digits.train_batches(count, seed, first_step, name), 1)[0]
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

    @parameterized.product(
        encode=[tf.io.encode_jpeg, tf.io.encode_png],
        window=[(0, 0, 40, 50), (7, 13, 20, 31), (39, 49, 1, 1)],
    )
    def test_window_that_is_decoded_is_that_of_the_image(self, encode, window):
        smooth = numpy_resize(noise(5, 6, 3), 40, 50).astype(np.uint8)
        encoded = encode(smooth)
        image = tf.io.decode_image(encoded).numpy()
        top, left, height, width = window
        decoded = views_lib.decode_window(
            encoded, lambda *_: tf.constant(window, tf.int32), 3
        )
        expected = image[top : top + height, left : left + width]
        if encode is tf.io.encode_jpeg:
            # At its border a window has no neighbours to smooth colours with.
            self.assertEqual(decoded.shape, expected.shape)
            decoded, expected = decoded[1:-1, 1:-1], expected[1:-1, 1:-1]
        np.testing.assert_array_equal(decoded, expected)

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
        folder = photos(self, colours=True)
        dataset = datasets.load(folder)
        deviation = dataset.preprocessing.standard_deviation
        ((plain, _),) = batches(dataset.train_batches(64, seed=1), 1)
        ((images, _),) = batches(
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
        dataset = datasets.load(photos(self))
        ((images, _),) = batches(
            dataset.train_batches(200, 2, augmentation="scale_aspect"), 1
        )
        # The photos are brighter from left to right.
        is_flipped = images[:, :, :20].mean((1, 2, 3)) > images[
            :, :, -20:
        ].mean((1, 2, 3))
        self.assertBetween(is_flipped.mean(), 0.38, 0.62)

    def test_unknown_augmentation_is_an_error_with_near_names(self):
        with self.assertRaisesRegex(ValueError, "'pad_corp'.*mean pad_crop"):
            datasets.load("digits").train_batches(8, 0, augmentation="pad_corp")


def photos(test, colours=False, count=12):
    """folder:PATH of PNG files of several sizes, each unlike the others."""
    root = pathlib.Path(records.scratch(test))
    for i in range(count):
        height, width = 240 + 7 * (i % 5), 230 + 11 * (i % 3)
        image = np.full((height, width, 3), 20 * i, np.uint8)
        if not colours:
            image[..., 0] = np.linspace(0, 255, width)
        path = root / f"class_{i % 2}" / f"{i:02d}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(tf.io.encode_png(image).numpy())
    return f"folder:{root}"


def of_each_kind(test):
    """Data sets in memory, of files, and of records: all ways to read."""
    directory = records.tfds_set(test, (None, None, 3), train=40, test=11)
    return {
        "memory": datasets.load("digits"),
        "files": datasets.load(photos(test), image_size=32),
        "records": datasets.load("tiny", directory, image_size=32),
        "validation": datasets.load("tiny", directory).with_validation(),
    }


class TrainBatchesTest(parameterized.TestCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.sets = of_each_kind(cls)

    @parameterized.product(
        kind=["memory", "files", "records"],
        augmentation=["pad_crop_flip", "scale_jitter"],
    )
    def test_is_a_pure_function_of_seed_and_step(self, kind, augmentation):
        dataset = self.sets[kind]

        def taken(seed, first_step, count):
            return batches(
                dataset.train_batches(8, seed, first_step, augmentation), count
            )

        tf.random.set_seed(1)
        from_start = taken(seed=3, first_step=0, count=9)
        tf.random.set_seed(2)
        assert_same(taken(seed=3, first_step=7, count=2), from_start[7:])
        other = taken(seed=4, first_step=0, count=1)
        self.assertFalse(np.array_equal(other[0][0], from_start[0][0]))
        self.assertEqual(from_start[0][0].dtype, np.float32)
        self.assertEqual(from_start[0][1].dtype, np.int32)
        self.assertEqual(from_start[0][0].shape, (8, *dataset.image_shape))

    @parameterized.parameters("memory", "files", "records")
    def test_every_epoch_has_every_image_once_in_another_order(self, kind):
        dataset = self.sets[kind]
        size = dataset.train_size
        # One batch is an epoch and a half: batches reach over its end.
        pairs = batches(dataset.train_batches(size + size // 2, seed=0), 2)
        images = np.concatenate([images for images, _ in pairs])
        labels = np.concatenate([labels for _, labels in pairs])
        epochs = [
            [
                (image.tobytes(), int(label))
                for image, label in zip(
                    images[size * e : size * (e + 1)],
                    labels[size * e : size * (e + 1)],
                    strict=True,
                )
            ]
            for e in range(3)
        ]
        views = dataset._train.stored().map(
            lambda image, label: (seen(dataset.preprocessing, image), label)
        )
        stored = sorted(
            (image.tobytes(), int(label))
            for image, label in views.as_numpy_iterator()
        )
        for epoch in epochs:
            self.assertEqual(sorted(epoch), stored)
        self.assertNotEqual(epochs[0], epochs[1])
        self.assertNotEqual(epochs[1], epochs[2])

    @parameterized.parameters("seeds", "epochs")
    def test_the_orders_of_epochs_and_of_seeds_are_unrelated(self, of):
        split = self.sets["memory"]._train
        size, count = split.size, 200
        position = tf.range(size, dtype=tf.int64)
        orders = np.stack(
            [
                split.index(position, seed=i)
                if of == "seeds"
                else split.index(position + i * size, seed=0)
                for i in range(count)
            ]
        )
        np.testing.assert_array_equal(
            np.sort(orders), np.broadcast_to(position, orders.shape)
        )
        # Two random orders have 1 +- 1 images in the same place, neighbours
        # are a third of the size apart, an image's place is uniform.
        kept = np.sum(orders[1:] == orders[:-1], axis=1)
        self.assertAlmostEqual(kept.mean(), 1.0, delta=0.35)
        apart = np.abs(np.diff(orders)).mean()
        self.assertAlmostEqual(apart / size, 1 / 3, delta=0.01)
        places = np.histogram(orders[:, :100], bins=20, range=(0, size))[0]
        np.testing.assert_allclose(places / places.mean(), 1.0, atol=0.2)

    @parameterized.product(
        kind=["memory", "files", "records"],
        augmentation=["pad_crop_flip", "scale_jitter"],
    )
    def test_the_shares_of_the_workers_are_the_batch(self, kind, augmentation):
        dataset = self.sets[kind]

        def taken(shard):
            return batches(
                dataset.train_batches(12, 1, 2, augmentation, shard), 3
            )

        shares = [taken((index, 3)) for index in range(3)]
        together = [
            tuple(map(np.concatenate, zip(*parts, strict=True)))
            for parts in zip(*shares, strict=True)
        ]
        assert_same(together, taken((0, 1)))

    @parameterized.parameters((0, 3), (2, 2), (-1, 2))
    def test_shard_that_does_not_divide_the_batch_is_an_error(self, *shard):
        with self.assertRaisesRegex(ValueError, f"received .{shard[0]}, "):
            self.sets["memory"].train_batches(8, 0, shard=shard)
        with self.assertRaisesRegex(ValueError, "shard must be"):
            self.sets["memory"].padded_test_batches(8, shard=shard)

    def test_starting_inside_an_epoch_decodes_nothing_before(self):
        folder = photos(self)
        dataset = datasets.load(folder, image_size=32)
        # The file at position 4 of the first epoch is broken.
        index = dataset._train.index(tf.constant(4, tf.int64), seed=0)
        broken = dataset._train.name(int(index))
        pathlib.Path(broken).write_bytes(b"broken")
        self.assertLen(batches(dataset.train_batches(1, 0, 5), 5), 5)
        with self.assertRaises(tf.errors.InvalidArgumentError):
            batches(dataset.train_batches(1, 0, 4), 1)
        with self.assertRaisesRegex(ValueError, broken):
            dataset.check()


class TestBatchesTest(parameterized.TestCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.sets = of_each_kind(cls)

    @parameterized.product(
        kind=["memory", "files", "records"], batch_size=[1, 4, 100]
    )
    def test_padded_have_every_image_once_in_order(self, kind, batch_size):
        dataset = self.sets[kind]
        padded = dataset.padded_test_batches(batch_size)
        found = list(padded.as_numpy_iterator())
        for images, _, counted in found:
            self.assertEqual(images.shape, (batch_size, *dataset.image_shape))
            self.assertEqual(counted.dtype, np.float32)
        images, labels, counted = map(np.concatenate, zip(*found, strict=True))
        self.assertLen(found, -(-dataset.test_size // batch_size))
        self.assertEqual(counted.sum(), dataset.test_size)
        stored = list(dataset._test.stored())
        self.assertLen(stored, dataset.test_size)
        for i, (image, label) in enumerate(stored):
            self.assertEqual(counted[i], 1.0)
            self.assertEqual(labels[i], label)
            np.testing.assert_array_equal(
                images[i], seen(dataset.preprocessing, image)
            )

    @parameterized.parameters("memory", "files", "records")
    def test_the_shares_of_the_workers_are_the_batches(self, kind):
        dataset = self.sets[kind]
        shares = [
            list(dataset.padded_test_batches(8, (index, 4)).as_numpy_iterator())
            for index in range(4)
        ]
        together = [
            tuple(map(np.concatenate, zip(*parts, strict=True)))
            for parts in zip(*shares, strict=True)
        ]
        whole = dataset.padded_test_batches(8).as_numpy_iterator()
        assert_same(together, list(whole))

    @parameterized.product(
        kind=["memory", "files", "records", "validation"],
        batch_size=[1, 2, 4, 10**15],
        protocol=views.PROTOCOLS,
    )
    def test_are_the_padded_ones_without_filler(
        self, kind, batch_size, protocol
    ):
        if kind == "memory" and batch_size == 1:
            self.skipTest("355 batches, which say nothing new")
        dataset = self.sets[kind]
        size = dataset.test_size
        of_scales = protocol == "multi_scale" and dataset.has_photos
        found = dataset.test_batches(batch_size, protocol)
        self.assertLen(found, size if of_scales else -(-size // batch_size))
        padded = dataset.padded_test_batches(
            min(batch_size, size), protocol=protocol
        )
        count = 0
        for (seen, labels), (expected, numbers, counted) in zip(
            found, padded, strict=False
        ):
            real = counted.numpy() > 0
            tf.nest.map_structure(
                lambda a, b, real=real: np.testing.assert_array_equal(
                    a, b.numpy()[real]
                ),
                (seen, labels),
                (expected, numbers),
            )
            count += len(labels)
        self.assertEqual(count, size)

    @parameterized.parameters("memory", "files", "records")
    def test_images_are_the_first_views(self, kind):
        dataset = self.sets[kind]
        images, labels = dataset.test_images(2)
        ((expected, numbers),) = batches(dataset.test_batches(2), 1)
        self.assertEqual(images.dtype, np.uint8)
        np.testing.assert_array_equal(dataset.preprocessing(images), expected)
        np.testing.assert_array_equal(labels, numbers)

    def test_examples_are_png_files_named_by_their_labels(self):
        digits = datasets.load("digits")
        directory = os.path.join(records.scratch(self), "new")
        paths = datasets.write_examples(digits, directory, 4)
        images, labels = digits.test_images(4)
        self.assertEqual(
            sorted(os.listdir(directory)),
            [f"{i:02d}_label_{label}.png" for i, label in enumerate(labels)],
        )
        for path, image in zip(paths, images, strict=True):
            decoded = digits.preprocessing.decode(tf.io.read_file(path))
            np.testing.assert_array_equal(decoded, image)


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
        ((images, _),) = batches(digits.train_batches(size, 0), 1)
        np.testing.assert_allclose(images.mean(0), 0.0, atol=1e-6)
        self.assertEqual(digits.preprocessing.mean.shape, (8, 8, 1))
        self.assertIsNone(digits.preprocessing.standard_deviation)

    def test_take_another_image_size(self):
        digits = datasets.load("digits", image_size=20)
        self.assertEqual(digits.image_shape, (20, 20, 1))
        ((images, _),) = batches(digits.train_batches(digits.train_size, 0), 1)
        self.assertEqual(digits.preprocessing.mean.shape, (1,))
        self.assertAlmostEqual(float(images.mean()), 0.0, delta=1e-2)

    def test_take_the_preprocessing_of_another_network(self):
        digits = datasets.load("digits", preprocessing=PHOTO)
        images, _ = digits.test_images(3)
        self.assertEqual(images.shape, (3, 224, 224, 3))
        self.assertIs(digits.preprocessing, PHOTO)
        with self.assertRaisesRegex(ValueError, "not both"):
            datasets.load("digits", image_size=8, preprocessing=PHOTO)


class SyntheticTest(parameterized.TestCase):
    @parameterized.parameters((None, 32), (20, 20))
    def test_can_be_learnt(self, image_size, size):
        dataset = datasets.load("synthetic", image_size=image_size)
        self.assertEqual(dataset.image_shape, (size, size, 3))
        ((images, labels),) = batches(
            dataset.train_batches(dataset.train_size, 0), 1
        )
        means = np.stack([images[labels == c].mean(0) for c in range(10)])
        ((tests, wanted),) = batches(dataset.test_batches(dataset.test_size), 1)
        distance = ((tests[:, None] - means) ** 2).sum((2, 3, 4))
        np.testing.assert_array_equal(distance.argmin(1), wanted)


class FolderTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.root = pathlib.Path(records.scratch(self))

    def write(self, name, image, encode=tf.io.encode_png):
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(image).numpy())

    def load(self, **kwargs):
        return datasets.load(f"folder:{self.root}", **kwargs)

    def test_of_small_images_has_their_size_and_the_mean_of_each_pixel(self):
        for i in range(20):
            self.write(
                f"{'no' if i % 2 else 'yes'}/{i}.png", noise(12, 12, 1, seed=i)
            )
        dataset = self.load()
        self.assertEqual(dataset.labels, ["no", "yes"])
        self.assertEqual(dataset.image_shape, (12, 12, 1))
        self.assertEqual((dataset.train_size, dataset.test_size), (16, 4))
        ((images, _),) = batches(dataset.train_batches(16, 0), 1)
        np.testing.assert_allclose(images.mean(0), 0.0, atol=1e-6)

    def test_of_grey_and_colour_is_colour(self):
        self.write("a/1.png", noise(9, 9, 1))
        self.write("a/2.png", noise(9, 9, 4))
        self.write("b/1.png", noise(9, 9, 2))
        self.write("b/2.png", noise(9, 9, 3))
        self.assertEqual(self.load().image_shape, (9, 9, 3))

    def test_of_oblong_small_images_is_resized_to_squares(self):
        for name in ("a/1.png", "a/2.png", "b/1.png", "b/2.png"):
            self.write(name, noise(10, 16, 3))
        dataset = self.load()
        self.assertEqual(dataset.image_shape, (16, 16, 3))
        images, _ = dataset.test_images(1)
        np.testing.assert_allclose(
            images[0], numpy_resize(noise(10, 16, 3), 16, 16), atol=0.51
        )

    def test_of_photos_is_224_of_256(self):
        dataset = datasets.load(photos(self))
        self.assertEqual(dataset.image_shape, (224, 224, 3))
        self.assertEqual(dataset.preprocessing.shorter_side, 256)
        np.testing.assert_array_equal(dataset.preprocessing.mean, PHOTO.mean)
        larger = datasets.load(photos(self), image_size=448)
        self.assertEqual(larger.preprocessing.shorter_side, 512)

    def test_may_have_train_and_test(self):
        for i in range(3):
            self.write(f"train/a/{i}.png", noise(8, 8, 3))
            self.write(f"train/b/{i}.JPG", noise(8, 8, 3), tf.io.encode_jpeg)
            self.write(f"val/b/{i}.png", np.full((8, 8, 3), i, np.uint8))
            self.write(f"val/a/{i}.png", np.full((8, 8, 3), 9, np.uint8))
        (self.root / "train/a/notes.txt").write_text("no image")
        (self.root / "train/a/.hidden.png").write_text("no image")
        dataset = self.load()
        self.assertEqual((dataset.train_size, dataset.test_size), (6, 6))
        images, labels = dataset.test_images(6)
        self.assertEqual(labels.tolist(), [0, 0, 0, 1, 1, 1])
        self.assertEqual(images[:, 0, 0, 0].tolist(), [9, 9, 9, 0, 1, 2])

    def test_a_class_may_be_called_train(self):
        for word in ("train", "plane"):
            self.write(f"{word}/1.png", noise(8, 8, 3))
            self.write(f"{word}/2.png", noise(8, 8, 3))
        self.assertEqual(self.load().labels, ["plane", "train"])

    def test_keeps_its_test_images_when_images_come_in(self):
        names = [f"a/{i}.png" for i in range(100)]
        for name in names + ["b/1.png", "b/2.png"]:
            self.write(name, noise(4, 4, 1))
        before = set(sources.held_out([str(self.root / n) for n in names]))
        self.assertLen(before, 20)
        more = [str(self.root / f"a/{i}.png") for i in range(105)]
        self.assertGreaterEqual(len(before & set(sources.held_out(more))), 18)

    def test_that_is_not_there(self):
        with self.assertRaisesRegex(FileNotFoundError, "nowhere' is none"):
            datasets.load("folder:nowhere")

    def test_that_is_empty(self):
        with self.assertRaisesRegex(FileNotFoundError, "has no folder"):
            self.load()

    def test_with_an_empty_class(self):
        self.write("a/1.png", noise(4, 4, 1))
        (self.root / "b").mkdir()
        with self.assertRaisesRegex(FileNotFoundError, "b must hold images"):
            self.load()

    def test_of_one_class(self):
        self.write("only/1.png", noise(4, 4, 1))
        with self.assertRaisesRegex(ValueError, "it has only only"):
            self.load()

    def test_without_an_image_for_test(self):
        self.write("a/1.png", noise(4, 4, 1))
        self.write("b/1.png", noise(4, 4, 1))
        with self.assertRaisesRegex(ValueError, "must have 2 images or more"):
            self.load()

    def test_whose_test_has_other_classes(self):
        for name in ("train/a/1.png", "train/b/1.png", "test/c/1.png"):
            self.write(name, noise(4, 4, 1))
        with self.assertRaisesRegex(ValueError, "a, b; it has c"):
            self.load()

    def test_with_a_file_that_does_not_decode(self):
        for i in range(4):
            self.write(f"a/{i}.png", noise(4, 4, 1))
            self.write(f"b/{i}.png", noise(4, 4, 1))
        (self.root / "b/2.png").write_bytes(b"broken")
        with self.assertRaisesRegex(ValueError, "b/2.png does not decode"):
            self.load()

    @parameterized.parameters(
        ("pipe", "received a pipe"),
        ("socket", "received a socket"),
        ("directory", "received a directory"),
        ("link to /dev/zero", "received a device"),
        ("link to a pipe", "received a pipe"),
        ("link to nothing", "cannot be opened"),
        ("file of 10 GB", "at most 268,435,456 bytes, received 10,000,000,000"),
    )
    def test_takes_regular_files_only(self, what, message):
        for name in ("a/1.png", "a/2.png", "b/1.png", "b/2.png"):
            self.write(name, noise(4, 4, 1))
        odd, pipe = self.root / "b/odd.jpg", self.root / "pipe"
        os.mkfifo(pipe)
        if what == "pipe":
            os.mkfifo(odd)
        elif what == "socket":
            with socket.socket(socket.AF_UNIX) as opened:
                opened.bind(str(odd))
        elif what == "directory":
            odd.mkdir()
        elif what == "file of 10 GB":
            with open(odd, "wb") as file:
                file.truncate(10**10)
        else:
            places = {"/dev/zero": "/dev/zero", "a pipe": pipe, "nothing": "no"}
            odd.symlink_to(places[what.removeprefix("link to ")])
        with self.assertRaisesRegex(ValueError, f"b/odd.jpg must .*{message}"):
            self.load()

    def test_name_of_a_file_need_not_be_utf8(self):
        for name in ("a/1.png", "a/\udcff.png", "b/1.png", "b/\udcfe.png"):
            self.write(name, noise(4, 4, 1))
        dataset = self.load()
        self.assertEqual(dataset.train_size + dataset.test_size, 4)
        (self.root / "a/\udcff.png").write_bytes(b"broken")
        with self.assertRaisesRegex(ValueError, "a/\udcff.png does not decode"):
            self.load()

    def test_record_changes_with_the_images(self):
        names = [f"{word}/{i}.png" for word in "ab" for i in range(6)]
        self.enter_context(  # nothing has to be decoded
            mock.patch.object(sources, "_small_folder", return_value=None)
        )

        def record():
            for i, name in enumerate(names):
                self.write(name, noise(4, 4, 1, seed=i))
            return self.load().record

        before = record()
        self.assertEqual(record(), before)
        changes = {
            "moved": lambda: os.rename(
                self.root / names[0], self.root / "b/new.png"
            ),
            "deleted": lambda: os.remove(self.root / names[1]),
            "added": lambda: self.write("a/new.png", noise(4, 4, 1)),
            "renamed": lambda: os.rename(
                self.root / names[2], self.root / "a/22.png"
            ),
            "exchanged": lambda: self.write(names[3], noise(4, 4, 1, seed=9)),
        }
        for what, change in changes.items():
            before = record()
            change()
            self.assertNotEqual(self.load().record, before, msg=what)

    def test_record_of_a_large_folder_is_of_names_and_sizes(self):
        for name in ("a/1.png", "a/2.png", "b/1.png", "b/2.png"):
            self.write(name, noise(4, 4, 1))
        with (
            mock.patch.object(sources, "_SMALL_BYTES", 0),
            mock.patch.object(sources, "_small_folder", return_value=None),
        ):
            before = self.load().record
            path = self.root / "a/1.png"
            size = path.stat().st_size
            path.write_bytes(bytes(size))
            self.assertEqual(self.load().record, before)
            path.write_bytes(bytes(size + 1))
            self.assertNotEqual(self.load().record, before)


class TfdsTest(parameterized.TestCase):
    def test_of_small_grey_images_is_held_in_memory(self):
        directory = records.tfds_set(self, (12, 12, 1), train=30, test=9)
        dataset = datasets.load("tiny", directory)
        self.assertEqual(dataset.labels, ["a", "b", "c"])
        self.assertEqual(dataset.image_shape, (12, 12, 1))
        ((images, labels),) = batches(dataset.train_batches(30, 0), 1)
        numbers = (images[:, 0, 0, 0] + 14.5 / 255) * 255
        np.testing.assert_allclose(sorted(numbers), range(30), atol=1e-4)
        np.testing.assert_array_equal(labels, numbers.round() % 3)

    def test_of_photos_is_read_as_it_is_needed(self):
        directory = records.tfds_set(self, (None, None, 3), train=9, test=4)
        dataset = datasets.load("tiny", directory)
        self.assertEqual(dataset.image_shape, (224, 224, 3))
        self.assertEqual((dataset.train_size, dataset.test_size), (9, 4))

    def test_without_test_keeps_the_last_fifth(self):
        directory = records.tfds_set(self, (8, 8, 1), train=50)
        dataset = datasets.load("tiny", directory)
        self.assertEqual((dataset.train_size, dataset.test_size), (40, 10))
        ((images, _),) = batches(dataset.train_batches(40, 0), 1)
        numbers = (images + dataset.preprocessing.mean)[:, 0, 0, 0] * 255
        tests = dataset.test_images(10)[0][:, 0, 0, 0]
        self.assertEqual(
            sorted([*numbers.round().astype(int), *tests]), list(range(50))
        )

    def test_is_tested_on_validation_where_test_has_no_labels(self):
        directory = records.tfds_set(
            self, (8, 8, 1), ("test",), train=9, validation=5, test=7
        )
        self.assertEqual(datasets.load("tiny", directory).test_size, 5)

    @parameterized.parameters(((8, 8, 1),), ((None, None, 3),))
    def test_with_a_record_that_does_not_decode(self, shape):
        directory = records.tfds_set(self, shape, (), 3, train=9, test=3)
        with self.assertRaisesRegex(
            ValueError, r"record \d of tiny/train does not decode"
        ):
            datasets.load("tiny", directory).check()

    def test_to_be_tested_on_does_not_read_its_training_images(self):
        directory = records.tfds_set(self, (8, 8, 1), (), 8, train=9, test=3)
        preprocessing = views.Preprocessing(8, 1, None, [0.5])
        dataset = datasets.load("tiny", directory, preprocessing=preprocessing)
        images, _ = dataset.test_images(3)  # the training images are broken
        self.assertLen(images, 3)

    def test_record_has_the_version_and_the_sizes(self):
        directory = records.tfds_set(self, (8, 8, 1), train=9, test=7)
        self.assertEqual(
            datasets.load("tiny", directory).record,
            {"version": "1.0.0", "config": None, "train": 9, "test": 7},
        )

    @parameterized.parameters(
        "huggingface:mnist",
        "kaggle:mnist",
        "tiny/data_dir=/tmp",
        "tiny/a=1,b=2",
        "../tiny",
        "tiny/../tiny",
        "/tiny",
        "os.path",
        "tiny:latest",
        "",
        "tiny ",
        "tiny\n",
        "\ud800",
        "gs://tiny",
    )
    def test_has_a_plain_name(self, name):
        with (
            mock.patch("tensorflow_datasets.builder") as builder,
            self.assertRaisesRegex(ValueError, "name of a data set must be"),
        ):
            datasets.load(name)
        builder.assert_not_called()

    def test_without_train(self):
        directory = records.tfds_set(self, (8, 8, 1), test=7)
        with self.assertRaisesRegex(ValueError, "train; tiny has test"):
            datasets.load("tiny", directory)

    @parameterized.parameters(
        ("cifar10", (32, 32, 3), 10),
        ("mnist", (28, 28, 1), 10),
        ("imagenet2012", (224, 224, 3), 1000),
    )
    def test_has_the_sizes_of_its_features(self, name, shape, classes):
        import tensorflow_datasets as tfds

        with tfds.testing.mock_data(num_examples=6):
            dataset = datasets.load(name)
            self.assertEqual(dataset.image_shape, shape)
            self.assertEqual(dataset.classes, classes)
            ((images, labels),) = batches(dataset.train_batches(8, 0), 1)
        self.assertEqual(images.shape, (8, *shape))
        self.assertTrue(np.all(labels < classes))

    def test_that_is_unknown_is_an_error_with_near_names(self):
        with self.assertRaisesRegex(ValueError, "'cifar11'.* cifar10"):
            datasets.load("cifar11")
        with self.assertRaisesRegex(ValueError, "'digit'.* digits"):
            datasets.load("digit")

    def test_that_is_no_image_classification_set(self):
        with self.assertRaisesRegex(ValueError, "image of 8 bits and a label"):
            datasets.load("imdb_reviews", records.scratch(self))

    def test_that_cannot_be_downloaded_leaves_nothing_behind(self):
        directory = records.scratch(self)
        offline = urllib.error.URLError(socket.gaierror("no such host"))
        with (
            mock.patch("urllib.request.urlopen", side_effect=offline),
            self.assertRaisesRegex(
                FileNotFoundError,
                "cifar100 is not in .*no such host.*tfds build cifar100",
            ),
        ):
            datasets.load("cifar100", directory)
        self.assertEqual(os.listdir(directory), [])

    def test_that_has_to_be_fetched_by_hand_says_how(self):
        with (
            mock.patch("urllib.request.urlopen"),
            self.assertRaisesRegex(FileNotFoundError, "image-net.org"),
        ):
            datasets.load("imagenet2012", records.scratch(self))

    def test_cifar10_is_the_published_one(self):
        root = pathlib.Path(os.environ.get("KERAS_RESNET_DATA", "")) / "tfds"
        if not (root / "cifar10").is_dir():
            self.skipTest("KERAS_RESNET_DATA has no tfds/cifar10")
        dataset = datasets.load("cifar10", root)
        self.assertEqual(
            (dataset.train_size, dataset.test_size), (50_000, 10_000)
        )
        self.assertEqual(dataset.labels[0], "airplane")
        # The means of the channels that everybody uses.
        np.testing.assert_allclose(
            dataset.preprocessing.mean.mean((0, 1)),
            [0.4914, 0.4822, 0.4465],
            atol=5e-5,
        )
        labels = np.concatenate(
            [labels for _, labels in dataset.test_batches(1000)]
        )
        self.assertEqual(np.bincount(labels).tolist(), [1000] * 10)


FEATURES, INFO = "features.json", "dataset_info.json"
FEATURES_DICT = "tensorflow_datasets.core.features.features_dict.FeaturesDict"


def label_of(fields, value):
    fields["featuresDict"]["features"]["label"] = value


class StrangersTfdsTest(parameterized.TestCase):
    """A directory of TFDS that somebody else wrote runs no code of theirs."""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        directory = records.tfds_set(cls, (8, 8, 1), train=9, test=4)
        cls.prepared = pathlib.Path(directory) / "tiny/1.0.0"

    def setUp(self):
        super().setUp()
        self.root = pathlib.Path(records.scratch(self))
        self.directory = self.root / "data/tiny/1.0.0"
        shutil.copytree(self.prepared, self.directory)

    def change(self, name, function):
        path = self.directory / name
        fields = json.loads(path.read_text())
        path.write_text(json.dumps(function(fields) or fields))

    def assert_is_one_line(self, message="cannot read the data set tiny"):
        with self.assertRaisesRegex(ValueError, message) as raised:
            datasets.load("tiny", self.root / "data")
        self.assertNotIn("\n", str(raised.exception))

    @parameterized.named_parameters(
        ("whole", FEATURES, lambda fields: {"pythonClassName": "stranger.A"}),
        (
            "nested",
            FEATURES,
            lambda fields: label_of(fields, {"pythonClassName": "stranger.A"}),
        ),
        (
            "other_spelling",
            FEATURES,
            lambda fields: label_of(
                fields, {"python_class_name": "stranger.A"}
            ),
        ),
        (
            "old_form",
            FEATURES,
            lambda fields: {"type": "stranger.A", "content": {}},
        ),
        (
            "old_form_in_text",
            FEATURES,
            lambda fields: label_of(
                fields,
                {
                    "pythonClassName": FEATURES_DICT,
                    "jsonFeature": {
                        "json": json.dumps(
                            {"a": {"type": "stranger.A", "content": {}}}
                        )
                    },
                },
            ),
        ),
        (
            "in_the_description",
            INFO,
            lambda fields: fields.update(
                features={
                    "pythonClassName": "stranger.A",
                    "jsonFeature": {"json": "{}"},
                }
            ),
        ),
    )
    def test_class_of_another_package_is_not_imported(self, name, function):
        trace = self.root / "trace"
        (self.root / "stranger.py").write_text(
            f"open({str(trace)!r}, 'w').close()"
        )
        self.enter_context(
            mock.patch.object(sys, "path", [str(self.root), *sys.path])
        )
        self.change(name, function)
        self.assert_is_one_line("'stranger.A', which is not imported")
        self.assertFalse(trace.exists())
        self.assertNotIn("stranger", sys.modules)

    @parameterized.product(
        name=[FEATURES, INFO],
        text=["", "[]", "5", "null", "{}", "[" * 100_000, '{"a": {', b"\xff"],
    )
    def test_file_that_is_malformed(self, name, text):
        if isinstance(text, str):
            text = text.encode()
        (self.directory / name).write_bytes(text)
        self.assert_is_one_line()

    @parameterized.parameters(
        ("name", 5),
        ("version", "x"),
        ("splits", 5),
        ("splits", []),
        ("splits", [{"name": "train"}]),
        ("splits", [{"name": "train", "shardLengths": ["-5"]}]),
        ("fileFormat", "stranger"),
        ("supervisedKeys", 5),
    )
    def test_description_with_a_wrong_field(self, field, value):
        self.change(INFO, lambda fields: fields.update({field: value}))
        self.assert_is_one_line()

    @parameterized.parameters("999999999999", "0", "2", "4", None)
    def test_number_of_classes_is_that_of_the_labels(self, count):
        def change(fields):
            features = fields["featuresDict"]["features"]
            features["label"]["classLabel"]["numClasses"] = count

        self.change(FEATURES, change)
        self.assert_is_one_line("data set tiny must have")

    @parameterized.parameters("a\na\na\n", "a\nb\n", "a\nb\nc\nd\n")
    def test_labels_have_different_names(self, text):
        (self.directory / "label.labels.txt").write_text(text)
        self.assert_is_one_line("must have 3 different names")

    def test_number_of_images_is_that_of_the_files(self):
        def change(fields):
            fields["splits"][0]["shardLengths"] = ["3", "3", "4"]

        self.change(INFO, change)
        self.assert_is_one_line()

    @parameterized.parameters(FEATURES, INFO, "label.labels.txt", "tfrecord")
    def test_files_are_regular_ones(self, name):
        path = next(self.directory.glob(f"*{name}*"))
        path.unlink()
        os.mkfifo(path)
        self.assert_is_one_line(f"{path.name} must be a regular file.* a pipe")
        path.unlink()
        if name != "tfrecord":
            with open(path, "wb") as file:
                file.truncate(10**11)
            self.assert_is_one_line(f"{path.name} must have at most")


class WorkdirTest(tiny_runs.TestCase):
    """A run remembers its images, and trusts no data in its directory."""

    def setUp(self):
        super().setUp()
        # Python 3.10 has no contextlib.chdir.
        self.addCleanup(os.chdir, os.getcwd())
        os.chdir(records.scratch(self))

    def config(self, **fields):
        recipe = tiny_runs.RECIPE.with_steps(2)
        return configs.Config("tiny", "folder:images", recipe, **fields)

    def change_json(self, name, change):
        path = self.workdir / name
        fields = json.loads(path.read_text())
        change(fields)
        path.write_text(json.dumps(fields))

    def assert_evaluates(self, *arguments, line=None):
        outcome = programs.run(
            "evaluate", f"--workdir={self.workdir}", *arguments
        )
        self.assertEqual(outcome.code, 2 if line else 0)
        if line:
            self.assertLen(outcome.err, 1)
            self.assertRegex(outcome.err[0], line)

    def test_changed_images_are_noticed(self):
        images = pathlib.Path("images")
        for i in range(24):
            path = images / "ab"[i % 2] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            image = noise(8, 8, 1, seed=i)
            path.write_bytes(tf.io.encode_png(image).numpy())
        name = "folder:images"
        self.train(self.config(), dataset=datasets.load(name))
        workdirs.prepare(self.config(), datasets.load(name), self.workdir)
        moved = next((images / "a").iterdir())
        moved.rename(images / "b" / moved.name)
        changed = datasets.load(name)
        line = r"/a was '\d+ images \(sha256 \w+\)', is '\d+ images"
        with self.assertRaisesRegex(workdirs.WorkdirError, line):
            workdirs.prepare(self.config(), changed, self.workdir)
        self.assert_evaluates(line=line)
        self.assert_evaluates(f"--dataset={name}")
        with mock.patch.object(memory, "available_bytes", return_value=100):
            self.assert_evaluates(
                f"--dataset={name}", line="--batch_size=100: a batch of 4 ima"
            )
        source = model_sources.from_workdir(self.workdir)
        with self.assertRaisesRegex(ValueError, line):
            source.images(10)
        # An earlier version of this package recorded no images.
        self.change_json("dataset.json", lambda about: about.pop("images"))
        workdirs.check_same_images(None, changed)
        workdirs.prepare(self.config(), changed, self.workdir)
        inside = str(self.workdir / "data")
        self.change_json("config.json", lambda c: c.update(data_dir=inside))
        self.assert_evaluates(line=f"--data_dir={inside} if you trust")

    def test_data_in_the_directory_are_not_trusted(self):
        self.workdir.mkdir()
        (self.workdir / "link").symlink_to(pathlib.Path.cwd())
        pathlib.Path("way_in").symlink_to(self.workdir)
        for path in (
            str(self.workdir),
            f"{self.workdir}/data",
            os.path.relpath(self.workdir / "data"),
            f"{self.workdir}/none/../data",
            f"{self.workdir}/link/data",
            "way_in/data",
        ):
            config = self.config(data_dir=path)
            with self.assertRaisesRegex(
                workdirs.WorkdirError, "must not name a data_dir inside"
            ):
                workdirs.recorded_data_dir(config, self.workdir)
        for path in (None, "data", f"{self.workdir}_beside", "~/data", "/"):
            config = self.config(data_dir=path)
            self.assertEqual(
                workdirs.recorded_data_dir(config, self.workdir), path
            )


if __name__ == "__main__":
    absltest.main()
