"""Folds batch normalization into the convolutions before it.

At inference batch normalization is an affine map of each channel,

    y = scale * x + offset,  scale = gamma / sqrt(moving_variance + epsilon),
                             offset = beta - scale * moving_mean.

After a convolution, it becomes a part of the convolution: the kernel is
multiplied by the scale, and the offset is a bias. The order of a unit remains
as in `layers.units`; its parts are replaced:

    original, relu_before_addition,  conv_i carries norm_i
    relu_only_pre_activation
    pre_activation                   conv_i carries norm_{i+1}; the first norm,
                                     on the sum, remains
    batch_norm_after_addition        conv_i carries norm_i; the last norm, on
                                     the sum, remains

A projection carries its own norm. The result consists of convolutions, biases,
sums and ReLUs over constants. TensorFlow computes one of each as one kernel,
whose weights it prepares once.

Outside the units, each operation of Keras' graph is replaced at its position,
so any graph can be folded. Only layers whose class and state this module knows
are replaced. Keras itself computes every other layer (quantized, with LoRA,
subclassed, patched, of another package), in the layer's own data type, with
constants instead of variables.
"""

import collections
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_resnet import graphs
from keras_resnet import layers
from keras_resnet.serving import int8_kernels

PRECISIONS = ("float32", "bfloat16", "int8_weights")

Function = Callable[..., tf.Tensor]

# Layers without weights that return the same numbers in any floating-point
# data type: they keep the data type of their input.
_OF_ANY_PRECISION = (
    keras.layers.Dropout,
    keras.layers.Flatten,
    keras.layers.MaxPooling2D,
    keras.layers.Permute,
    keras.layers.ReLU,
    keras.layers.ZeroPadding2D,
)


class ModelError(ValueError):
    """A model cannot be folded or exported as it is."""


def fold(model: keras.Model, precision: str = "float32") -> Callable[..., Any]:
    """Returns the inference function of a network, over constants.

    Args:
        model: A functional or sequential model with one input and any number
            of outputs, such as a network of `keras_resnet.resnet`, a part of
            one, or a model that contains one.
        precision: `"float32"`; `"bfloat16"` for kernels and activations; or
            `"int8_weights"` for kernels, with a scale for each output channel
            and float32 activations. The global pooling, the dense layers and
            the outputs are always float32. Layers that Keras computes keep
            their own data type. `quantization.quantize` computes in int8.

    Returns:
        The function from images, `[batch, height, width, channels]`, to
        `model(images, training=False)`. Later changes of the model's weights
        do not affect it.

    Raises:
        ValueError: If the precision is unknown.
        ModelError: If the model has several inputs, no graph, or a `call` that
            is not Keras' own.

    >>> import keras_resnet
    >>> model = keras_resnet.ResNet20()
    >>> fold(model)(tf.zeros([1, 32, 32, 3])).shape
    TensorShape([1, 10])
    """
    if precision not in PRECISIONS:
        raise ValueError(
            f"precision must be one of {PRECISIONS}, received {precision!r}"
        )
    inputs = checked_graph(model).inputs
    if len(inputs) != 1:
        raise ModelError(
            "a network that is folded must have one input, received "
            f"{model.name!r}, which has {len(inputs)}"
        )
    predict = _graph_function(model, precision)

    def network(images):
        # TensorFlow does not trust the shape of a graph's input, and fuses an
        # addition into a convolution only if it knows both shapes.
        images = tf.ensure_shape(images, inputs[0].shape)
        outputs = predict(packed(model, images))
        return keras.tree.map_structure(
            lambda output: tf.cast(output, "float32"), outputs
        )

    return network


def has_checked_graph(operation: Any) -> bool:
    """Whether an operation is a model with a graph and Keras' own `call`."""
    return graphs.has_graph(operation) and _is_unpatched(operation)


def checked_graph(model: keras.Model) -> Any:
    """Returns `graphs.graph(model)` of a model that calls only its graph.

    Raises:
        ModelError: If the model lacks a graph, or if its class or the model
            itself replaces Keras' `call`.
    """
    if not has_checked_graph(model):
        raise ModelError(
            "the model must be a functional or a sequential one that is built, "
            f"whose call is Keras' own; received {model.name!r}, a "
            f"{type(model).__name__}"
        )
    return graphs.graph(model)


def packed(model: keras.Model, images: Any) -> Any:
    """Returns images in the model's input structure: alone, a list or a dict.

    >>> image = keras.Input((4,), name="pixels")
    >>> packed(keras.Model({"pixels": image}, image), 1)
    {'pixels': 1}
    """
    structure = graphs.graph(model)._inputs_struct
    return keras.tree.pack_sequence_as(structure, [images])


def _graph_function(model, precision) -> Function:
    """A function that runs the operations of a model's graph."""
    carried = _carried(model)
    graph = graphs.graph(model)
    functions = {}
    for operation in {node.operation for node in graphs.nodes(model)}:
        folded = _folded(operation, carried, precision)
        functions[operation] = (
            _as_called(folded) if folded else _by_keras(operation)
        )

    def predict(inputs):
        # The data type, the rank and the order of the model's inputs.
        inputs = graph._standardize_inputs(inputs)
        outputs = graph._run_through_graph(inputs, functions.__getitem__)
        is_one = isinstance(outputs, (list, tuple)) and len(outputs) == 1
        return outputs[0] if is_one else outputs

    return predict


def _as_called(function) -> Function:
    """Drops the arguments of a graph's calls that inference ignores."""
    return lambda *args, training=None, mask=None, **kwargs: function(
        *args, **kwargs
    )


def _carried(model) -> dict[Any, Any]:
    """Convolution -> the normalization that it can carry.

    The normalization must be the only reader of the convolution's output, and
    the model must call each of the two once.
    """
    nodes = graphs.nodes(model)
    calls = collections.Counter(node.operation for node in nodes)
    readers = collections.defaultdict(list)
    for node in nodes:
        for tensor in node.input_tensors:
            readers[id(tensor)].append(node.operation)
    for tensor in graphs.graph(model).outputs:
        readers[id(tensor)].append(None)
    found = {}
    for node in nodes:
        match node.operation, readers[id(node.outputs[0])]:
            case layers.Convolution() as convolution, [norm]:
                if (
                    _is_plain(convolution, layers.Convolution)
                    and _is_plain_norm(norm)
                    and calls[convolution] == calls[norm] == 1
                ):
                    found[convolution] = norm
    return found


def _is_plain(layer, *classes: type) -> bool:
    """Whether a layer computes exactly what one of these classes does.

    These layers may compute something else: subclasses, quantized layers,
    layers with a replaced method, and layers without floating point.
    """
    return (
        getattr(type(layer), "computes_as", type(layer)) in classes
        and _is_unpatched(layer)
        and getattr(layer, "quantization_mode", None) is None
        and not getattr(layer, "lora_enabled", False)
        and keras.backend.is_float_dtype(layer.compute_dtype)
        and keras.backend.is_float_dtype(layer.variable_dtype)
    )


def _is_unpatched(layer) -> bool:
    kind = type(layer)
    # Keras itself wraps the other three.
    replaced = {n for n in vars(layer) if callable(getattr(kind, n, None))}
    package = getattr(kind.call, "__module__", "").partition(".")[0]
    return package in ("keras", "keras_resnet") and replaced <= {
        *("build", "quantize", "loss")
    }


def _is_plain_norm(layer) -> bool:
    """Whether a layer is our normalization, of the last axis of images.

    Synchronization, renormalization and masks have no effect at inference.
    """
    return (
        _is_plain(layer, layers.BatchNormalization)
        and layer.axis in (-1, 3)
        and (layer.input_spec is None or layer.input_spec.ndim == 4)
    )


def _is_plain_unit(unit) -> bool:
    """Whether a unit and all its parts are of the classes of this package."""
    if not _is_plain(unit, *layers.units.UNITS.values()):
        return False
    shortcut = unit.shortcut
    convolutions, norms = zip(*unit.pairs(), strict=True)
    projection, gate = (
        getattr(shortcut, name, None) for name in ("projection", "gate")
    )
    all_norms = [*norms, getattr(shortcut, "norm", None)]
    return (
        _is_plain(shortcut, *layers.shortcuts.SHORTCUTS.values())
        and all(
            _is_plain(convolution, layers.Convolution)
            for convolution in [*convolutions, projection]
            if convolution is not None
        )
        and all(_is_plain_norm(norm) for norm in all_norms if norm is not None)
        and (gate is None or _is_plain(gate, keras.layers.Conv2D))
    )


def _is_plain_stack(layer) -> bool:
    return _is_plain(layer, layers.UnitStack) and _is_plain_unit(
        layer.pattern()
    )


def _is_plain_dense(layer) -> bool:
    return (
        _is_plain(layer, keras.layers.Dense)
        # An activation that is a layer can have weights and a data type.
        and not isinstance(layer.activation, keras.layers.Layer)
    )


def _folded(operation, carried, precision) -> Function | None:
    """The inference function of a known operation, or None."""
    if isinstance(operation, keras.Model):
        if has_checked_graph(operation):
            return _graph_function(operation, precision)
        return None
    if operation in carried.values():
        return _identity
    if _is_plain(operation, *_OF_ANY_PRECISION):
        return operation.call
    if _is_plain(
        operation,
        keras.layers.GlobalAveragePooling2D,
        keras.layers.GlobalMaxPooling2D,
    ):
        return lambda x: operation.call(tf.cast(x, "float32"))
    if _is_plain_dense(operation):
        return _dense(operation)
    if _is_plain(operation, layers.Convolution):
        function = _convolution(operation, carried.get(operation), precision)
    elif _is_plain_norm(operation):
        function = _unfolded(operation)
    elif _is_plain_unit(operation):
        function = fold_unit(operation, precision)
    elif _is_plain_stack(operation):
        function = _stack(operation, precision)
    else:
        return None
    # The layer before, such as an enlargement, may return float32.
    return lambda x: function(tf.cast(x, _compute_dtype(precision)))


def _by_keras(operation) -> Function:
    """The inference function of an operation that Keras computes."""
    variables = getattr(operation, "variables", ())
    values = [(variable, _array(variable)) for variable in variables]
    arguments: dict[str, Any] = {}
    if "training" in getattr(operation, "_call_context_args", ()):
        arguments["training"] = False  # augmentation is on by default

    def function(*args, **kwargs):
        with keras.StatelessScope(state_mapping=values):
            return operation(*args, **{**kwargs, **arguments})

    return function


def fold_unit(unit: layers.Unit, precision: str = "float32") -> Function:
    """Returns the inference function of one residual unit, over constants.

    Args:
        unit: A built unit.
        precision: See `fold`.

    Returns:
        The function from x, `[batch, height, width, channels]` in the dtype of
        the activations, to `unit(x, training=False)`.

    Raises:
        ModelError: If the class of the unit, its shortcut or another part is
            not this package's, or if one of them was patched.

    >>> x = tf.ones([1, 8, 8, 16])
    >>> unit = layers.OriginalUnit(16)
    >>> bool(tf.reduce_all(abs(unit(x) - fold_unit(unit)(x)) < 1e-4))
    True
    """
    if not _is_plain_unit(unit):
        raise ModelError(
            "a unit must be of a class of keras_resnet.layers with parts and a "
            f"shortcut of this package, received {unit.name!r}, a "
            f"{type(unit).__name__} with a {type(unit.shortcut).__name__}"
        )
    convolutions, norms = zip(*unit.pairs(), strict=True)
    after = list(norms)  # the normalization that each convolution carries
    if unit.activates_first:
        after = [*norms[1:], None]
    elif isinstance(unit, layers.BatchNormAfterAdditionUnit):
        after[-1] = None
    remaining = [
        _identity if norm in after else _unfolded(norm) for norm in norms
    ]
    carrying = [
        _convolution(convolution, norm, precision)
        for convolution, norm in zip(convolutions, after, strict=True)
    ]
    pairs = list(zip(carrying, remaining, strict=True))
    folded = _Parts(
        unit,
        pairs=lambda: pairs,
        shortcut=_shortcut(unit.shortcut, precision),
    )
    return lambda x: type(unit).forward(folded, x)


def _shortcut(shortcut, precision) -> Function:
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
    """A layer with some of its parts replaced.

    The layer's own `forward` or `call` runs on it, so that the order of a unit
    is written down once.
    """

    def __init__(self, layer, **parts):
        self._layer = layer
        self.__dict__.update(parts)

    def __getattr__(self, name):
        return getattr(self._layer, name)


def _stack(stack, precision) -> Function:
    """The units one after the other: in a loop no kernel is a constant."""
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
    is_float32 = precision == "int8_weights"
    return tf.as_dtype("float32" if is_float32 else precision)


def _stored(kernel: np.ndarray, precision: str) -> Callable[[], Any]:
    """A function that returns the kernel, from constants of the precision.

    The loaded graph converts 8 bits to float32 once, before it runs.
    """
    if precision != "int8_weights":
        kernel = kernel.astype(tf.as_dtype(precision).as_numpy_dtype)
        return lambda: kernel
    steps, largest = int8_kernels.quantized_kernel(kernel)
    scale = largest / int8_kernels.limit(is_signed=True)
    return lambda: tf.cast(steps, "float32") * scale


def _unfolded(norm) -> Function:
    """A normalization that no convolution carries.

    TensorFlow fuses this op with the ReLU after it. It would not fuse a
    multiplication and an addition.
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
    kernel = _array(layer.kernel).astype("float32")
    bias = 0.0 if layer.bias is None else _array(layer.bias).astype("float32")
    activation = layer.activation or _identity
    return lambda x: activation(tf.matmul(tf.cast(x, "float32"), kernel) + bias)


def _identity(x, training=None):
    return x


def _array(variable) -> np.ndarray:
    return keras.ops.convert_to_numpy(variable.value)
