import io
import struct

import numpy as np
import tensorflow as tf
from absl.testing import absltest
from absl.testing import parameterized
from PIL import Image
from PIL import ImageOps

from keras_resnet.data import orientation
from tests import images

# The definition in the EXIF standard: how to turn the stored pixels.
TURNS = {
    1: lambda pixels: pixels,
    2: np.fliplr,
    3: lambda pixels: np.rot90(pixels, 2),
    4: np.flipud,
    5: lambda pixels: pixels.swapaxes(0, 1),
    6: lambda pixels: np.rot90(pixels, -1),
    7: lambda pixels: np.rot90(pixels, 2).swapaxes(0, 1),
    8: lambda pixels: np.rot90(pixels, 1),
}
KINDS = ("JPEG", "PNG", "WEBP")


def exif(number, order="<", kind=3, count=1, tag=0x112, before=0, offset=8):
    """EXIF data with the orientation behind `before` other entries."""
    mark = {"<": b"II", ">": b"MM"}[order]
    entry = order + "HHI"
    other = struct.pack(entry, 0x10F, 2, 4) + b"abc\0"
    value = struct.pack(order + "HH", number, 0)
    return (
        mark
        + struct.pack(order + "HI", 42, offset)
        + b"\0" * (offset - 8)
        + struct.pack(order + "H", before + 1)
        + other * before
        + struct.pack(entry, tag, kind, count)
        + value
        + struct.pack(order + "I", 0)
    )


def encoded(kind, data, image=None):
    image = images.noise(5, 7, 3) if image is None else image
    file = io.BytesIO()
    name = b"Exif\0\0" if kind == "JPEG" else b""
    options = {"exif": name + data} if data is not None else {}
    lossless = {"lossless": True} if kind == "WEBP" else {}
    Image.fromarray(image).save(file, kind, **lossless, **options)
    return file.getvalue()


_in_graph = tf.function(orientation.orientation, autograph=False)


def read(image_bytes):
    """The orientation, computed in a graph."""
    return int(_in_graph(tf.constant(image_bytes)))


class OrientationTest(parameterized.TestCase):
    @parameterized.product(kind=KINDS, number=list(TURNS), order=("<", ">"))
    def test_every_orientation_is_read_from_every_format(
        self, kind, number, order
    ):
        self.assertEqual(read(encoded(kind, exif(number, order))), number)

    @parameterized.parameters(*TURNS)
    def test_pixels_are_turned_by_the_definition(self, number):
        image = images.noise(5, 7, 3)
        turned = orientation.upright(tf.constant(image), tf.constant(number))
        np.testing.assert_array_equal(turned, TURNS[number](image))
        file = Image.open(io.BytesIO(encoded("PNG", exif(number), image)))
        np.testing.assert_array_equal(turned, ImageOps.exif_transpose(file))

    @parameterized.parameters(*KINDS)
    def test_files_without_exif_data_are_upright(self, kind):
        self.assertEqual(read(encoded(kind, None)), 1)

    @parameterized.parameters("BMP", "GIF")
    def test_other_formats_are_upright(self, kind):
        self.assertEqual(read(encoded(kind, None) + b"Exif\0\0" + exif(6)), 1)

    @parameterized.named_parameters(
        ("behind_other_entries", {"before": 20}),
        ("in_a_directory_further_on", {"offset": 400}),
    )
    def test_the_place_of_the_entry_does_not_matter(self, options):
        for kind in KINDS:
            self.assertEqual(read(encoded(kind, exif(6, **options))), 6)

    @parameterized.named_parameters(
        ("another_tag", {"tag": 0x113}),
        ("another_type", {"kind": 4}),
        ("two_values", {"count": 2}),
    )
    def test_other_entries_are_no_orientation(self, options):
        for kind in KINDS:
            self.assertEqual(read(encoded(kind, exif(6, **options))), 1)

    @parameterized.parameters(0, 9, 65535)
    def test_numbers_without_a_meaning_are_ignored(self, number):
        for kind in KINDS:
            self.assertEqual(read(encoded(kind, exif(number))), 1)

    def test_a_jpeg_has_the_data_behind_other_segments(self):
        file = encoded("JPEG", exif(6))
        profile = b"\xff\xe2" + struct.pack(">H", 5002) + b"\0" * 5000
        filled = file[:2] + profile + b"\xff\xff" + file[2:]
        self.assertEqual(read(filled), 6)

    def test_the_name_in_front_of_the_data_is_allowed(self):
        for kind in ("PNG", "WEBP"):
            self.assertEqual(read(encoded(kind, b"Exif\0\0" + exif(6, ">"))), 6)

    def test_bytes_that_only_look_like_exif_data_are_ignored(self):
        look = b"Exif\0\0" + exif(6)
        jpeg = encoded("JPEG", None)
        comment = b"\xff\xfe" + struct.pack(">H", 2 + len(look)) + look
        self.assertEqual(read(jpeg[:2] + comment + jpeg[2:]), 1)
        self.assertEqual(read(jpeg + b"\xff\xe1\0\x40" + look), 1)
        png = encoded("PNG", None)
        self.assertEqual(read(png[:-12] + b"\0\0\0\x1eeXIg" + look), 1)

    def test_damaged_files_are_read_without_an_error(self):
        random = np.random.default_rng(0)
        for kind in KINDS:
            whole = encoded(kind, exif(6, before=3))
            for cut in range(0, min(len(whole), 200), 3):
                self.assertBetween(read(whole[:cut]), 1, 8)
            for _ in range(60):
                damaged = bytearray(whole)
                for place in random.integers(0, 120, 4):
                    damaged[place] = random.choice([0, 1, 127, 128, 255])
                self.assertBetween(read(bytes(damaged)), 1, 8)

    @parameterized.named_parameters(
        ("jpeg", b"\xff\xd8" + b"\xff" * 10**6 + b"\xe1\0\x40Exif\0\0"),
        ("png", b"\x89PNG\r\n\x1a\n" + b"\0" * 10**6 + b"eXIf"),
        ("webp", b"RIFF\0\0\0\0WEBPVP8X" + b"\x08\0" * 10**6 + b"EXIF"),
    )
    def test_the_walk_through_a_file_is_limited(self, file):
        self.assertEqual(read(file), 1)


if __name__ == "__main__":
    absltest.main()
