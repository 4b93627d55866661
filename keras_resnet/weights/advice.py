"""Advice on files that do not fit: the network that their arrays belong to.

The network is derived from the names and shapes of the arrays alone.
"""

import re
from typing import Any
from typing import NamedTuple

from keras_resnet.specs import MODELS
from keras_resnet.weights.bounds import Arrays


class _Layout(NamedTuple):
    """The fields of a `Spec` that show in the shapes of its weights."""

    units: tuple[int, ...]
    filters: tuple[int, ...]
    bottleneck: bool
    stem: str
    unit: str
    width: int = 1


def advice(arrays: Arrays) -> str:
    """Returns a sentence that names the network to build for some arrays.

    Args:
        arrays: The arrays of one network, by their paths in this package.

    >>> import numpy as np
    >>> advice({"conv.weight": np.zeros(1)})  # doctest: +ELLIPSIS
    'Its names (conv.weight) must be those of a residual network ...'
    """
    layout = _layout(arrays)
    if layout is None:
        names = ", ".join(list(arrays)[:3])
        more = ", ..." if len(arrays) > 3 else ""
        return (
            f"Its names ({names}{more}) must be those of a residual network "
            "that this package knows: translate them by "
            "keras_resnet.weights.load(model, path, rename=function)"
        )
    name = _name(layout)
    size = 224 if layout.stem == "imagenet" else 32
    depth = sum(layout.units) * (3 if layout.bottleneck else 2) + 2
    builder = "resnet"
    arguments = []
    if name:
        builder = name.replace("resnet", "ResNet").replace("v2", "V2")
        builder = builder.replace("wide", "Wide")
    else:
        fields = ", ".join(
            f"{field}={value!r}" for field, value in layout._asdict().items()
        )
        arguments.append(
            f"keras_resnet.Spec('resnet{depth}', {fields}, image_size={size})"
        )
    if "predictions/kernel" in arrays:
        arguments.append(f"classes={arrays['predictions/kernel'].shape[-1]}")
    else:
        arguments.append("include_top=False")
    channels = arrays["stem_conv/kernel"].shape[2]
    if channels != 3:
        arguments.append(f"input_shape=({size}, {size}, {channels})")
    shortcut = _shortcut(arrays, layout)
    arguments.append(f"shortcut={shortcut!r}")
    is_v2 = layout.unit == "pre_activation"
    if is_v2 and "stage1_unit1/norm1/gamma" in arrays:
        where = "both" if "stem_norm/gamma" in arrays else "unit"
        arguments.append(f"first_norm={where!r}")
    sentence = f"It would fit keras_resnet.{builder}({', '.join(arguments)})"
    if shortcut == "A":
        sentence += " (or 'none': neither has weights)"
    elif shortcut == "exclusive_gating":
        sentence += " (or 'shortcut_only_gating': both have the same weights)"
    return sentence


def _layout(arrays: Arrays) -> _Layout | None:
    """Returns the layout of the arrays, or None for no residual network."""
    conv1 = {
        (int(match[1]), int(match[2])): array.shape
        for path, array in arrays.items()
        if (match := re.match(r"stage(\d+)_unit(\d+)/conv1/kernel$", path))
    }
    stages = range(1, 1 + max((stage for stage, _ in conv1), default=0))
    kernel: Any = arrays.get("stem_conv/kernel")
    if kernel is None or any((s, 1) not in conv1 for s in stages):
        return None
    found = {  # units of loops too, whose variables may have other names
        (int(match[1]), int(match[2]))
        for path in arrays
        if (match := re.match(r"stage(\d+)_unit(\d+)/", path))
    }
    filters = tuple(conv1[s, 1][-1] for s in stages)
    conv3: Any = arrays.get("stage1_unit1/conv3/kernel")
    width = 1 if conv3 is None else max(4 * filters[0] // conv3.shape[-1], 1)
    filters = tuple(count // width for count in filters)
    # A pre-activation unit normalizes its input, with the input's channels.
    activates_first = any(
        arrays[f"stage{s}_unit1/norm1/gamma"].shape[0] != filters[s - 1]
        for s in stages
        if f"stage{s}_unit1/norm1/gamma" in arrays
    )
    return _Layout(
        units=tuple(sum(stage == s for stage, _ in found) for s in stages),
        filters=filters,
        bottleneck=conv3 is not None,
        stem="imagenet" if kernel.shape[0] == 7 else "cifar",
        unit="pre_activation" if activates_first else "original",
        width=width,
    )


def _name(layout: _Layout) -> str:
    """Returns the name of the residual network with a layout, or ""."""
    for name, spec in MODELS.items():
        own = _Layout(
            *(spec.units, spec.filters, spec.bottleneck, spec.stem, spec.unit),
            spec.width,
        )
        if own == layout and spec.shortcut != "none":
            return name
    return ""


def _shortcut(arrays: Arrays, layout: _Layout) -> str:
    """Returns the shortcut whose weights are among the arrays."""
    if "stage1_unit1/shortcut/gate/kernel" in arrays:
        return "exclusive_gating"
    projections = sum(path.endswith("projection/kernel") for path in arrays)
    if projections < sum(layout.units):
        return "B" if projections else "A"
    norms = any(path.endswith("shortcut/norm/gamma") for path in arrays)
    is_v2 = layout.unit == "pre_activation"
    return "C" if norms or is_v2 else "convolution"
