"""Decodes a batch of images, of which each can fail without the others.

TensorFlow Serving puts the images of strangers into one batch. An image that
fails must not change the answers for the others. So every image is an element
of a `tf.data` pipeline inside the exported graph. Elements that fail are left
out, and their places in the batch get a status:

    not an image          its first bytes are those of no format of images
    format not supported  another format, or an animated WebP
    too many pixels, too many scans, too many texts
                          it exceeds the bounds of `data.limits`
    truncated             the file ends too early
    damaged               it cannot be decoded for another reason

A colon and a sentence follow the reason. An empty status means that the image
was decoded.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import tensorflow as tf

from keras_resnet.data import decoding
from keras_resnet.data import limits
from keras_resnet.data import orientation
from keras_resnet.data import views
from keras_resnet.serving import examples

TRUNCATED = "truncated"
DAMAGED = "damaged"

_RATIOS = (1, 2, 4, 8)  # by which a JPEG can be decoded smaller
_SIDE_BY_SIDE = 16  # small images that are decoded at a time
_JPEG_HEAD = b"\xff\xd8\xff"
_PNG_BYTES = 24  # to the end of width and height
_NO_IMAGE = ""  # whose decoding fails
_TAIL_BYTES = 1024  # in which the end of an image is looked for

Function = Callable[[tf.Tensor], tuple[tf.Tensor, ...]]


class Decoded(NamedTuple):
    """Views of a batch of images.

    Attributes:
        views: uint8 `[batch, image_size, image_size, channels]`; zeros for a
            rejected image.
        status: string `[batch]`: empty, or the reason and a sentence.
    """

    views: tf.Tensor
    status: tf.Tensor


def decode(
    image_bytes: tf.Tensor,
    preprocessing: views.Preprocessing,
    max_pixels: int = limits.MAX_PIXELS,
    exif: bool = True,
    scaled_jpeg: bool = False,
) -> Decoded:
    """Checks and decodes a batch of images.

    Images are decoded side by side if all of them together have at most
    `max_pixels`, and else one after the other. So the memory is independent of
    the size of the batch.

    Args:
        image_bytes: string `[batch]`, encoded images.
        preprocessing: Makes the view of a decoded image.
        max_pixels: Largest width x height of an image, as in `limits.check`.
        exif: Whether an image is turned as its EXIF data state.
        scaled_jpeg: Whether a large JPEG is decoded to a half, a quarter or an
            eighth of its size, which is faster. The views differ slightly.
    """
    target = preprocessing.shorter_side or preprocessing.image_size
    spec = tf.TensorSpec(preprocessing.image_shape, tf.uint8)

    def ordinary_pixels(image):
        if scaled_jpeg:
            return _decode_scaled(image, target)
        return tf.io.decode_image(image, expand_animations=False)

    def any_pixels(image):
        if scaled_jpeg:
            return _decode_scaled(image, target)
        return decoding.decode(image)

    def view(image, pixels):
        if exif:
            stated = orientation.orientation(image)
            pixels = orientation.upright(pixels, stated)
        return preprocessing.view(pixels)

    def ordinary_view(image):
        is_ordinary = limits.has_few_parts(image)
        if exif:
            is_ordinary &= ~orientation.may_be_stated(image)
        image = tf.where(is_ordinary, image, _NO_IMAGE)
        return preprocessing.view(ordinary_pixels(image))

    # A function that is not inlined is skipped as a whole.
    @tf.function(autograph=False, experimental_attributes={"_noinline": True})
    def of_any(image_bytes):
        return map_images(
            lambda image: view(image, any_pixels(image)),
            image_bytes,
            spec,
            max_pixels,
        )

    def of_one():
        image = image_bytes[0]
        pixels = _pixels_of_ordinary(image, ordinary_pixels, max_pixels)
        return tf.cond(
            tf.size(pixels) > 0,
            lambda: Decoded(view(image, pixels)[None], tf.constant([""])),
            lambda: of_any(image_bytes),
        )

    def of_many():
        is_decoded, views = _views_of_ordinary(
            image_bytes, ordinary_view, spec, max_pixels
        )
        status = tf.fill([tf.size(image_bytes)], "")
        rest = tf.where(~is_decoded)

        def with_rest():
            found = of_any(tf.gather_nd(image_bytes, rest))
            return Decoded(
                tf.tensor_scatter_nd_update(views, rest, found.views),
                tf.tensor_scatter_nd_update(status, rest, found.status),
            )

        return tf.cond(
            tf.size(rest) > 0, with_rest, lambda: Decoded(views, status)
        )

    return tf.cond(tf.equal(tf.size(image_bytes), 1), of_one, of_many)


def _pixels_of_ordinary(
    image_bytes: tf.Tensor,
    decode: Callable[[tf.Tensor], tf.Tensor],
    max_pixels: int,
) -> tf.Tensor:
    """Decodes one JPEG or PNG in a fraction of the time of `each`.

    The function of tf.data has only the operations that can fail, because
    TensorFlow prepares it again for each request.

    Args:
        image_bytes: string scalar, an encoded image.
        decode: Function from an encoded image to its pixels.
        max_pixels: Largest width x height.

    Returns:
        uint8 `[height, width, channels]`; empty if the file is of another
        format, is damaged, or exceeds a bound.
    """

    def jpeg(image):
        sides = tf.io.extract_jpeg_shape(image)[:2]
        size = tf.reduce_prod(tf.cast(sides, tf.int64))
        return decode(tf.where(size <= max_pixels, image, _NO_IMAGE))

    def first(function, image):
        elements = tf.data.Dataset.from_tensors(image).map(function)
        nothing = tf.data.Dataset.from_tensors(tf.zeros([0, 0, 0], tf.uint8))
        elements = elements.ignore_errors().concatenate(nothing)
        return elements.take(1).get_single_element()

    size = _png_sizes(image_bytes[None])[0]
    is_jpeg = tf.io.is_jpeg(image_bytes)
    is_ordinary = limits.has_few_parts(image_bytes)
    is_ordinary &= is_jpeg | ((size > 0) & (size <= max_pixels))
    image = tf.where(is_ordinary, image_bytes, _NO_IMAGE)
    return tf.cond(
        is_jpeg, lambda: first(jpeg, image), lambda: first(decode, image)
    )


def _views_of_ordinary(
    image_bytes: tf.Tensor,
    view: Callable[[tf.Tensor], tf.Tensor],
    spec: tf.TensorSpec,
    max_pixels: int,
) -> tuple[tf.Tensor, tf.Tensor]:
    """Decodes the JPEG and PNG files of a batch, within the bounds.

    Args:
        image_bytes: string `[batch]`, encoded images.
        view: Function from an encoded image to its view. It may fail.
        spec: Specification of a view.
        max_pixels: Largest width x height of an image.

    Returns:
        bool `[batch]`, whether an image is decoded, and the views.
    """
    png_sizes = _png_sizes(image_bytes)

    def with_jpeg_sizes():
        def size(image):
            sides = tf.io.extract_jpeg_shape(image)[:2]
            return (tf.reduce_prod(tf.cast(sides, tf.int64)),)

        # The JPEG library logs other formats.
        heads = tf.strings.substr(image_bytes, 0, len(_JPEG_HEAD))
        places = tf.where(heads == _JPEG_HEAD)
        jpegs = tf.gather_nd(image_bytes, places)
        scalar = tf.TensorSpec([], tf.int64)
        _, (jpeg_sizes,) = each(size, jpegs, [scalar], None)
        return tf.tensor_scatter_nd_update(png_sizes, places, jpeg_sizes)

    sizes = tf.cond(
        tf.reduce_all(png_sizes > 0), lambda: png_sizes, with_jpeg_sizes
    )
    fits = (sizes > 0) & (sizes <= max_pixels)
    total = tf.reduce_sum(tf.where(fits, sizes, 0))
    is_decoded, (views,) = each(
        lambda image: (view(image),),
        tf.where(fits, image_bytes, _NO_IMAGE),
        [spec],
        tf.where(total <= max_pixels, _SIDE_BY_SIDE, 1),
    )
    return is_decoded, views


def _png_sizes(image_bytes: tf.Tensor) -> tf.Tensor:
    """Returns the pixels of each PNG, int64 `[batch]`; 0 for another file."""
    zeros = "\0" * _PNG_BYTES
    heads = tf.strings.join(
        [tf.strings.substr(image_bytes, 0, _PNG_BYTES), zeros]
    )
    sides = tf.io.decode_raw(
        tf.strings.substr(heads, 16, 8), tf.int32, little_endian=False
    )
    sides = tf.cast(tf.reshape(sides, [-1, 2]), tf.int64)
    is_png = tf.strings.substr(heads, 0, 16) == limits.PNG_HEAD
    is_png &= tf.reduce_all(sides > 0, 1)
    return tf.where(is_png, tf.reduce_prod(sides, 1), 0)


def _decode_scaled(image_bytes: tf.Tensor, target: int) -> tf.Tensor:
    """Decodes an image; the shorter side of a JPEG stays above 2 x target.

    The decoder of a JPEG computes the scaled image from the low frequencies.
    """

    def of_jpeg():
        sides = tf.io.extract_jpeg_shape(image_bytes)[:2]
        shorter = tf.reduce_min(sides)
        bounds = [2 * target * ratio for ratio in _RATIOS[1:]]
        return tf.switch_case(
            tf.reduce_sum(tf.cast(shorter >= bounds, tf.int32)),
            [
                functools.partial(tf.io.decode_jpeg, image_bytes, ratio=ratio)
                for ratio in _RATIOS
            ],
        )

    return tf.cond(
        tf.io.is_jpeg(image_bytes),
        of_jpeg,
        lambda: decoding.decode(image_bytes),
    )


def map_images(
    view: Callable[[tf.Tensor], tf.Tensor],
    image_bytes: tf.Tensor,
    spec: tf.TensorSpec,
    max_pixels: int = limits.MAX_PIXELS,
) -> Decoded:
    """Checks and decodes a batch of images with a function.

    Args:
        view: Function from one encoded image to its view.
        image_bytes: string `[batch]`, encoded images.
        spec: Specification of a view.
        max_pixels: Largest width x height of an image, as in `limits.check`.
    """

    def checked(image):
        _, reason = limits.examine(image, max_pixels)
        decoded = tf.cond(
            tf.equal(reason, ""),
            lambda: view(image),
            lambda: tf.zeros(spec.shape, spec.dtype),
        )
        return decoded, reason

    total = _pixels(image_bytes, max_pixels)
    is_decoded, (decoded, status) = each(
        checked,
        image_bytes,
        [spec, tf.TensorSpec([], tf.string)],
        tf.where(total <= max_pixels, _SIDE_BY_SIDE, 1),
    )
    return Decoded(
        decoded,
        tf.cond(
            tf.reduce_all(is_decoded),
            lambda: status,
            lambda: tf.where(is_decoded, status, _failures(image_bytes)),
        ),
    )


def images_of_examples(serialized: tf.Tensor) -> tf.Tensor:
    """Returns the encoded images of tf.train.Example messages.

    Args:
        serialized: string `[batch]`.

    Returns:
        string `[batch]`; empty, which is not an image, if an example is
        damaged or lacks the image.
    """

    def image(example):
        feature = tf.io.FixedLenFeature([], tf.string)
        parsed = tf.io.parse_single_example(
            example, {examples.FEATURE: feature}
        )
        return (parsed[examples.FEATURE],)

    spec = tf.TensorSpec([], tf.string)
    _, (images,) = each(image, serialized, [spec], 1)
    return images


def _pixels(image_bytes: tf.Tensor, max_pixels: int) -> tf.Tensor:
    """Returns the pixels of a batch; of a single image at most `max_pixels`."""
    _, (sizes,) = each(
        lambda image: (_pixels_of_one(image),),
        image_bytes,
        [tf.TensorSpec([], tf.int64)],
        _SIDE_BY_SIDE,
    )
    # A single huge image must not overflow the sum.
    return tf.reduce_sum(tf.clip_by_value(sizes, 0, max_pixels))


def _pixels_of_one(image_bytes: tf.Tensor) -> tf.Tensor:
    """Returns `limits.pixels`, at a fraction of the time for a JPEG."""

    def of_jpeg():
        sides = tf.io.extract_jpeg_shape(image_bytes)[:2]
        return tf.reduce_prod(tf.cast(sides, tf.int64))

    # A function that is not inlined is only prepared if it is called.
    pixels = tf.function(
        limits.pixels,
        autograph=False,
        experimental_attributes={"_noinline": True},
    )
    return tf.cond(
        tf.io.is_jpeg(image_bytes), of_jpeg, lambda: pixels(image_bytes)
    )


def each(
    function: Function,
    values: tf.Tensor,
    specs: list[tf.TensorSpec],
    at_a_time: int | tf.Tensor | None,
) -> tuple[tf.Tensor, list[tf.Tensor]]:
    """Applies a function to each value of a batch.

    A value for which the function raises is left out.

    Args:
        function: Function from a value to a tuple of tensors.
        values: `[batch]`.
        specs: Specifications of the tensors that the function returns.
        at_a_time: Number of values that are computed in parallel, in other
            threads; None for one after the other in the same thread.

    Returns:
        bool `[batch]`, whether the function returned, and `[batch, ...]` for
        each spec; zeros and empty strings where it did not.
    """
    count = tf.size(values, tf.int64)

    def numbered(place, value):
        found = function(value)
        return place, *(
            tf.ensure_shape(x, spec.shape)
            for x, spec in zip(found, specs, strict=True)
        )

    # At the end, so that there is always an element.
    last = (count, *(tf.zeros(spec.shape, spec.dtype) for spec in specs))
    elements = tf.data.Dataset.from_tensor_slices((tf.range(count), values))
    if at_a_time is not None:
        at_a_time = tf.cast(at_a_time, tf.int64)
    elements = elements.map(numbered, at_a_time).ignore_errors()
    elements = elements.concatenate(tf.data.Dataset.from_tensors(last))
    places, *found = elements.batch(count + 1).get_single_element()

    def in_order(part):
        shape = tf.concat([[count + 1], tf.shape(part, tf.int64)[1:]], 0)
        return tf.cond(
            tf.size(places, tf.int64) > count,
            lambda: part,  # nothing is left out
            lambda: tf.scatter_nd(places[:, None], part, shape),
        )[:count]

    is_there = tf.reduce_any(tf.range(count)[:, None] == places, 1)
    return is_there, [in_order(part) for part in found]


def _failures(image_bytes: tf.Tensor) -> tf.Tensor:
    """Returns the status of images, if they were not decoded."""
    spec = tf.TensorSpec([], tf.string)
    return tf.map_fn(_failure, image_bytes, fn_output_signature=spec)


def _failure(image_bytes: tf.Tensor) -> tf.Tensor:
    """Returns the status of an image that was not decoded."""
    length = tf.strings.length(image_bytes)
    start = tf.maximum(length - _TAIL_BYTES, 0)
    tail = tf.strings.substr(image_bytes, start, _TAIL_BYTES)
    head = tf.io.decode_raw(image_bytes, tf.uint8, fixed_length=12)
    head = tf.cast(head, tf.int64)

    def starts(text):
        return tf.reduce_all(head[: len(text)] == list(text))

    def has_end(text):
        return tf.size(tf.strings.split(tail, text)) > 1

    def promised(at):  # the length of the file, in the file
        return tf.reduce_sum(head[at : at + 4] * [1, 2**8, 2**16, 2**24])

    length = tf.cast(length, tf.int64)
    is_cut = (
        (starts(b"\xff\xd8") & ~has_end(b"\xff\xd9"))
        | (starts(b"\x89PNG") & ~has_end(b"IEND"))
        | (starts(b"GIF8") & ~has_end(b"\0;"))
        | (starts(b"BM") & (promised(2) > length))
        | (starts(b"RIFF") & (promised(4) + 8 > length))
    )
    return tf.where(
        is_cut,
        f"{TRUNCATED}: the file ends before the image does",
        f"{DAMAGED}: the image cannot be decoded",
    )
