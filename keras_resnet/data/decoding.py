"""Encoded images to pixels: JPEG, PNG, GIF, BMP and WebP.

TensorFlow operations only, on one image. `decode` reads any image, so a caller
that reads files of unknown origin passes them through `bounded` first.
"""

import functools

import tensorflow as tf

from keras_resnet.data import limits
from keras_resnet.data import orientation


def bounded(image):
    """Returns the image if its header keeps the bounds of `limits`.

    A decoded image is returned without a check.

    Args:
        image: string scalar, or uint8 `[height, width, channels]`.

    Raises:
        tf.errors.InvalidArgumentError: If `limits.check_cheaply` rejects the
            image.
    """
    return image if image.dtype == tf.uint8 else limits.check_cheaply(image)


def decode(image, exif=False):
    """Decodes an image to uint8 `[height, width, c]`, with its own channels.

    A decoded image is returned unchanged.

    Args:
        image: string scalar, or uint8 `[height, width, c]`.
        exif: Whether the image is turned as its EXIF orientation says.

    Raises:
        tf.errors.InvalidArgumentError: If the bytes are no such image.
    """
    if image.dtype == tf.uint8:
        return image
    head = tf.io.decode_raw(image, tf.uint8, fixed_length=32)

    def has(text, at):
        return tf.reduce_all(head[at : at + len(text)] == list(text))

    # TensorFlow 2.21 finds the channels of PNG, JPEG, GIF and BMP itself
    # (channels=0). WebP needs 3 or 4. With channels=0, TensorFlow writes
    # beyond its memory for an animation without alpha.
    is_webp = has(b"RIFF", 0) & has(b"WEBP", 8)
    flags = tf.where(has(b"VP8X", 12), head[20], tf.constant(0, tf.uint8))
    flags = tf.where(has(b"VP8L", 12), head[24], flags)
    has_alpha = tf.bitwise.bitwise_and(flags, 16) > 0
    has_palette = has(b"BM", 0) & (head[28] == 8) & (head[29] == 0)
    kind = tf.where(is_webp, tf.where(has_alpha, 2, 1), 0)
    decode = functools.partial(tf.io.decode_image, expand_animations=False)
    decoded = tf.switch_case(
        tf.where(has_palette, 3, kind),
        [
            *(functools.partial(decode, image, c) for c in (0, 3, 4)),
            lambda: _in_colours(decode(image), image),
        ],
    )
    if exif:
        stated = orientation.orientation(image)
        decoded = orientation.upright(decoded, stated)
    return decoded


def _in_colours(numbers, image):
    """Looks up the colours of a BMP with a palette.

    For a BMP of 8 bits a pixel TensorFlow returns the colours' numbers.
    """
    colours = tf.strings.substr(tf.strings.join([image, "\0" * 2048]), 14, 1200)
    data = tf.io.decode_raw(colours, tf.uint8)
    header_bytes = tf.cast(data[0], tf.int32)
    table = tf.reshape(data[header_bytes:][:1024], [256, 4])
    return tf.gather(table[:, 2::-1], tf.cast(numbers[..., 0], tf.int32))


def decode_window(image, choose, channels, exif=False):
    """Decodes a window of an image; a JPEG is decoded only inside it.

    Args:
        image: string scalar, or uint8 `[height, width, c]`.
        choose: `(height, width) -> int32 [4]`: top, left, height and width of
            the window.
        channels: 3 for colour, 1 for grey.
        exif: Whether the image is turned as its EXIF orientation says. The
            window is that of the turned image.

    Returns:
        uint8 tensor of the window's size, with `channels` channels.
    """

    def of_jpeg():
        shape = tf.image.extract_jpeg_shape(image)
        if not exif:
            window = choose(shape[0], shape[1])
            return tf.image.decode_and_crop_jpeg(image, window, channels)
        stated = orientation.orientation(image)
        sides = orientation.turned_sides(shape[0], shape[1], stated)
        window = orientation.stored_window(choose(*sides), *sides, stated)
        decoded = tf.image.decode_and_crop_jpeg(image, window, channels)
        return orientation.upright(decoded, stated)

    def of_any():
        decoded = decode(image, exif)
        shape = tf.shape(decoded)
        top, left, height, width = tf.unstack(choose(shape[0], shape[1]))
        decoded = decoded[top : top + height, left : left + width]
        return with_channels(decoded, channels)

    if image.dtype == tf.uint8:
        return of_any()
    return tf.cond(tf.io.is_jpeg(image), of_jpeg, of_any)


def with_channels(image, channels):
    """Converts an image to grey (1 channel) or to colour (3).

    Alpha is dropped, grey is repeated, and colour is weighed to grey.
    """
    if image.shape[-1] == channels:
        return image
    colours = tf.where(tf.shape(image)[-1] >= 3, 3, 1)
    image = image[..., :colours]
    if channels == 3:
        return tf.tile(image, [1, 1, 3 // colours])
    return tf.cond(
        colours == 3,
        lambda: tf.image.rgb_to_grayscale(
            tf.ensure_shape(image, [None, None, 3])
        ),
        lambda: image,
    )
