import base64
import io

import numpy as np
import tensorflow as tf
from absl.testing import absltest
from absl.testing import parameterized
from PIL import Image

from keras_resnet.data import decoding
from keras_resnet.data import views
from tests import images as images_lib

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


class DecodingTest(parameterized.TestCase):
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
        image = (
            Image.fromarray(images_lib.noise(4, 5, 3))
            .resize((20, 16))
            .convert(mode)
        )
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
        deep = images_lib.noise(8, 8, 1).astype(np.uint16) * 257
        file = io.BytesIO()
        Image.fromarray(deep[..., 0]).save(file, "PNG")
        view = views.Preprocessing(8, 1, None, [0.0]).decode(
            tf.constant(file.getvalue())
        )
        np.testing.assert_array_equal(view, deep // 257)

    def test_colours_of_a_bmp_with_a_palette_are_looked_up(self):
        """As Pillow, which wrote it, reads it."""
        image = Image.fromarray(images_lib.noise(6, 7, 3)).quantize(5)
        file = io.BytesIO()
        image.save(file, "BMP")
        decoded = decoding.decode(tf.constant(file.getvalue()))
        np.testing.assert_array_equal(decoded, image.convert("RGB"))

    @parameterized.parameters(*FILES)
    def test_decodes(self, name):
        image = decoding.decode(tf.constant(base64.b64decode(FILES[name])))
        np.testing.assert_array_equal(image[..., :3], PICTURE)

    @parameterized.parameters(1, 2, 3, 4)
    def test_decodes_png_of_any_channels_to_what_is_wanted(self, channels):
        image = images_lib.noise(5, 5, channels)
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
        decode = tf.function(images_lib.PHOTO.decode, input_signature=signature)
        for image in (
            images_lib.noise(250, 300, 3),
            images_lib.noise(500, 260, 1),
        ):
            encoded = tf.io.encode_jpeg(image)
            view = decode(encoded)
            self.assertEqual(view.shape, (224, 224, 3))
            np.testing.assert_array_equal(
                view, images_lib.PHOTO.decode(encoded)
            )

    # An animation without alpha makes TensorFlow 2.21 write beyond its memory
    # where it is left to find the number of channels.
    def test_animation_without_alpha_is_an_error_and_no_crash(self):
        animation = bytearray(base64.b64decode(FILES["webp_of_two_frames"]))
        self.assertEqual(animation[20], 0x12)
        animation[20] = 0x02
        with self.assertRaises(tf.errors.InvalidArgumentError):
            images_lib.PHOTO.decode(tf.constant(bytes(animation)))

    @parameterized.parameters(
        b"", b"no image", b"RIFF", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0"
    )
    def test_what_is_no_image_is_an_error(self, encoded):
        with self.assertRaises(tf.errors.InvalidArgumentError):
            images_lib.PHOTO.decode(tf.constant(encoded))

    @parameterized.product(
        encode=[tf.io.encode_jpeg, tf.io.encode_png],
        window=[(0, 0, 40, 50), (7, 13, 20, 31), (39, 49, 1, 1)],
    )
    def test_window_that_is_decoded_is_that_of_the_image(self, encode, window):
        smooth = images_lib.numpy_resize(
            images_lib.noise(5, 6, 3), 40, 50
        ).astype(np.uint8)
        encoded = encode(smooth)
        image = tf.io.decode_image(encoded).numpy()
        top, left, height, width = window
        decoded = decoding.decode_window(
            encoded, lambda *_: tf.constant(window, tf.int32), 3
        )
        expected = image[top : top + height, left : left + width]
        if encode is tf.io.encode_jpeg:
            # At its border a window has no neighbours to smooth colours with.
            self.assertEqual(decoded.shape, expected.shape)
            decoded, expected = decoded[1:-1, 1:-1], expected[1:-1, 1:-1]
        np.testing.assert_array_equal(decoded, expected)


if __name__ == "__main__":
    absltest.main()
