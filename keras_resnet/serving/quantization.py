"""Quantizes a folded network to int8 kernels.

The network is quantized after training, as Jacob et al. (2018) describe its
inference:

1. Fold the normalizations into the convolutions (`serving.folding`), and trace
   the float32 graph.
2. Calibrate: run the graph on training images, and record the range of every
   tensor that is to have 8 bits (`serving.calibration`).
3. Replace each convolution, with its bias, the sum of a unit and the ReLU, by
   one kernel (`serving.int8_kernels`).

A tensor keeps its 8 bits until an operation in float32 reads it. Operations
without such a kernel remain in float32. Examples are a normalization after a
sum, a gate, a scaled shortcut, the sum of a pre-activation unit, which no ReLU
follows, the global pooling and the dense layers.

A sum `relu(h(x) + F(x))` is part of the last convolution of F. Its kernel takes
an unsigned h(x) only. A projection has the range -m to m, and is therefore
stored as h(x) + m, and the bias of F subtracts m:

    relu(h(x) + F(x)) = relu((h(x) + m) + (F(x) - m))

The kernel writes the sum into the memory of h(x). So h(x) is only summed in the
kernel if every other operation that reads h(x) precedes the sum. Otherwise
float32 computes the sum.
"""

import hashlib
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Sequence
from typing import Any
from typing import NamedTuple

import keras
import numpy as np
import tensorflow as tf

from keras_resnet.serving import calibration
from keras_resnet.serving import folding
from keras_resnet.serving import int8_kernels
from keras_resnet.serving.int8_kernels import Int8Tensor

Function = Callable[..., Any]
Ranges = dict[str, calibration.Range]


def quantize(model: keras.Model, images: np.ndarray) -> Function:
    """Returns the inference function of a network, in int8 kernels.

    Args:
        model: A model as in `folding.fold`.
        images: Training images to calibrate with, as the model takes them:
            `[count, height, width, channels]`.

    Returns:
        The function from images to `model(images, training=False)`, over
        constants. It runs in graphs (`tf.function`) only.

    Raises:
        folding.ModelError: If the model cannot be folded, if it has no
            convolution that int8 kernels compute, or if its activations are
            not finite.
        int8_kernels.UnsupportedError: If TensorFlow has no such kernels here.
    """
    int8_kernels.check()
    network = _Network(folding.fold(model), images)
    convolutions = _convolutions(network)
    if not convolutions:
        raise folding.ModelError(
            "a network in int8 must have a convolution with a constant kernel, "
            f"received {model.name!r}, which has none"
        )
    ranges = _ranges(network, convolutions, images)
    fused = _with_sums(network, convolutions, ranges)
    definition, outputs = _Rewriter(network, fused, ranges).rewritten()
    return lambda images: tf.nest.pack_sequence_as(
        network.structure, network.run(definition, images, outputs)
    )


class _Network:
    """The float32 graph of a network.

    Attributes:
        image: Specification of the input.
        graph: The graph, without operations that repeat another one.
        operations: Its operations, each after its inputs.
        definition: The same as a message.
        outputs: Names of the output tensors.
        structure: Outputs in the structure that the network returns.
    """

    def __init__(self, function: Function, images: np.ndarray):
        self.image = tf.TensorSpec([None, *images.shape[1:]], images.dtype)
        self._function = tf.function(
            function, [self.image], autograph=False
        ).get_concrete_function()
        self.definition, names = _merged(self._function.graph)
        self.graph = tf.Graph()
        with self.graph.as_default():
            tf.graph_util.import_graph_def(self.definition, name="")
        self.operations = self.graph.get_operations()
        self.outputs = [
            _renamed(tensor.name, names) for tensor in self._function.outputs
        ]
        self.structure = self._function.structured_outputs
        self._position = {
            operation: i for i, operation in enumerate(self.operations)
        }

    def run(
        self, definition: tf.compat.v1.GraphDef, images, names: Sequence[str]
    ) -> list[tf.Tensor]:
        """Adds a graph with this network's inputs to the current graph."""
        used = {_operation_name(i) for n in definition.node for i in n.input}
        inputs = zip(
            self._function.inputs,
            [images, *self._function.captured_inputs],
            strict=True,
        )
        return tf.graph_util.import_graph_def(
            definition,
            {of.name: value for of, value in inputs if of.op.name in used},
            list(names),
            name="network",
        )

    def reader(self, tensor: tf.Tensor) -> tf.Operation | None:
        """The only operation that reads a tensor, or None."""
        if tensor.name in self.outputs or len(tensor.consumers()) != 1:
            return None
        return tensor.consumers()[0]

    def is_last_reader(
        self, operation: tf.Operation, tensor: tf.Tensor
    ) -> bool:
        """Whether all other readers of a tensor precede an operation.

        They do if the operation depends on them.
        """
        if tensor.name in self.outputs:
            return False
        first = self._position[tensor.op]
        before, waiting = set(), [operation]
        while waiting:
            for read in waiting.pop().inputs:
                # No reader of the tensor is earlier than the tensor.
                if self._position[read.op] > first and read.op not in before:
                    before.add(read.op)
                    waiting.append(read.op)
        return set(tensor.consumers()) <= before | {operation}


def _merged(
    graph: tf.Graph,
) -> tuple[tf.compat.v1.GraphDef, dict[str, str]]:
    """A graph whose equal operations are one, and the names that this changes.

    TensorFlow does the same before it runs a graph. If two tensors became one
    only then, it would have the readers of both.
    """
    merged = tf.compat.v1.GraphDef()
    definition = graph.as_graph_def()
    merged.library.CopyFrom(definition.library)
    merged.versions.CopyFrom(definition.versions)
    names: dict[str, str] = {}
    found: dict[bytes, str] = {}
    for operation, node in zip(
        graph.get_operations(), definition.node, strict=True
    ):
        name, inputs = node.name, [_renamed(i, names) for i in node.input]
        del node.input[:]
        node.input.extend(inputs)
        if not operation.op_def.is_stateful and node.op != "Placeholder":
            node.name = ""
            key = hashlib.sha256(node.SerializeToString(deterministic=True))
            names[name] = found.setdefault(key.digest(), name)
            node.name = name
        if names.get(name, name) == name:
            merged.node.append(node)
    return merged, names


def _renamed(name: str, names: dict[str, str]) -> str:
    """A tensor or control input of an operation that may have another name.

    >>> _renamed("^split:1", {"split": "other"})
    '^other:1'
    """
    control = "^" * name.startswith("^")
    operation, colon, index = name.removeprefix("^").partition(":")
    return control + names.get(operation, operation) + colon + index


class _Convolution(NamedTuple):
    """A convolution of the graph with the operations behind it.

    `y = convolution(x) + bias`, or `y = relu(convolution(x) + bias + summand)`

    Attributes:
        x: Input.
        kernel: `[size, size, channels, filters]`.
        bias: `[filters]`.
        stride: Stride in pixels.
        padding: As in `int8_kernels.convolution`.
        y: Output.
        summand: A tensor, a projection that only this sum reads, or None.
    """

    x: tf.Tensor
    kernel: np.ndarray
    bias: np.ndarray
    stride: int
    padding: str | list[int]
    y: tf.Tensor
    summand: Any = None


def _convolutions(network: _Network) -> list[_Convolution]:
    """The convolutions that int8 kernels compute, without sums."""
    found = []
    for operation in network.operations:
        kernel = _kernel(operation)
        if kernel is None:
            continue
        y, bias = operation.outputs[0], np.zeros(kernel.shape[-1], "float32")
        following = network.reader(y)
        if following is not None and following.type == "BiasAdd":
            constant = _constant(following.inputs[1])
            if constant is not None:
                y, bias = following.outputs[0], constant
                following = network.reader(y)
        if following is not None and following.type == "Relu":
            y = following.outputs[0]
        # The exponential of a sigmoid magnifies the rounding of a gate.
        if following is not None and following.type == "Sigmoid":
            continue
        padding = operation.get_attr("padding").decode()
        if padding == "EXPLICIT":
            padding = operation.get_attr("explicit_paddings")
        stride = operation.get_attr("strides")[1]
        found.append(
            _Convolution(operation.inputs[0], kernel, bias, stride, padding, y)
        )
    return found


def _kernel(operation: tf.Operation) -> np.ndarray | None:
    """The kernel of a convolution that int8 kernels compute, or None."""
    if operation.type != "Conv2D":
        return None
    x, kernel = operation.inputs[0], _constant(operation.inputs[1])
    is_supported = (
        kernel is not None
        and x.dtype == tf.float32
        and x.shape[-1] == kernel.shape[2]  # without groups
        and operation.get_attr("data_format") == b"NHWC"
        and set(operation.get_attr("dilations")) == {1}
        and len(set(operation.get_attr("strides")[1:3])) == 1
    )
    return kernel if is_supported else None


def _constant(tensor: tf.Tensor) -> np.ndarray | None:
    return tf.get_static_value(tensor)


def _origin(tensor: tf.Tensor) -> tf.Tensor:
    """The tensor whose numbers a tensor repeats, before pools and zeros."""
    while _move(tensor.op) is not None:
        tensor = tensor.op.inputs[0]
    return tensor


def _move(operation: tf.Operation) -> Callable[..., Int8Tensor] | None:
    """The kernel of an operation that only moves numbers, or None."""
    if operation.type == "Pad":
        paddings = _constant(operation.inputs[1])
        # TensorFlow removes an operation that adds no zeros, and its output
        # would be the memory of its input.
        if paddings is not None and paddings.min() >= 0 and paddings.any():
            return lambda x: int8_kernels.pad(x, paddings.tolist())
    if operation.type in ("AvgPool", "MaxPool"):
        size, *other_sizes = set(operation.get_attr("ksize")[1:3])
        stride, *other_strides = set(operation.get_attr("strides")[1:3])
        padding = operation.get_attr("padding").decode()
        if (
            (operation.type == "MaxPool" or size == 1)
            and not other_sizes + other_strides
            and padding in ("SAME", "VALID")
            and operation.get_attr("data_format") == b"NHWC"
        ):
            return lambda x: int8_kernels.max_pool(x, size, stride, padding)
    return None


def _ranges(
    network: _Network,
    convolutions: Iterable[_Convolution],
    images: np.ndarray,
) -> Ranges:
    """The ranges of all tensors that may have 8 bits, by name."""
    tensors = []
    for convolution in convolutions:
        tensors += [_origin(convolution.x), convolution.y]
    for operation in network.operations:
        y = _activated_sum(network, operation)
        if y is not None:
            tensors += [y, *map(_origin, operation.inputs)]
    names = list(dict.fromkeys(tensor.name for tensor in tensors))
    try:
        found = calibration.ranges(
            lambda batch: network.run(network.definition, batch, names),
            network.image,
            images,
        )
    except ValueError as error:
        raise folding.ModelError(str(error)) from error
    return dict(zip(names, found, strict=True))


def _activated_sum(
    network: _Network, operation: tf.Operation
) -> tf.Tensor | None:
    """The ReLU of a sum of two images of one shape, or None."""
    if operation.type != "AddV2":
        return None
    relu = network.reader(operation.outputs[0])
    if relu is None or relu.type != "Relu":
        return None
    left, right = operation.inputs
    is_sum = (
        left.name != right.name
        and left.dtype == tf.float32
        and left.shape.rank == right.shape.rank == 4
        and left.shape.as_list() == right.shape.as_list()
        and None not in left.shape[1:]
    )
    return relu.outputs[0] if is_sum else None


def _with_sums(
    network: _Network, convolutions: Iterable[_Convolution], ranges: Ranges
) -> dict[str, _Convolution]:
    """Convolutions by the name of y, with the sums that kernels compute."""
    found = {convolution.y.name: convolution for convolution in convolutions}

    def only_summed(tensor: tf.Tensor) -> _Convolution | None:
        """The convolution that returns a tensor which only the sum reads."""
        if network.reader(tensor) is None or tensor.op.type == "Relu":
            return None
        return found.get(tensor.name)

    def is_signed(tensor: tf.Tensor) -> bool:
        return ranges[_origin(tensor).name].is_signed

    for operation in network.operations:
        y = _activated_sum(network, operation)
        if y is None:
            continue
        left, right = operation.inputs
        # The kernel of a projection is the smaller one.
        pairs = sorted(
            [(only_summed(left), right), (only_summed(right), left)],
            key=lambda pair: -pair[0].kernel.size if pair[0] else 0,
        )
        for last, other in pairs:
            if last is None or is_signed(last.x):
                continue
            summand: Any = only_summed(other)
            if summand is None:
                if is_signed(other):
                    continue
                if not network.is_last_reader(operation, other):
                    continue
                summand = other
            else:
                del found[other.name]
            del found[last.y.name]
            found[y.name] = last._replace(y=y, summand=summand)
            break
    return found


class _Rewriter:
    """Writes the graph in int8.

    Args:
        network: The float32 graph.
        convolutions: Convolutions of 8 bits, by the name of y.
        ranges: Ranges of their tensors, by name.
    """

    def __init__(
        self,
        network: _Network,
        convolutions: dict[str, _Convolution],
        ranges: Ranges,
    ):
        self._network = network
        self._convolutions = convolutions
        self._ranges = ranges
        # By the name of the float32 tensor: tensors that kernels return, and
        # float32 tensors that were rounded.
        self._returned: dict[str, Int8Tensor] = {}
        self._rounded: dict[str, Int8Tensor] = {}

    def rewritten(self) -> tuple[tf.compat.v1.GraphDef, list[str]]:
        """Returns the graph and the names of its outputs."""
        with self._network.graph.as_default() as graph:
            for operation in self._network.operations:
                for y in operation.outputs[:1]:
                    self._add(operation, y)
            # Kernels return the first output of an operation, and there is only
            # one.
            replaced = {
                _operation_name(name): int8_kernels.dequantize(y).op.name
                for name, y in self._returned.items()
            }
        definition = graph.as_graph_def()
        for node in definition.node:
            for i, name in enumerate(node.input):
                node.input[i] = _renamed(name, replaced)
        outputs = [_renamed(name, replaced) for name in self._network.outputs]
        return _pruned(definition, outputs), outputs

    def _add(self, operation: tf.Operation, y: tf.Tensor) -> None:
        """Adds the kernel that replaces an operation, if there is one."""
        if y.name in self._convolutions:
            self._returned[y.name] = self._sum(self._convolutions[y.name])
            return
        move = _move(operation)
        if move and operation.inputs[0].name in self._returned:
            x = self._returned[operation.inputs[0].name]
            self._returned[y.name] = move(x)

    def _sum(self, convolution: _Convolution) -> Int8Tensor:
        y = self._ranges[convolution.y.name]
        match convolution.summand:
            case None:
                return self._convolved(convolution, *y)
            case _Convolution() as projection:
                # The projection is stored with m added, and F with m less.
                m = self._ranges[projection.y.name].largest
                summand = self._convolved(projection, 2.0 * m, False, m)
                return self._convolved(convolution, *y, -m, summand)
            case tensor:
                return self._convolved(
                    convolution, *y, summand=self._int8(tensor)
                )

    def _convolved(
        self,
        convolution: _Convolution,
        largest: float,
        is_signed: bool,
        offset: float = 0.0,
        summand: Int8Tensor | None = None,
    ) -> Int8Tensor:
        return int8_kernels.convolution(
            self._int8(convolution.x),
            convolution.kernel,
            convolution.bias + offset,
            convolution.stride,
            convolution.padding,
            largest,
            is_signed=is_signed,
            summand=summand,
        )

    def _int8(self, tensor: tf.Tensor) -> Int8Tensor:
        """A tensor of the float32 graph in 8 bits."""
        name = tensor.name
        if name in self._returned:
            return self._returned[name]
        if name not in self._rounded:
            self._rounded[name] = int8_kernels.quantize(
                tensor,
                *self._ranges[_origin(tensor).name],
            )
        return self._rounded[name]


def _operation_name(name: str) -> str:
    """The operation behind an input of a node.

    >>> _operation_name("split:1"), _operation_name("^check")
    ('split', 'check')
    """
    return name.removeprefix("^").partition(":")[0]


def _pruned(
    definition: tf.compat.v1.GraphDef, outputs: Iterable[str]
) -> tf.compat.v1.GraphDef:
    """The operations that outputs depend on, without the inputs."""
    nodes = {node.name: node for node in definition.node}
    waiting, kept = [_operation_name(name) for name in outputs], set()
    while waiting:
        name = waiting.pop()
        if name not in kept:
            kept.add(name)
            waiting += map(_operation_name, nodes[name].input)
    return tf.compat.v1.GraphDef(
        node=[
            node
            for node in definition.node
            if node.name in kept and node.op != "Placeholder"
        ],
        library=definition.library,
        versions=definition.versions,
    )
