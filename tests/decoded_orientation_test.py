"""EXIF orientation, against Pillow's `exif_transpose` and by construction."""

import io
import struct

import numpy as np
import pytest
import tensorflow as tf
from absl.testing import absltest
from absl.testing import parameterized
from PIL import Image
from PIL import ImageOps

from keras_resnet.data import datasets
from keras_resnet.data import decoding
from keras_resnet.data import orientation
from keras_resnet.data import views
from tests import images as images_lib
from tests import records

# An image whose four quarters differ; blocks of 8 survive JPEG.
PICTURE = np.kron(
    np.array([[[250, 0, 0], [0, 250, 0], [0, 0, 250]]] * 1, np.uint8),
    np.ones([16, 16, 1], np.uint8),
)
PICTURE = np.concatenate([PICTURE, 255 - PICTURE // 2])


def jpeg(number, big=False, before=b"", image=PICTURE):
    """A JPEG whose EXIF segment was written here, byte by byte."""
    plain = tf.io.encode_jpeg(image, quality=100).numpy()
    order, mark = (">", b"MM") if big else ("<", b"II")
    entries = [(0x010F, 2, 4, b"abc\0"), (0x0112, 3, 1, None)]
    tiff = mark + struct.pack(f"{order}HI", 42, 8)
    tiff += struct.pack(f"{order}H", len(entries))
    for tag, kind, count, value in entries:
        value = value or struct.pack(f"{order}HH", number, 0)
        tiff += struct.pack(f"{order}HHI", tag, kind, count) + value
    tiff += b"\0" * 4
    body = b"Exif\0\0" + tiff
    segment = b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body
    return plain[:2] + before + segment + plain[2:]


def upright(content):
    """The pixels as Pillow turns them."""
    image = Image.open(io.BytesIO(content))
    return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))


class DecodedOrientationTest(parameterized.TestCase):
    @parameterized.product(number=list(range(1, 9)), big=[False, True])
    def test_every_orientation_is_that_of_pillow(self, number, big):
        content = jpeg(number, big)
        self.assertEqual(int(orientation.orientation(content)), number)
        found = decoding.decode(tf.constant(content), exif=True)
        expected = upright(content)
        self.assertEqual(found.shape, expected.shape)
        np.testing.assert_allclose(found, expected, atol=3)
        stored = decoding.decode(tf.constant(content))
        self.assertEqual(stored.shape, PICTURE.shape)

    @parameterized.parameters(*range(1, 9))
    def test_files_that_pillow_wrote_are_read(self, number):
        exif = Image.Exif()
        exif[0x0112] = number
        exif[0x0131] = "a program with a long name"
        file = io.BytesIO()
        Image.fromarray(PICTURE).save(file, "JPEG", exif=exif, quality=100)
        self.assertEqual(int(orientation.orientation(file.getvalue())), number)

    @parameterized.parameters(*range(1, 9))
    def test_window_is_that_of_the_turned_image(self, number):
        content = jpeg(number)
        expected = upright(content)[3:18, 5:25]

        def choose(height, width):
            np.testing.assert_array_equal(
                [height, width], upright(content).shape[:2]
            )
            return tf.constant([3, 5, 15, 20])

        found = decoding.decode_window(
            tf.constant(content), choose, 3, exif=True
        )
        np.testing.assert_allclose(found, expected, atol=3)

    @parameterized.parameters(0, 9, 255, 40_000)
    def test_other_numbers_are_none(self, number):
        self.assertEqual(int(orientation.orientation(jpeg(number))), 1)

    def test_other_segments_may_come_first(self):
        comment = b"\xff\xfe" + struct.pack(">H", 42) + b"x" * 40
        self.assertEqual(
            int(orientation.orientation(jpeg(6, False, comment))), 6
        )

    def test_the_word_in_another_segment_is_none(self):
        plain = tf.io.encode_jpeg(PICTURE).numpy()
        body = jpeg(6)[4:]
        body = body[body.index(b"Exif") :][:60]
        comment = b"\xff\xfe" + struct.pack(">H", len(body) + 2) + body
        content = plain[:2] + comment + plain[2:]
        self.assertEqual(int(orientation.orientation(content)), 1)

    @pytest.mark.slow
    def test_damaged_segments_are_none(self):
        whole = jpeg(6)
        start = whole.index(b"Exif\0\0")
        for end in range(start, start + 46, 3):
            number = int(orientation.orientation(whole[:end]))
            self.assertIn(number, (1, 6))
        rng = np.random.default_rng(0)
        for _ in range(60):
            content = bytearray(whole)
            for place in rng.integers(start + 6, start + 50, 4):
                content[place] = rng.integers(256)
            number = int(orientation.orientation(bytes(content)))
            self.assertBetween(number, 1, 8)

    @parameterized.parameters(True, False)
    def test_folders_and_preprocessing_turn_unless_told_not_to(self, exif):
        root = records.scratch(self)
        rows = np.linspace(0, 255, 60)[:, None, None]
        image = np.broadcast_to(rows, (60, 40, 3)).astype(np.uint8)
        for name in ("a/1.jpg", "a/2.jpg", "b/1.jpg", "b/2.jpg"):
            images_lib.write_bytes(root, name, jpeg(6, image=image))
        dataset = datasets.load(f"folder:{root}", exif=exif)
        self.assertEqual(dataset.preprocessing.exif, exif)
        (pixels, *_), _ = dataset.test_images(1)
        pixels = pixels[..., 0].astype(int)
        # Stored, rows get lighter; turned by 90 degrees, columns get darker.
        self.assertEqual(pixels[:, 0].std() < 20, exif)
        prepared = views.photo_preprocessing(32)
        self.assertTrue(prepared.exif)
        view = prepared.decode(tf.constant(jpeg(6, image=image)))
        self.assertLess(int(view[16, -1, 0]), int(view[16, 0, 0]))
        again = views.Preprocessing.from_json(dataset.preprocessing.to_json())
        self.assertEqual(again.exif, exif)


if __name__ == "__main__":
    absltest.main()
