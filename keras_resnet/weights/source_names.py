"""Names that other packages give to the layers of residual networks.

A table per source: their name of a layer, and its path in this package.
Numbers in their names:

    {s0} {s1} {s2}    the stage, counted from 0, 1 or 2
    {u0} {u1}         the unit in its stage, counted from 0 or 1
    {k0} {k1}         the convolution in its unit, counted from 0 or 1

In this package's paths, {s}, {u} and {k} are counted from 1.
"""

import functools
import re
from collections.abc import Iterable

import numpy as np

from keras_resnet.weights.bounds import Arrays
from keras_resnet.weights.model_paths import OWN_LAYER

# torchvision, timm, and torch code that follows them.
TORCHVISION = {
    "conv1": "stem_conv",
    "bn1": "stem_norm",
    "layer{s1}.{u0}.conv{k1}": "stage{s}_unit{u}/conv{k}",
    "layer{s1}.{u0}.bn{k1}": "stage{s}_unit{u}/norm{k}",
    "layer{s1}.{u0}.downsample.0": "stage{s}_unit{u}/shortcut/projection",
    "layer{s1}.{u0}.downsample.1": "stage{s}_unit{u}/shortcut/norm",
    "fc": "predictions",
}

# Torch code for CIFAR: akamaster/pytorch_resnet_cifar10 and others that follow
# kuangliu/pytorch-cifar.
CIFAR = {
    "conv1": "stem_conv",
    "bn1": "stem_norm",
    "layer{s1}.{u0}.conv{k1}": "stage{s}_unit{u}/conv{k}",
    "layer{s1}.{u0}.bn{k1}": "stage{s}_unit{u}/norm{k}",
    "layer{s1}.{u0}.shortcut.0": "stage{s}_unit{u}/shortcut/projection",
    "layer{s1}.{u0}.shortcut.1": "stage{s}_unit{u}/shortcut/norm",
    "linear": "predictions",
}

# Single layers of other torch code, such as bearpaw/pytorch-classification.
OTHER_TORCH_CODE = {
    "conv": "stem_conv",
    "bn": "stem_norm",
    "norm": "stem_norm",
    "layer{s1}.{u0}.norm{k1}": "stage{s}_unit{u}/norm{k}",
    "layer{s1}.{u0}.downsample": "stage{s}_unit{u}/shortcut/projection",
    "layer{s1}.{u0}.shortcut": "stage{s}_unit{u}/shortcut/projection",
    "output": "predictions",
    "classifier": "predictions",
}

PYTORCHCV = {
    "init_block": "stem_conv",
    "init_block.conv": "stem_conv",
    "init_block.conv.conv": "stem_conv",
    "init_block.bn": "stem_norm",
    "init_block.conv.bn": "stem_norm",
    "stage{s1}.unit{u1}.body.conv{k1}.conv": "stage{s}_unit{u}/conv{k}",
    "stage{s1}.unit{u1}.body.conv{k1}.bn": "stage{s}_unit{u}/norm{k}",
    "stage{s1}.unit{u1}.identity_conv": "stage{s}_unit{u}/shortcut/projection",
    "stage{s1}.unit{u1}.identity_conv.conv": (
        "stage{s}_unit{u}/shortcut/projection"
    ),
    "stage{s1}.unit{u1}.identity_conv.bn": "stage{s}_unit{u}/shortcut/norm",
    "post_activ.bn": "final_norm",
    "output": "predictions",
}

# transformers, on the Hugging Face hub.
TRANSFORMERS = {
    "embedder.embedder.convolution": "stem_conv",
    "embedder.embedder.normalization": "stem_norm",
    "encoder.stages.{s0}.layers.{u0}.layer.{k0}.convolution": (
        "stage{s}_unit{u}/conv{k}"
    ),
    "encoder.stages.{s0}.layers.{u0}.layer.{k0}.normalization": (
        "stage{s}_unit{u}/norm{k}"
    ),
    "encoder.stages.{s0}.layers.{u0}.shortcut.convolution": (
        "stage{s}_unit{u}/shortcut/projection"
    ),
    "encoder.stages.{s0}.layers.{u0}.shortcut.normalization": (
        "stage{s}_unit{u}/shortcut/norm"
    ),
    "classifier.1": "predictions",
}

# Its classifier has this package's name. The first pattern that matches a name
# is taken, so the projections, numbered 0, precede the other convolutions.
KERAS_APPLICATIONS = {
    "conv1_conv": "stem_conv",
    "conv1_bn": "stem_norm",
    "conv{s2}_block{u1}_0_conv": "stage{s}_unit{u}/shortcut/projection",
    "conv{s2}_block{u1}_0_bn": "stage{s}_unit{u}/shortcut/norm",
    "conv{s2}_block{u1}_{k1}_conv": "stage{s}_unit{u}/conv{k}",
    "conv{s2}_block{u1}_{k1}_bn": "stage{s}_unit{u}/norm{k}",
}

SOURCES = (
    TORCHVISION,
    CIFAR,
    OTHER_TORCH_CODE,
    PYTORCHCV,
    TRANSFORMERS,
    KERAS_APPLICATIONS,
)

# Modules of torch that only hold the network, in front of its names.
_WRAPPERS = re.compile(
    r"(?:(?:module|_orig_mod|model|net|backbone|resnet|features)\.)*"
)

# A torch BatchNorm2d's variables, and ours.
_TORCH_NORM = {
    "weight": "gamma",
    "bias": "beta",
    "running_mean": "moving_mean",
    "running_var": "moving_variance",
}


def translated(arrays: Arrays, layers: set[str]) -> Arrays:
    """Returns the arrays of a file by the paths that layers have here.

    An array whose name is not known keeps it. The kernels of torch are
    transposed.

    Args:
        arrays: By their names in the file, with slashes (Keras) or dots
            (torch).
        layers: Paths of the model's layers, which are not translated.

    Raises:
        ValueError: If two arrays would have one path.
    """
    of_keras = {name.rpartition("/")[0] for name in arrays if "/" in name}
    own = {layer for layer in of_keras if OWN_LAYER.search(f"{layer}/")}
    of_torch = _torch_layers(
        {name.rpartition(".")[0] for name in arrays if "/" not in name}
    )
    found: Arrays = {}
    for name, array in arrays.items():
        layer, separator, leaf = name.rpartition("/" if "/" in name else ".")
        path = name
        if separator == "/":
            prefix, slash, last = layer.rpartition("/")
            ours = _our_layer(last) and prefix + slash + _our_layer(last)
            if ours and ours not in own and layer not in own | layers:
                path = f"{ours}/{leaf}"
        elif leaf == "num_batches_tracked":
            continue
        elif ours := of_torch.get(layer, ""):
            if re.search(r"norm\d?$", ours):
                leaf = _TORCH_NORM.get(leaf, leaf)
            elif leaf == "weight":
                leaf = "kernel"  # [out, in, height, width] or [out, in]
                array = np.moveaxis(array, (0, 1), (-1, -2))
            path = f"{ours}/{leaf}"
        if path in found:
            raise ValueError(
                f"the file must have one array for {path}, received two"
            )
        found[path] = array
    return found


@functools.cache
def _patterns() -> list[tuple[re.Pattern, str]]:
    """Returns the tables of `SOURCES` as regular expressions."""
    patterns = []
    for source in SOURCES:
        for theirs, ours in source.items():
            expression = re.sub(
                r"\\\{([suk])(\d)\\\}", r"(?P<\1\2>\\d+)", re.escape(theirs)
            )
            patterns.append((re.compile(expression), ours))
    return patterns


def _our_layer(layer: str) -> str:
    """Returns the path that a layer has here, or "" if it is not known.

    >>> _our_layer("module.layer2.0.downsample.1")
    'stage2_unit1/shortcut/norm'
    """
    layer = layer[_WRAPPERS.match(layer).end() :]  # type: ignore[union-attr]
    for pattern, ours in _patterns():
        match = pattern.fullmatch(layer)
        if match:
            numbers = {
                key[0]: int(digits) - int(key[1]) + 1
                for key, digits in match.groupdict().items()
            }
            return ours.format(**numbers)
    return ""


def _torch_layers(layers: Iterable[str]) -> dict[str, str]:
    """Returns the paths here of torch's layers whose names are known.

    The name of a module around a network stays in front.

    >>> _torch_layers(["query.conv1", "query.layer1.0.conv1", "other.conv1"])
    {'query.conv1': 'query/stem_conv', \
'query.layer1.0.conv1': 'query/stage1_unit1/conv1'}
    """
    found: dict[str, tuple[str, str]] = {}
    for layer in layers:
        parts = layer.split(".")
        for i in range(len(parts)):
            ours = _our_layer(".".join(parts[i:]))
            if ours:
                prefix = _WRAPPERS.sub("", ".".join([*parts[:i], ""]), 1)
                found[layer] = prefix.replace(".", "/"), ours
                break
    stages = {p for p, ours in found.values() if ours.startswith("stage")}
    stems = {p for p, ours in found.values() if ours == "stem_conv"}
    return {
        layer: prefix + ours
        for layer, (prefix, ours) in found.items()
        # Elsewhere a name such as conv1 says nothing of a stem.
        if not prefix or prefix in stages & stems
    }
