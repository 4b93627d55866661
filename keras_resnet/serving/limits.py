"""How large an image says it is, read before it is decoded.

A file of 100 kilobytes can unpack to gigabytes. The formats say their size in
their first bytes, so that such a file is an error and not an outage:

    PNG   width and height after the signature and the word IHDR
    JPEG  in the frame header, wherever that stands: TensorFlow finds it
    GIF   every frame, all of which TensorFlow unpacks; and once more an image
          as wide as the widest and as high as the highest of screen and frames
    BMP   width and height of the information header; either may be negative
    WebP  VP8X: the canvas; VP8: the frame; VP8L: the frame

It is all TensorFlow operations, so that it goes into the exported graph.
"""

from collections.abc import Callable

import tensorflow as tf

MAX_PIXELS = 64 * 10**6  # above what cameras take; 192 MB as three channels

_SIDE_BY_SIDE = 16  # small images that are decoded at a time
_MAX_GIF_BLOCKS = 100_000  # of up to 255 bytes each: GIF files up to 25 MB


@tf.function(autograph=False)
def check(image_bytes: tf.Tensor, max_pixels: int = MAX_PIXELS) -> tf.Tensor:
    """`image_bytes`, if the header promises at most `max_pixels`.

    Args:
        image_bytes: an encoded image; string, scalar.
        max_pixels: width x height, for GIF summed as above.

    Returns:
        `image_bytes`, unchanged.

    Raises:
        tf.errors.InvalidArgumentError: it has more, or is no JPEG, PNG, GIF,
            BMP or WebP, or a WebP with animation.

    >>> png = tf.io.encode_png(tf.zeros([20, 30, 3], tf.uint8))
    >>> bool(check(png, max_pixels=600) == png)
    True
    """
    size = pixels(image_bytes)
    is_known = tf.debugging.Assert(
        size >= 0, ["an image must be a JPEG, PNG, GIF, BMP or WebP"]
    )
    is_small = tf.debugging.Assert(
        size <= max_pixels,
        [f"an image may have at most {max_pixels} pixels, received", size],
    )
    # TensorFlow unpacks every frame, of which no header says the number.
    is_still = tf.debugging.Assert(
        ~_is_animated_webp(image_bytes), ["a WebP must have no animation"]
    )
    with tf.control_dependencies([is_known, is_small, is_still]):
        return tf.identity(image_bytes)


def map_images(
    decode: Callable[[tf.Tensor], tf.Tensor],
    image_bytes: tf.Tensor,
    spec: tf.TensorSpec,
    max_pixels: int = MAX_PIXELS,
) -> tf.Tensor:
    """`decode` of every image that `check` lets pass.

    Images are decoded side by side while all of them together have no more
    than `max_pixels`, and one after the other where they have: what is
    unpacked at a time does not grow with the batch.

    Args:
        decode: from one encoded image to a tensor.
        image_bytes: encoded images; string, [batch].
        spec: of what `decode` gives.
        max_pixels: as in `check`.

    Returns:
        [batch, ...], what `decode` gave.

    Raises:
        tf.errors.InvalidArgumentError: as `check`, for any of the images.
    """

    @tf.function(autograph=False)
    def checked(image):
        return decode(check(image, max_pixels))

    def mapped(at_a_time):
        return lambda: tf.map_fn(
            checked,
            image_bytes,
            parallel_iterations=at_a_time,
            fn_output_signature=spec,
        )

    sizes = tf.map_fn(pixels, image_bytes, fn_output_signature=tf.int64)
    # One that is above the limit by itself must not overflow the sum.
    total = tf.reduce_sum(tf.minimum(sizes, max_pixels))
    return tf.cond(total <= max_pixels, mapped(_SIDE_BY_SIDE), mapped(1))


def pixels(image_bytes: tf.Tensor) -> tf.Tensor:
    """The pixels that the header of an encoded image promises.

    Args:
        image_bytes: string, scalar.

    Returns:
        int64, scalar: width x height, for GIF summed over the frames and one
        image that holds them all;
        -1 for what is no JPEG, PNG, GIF, BMP or WebP.
    """
    head = _bytes(image_bytes, tf.constant(0, tf.int64), 30)

    def starts(text: bytes, at: int = 0) -> tf.Tensor:
        return tf.reduce_all(head[at : at + len(text)] == list(text))

    def little(at: int, count: int) -> tf.Tensor:
        return _number(head[at : at + count])

    def png():
        return _number(head[19:15:-1]) * _number(head[23:19:-1])

    def jpeg():
        height, width, _ = tf.unstack(
            tf.cast(tf.io.extract_jpeg_shape(image_bytes), tf.int64)
        )
        return height * width

    def bmp():
        return tf.abs(_signed(little(18, 4))) * tf.abs(_signed(little(22, 4)))

    def webp_extended():
        return (little(24, 3) + 1) * (little(27, 3) + 1)

    def webp_lossy():
        return (little(26, 2) % 2**14) * (little(28, 2) % 2**14)

    def webp_lossless():
        bits = little(21, 4)
        return (bits % 2**14 + 1) * (bits // 2**14 % 2**14 + 1)

    is_webp = starts(b"RIFF") & starts(b"WEBP", 8)
    return tf.case(
        [
            (starts(b"\x89PNG\r\n\x1a\n"), png),
            (starts(b"\xff\xd8\xff"), jpeg),
            (starts(b"GIF8"), lambda: _gif_pixels(image_bytes, head)),
            (starts(b"BM"), bmp),
            (is_webp & starts(b"VP8X", 12), webp_extended),
            (is_webp & starts(b"VP8 ", 12), webp_lossy),
            (is_webp & starts(b"VP8L", 12), webp_lossless),
        ],
        default=lambda: tf.constant(-1, tf.int64),
    )


def _is_animated_webp(image_bytes: tf.Tensor) -> tf.Tensor:
    head = _bytes(image_bytes, tf.constant(0, tf.int64), 21)
    is_extended = tf.reduce_all(head[8:16] == list(b"WEBPVP8X"))
    return is_extended & (head[20] // 2 % 2 == 1)


def _gif_pixels(image_bytes: tf.Tensor, head: tf.Tensor) -> tf.Tensor:
    """Walks through the blocks of a GIF."""

    def table_bytes(flags):
        return tf.where(flags >= 128, 3 * 2 ** (flags % 8 + 1), 0)

    def block(position, inside, total, width, height):
        data = _bytes(image_bytes, position, 10)
        kind = data[0]
        is_frame = ~inside & (kind == 0x2C)
        is_extension = ~inside & (kind == 0x21)
        step = tf.case(
            [
                (inside, lambda: 1 + kind),
                (is_frame, lambda: 11 + table_bytes(data[9])),
                (is_extension, lambda: tf.constant(2, tf.int64)),
            ],
            default=lambda: length,  # the trailer, or what is no GIF
        )
        frame_width = tf.where(is_frame, _number(data[5:7]), 0)
        frame_height = tf.where(is_frame, _number(data[7:9]), 0)
        inside = tf.where(inside, kind > 0, is_frame | is_extension)
        return [
            position + step,
            inside,
            total + frame_width * frame_height,
            tf.maximum(width, frame_width),
            tf.maximum(height, frame_height),
        ]

    length = tf.cast(tf.strings.length(image_bytes), tf.int64)
    position, _, total, width, height = tf.while_loop(
        lambda position, *_: position < length,
        block,
        [
            13 + table_bytes(head[10]),
            tf.constant(False),
            tf.constant(0, tf.int64),
            _number(head[6:8]),
            _number(head[8:10]),
        ],
        maximum_iterations=_MAX_GIF_BLOCKS,
    )
    return tf.where(position < length, tf.int64.max, total + width * height)


def _bytes(image_bytes: tf.Tensor, position: tf.Tensor, count: int):
    """int64 [count]; 0 after the end, where tf.strings.substr would fail."""
    padded = tf.strings.join(
        [tf.strings.substr(image_bytes, position, count), "\0" * count]
    )
    data = tf.io.decode_raw(tf.strings.substr(padded, 0, count), tf.uint8)
    return tf.ensure_shape(tf.cast(data, tf.int64), [count])


def _number(digits: tf.Tensor) -> tf.Tensor:
    """Bytes, the least significant one first, as one number."""
    place = 256 ** tf.range(tf.size(digits, tf.int64), dtype=tf.int64)
    return tf.reduce_sum(digits * place)


def _signed(number: tf.Tensor) -> tf.Tensor:
    """Of 32 bits, in two's complement."""
    return tf.where(number < 2**31, number, number - 2**32)
