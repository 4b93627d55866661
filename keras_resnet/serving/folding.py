"""Networks whose convolutions carry the normalization.

At inference batch normalization is an affine map of each channel,

    y = scale * x + offset,  scale = gamma / sqrt(moving_variance + epsilon),
                             offset = beta - scale * moving_mean,

and after a convolution it is part of that: kernel * scale and a bias, offset.
The order of a unit stays as `layers.units` has it; its parts are replaced:

    original, relu_before_addition,  norm_i goes into conv_i
    relu_only_pre_activation
    pre_activation                   norm_{i+1} goes into conv_i; the first
                                     one, on the sum, stays
    batch_norm_after_addition        norm_i goes into conv_i; the last one, on
                                     the sum, stays

and the norm of a projection goes into the projection. What is left are
convolutions, biases, sums and ReLUs over constants, which TensorFlow computes
as one kernel each.
"""

from collections.abc import Callable
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_resnet import layers

PRECISIONS = ("float32", "bfloat16")

Function = Callable[..., tf.Tensor]


def fold(model: keras.Model, precision: str = "float32") -> Callable[..., Any]:
    """The inference function of a network, over constants.

    Args:
        model: a network of `keras_resnet.resnet`, or one from its input to
            any of its layers; several outputs may be asked for.
        precision: `"float32"`, or `"bfloat16"` for kernels and activations.
            The global pooling, what follows it and the outputs are float32 in
            either.

    Returns:
        A function of images, `[batch, height, width, channels]`, to what
        `model(images, training=False)` gives. It has the weights of now.

    Raises:
        ValueError: the precision is unknown, or the model is no such network.

    >>> import keras_resnet
    >>> model = keras_resnet.ResNet20()
    >>> fold(model)(tf.zeros([1, 32, 32, 3])).shape
    TensorShape([1, 10])
    """
    if precision not in PRECISIONS:
        raise ValueError(
            f"precision must be one of {PRECISIONS}, received {precision!r}"
        )
    names = [tensor._keras_history.operation.name for tensor in model.outputs]
    functions = list(_functions(model, precision))

    def network(images):
        # TensorFlow does not trust the shape of what is fed to a graph, and
        # fuses an addition only where it knows that both shapes are equal.
        images = tf.ensure_shape(images, model.input_shape)
        x = tf.cast(images, precision)
        outputs = {}
        for name, function in functions:
            x = outputs[name] = function(x)
        found = [tf.cast(outputs[name], "float32") for name in names]
        return found if len(names) > 1 else found[0]

    return network


def _functions(model, precision) -> Iterator[tuple[str, Function]]:
    """The function of each layer, under the name of what it computes."""
    convolution = None
    for layer in model.layers:
        match layer:
            case keras.layers.InputLayer():
                continue
            case layers.Convolution():
                convolution = layer
                continue
            case layers.BatchNormalization() if convolution is not None:
                function = _convolution(convolution, layer, precision)
                convolution = None
            case layers.BatchNormalization():
                function = _affine(layer, precision)
            case layers.Unit():
                function = fold_unit(layer, precision)
            case layers.UnitStack():
                function = _fold_stack(layer, precision)
            case keras.layers.Dense():
                function = _dense(layer)
            case keras.layers.ReLU():
                function = tf.nn.relu
            case keras.layers.ZeroPadding2D():
                function = _padding(layer)
            case keras.layers.MaxPooling2D():
                function = _max_pooling(layer)
            case keras.layers.GlobalAveragePooling2D():
                function = _average
            case keras.layers.GlobalMaxPooling2D():
                function = _maximum
            case _:
                raise ValueError(
                    "only the layers of keras_resnet.resnet can be folded, "
                    f"received {layer.name!r}, a {type(layer).__name__}"
                )
        yield layer.name, function


def fold_unit(unit: layers.Unit, precision: str = "float32") -> Function:
    """The inference function of one residual unit, over constants.

    Args:
        unit: a built unit.
        precision: as in `fold`.

    Returns:
        A function of x, `[batch, height, width, channels]` in that precision,
        to what `unit(x, training=False)` gives.

    >>> unit = layers.OriginalUnit(16)
    >>> x = tf.ones([1, 8, 8, 16])
    >>> bool(tf.reduce_all(abs(unit(x) - fold_unit(unit)(x)) < 1e-4))
    True
    """
    convolutions, norms = zip(*unit.pairs(), strict=True)
    if unit.activates_first:
        first = norms[0] and _affine(norms[0], precision)
        after = (*norms[1:], None)
        norms_left = (first, *[_identity] * len(norms[1:]))
    elif isinstance(unit, layers.BatchNormAfterAdditionUnit):
        after = (*norms[:-1], None)
        norms_left = (
            *[_identity] * len(norms[1:]),
            _affine(norms[-1], precision),
        )
    else:
        after = norms
        norms_left = (_identity,) * len(norms)
    pairs = [
        (_convolution(convolution, norm, precision), left)
        for convolution, norm, left in zip(
            convolutions, after, norms_left, strict=True
        )
    ]
    parts = _Parts(
        unit,
        pairs=lambda: pairs,
        shortcut=_fold_shortcut(unit.shortcut, precision),
    )
    return lambda x: type(unit).forward(parts, x)


def _fold_shortcut(shortcut, precision) -> Function:
    parts: dict[str, Any] = {"dropout": _identity}
    if getattr(shortcut, "projection", None) is not None:
        parts["projection"] = _convolution(
            shortcut.projection, shortcut.norm, precision
        )
        parts["norm"] = None
    if hasattr(shortcut, "gate"):
        parts["gate"] = _gate(shortcut.gate, precision)
    folded = _Parts(shortcut, **parts)
    return lambda *tensors, training: type(shortcut).call(folded, *tensors)


class _Parts:
    """A layer some of whose parts are others.

    The layer's own `forward` or `call` runs on it, so that the order of a unit
    is written down once.
    """

    def __init__(self, layer, **parts):
        self._layer = layer
        self.__dict__.update(parts)

    def __getattr__(self, name):
        return getattr(self._layer, name)


def _fold_stack(stack, precision) -> Function:
    """Unit after unit: TensorFlow prepares kernels that are constants once."""
    functions = []
    for values in zip(*map(_array, stack.stacked), strict=True):
        mapping = list(zip(stack.unit.variables, values, strict=True))
        with keras.StatelessScope(state_mapping=mapping):
            functions.append(fold_unit(stack.unit, precision))

    def run(x):
        for function in functions:
            x = function(x)
        return x

    return run


def _array(variable) -> np.ndarray:
    return keras.ops.convert_to_numpy(variable.value)


def _scale_and_offset(norm) -> tuple[np.ndarray, np.ndarray]:
    """Batch normalization as an affine map of each channel, in float64."""
    mean, variance = _array(norm.moving_mean), _array(norm.moving_variance)
    scale = (variance.astype("float64") + norm.epsilon) ** -0.5
    if norm.scale:
        scale *= _array(norm.gamma)
    beta = _array(norm.beta) if norm.center else 0.0
    return scale, beta - scale * mean


def _identity(x, training=None):
    return x


def _affine(norm, precision) -> Function:
    scale, offset = (
        array.astype(tf.as_dtype(precision).as_numpy_dtype)
        for array in _scale_and_offset(norm)
    )
    return lambda x, training=None: x * scale + offset


def _convolution(convolution, norm, precision) -> Function:
    """A convolution with the normalization after it, if there is one."""
    kernel, bias = _array(convolution.kernel), None
    if norm is not None:
        scale, offset = _scale_and_offset(norm)
        kernel, bias = kernel * scale, offset
    padding = "SAME"
    if (
        convolution.padding == "symmetric"
        and convolution.stride > 1
        and convolution.kernel_size > 1
    ):
        sides = [convolution.kernel_size // 2] * 2
        padding = [[0, 0], sides, sides, [0, 0]]
    return _biased(kernel, bias, convolution.stride, padding, precision)


def _gate(gate, precision) -> Function:
    logits = _biased(
        _array(gate.kernel), _array(gate.bias), gate.strides, "SAME", precision
    )
    return lambda x: tf.sigmoid(logits(x))


def _biased(kernel, bias, strides, padding, precision) -> Function:
    dtype = tf.as_dtype(precision).as_numpy_dtype
    kernel = kernel.astype(dtype)
    bias = None if bias is None else bias.astype(dtype)

    def convolve(x):
        y = tf.nn.conv2d(x, kernel, strides, padding)
        return y if bias is None else tf.nn.bias_add(y, bias)

    return convolve


def _dense(layer) -> Function:
    kernel, bias = _array(layer.kernel), _array(layer.bias)
    return lambda x: layer.activation(
        tf.nn.bias_add(tf.matmul(tf.cast(x, "float32"), kernel), bias)
    )


def _padding(layer) -> Function:
    return lambda x: tf.pad(x, [(0, 0), *layer.padding, (0, 0)])


def _max_pooling(layer) -> Function:
    return lambda x: tf.nn.max_pool2d(
        x, layer.pool_size, layer.strides, layer.padding.upper()
    )


def _average(x):
    return tf.reduce_mean(tf.cast(x, "float32"), [1, 2])


def _maximum(x):
    return tf.reduce_max(tf.cast(x, "float32"), [1, 2])
