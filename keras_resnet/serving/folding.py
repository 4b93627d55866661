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
convolutions, biases, sums and ReLUs over constants: TensorFlow computes one of
each as one kernel, whose weights it prepares once.
"""

from collections.abc import Callable
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_resnet import layers

PRECISIONS = ("float32", "bfloat16", "int8")

Function = Callable[..., tf.Tensor]


def fold(model: keras.Model, precision: str = "float32") -> Callable[..., Any]:
    """The inference function of a network, over constants.

    Args:
        model: a network of `keras_resnet.resnet`, or part of one from the
            image to any layer after `stem_norm`; several outputs may be asked
            for. Layers without weights and dense ones may follow.
        precision: `"float32"`; `"bfloat16"` for kernels and activations; or
            `"int8"` for kernels, with a scale for each output channel, whose
            activations are float32. The global pooling, what follows it and
            the outputs are float32 in all.

    Returns:
        A function of images, `[batch, height, width, channels]`, to what
        `model(images, training=False)` gives. It has the weights of now.

    Raises:
        ValueError: the precision is unknown, or the model has other layers.

    >>> import keras_resnet
    >>> model = keras_resnet.ResNet20()
    >>> fold(model)(tf.zeros([1, 32, 32, 3])).shape
    TensorShape([1, 10])
    """
    if precision not in PRECISIONS:
        raise ValueError(
            f"precision must be one of {PRECISIONS}, received {precision!r}"
        )
    functions = list(_functions(model, precision))
    names = [tensor._keras_history.operation.name for tensor in model.outputs]

    def network(images):
        # TensorFlow does not trust the shape of what a graph is fed, and puts
        # an addition into a convolution only where it knows both shapes.
        images = tf.ensure_shape(images, model.input_shape)
        x = tf.cast(images, _compute_dtype(precision))
        outputs = {}
        for name, function in functions:
            x = outputs[name] = function(x)
        found = [tf.cast(outputs[name], "float32") for name in names]
        return found if len(found) > 1 else found[0]

    return network


def _functions(model, precision) -> Iterator[tuple[str, Function]]:
    """The layers of a model, each as its name and its inference function."""
    is_normalized = False  # whether the layer before has carried this one
    after_each = [*model.layers[1:], None]
    for layer, after in zip(model.layers, after_each, strict=True):
        match layer:
            case keras.layers.InputLayer():
                continue
            case keras.Model():
                yield from _functions(layer, precision)
                function = _identity
            case layers.Convolution():
                is_normalized = isinstance(after, layers.BatchNormalization)
                norm = after if is_normalized else None
                function = _convolution(layer, norm, precision)
            case layers.BatchNormalization():
                function = _identity if is_normalized else _standing(layer)
                is_normalized = False
            case layers.Unit():
                function = fold_unit(layer, precision)
            case layers.UnitStack():
                function = _stack(layer, precision)
            case (
                keras.layers.GlobalAveragePooling2D()
                | keras.layers.GlobalMaxPooling2D()
            ):
                function = _in_float32(layer)
            case keras.layers.Dense():
                function = _dense(layer)
            case _ if not layer.weights:
                function = layer.call
            case _:
                raise _cannot_fold(layer)
        yield layer.name, function


def fold_unit(unit: layers.Unit, precision: str = "float32") -> Function:
    """The inference function of one residual unit, over constants.

    Args:
        unit: a built unit.
        precision: as in `fold`.

    Returns:
        A function of x, `[batch, height, width, channels]` in the dtype of the
        activations, to what `unit(x, training=False)` gives.

    Raises:
        ValueError: the unit or its shortcut is of a class of its own, whose
            order is not known here.

    >>> x = tf.ones([1, 8, 8, 16])
    >>> unit = layers.OriginalUnit(16)
    >>> bool(tf.reduce_all(abs(unit(x) - fold_unit(unit)(x)) < 1e-4))
    True
    """
    if type(unit) not in layers.units.UNITS.values():
        raise _cannot_fold(unit)
    convolutions, norms = zip(*unit.pairs(), strict=True)
    after = list(norms)  # the normalization that each convolution carries
    if unit.activates_first:
        after = [*norms[1:], None]
    elif isinstance(unit, layers.BatchNormAfterAdditionUnit):
        after[-1] = None
    left = [_identity if norm in after else _standing(norm) for norm in norms]
    carrying = [
        _convolution(convolution, norm, precision)
        for convolution, norm in zip(convolutions, after, strict=True)
    ]
    pairs = list(zip(carrying, left, strict=True))
    folded = _Parts(
        unit,
        pairs=lambda: pairs,
        shortcut=_shortcut(unit.shortcut, precision),
    )
    return lambda x: type(unit).forward(folded, x)


def _shortcut(shortcut, precision) -> Function:
    if type(shortcut) not in layers.shortcuts.SHORTCUTS.values():
        raise _cannot_fold(shortcut)
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


def _stack(stack, precision) -> Function:
    """Unit after unit: a kernel that a loop reads is no constant."""
    pattern = stack.pattern()
    functions = []
    for values in zip(*map(_array, stack.stacked), strict=True):
        mapping = list(zip(pattern.variables, values, strict=True))
        with keras.StatelessScope(state_mapping=mapping):
            functions.append(fold_unit(pattern, precision))

    def run(x):
        for function in functions:
            x = function(x)
        return x

    return run


def _convolution(convolution, norm, precision) -> Function:
    """A convolution and, unless it is None, the normalization after it."""
    kernel, bias = _array(convolution.kernel), None
    if norm is not None:
        mean, variance, gamma, beta = _statistics(norm)
        scale = gamma / np.sqrt(variance + norm.epsilon)
        kernel, bias = kernel * scale, beta - scale * mean
    is_explicit = (
        convolution.padding == "symmetric"
        and convolution.stride > 1
        and convolution.kernel_size > 1
    )
    sides = [convolution.kernel_size // 2] * 2
    padding = [[0, 0], sides, sides, [0, 0]] if is_explicit else "SAME"
    return _biased(kernel, bias, convolution.stride, padding, precision)


def _gate(gate, precision) -> Function:
    kernel, bias = _array(gate.kernel), _array(gate.bias)
    logits = _biased(kernel, bias, gate.strides, "SAME", precision)
    return lambda x: tf.sigmoid(logits(x))


def _biased(kernel, bias, strides, padding, precision) -> Function:
    kernel = _stored(kernel, precision)
    if bias is None:
        return lambda x: tf.nn.conv2d(x, kernel(), strides, padding)
    bias = bias.astype(_compute_dtype(precision).as_numpy_dtype)
    return lambda x: tf.nn.bias_add(
        tf.nn.conv2d(x, kernel(), strides, padding), bias
    )


def _compute_dtype(precision: str) -> tf.DType:
    return tf.as_dtype("float32" if precision == "int8" else precision)


def _stored(kernel: np.ndarray, precision: str) -> Callable[[], Any]:
    """What gives the kernel, from constants of the precision.

    Of int8 the graph that is loaded makes float32 once, before it runs.
    """
    if precision != "int8":
        kernel = kernel.astype(tf.as_dtype(precision).as_numpy_dtype)
        return lambda: kernel
    largest = np.abs(kernel).max((0, 1, 2)).clip(np.finfo("float32").tiny)
    scale = (largest / 127.0).astype("float32")
    steps = np.round(kernel / scale).astype("int8")
    return lambda: tf.cast(steps, "float32") * scale


def _standing(norm) -> Function:
    """A normalization that no convolution can carry.

    TensorFlow computes it and the ReLU after it as one kernel, which a
    multiplication and an addition would not become.
    """
    if norm is None:
        return _identity
    mean, variance, gamma, beta = (
        array.astype("float32") for array in _statistics(norm)
    )
    return lambda x, training=None: (
        tf.raw_ops.FusedBatchNormV3(
            x=x,
            scale=gamma,
            offset=beta,
            mean=mean,
            variance=variance,
            epsilon=norm.epsilon,
            is_training=False,
        ).y
    )


def _statistics(norm) -> list[np.ndarray]:
    """Mean, variance, gamma and beta, in float64."""
    mean, variance = _array(norm.moving_mean), _array(norm.moving_variance)
    gamma = _array(norm.gamma) if norm.scale else np.ones_like(mean)
    beta = _array(norm.beta) if norm.center else np.zeros_like(mean)
    return [a.astype("float64") for a in (mean, variance, gamma, beta)]


def _dense(layer) -> Function:
    kernel = _array(layer.kernel)
    bias = _array(layer.bias) if layer.use_bias else np.float32(0.0)
    return lambda x: layer.activation(
        tf.matmul(tf.cast(x, "float32"), kernel) + bias
    )


def _in_float32(layer) -> Function:
    return lambda x: layer.call(tf.cast(x, "float32"))


def _identity(x, training=None):
    return x


def _array(variable) -> np.ndarray:
    return keras.ops.convert_to_numpy(variable.value)


def _cannot_fold(layer) -> ValueError:
    return ValueError(
        "only the units, shortcuts and layers that keras_resnet.resnet is "
        "made of, dense layers and layers without weights can be folded, "
        f"received {layer.name!r}, a {type(layer).__name__}"
    )
