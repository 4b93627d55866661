"""Random windows, flips and colours of training images, and mixed images.

The rows of `CROPS` are those of [1, Sec. 3.4 and 4.2] and [2]. The other fields
of an `Augmentation` are later ideas, each with its paper. All of them are
functions of an image, or of a batch, and of a key of random numbers.
"""

import dataclasses
import math
from collections.abc import Callable

import tensorflow as tf

from keras_resnet import names
from keras_resnet.data import decoding
from keras_resnet.data import operations
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
class Crop:
    """A random view of a training image: a row of `CROPS`.

    Attributes:
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


CROPS = {
    # The test view.
    "none": Crop(),
    # As pad_crop_flip, without flips: for digits, letters and signs.
    "pad_crop": Crop(pads=True),
    # CIFAR, [1, Sec. 4.2]: the mean is subtracted, an eighth of the side of
    # zeros (4 pixels of 32) is added on each side, the size is cropped back.
    "pad_crop_flip": Crop(pads=True, flips=True),
    # ImageNet, [1, Sec. 3.4].
    "scale_jitter": Crop(scale_jitter, flips=True, shifts_colour=True),
    # ImageNet, [2], and most recipes since.
    "scale_aspect": Crop(scale_aspect, flips=True),
}


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """Random changes to training images.

    Attributes:
        name: How an image is cropped, mirrored and coloured: a row of `CROPS`.
        policy: Name of random operations on an image (`operations.POLICIES`).
        colour_jitter: Largest change of brightness, contrast and saturation:
            the factors are uniform in `1 - colour_jitter ... 1 +
            colour_jitter` (Howard 2013, with the ranges of torchvision).
        erase_probability: Probability that a rectangle of an image becomes
            zero (Zhong et al. 2020).
        cutout_size: Side in pixels of a square that becomes zero in each
            image (DeVries and Taylor 2017).
        mixup_alpha: Images are mixed in pairs, with a share from the
            distribution Beta(mixup_alpha, mixup_alpha) for each batch (Zhang
            et al. 2018). 0 turns it off.
        cutmix_alpha: A rectangle of each image is cut from the other one of
            its pair (Yun et al. 2019). 0 turns it off. With both kinds of
            mixing, each batch has one of them, with probability 1/2.
        repeats: Number of views of an image in a batch (Hoffer et al. 2020).
        train_image_size: Height and width of the training images in pixels
            (Touvron et al. 2019). None is the size of the test images.
    """

    name: str = "none"
    policy: str = "none"
    colour_jitter: float = 0.0
    erase_probability: float = 0.0
    cutout_size: int = 0
    mixup_alpha: float = 0.0
    cutmix_alpha: float = 0.0
    repeats: int = 1
    train_image_size: int | None = None

    def __post_init__(self):
        if self.name not in CROPS:
            raise ValueError(
                names.unknown("augmentation", self.name, CROPS, count=3)
            )
        operations.get_policy(self.policy)
        for name, most in (("colour_jitter", 1), ("erase_probability", 1)):
            if not 0 <= getattr(self, name) <= most:
                raise ValueError(
                    f"{name} must be in [0, {most}], received "
                    f"{getattr(self, name)}"
                )
        for name in ("mixup_alpha", "cutmix_alpha", "cutout_size"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(
                    f"{name} must be finite and at least 0, received "
                    f"{getattr(self, name)}"
                )
        for name in ("repeats", "train_image_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, received {value}")

    @property
    def crop(self) -> Crop:
        """The row of `CROPS` with this name."""
        return CROPS[self.name]

    @property
    def changes_single_images(self) -> bool:
        """Whether images are changed one by one, not as a batch."""
        return (
            self.crop.window is not None
            or self.policy != "none"
            or self.colour_jitter > 0
        )

    @property
    def mixes(self) -> bool:
        """Whether the images of a batch are mixed in pairs."""
        return self.mixup_alpha > 0 or self.cutmix_alpha > 0


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


def random_view(preprocessing, crop, image, key, exif=False):
    """Decodes a random window of an image, and resizes and mirrors it.

    Args:
        preprocessing: A `views.Preprocessing`.
        crop: A `Crop` with a window.
        image: string scalar, or uint8 `[height, width, c]`.
        key: int64 `[2]`, the key of the random numbers.
        exif: Whether the image is turned as its EXIF orientation says.

    Returns:
        uint8 `[image_size, image_size, channels]`.
    """
    random = tf.random.stateless_uniform([33], key)
    image = decoding.decode_window(
        image,
        lambda height, width: crop.window(height, width, random[1:]),
        preprocessing.channels,
        exif,
    )
    size = preprocessing.image_size

    def resized(antialias):
        return views.resize(
            image, [size, size], antialias, preprocessing.interpolation
        )

    # Down to a half of the size, resizing reads every pixel without
    # antialiasing, in a quarter of the time.
    image = tf.cond(
        tf.reduce_max(tf.shape(image)) <= 2 * size,
        lambda: resized(antialias=False),
        lambda: resized(antialias=True),
    )
    if crop.flips:
        # A slice with a negative stride takes six times as long.
        image = tf.cond(
            random[0] < 0.5, lambda: tf.reverse(image, [1]), lambda: image
        )
    return tf.ensure_shape(image, preprocessing.image_shape)


def changed_view(augmentation, view, key):
    """Applies the policy and the colour jitter to the view of an image.

    Args:
        augmentation: An `Augmentation`.
        view: uint8 `[height, width, channels]`.
        key: int64 `[2]`, the key of the random numbers of the window.

    Returns:
        uint8 of the same shape.
    """
    policy = operations.get_policy(augmentation.policy)
    if policy is not None:
        view = policy(view, _fold_in(key, 1))
    if augmentation.colour_jitter:
        random = tf.random.stateless_uniform([3], _fold_in(key, 2))
        factors = 1.0 + augmentation.colour_jitter * (2.0 * random - 1.0)
        view = operations.brightness(view, factors[0])
        view = operations.contrast(view, factors[1])
        view = operations.saturation(view, factors[2])
    return view


def erase(images, random, probability=1.0):
    """Sets a rectangle of some images to zero (Zhong et al. 2020).

    The area is uniform in 2% ... 33% of the image, and the logarithm of the
    aspect ratio is uniform between 0.3 and 3.3, as in torchvision. The
    rectangle is the first of ten draws that fits into the image.

    Args:
        images: `[batch, height, width, channels]`, normalized.
        random: `[batch, 23]` uniform numbers of [0, 1).
        probability: Probability with which an image has a rectangle.

    Returns:
        A tensor of the shape of `images`.
    """
    _, height, width, _ = images.shape
    area = height * width * (0.02 + (0.33 - 0.02) * random[:, :10])
    low, high = math.log(0.3), math.log(3.3)
    aspect = tf.exp(low + (high - low) * random[:, 10:20])
    heights = tf.cast(tf.round(tf.sqrt(area * aspect)), tf.int32)
    widths = tf.cast(tf.round(tf.sqrt(area / aspect)), tf.int32)
    fits = (heights < height) & (widths < width)
    first = tf.argmax(fits, axis=1)
    fits = tf.reduce_any(fits, axis=1) & (random[:, 22] < probability)
    fits = tf.cast(fits, tf.int32)
    rows, columns = (
        tf.gather(sides, first, batch_dims=1) * fits
        for sides in (heights, widths)
    )
    top = integer(random[:, 20], height - rows + 1)
    left = integer(random[:, 21], width - columns + 1)
    return _without(images, top, left, top + rows, left + columns)


def cutout(images, size, random):
    """Sets a square of each image to zero (DeVries and Taylor 2017).

    The centre is anywhere in the image, so a part of the square may be
    outside.

    Args:
        images: `[batch, height, width, channels]`, normalized.
        size: Side of the square in pixels.
        random: `[batch, 2]` uniform numbers of [0, 1).

    Returns:
        A tensor of the shape of `images`.
    """
    _, height, width, _ = images.shape
    top = integer(random[:, 0], height) - size // 2
    left = integer(random[:, 1], width) - size // 2
    return _without(images, top, left, top + size, left + size)


def _without(images, top, left, bottom, right):
    """Sets rectangles, one of each image, to zero."""
    _, height, width, channels = images.shape
    y, x = tf.range(height), tf.repeat(tf.range(width), channels)
    row = (top[:, None] <= y) & (y < bottom[:, None])
    column = (left[:, None] <= x) & (x < right[:, None])
    # Whole rows: broadcasting over the channels takes several times as long.
    outside = tf.cast(~(row[:, :, None] & column[:, None, :]), images.dtype)
    return images * tf.reshape(outside, tf.shape(images))


def mix(augmentation, images, labels, key):
    """Mixes the images of a batch in pairs: the first two, the next two, ...

    mixup returns `share x + (1 - share) x'` for an image x and the other one
    x' of its pair (Zhang et al. 2018). CutMix returns x with a rectangle of
    x', whose sides are `sqrt(1 - share)` of the image's. Its centre is
    anywhere, and the share becomes that of the area that is left (Yun et al.
    2019). All images of a batch have the same share and the same rectangle.

    Args:
        augmentation: An `Augmentation` that mixes.
        images: float32 `[batch, height, width, channels]`, `batch` even.
        labels: int32 `[batch]`.
        key: int64 `[2]`, the key of the random numbers of the batch.

    Returns:
        The images, and the labels `(labels, others, shares)`: the label of an
        image, that of the other one, and the share of the first, float32
        `[batch]`.
    """
    others, other_labels = _swapped(images), _swapped(labels)
    kinds = []
    if augmentation.mixup_alpha:
        kinds.append(lambda: _mixup(augmentation, images, others, key))
    if augmentation.cutmix_alpha:
        kinds.append(lambda: _cutmix(augmentation, images, others, key))
    choice = tf.random.stateless_uniform([], _fold_in(key, 1))
    if len(kinds) == 1:
        images, share = kinds[0]()
    else:
        images, share = tf.cond(choice < 0.5, *kinds)
    return images, (labels, other_labels, tf.fill(tf.shape(labels), share))


def _mixup(augmentation, images, others, key):
    share = beta(augmentation.mixup_alpha, _fold_in(key, 2))
    return others + share * (images - others), share


def _cutmix(augmentation, images, others, key):
    _, height, width, channels = images.shape
    share = beta(augmentation.cutmix_alpha, _fold_in(key, 3))
    random = tf.random.stateless_uniform([2], _fold_in(key, 4))

    def span(side, random):
        half = tf.cast(0.5 * tf.sqrt(1.0 - share) * side, tf.int32)
        centre = integer(random, side)
        first, last = tf.maximum(centre - half, 0), centre + half
        places = tf.range(side)
        return (first <= places) & (places < last)

    rows, columns = span(height, random[0]), span(width, random[1])
    inside = rows[:, None] & columns
    left = 1.0 - tf.reduce_mean(tf.cast(inside, tf.float32))
    # Whole rows, as in `_without`.
    is_other = tf.cast(tf.repeat(inside, channels, axis=1), images.dtype)
    mixed, others = (
        tf.reshape(x, [-1, height, width * channels]) for x in (images, others)
    )
    mixed = mixed * (1.0 - is_other) + others * is_other
    return tf.reshape(mixed, tf.shape(images)), left


def beta(alpha, key):
    """Returns a number of the distribution Beta(alpha, alpha), float32."""
    # In 64 bits: for a small alpha both may be too small for 32.
    first, second = tf.unstack(
        tf.random.stateless_gamma([2], key, alpha, dtype=tf.float64)
    )
    return tf.cast(first / (first + second), tf.float32)


def _swapped(batch):
    """Swaps the two elements of each pair of a batch."""
    pairs = tf.reshape(batch, [-1, 2, *batch.shape[1:]])
    return tf.reshape(tf.reverse(pairs, [1]), tf.shape(batch))


def _fold_in(key, number):
    """Returns the key of another sequence of random numbers."""
    return tf.random.experimental.stateless_fold_in(key, number)


def integer(random, count):
    """Returns integers of 0 ... count - 1 from uniform numbers of [0, 1)."""
    return tf.cast(random * tf.cast(count, tf.float32), tf.int32)


def _placed(height, width, full_height, full_width, random):
    """Places a window of a size anywhere in the image: int32 `[4]`."""
    top = integer(random[0], full_height - height + 1)
    left = integer(random[1], full_width - width + 1)
    return tf.stack([top, left, height, width])
