"""Preprocessing of images, and labels of predictions."""

import keras
import numpy as np

from keras_resnet.weights import shipped

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


def decode_predictions(p, top: int = 5) -> list:
    """Returns the best `top` ImageNet classes of each row of probabilities.

    Args:
        p: Array, list or tensor `[batch, 1000]`.
        top: Number of classes of each row, at least 1.

    Returns:
        A list for each row of tuples `(synset, label, probability)`.

    Raises:
        ValueError: If `p` has another shape or `top` is less than 1.
    """
    if top < 1:
        raise ValueError(f"top must be at least 1, received {top}")
    p = keras.ops.convert_to_numpy(p).astype("float32")
    return keras.applications.imagenet_utils.decode_predictions(p, top=top)
