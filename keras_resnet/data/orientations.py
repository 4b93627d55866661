"""EXIF orientation: how a photo must be turned to stand upright.

A camera stores the pixels as its sensor has them, and a number of 1 to 8 in the
EXIF segment of the JPEG. Numbers of 5 and more exchange rows and columns first.
Then rows, columns or both are reversed:

    number    1     2        3     4     5     6        7     8
    rows      -     -        yes   yes   -     -        yes   yes
    columns   -     yes      yes   -     -     yes      yes   -

TensorFlow operations only, on one image. The orientation of other formats than
JPEG is not read.
"""

import tensorflow as tf

_REVERSES_ROWS = (False, False, False, True, True, False, False, True, True)
_REVERSES_COLUMNS = (False, False, True, True, False, False, True, True, False)
_EXCHANGES_FROM = 5

# An EXIF segment follows the start of a JPEG or its JFIF segment.
_HEAD_BYTES = 2**16
_EXIF = b"Exif\0\0"
_MARKER = b"\xff\xe1"  # two bytes of the length are between it and _EXIF

_TAG = 0x0112
_MOST_ENTRIES = 64  # of a directory; cameras write about 12


def orientation(image_bytes):
    """Returns the EXIF orientation of an encoded image.

    Args:
        image_bytes: string scalar.

    Returns:
        int32 scalar of 1 to 8; 1 without a valid orientation.
    """
    head = tf.strings.substr(image_bytes, 0, _HEAD_BYTES)
    parts = tf.raw_ops.StringSplitV2(input=[head], sep=_EXIF, maxsplit=1).values
    return tf.cond(
        tf.io.is_jpeg(image_bytes) & (tf.size(parts) > 1),
        lambda: _of_segment(parts[0], parts[1]),
        lambda: tf.constant(1),
    )


# A function that is not inlined is skipped as a whole.
@tf.function(autograph=False, experimental_attributes={"_noinline": True})
def _of_segment(before, tiff):
    """Reads the orientation in the first directory of a TIFF header."""
    is_segment = (
        tf.strings.substr(
            tf.strings.join([b"\0" * 4, before]),
            tf.strings.length(before),
            2,
        )
        == _MARKER
    )
    header = _bytes(tiff, tf.constant(0), 8)
    is_big = tf.reduce_all(header[:2] == [0x4D, 0x4D])
    is_little = tf.reduce_all(header[:2] == [0x49, 0x49])

    def number(values, count):
        """The integer of `count` bytes along the last axis."""
        little = [256**i for i in range(count)]
        big = [256**i for i in reversed(range(count))]
        weights = tf.where(is_big, tf.constant(big, tf.int64), little)
        return tf.reduce_sum(values * weights, -1)

    start = number(header[4:8], 4)
    length = tf.cast(tf.strings.length(tiff), tf.int64)
    is_valid = (is_big | is_little) & is_segment & (start >= 8)
    is_valid &= start + 2 <= length
    start = tf.cast(tf.where(is_valid, start, 0 * start), tf.int32)
    # Zeros behind the end stand for what a damaged header promises.
    data = _bytes(tiff, start, 2 + 12 * _MOST_ENTRIES)
    count = tf.minimum(number(data[:2], 2), _MOST_ENTRIES)
    count = tf.where(is_valid, count, 0 * count)
    entries = tf.reshape(data[2:], [-1, 12])[:count]
    # Of type SHORT (3), or of type LONG (4) as some programs write it.
    kinds = number(entries[:, 2:4], 2)
    short, long = number(entries[:, 8:10], 2), number(entries[:, 8:12], 4)
    values = tf.where(
        kinds == 3, short, tf.where(kinds == 4, long, 1 + 0 * long)
    )
    found = tf.boolean_mask(values, number(entries[:, :2], 2) == _TAG)
    value = tf.concat([found, tf.constant([1], tf.int64)], 0)[0]
    value = tf.where((value >= 1) & (value <= 8), value, tf.ones_like(value))
    return tf.cast(value, tf.int32)


def _bytes(text, start, count):
    """Returns `count` bytes of a text as int64, and zeros behind its end."""
    part = tf.strings.substr(text, start, count)
    return tf.cast(
        tf.io.decode_raw(part, tf.uint8, fixed_length=count), tf.int64
    )


def turn(image, number):
    """Returns a stored image as its orientation says.

    Args:
        image: `[height, width, c]`.
        number: int32 scalar of 1 to 8.

    >>> image = tf.constant([[[1], [2]], [[3], [4]]])
    >>> turn(image, tf.constant(6))[..., 0].numpy().tolist()
    [[3, 1], [4, 2]]
    """

    def turned():
        upright = tf.cond(
            number >= _EXCHANGES_FROM,
            lambda: tf.transpose(image, [1, 0, 2]),
            lambda: image,
        )
        reverses = [
            tf.gather(_REVERSES_ROWS, number),
            tf.gather(_REVERSES_COLUMNS, number),
            False,
        ]
        # tf.reverse takes the axes as a constant; this takes them as a tensor.
        return tf.raw_ops.Reverse(tensor=upright, dims=tf.stack(reverses))

    turned_image = tf.cond(number == 1, lambda: image, turned)
    return tf.ensure_shape(turned_image, [None, None, image.shape[-1]])


def turned(image, image_bytes):
    """Returns a decoded image as the orientation of its file says."""
    return turn(image, orientation(image_bytes))


def turned_sides(height, width, number):
    """Returns the height and the width of the turned image."""
    exchanges = number >= _EXCHANGES_FROM
    return tf.where(exchanges, width, height), tf.where(
        exchanges, height, width
    )


def stored_window(window, height, width, number):
    """Returns the window of the stored image that a turned window shows.

    Args:
        window: int32 `[4]`: top, left, height, width in the turned image.
        height: Height of the turned image.
        width: Width of the turned image.
        number: int32 scalar of 1 to 8.
    """
    top, left, rows, columns = tf.unstack(window)
    top = tf.where(tf.gather(_REVERSES_ROWS, number), height - top - rows, top)
    left = tf.where(
        tf.gather(_REVERSES_COLUMNS, number), width - left - columns, left
    )
    return tf.where(
        number >= _EXCHANGES_FROM,
        tf.stack([left, top, columns, rows]),
        tf.stack([top, left, rows, columns]),
    )
