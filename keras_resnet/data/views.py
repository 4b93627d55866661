"""What a network sees of an image: its views, and their normalization.

TensorFlow operations only, on one image or on views of one size.
"""

import dataclasses
import functools
import json

import numpy as np
import tensorflow as tf

# Departure: [1, Sec. 3.4] subtracts a per-pixel mean from photos; here they
# have the mean and standard deviation of each channel, as in torchvision and
# fb.resnet.torch, so that weights can be exchanged and any size be tested.
PHOTO_SIZE = 224
_PHOTO_SHORTER_SIDE = 256
_PHOTO_MEAN = (0.485, 0.456, 0.406)
_PHOTO_STANDARD_DEVIATION = (0.229, 0.224, 0.225)

# What a network is shown of a test image: see `DataSet.test_batches`.
PROTOCOLS = ("single", "ten_crop", "multi_scale")

# TensorFlow's kernels count the values of an image in 32 bits.
_LARGEST_SIZE = 2**14

# Shorter sides of the multi-scale test, in pixels, of a network for 224 x 224
# [1, Sec. 3.4].
_SCALES = (224, 256, 384, 480, 640)


@dataclasses.dataclass(frozen=True, eq=False)
class Preprocessing:
    """`(x / 255 - mean) / standard_deviation`, on one view of an image.

    It stands between an image and the network, in training, in evaluation and
    in the exported graph: TensorFlow operations only.

    Args:
        image_size: Height and width of the network's input, in pixels.
        channels: 3 for colour, 1 for grey.
        shorter_side: To how many pixels the shorter side of an image is
            resized before its centre is cropped. None: both sides are resized
            to `image_size`.
        mean: `[channels]` or `[image_size, image_size, channels]`, of pixels
            in 0..1.
        standard_deviation: `[channels]` or None.

    Raises:
        ValueError: If these do not fit together.

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

    def __post_init__(self):
        for name in ("mean", "standard_deviation"):
            if getattr(self, name) is not None:
                value = np.array(getattr(self, name), np.float32)
                object.__setattr__(self, name, value)
        if self.channels not in (1, 3):
            raise ValueError(
                f"channels must be 1 or 3, received {self.channels}"
            )
        if not 1 <= self.image_size <= _LARGEST_SIZE:
            raise ValueError(
                f"image_size must be 1 to {_LARGEST_SIZE}, received "
                f"{self.image_size}"
            )
        if self.shorter_side and self.shorter_side < self.image_size:
            raise ValueError(
                f"shorter_side must be at least image_size ({self.image_size})"
                f", received {self.shorter_side}"
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
    def is_identity(self) -> bool:
        """Whether the network sees the pixels as they are, 0 to 255."""
        deviation = self.standard_deviation
        return (
            deviation is not None
            and not self.mean.any()
            and bool(np.all(deviation == np.float32(1 / 255)))
        )

    def __call__(self, images):
        """What the network sees of views.

        Args:
            images: `[..., image_size, image_size, channels]`, 0..255; of any
                size if there is no mean for each pixel.

        Returns:
            float32 tensor of the same shape.
        """
        images = tf.cast(images, tf.float32)
        if self.is_identity:  # without a rounding
            return images
        width = images.shape[-2]

        def rows(numbers):
            # TensorFlow repeats 3 numbers four times as slowly as a whole row.
            if numbers.ndim == 3 or width is None:
                return numbers
            return np.broadcast_to(numbers, (width, self.channels))

        images = images / 255.0 - rows(self.mean)
        if self.standard_deviation is not None:
            images /= rows(self.standard_deviation)
        return images

    def view(self, image):
        """The single test view of an image.

        Args:
            image: uint8 `[height, width, c]`; c is 1 or 2 (grey, alpha) or 3
                or 4 (red, green, blue, alpha). Alpha is dropped.

        Returns:
            uint8 tensor `[image_size, image_size, channels]`.
        """
        image = tf.convert_to_tensor(image)
        size = self.image_size
        if self.shorter_side is None:
            view = _resize_to(image, size)
        else:
            view = _resized_centre(image, self.shorter_side, size)
        view = _with_channels(view, self.channels)
        return tf.ensure_shape(view, self.image_shape)

    def views(self, image, protocol: str):
        """The test views of a photo, of which `view` is the single one.

        Args:
            image: As in `view`; there is a `shorter_side`.
            protocol: One of `PROTOCOLS`.

        Returns:
            uint8: `"single"` `[image_size, image_size, channels]`,
            `"ten_crop"` `[10, image_size, image_size, channels]`,
            `"multi_scale"` one `[height, width, channels]` for each scale.
        """
        if protocol == "single":
            return self.view(image)
        image = _with_channels(tf.convert_to_tensor(image), self.channels)
        shape = tf.shape(image)[:2]

        def resized(shorter_side):
            sides = shorter_side * shape // tf.reduce_min(shape)
            view = resize(image, sides)
            return tf.ensure_shape(view, [None, None, self.channels])

        if protocol == "multi_scale":
            return tuple(map(resized, scaled(self.image_size)))
        return _ten_crops(resized(self.shorter_side), self.image_size)

    def decode(self, image_bytes):
        """The test view of an encoded image.

        Args:
            image_bytes: string scalar: JPEG, PNG (16 bits too), GIF (its
                first frame), BMP or WebP (no animation).

        Returns:
            uint8 tensor `[image_size, image_size, channels]`.
        """
        return self.view(decode(image_bytes))

    def to_json(self) -> str:
        """One JSON object, from which `from_json` makes the same bits."""
        fields = {
            name: value.tolist() if isinstance(value, np.ndarray) else value
            for name, value in vars(self).items()
        }
        return json.dumps(fields)

    @classmethod
    def from_json(cls, text: str) -> "Preprocessing":
        """The inverse of `to_json`."""
        return cls(**json.loads(text))


def photo_preprocessing(
    image_size: int, channels: int = 3, resizes_whole: bool = False
) -> Preprocessing:
    """That of photos, with the mean and standard deviation of ImageNet.

    Args:
        image_size: Height and width of the network's input.
        channels: 3 for colour, 1 for grey.
        resizes_whole: Whether an image is resized whole; else its shorter side
            is resized to 8/7 of `image_size` (256 to 224), and its centre
            taken.
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


def decode(image):
    """uint8 `[height, width, c]` with the channels that the image has.

    What is decoded already stays as it is.
    """
    if image.dtype == tf.uint8:
        return image
    head = tf.io.decode_raw(image, tf.uint8, fixed_length=32)

    def has(text, at):
        return tf.reduce_all(head[at : at + len(text)] == list(text))

    # TensorFlow 2.21 finds the channels of PNG, JPEG, GIF and BMP itself
    # (channels=0). Of WebP it wants them said, 3 or 4; left to find them, it
    # writes beyond its memory where an animation has no alpha.
    is_webp = has(b"RIFF", 0) & has(b"WEBP", 8)
    flags = tf.where(has(b"VP8X", 12), head[20], tf.constant(0, tf.uint8))
    flags = tf.where(has(b"VP8L", 12), head[24], flags)
    has_alpha = tf.bitwise.bitwise_and(flags, 16) > 0
    has_palette = has(b"BM", 0) & (head[28] == 8) & (head[29] == 0)
    kind = tf.where(is_webp, tf.where(has_alpha, 2, 1), 0)
    decode = functools.partial(tf.io.decode_image, expand_animations=False)
    return tf.switch_case(
        tf.where(has_palette, 3, kind),
        [
            *(functools.partial(decode, image, c) for c in (0, 3, 4)),
            lambda: _in_colours(decode(image), image),
        ],
    )


def _in_colours(numbers, image):
    """A BMP of 8 bits a pixel, of which TensorFlow gives colours by number."""
    colours = tf.strings.substr(tf.strings.join([image, "\0" * 2048]), 14, 1200)
    data = tf.io.decode_raw(colours, tf.uint8)
    header_bytes = tf.cast(data[0], tf.int32)
    table = tf.reshape(data[header_bytes:][:1024], [256, 4])
    return tf.gather(table[:, 2::-1], tf.cast(numbers[..., 0], tf.int32))


def decode_window(image, choose, channels):
    """The window that `choose(height, width)` names of an image.

    Of a JPEG, only the window is decoded, to so many channels.
    """

    def of_jpeg():
        shape = tf.image.extract_jpeg_shape(image)
        window = choose(shape[0], shape[1])
        return tf.image.decode_and_crop_jpeg(image, window, channels)

    def of_any():
        decoded = decode(image)
        shape = tf.shape(decoded)
        top, left, height, width = tf.unstack(choose(shape[0], shape[1]))
        decoded = decoded[top : top + height, left : left + width]
        return _with_channels(decoded, channels)

    if image.dtype == tf.uint8:
        return of_any()
    return tf.cond(tf.io.is_jpeg(image), of_jpeg, of_any)


def _with_channels(image, channels):
    """Alpha is dropped; grey is repeated, colour is weighed to grey."""
    if image.shape[-1] == channels:
        return image
    colours = tf.where(tf.shape(image)[-1] >= 3, 3, 1)
    image = image[..., :colours]
    if channels == 3:
        return tf.tile(image, [1, 1, 3 // colours])
    return tf.cond(
        colours == 3,
        lambda: tf.image.rgb_to_grayscale(
            tf.ensure_shape(image, [None, None, 3])
        ),
        lambda: image,
    )


def resize(image, sides, antialias=True):
    """uint8; bilinear with antialiasing, as Pillow and torchvision resize."""
    return _rounded(tf.image.resize(image, sides, antialias=antialias))


def _rounded(image):
    return tf.cast(image + 0.5, tf.uint8)  # rounds: nothing is negative


def _resize_to(image, size):
    """`[size, size, c]`, in memory that a long side does not multiply.

    TensorFlow resizes the height first, into floats of the whole width.
    """
    height, width = tf.unstack(tf.shape(image, tf.int64)[:2])

    def of_transposed():
        turned = tf.transpose(image, [1, 0, 2])
        return tf.transpose(resize(turned, [size, size]), [1, 0, 2])

    return tf.cond(
        width > 16 * height, of_transposed, lambda: resize(image, [size, size])
    )


def _resized_centre(image, shorter_side, size):
    """The centre, `[size, size, c]`, of the image with that shorter side.

    The same as resizing and then cropping, but only what the centre is made
    of is resized: a strip of 4 x 2,000,000 pixels would need gigabytes.
    """
    sides = tf.shape(image, tf.int64)[:2]
    resized = shorter_side * sides // tf.reduce_min(sides)
    scale = tf.cast(resized, tf.float64) / tf.cast(sides, tf.float64)
    start = (resized - size) // 2
    # A pixel is made of those within one pixel, of the larger of the images.
    reach = tf.maximum(1.0 / scale, 1.0) + 1.0
    first = tf.maximum(
        tf.cast(tf.cast(start, tf.float64) / scale - reach, tf.int64), 0
    )
    last = tf.cast(tf.cast(start + size, tf.float64) / scale + reach, tf.int64)
    window = image[first[0] : last[0], first[1] : last[1]]
    before = tf.cast(first, tf.float64) * scale - tf.cast(start, tf.float64)
    view = tf.raw_ops.ScaleAndTranslate(
        images=window[None],
        size=[size, size],
        scale=tf.cast(scale, tf.float32),
        translation=tf.cast(before, tf.float32),
        kernel_type="triangle",
        antialias=True,
    )
    return _rounded(view[0])


def scaled(image_size):
    """The shorter sides of the multi-scale test of a network."""
    return [round(image_size * scale / _SCALES[0]) for scale in _SCALES]


def _ten_crops(image, size):
    """`[..., h, w, c]` to `[..., 10, size, size, c]`.

    The four corners and the centre, then their mirror images.
    """
    height, width = tf.unstack(tf.shape(image)[-3:-1])
    bottom, right = height - size, width - size
    places = [
        (0, 0),
        (0, right),
        (bottom, 0),
        (bottom, right),
        (bottom // 2, right // 2),
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
    """The ten crops of `[batch, size, size, c]` with zeros around it."""
    size = images.shape[1]
    around = [size // 8] * 2
    return _ten_crops(tf.pad(images, [[0, 0], around, around, [0, 0]]), size)
