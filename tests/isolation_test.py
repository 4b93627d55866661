"""Images of a batch are decoded without an effect on each other."""

import threading
import time

import numpy as np
import pytest
import tensorflow as tf
from absl.testing import absltest
from absl.testing import parameterized

from keras_resnet.data import views
from keras_resnet.serving import isolation
from tests import exports
from tests import images as images_lib
from tests import limits_test
from tests import orientation_test

SMALL = views.Preprocessing(8, 3, None, [0.0] * 3)


@tf.function(
    input_signature=[tf.TensorSpec([None], tf.string)], autograph=False
)
def decode(images):
    return isolation.decode(images, SMALL)


class IsolationTest(parameterized.TestCase):
    @parameterized.parameters(1, 2, 3, 6)
    @pytest.mark.slow
    def test_large_images_are_decoded_one_after_the_other(self, count):
        """Together they would have more pixels than are allowed."""
        running, most, lock = [0], [0], threading.Lock()

        def watch(image_bytes):
            with lock:
                running[0] += 1
                most[0] = max(most[0], running[0])
            time.sleep(0.05)
            with lock:
                running[0] -= 1
            return image_bytes

        @tf.function(autograph=False)
        def decode(images):
            return isolation.map_images(
                lambda image: tf.numpy_function(
                    watch, [image], tf.string, stateful=False
                ),
                images,
                tf.TensorSpec([], tf.string),
                max_pixels=100,
            )

        for image in (limits_test.png(10, 5), limits_test.bmp(10, 5)):
            most[0] = 0
            found = decode(tf.constant([image] * count))
            self.assertEqual(found.views.numpy().tolist(), [image] * count)
            self.assertEqual(found.status.numpy().tolist(), [b""] * count)
            if count > 2:
                self.assertEqual(most[0], 1)

    @parameterized.parameters(0.0, 0.3, 1.0)
    def test_images_that_fail_keep_their_places(self, share):
        pixels = [images_lib.noise(8, 8, 3, seed=i) for i in range(8)]
        good = [tf.io.encode_png(image).numpy() for image in pixels]
        is_bad = np.random.default_rng(0).random(8) < share
        found = decode(
            tf.constant(
                [
                    image[: 30 + 3 * i] if is_bad[i] else image
                    for i, image in enumerate(good)
                ]
            )
        )
        for i in range(8):
            np.testing.assert_array_equal(
                found.views[i], pixels[i] * ~is_bad[i]
            )
            status = found.status[i].numpy().decode()
            self.assertEqual(
                status.partition(":")[0], "truncated" if is_bad[i] else ""
            )

    @parameterized.parameters((15, 1), (31, 1), (32, 2), (64, 4), (200, 8))
    @pytest.mark.slow
    def test_large_jpeg_is_decoded_at_a_smaller_size(self, side, ratio):
        picture = np.indices((side, 2 * side)).sum(0) * 255 // (3 * side)
        pixels = np.repeat(picture[..., None], 3, -1).astype(np.uint8)
        jpeg = tf.io.encode_jpeg(pixels, quality=95)
        found = isolation._decode_scaled(jpeg, 8)
        self.assertEqual(
            found.shape, (-(-side // ratio), -(-2 * side // ratio), 3)
        )
        for encoded in (jpeg, tf.io.encode_png(pixels)):
            scaled, whole = (
                isolation.decode(tf.stack([encoded]), SMALL, scaled_jpeg=scaled)
                for scaled in (True, False)
            )
            self.assertEqual(scaled.status, [b""])
            np.testing.assert_allclose(
                tf.cast(scaled.views, tf.int32),
                tf.cast(whole.views, tf.int32),
                atol=4,
            )

    def test_image_alone_has_the_view_and_status_of_a_batch(self):
        """One image, ordinary files and rare ones take different ways."""
        turned = [
            orientation_test.encoded(
                kind, orientation_test.exif(number), exports.SQUARES
            )
            for number in orientation_test.TURNS
            for kind in ("JPEG", "PNG")
        ]
        good = [*exports.encoded_squares().values(), *turned]
        jpeg, png = (exports.encoded_squares()[k] for k in ("jpeg", "png"))
        bad = [
            b"",
            b"text",
            png[:60],
            jpeg[:-40],
            png[:16] + b"\x7f\xff\xff\xff" * 2 + png[24:],
            png + b"TXt" * 17,
            jpeg[:-2] + b"\xff\xda\0\2" * 65 + jpeg[-2:],
        ]
        images = [*good, *bad]
        together = decode(tf.constant(images))
        for i, image in enumerate(images):
            alone = decode(tf.constant([image]))
            np.testing.assert_array_equal(alone.views[0], together.views[i])
            self.assertEqual(alone.status[0], together.status[i])
        np.testing.assert_array_equal(
            together.views[: len(good)],
            [SMALL.decode(tf.constant(image)) for image in good],
        )
        self.assertEqual(
            [s.decode().partition(":")[0] for s in together.status.numpy()],
            [""] * len(good)
            + ["not an image"] * 2
            + ["truncated"] * 2
            + ["too many pixels", "too many texts", "too many scans"],
        )

    def test_batch_without_images_has_no_views(self):
        found = decode(tf.zeros([0], tf.string))
        self.assertEqual(found.views.shape, (0, 8, 8, 3))
        self.assertEqual(found.status.shape, (0,))


if __name__ == "__main__":
    absltest.main()
