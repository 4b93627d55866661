"""Operations on one image, and the policies that draw them at random.

The operations are those of Pillow that AutoAugment chose (Cubuk et al. 2019).
Each takes a uint8 image `[height, width, channels]` and a float32 number, and
returns a uint8 image of the same shape. Keras' own layers for RandAugment and
its kind draw from a generator with a state, so a batch would not be a function
of (seed, step).
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import tensorflow as tf

from keras_resnet import names

# A magnitude is 0 (no change, for most operations) to 1.
_BINS = 31  # magnitudes of TrivialAugment: 0, 1/30, ... 1

# Weights of red, green and blue in grey, of 2**16, as in Pillow.
_GREY = (19595.0, 38470.0, 7471.0)


# --- Operations ---------------------------------------------------------------


def identity(image, value):
    """Returns the image."""
    return image


def auto_contrast(image, value):
    """Stretches each channel to 0 ... 255."""
    rows = _rows(image)
    channels = image.shape[-1]
    low, high = (
        _repeated(reduce(tf.reshape(reduce(rows, 0), [-1, channels]), 0), image)
        for reduce in (tf.reduce_min, tf.reduce_max)
    )
    # A float32 is exact here: the quotient is a whole number, or at least 1/255
    # away from the next one.
    stretched = (rows - low) * 255.0 / tf.maximum(high - low, 1.0)
    # A channel of one value stays.
    stretched += tf.cast(high <= low, tf.float32) * low
    return tf.cast(tf.reshape(stretched, image.shape), tf.uint8)


def equalize(image, value):
    """Maps each channel so that its histogram is nearly flat."""
    channels = image.shape[-1]
    x = tf.cast(image, tf.int32) + 256 * tf.range(channels)
    counts = tf.math.bincount(tf.reshape(x, [-1]), minlength=256 * channels)
    counts = tf.reshape(counts, [channels, 256])
    # The last value that occurs does not count, as in Pillow.
    numbers = tf.where(counts > 0, tf.range(256), 0)
    last = tf.gather(counts, tf.reduce_max(numbers, 1), batch_dims=1)
    step = (tf.reduce_sum(counts, 1) - last)[:, None] // 255
    before = tf.cumsum(counts, axis=1, exclusive=True)
    table = (before + step // 2) // tf.maximum(step, 1)
    table = tf.where(step > 0, tf.minimum(table, 255), tf.range(256))
    return tf.gather(tf.reshape(tf.cast(table, tf.uint8), [-1]), x)


def invert(image, value):
    """Returns 255 minus each pixel."""
    return 255 - image


def posterize(image, value):
    """Keeps the first `value` bits of each pixel."""
    bits = 256 - tf.bitwise.left_shift(1, 8 - tf.cast(value, tf.int32))
    return tf.bitwise.bitwise_and(image, tf.cast(bits, tf.uint8))


def solarize(image, value):
    """Inverts the pixels that are at least `value`."""
    x = tf.cast(image, tf.float32)
    is_inverted = tf.cast(x >= value, tf.float32)
    return tf.cast(x + is_inverted * (255.0 - 2.0 * x), tf.uint8)


def solarize_add(image, value):
    """Adds `value` to the pixels below 128."""
    x = tf.cast(image, tf.float32)
    added = tf.cast(x < 128.0, tf.float32) * tf.floor(value)
    return tf.cast(tf.minimum(x + added, 255.0), tf.uint8)


def brightness(image, value):
    """Multiplies each pixel by `value`."""
    return _blended(0.0, image, value)


def saturation(image, value):
    """Moves from grey (0) to the image (1) and beyond."""
    return _blended(grey(image, image.shape[-1]), image, value)


def contrast(image, value):
    """Moves from the mean of the grey image (0) to the image (1) and beyond."""
    mean = tf.reduce_mean(grey(image))
    return _blended(tf.floor(mean + 0.5), image, value)


def sharpness(image, value):
    """Moves from a smooth image (0) to the image (1) and beyond."""
    x = tf.cast(image, tf.float32)
    rows = x[:-2] + x[1:-1] + x[2:]
    sums = rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:]
    inside = tf.floor((sums + 4.0 * x[1:-1, 1:-1]) / 13.0 + 0.5)
    inside = tf.concat([x[1:-1, :1], inside, x[1:-1, -1:]], 1)
    return _blended(tf.concat([x[:1], inside, x[-1:]], 0), image, value)


def grey(image, channels=1):
    """Returns an image in grey, float32 `[height, width, channels]`."""
    x = tf.cast(image, tf.float32)
    if image.shape[-1] == 1:
        return x
    # A product of matrices is the fastest sum over channels. Its float32 is
    # exact: the largest sum is 255 * 2**16 < 2**24.
    sums = tf.linalg.matmul(x, tf.constant([[w] * channels for w in _GREY]))
    return tf.floor((sums + 2.0**15) / 2.0**16)


def _rows(image):
    """Returns an image as float32 `[height, width * channels]`.

    TensorFlow adds a vector to each row faster than to each pixel.
    """
    rows = tf.reshape(image, [image.shape[0], -1])
    return tf.cast(rows, tf.float32)


def _image(rows, image):
    """Returns the uint8 image that has the rounded values of `rows`."""
    x = tf.clip_by_value(tf.round(rows), 0.0, 255.0)
    return tf.reshape(tf.cast(x, tf.uint8), image.shape)


def _repeated(colour, image):
    """Returns the colour of one pixel as a row of `_rows`."""
    return tf.tile(colour, [image.shape[1]])


def _blended(other, image, value):
    """Returns `other + value (image - other)`, cut to 0 ... 255."""
    x = other + value * (tf.cast(image, tf.float32) - other)
    return tf.cast(tf.clip_by_value(x, 0.0, 255.0), tf.uint8)


def rotate(image, value, fill):
    """Rotates by `value` degrees about the centre, against the clock."""
    height, width, _ = image.shape
    angle = -value * math.pi / 180.0
    cos, sin = tf.cos(angle), tf.sin(angle)
    y, x = height / 2, width / 2
    return affine(
        image,
        [cos, sin, x - cos * x - sin * y, -sin, cos, y + sin * x - cos * y],
        fill,
    )


def shear_x(image, value, fill):
    """Moves each row by `value` times its distance from the top."""
    return affine(image, [1.0, value, 0.0, 0.0, 1.0, 0.0], fill)


def shear_y(image, value, fill):
    """Moves each column by `value` times its distance from the left."""
    return affine(image, [1.0, 0.0, 0.0, value, 1.0, 0.0], fill)


def translate_x(image, value, fill):
    """Moves the image to the left by `value` pixels."""
    return _translated(image, value, 1, fill)


def translate_y(image, value, fill):
    """Moves the image up by `value` pixels."""
    return _translated(image, value, 0, fill)


def _translated(image, value, axis, fill):
    """Moves the image against an axis by `value` pixels, bilinearly."""
    fill = _repeated(tf.constant(fill, tf.float32)[: image.shape[-1]], image)
    rows = _rows(image) - fill
    whole = tf.floor(value)
    share = value - whole
    shift = tf.cast(whole, tf.int32)
    before, after = tf.maximum(-shift, 0), tf.maximum(shift + 1, 0)
    pixel = image.shape[-1] if axis else 1
    pads = [[0, 0], [0, 0]]
    pads[axis] = [before * pixel, after * pixel]
    padded = tf.pad(rows, pads)

    def part(start):
        begin = [0, 0]
        begin[axis] = start * pixel
        return tf.slice(padded, begin, rows.shape)

    first = shift + before
    moved = (1.0 - share) * part(first) + share * part(first + 1)
    return _image(moved + fill, image)


def affine(image, matrix, fill):
    """Samples an image at the places of a matrix, bilinearly.

    Args:
        image: uint8 `[height, width, channels]`.
        matrix: Six numbers a, b, c, d, e, f. The pixel with the centre (x, y)
            is the one at (a x + b y + c, d x + e y + f), as in Pillow.
        fill: Colour outside of the image, one number or one a channel.

    Returns:
        uint8 of the same shape.
    """
    a, b, c, d, e, f = matrix
    # TensorFlow counts places from the centre of the first pixel.
    c, f = c + (a + b - 1.0) / 2.0, f + (d + e - 1.0) / 2.0
    fill = tf.constant(fill, tf.float32)[: image.shape[-1]]
    fill = _repeated(fill, image)
    rows = _rows(image) - fill
    moved = tf.raw_ops.ImageProjectiveTransformV3(
        images=tf.reshape(rows, (1, *image.shape)),
        transforms=[tf.stack([a, b, c, d, e, f, 0.0, 0.0])],
        output_shape=image.shape[:2],
        interpolation="BILINEAR",
        fill_mode="CONSTANT",
        fill_value=0.0,
    )
    return _image(tf.reshape(moved, rows.shape) + fill, image)


# --- Policies -----------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Choice:
    """An operation of a policy, with its range.

    Args:
        apply: The operation.
        value: Function from a magnitude of 0 to 1 and the side of the image in
            pixels to the number of the operation.
        is_signed: Whether the magnitude is negated with probability 1/2.
        is_geometric: Whether the operation needs the colour outside.
    """

    apply: Callable
    value: Callable = lambda magnitude, side: magnitude
    is_signed: bool = False
    is_geometric: bool = False


@dataclasses.dataclass(frozen=True)
class Policy:
    """Random operations, one after the other: a row of `POLICIES`.

    Args:
        choices: The operations; each is as likely as the others.
        count: Number of operations.
        magnitude: Mean of the magnitude; None for a uniform one of 31.
        deviation: Standard deviation of the magnitude.
        probability: Probability with which a drawn operation is applied.
        fill: Colour outside of a moved image.
    """

    choices: tuple[Choice, ...]
    count: int
    magnitude: float | None = None
    deviation: float = 0.0
    probability: float = 1.0
    fill: tuple[float, ...] = (0.0, 0.0, 0.0)

    def __call__(self, image, key):
        """Returns the image after the operations that a key draws.

        Args:
            image: uint8 `[height, width, channels]`, of a known shape.
            key: int64 `[2]`, the key of the random numbers.
        """
        uniform = tf.random.stateless_uniform([self.count, 4], key)
        # From another key: from the same one, the normal numbers would be a
        # function of the uniform ones, and so of the operation.
        normal = tf.random.stateless_normal(
            [self.count], tf.random.experimental.stateless_fold_in(key, 1)
        )
        for i in range(self.count):
            place, size, sign, is_applied = tf.unstack(uniform[i])
            if self.magnitude is None:
                size = tf.floor(size * _BINS) / (_BINS - 1)
            else:
                size = self.magnitude + self.deviation * normal[i]
                size = tf.clip_by_value(size, 0.0, 1.0)
            index = tf.cast(place * len(self.choices), tf.int32)
            sign = tf.where(sign < 0.5, -1.0, 1.0)
            if self.probability < 1:
                index = tf.where(
                    is_applied < self.probability, index, len(self.choices)
                )
            image = self.applied(image, index, size, sign)
        return image

    def applied(self, image, index, magnitude, sign):
        """Returns the image after the operation of an index.

        Args:
            image: uint8 `[height, width, channels]`, of a known shape.
            index: int32, place in `choices`; one more for no operation.
            magnitude: float32, 0 to 1.
            sign: float32, -1 or 1, for signed operations.
        """

        def branch(choice):
            size = magnitude * sign if choice.is_signed else magnitude
            value = choice.value(size, float(image.shape[0]))
            more = (self.fill,) if choice.is_geometric else ()
            return tf.ensure_shape(
                choice.apply(image, value, *more), image.shape
            )

        return tf.switch_case(
            index,
            [
                *(functools.partial(branch, choice) for choice in self.choices),
                lambda: image,
            ],
        )


def _to(limit):
    """Returns a range from 0 to a limit, or from minus the limit."""
    return lambda magnitude, side: limit * magnitude


def _whole(limit):
    """Returns a range of whole pixels up to a limit."""
    return lambda magnitude, side: tf.cast(
        tf.cast(limit * magnitude, tf.int32), tf.float32
    )


def _side(share):
    """Returns a range of pixels up to a share of the side."""
    return lambda magnitude, side: share * side * magnitude


def _factor(limit, least=0.0):
    """Returns a range of factors about 1."""
    return lambda magnitude, side: tf.maximum(least, 1.0 + limit * magnitude)


def _signed(apply, value):
    return Choice(apply, value, is_signed=True)


def _moved(apply, value):
    return Choice(apply, value, is_signed=True, is_geometric=True)


# Mueller and Hutter 2021, Table 6 (appendix), the wide space. Its authors'
# code, as torchvision's, keeps 8 to 2 bits and moves by whole pixels.
TRIVIAL_AUGMENT_WIDE = (
    Choice(identity),
    _moved(shear_x, _to(0.99)),
    _moved(shear_y, _to(0.99)),
    _moved(translate_x, _whole(32)),
    _moved(translate_y, _whole(32)),
    _moved(rotate, _to(135.0)),
    _signed(brightness, _factor(0.99)),
    _signed(saturation, _factor(0.99)),
    _signed(contrast, _factor(0.99)),
    _signed(sharpness, _factor(0.99)),
    Choice(posterize, lambda m, side: 8.0 - tf.round(6.0 * m)),
    Choice(solarize, lambda m, side: 255.0 * (1.0 - m)),
    Choice(auto_contrast),
    Choice(equalize),
)

# The space of timm's rand-m9-mstd0.5-inc1 and its kind, with which RSB was
# trained: operations that change more with the magnitude. Cubuk et al. 2020
# have Identity instead of SolarizeAdd and Invert.
RAND_AUGMENT_INCREASING = (
    Choice(auto_contrast),
    Choice(equalize),
    Choice(invert),
    _moved(rotate, _to(30.0)),
    Choice(posterize, lambda m, side: 4.0 - tf.floor(4.0 * m)),
    Choice(solarize, lambda m, side: 256.0 - tf.floor(256.0 * m)),
    Choice(solarize_add, lambda m, side: tf.floor(110.0 * m)),
    _signed(saturation, _factor(0.9, 0.1)),
    _signed(contrast, _factor(0.9, 0.1)),
    _signed(brightness, _factor(0.9, 0.1)),
    _signed(sharpness, _factor(0.9, 0.1)),
    _moved(shear_x, _to(0.3)),
    _moved(shear_y, _to(0.3)),
    _moved(translate_x, _side(0.45)),
    _moved(translate_y, _side(0.45)),
)


def _rand_augment(magnitude):
    """Returns timm's rand-mM-mstd0.5-inc1, with the mean colour of ImageNet."""
    return Policy(
        RAND_AUGMENT_INCREASING,
        count=2,
        magnitude=magnitude / 10,
        deviation=0.05,
        probability=0.5,
        fill=(124.0, 116.0, 104.0),
    )


POLICIES = {
    "none": None,
    # Mueller and Hutter 2021.
    "trivial_augment_wide": Policy(TRIVIAL_AUGMENT_WIDE, count=1),
    # Cubuk et al. 2020, as timm has it; RSB has 6 and 7 (Wightman et al. 2021).
    "rand_augment_6": _rand_augment(6),
    "rand_augment_7": _rand_augment(7),
    "rand_augment_9": _rand_augment(9),
}


def get_policy(name: str) -> Policy | None:
    """Returns the row of `POLICIES` with a name; None for `"none"`.

    Raises:
        ValueError: If the name is unknown; the error suggests near names.
    """
    if name in POLICIES:
        return POLICIES[name]
    raise ValueError(names.unknown("policy", name, POLICIES, count=3))
