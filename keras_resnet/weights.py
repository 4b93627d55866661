"""Weights from elsewhere, found by their names, loaded whole or not at all.

`load` reads this package's own files, those of keras.applications and torch
checkpoints, and calls every array by the path of a weight here, such as
`stage2_unit1/conv1/kernel`. `weight_files` opens the files. A looped network
holds the weights of many units in one variable; here each of them has the
path that it has in an unrolled one.

What the arrays of a file cannot tell, its network's builder is told:
torchvision's bottlenecks stride on the 3x3 (`bottleneck_stride="3x3"`);
keras.applications normalizes with `batch_norm_epsilon=1.001e-5`; much torch
code for CIFAR pads option A on both sides
(`shortcut=keras_resnet.layers.OptionA(zeros="both")`); networks trained with
TensorFlow's padding need `padding="same"`; pre-activation networks whose first
unit normalizes for its residual alone, `first_norm="unit"`.
"""

import collections
import functools
import math
import os
import re
from collections.abc import Callable
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np

from keras_resnet import weight_files
from keras_resnet.layers import UnitStack
from keras_resnet.weight_files import Arrays

Shapes = dict[str, tuple[int, ...]]


def load(
    model: keras.Model,
    path: str | os.PathLike,
    rename: Callable[[str], str] | None = None,
) -> None:
    """Gives the weights of `model` the values of a file.

    Every array must find its weight, with the same shape, before the first
    weight is changed. Two things are forgiven: a file with a classifier loads
    into a model without one, and biases of convolutions that batch
    normalization follows are folded into its moving mean.

    Args:
        model: A network of this package.
        path: A `.weights.h5`, `.keras` or `.h5` file of such a network; a file
            of `keras.applications`' ResNet50, 101 or 152; or a torch
            checkpoint (`.pth`, `.pt`, `.th`) or `.safetensors` with the names
            of torchvision, of the usual CIFAR code, of pytorchcv or of
            transformers. What a file is shows in its first bytes.
        rename: Function from a name in the file to one that is known, for
            files that call their arrays otherwise.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged, of no known format, or fits another
            network: the message says which weight and which shape, and what to
            build instead.

    Example:

    >>> import os, tempfile, keras_resnet
    >>> trained, model = keras_resnet.ResNet20(), keras_resnet.ResNet20()
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = os.path.join(folder, "trained.weights.h5")
    ...     trained.save_weights(path)
    ...     load(model, path)
    >>> bool((model.weights[0].numpy() == trained.weights[0].numpy()).all())
    True
    """
    shapes = _shapes(model)
    needed = 8 * sum(math.prod(shape) for shape in shapes.values())
    arrays = weight_files.read(path, max(weight_files.MOST_BYTES, needed))
    try:
        if rename is not None:
            arrays = _renamed(arrays, rename)
        _check_stacked(arrays)
        arrays = _canonical(arrays, model)
        if not any(name.startswith("predictions/") for name in shapes):
            arrays = {
                name: array
                for name, array in arrays.items()
                if not name.startswith("predictions/")
            }
        _check_fit(arrays, shapes)
    except ValueError as error:
        raise ValueError(
            f"{os.fspath(path)} does not fit the model {model.name!r}: {error}"
        ) from None
    _assign(model, arrays)


def _check_stacked(arrays: Arrays) -> None:
    """Raises ValueError if stacks hold the weights of too many units."""
    stacked = [array for name, array in arrays.items() if "_stack/" in name]
    if sum(len(array) for array in stacked if array.ndim) > (
        weight_files.MOST_ARRAYS
    ):
        raise ValueError(
            f"its stacks must have at most {weight_files.MOST_ARRAYS:,} arrays "
            "of units"
        )


def copy(source: keras.Model, target: keras.Model) -> None:
    """Gives the weights of `target` the values of those of `source`.

    The two must be the same network, but may be looped and unrolled.

    Args:
        source: The network to copy from.
        target: The network to copy to.

    Raises:
        ValueError: If a weight of one has no counterpart in the other.

    Example:

    >>> import keras_resnet
    >>> looped = keras_resnet.ResNet20(looped=True)
    >>> unrolled = keras_resnet.ResNet20(looped=False)
    >>> copy(looped, unrolled)
    >>> image = keras.ops.ones((1, 32, 32, 3))
    >>> difference = keras.ops.abs(looped(image) - unrolled(image))
    >>> bool(keras.ops.max(difference) < 1e-5)
    True
    """
    arrays: Arrays = {}
    for variable, paths in _homes(source):
        value = keras.ops.convert_to_numpy(variable)
        arrays.update(
            zip(paths, value, strict=True)
            if isinstance(paths, list)
            else [(paths, value)]
        )
    try:
        _check_fit(arrays, _shapes(target))
    except ValueError as error:
        raise ValueError(
            f"{source.name!r} does not fit the model {target.name!r}: {error}"
        ) from None
    _assign(target, arrays)


def imagenet_file(name: str, include_top: bool = True) -> str:
    """The path of keras.applications' published weights, downloaded once.

    Args:
        name: `"resnet50"`, `"resnet101"` or `"resnet152"`.
        include_top: Whether to take the file with the classifier.

    Returns:
        The path in Keras' cache, of a file whose hash was checked.
    """
    # Keras' own module has the address and the hashes; importing it here
    # keeps them out of date nowhere.
    from keras.src.applications import resnet as published

    ending = "" if include_top else "_notop"
    file_name = f"{name}_weights_tf_dim_ordering_tf_kernels{ending}.h5"
    return keras.utils.get_file(
        file_name,
        published.BASE_WEIGHTS_PATH + file_name,
        cache_subdir="models",
        file_hash=published.WEIGHTS_HASHES[name][0 if include_top else 1],
    )


# --- Layouts -----------------------------------------------------------------


def unit_names(stack: UnitStack) -> list[str]:
    """What the units of a stack are called in an unrolled network.

    >>> from keras_resnet.layers import OriginalUnit
    >>> unit_names(UnitStack(OriginalUnit(16), 2, name="stage3_stack"))
    ['stage3_unit2', 'stage3_unit3']
    """
    stage = stack.name.removesuffix("_stack")
    return [f"{stage}_unit{i}" for i in range(2, stack.count + 2)]


def _parts(unit: keras.Layer) -> list[str]:
    """The variables of a unit, as `conv1/kernel`; "seed" for a random state."""
    return [
        "seed"
        if variable.name == "seed_generator_state"
        else variable.path.rpartition(f"{unit.name}/")[2]
        for variable in unit.variables
    ]


def _homes(model: keras.Model) -> list[tuple[Any, str | list[str]]]:
    """Each variable with the path of its weight, or of those stacked in it."""
    stacked: dict[int, list[str]] = {}
    for stack in _stacks(model):
        units = unit_names(stack)
        for home, part in zip(
            stack.stacked, _parts(stack.pattern()), strict=True
        ):
            paths = [f"{unit}/{part}" for unit in units]
            stacked[id(home)] = paths if part != "seed" else []
    homes = [(v, stacked.get(id(v), v.path)) for v in model.weights]
    return [(variable, paths) for variable, paths in homes if paths]


def _stacks(model: keras.Model) -> Iterator[UnitStack]:
    for layer in model.layers:
        if isinstance(layer, UnitStack):
            yield layer
        elif isinstance(layer, keras.Model):
            yield from _stacks(layer)


def _shapes(model: keras.Model) -> Shapes:
    shapes: Shapes = {}
    for variable, paths in _homes(model):
        if isinstance(paths, str):
            shapes[paths] = tuple(variable.shape)
        else:
            shapes.update(dict.fromkeys(paths, tuple(variable.shape[1:])))
    return shapes


def _assign(model: keras.Model, arrays: Arrays) -> None:
    for variable, paths in _homes(model):
        value = (
            arrays[paths]
            if isinstance(paths, str)
            else np.stack([arrays[path] for path in paths])
        )
        variable.assign(keras.ops.cast(value, variable.dtype))


# --- Names -------------------------------------------------------------------

# What others call the layers. {s0} is a stage counted from 0, {s1} from 1, and
# so on; u is the unit, k the convolution. The first name that fits is taken.
_OTHER_NAMES = {
    "stem_conv": (
        "conv1",  # torchvision and the usual CIFAR code
        "conv",
        "init_block",  # pytorchcv
        "init_block.conv",
        "init_block.conv.conv",
        "embedder.embedder.convolution",  # transformers
        "conv1_conv",  # keras.applications
    ),
    "stem_norm": (
        "bn1",
        "bn",
        "norm",
        "init_block.bn",
        "init_block.conv.bn",
        "embedder.embedder.normalization",
        "conv1_bn",
    ),
    "stage{s}_unit{u}/shortcut/projection": (
        "layer{s1}.{u0}.downsample.0",
        "layer{s1}.{u0}.downsample",
        "layer{s1}.{u0}.shortcut.0",
        "layer{s1}.{u0}.shortcut",
        "stage{s1}.unit{u1}.identity_conv",
        "stage{s1}.unit{u1}.identity_conv.conv",
        "encoder.stages.{s0}.layers.{u0}.shortcut.convolution",
        "conv{s2}_block{u1}_0_conv",
    ),
    "stage{s}_unit{u}/shortcut/norm": (
        "layer{s1}.{u0}.downsample.1",
        "layer{s1}.{u0}.shortcut.1",
        "stage{s1}.unit{u1}.identity_conv.bn",
        "encoder.stages.{s0}.layers.{u0}.shortcut.normalization",
        "conv{s2}_block{u1}_0_bn",
    ),
    "stage{s}_unit{u}/conv{k}": (
        "layer{s1}.{u0}.conv{k1}",
        "stage{s1}.unit{u1}.body.conv{k1}.conv",
        "encoder.stages.{s0}.layers.{u0}.layer.{k0}.convolution",
        "conv{s2}_block{u1}_{k1}_conv",
    ),
    "stage{s}_unit{u}/norm{k}": (
        "layer{s1}.{u0}.bn{k1}",
        "layer{s1}.{u0}.norm{k1}",
        "stage{s1}.unit{u1}.body.conv{k1}.bn",
        "encoder.stages.{s0}.layers.{u0}.layer.{k0}.normalization",
        "conv{s2}_block{u1}_{k1}_bn",
    ),
    "final_norm": ("post_activ.bn",),
    "predictions": ("fc", "linear", "output", "classifier", "classifier.1"),
}

# Modules that only hold the network, in front of its names.
_WRAPPERS = re.compile(
    r"(?:(?:module|_orig_mod|model|net|backbone|resnet|features)\.)*"
)

_NORM_LEAVES = {
    "weight": "gamma",
    "bias": "beta",
    "running_mean": "moving_mean",
    "running_var": "moving_variance",
}
# The variables of one layer in the order in which Keras saves them.
_SAVED_LEAVES = {
    1: ("kernel",),
    2: ("kernel", "bias"),
    4: ("gamma", "beta", "moving_mean", "moving_variance"),
}


@functools.cache
def _patterns() -> list[tuple[re.Pattern, str]]:
    """`_OTHER_NAMES` as regular expressions."""
    patterns = []
    for ours, others in _OTHER_NAMES.items():
        for other in others:
            expression = re.sub(
                r"\\\{([suk])(\d)\\\}", r"(?P<\1\2>\\d+)", re.escape(other)
            )
            patterns.append((re.compile(expression), ours))
    return patterns


def _our_layer(layer: str) -> str:
    """The path that a layer has here; empty if its name is not known.

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


def _renamed(arrays: Arrays, rename: Callable[[str], str]) -> Arrays:
    before: dict[str, str] = {}
    for name in arrays:
        new = rename(name)
        if new in before:
            raise ValueError(
                "rename must give every array of the file a name of its own, "
                f"received {new!r} for {before[new]!r} and for {name!r}"
            )
        before[new] = name
    return {new: arrays[name] for new, name in before.items()}


def _canonical(arrays: Arrays, model: keras.Model) -> Arrays:
    """The arrays of a file by the weight paths of this package.

    An array whose name is not known keeps it.
    """
    if any("_preact_bn" in name for name in arrays):
        raise ValueError(
            "keras.applications' V2 networks have another layout than those of "
            "[2], which this package builds"
        )
    saved = _saved_leaves(arrays, model)
    renamed: Arrays = {}
    for name, array in arrays.items():
        layer, separator, leaf = name.rpartition("/" if "/" in name else ".")
        ours = _our_layer(layer)
        if separator == "/":
            if leaf.isdecimal() and int(leaf) < len(saved[layer]):
                leaf = saved[layer][int(leaf)]
            ours = ours or layer
        elif leaf == "num_batches_tracked":
            continue
        elif re.search(r"norm\d?$", ours):
            leaf = _NORM_LEAVES.get(leaf, leaf)
        elif ours and leaf == "weight":
            leaf = "kernel"  # [out, in, height, width] or [out, in]
            array = np.moveaxis(array, (0, 1), (-1, -2))
        path = f"{ours}/{leaf}" if ours else name
        if path in renamed:
            raise ValueError(f"the file has two arrays for {path}")
        renamed[path] = array
    renamed = _unstacked(renamed, model)
    shapes = _shapes(model)
    _move_norms(renamed, shapes)
    _fold_biases(renamed, shapes)
    return renamed


def _saved_leaves(arrays: Arrays, model: keras.Model) -> dict:
    """The variables of each layer of a file in which Keras numbered them."""
    counts = collections.Counter(name.rpartition("/")[0] for name in arrays)
    ours = collections.defaultdict(list)
    for variable in model.weights:
        layer, _, leaf = variable.path.rpartition("/")
        ours[layer].append(leaf)
    return {
        layer: ours[layer]
        if len(ours[layer]) == count
        else _SAVED_LEAVES.get(count, ())
        for layer, count in counts.items()
    }


# A variable of a stack that Keras numbered.
_STACKED = re.compile(r"(\w+_stack)/(\d+)$")


def _unstacked(arrays: Arrays, model: keras.Model) -> Arrays:
    """The arrays of a looped network by the units that they belong to.

    Where Keras numbered the variables of a stack, `model` tells their names.
    """
    unstacked: Arrays = {}
    patterns: dict[str, keras.Layer] = {
        stack.name: stack.pattern() for stack in _stacks(model)
    }
    for layer in model.layers:
        if layer.name.endswith("_unit2"):
            patterns[layer.name.replace("_unit2", "_stack")] = layer
    # Random states, whole numbers, are nobody's weights, and the network of the
    # file may have them where this one has none.
    arrays = {
        path: array
        for path, array in arrays.items()
        if not (_STACKED.match(path) and array.dtype.kind in "iu")
    }
    numbers = collections.defaultdict(list)
    for path in arrays:
        if match := _STACKED.match(path):
            numbers[match[1]].append(int(match[2]))
    numbered = {
        # Keras saves the states after what is trained.
        (stack, str(number)): part
        for stack, pattern in patterns.items()
        for number, part in zip(
            sorted(numbers[stack]),
            sorted(
                (part for part in _parts(pattern) if part != "seed"),
                key=lambda part: "/moving_" in part,
            ),
            strict=False,  # `_check_fit` says what is missing or too much
        )
    }
    for path, array in arrays.items():
        stack, _, leaf = path.partition("/")
        if not stack.endswith("_stack"):
            unstacked[path] = array
            continue
        leaf = numbered.get((stack, leaf), leaf)
        leaf = re.sub(
            r"^(conv\d|norm\d|shortcut)_(?:(projection|norm|gate)_)?",
            lambda match: (
                "/".join(part for part in match.groups() if part) + "/"
            ),
            leaf,
        )
        if leaf.startswith(("seed", "unit/")):
            continue  # the random state, and the pattern of the units
        for i, value in enumerate(array if array.ndim else [], 2):
            unstacked[f"{stack.removesuffix('_stack')}_unit{i}/{leaf}"] = value
    return unstacked


def _move(arrays: Arrays, source: str, target: str) -> None:
    for path in [path for path in arrays if path.startswith(source + "/")]:
        arrays[target + path[len(source) :]] = arrays.pop(path)


def _move_norms(arrays: Arrays, shapes: Shapes) -> None:
    """Puts right what a name alone does not tell of a normalization.

    The one that a file calls "bn1" stands after the stem, or in pre-activation
    networks after the last unit. And the first normalization of a
    pre-activation network is the stem's here; others count it to the first
    unit, which is the same function if that unit projects its input.
    """
    if "stem_conv/kernel" not in arrays:
        return
    kernel = arrays["stem_conv/kernel"]
    gamma = arrays.get("stem_norm/gamma")
    if gamma is not None and gamma.shape[0] != kernel.shape[-1]:
        _move(arrays, "stem_norm", "final_norm")
    first = "stage1_unit1/norm1"
    if (
        f"{first}/gamma" in arrays
        and f"{first}/gamma" not in shapes
        and "stem_norm/gamma" not in arrays
        and "stage1_unit1/shortcut/projection/kernel" in arrays
        and kernel.shape[0] == 3  # no pooling stands between the two
    ):
        _move(arrays, first, "stem_norm")


def _fold_biases(arrays: Arrays, shapes: Shapes) -> None:
    """BN(x + b) with mean m is BN(x) with mean m - b."""
    if "final_norm/gamma" in arrays:  # there the convolution comes last
        return
    for path in [path for path in arrays if path.endswith("/bias")]:
        layer = path.removesuffix("/bias")
        norm = re.sub(r"conv(\d?)$", r"norm\1", layer)
        norm = re.sub(r"/projection$", "/norm", norm)
        mean = f"{norm}/moving_mean"
        if norm != layer and path not in shapes and mean in arrays:
            arrays[mean] = arrays[mean] - arrays.pop(path)


# --- What fits ---------------------------------------------------------------


def _check_fit(arrays: Arrays, shapes: Shapes) -> None:
    """Raises a ValueError that says what does not fit, and what would."""
    # From the first layer to the last, whatever the order in the file.
    arrays = {
        path: arrays[path]
        for path in sorted(
            arrays, key=lambda path: [int(n) for n in re.findall(r"\d+", path)]
        )
    }
    problems = [
        f"{path} has shape {array.shape} in the file and {shapes[path]} in "
        "the model"
        for path, array in arrays.items()
        if path in shapes and array.shape != shapes[path]
    ]
    problems += [
        f"{path} {array.shape} of the file has no place in the model"
        for path, array in arrays.items()
        if path not in shapes
    ]
    problems += [
        f"{path} {shape} of the model is not in the file"
        for path, shape in shapes.items()
        if path not in arrays
    ]
    if not problems:
        return
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    raise ValueError(f"{problems[0]}{more}. {_advice(arrays)}")


# The networks that have a builder, by their stem and whether their units are
# bottlenecks: [1, Table 1 and Sec. 4.2], [2, Sec. 4 and 5].
_DEPTHS = {
    ("cifar", False): (20, 32, 44, 56, 110, 1202),
    ("cifar", True): (164, 1001),
    ("imagenet", False): (18, 34),
    ("imagenet", True): (50, 101, 152, 200),
}


def _advice(arrays: Arrays) -> str:
    """What to build for the arrays of a file."""
    conv1 = {
        (int(match[1]), int(match[2])): array.shape
        for path, array in arrays.items()
        if (match := re.match(r"stage(\d+)_unit(\d+)/conv1/kernel$", path))
    }
    stages = range(1, 1 + max((stage for stage, _ in conv1), default=0))
    if "stem_conv/kernel" not in arrays or any(
        (s, 1) not in conv1 for s in stages
    ):
        names = ", ".join(list(arrays)[:3])
        return (
            f"Its names ({names}, ...) are none of a residual network that "
            "this package knows; keras_resnet.weights.load takes a function "
            "rename= that translates them"
        )
    found = {  # those of loops too, whatever their variables are called
        (int(match[1]), int(match[2]))
        for path in arrays
        if (match := re.match(r"stage(\d+)_unit(\d+)/", path))
    }
    units = tuple(sum(stage == s for stage, _ in found) for s in stages)
    filters = tuple(conv1[s, 1][-1] for s in stages)
    bottleneck = "stage1_unit1/conv3/kernel" in arrays
    depth = sum(units) * (3 if bottleneck else 2) + 2
    # A pre-activation unit normalizes its input, with the input's channels.
    is_v2 = any(
        arrays[f"stage{s}_unit1/norm1/gamma"].shape[0] != filters[s - 1]
        for s in stages
        if f"stage{s}_unit1/norm1/gamma" in arrays
    )
    height, _, channels, _ = arrays["stem_conv/kernel"].shape
    stem, size = ("imagenet", 224) if height == 7 else ("cifar", 32)
    if stem == "imagenet":
        is_of_the_papers = filters == (64, 128, 256, 512)
    else:
        is_of_the_papers = filters == (16, 32, 64) and len({*units}) == 1
    is_of_the_papers &= depth in _DEPTHS[stem, bottleneck]

    arguments = []
    if is_of_the_papers:
        builder = f"ResNet{depth}{'V2' * is_v2}"
    else:
        builder = "resnet"
        unit = "pre_activation" if is_v2 else "original"
        arguments.append(
            f"keras_resnet.Spec('resnet{depth}', units={units}, "
            f"filters={filters}, bottleneck={bottleneck}, stem={stem!r}, "
            f"unit={unit!r}, image_size={size})"
        )
    if "predictions/kernel" in arrays:
        arguments.append(f"classes={arrays['predictions/kernel'].shape[-1]}")
    else:
        arguments.append("include_top=False")
    if channels != 3:
        arguments.append(f"input_shape=({size}, {size}, {channels})")
    shortcut = _shortcut(arrays, len(found), is_v2)
    arguments.append(f"shortcut={shortcut!r}")
    if is_v2 and "stage1_unit1/norm1/gamma" in arrays:
        where = "both" if "stem_norm/gamma" in arrays else "unit"
        arguments.append(f"first_norm={where!r}")
    advice = f"It would fit keras_resnet.{builder}({', '.join(arguments)})"
    if shortcut == "A":
        advice += " (or 'none': neither has weights)"
    elif shortcut == "exclusive_gating":
        advice += " (or 'shortcut_only_gating': the weights are alike)"
    return advice


def _shortcut(arrays: Arrays, units: int, is_v2: bool) -> str:
    """Which shortcut has the weights that a file has."""
    if "stage1_unit1/shortcut/gate/kernel" in arrays:
        return "exclusive_gating"
    projections = sum(path.endswith("projection/kernel") for path in arrays)
    if projections < units:
        return "B" if projections else "A"
    norms = any(path.endswith("shortcut/norm/gamma") for path in arrays)
    return "C" if norms or is_v2 else "convolution"
