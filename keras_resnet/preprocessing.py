"""Preprocessing of images, and labels of predictions."""

import dataclasses
import numbers

import keras
import numpy as np
from keras import ops

from keras_resnet.weights import cards
from keras_resnet.weights import labels
from keras_resnet.weights import shipped
from keras_resnet.weights.published import Preparation

PREPROCESSING_MODES = ("caffe", "tf", "torch", "cifar10")


def preprocess_input(x, mode: str = "caffe", data_format=None):
    """Preprocesses images as keras.applications does, without changing `x`.

    The result depends only on the values of the pixels: an array, a tensor and
    a symbolic input of any dtype give the same numbers. The result is float32,
    or float64 if `x` or `keras.config.floatx()` is.

    Args:
        x: Images with values in 0 to 255, `[..., height, width, 3]`: an array,
            a list, a tensor, an element of a `tf.data.Dataset` or a
            `keras.Input`.
        mode: `"caffe"` is BGR minus the ImageNet mean, for weights="imagenet".
            `"tf"` is -1 to 1, and `"torch"` is standardized. `"cifar10"` is 0
            to 1 minus the mean of each pixel [1, Sec. 4.2], for
            weights="cifar10" and images of 32x32 pixels.
        data_format: As in keras.applications. `"channels_first"` images have
            the shape `[..., 3, height, width]`.

    Returns:
        The preprocessed images, a new array or tensor.

    Raises:
        ValueError: If the mode or the data format is unknown, or the shape of
            the images does not fit the mode.

    >>> import numpy as np
    >>> preprocess_input(np.full((1, 1, 3), 255, "uint8"), "tf").tolist()
    [[[1.0, 1.0, 1.0]]]
    """
    if mode not in PREPROCESSING_MODES:
        *first, last = (f"`{mode}`" for mode in PREPROCESSING_MODES)
        raise ValueError(
            f"Expected mode to be one of {', '.join(first)} or {last}. "
            f"Received: mode={mode}"
        )
    if data_format is None:
        data_format = keras.config.image_data_format()
    if data_format not in ("channels_first", "channels_last"):
        raise ValueError(
            "Expected data_format to be one of `channels_first` or "
            f"`channels_last`. Received: data_format={data_format}"
        )
    x, flip = _floating(x)
    dtype = keras.backend.standardize_dtype(x.dtype)
    is_first = data_format == "channels_first"

    def by_channel(values):
        values = np.asarray(values, dtype)
        return np.moveaxis(values, -1, 0) if is_first else values

    sizes: list[int | None] = [None] * 3
    if mode == "cifar10":
        mean = by_channel(shipped.mean())
        sizes = list(mean.shape)
    elif mode != "tf":  # which treats all channels as one
        sizes[0 if is_first else 2] = 3
    _check_images(x, sizes, mode)
    if mode == "tf":
        return x / 127.5 - 1.0
    if mode == "cifar10":
        return x / 255.0 - mean
    if mode == "torch":
        x = x / 255.0 - by_channel([[[0.485, 0.456, 0.406]]])
        return x / by_channel([[[0.229, 0.224, 0.225]]])
    bgr = flip(x, -3 if is_first else -1)
    return bgr - by_channel([[[103.939, 116.779, 123.68]]])


def _floating(x):
    """Returns images in floating point, and `flip(x, axis)` for their type."""
    if isinstance(x, keras.Variable):
        x = keras.ops.convert_to_tensor(x)
    if isinstance(x, list | tuple) and any(map(_is_tensor, x)):
        x = keras.ops.stack(x)
    if type(x).__module__.startswith("tensorflow."):
        # With any backend of Keras: an element of a tf.data.Dataset.
        import tensorflow as tf

        cast, flip = tf.cast, tf.experimental.numpy.flip
    elif _is_tensor(x):
        cast, flip = keras.ops.cast, keras.ops.flip
    else:
        x = np.asarray(x)
        cast, flip = np.ndarray.astype, np.flip
    try:
        given = keras.backend.standardize_dtype(x.dtype)
        dtype = keras.backend.result_type(
            given, keras.config.floatx(), "float32"
        )
    except ValueError:  # objects, texts
        given = dtype = str(x.dtype)
    if not dtype.startswith("float"):
        raise ValueError(f"Expected images of real numbers. Received: {given}")
    return x if given == dtype else cast(x, dtype), flip


def _is_tensor(x) -> bool:
    return isinstance(x, keras.KerasTensor) or keras.ops.is_tensor(x)


def _check_images(x, sizes, mode):
    """Raises ValueError unless the last three sizes are these (None: any)."""
    if getattr(x.shape, "rank", 3) is None:
        return  # tf.io.decode_image does not set a shape
    found = tuple(x.shape[-3:])  # None where it is not known yet
    if len(found) < 3 or any(
        None not in (size, expected) and size != expected
        for size, expected in zip(found, sizes, strict=True)
    ):
        expected = ", ".join(str(size or "size") for size in sizes)
        raise ValueError(
            f"Expected images of shape [..., {expected}] in mode `{mode}`. "
            f"Received: shape={tuple(x.shape)}"
        )


@keras.saving.register_keras_serializable(package="keras_resnet")
class ImagePreparation(keras.layers.Layer):
    """Prepares images for a network, as for the training of its weights.

    The image is resized, its centre is cropped, and the result is
    `(x / 255 - mean) / deviation`. Sizes and rounding are those of torchvision
    and timm.

    Args:
        preparation: A `keras_resnet.weights.published.Preparation` or its JSON.
        height: Height of the network's input.
        width: Width of the network's input.
        channels: Number of channels of the network's input, 1 or 3.

    Call arguments:
        images: Pixels of 0 to 255, `[height, width, c]` or `[batch, height,
            width, c]` of any size. c is 1 or 2 (grey, alpha) or 3 or 4 (red,
            green, blue, alpha). Alpha is dropped. A list is a batch: its images
            have one size. An image of Pillow is turned as its EXIF orientation
            says.

    Returns:
        A float32 tensor `[height, width, channels]` or `[batch, height, width,
        channels]`.

    Raises:
        ValueError: If the shape is another one, or the values are known and are
            not pixels of 0 to 255, but of 0 to 1, standardized or NaN.
    """

    def __init__(
        self,
        preparation: Preparation | dict,
        height: int,
        width: int,
        channels: int = 3,
        **kwargs,
    ):
        kwargs.setdefault("dtype", "float32")
        super().__init__(**kwargs)
        if isinstance(preparation, dict):
            preparation = Preparation(**preparation)
        if channels not in (1, 3):
            raise ValueError(f"channels must be 1 or 3, received {channels}")
        self.preparation = preparation
        self.height, self.width, self.channels = height, width, channels

    def __call__(self, images, *args, **kwargs):
        # Here, because Keras adds lines to an error of `call`.
        images = _as_array(images)
        _check_shape(images)
        _check_pixels(images)
        return super().__call__(images, *args, **kwargs)

    def call(self, images):
        x = ops.cast(images, "float32")
        x = self._resized(_with_channels(x, self.channels))
        mean, deviation = self._numbers()
        x = (x / 255.0 - mean) / deviation
        return ops.flip(x, -1) if self.preparation.order == "bgr" else x

    def _resized(self, x):
        size = (self.height, self.width)
        shorter_side = self.preparation.shorter_side
        if shorter_side is None:
            return self._resize(x, size)
        longest = max(size)
        shorter_side = round(
            shorter_side * longest / self.preparation.image_size
        )
        x = _without_far_ends(x)
        height, width = ops.shape(x)[-3:-1]
        least = _least(height, width)
        sides = (shorter_side * height // least, shorter_side * width // least)
        x = self._resize(x, sides)
        top, left = map(_start, sides, size)
        return x[..., top : top + size[0], left : left + size[1], :]

    def _resize(self, x, size):
        """Resizes the width, then the height, each to whole pixels, as Pillow.

        An axis that has its size already is left as it is.
        """
        height, width = ops.shape(x)[-3:-1]
        for sides, side, other in (
            ((height, size[1]), width, size[1]),
            (size, height, size[0]),
        ):
            if isinstance(side, int) and side == other:
                continue
            x = _resized(x, sides, self.preparation.interpolation)
            x = ops.floor(ops.clip(x, 0.0, 255.0) + 0.5)
        return x

    def _numbers(self):
        """Mean and deviation of red, green and blue, or of grey."""
        mean = np.array(self.preparation.mean, "float32")
        if self.preparation.mean_image:
            mean = shipped.mean(self.preparation.mean_image)
            if mean.shape[:2] != (self.height, self.width):
                mean = mean.mean((0, 1))
        deviation = np.array(self.preparation.deviation, "float32")
        if self.channels == 1:
            mean, deviation = (
                values.mean(-1, keepdims=True) for values in (mean, deviation)
            )
        return mean, deviation

    def compute_output_shape(self, images_shape):
        size = (self.height, self.width, self.channels)
        return (*images_shape[:-3], *size)

    def get_config(self):
        return {
            **super().get_config(),
            "preparation": dataclasses.asdict(self.preparation)
            | {
                "mean": list(self.preparation.mean),
                "deviation": list(self.preparation.deviation),
            },
            "height": self.height,
            "width": self.width,
            "channels": self.channels,
        }


def _of_pillow(image):
    """Returns the pixels of an image of Pillow, turned and in colours."""
    import PIL.ImageOps

    return np.asarray(PIL.ImageOps.exif_transpose(image).convert("RGB"))


def _is_of(library: str, x) -> bool:
    return type(x).__module__.startswith(f"{library}.")


def _as_array(images):
    """Returns images as one array or tensor of numbers."""
    if _is_of("PIL", images):
        images = _of_pillow(images)
    if isinstance(images, list | tuple):
        images = [_of_pillow(x) if _is_of("PIL", x) else x for x in images]
        stack = ops.stack if any(map(_is_tensor, images)) else np.array
        try:
            images = stack(images)
        except Exception as error:  # each backend raises its own
            raise ValueError(
                "images of a list must have one size, received "
                f"{len(images)} of several sizes: prepare each image by itself"
            ) from error
    elif not (
        isinstance(images, keras.KerasTensor) or hasattr(images, "__array__")
    ):
        raise ValueError(
            "images must be an array, a tensor or a list of images, received "
            f"{type(images).__name__}"
        )
    dtype = str(getattr(images.dtype, "name", images.dtype))
    if not dtype.startswith(("uint", "int", "float", "bfloat")):
        raise ValueError(
            f"images must have pixels of 0 to 255, received values of {dtype}"
        )
    return images


def _check_shape(images):
    """Raises ValueError unless a shape, as far as it is known, is of images."""
    shape = getattr(images, "shape", ())
    if getattr(shape, "rank", 0) is None:
        raise ValueError(
            "images must have a known number of axes, received a tensor "
            "without: decode with expand_animations=False"
        )
    shape = tuple(shape)
    has_channels = len(shape) in (3, 4) and shape[-1] in (1, 2, 3, 4)
    if has_channels and 0 not in shape[-3:-1]:
        return
    is_grey = len(shape) in (2, 3) and 0 not in shape
    raise ValueError(
        "images must have the shape [height, width, channels] or [batch, "
        "height, width, channels], with at least one pixel and 1 to 4 "
        f"channels, received {shape}"
        f"{': give grey images as images[..., None]' if is_grey else ''}"
    )


# A resize may leave 0 to 255 by a part of that. Standardized pixels are small.
_LEAST_PIXEL, _LARGEST_PIXEL = -64, 511
_STANDARDIZED = 16


def _check_pixels(images):
    """Raises ValueError for known values outside the pixels of 0 to 255."""
    if isinstance(images, keras.KerasTensor):
        return
    try:
        values = np.asarray(images)
    except (NotImplementedError, TypeError):  # inside a graph
        return
    if values.dtype == np.uint8 or not values.size:
        return
    least, most = float(values.min()), float(values.max())
    is_scaled = least >= 0 and most <= 1 and bool(np.any(values % 1))
    is_centred = least < _LEAST_PIXEL or (least < 0 and most < _STANDARDIZED)
    if is_scaled or is_centred or np.isnan(least):
        advice = "give the pixels as they were decoded"
    elif most > _LARGEST_PIXEL:
        advice = "divide images of 16 bits by 257"
    else:
        return
    raise ValueError(
        "images must have pixels of 0 to 255, received values of "
        f"{least:.4g} to {most:.4g}: {advice}"
    )


def _resized(x, sides, interpolation):
    if type(x).__module__.startswith("tensorflow."):
        # In a graph the sides are tensors, which Keras' function compares.
        import tensorflow as tf

        return tf.image.resize(x, sides, interpolation, antialias=True)
    return ops.image.resize(
        x, sides, interpolation, antialias=True, data_format="channels_last"
    )


# Ratio of the sides up to which an image is resized whole, as Pillow does.
_LONGEST_RATIO = 8


def _without_far_ends(x):
    """Cuts the ends off an image that is much longer than wide.

    Its view is the centre. Resized whole, one of 1 x 20,000 pixels would fill
    16 GB.
    """
    height, width = ops.shape(x)[-3:-1]
    longest = _LONGEST_RATIO * _least(height, width)
    top, left = (
        (side - _least(side, longest)) // 2 for side in (height, width)
    )
    return x[..., top : height - top, left : width - left, :]


def _least(side, other):
    is_known = isinstance(side, int) and isinstance(other, int)
    return (min if is_known else ops.minimum)(side, other)


def _start(side, size):
    """First pixel of the centre: half of the rest, rounded to even."""
    rest = side - size
    half = rest // 2
    return half + (rest % 2) * (half % 2)


def _with_channels(x, channels):
    found = x.shape[-1]
    if found in (2, 4):
        x, found = x[..., : found - 1], found - 1
    if found == channels:
        return x
    if found == 1:
        return ops.repeat(x, channels, axis=-1)
    grey = ops.sum(
        x * np.array([0.299, 0.587, 0.114], "float32"), -1, keepdims=True
    )
    return ops.floor(grey + 0.5)


# Layers in front of a network that change pixels.
_PREPARING = (
    ImagePreparation,
    keras.layers.Rescaling,
    keras.layers.Normalization,
)


def preprocess(model: keras.Model) -> ImagePreparation:
    """Returns the layer that prepares images for a network's weights.

    The card of the weights says how (`keras_resnet.weights.card`). A network
    of another image size resizes in the same proportion.

    Args:
        model: A network that was built with `weights`, its copy, or a model
            with such a network inside.

    Returns:
        A Keras layer from images of 0 to 255 of any size to the input of
        `model`. It works on arrays, in `tf.data` with the TensorFlow backend,
        and as the first layer of a model.

    Raises:
        ValueError: If the preparation is not known, `model` does not take
            images of 1 or 3 channels, or prepares images itself.

    >>> import keras_resnet
    >>> model = keras_resnet.ResNet20(weights="cifar10")
    >>> preprocess(model)(np.zeros((2, 48, 64, 3), "uint8")).shape
    TensorShape([2, 32, 32, 3])
    """
    card = cards.card(model)
    if card is None or card.preparation is None:
        raise ValueError(
            f"model must have weights whose preparation is known, received "
            f"{model.name!r} with {card.name if card else 'weights of its own'}"
            ": use keras_resnet.preprocess_input(images, mode)"
        )
    for layer in model._flatten_layers():
        if isinstance(layer, _PREPARING):
            raise ValueError(
                f"model must take prepared images, received {model.name!r}, "
                f"whose layer {layer.name!r} prepares them: give the network "
                "inside"
            )
    shape = model.inputs[0].shape
    is_first = keras.config.image_data_format() == "channels_first"
    if is_first or len(shape) != 4:
        raise ValueError(
            "model must take images [batch, height, width, channels], received "
            f"{tuple(shape)}"
        )
    size = card.preparation.image_size
    return ImagePreparation(
        card.preparation,
        shape[1] or shape[2] or size,
        shape[2] or shape[1] or size,
        shape[3] or 3,
        name="prepare",
    )


def decode_predictions(
    p, top: int = 5, model: keras.Model | None = None
) -> list:
    """Returns the best `top` classes of each row of probabilities.

    Args:
        p: Array, list or tensor `[batch, classes]`.
        top: Number of classes of each row, at least 1.
        model: The network, whose card has the labels. Training does not change
            them. None means the 1000 classes of ImageNet.

    Returns:
        A list for each row of tuples `(identifier, label, probability)`. The
        identifier of a class of ImageNet is its synset, that of others the
        label.

    Raises:
        ValueError: If `p` has another shape or a NaN, `top` is less than 1, or
            the labels are not known.

    >>> import keras_resnet
    >>> model = keras_resnet.ResNet20(weights="cifar10")
    >>> decode_predictions([[0.0] * 9 + [1.0]], top=1, model=model)
    [[('truck', 'truck', 1.0)]]
    """
    if not isinstance(top, numbers.Integral) or top < 1:
        raise ValueError(
            f"top must be an integer of at least 1, received {top}"
        )
    p = keras.ops.convert_to_numpy(p).astype("float32")
    if np.isnan(p).any():
        raise ValueError("p must be probabilities, received NaN")
    card = None if model is None else cards.card(model)
    if model and card and not cards.has_classifier(model, card):
        raise ValueError(
            f"model must have the classifier of its weights ({card.name}), "
            f"received {model.name!r}, which has another one: its labels "
            "are not known"
        )
    if model is None or (card and card.label_set == "imagenet"):
        return keras.applications.imagenet_utils.decode_predictions(p, top=top)
    known = labels.of_model(model)
    if known is None or p.ndim != 2 or p.shape[1] != len(known):
        raise ValueError(
            "model must have weights with one label for each column, received "
            f"{len(known or ())} labels for the shape {p.shape}"
        )
    return [
        [(known[i], known[i], float(row[i])) for i in np.argsort(-row)[:top]]
        for row in p
    ]
