"""Orientation of a photo, as its EXIF data state it.

A camera that is held upright stores the rows of its sensor, and writes into the
file how to turn them. The number is in the first directory of the EXIF data:

    1  as it is                 5  mirrored along the main diagonal
    2  mirrored left to right   6  turned right by 90 degrees
    3  turned by 180 degrees    7  mirrored along the other diagonal
    4  mirrored top to bottom   8  turned left by 90 degrees

JPEG has the data in a segment APP1, PNG in a chunk eXIf, WebP in a chunk EXIF.
The functions are TensorFlow operations, so that they run in an exported graph
and in the pipelines of training and evaluation.
"""

import tensorflow as tf

_MAX_SEGMENTS = 256  # of a JPEG, before the image
_MAX_CHUNKS = 4_000  # of a PNG or WebP
_MAX_EXIF_BYTES = 2**16  # the largest segment of a JPEG

_ORIENTATION = 0x112  # the tag
_SHORT = 3  # the type: 16 bits

# The first bytes of JPEG, PNG and WebP; the bytes that a file with EXIF data
# contains: no such format, JPEG, PNG, WebP.
_HEADS = [b"\xff\xd8\xff", b"\x89PN", b"RIF"]
_NAMES = [b"no EXIF data", b"Exif\0\0", b"eXIf", b"EXIF"]


def orientation(image_bytes: tf.Tensor) -> tf.Tensor:
    """Reads the orientation of an encoded image.

    Args:
        image_bytes: string scalar, an encoded image of any format.

    Returns:
        int32 scalar, 1 to 8. It is 1 for a file without EXIF data, and if the
        EXIF data are damaged.

    >>> int(orientation(tf.io.encode_png(tf.zeros([2, 3, 3], tf.uint8))))
    1
    """
    # Most files have no such bytes, and are not walked through.
    return tf.cond(
        may_be_stated(image_bytes),
        lambda: _stated(image_bytes, _kind(image_bytes)),
        lambda: tf.constant(1),
    )


def may_be_stated(image_bytes: tf.Tensor) -> tf.Tensor:
    """Whether a file contains the name of EXIF data, in any place.

    Args:
        image_bytes: string scalar, an encoded image of any format.

    Returns:
        bool scalar. If False, the orientation is 1.
    """
    kind = _kind(image_bytes)
    parts = tf.raw_ops.StringSplitV2(
        input=[image_bytes], sep=tf.gather(_NAMES, kind), maxsplit=1
    )
    return (kind > 0) & (tf.size(parts.values) > 1)


def _kind(image_bytes):
    """The number of the format in `_NAMES`."""
    head = tf.strings.substr(image_bytes, 0, 3)
    return tf.reduce_sum(tf.cast(head == _HEADS, tf.int32) * [1, 2, 3])


def upright(image: tf.Tensor, orientation: tf.Tensor) -> tf.Tensor:
    """Turns a decoded image as its orientation states.

    Args:
        image: `[height, width, channels]`, as it is stored.
        orientation: int32 scalar, 1 to 8, from `orientation`.

    Returns:
        `[height, width, channels]`; 5 to 8 exchange height and width.

    >>> image = tf.reshape(tf.range(6), [2, 3, 1])
    >>> upright(image, 6)[..., 0].numpy()
    array([[3, 0],
           [4, 1],
           [5, 2]], dtype=int32)
    """
    orientation = tf.convert_to_tensor(orientation)

    def turned():
        exchanged = tf.cond(
            orientation >= 5,
            lambda: tf.transpose(image, [1, 0, 2]),
            lambda: image,
        )
        reverses = [_is_upside_down(orientation), _is_mirrored(orientation)]
        return tf.raw_ops.Reverse(
            tensor=exchanged, dims=tf.stack([*reverses, False])
        )

    result = tf.cond(tf.equal(orientation, 1), lambda: image, turned)
    return tf.ensure_shape(result, [None, None, image.shape[-1]])


def _is_upside_down(orientation):
    return tf.reduce_any(orientation == [3, 4, 7, 8])


def _is_mirrored(orientation):
    return tf.reduce_any(orientation == [2, 3, 6, 7])


def turned_sides(height, width, orientation):
    """Returns the height and the width of the turned image."""
    exchanges = orientation >= 5
    return tf.where(exchanges, width, height), tf.where(
        exchanges, height, width
    )


def stored_window(window, height, width, orientation):
    """Returns the window of the stored image that a turned window shows.

    Args:
        window: int32 `[4]`: top, left, height, width in the turned image.
        height: Height of the turned image.
        width: Width of the turned image.
        orientation: int32 scalar of 1 to 8.
    """
    top, left, rows, columns = tf.unstack(window)
    top = tf.where(_is_upside_down(orientation), height - top - rows, top)
    left = tf.where(_is_mirrored(orientation), width - left - columns, left)
    return tf.where(
        orientation >= 5,
        tf.stack([left, top, columns, rows]),
        tf.stack([top, left, rows, columns]),
    )


# A function that is not inlined is skipped as a whole, as in `limits`.
@tf.function(autograph=False, experimental_attributes={"_noinline": True})
def _stated(image_bytes: tf.Tensor, kind: tf.Tensor) -> tf.Tensor:
    """Finds the EXIF data, and reads the orientation there."""
    start, length = tf.switch_case(
        kind - 1,
        [
            lambda: _in_jpeg(image_bytes),
            lambda: _in_chunks(image_bytes, 8, b"eXIf", _png_chunk),
            lambda: _in_webp(image_bytes),
        ],
    )
    length = tf.minimum(length, _MAX_EXIF_BYTES)
    data = _substring(image_bytes, start, length)
    # Some writers of WebP and PNG keep the name that JPEG has in front.
    has_name = tf.strings.substr(data, 0, 6) == _NAMES[1]
    return _in_exif(_substring(data, tf.where(has_name, 6, 0), _MAX_EXIF_BYTES))


def _in_jpeg(image_bytes):
    """Returns the place and the length of the EXIF data in a JPEG."""
    name = [0xFF, 0xE1, *_NAMES[1]]
    one = tf.constant(1, tf.int64)

    def segment(position, start, length, is_open):
        front = _bytes(image_bytes, position, 10)
        after = 256 * front[2] + front[3]
        is_exif = tf.reduce_all(tf.gather(front, [0, 1, *range(4, 10)]) == name)
        is_fill = front[1] == 0xFF
        # The image starts (DA) or ends (D9), or the file is damaged.
        is_last = (front[0] != 0xFF) | (front[1] == 0xDA) | (front[1] == 0xD9)
        is_last |= ~is_fill & (after < 2)
        return [
            position + tf.where(is_fill, one, 2 + after),
            tf.where(is_exif, position + 10, start),
            tf.where(is_exif, after - 8, length),
            ~is_exif & ~is_last,
        ]

    return _walk(segment, 2, _MAX_SEGMENTS)


def _in_webp(image_bytes):
    """Returns the place and the length, which a flag of the file promises."""
    head = _bytes(image_bytes, 8, 13)
    is_promised = tf.reduce_all(head[:8] == list(b"WEBPVP8X"))
    is_promised &= head[12] // 8 % 2 == 1
    start, length = _in_chunks(image_bytes, 12, b"EXIF", _webp_chunk)
    return start, tf.where(is_promised, length, 0)


def _in_chunks(image_bytes, first, name, read):
    """Returns the place and the length of the chunk with a name."""
    end = tf.strings.length(image_bytes)

    def chunk(position, start, length, is_open):
        kind, size, step = read(_bytes(image_bytes, position, 8))
        is_exif = tf.reduce_all(kind == list(name))
        return [
            position + step,
            tf.where(is_exif, position + 8, start),
            tf.where(is_exif, size, length),
            ~is_exif & (position + step < tf.cast(end, tf.int64)),
        ]

    return _walk(chunk, first, _MAX_CHUNKS)


def _png_chunk(front):
    size = _number(front[:4], is_little=False)
    return front[4:], size, size + 12


def _webp_chunk(front):
    size = _number(front[4:], is_little=True)
    return front[:4], size, 8 + size + size % 2


def _walk(step, first, at_most):
    """Follows the parts of a file to the EXIF data."""
    zero = tf.constant(0, tf.int64)
    _, start, length, _ = tf.while_loop(
        lambda position, start, length, is_open: is_open,
        step,
        [tf.constant(first, tf.int64), zero, zero, tf.constant(True)],
        maximum_iterations=at_most,
    )
    return start, tf.maximum(length, 0)


def _in_exif(data):
    """Reads the orientation in EXIF data, which are a TIFF file."""
    head = _bytes(data, 0, 8)
    is_little = tf.reduce_all(head[:4] == list(b"II*\0"))
    is_big = tf.reduce_all(head[:4] == list(b"MM\0*"))

    def number(digits):
        return tf.where(
            is_little, _number(digits, True), _number(digits, False)
        )

    place = number(head[4:])
    count = number(_bytes(data, place, 2))
    directory = _substring(data, place + 2, 12 * count)
    entries = tf.io.decode_raw(directory, tf.uint8)
    entries = tf.reshape(entries[: tf.size(entries) // 12 * 12], [-1, 12])
    entries = tf.cast(entries, tf.int64)
    values = number(entries[:, 8:10])
    is_stated = (
        (is_little | is_big)
        & (number(entries[:, :2]) == _ORIENTATION)
        & (number(entries[:, 2:4]) == _SHORT)
        & (number(entries[:, 4:8]) == 1)
        & (values >= 1)
        & (values <= 8)
    )
    stated = tf.boolean_mask(values, is_stated)
    return tf.cast(tf.concat([stated, [1]], 0)[0], tf.int32)


def _number(digits, is_little):
    """Returns the numbers that the last dimension of bytes forms."""
    places = [256**n for n in range(digits.shape[-1])]
    places = places if is_little else places[::-1]
    return tf.reduce_sum(digits * tf.constant(places, tf.int64), -1)


def _bytes(data, position, count):
    """Returns bytes as int64 `[count]`, and zeros after the end."""
    padded = tf.strings.join([_substring(data, position, count), "\0" * count])
    digits = tf.io.decode_raw(padded, tf.uint8)[:count]
    return tf.ensure_shape(tf.cast(digits, tf.int64), [count])


def _substring(data, position, count):
    """Returns a part of a string; it is shorter, or empty, at the end."""
    end = tf.cast(tf.strings.length(data), tf.int64)
    position = tf.minimum(tf.cast(position, tf.int64), end)
    return tf.strings.substr(data, position, tf.cast(count, tf.int64))
