"""How large an image says it is, read before it is decoded.

A file of 100 kilobytes can unpack to gigabytes. The formats say their size in
their first bytes, so that such a file is an error and not an outage:

    PNG   width and height after the signature and the word IHDR
    JPEG  in the frame header, wherever that stands: TensorFlow finds it
    GIF   every frame, all of which TensorFlow unpacks; and once more an image
          as wide as the widest and as high as the highest of screen and frames
    BMP   width and height of the information header; either may be negative
    WebP  VP8X: the canvas; VP8: the frame; VP8L: the frame

Two more things multiply the work, which few ordinary files have:

    JPEG  scans, each of which visits the whole image
    PNG   compressed texts, each of which unpacks to 8 MB

It is all TensorFlow operations, so that it goes into the exported graph.
"""

from collections.abc import Callable

import numpy as np
import tensorflow as tf

MAX_PIXELS = 64 * 10**6  # above what cameras take; 192 MB as three channels

_SIDE_BY_SIDE = 16  # small images that are decoded at a time
MAX_JPEG_SCANS = 64  # progressive files have about 10
MAX_PNG_TEXTS = 16

_MAX_GIF_STEPS = 10_000  # about 4 a frame, and 1 more for every 16 KB of data
_MAX_JPEG_SEGMENTS = 2_000
_FULL_BLOCKS = 64  # of a GIF, that are passed in one step


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
            BMP or WebP, or a WebP with animation; or a JPEG has more than
            `MAX_JPEG_SCANS`, a PNG more than `MAX_PNG_TEXTS`.

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
    with tf.control_dependencies(
        [is_known, is_small, is_still, *_repetitions(image_bytes)]
    ):
        return tf.identity(image_bytes)


def _repetitions(image_bytes: tf.Tensor) -> list[tf.Operation]:
    """Asserts that scans of a JPEG and texts of a PNG are few."""
    zero = tf.constant(0, tf.int64)
    is_jpeg = tf.io.is_jpeg(image_bytes)
    is_png = tf.strings.substr(image_bytes, 0, 4) == b"\x89PNG"
    scans = tf.cond(is_jpeg, lambda: jpeg_scans(image_bytes), lambda: zero)
    texts = tf.cond(
        is_png,  # zTXt and iTXt
        lambda: _occurrences(image_bytes, b"TXt", MAX_PNG_TEXTS),
        lambda: zero,
    )
    return [
        tf.debugging.Assert(
            scans <= MAX_JPEG_SCANS,
            [f"a JPEG may have at most {MAX_JPEG_SCANS} scans"],
        ),
        tf.debugging.Assert(
            texts <= MAX_PNG_TEXTS,
            [f"a PNG may have at most {MAX_PNG_TEXTS} compressed texts"],
        ),
    ]


def _occurrences(image_bytes: tf.Tensor, text: bytes, limit: int) -> tf.Tensor:
    """How often bytes occur; `limit` + 1 for more than that."""
    parts = tf.strings.split(image_bytes, text, maxsplit=limit + 1)
    return tf.size(parts, tf.int64) - 1


def jpeg_scans(image_bytes: tf.Tensor) -> tf.Tensor:
    """The scans of a JPEG; more than `MAX_JPEG_SCANS` for any such number.

    Args:
        image_bytes: a JPEG; string, scalar.

    Returns:
        int64, scalar; at least as many as there are, and not above the limit
        because of bytes that look like a scan in a thumbnail or behind the
        image.
    """
    at_most = _occurrences(image_bytes, b"\xff\xda", MAX_JPEG_SCANS)
    return tf.cond(
        at_most <= MAX_JPEG_SCANS,
        lambda: at_most,
        lambda: _walked_scans(image_bytes),
    )


def _walked_scans(image_bytes: tf.Tensor) -> tf.Tensor:
    """Goes from marker to marker, as a decoder does."""
    data = tf.io.decode_raw(tf.strings.join([image_bytes, "\0" * 4]), tf.uint8)
    kinds = data[1:]
    # Compressed data has zero, or a restart, behind each byte of 255.
    is_marker = (data[:-1] == 255) & (kinds != 0) & (kinds != 255)
    is_marker &= tf.bitwise.bitwise_and(kinds, 0xF8) != 0xD0
    found = tf.where(is_marker)[:, 0]
    places = tf.concat([found, [tf.size(data, tf.int64) - 4]], 0)

    def is_open(position, scans, is_ended):
        return ~is_ended & (scans <= MAX_JPEG_SCANS)

    def segment(position, scans, is_ended):
        place = places[tf.searchsorted(found, [position])[0]]
        kind, high, low = tf.unstack(
            tf.cast(tf.gather(data, place + [1, 2, 3]), tf.int64)
        )
        is_start = kind == 0xD8  # without a length
        length = tf.where(~is_start, tf.maximum(256 * high + low, 2), 0)
        is_last = (place >= places[-1]) | (kind == 0xD9)
        return [
            place + 2 + length,
            scans + tf.cast(~is_last & (kind == 0xDA), tf.int64),
            is_last,
        ]

    _, scans, is_ended = tf.while_loop(
        is_open,
        segment,
        [
            tf.constant(2, tf.int64),
            tf.constant(0, tf.int64),
            tf.constant(False),
        ],
        maximum_iterations=_MAX_JPEG_SEGMENTS,
    )
    return tf.where(is_ended, scans, MAX_JPEG_SCANS + 1)


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

    length = tf.cast(tf.strings.length(image_bytes), tf.int64)
    margin = 256 * (_FULL_BLOCKS + 2)
    padded = tf.strings.join([image_bytes, "\0" * margin])
    data = tf.io.decode_raw(padded, tf.uint8)
    strides = 256 * np.arange(_FULL_BLOCKS)

    def numbers(places):
        return tf.cast(tf.gather(data, places), tf.int64)

    def block(position, inside, total, width, height):
        front = numbers(position + np.arange(10))
        kind = front[0]
        is_frame = ~inside & (kind == 0x2C)
        is_extension = ~inside & (kind == 0x21)
        # Data are blocks of up to 255 bytes behind their size, then a zero.
        is_full = tf.cast(numbers(position + strides) == 255, tf.int64)
        full = 256 * tf.reduce_sum(tf.math.cumprod(is_full))
        size = numbers(position + full)
        after = full + 1 + size
        is_end = size == 0
        is_end_after = ~is_end & (numbers(position + after) == 0)
        inside_step = after + tf.cast(is_end_after, tf.int64)
        step = tf.where(
            inside,
            inside_step,
            tf.where(
                is_frame,
                11 + table_bytes(front[9]),
                # Nothing more is read of the trailer, or of what is no GIF.
                tf.where(~is_extension, length, 2),
            ),
        )
        frame_width = tf.where(is_frame, _number(front[5:7]), 0)
        frame_height = tf.where(is_frame, _number(front[7:9]), 0)
        inside = tf.where(
            inside, ~is_end & ~is_end_after, is_frame | is_extension
        )
        return [
            position + step,
            inside,
            total + frame_width * frame_height,
            tf.maximum(width, frame_width),
            tf.maximum(height, frame_height),
        ]

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
        maximum_iterations=_MAX_GIF_STEPS,
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
