"""Models that can be exported: requirements, features and inputs."""

import math
from collections.abc import Callable
from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_resnet import graphs
from keras_resnet.data import views
from keras_resnet.serving import folding
from keras_resnet.training import memory

#: Largest output of a layer for one image. The largest one of ResNet-152 for an
#: image of 1,024 x 1,024 pixels has 67 MB.
MAX_ACTIVATION_BYTES = 2**28

_GLOBAL_POOLINGS = (
    keras.layers.GlobalAveragePooling2D,
    keras.layers.GlobalMaxPooling2D,
)


def check_model(model: keras.Model) -> None:
    """Checks the inputs and outputs of a model.

    Raises:
        folding.ModelError: Unless the model maps square images of 1 or 3
            channels to one output of at least 2 classes.
    """
    graph = folding.checked_graph(model)
    counts = len(graph.inputs), len(graph.outputs)
    if counts != (1, 1):
        raise folding.ModelError(
            "the model must have one input, images, and one output, "
            f"probabilities; received one with {counts[0]} and {counts[1]}"
        )
    (image,), (output,) = graph.inputs, graph.outputs
    _check_image_shape(image.shape)
    if len(output.shape) != 2 or (output.shape[-1] or 0) < 2:
        raise folding.ModelError(
            "the model must have one output for each class, [batch, classes] "
            f"with 2 classes or more, received {output.shape}; for a single "
            "probability p, use Concatenate()([1.0 - p, p])"
        )


def _check_image_shape(shape) -> None:
    if len(shape) != 4:
        raise folding.ModelError(
            "the model must take images of the shape [batch, height, width, "
            f"channels], received {shape}: put a keras.layers.Reshape in "
            "front of the model"
        )
    batch, height, width, channels = shape
    if batch is not None:
        raise folding.ModelError(
            f"the model must take batches of any size, received {shape}: "
            "build it again without a batch size"
        )
    if None not in (height, width) and height != width:
        raise folding.ModelError(
            "the model must take square images, received a height of "
            f"{height} and a width of {width}"
        )
    if channels not in (1, 3):
        raise folding.ModelError(
            "the model's channels must be 1 or 3 (the last axis of its input), "
            f"received {shape}"
        )


def check_labels(model: keras.Model, labels: Sequence[str]) -> None:
    """Raises ValueError unless each class of the model has one line of text."""
    classes = model.outputs[0].shape[-1]
    if len(labels) != classes:
        raise ValueError(
            f"labels must be as many as the model's classes ({classes}), "
            f"received {len(labels)}"
        )
    for label in labels:
        if label.splitlines() != [label]:
            raise ValueError(f"a label must be one line, received {label!r}")


def check_preprocessing(
    model: keras.Model, preprocessing: views.Preprocessing
) -> None:
    """Raises ValueError unless the preprocessing makes the model's input."""
    wanted, given = model.inputs[0].shape[1:], preprocessing.image_shape
    if any(w not in (None, g) for w, g in zip(wanted, given, strict=True)):
        raise ValueError(
            "the preprocessing must return images of the model's input shape, "
            f"{wanted}, received one that returns {given}"
        )
    dtype = model.inputs[0].dtype
    if not _is_float(dtype) and not preprocessing.is_identity:
        raise ValueError(
            f"the model takes images of {dtype}, so the preprocessing must "
            "leave the pixels as they are, 0 to 255; received one that does not"
        )


def check_activations(
    model: keras.Model, image_shape: Sequence[int], batch_size: int
) -> None:
    """Checks the largest activation of a model, before anything is computed.

    A file of two kilobytes can describe activations of any size.

    Args:
        model: The model.
        image_shape: `(height, width, channels)` of an image.
        batch_size: Images that are computed at a time.

    Raises:
        folding.ModelError: If the output of a layer for one image exceeds
            `MAX_ACTIVATION_BYTES`, or for a batch the available memory.
    """
    size, name = _largest_activation(model, image_shape)
    available = memory.available_bytes()
    most = MAX_ACTIVATION_BYTES
    if available is not None:
        most = min(most, available // batch_size)
    if size > most:
        raise folding.ModelError(
            "the output of a layer for one image must have at most "
            f"{most:,} bytes, received {size:,} of {name}"
        )


def _largest_activation(model, image_shape) -> tuple[int, str]:
    """Returns the bytes of the largest output of a layer, and its name."""
    largest = (0, "")

    def called(operation):
        if folding.has_checked_graph(operation):
            return lambda inputs, **_: run(graphs.graph(operation), inputs)

        def call(*arguments, **options):
            nonlocal largest
            outputs = operation(*arguments, **options)
            for output in keras.tree.flatten(outputs):
                sides = [side or 1 for side in output.shape]
                size = math.prod(sides) * tf.as_dtype(output.dtype).size
                largest = max(largest, (size, operation.name))
            return outputs

        return call

    def run(graph, inputs):
        return graph._run_through_graph(keras.tree.flatten(inputs), called)

    (image,) = model.inputs
    run(graphs.graph(model), keras.Input(image_shape, dtype=image.dtype))
    return largest


def input_function(
    model: keras.Model, preprocessing: views.Preprocessing
) -> Callable[[Any], tf.Tensor]:
    """Returns the function from uint8 views to the model's input."""
    dtype = model.inputs[0].dtype
    if _is_float(dtype):
        return preprocessing
    return lambda views: tf.cast(tf.round(preprocessing(views)), dtype)


def _is_float(dtype: str) -> bool:
    return tf.as_dtype(dtype).is_floating


def with_features(model: keras.Model) -> keras.Model:
    """Returns the model with two outputs, features and probabilities.

    The features are the output of the last global pooling. If it is inside a
    nested model, the layers of nested models become the returned model's own.

    Raises:
        folding.ModelError: If the model lacks a global pooling.
    """
    for candidate in (model, _without_nesting(model)):
        pooled = _pooled(candidate)
        if pooled is not None:
            (image,), (output,) = candidate.inputs, candidate.outputs
            return keras.Model(image, [pooled, output])
    names = [layer.name for layer in model.layers[-3:]]
    raise folding.ModelError(
        "the model must have a global pooling before its classifier: the "
        'layer "pool" of a keras_resnet network, a network that was built '
        'with pooling="avg", or a keras.layers.GlobalAveragePooling2D; '
        f"received one whose last layers are {names}"
    )


def _pooled(model: keras.Model) -> Any:
    """The output of the last global pooling that is a vector, or None."""
    by_depth = graphs.graph(model)._nodes_by_depth
    for depth in sorted(by_depth):  # the output has depth 0
        for node in by_depth[depth]:
            if node.is_input or not _is_global_pooling(node.operation):
                continue
            if len(node.outputs[0].shape) == 2:
                return node.outputs[0]
    return None


def _is_global_pooling(operation) -> bool:
    """Whether an operation is a global pooling or a model that ends in one."""
    if folding.has_checked_graph(operation):
        (output, *_) = graphs.graph(operation).outputs
        return _is_global_pooling(output._keras_history.operation)
    return isinstance(operation, _GLOBAL_POOLINGS)


def _without_nesting(model: keras.Model) -> keras.Model:
    """The same function, with the layers of nested models as its own."""

    def called(operation):
        if not folding.has_checked_graph(operation):
            return operation
        graph = graphs.graph(operation)
        return lambda inputs, **_: run(graph, inputs)

    def run(graph, inputs):
        inputs = [
            x if x.dtype == like.dtype else keras.ops.cast(x, like.dtype)
            for x, like in zip(
                keras.tree.flatten(inputs), graph.inputs, strict=True
            )
        ]
        return graph._run_through_graph(inputs, called)

    (image,) = model.inputs
    image = keras.Input(image.shape[1:], dtype=image.dtype)
    return keras.Model(image, run(graphs.graph(model), image))
