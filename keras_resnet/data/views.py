"""Views of an image, of the network's size, and their normalization.

TensorFlow operations only, on one image or on views of one size.
"""

import dataclasses
import json

import numpy as np
import tensorflow as tf

from keras_resnet.data import decoding

# Departure: [1, Sec. 3.4] subtracts a per-pixel mean from photos. Here photos
# are normalized by the mean and standard deviation of each channel, as in
# torchvision and fb.resnet.torch. Weights can then be exchanged, and a network
# can be tested at any size.
PHOTO_SIZE = 224
_PHOTO_SHORTER_SIDE = 256
_PHOTO_MEAN = (0.485, 0.456, 0.406)
_PHOTO_STANDARD_DEVIATION = (0.229, 0.224, 0.225)

# Ways to resize an image, with the kernels of TensorFlow's
# `scale_and_translate`. Both equal those of Pillow.
INTERPOLATIONS = {"bilinear": "triangle", "bicubic": "keyscubic"}

# The views of a test image: see `DataSet.test_batches`.
PROTOCOLS = ("single", "ten_crop", "multi_scale")

# TensorFlow's kernels count the values of an image in 32 bits.
_LARGEST_SIZE = 2**14

# Largest ratio of the shorter side to the crop. The resized image of a larger
# one would take gigabytes of memory.
_LARGEST_RATIO = 16

# Shorter sides of the multi-scale test, in pixels, of a network for 224 x 224
# [1, Sec. 3.4].
_SCALES = (224, 256, 384, 480, 640)


@dataclasses.dataclass(frozen=True, eq=False)
class Preprocessing:
    """Makes the view of an image and normalizes it for a network.

    Normalization is `(x / 255 - mean) / standard_deviation`. Training,
    evaluation and the exported graph use the same TensorFlow operations.

    Args:
        image_size: Height and width of the network's input, in pixels.
        channels: 3 for colour, 1 for grey.
        shorter_side: Length of the shorter side in pixels, to which an image
            is resized before its centre is cropped. None to resize both sides
            to `image_size`.
        mean: `[channels]` or `[image_size, image_size, channels]`, of pixels
            in 0..1.
        standard_deviation: `[channels]`, or None for 1.
        exif: Whether an encoded image is turned as its EXIF orientation says.
        interpolation: A name in `INTERPOLATIONS`, for every resize. A smaller
            image is computed from all pixels of the larger one (antialiasing).

    Raises:
        ValueError: If an argument is out of range or contradicts another.

    >>> grey = Preprocessing(8, 1, None, mean=[0.2])
    >>> float(grey(tf.fill([1, 8, 8, 1], 51.0))[0, 0, 0, 0])
    0.0
    >>> Preprocessing.from_json(grey.to_json()).mean
    array([0.2], dtype=float32)
    """

    image_size: int
    channels: int
    shorter_side: int | None
    mean: np.ndarray
    standard_deviation: np.ndarray | None = None
    exif: bool = True
    interpolation: str = "bilinear"

    def __post_init__(self):
        if self.interpolation not in INTERPOLATIONS:
            raise ValueError(
                f"interpolation must be one of {', '.join(INTERPOLATIONS)}, "
                f"received {self.interpolation!r}"
            )
        for name in ("mean", "standard_deviation"):
            if getattr(self, name) is not None or name == "mean":
                value = _numbers(name, getattr(self, name))
                object.__setattr__(self, name, value)
        for name in ("image_size", "shorter_side"):
            value = getattr(self, name)
            if not isinstance(value, int | float | None):
                raise ValueError(f"{name} must be a number, received {value!r}")
        if self.channels not in (1, 3):
            raise ValueError(
                f"channels must be 1 or 3, received {self.channels}"
            )
        if not 1 <= self.image_size <= _LARGEST_SIZE:
            raise ValueError(
                f"image_size must be 1 to {_LARGEST_SIZE}, received "
                f"{self.image_size}"
            )
        if self.shorter_side is not None and not (
            self.image_size
            <= self.shorter_side
            <= _LARGEST_RATIO * self.image_size
        ):
            raise ValueError(
                f"shorter_side must be 1 to {_LARGEST_RATIO} times image_size "
                f"({self.image_size}), received {self.shorter_side}"
            )
        if self.mean.shape not in ((self.channels,), self.image_shape):
            raise ValueError(
                f"mean must have the shape {(self.channels,)} or "
                f"{self.image_shape}, received {self.mean.shape}"
            )
        deviation = self.standard_deviation
        if deviation is not None and not (
            deviation.shape == (self.channels,) and np.all(deviation > 0)
        ):
            raise ValueError(
                f"standard_deviation must be {self.channels} numbers above 0, "
                f"received {deviation.tolist()}"
            )

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """`(height, width, channels)` of the network's input."""
        return (self.image_size, self.image_size, self.channels)

    @property
    def is_cropped(self) -> bool:
        """Whether a view is a crop of the resized image, as of photos."""
        return self.shorter_side is not None

    def of_size(self, image_size: int) -> "Preprocessing":
        """Returns the normalization with another size of the input.

        Raises:
            ValueError: If each pixel has a mean of its own.
        """
        if self.mean.shape != (self.channels,):
            raise ValueError(
                "the images of a set of one size are trained at that size, "
                f"{self.image_size}; received {image_size}"
            )
        shorter_side = self.shorter_side and max(self.shorter_side, image_size)
        return dataclasses.replace(
            self, image_size=image_size, shorter_side=shorter_side
        )

    @property
    def is_identity(self) -> bool:
        """Whether normalization leaves the pixels unchanged, 0 to 255."""
        deviation = self.standard_deviation
        return (
            deviation is not None
            and not self.mean.any()
            and bool(np.all(deviation == np.float32(1 / 255)))
        )

    def __call__(self, images):
        """Normalizes views.

        Args:
            images: `[..., image_size, image_size, channels]`, 0..255. Other
                sizes are allowed if `mean` has the shape `[channels]`.

        Returns:
            float32 tensor of the same shape.
        """
        images = tf.cast(images, tf.float32)
        if self.is_identity:  # without a rounding
            return images
        width = images.shape[-2]

        def rows(numbers):
            # Broadcasting a whole row is four times as fast as 3 numbers.
            if numbers.ndim == 3 or width is None:
                return numbers
            return np.broadcast_to(numbers, (width, self.channels))

        images = images / 255.0 - rows(self.mean)
        if self.standard_deviation is not None:
            images /= rows(self.standard_deviation)
        return images

    def view(self, image):
        """Returns the single test view of an image.

        Args:
            image: uint8 `[height, width, c]`; c is 1 or 2 (grey, alpha) or 3
                or 4 (red, green, blue, alpha). Alpha is dropped.

        Returns:
            uint8 tensor `[image_size, image_size, channels]`.
        """
        image = tf.convert_to_tensor(image)
        size = self.image_size
        if self.shorter_side is None:
            view = _resize_to(image, size, self.interpolation)
        else:
            view = _resized_centre(
                image, self.shorter_side, size, self.interpolation
            )
        view = decoding.with_channels(view, self.channels)
        return tf.ensure_shape(view, self.image_shape)

    def views(self, image, protocol: str):
        """Returns the test views of an image.

        Args:
            image: uint8 image, as in `view`. Protocols other than `"single"`
                require a `shorter_side`.
            protocol: One of `PROTOCOLS`.

        Returns:
            uint8: `"single"` `[image_size, image_size, channels]`,
            `"ten_crop"` `[10, image_size, image_size, channels]`,
            `"multi_scale"` one `[height, width, channels]` for each scale.
        """
        if protocol == "single":
            return self.view(image)
        image = decoding.with_channels(
            tf.convert_to_tensor(image), self.channels
        )
        shape = tf.shape(image)[:2]

        def resized(shorter_side):
            sides = shorter_side * shape // tf.reduce_min(shape)
            view = resize(image, sides, interpolation=self.interpolation)
            return tf.ensure_shape(view, [None, None, self.channels])

        if protocol == "multi_scale":
            return tuple(map(resized, scaled(self.image_size)))
        return _ten_crops(resized(self.shorter_side), self.image_size)

    def decode(self, image_bytes):
        """Decodes an image, and returns its single test view.

        The size of the image is unlimited. `serving.isolation` limits it in
        an exported graph, and the pipelines in training and evaluation.

        Args:
            image_bytes: string scalar: JPEG, PNG of 8 or 16 bits, GIF (its
                first frame), BMP or WebP without animation.

        Returns:
            uint8 tensor `[image_size, image_size, channels]`.
        """
        return self.view(decoding.decode(image_bytes, self.exif))

    def to_json(self) -> str:
        """Returns a JSON object, from which `from_json` makes the same bits."""
        fields = {
            name: value.tolist() if isinstance(value, np.ndarray) else value
            for name, value in vars(self).items()
        }
        return json.dumps(fields)

    @classmethod
    def from_json(cls, text: str) -> "Preprocessing":
        """Returns the preprocessing that `to_json` wrote."""
        return cls(**json.loads(text))


def _numbers(name, value):
    """Returns a field as float32 numbers."""
    try:
        with np.errstate(over="ignore"):
            return np.array(value, np.float32)
    except (TypeError, ValueError, OverflowError) as error:
        text = repr(value)
        raise ValueError(
            f"{name} must be numbers, received "
            f"{text if len(text) <= 100 else f'{text[:100]}...'}"
        ) from error


def photo_preprocessing(
    image_size: int, channels: int = 3, resizes_whole: bool = False
) -> Preprocessing:
    """Returns the preprocessing of photos, with ImageNet's statistics.

    Args:
        image_size: Height and width of the network's input.
        channels: 3 for colour, 1 for grey.
        resizes_whole: Whether an image is resized whole. Else its shorter side
            is resized to 8/7 of `image_size` (256 for 224), and its centre is
            cropped.
    """
    mean, deviation = map(np.array, (_PHOTO_MEAN, _PHOTO_STANDARD_DEVIATION))
    if channels == 1:
        mean, deviation = (np.mean(a, keepdims=True) for a in (mean, deviation))
    shorter_side = round(image_size * _PHOTO_SHORTER_SIDE / PHOTO_SIZE)
    return Preprocessing(
        image_size,
        channels,
        None if resizes_whole else shorter_side,
        mean,
        deviation,
    )


def resize(image, sides, antialias=True, interpolation="bilinear"):
    """Resizes with antialiasing, as Pillow does, to uint8.

    Pillow resizes the width first, and rounds after each axis. A bicubic curve
    leaves 0 to 255 there, so that rounding once would differ.
    """

    def resized(image, sides):
        return _rounded(
            tf.image.resize(image, sides, interpolation, antialias=antialias)
        )

    if interpolation == "bicubic":
        image = resized(image, [tf.shape(image)[-3], sides[1]])
    return resized(image, sides)


def _rounded(image):
    """Rounds to uint8; a bicubic curve may leave 0 to 255."""
    return tf.cast(tf.clip_by_value(image, 0.0, 255.0) + 0.5, tf.uint8)


def _resize_to(image, size, interpolation):
    """Resizes an image to `[size, size, c]`, also a very wide one.

    TensorFlow resizes the height first, into floats of the whole width. A wide
    image is transposed, so that it needs little memory.
    """
    height, width = tf.unstack(tf.shape(image, tf.int64)[:2])

    def resized(image):
        return resize(image, [size, size], interpolation=interpolation)

    def of_transposed():
        turned = tf.transpose(image, [1, 0, 2])
        return tf.transpose(resized(turned), [1, 0, 2])

    return tf.cond(width > 16 * height, of_transposed, lambda: resized(image))


def centre(rest):
    """Returns the first pixel of a central crop.

    Half of the rest is rounded to an even number, as by torchvision and timm.

    >>> [centre(rest) for rest in (2, 3, 4, 5)]
    [1, 2, 2, 2]
    """
    return rest // 2 + (rest % 2) * (rest // 2 % 2)


def _resized_centre(image, shorter_side, size, interpolation):
    """Resizes an image to a shorter side, and crops `[size, size, c]`.

    Only the pixels of the crop are resized. The whole of a strip of
    4 x 2,000,000 pixels would need gigabytes.
    """
    sides = tf.shape(image, tf.int64)[:2]
    resized = shorter_side * sides // tf.reduce_min(sides)
    scale = tf.cast(resized, tf.float64) / tf.cast(sides, tf.float64)
    start = centre(resized - size)
    # A resized pixel depends on the pixels within a distance of one pixel, or
    # two for bicubic, in the pixels of the larger image.
    radius = 1.0 if interpolation == "bilinear" else 2.0
    reach = radius * tf.maximum(1.0 / scale, 1.0) + 1.0
    first = tf.maximum(
        tf.cast(tf.cast(start, tf.float64) / scale - reach, tf.int64), 0
    )
    last = tf.cast(tf.cast(start + size, tf.float64) / scale + reach, tf.int64)
    window = image[first[0] : last[0], first[1] : last[1]]
    before = tf.cast(first, tf.float64) * scale - tf.cast(start, tf.float64)
    scale = tf.cast(scale, tf.float32)
    before = tf.cast(before, tf.float32)

    def resized(image, size, scale, before):
        view = tf.raw_ops.ScaleAndTranslate(
            images=image[None],
            size=size,
            scale=scale,
            translation=before,
            kernel_type=INTERPOLATIONS[interpolation],
            antialias=True,
        )
        return _rounded(view[0])

    if interpolation == "bicubic":  # one axis at a time, as in `resize`
        window = resized(
            window,
            [tf.shape(window)[0], size],
            tf.stack([1.0, scale[1]]),
            tf.stack([0.0, before[1]]),
        )
        scale = tf.stack([scale[0], 1.0])
        before = tf.stack([before[0], 0.0])
    return resized(window, [size, size], scale, before)


def scaled(image_size):
    """Returns the shorter sides of the multi-scale test of a network."""
    return [round(image_size * scale / _SCALES[0]) for scale in _SCALES]


def _ten_crops(image, size):
    """Crops `[..., h, w, c]` to `[..., 10, size, size, c]`.

    The crops are the four corners and the centre, then their mirror images.
    """
    height, width = tf.unstack(tf.shape(image)[-3:-1])
    bottom, right = height - size, width - size
    places = [
        (0, 0),
        (0, right),
        (bottom, 0),
        (bottom, right),
        (centre(bottom), centre(right)),
    ]
    crops = [
        image[..., top : top + size, left : left + size, :]
        for top, left in places
    ]
    crops = tf.stack(crops, axis=-4)
    crops = tf.concat([crops, crops[..., ::-1, :]], axis=-4)
    shape = [*image.shape[:-3], 10, size, size, image.shape[-1]]
    return tf.ensure_shape(crops, shape)


def padded_crops(images):
    """Returns ten crops of `[batch, size, size, c]`, padded with zeros."""
    size = images.shape[1]
    around = [size // 8] * 2
    return _ten_crops(tf.pad(images, [[0, 0], around, around, [0, 0]]), size)
