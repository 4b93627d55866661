"""Features of the stages of a network, and freezing for fine-tuning."""

import math
import re
from collections.abc import Sequence

import keras

from keras_resnet import graphs
from keras_resnet.layers import UnitStack
from keras_resnet.layers import normalization
from keras_resnet.layers import units

# The layer that ends a stage: its last unit, or the loop of its last units.
_STAGE_LAYER = re.compile(r"(stage\d+)_(?:unit(\d+)|stack)")


def feature_extractor(model: keras.Model) -> keras.Model:
    """Returns a model with the output of each stage: `stage1`, `stage2`, ...

    The weights are shared with `model`. The last stage of a pre-activation
    network is taken after its final normalization and ReLU. The input is that
    of `model`, with all layers before the network. Other calls of its layers do
    not change the features.

    Args:
        model: A network of this package, or a functional or sequential model
            that calls one network of this package once.

    Returns:
        A `keras.Model` from the same input to a dict of tensors
        `[batch, height, width, channels]`.

    Raises:
        ValueError: If the model does not call exactly one network of this
            package exactly once.

    >>> import keras_resnet
    >>> features = feature_extractor(keras_resnet.ResNet20()).output
    >>> {name: feature.shape[1:] for name, feature in features.items()}
    {'stage1': (32, 32, 16), 'stage2': (16, 16, 32), 'stage3': (8, 8, 64)}
    """
    nodes = graphs.nodes(model)
    stages = _last_layers(nodes)
    inner = [node for node in nodes if _has_stages(node.operation)]
    if not stages and not inner:
        raise ValueError(
            "model must be a network of keras_resnet, with layers named "
            f"stage1_unit1 and so on, received {model.name!r}"
        )
    if bool(stages) + len(inner) > 1:
        names = [model.name] * bool(stages)
        names += [node.operation.name for node in inner]
        raise ValueError(
            "model must call one network of keras_resnet, and call it once, "
            f"received {model.name!r}, which calls {', '.join(names)}; give "
            f"one network, such as model.get_layer({names[-1]!r})"
        )
    if inner:
        call = inner[0].arguments
        extractor = feature_extractor(inner[0].operation)
        outputs = extractor(*call.args, **call.kwargs)
    else:
        outputs = {
            stage: _only_output(nodes, layer, model)
            for stage, layer in stages.items()
        }
        *_, (stage, last) = stages.items()
        unit = last.pattern() if isinstance(last, UnitStack) else last
        final = [
            node.operation
            for node in nodes
            if node.operation.name == "final_relu"
        ]
        if final and isinstance(unit, units.PreActivationUnit):
            outputs[stage] = _only_output(nodes, final[0], model)
    return keras.Model(
        graphs.graph(model).input, outputs, name=f"{model.name}_features"
    )


def _last_layers(nodes) -> dict[str, keras.Layer]:
    """Returns the last layer that is called in each stage."""
    found: dict[str, tuple[float, keras.Layer]] = {}
    for node in nodes:
        match = _STAGE_LAYER.fullmatch(node.operation.name)
        if match:
            number = int(match[2]) if match[2] else math.inf
            if number >= found.get(match[1], (0, None))[0]:
                found[match[1]] = number, node.operation
    return {stage: layer for stage, (_, layer) in found.items()}


def _has_stages(operation) -> bool:
    """Whether an operation is a model with a network of this package inside."""
    if not graphs.has_graph(operation):
        return False
    nodes = graphs.nodes(operation)
    return bool(_last_layers(nodes)) or any(
        _has_stages(node.operation) for node in nodes
    )


def _only_output(nodes, layer, model):
    """Returns the output of a layer, which the model must call once."""
    calls = [node for node in nodes if node.operation is layer]
    if len(calls) > 1:
        raise ValueError(
            "model must call each layer of a network once, received "
            f"{model.name!r}, which calls {layer.name} {len(calls)} times"
        )
    return calls[0].outputs[0]


def freeze(model: keras.Model, but: Sequence[str] = ()) -> None:
    """Freezes all layers of a network except those that are fine-tuned.

    All batch normalizations are in inference mode, in the trainable layers too:
    they normalize by the moving statistics, which do not change. Keras'
    `base(x, training=False)` does not ensure this: in Keras 3.15 `fit`
    overrides it in layers that are not frozen. Compile the model after this
    call. A copy of the model and a `.keras` file keep the frozen layers.

    Args:
        model: A network of this package.
        but: Prefixes of the names of the layers that are trained, such as
            `("stage4", "predictions")`.

    Raises:
        ValueError: If a prefix matches no layer.

    >>> import keras_resnet
    >>> model = keras_resnet.ResNet20()
    >>> freeze(model, but=("stage3_unit3", "predictions"))
    >>> [weight.path for weight in model.trainable_weights]
    ['stage3_unit3/conv1/kernel', 'stage3_unit3/conv2/kernel', \
'predictions/kernel', 'predictions/bias']
    """
    layer_names = [layer.name for layer in model.layers]
    if isinstance(but, str):
        raise ValueError(
            "but must be a tuple of prefixes of names of layers, "
            f"received {but!r}: write but=({but!r},)"
        )
    for prefix in but:
        if not any(name.startswith(prefix) for name in layer_names):
            raise ValueError(
                f"but must have prefixes of names of {model.name!r}'s "
                f"layers ({', '.join(layer_names)}), received {prefix!r}"
            )
    _set_trainable(model, True)
    for layer in model.layers:
        if not layer.name.startswith(tuple(but)):
            _set_trainable(layer, False)
    for layer in model.layers:  # parts shared with a frozen layer are trained
        if layer.name.startswith(tuple(but)):
            _set_trainable(layer, True)
    normalization.freeze(model)


def _set_trainable(layer, value):
    # Keras stops at a layer that has the value, although its parts may not.
    for part in layer._flatten_layers():
        part.trainable = value
