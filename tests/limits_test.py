"""Headers are written by hand, from the formats' own descriptions."""

import struct
from unittest import mock

import pytest
import tensorflow as tf
from absl.testing import absltest
from absl.testing import parameterized

from keras_resnet.data import limits


def png(width, height):
    return (
        b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"
        + struct.pack(">II", width, height)
        + b"\x08\x02\0\0\0"
    )


def jpeg(width, height, frame=0xC0, segments=()):
    """A frame header after any number of application segments."""
    data = b"\xff\xd8"
    for segment in segments:
        data += b"\xff\xe1" + struct.pack(">H", len(segment) + 2) + segment
    data += b"\xff" + bytes([frame]) + b"\0\x0b\x08"
    data += struct.pack(">HH", height, width) + b"\x01\x01\x11\0"
    return data + b"\xff\xda\0\x08\x01\x01\0\0\x3f\0"


def jpeg_of_scans(count, thumbnail=b""):
    """Each scan with bytes of 255, which are stuffed, and a restart."""
    segment = b"\xff\xe1" + struct.pack(">H", len(thumbnail) + 2) + thumbnail
    frame = b"\xff\xc2\0\x0b\x08\0\x02\0\x03\x01\x01\x11\0"
    scan = b"\xff\xda\0\x08\x01\x01\0\0\x3f\0" + b"\x12\xff\x00\xda\xff\xd0\x34"
    return b"\xff\xd8" + segment + frame + scan * count + b"\xff\xd9"


def gif(screen, *frames):
    """Each frame with a local table of two colours, an extension before it."""
    data = b"GIF89a" + struct.pack("<HH", *screen) + b"\x80\0\0" + b"RGBRGB"
    for frame in frames:
        data += b"\x21\xf9\x04\0\0\0\0\0"
        data += b"\x2c\0\0\0\0" + struct.pack("<HH", *frame) + b"\x80rgbrgb"
        data += b"\x02" + b"\x05\x2c\x2c\x2c\x2c\x2c" * 3 + b"\0"
    return data + b"\x3b"


def bmp(width, height):
    return b"BM" + bytes(12) + struct.pack("<Iii", 40, width, height)


def webp(chunk):
    return b"RIFF" + struct.pack("<I", len(chunk) + 4) + b"WEBP" + chunk


def webp_lossy(width, height):
    header = b"\x9d\x01\x2a" + struct.pack("<HH", width | 1 << 14, height)
    return webp(b"VP8 \x20\0\0\0\0\0\0" + header)


def webp_lossless(width, height):
    bits = (width - 1) | (height - 1) << 14 | 1 << 28
    return webp(b"VP8L\x20\0\0\0\x2f" + struct.pack("<I", bits))


def webp_extended(width, height, animated=False):
    size = struct.pack("<I", width - 1)[:3] + struct.pack("<I", height - 1)[:3]
    flags = bytes([2 * animated, 0, 0, 0])
    return webp(b"VP8X\x0a\0\0\0" + flags + size)


class LimitsTest(parameterized.TestCase):
    @parameterized.named_parameters(
        ("png", png(60_000, 50_000), 3_000_000_000),
        ("jpeg", jpeg(60_000, 50_000), 3_000_000_000),
        ("progressive_jpeg", jpeg(600, 500, frame=0xC2), 300_000),
        (
            "jpeg_with_large_metadata",
            jpeg(600, 500, segments=[bytes(60_000), jpeg(3, 2), b""]),
            300_000,
        ),
        ("gif", gif((60_000, 50_000)), 3_000_000_000),
        ("gif_of_3_frames", gif((30, 20), (30, 20), (30, 20), (5, 4)), 1820),
        ("gif_with_frame_above_screen", gif((1, 1), (60, 500)), 60_000),
        (
            # TensorFlow makes one image of the widest and the highest.
            "gif_of_a_wide_and_a_high_frame",
            gif((1, 1), (60_000, 1), (1, 60_000)),
            3_600_120_000,
        ),
        ("bmp", bmp(60_000, 50_000), 3_000_000_000),
        ("bmp_from_the_top", bmp(600, -500), 300_000),
        ("webp_lossy", webp_lossy(600, 500), 300_000),
        ("webp_lossless", webp_lossless(16_384, 16_384), 2**28),
        ("webp_extended", webp_extended(2**24, 2**24), 2**48),
        ("text", b"GIF or PNG or JPEG", -1),
        ("empty", b"", -1),
        ("jpeg_xl", b"\xff\x0a" + bytes(40), -1),
        ("sound_in_riff", b"RIFF\0\0\0\0WAVEVP8 " + bytes(40), -1),
    )
    def test_pixels_are_what_the_header_promises(self, image_bytes, expected):
        self.assertEqual(limits.pixels(image_bytes).numpy(), expected)

    def test_sizes_agree_with_those_of_the_decoder(self):
        image = tf.zeros([20, 30, 3], tf.uint8)
        for encode in (tf.io.encode_png, tf.io.encode_jpeg):
            self.assertEqual(limits.pixels(encode(image)).numpy(), 600)

    @parameterized.parameters(png, gif, bmp, webp_lossy, webp_extended)
    def test_header_that_is_cut_anywhere_promises_less_or_nothing(self, header):
        whole = header((7, 9), (7, 9)) if header is gif else header(7, 9)
        for length in range(len(whole)):
            self.assertLessEqual(limits.pixels(whole[:length]).numpy(), 126)

    def test_image_within_the_limit_passes_unchanged(self):
        image_bytes = png(8_000, 8_000)
        self.assertEqual(limits.check(image_bytes).numpy(), image_bytes)

    @parameterized.parameters(
        (png(8_001, 8_000), "at most 64000000 pixels, received 64008000"),
        (gif((1, 1), *[(800, 800)] * 100), "at most 64000000 pixels"),
        (b"text", "JPEG, PNG, GIF, BMP or WebP"),
        (webp_extended(10, 10, animated=True), "must have no animation"),
    )
    def test_image_above_the_limit_is_refused(self, image_bytes, message):
        with self.assertRaisesRegex(tf.errors.InvalidArgumentError, message):
            limits.check(image_bytes)

    @parameterized.named_parameters(
        ("png", png(8_001, 8_000), "at most 64000000 pixels"),
        ("png_of_negative_sides", png(2**31, 2**31), "at most 64000000 pixels"),
        ("jpeg", jpeg(8_001, 8_000), "at most 64000000 pixels"),
        ("gif", gif((1, 1), *[(800, 800)] * 100), "at most 64000000 pixels"),
        ("text", b"text", "JPEG, PNG, GIF, BMP or WebP"),
        ("empty", b"", "JPEG, PNG, GIF, BMP or WebP"),
        (
            "webp",
            webp_extended(10, 10, animated=True),
            "must have no animation",
        ),
        (
            "png_of_texts",
            png(2, 3) + b"zTXt" * 17,
            "at most 16 compressed texts",
        ),
    )
    @pytest.mark.slow
    def test_cheap_check_rejects_the_same_images(self, image_bytes, message):
        for check in (limits.check, limits.check_cheaply):
            with self.assertRaisesRegex(
                tf.errors.InvalidArgumentError, message
            ):
                check(image_bytes)

    @parameterized.named_parameters(
        ("png", png(8_000, 8_000)),
        ("jpeg", jpeg(8_000, 8_000)),
        ("jpeg_of_64_scans", jpeg_of_scans(64)),
        ("gif", gif((3, 2), (5, 4))),
        ("bmp", bmp(600, -500)),
        ("webp", webp_lossy(600, 500)),
        ("png_of_texts", png(2, 3) + b"zTXt" * 16),
    )
    def test_cheap_check_passes_the_same_images(self, image_bytes):
        for check in (limits.check, limits.check_cheaply):
            self.assertEqual(check(image_bytes).numpy(), image_bytes)

    def test_cheap_check_bounds_the_work_of_the_scans_of_a_jpeg(self):
        """Many scans pass only where they visit few pixels in all."""
        small = jpeg_of_scans(1000)
        self.assertEqual(limits.check_cheaply(small).numpy(), small)
        large = jpeg(8_000, 8_000) + small[small.index(b"\xff\xda") :]
        with self.assertRaisesRegex(
            tf.errors.InvalidArgumentError, "a JPEG may have at most 64 scans"
        ):
            limits.check_cheaply(large)

    def test_gif_of_more_blocks_than_anyone_counts_is_above_any_limit(self):
        image_bytes = gif((1, 1), (1, 1))
        steps = 1 + 1 + 1 + 3 + 1  # an extension, a frame, the trailer
        with mock.patch.object(limits, "_MAX_GIF_STEPS", steps - 1):
            self.assertEqual(limits.pixels(image_bytes), tf.int64.max)
        with mock.patch.object(limits, "_MAX_GIF_STEPS", steps):
            self.assertEqual(limits.pixels(image_bytes), 2)

    def test_error_about_blocks_of_a_gif_is_not_about_pixels(self):
        image_bytes = gif((1, 1), *[(1, 1)] * 10)
        with mock.patch.object(limits, "_MAX_GIF_STEPS", 9):
            _, reason = limits._examine.python_function(
                tf.constant(image_bytes), limits.MAX_PIXELS
            )
        _, _, sentence = reason.numpy().decode().partition(": ")
        self.assertEqual(
            sentence, "a GIF must have blocks that 9 steps can count"
        )

    @parameterized.parameters(0, 1, 2, 63, 64, 65, 66, 129, 1000)
    def test_full_blocks_of_a_gif_are_passed_together(self, count):
        full = (b"\xff" + b"\x2c" * 255) * count
        for end in (b"\0", b"\x05\x2c\x2c\x2c\x2c\x2c\0"):
            comment = b"\x21\xfe" + full + end
            frame = gif((1, 1), (5, 4))[19:]
            image_bytes = gif((3, 2))[:-1] + comment + frame
            with mock.patch.object(limits, "_MAX_GIF_STEPS", 30):
                self.assertEqual(limits.pixels(image_bytes), 5 * 4 + 5 * 4)

    @parameterized.named_parameters(
        ("baseline", 1, b"", b"", 1),
        ("progressive", 10, b"", b"", 10),
        ("as_many_as_allowed", 64, b"", b"", 64),
        ("thumbnail", 10, b"\xff\xda" * 500, b"", 10),
        ("video_behind_it", 10, b"", b"\xff\xda" * 500, 10),
        ("stuffed_bytes", 1, b"", b"", 1),
        ("too_many", 65, b"", b"", 65),
        ("far_too_many", 5000, b"", b"", 65),
        ("too_many_with_thumbnail", 65, b"\xff\xda" * 500, b"", 65),
    )
    def test_scans_of_a_jpeg_are_counted(
        self, scans, thumbnail, rest, expected
    ):
        image_bytes = jpeg_of_scans(scans, thumbnail) + rest
        self.assertEqual(limits.jpeg_scans(image_bytes).numpy(), expected)
        if expected <= limits.MAX_JPEG_SCANS:
            limits.check(image_bytes)
            return
        with self.assertRaisesRegex(
            tf.errors.InvalidArgumentError, "a JPEG may have at most 64 scans"
        ):
            limits.check(image_bytes)

    def test_scans_that_a_hostile_file_hides_are_counted(self):
        """Behind a comment that looks like an end, padding and restarts."""
        scan = jpeg_of_scans(1)[-19:-2]
        self.assertStartsWith(scan, b"\xff\xda")
        for between in (
            b"\xff\xfe\0\x04\xff\xd9",
            b"\xff\xff\xff",
            b"\xff\xd0\xff\xd7",
            b"\xff\x00" * 3,
            b"\xff\xfe\0\x00",  # a length that no decoder takes
        ):
            image_bytes = jpeg_of_scans(1)[:-2] + (between + scan) * 100
            self.assertGreater(
                limits.jpeg_scans(image_bytes).numpy(), limits.MAX_JPEG_SCANS
            )

    def test_jpeg_of_more_segments_than_anyone_counts_has_too_many_scans(self):
        image_bytes = jpeg_of_scans(1, b"\xff\xda" * 100)
        with mock.patch.object(limits, "_MAX_JPEG_SEGMENTS", 3):
            self.assertEqual(limits.jpeg_scans(image_bytes).numpy(), 65)
        self.assertEqual(limits.jpeg_scans(image_bytes).numpy(), 1)

    @parameterized.parameters((b"zTXt", 16), (b"iTXt", 16), (b"tEXt", 1000))
    def test_compressed_texts_of_a_png_are_few(self, kind, allowed):
        image_bytes = tf.io.encode_png(tf.zeros([2, 3, 1], tf.uint8)).numpy()
        chunk = b"\0\0\0\x04" + kind + b"k\0\0\0" + b"\0\0\0\0"
        few = image_bytes[:33] + chunk * allowed + image_bytes[33:]
        self.assertEqual(limits.check(few).numpy(), few)
        many = image_bytes[:33] + chunk * 17 + image_bytes[33:]
        if allowed < 17:
            with self.assertRaisesRegex(
                tf.errors.InvalidArgumentError, "at most 16 compressed texts"
            ):
                limits.check(many)


if __name__ == "__main__":
    absltest.main()
