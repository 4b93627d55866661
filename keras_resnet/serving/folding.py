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

Around the units a network is the graph that Keras has of it: each operation is
replaced where it stands, whatever it reads and whoever reads it.
"""

import collections
import functools
import inspect
from collections.abc import Callable
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
        model: a network of `keras_resnet.resnet`, part of one, or a functional
            or sequential model that has one inside. Dense layers, layers
            without weights and operations (`keras.ops`) may stand before it,
            behind it and beside it; several outputs may be asked for.
        precision: `"float32"`; `"bfloat16"` for kernels and activations; or
            `"int8"` for kernels, with a scale for each output channel, whose
            activations are float32. The global pooling, what follows it and
            the outputs are float32 in all.

    Returns:
        A function of images, `[batch, height, width, channels]`, to what
        `model(images, training=False)` gives. It has the weights of now.

    Raises:
        ValueError: the precision is unknown, or the model has other layers,
            several inputs, or no graph.

    >>> import keras_resnet
    >>> model = keras_resnet.ResNet20()
    >>> fold(model)(tf.zeros([1, 32, 32, 3])).shape
    TensorShape([1, 10])
    """
    if precision not in PRECISIONS:
        raise ValueError(
            f"precision must be one of {PRECISIONS}, received {precision!r}"
        )
    inputs = graph(model).inputs
    if len(inputs) != 1:
        raise ValueError(
            "a network that is folded must have one input, received "
            f"{model.name!r}, which has {len(inputs)}"
        )
    answer = _graph_function(model, precision)

    def network(images):
        # TensorFlow does not trust the shape of what a graph is fed, and puts
        # an addition into a convolution only where it knows both shapes.
        images = tf.ensure_shape(images, inputs[0].shape)
        outputs = answer(tf.cast(images, _compute_dtype(precision)))
        return keras.tree.map_structure(
            lambda output: tf.cast(output, "float32"), outputs
        )

    return network


def graph(model: keras.Model):
    """The graph of a functional or sequential model, as Keras has it.

    Raises:
        ValueError: it has none: it is of a class of its own.
    """
    found = getattr(model, "_functional", model)  # of keras.Sequential
    if not hasattr(found, "_nodes_by_depth"):
        raise ValueError(
            "a network that is folded must be a functional or a sequential "
            f"model, received {model.name!r}, a {type(model).__name__}"
        )
    return found


def nodes(model: keras.Model) -> list[Any]:
    """What a model calls: Keras' nodes, the last ones first."""
    by_depth = graph(model)._nodes_by_depth
    return [
        node
        for depth in sorted(by_depth)
        for node in by_depth[depth]
        if not node.is_input
    ]


def _graph_function(model, precision) -> Function:
    """The operations of a model, each on what it reads there."""
    carried = _carried(model)
    functions = {
        operation: _as_called(_function(operation, carried, precision))
        for operation in {node.operation for node in nodes(model)}
    }

    def answer(*inputs):
        outputs = graph(model)._run_through_graph(inputs, functions.__getitem__)
        is_one = isinstance(outputs, (list, tuple)) and len(outputs) == 1
        return outputs[0] if is_one else outputs

    return answer


def _as_called(function) -> Function:
    """As a graph calls it; how that was in training says nothing here."""
    return lambda *args, training=None, mask=None, **kwargs: function(
        *args, **kwargs
    )


def _carried(model) -> dict[Any, Any]:
    """Convolution -> the normalization that it can carry.

    Nothing else reads the convolution, and each of the two is called once.
    """
    calls = collections.Counter(node.operation for node in nodes(model))
    readers = collections.defaultdict(list)
    for node in nodes(model):
        for tensor in node.input_tensors:
            readers[id(tensor)].append(node.operation)
    for tensor in graph(model).outputs:
        readers[id(tensor)].append(None)
    found = {}
    for node in nodes(model):
        match node.operation, readers[id(node.outputs[0])]:
            case layers.Convolution(), [layers.BatchNormalization() as norm]:
                if calls[node.operation] == calls[norm] == 1:
                    found[node.operation] = norm
    return found


def _function(operation, carried, precision) -> Function:
    """The inference function of one operation of a graph."""
    match operation:
        case keras.Model():
            return _graph_function(operation, precision)
        case layers.Convolution():
            function = _convolution(
                operation, carried.get(operation), precision
            )
        case layers.BatchNormalization():
            if operation in carried.values():
                return _identity
            function = _standing(operation)
        case layers.Unit():
            function = fold_unit(operation, precision)
        case layers.UnitStack():
            function = _stack(operation, precision)
        case (
            keras.layers.GlobalAveragePooling2D()
            | keras.layers.GlobalMaxPooling2D()
        ):
            return _in_float32(operation)
        case keras.layers.Dense():
            return _dense(operation)
        case _ if not getattr(operation, "weights", ()):
            return _without_training(operation)
        case _:
            raise _cannot_fold(operation)
    # What stands before, such as an enlargement, may answer in float32.
    return lambda x: function(tf.cast(x, _compute_dtype(precision)))


def _without_training(operation) -> Function:
    """Augmentation layers, unlike Dropout, are switched on by default."""
    if "training" in inspect.signature(operation.call).parameters:
        return functools.partial(operation.call, training=False)
    return operation.call


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
        return lambda x, training=None: tf.nn.conv2d(
            x, kernel(), strides, padding
        )
    bias = bias.astype(_compute_dtype(precision).as_numpy_dtype)
    return lambda x, training=None: tf.nn.bias_add(
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
