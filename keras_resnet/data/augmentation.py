"""Random windows, flips and colours of training images.

The augmentations are those of [1, Sec. 3.4 and 4.2] and [2]: see
`AUGMENTATIONS`.
"""

import dataclasses
from collections.abc import Callable

import tensorflow as tf

from keras_resnet import names
from keras_resnet.data import decoding
from keras_resnet.data import views

# The principal components of the colours of ImageNet, [Krizhevsky et al. 2012,
# Sec. 4.1], for pixels of 0..1. The numbers are from fb.resnet.torch.
_COLOUR_SIGMA = 0.1
_COLOUR_EIGENVALUES = (0.2175, 0.0188, 0.0045)
_COLOUR_EIGENVECTORS = (
    (-0.5675, 0.7192, 0.4009),
    (-0.5808, -0.0045, -0.8140),
    (-0.5836, -0.6948, 0.4203),
)


def scale_jitter(height, width, random):
    """Draws the window of [1, Sec. 3.4], a square.

    The paper resizes the shorter side to s, an integer of 256 ... 480 drawn
    uniformly, and crops 224 x 224 anywhere. The window is that crop in the
    pixels of the original, whose side is 224 / s of the shorter side. Only the
    window has to be decoded.

    Args:
        height: int32 scalar, height of the original in pixels.
        width: int32 scalar, width of the original in pixels.
        random: At least 3 uniform numbers of [0, 1).

    Returns:
        int32 `[4]`: top, left, height, width of the window.
    """
    shorter = tf.cast(tf.minimum(height, width), tf.float32)
    scale = 256.0 + tf.floor(random[0] * (480 - 256 + 1))
    side = tf.cast(tf.round(shorter * 224.0 / scale), tf.int32)
    side = tf.maximum(side, 1)
    return _placed(side, side, height, width, random[1:3])


def scale_aspect(height, width, random):
    """Draws the window of scale and aspect ratio augmentation, as in [2].

    The area is uniform in 8% ... 100% of the image. The aspect ratio, or its
    inverse, is uniform in 3/4 ... 4/3. The window is the first of ten draws
    that fits into the image, or the largest square in the centre if none fits.
    This is RandomSizedCrop of fb.resnet.torch, which trained the ResNet-200
    of [2].

    Args:
        height: int32 scalar, height of the original in pixels.
        width: int32 scalar, width of the original in pixels.
        random: At least 32 uniform numbers of [0, 1).

    Returns:
        int32 `[4]`: top, left, height, width of the window.
    """
    area = tf.cast(height * width, tf.float32) * (0.08 + 0.92 * random[2:12])
    aspect = 3 / 4 + (4 / 3 - 3 / 4) * random[12:22]
    aspect = tf.where(random[22:32] < 0.5, aspect, 1.0 / aspect)
    heights = tf.cast(tf.round(tf.sqrt(area / aspect)), tf.int32)
    widths = tf.cast(tf.round(tf.sqrt(area * aspect)), tf.int32)
    heights, widths = tf.maximum(heights, 1), tf.maximum(widths, 1)
    fits = (heights <= height) & (widths <= width)
    first = tf.argmax(fits)
    shorter = tf.minimum(height, width)
    return tf.where(
        tf.reduce_any(fits),
        _placed(heights[first], widths[first], height, width, random[:2]),
        tf.stack(
            [(height - shorter) // 2, (width - shorter) // 2, shorter, shorter]
        ),
    )


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """Random changes to a training image: a row of `AUGMENTATIONS`.

    Args:
        window: `(height, width, random) -> [top, left, height, width]`: the
            window that is decoded and resized to the network's input. None
            for the test view.
        pads: Whether the view is padded and cropped back at a random place.
        flips: Whether half of the images are mirrored.
        shifts_colour: Whether colours are shifted along the principal
            components of the colours of ImageNet.
    """

    window: Callable | None = None
    pads: bool = False
    flips: bool = False
    shifts_colour: bool = False


AUGMENTATIONS = {
    # The test view.
    "none": Augmentation(),
    # As pad_crop_flip, without flips: for digits, letters and signs.
    "pad_crop": Augmentation(pads=True),
    # CIFAR, [1, Sec. 4.2]: the mean is subtracted, an eighth of the side of
    # zeros (4 pixels of 32) is added on each side, the size is cropped back.
    "pad_crop_flip": Augmentation(pads=True, flips=True),
    # ImageNet, [1, Sec. 3.4].
    "scale_jitter": Augmentation(scale_jitter, flips=True, shifts_colour=True),
    # ImageNet, [2], and most recipes since.
    "scale_aspect": Augmentation(scale_aspect, flips=True),
}


def get_augmentation(name: str) -> Augmentation:
    """Returns the row of `AUGMENTATIONS` with a name.

    Raises:
        ValueError: If the name is unknown; the error suggests near names.
    """
    if name in AUGMENTATIONS:
        return AUGMENTATIONS[name]
    raise ValueError(
        names.unknown("augmentation", name, AUGMENTATIONS, count=3)
    )


def pad_crop(images, top, left, is_flipped):
    """Pads images with zeros, crops them back, and mirrors some of them.

    Args:
        images: `[batch, height, width, channels]`, the mean subtracted.
        top: int32 `[batch]` in 0 ... 2 * (height // 8), the row of the padded
            image where the crop begins; height // 8 is the image itself.
        left: int32 `[batch]` in 0 ... 2 * (width // 8), the column where the
            crop begins.
        is_flipped: bool `[batch]`, whether an image is mirrored.

    Returns:
        A tensor of the shape of `images`.
    """
    _, height, width, channels = images.shape
    above, beside = height // 8, width // 8
    padded = tf.pad(images, [[0, 0], [above] * 2, [beside] * 2, [0, 0]])
    padded_width = width + 2 * beside
    row = top[:, None] + tf.range(height)
    column = tf.range(width)
    column = tf.where(is_flipped[:, None], width - 1 - column, column)
    column += left[:, None]
    # A gather of whole pixels was the fastest of three ways on one core:
    # gather 52,000 images/s, slices 38,000, ImageProjectiveTransform 33,000.
    pixel = row[:, :, None] * padded_width + column[:, None, :]
    pixels = tf.reshape(
        padded, [-1, (height + 2 * above) * padded_width, channels]
    )
    return tf.gather(pixels, pixel, batch_dims=1)


def colour_shift(normal):
    """Returns `E (alpha * eigenvalues)`, alpha = 0.1 `normal`, [1, Sec. 3.4].

    Args:
        normal: float32 `[batch, 3]`, standard normal numbers.

    Returns:
        float32 `[batch, 3]`: the shifts of red, green and blue in 0..1.
    """
    scaled = _COLOUR_SIGMA * normal * tf.constant(_COLOUR_EIGENVALUES)
    return tf.matmul(
        scaled, tf.constant(_COLOUR_EIGENVECTORS), transpose_b=True
    )


def random_view(preprocessing, row, image, key, exif=False):
    """Decodes a random window of an image, and resizes and mirrors it.

    Args:
        preprocessing: A `views.Preprocessing`.
        row: An `Augmentation` with a window.
        image: string scalar, or uint8 `[height, width, c]`.
        key: int64 `[2]`, the key of the random numbers.
        exif: Whether the image is turned as its EXIF orientation says.

    Returns:
        uint8 `[image_size, image_size, channels]`.
    """
    random = tf.random.stateless_uniform([33], key)
    image = decoding.decode_window(
        image,
        lambda height, width: row.window(height, width, random[1:]),
        preprocessing.channels,
        exif,
    )
    size = preprocessing.image_size
    # Down to a half of the size, bilinear resizing reads every pixel without
    # antialiasing, in a quarter of the time.
    image = tf.cond(
        tf.reduce_max(tf.shape(image)) <= 2 * size,
        lambda: views.resize(image, [size, size], antialias=False),
        lambda: views.resize(image, [size, size]),
    )
    if row.flips:
        # A slice with a negative stride takes six times as long.
        image = tf.cond(
            random[0] < 0.5, lambda: tf.reverse(image, [1]), lambda: image
        )
    return tf.ensure_shape(image, preprocessing.image_shape)


def integer(random, count):
    """Returns integers of 0 ... count - 1 from uniform numbers of [0, 1)."""
    return tf.cast(random * tf.cast(count, tf.float32), tf.int32)


def _placed(height, width, full_height, full_width, random):
    """Places a window of a size anywhere in the image: int32 `[4]`."""
    top = integer(random[0], full_height - height + 1)
    left = integer(random[1], full_width - width + 1)
    return tf.stack([top, left, height, width])
