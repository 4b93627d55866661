"""Parameters, multiply-adds and activations of a network, layer by layer.

[1] He et al. 2016, "Deep Residual Learning for Image Recognition", counts one
multiply-add of a convolution or dense layer as one FLOP, and nothing for
normalization, pooling and additions (Sec. 3.3 and Table 1); so does this.
"""

import math
import re
from collections.abc import Iterator
from typing import Any

import keras

from keras_resnet.layers import Convolution
from keras_resnet.layers import NoShortcut
from keras_resnet.layers import Unit
from keras_resnet.layers import UnitStack
from keras_resnet.weights import unit_names

COUNTS = (
    "parameters",
    "moving_statistics",
    "multiply_adds",
    "activation_bytes",
)

#: The nets that [1, Sec. 3.3 and Table 3] compares with; `printed` are their
#: multiply-adds in `source`. GoogLeNet is without the side branches of its
#: training. PReLU-net has a slope for each channel of a rectifier.
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


def complexity(
    model: keras.Model, input_shape: tuple[int, int, int] | None = None
) -> dict[str, Any]:
    """Counts what a network costs, for one image.

    `multiply_adds = k * k * c_in * c_out * height_out * width_out` for a
    convolution with a k x k window from c_in to c_out channels.

    Args:
        model: A network of this package, or another functional model of
            convolutions, normalizations, pooling and dense layers.
        input_shape: `(height, width, channels)` of the image, for a model that
            leaves them open (it is cloned at that size).

    Returns:
        A dict of the model's `name`, four totals and two lists:

        - `parameters`: what is trained, that is without
        - `moving_statistics`: those of batch normalization;
        - `multiply_adds`: those of convolutions and dense layers;
        - `activation_bytes`: size of what convolutions, normalizations,
          additions, pooling and dense layers put out, in their compute dtypes
          (a ReLU works in place): about what training keeps of an image;
        - `stages`: a dict of the same counts for the stem, each stage, the top;
        - `layers`: one for each layer, with its `kind` and `output_shape`.

    Raises:
        ValueError: If the size of the image is open, or a layer has a kernel
            but is no convolution or dense layer.

    Example:

    >>> import keras_resnet
    >>> report = complexity(keras_resnet.ResNet20())
    >>> report["parameters"], report["multiply_adds"]
    (269722, 40551040)
    """
    if input_shape is not None:
        model = _of_size(model, input_shape)
    if None in model.inputs[0].shape[1:]:
        raise ValueError(
            f"{model.name!r} leaves the size of its image open: give "
            "input_shape=(height, width, channels), such as (224, 224, 3)"
        )
    layers = list(_model_layers(model))
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


def table(report: dict[str, Any], by: str = "stages") -> str:
    """A report of `complexity` as text, one line a stage or layer.

    Args:
        report: What `complexity` returned.
        by: `"stages"` or `"layers"`.

    Returns:
        Lines of equal columns; the last one is the total.

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
    """Networks beside those of `OTHERS`, as in [1, Sec. 3.3], as text.

    Args:
        reports: What `complexity` returned for each network.

    Returns:
        Lines of equal columns, from the fewest multiply-adds to the most.
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
    """Rows of text as lines of equal columns, the first one to the left.

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


def _of_size(model: keras.Model, input_shape: Shape) -> keras.Model:
    image = keras.Input(input_shape, name="image")
    return keras.models.clone_model(model, input_tensors=image)


def _model_layers(model: keras.Model, prefix: str = "") -> Iterator[dict]:
    for layer in model.layers:
        if isinstance(layer, keras.layers.InputLayer):
            continue
        tensors = layer.input
        if isinstance(layer, keras.Model):  # called there, and not its own
            tensors = layer._inbound_nodes[-1].input_tensors[0]
        shape = (
            [tensor.shape for tensor in tensors]
            if isinstance(tensors, list)
            else tensors.shape
        )
        yield from _layers(layer, prefix + layer.name, shape)


def _layers(layer: keras.Layer, name: str, shape: Any) -> Iterator[dict]:
    """The counts of a layer and of those inside it, for an input shape."""
    if isinstance(layer, keras.Model):
        if None in layer.inputs[0].shape[1:]:
            layer = _of_size(layer, shape[1:])
        yield from _model_layers(layer, f"{name}/")
        return
    if isinstance(layer, UnitStack):
        prefix = name.removesuffix(layer.name)
        for unit_name in unit_names(layer):
            yield from _layers(layer.pattern(), prefix + unit_name, shape)
        return
    inner = [v for v in vars(layer).values() if isinstance(v, keras.Layer)]
    if isinstance(layer, Unit):
        yield from _unit_layers(layer, name, shape)
    else:
        for sublayer in inner:  # such as a projection and its norm
            yield from _layers(sublayer, f"{name}/{sublayer.name}", shape)
            shape = sublayer.compute_output_shape(shape)
    inside = {id(weight) for sublayer in inner for weight in sublayer.weights}
    own = [weight for weight in layer.weights if id(weight) not in inside]
    kind = _kind(layer)
    if kind != "other":
        yield _count(layer, name, kind, own, layer.compute_output_shape(shape))
    elif own:
        yield _count(layer, name, kind, own)


def _unit_layers(unit: Unit, name: str, x_shape: Shape) -> Iterator[dict]:
    """The convolutions follow one another; the shortcut starts at x."""
    shape = x_shape
    for convolution, norm in unit.pairs():
        yield from _layers(convolution, f"{name}/{convolution.name}", shape)
        before, shape = shape, convolution.compute_output_shape(shape)
        if norm is not None:
            normalized = before if unit.activates_first else shape
            yield from _layers(norm, f"{name}/{norm.name}", normalized)
    yield from _layers(unit.shortcut, f"{name}/shortcut", x_shape)
    if not isinstance(unit.shortcut, NoShortcut):
        yield _count(unit, f"{name}/addition", "addition", [], shape)


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
            # Each value put out takes one for each weight of its channel.
            row["multiply_adds"] = values * math.prod(weight.shape[:-1])
    return row
