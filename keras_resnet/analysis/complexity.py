"""Parameters, multiply-adds and activations of a network, layer by layer.

As in [1, Sec. 3.3 and Table 1], one multiply-add of a convolution or dense
layer counts as one FLOP. Normalization, pooling and additions are not counted.
[1] is He et al. 2016, "Deep Residual Learning for Image Recognition".
"""

import contextlib
import math
import re
from collections.abc import Callable
from collections.abc import Iterator
from typing import Any

import keras

from keras_resnet import graphs
from keras_resnet import specs
from keras_resnet.layers import Convolution
from keras_resnet.layers import NoShortcut
from keras_resnet.layers import Unit
from keras_resnet.layers import UnitStack
from keras_resnet.weights.model_paths import unit_names

COUNTS = (
    "parameters",
    "moving_statistics",
    "multiply_adds",
    "activation_bytes",
)

#: The networks that [1, Sec. 3.3 and Table 3] compares with. `printed` is the
#: number of multiply-adds in `source`. GoogLeNet is counted without the side
#: branches of its training. PReLU-net has a slope for each channel of a
#: rectifier.
OTHERS: tuple[dict[str, Any], ...] = (
    {
        "name": "vgg16",
        "parameters": 138_357_544,
        "multiply_adds": 15_346_630_656,
        "printed": 15.3e9,
        "source": "[1, Sec. 4.1], without the three dense layers",
    },
    {
        "name": "vgg19",
        "parameters": 143_667_240,
        "multiply_adds": 19_632_062_464,
        "printed": 19.6e9,
        "source": "[1, Sec. 3.3]",
    },
    {
        "name": "googlenet",
        "parameters": 6_998_552,
        "multiply_adds": 1_582_671_872,
        "printed": 1.5e9,
        "source": "Szegedy et al. 2015, Going Deeper with Convolutions, Sec. 1",
    },
    {
        "name": "prelu_net",
        "parameters": 330_623_944,
        "multiply_adds": 53_463_130_112,
        "printed": 53.0e9,
        "source": "He et al. 2015, Delving Deep into Rectifiers, Table 3, "
        "model C",
    },
)

_KINDS = {
    "convolution": (Convolution, keras.layers.Conv2D),
    "normalization": (keras.layers.BatchNormalization,),
    "addition": (keras.layers.Add,),
    "pooling": (
        keras.layers.AveragePooling2D,
        keras.layers.GlobalAveragePooling2D,
        keras.layers.GlobalMaxPooling2D,
        keras.layers.MaxPooling2D,
    ),
    "dense": (keras.layers.Dense,),
}
_BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}

# The shortcuts with a 1x1 convolution in every unit.
_ALWAYS_CONVOLVES = (
    "C",
    "convolution",
    "exclusive_gating",
    "shortcut_only_gating",
)


def complexity(
    model: keras.Model, input_shape: tuple[int, int, int] | None = None
) -> dict[str, Any]:
    """Counts the parameters, multiply-adds and activations of a network.

    `multiply_adds = k * k * c_in * c_out * height_out * width_out` for a
    convolution with a k x k window from c_in to c_out channels. The counts are
    those of one image.

    Args:
        model: A network of this package, or another functional or sequential
            model of convolutions, normalizations, pooling and dense layers. A
            layer or network that the model calls twice counts twice.
        input_shape: `(height, width, channels)` of the image. It is needed if
            the model leaves the size open, and may differ from the size of the
            model.

    Returns:
        A dict with the `name` of the model, four totals and two lists.

        - `parameters`: Number of parameters, without moving statistics.

        - `moving_statistics`: Number of moving statistics.

        - `multiply_adds`: Number of multiply-adds of convolutions and dense
          layers.

        - `activation_bytes`: Size of the outputs of convolutions,
          normalizations, additions, pooling and dense layers in their compute
          dtypes. A ReLU works in place. Training keeps about this size for an
          image.

        - `stages`: The same counts for the stem, each stage and the top.

        - `layers`: The same counts for each call of a layer, with its `kind`
          and `output_shape`. The first call of a layer has its parameters.

    Raises:
        ValueError: If the model is not a graph, the size of the image is open
            or does not match, or a layer with a kernel is not a convolution or
            dense layer.

    Example:

    >>> import keras_resnet
    >>> report = complexity(keras_resnet.ResNet20())
    >>> report["parameters"], report["multiply_adds"]
    (269722, 40551040)
    """
    layers, _ = _model_layers(model, _images(model, input_shape), set())
    stages: dict[str, dict[str, Any]] = {}
    for layer in layers:
        match = re.search(r"(?:^|/)(stem|stage\d+)_", layer["name"])
        name = match[1] if match else "top"
        stages.setdefault(name, {"name": name, **dict.fromkeys(COUNTS, 0)})
        for count in COUNTS:
            stages[name][count] += layer[count]
    return {
        "name": model.name,
        **{count: sum(layer[count] for layer in layers) for count in COUNTS},
        "stages": list(stages.values()),
        "layers": layers,
    }


def spec_multiply_adds(
    spec: specs.Spec,
    image_size: int,
    classes: int,
    shortcut: str,
    bottleneck_stride: str = "1x1",
) -> int:
    """Counts the multiply-adds of a network by its spec, without building it.

    The result is that of `complexity` for square images of three channels.

    Args:
        spec: The row of the network.
        image_size: Height and width of the image, in pixels.
        classes: Number of classes.
        shortcut: Name of the shortcut, a key of `layers.SHORTCUTS`.
        bottleneck_stride: As in `keras_resnet.resnet`.

    >>> from keras_resnet import MODELS
    >>> spec_multiply_adds(MODELS["resnet20"], 32, 10, "A")
    40551040
    """
    channels, kernel, size = spec.filters[0], 3, image_size
    if spec.stem == "imagenet":
        kernel, size = 7, _halved(size)
    total = kernel**2 * 3 * channels * size**2
    if spec.stem == "imagenet":
        size = _halved(size)  # the pooling
    for stage, (units, filters) in enumerate(
        zip(spec.units, spec.filters, strict=True)
    ):
        for unit in range(units):
            strides = stage > 0 and unit == 0
            before, size = size, _halved(size) if strides else size
            if spec.bottleneck:
                inside, outputs = spec.width * filters, 4 * filters
                first = before if bottleneck_stride == "3x3" else size
                total += channels * inside * first**2
                total += (9 * inside + outputs) * inside * size**2
            else:
                outputs = filters
                total += 9 * (channels + outputs) * outputs * size**2
            # A gate is a 1x1 convolution in every unit, as a projection is.
            if shortcut in _ALWAYS_CONVOLVES or (
                shortcut == "B" and (strides or channels != outputs)
            ):
                total += channels * outputs * size**2
            channels = outputs
    return total + channels * classes


def _halved(size):
    return -(-size // 2)


def table(report: dict[str, Any], by: str = "stages") -> str:
    """Formats a report of `complexity`, with one line for each stage or layer.

    Args:
        report: Result of `complexity`.
        by: `"stages"` or `"layers"`.

    Returns:
        Lines with aligned columns. The last line is the total.

    Raises:
        ValueError: If `by` is unknown.

    Example:

    >>> import keras_resnet
    >>> print(table(complexity(keras_resnet.ResNet20())))
    resnet20  parameters  multiply-adds  activations, MB
    stem             464        442,368             0.13
    stage1        14,016     14,155,776             0.98
    stage2        51,072     12,976,128             0.49
    stage3       203,520     12,976,128             0.25
    top              650            640             0.00
    total        269,722     40,551,040             1.85
    """
    if by not in ("stages", "layers"):
        raise ValueError(f"by must be 'stages' or 'layers', received {by!r}")
    rows = [[report["name"], "parameters", "multiply-adds", "activations, MB"]]
    for part in [*report[by], {**report, "name": "total"}]:
        megabytes = part["activation_bytes"] / 1e6
        rows.append(
            [
                part["name"],
                f"{part['parameters']:,}",
                f"{part['multiply_adds']:,}",
                f"{megabytes:.2f}",
            ]
        )
    return columns(rows)


def comparison(reports: list[dict[str, Any]]) -> str:
    """Formats the costs of networks beside those of `OTHERS` [1, Sec. 3.3].

    Args:
        reports: Results of `complexity`, one for each network.

    Returns:
        Lines with aligned columns, sorted by multiply-adds.
    """
    rows = [["network", "parameters, M", "multiply-adds, G"]]
    for report in sorted(
        [*reports, *OTHERS], key=lambda report: report["multiply_adds"]
    ):
        millions = report["parameters"] / 1e6
        billions = report["multiply_adds"] / 1e9
        rows.append([report["name"], f"{millions:.1f}", f"{billions:.2f}"])
    return columns(rows)


def columns(rows: list[list[str]]) -> str:
    """Formats rows of text as lines with aligned columns.

    The first column is aligned to the left, the others to the right.

    >>> print(columns([["a", "10"], ["bcd", "9"]]))
    a    10
    bcd   9
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )


Shape = tuple[int | None, ...]


def _images(model: keras.Model, input_shape: Shape | None) -> list:
    """Returns the inputs of a model, with the size of `input_shape` if set."""
    inputs = graphs.graph(model).inputs
    if input_shape is not None:
        if len(inputs) != 1:
            raise ValueError(
                "input_shape must be None for a model of several inputs, "
                f"received {input_shape} for the {len(inputs)} of "
                f"{model.name!r}"
            )
        channels_first = keras.config.image_data_format() == "channels_first"
        channels = 0 if channels_first else -1
        shape, wanted = tuple(input_shape), inputs[0].shape[1:]
        if len(shape) != len(wanted) or (
            wanted[channels] not in (None, shape[channels])
        ):
            raise ValueError(
                "input_shape must have the dimensions and the channels of the "
                f"model's image, {tuple(wanted)}, received {input_shape}"
            )
        inputs = [keras.KerasTensor((None, *shape), inputs[0].dtype)]
    for image in inputs:
        if None in image.shape[1:]:
            raise ValueError(
                f"{model.name!r} leaves the size of its image open: give "
                "input_shape=(height, width, channels), such as (224, 224, 3)"
            )
    return inputs


def _model_layers(model, inputs, called, prefix="") -> tuple[list[dict], Any]:
    """Returns the counts of all calls of a model, and the outputs.

    Args:
        model: A model with a graph.
        inputs: Inputs of any size, also of another size than in the graph.
        called: Layers that were called before. This function adds to it.
        prefix: Names of the outer models.
    """
    rows: list[dict] = []

    def counted(operation):
        def call(*args, **kwargs):
            if isinstance(operation, keras.Layer):
                # Keras checked only the size of the graph.
                first = (*args, *kwargs.values())[0]
                operation._assert_input_compatibility(first)
            new, outputs = _layers(
                operation, prefix + operation.name, args, kwargs, called
            )
            rows.extend(new)
            return outputs

        return call

    outputs = graphs.graph(model)._run_through_graph(
        inputs, operation_fn=counted
    )
    return rows, outputs


def _layers(layer, name, args, kwargs, called) -> tuple[list[dict], Any]:
    """Returns the counts of a call of a layer, and its outputs."""
    if graphs.has_graph(layer):
        first = (*args, *kwargs.values())[0]
        return _model_layers(layer, first, called, f"{name}/")
    outputs = layer.compute_output_spec(*args, **kwargs)
    if not isinstance(layer, keras.Layer):
        return [], outputs  # a function of keras.ops, without weights
    if isinstance(layer, UnitStack):
        unit = _unit_layers(layer.pattern(), "", args[0], set())
        rows = [
            {**row, "name": name.removesuffix(layer.name) + unit_name + part}
            for unit_name in unit_names(layer)
            for row in unit
            for part in [row["name"]]
        ]
    elif isinstance(layer, Unit):
        rows = _unit_layers(layer, name, args[0], called)
    else:
        rows = _parts(layer, name, args, kwargs, called)
        inner = {
            id(weight)
            for part in layer._flatten_layers(include_self=False)
            for weight in part.weights
        }
        own = [weight for weight in layer.weights if id(weight) not in inner]
        kind = _kind(layer)
        if kind != "other":
            rows.append(_count(layer, name, kind, own, outputs.shape))
        elif own:
            rows.append(_count(layer, name, kind, own))
    if layer in called:  # its weights count once
        for row in rows:
            row["parameters"] = row["moving_statistics"] = 0
    called.add(layer)
    return rows, outputs


def _unit_layers(unit: Unit, name: str, x, called) -> list[dict]:
    """Returns the counts of the convolutions, the shortcut and the addition."""
    rows: list[dict] = []

    def add(layer, part, *args):
        new, outputs = _layers(layer, f"{name}/{part}", args, {}, called)
        rows.extend(new)
        return outputs

    y = x
    for convolution, norm in unit.pairs():
        before, y = y, add(convolution, convolution.name, y)
        if norm is not None:
            add(norm, norm.name, before if unit.activates_first else y)
    add(unit.shortcut, "shortcut", x, y)
    if not isinstance(unit.shortcut, NoShortcut):
        rows.append(_count(unit, f"{name}/addition", "addition", [], y.shape))
    return rows


def _parts(layer, name, args, kwargs, called) -> list[dict]:
    """Returns the counts of the layers that a layer calls, for each call."""
    parts = layer._flatten_layers(include_self=False, recursive=False)
    if not parts:
        return []
    calls: list[tuple] = []

    def recorded(part, call):
        def record(*args, **kwargs):
            calls.append((part, _specs(args), _specs(kwargs)))
            return call(*args, **kwargs)

        return record

    with contextlib.ExitStack() as stack:
        for part in parts:
            stack.enter_context(called_as(part, recorded(part, part.call)))
        # The batch is one image. JAX traces a batch of open size several times.
        args, kwargs = keras.tree.map_structure(_of_one_image, (args, kwargs))
        keras.Operation.compute_output_spec(layer, *args, **kwargs)
    for part in parts:
        if part.weights and not any(part is call[0] for call in calls):
            raise ValueError(
                f"the multiply-adds of {name}, a {type(layer).__name__}, "
                f"cannot be counted: it does not call its layer {part.name!r}"
            )
    return [
        row
        for part, args, kwargs in calls
        for row in _layers(part, f"{name}/{part.name}", args, kwargs, called)[0]
    ]


@contextlib.contextmanager
def called_as(layer: keras.Layer, call: Callable) -> Iterator[None]:
    """Replaces the `call` of a layer by another function, in a context."""
    layer.call = call
    try:
        yield
    finally:
        del layer.call


def _of_one_image(x):
    if isinstance(x, keras.KerasTensor):
        return keras.KerasTensor((1, *x.shape[1:]), x.dtype)
    return x


def _specs(arguments):
    return keras.tree.map_structure(
        lambda x: (
            keras.KerasTensor(
                tuple(x.shape), keras.backend.standardize_dtype(x.dtype)
            )
            if keras.ops.is_tensor(x)
            else x
        ),
        arguments,
    )


def _kind(layer: keras.Layer) -> str:
    kinds = [k for k, types in _KINDS.items() if isinstance(layer, types)]
    return kinds[0] if kinds else "other"


def _count(
    layer: keras.Layer,
    name: str,
    kind: str,
    weights: list,
    output_shape: Shape | None = None,
) -> dict[str, Any]:
    values = math.prod(output_shape[1:]) if output_shape else 0  # type: ignore
    row = {
        "name": name,
        "kind": kind,
        "output_shape": output_shape and output_shape[1:],
        **dict.fromkeys(COUNTS, 0),
        "activation_bytes": values * _BYTES[layer.compute_dtype],
    }
    for weight in weights:
        moving = weight.name.startswith("moving_")
        count = "moving_statistics" if moving else "parameters"
        row[count] += math.prod(weight.shape)
        if weight.name == "kernel":
            if kind not in ("convolution", "dense"):
                raise ValueError(
                    f"the multiply-adds of {name}, a {type(layer).__name__}, "
                    "cannot be counted: a kernel must be one of a Conv2D or "
                    "Dense layer"
                )
            # Each output value needs one for each weight of its channel.
            row["multiply_adds"] = values * math.prod(weight.shape[:-1])
    return row
