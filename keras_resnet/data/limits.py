"""Bounds of an encoded image, checked before it is decoded.

A file of 100 kilobytes can unpack to gigabytes. The first bytes of a file have
the size of the image, so that such a file is an error and not an outage:

    PNG   width and height after the signature and the word IHDR
    JPEG  height and width in the frame header, which TensorFlow finds
    GIF   the sum of all frames, because TensorFlow unpacks every frame, plus
          one image of the largest width and height of screen and frames
    BMP   width and height of the information header; either may be negative
    WebP  VP8X: the canvas; VP8: the frame; VP8L: the frame

Two more parts of a file multiply the work. Ordinary files have few of them:

    JPEG  scans, each of which visits the whole image
    PNG   compressed texts, each of which unpacks to 8 MB

The checks are TensorFlow operations, so that they run in an exported graph and
in the pipelines of training and evaluation.
"""

import numpy as np
import tensorflow as tf

MAX_PIXELS = 64 * 10**6  # above what cameras take; 192 MB as three channels
MAX_JPEG_SCANS = 64  # progressive files have about 10
MAX_PNG_TEXTS = 16

# Reasons to reject an image: the beginning of a sentence.
NOT_AN_IMAGE = "not an image"
NOT_SUPPORTED = "format not supported"
TOO_MANY_PIXELS = "too many pixels"
TOO_MANY_SCANS = "too many scans"
TOO_MANY_TEXTS = "too many texts"

# Place and bytes of formats that TensorFlow does not decode.
_OTHER_FORMATS = [
    (0, b"II*\0"),  # TIFF, and raw photos
    (0, b"MM\0*"),
    (4, b"ftyp"),  # HEIC and AVIF (see `HEIC`), films
    (0, b"\xff\x0a"),  # JPEG XL
    (4, b"JXL "),
    (4, b"jP  "),  # JPEG 2000
    (0, b"8BPS"),  # Photoshop
    (0, b"<svg"),
    (0, b"\0\0\1\0"),  # icons
]

# Kinds of photos in `ftyp`, at the ninth byte.
HEIC = (b"heic", b"heix", b"hevc", b"mif1", b"msf1", b"avif")

# The first 16 bytes of a PNG: the signature, then the length and the name of
# the header.
PNG_HEAD = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"

# Bytes that a scan of a JPEG, or a compressed text of a PNG (zTXt, iTXt), has.
_SCAN = b"\xff\xda"
_TEXT = b"TXt"

# Fewest bytes of a scan: its header, for one component.
_SCAN_BYTES = 10

_MAX_GIF_STEPS = 10_000  # about 4 a frame, and 1 more for every 16 KB of data
_MAX_JPEG_SEGMENTS = 2_000
_FULL_BLOCKS = 64  # of a GIF, that are passed in one step


@tf.function(autograph=False)
def check(image_bytes: tf.Tensor, max_pixels: int = MAX_PIXELS) -> tf.Tensor:
    """Returns an encoded image unchanged if it keeps the bounds.

    Args:
        image_bytes: string scalar, an encoded image.
        max_pixels: Largest width x height, for GIF summed as above.

    Raises:
        tf.errors.InvalidArgumentError: If `examine` returns a reason.

    >>> png = tf.io.encode_png(tf.zeros([20, 30, 3], tf.uint8))
    >>> bool(check(png, max_pixels=600) == png)
    True
    """
    _, reason = examine(image_bytes, max_pixels)
    is_right = tf.debugging.Assert(tf.equal(reason, ""), [reason])
    with tf.control_dependencies([is_right]):
        return tf.identity(image_bytes)


def examine(
    image_bytes: tf.Tensor, max_pixels: int = MAX_PIXELS
) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns the pixels of an encoded image, and the reason to reject it.

    Args:
        image_bytes: string scalar, an encoded image.
        max_pixels: Largest width x height, for GIF summed as above.

    Returns:
        `pixels`, and a string scalar: empty, or a reason and a sentence. The
        reason is one of `NOT_AN_IMAGE`, `NOT_SUPPORTED`, `TOO_MANY_PIXELS`,
        `TOO_MANY_SCANS` and `TOO_MANY_TEXTS`.

    Raises:
        tf.errors.InvalidArgumentError: If the header of a JPEG is damaged.

    >>> examine(b"text")[1].numpy()
    b'not an image: an image must be a JPEG, PNG, GIF, BMP or WebP'
    """

    def of_jpeg():
        sides = tf.io.extract_jpeg_shape(image_bytes)[:2]
        scans = _occurrences(image_bytes, _SCAN, MAX_JPEG_SCANS)
        return _product(sides), scans <= MAX_JPEG_SCANS

    def of_png():
        head = tf.strings.substr(image_bytes, 16, 8)
        sides = tf.io.decode_raw(head, tf.int32, little_endian=False)
        texts = _occurrences(image_bytes, _TEXT, MAX_PNG_TEXTS)
        return _product(sides), texts <= MAX_PNG_TEXTS

    # Most files pass at a fraction of the time.
    is_png = tf.strings.substr(image_bytes, 0, 16) == PNG_HEAD
    is_png &= tf.strings.length(image_bytes) >= 24
    size, is_ordinary = tf.cond(
        tf.io.is_jpeg(image_bytes),
        of_jpeg,
        lambda: tf.cond(
            is_png, of_png, lambda: (tf.constant(-1, tf.int64), False)
        ),
    )
    return tf.cond(
        is_ordinary & (size > 0) & (size <= max_pixels),
        lambda: (size, tf.constant("")),
        lambda: _examine(image_bytes, max_pixels),
    )


def _product(sides: tf.Tensor) -> tf.Tensor:
    """Multiplies width and height; -1 if one of them is not above 0."""
    sides = tf.cast(sides, tf.int64)
    return tf.where(
        tf.reduce_min(sides) > 0,
        tf.reduce_prod(sides),
        tf.constant(-1, tf.int64),
    )


# A function that is not inlined is skipped as a whole. The operations of an
# inlined one would be skipped one by one, which takes 40 microseconds.
@tf.function(autograph=False, experimental_attributes={"_noinline": True})
def _examine(
    image_bytes: tf.Tensor, max_pixels: int
) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns the pixels and the reason for any file."""
    size = pixels(image_bytes)
    scans, texts = _repetitions(image_bytes)
    formats = "an image must be a JPEG, PNG, GIF, BMP or WebP"
    sentences = [
        "",
        f"{NOT_AN_IMAGE}: {formats}",
        f"{NOT_SUPPORTED}: {formats}",
        f"{NOT_SUPPORTED}: HEIC and AVIF must be converted to JPEG, for "
        "example by `mogrify -format jpg` of ImageMagick",
        # TensorFlow unpacks every frame, and no header has their number.
        f"{NOT_SUPPORTED}: a WebP must have no animation",
        f"{TOO_MANY_SCANS}: a JPEG may have at most {MAX_JPEG_SCANS} scans",
        f"{TOO_MANY_TEXTS}: a PNG may have at most {MAX_PNG_TEXTS} compressed "
        "texts",
    ]
    which = tf.where(texts > MAX_PNG_TEXTS, 6, 0)
    which = tf.where(scans > MAX_JPEG_SCANS, 5, which)
    which = tf.where(_is_animated_webp(image_bytes), 4, which)
    unknown = tf.where(_is_of_another_format(image_bytes), 2, 1)
    unknown = tf.where(_is_heic(image_bytes), 3, unknown)
    which = tf.where(size < 0, unknown, which)
    too_large = tf.strings.join(
        [
            f"{TOO_MANY_PIXELS}: an image may have at most {max_pixels} "
            "pixels, received ",
            tf.strings.as_string(size),
        ]
    )
    too_large = tf.where(
        size == tf.int64.max,
        f"{TOO_MANY_PIXELS}: a GIF must have blocks that {_MAX_GIF_STEPS} "
        "steps can count",
        too_large,
    )
    reason = tf.where(size > max_pixels, too_large, tf.gather(sentences, which))
    return size, reason


def _is_of_another_format(image_bytes: tf.Tensor) -> tf.Tensor:
    head = tf.strings.join([image_bytes, "\0" * 12])
    return tf.reduce_any(
        [
            tf.strings.substr(head, place, len(text)) == text
            for place, text in _OTHER_FORMATS
        ]
    )


def _is_heic(image_bytes: tf.Tensor) -> tf.Tensor:
    head = tf.strings.substr(tf.strings.join([image_bytes, "\0" * 12]), 0, 12)
    return (tf.strings.substr(head, 4, 4) == b"ftyp") & tf.reduce_any(
        tf.strings.substr(head, 8, 4) == HEIC
    )


def check_cheaply(image_bytes: tf.Tensor) -> tf.Tensor:
    """Returns an encoded image unchanged if decoding it is bounded work.

    It is `check` at a fraction of the time for ordinary JPEG and PNG files.
    The scans of a JPEG are counted only if they could visit more pixels than
    `MAX_JPEG_SCANS` scans of `MAX_PIXELS`. So a photo of 500 x 375 pixels and
    less than 218 KB may have any number of scans.

    Args:
        image_bytes: string scalar, an encoded image.

    Raises:
        tf.errors.InvalidArgumentError: As `check`.
    """

    def is_ordinary_jpeg():
        sides = tf.io.extract_jpeg_shape(image_bytes)[:2]
        size = tf.reduce_prod(tf.cast(sides, tf.int64))
        length = tf.cast(tf.strings.length(image_bytes), tf.int64)
        scans = tf.maximum(length // _SCAN_BYTES, MAX_JPEG_SCANS)
        return size * scans <= MAX_PIXELS * MAX_JPEG_SCANS

    return tf.cond(
        tf.cond(
            tf.io.is_jpeg(image_bytes),
            is_ordinary_jpeg,
            lambda: tf.constant(False),
        ),
        lambda: tf.identity(image_bytes),
        lambda: _check_any(image_bytes),
    )


@tf.function(autograph=False, experimental_attributes={"_noinline": True})
def _check_any(image_bytes: tf.Tensor) -> tf.Tensor:
    return check(image_bytes)


def _repetitions(image_bytes: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Counts the scans of a JPEG and the compressed texts of a PNG."""
    zero = tf.constant(0, tf.int64)
    is_jpeg = tf.io.is_jpeg(image_bytes)
    is_png = tf.strings.substr(image_bytes, 0, 4) == b"\x89PNG"
    scans = tf.cond(is_jpeg, lambda: jpeg_scans(image_bytes), lambda: zero)
    texts = tf.cond(
        is_png,  # zTXt and iTXt
        lambda: _occurrences(image_bytes, _TEXT, MAX_PNG_TEXTS),
        lambda: zero,
    )
    return scans, texts


def has_few_parts(image_bytes: tf.Tensor) -> tf.Tensor:
    """Whether a JPEG or PNG certainly keeps the bounds of scans and texts.

    Args:
        image_bytes: string scalar, a JPEG or PNG.

    Returns:
        bool scalar. False for a file that only `examine` can judge: it has
        bytes that look like scans or compressed texts.
    """
    is_jpeg = tf.io.is_jpeg(image_bytes)
    parts = tf.raw_ops.StringSplitV2(
        input=[image_bytes],
        sep=tf.where(is_jpeg, _SCAN, _TEXT),
        maxsplit=max(MAX_JPEG_SCANS, MAX_PNG_TEXTS) + 1,
    )
    most = tf.where(is_jpeg, MAX_JPEG_SCANS, MAX_PNG_TEXTS)
    return tf.size(parts.values) - 1 <= most


def _occurrences(image_bytes: tf.Tensor, text: bytes, limit: int) -> tf.Tensor:
    """Counts occurrences of bytes; `limit` + 1 stands for any more."""
    parts = tf.raw_ops.StringSplitV2(
        input=[image_bytes], sep=text, maxsplit=limit + 1
    )
    return tf.size(parts.values, tf.int64) - 1


def jpeg_scans(image_bytes: tf.Tensor) -> tf.Tensor:
    """Counts the scans of a JPEG.

    Args:
        image_bytes: string scalar, a JPEG.

    Returns:
        int64 scalar, at least the number of scans. Bytes that look like a scan,
        in a thumbnail or behind the image, never raise it above
        `MAX_JPEG_SCANS`.
    """
    at_most = _occurrences(image_bytes, _SCAN, MAX_JPEG_SCANS)
    return tf.cond(
        at_most <= MAX_JPEG_SCANS,
        lambda: at_most,
        lambda: _walked_scans(image_bytes),
    )


def _walked_scans(image_bytes: tf.Tensor) -> tf.Tensor:
    """Counts scans by following the markers, as a decoder does."""
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


def pixels(image_bytes: tf.Tensor) -> tf.Tensor:
    """Returns the number of pixels in the header of an encoded image.

    Args:
        image_bytes: string scalar, an encoded image.

    Returns:
        int64 scalar: width x height, for GIF summed over the frames and one
        image that holds them all; -1 for any other format.
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
    """Sums the pixels of a GIF by walking through its blocks."""

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
        # Data are blocks of a size and up to 255 bytes; size zero is the end.
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
                # The walk ends at the trailer, or at damaged data.
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
    """Returns bytes as int64 `[count]`, and zeros after the end."""
    padded = tf.strings.join(
        [tf.strings.substr(image_bytes, position, count), "\0" * count]
    )
    data = tf.io.decode_raw(tf.strings.substr(padded, 0, count), tf.uint8)
    return tf.ensure_shape(tf.cast(data, tf.int64), [count])


def _number(digits: tf.Tensor) -> tf.Tensor:
    """Returns the number that bytes form, the least significant one first."""
    place = 256 ** tf.range(tf.size(digits, tf.int64), dtype=tf.int64)
    return tf.reduce_sum(digits * place)


def _signed(number: tf.Tensor) -> tf.Tensor:
    """Converts 32 bits in two's complement to a signed number."""
    return tf.where(number < 2**31, number, number - 2**32)
