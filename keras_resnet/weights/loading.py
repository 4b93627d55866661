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
from collections.abc import Iterable
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np

from keras_resnet.layers import UnitStack
from keras_resnet.weights import files
from keras_resnet.weights.files import Arrays

Shapes = dict[str, tuple[int, ...]]
# Each variable with the path of its weight, or of those stacked in it.
Homes = list[tuple[Any, str | list[str]]]


def load(
    model: keras.Model,
    path: str | os.PathLike,
    rename: Callable[[str], str] | None = None,
) -> None:
    """Gives the weights of `model` the values of a file.

    Every array must find its weight, with the same shape, before the first
    weight is changed. Two things are forgiven: a file with a classifier loads
    into a model without one, and biases of convolutions that batch
    normalization follows are folded into its moving mean. The only network of a
    file may have any name in the model; several are matched by their names.

    Args:
        model: A network of this package, or a model with such networks inside.
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
    homes = _homes(model)
    shapes = _shapes(homes)
    needed = 8 * sum(math.prod(shape) for shape in shapes.values())
    arrays = files.read(path, max(files.MOST_BYTES, needed))
    try:
        if rename is not None:
            arrays = _renamed(arrays, rename)
        _check_stacked(arrays)
        arrays = _canonical(arrays, shapes)
        _check_networks(arrays, shapes, is_file=True)
        for network in _networks(shapes):
            classifier = f"{network}predictions/"
            if not any(name.startswith(classifier) for name in shapes):
                arrays = {
                    name: array
                    for name, array in arrays.items()
                    if not name.startswith(classifier)
                }
        _check_fit(arrays, shapes)
    except ValueError as error:
        raise ValueError(
            f"{os.fspath(path)} does not fit the model {model.name!r}: {error}"
        ) from None
    _assign(homes, arrays)


def _check_stacked(arrays: Arrays) -> None:
    """Raises ValueError if stacks hold the weights of too many units."""
    stacked = [array for name, array in arrays.items() if "_stack/" in name]
    if sum(len(array) for array in stacked if array.ndim) > (files.MOST_ARRAYS):
        raise ValueError(
            f"its stacks must have at most {files.MOST_ARRAYS:,} arrays "
            "of units"
        )


def copy(source: keras.Model, target: keras.Model) -> None:
    """Gives the weights of `target` the values of those of `source`.

    The two must be the same network, but may be looped and unrolled. Either may
    be a model with the network inside, under any name; several networks in one
    model are matched by their names.

    Args:
        source: The model to copy from.
        target: The model to copy to.

    Raises:
        ValueError: If a weight of one has no counterpart in the other, or the
            two have several networks with different names.

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
    homes = _homes(target)
    shapes = _shapes(homes)
    try:
        _check_networks(arrays, shapes, is_file=False)
        _check_fit(arrays, shapes)
    except ValueError as error:
        raise ValueError(
            f"{source.name!r} does not fit the model {target.name!r}: {error}"
        ) from None
    _assign(homes, arrays)


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


def _homes(model: keras.Model) -> Homes:
    """Each variable with the path of its weight, or of those stacked in it.

    A weight that several layers share has the path of the first one.
    """
    found: dict[int, tuple[Any, str | list[str]]] = {}
    for variable, paths in _variables(model):
        found.setdefault(id(variable), (variable, paths))
    every = [
        path
        for _, paths in found.values()
        for path in ([paths] if isinstance(paths, str) else paths)
    ]
    twice = [path for path, n in collections.Counter(every).items() if n > 1]
    if twice:
        raise ValueError(
            "model must have one weight of each name, received "
            f"{model.name!r}, which has several called {twice[0]}"
        )
    names = _names(every)
    return [
        (
            variable,
            names[paths]
            if isinstance(paths, str)
            else [names[path] for path in paths],
        )
        for variable, paths in found.values()
    ]


def _variables(
    layer: keras.Layer, path: str = ""
) -> Iterator[tuple[Any, str | list[str]]]:
    """The weights of a layer, by the names of the layers around them.

    Keras' own paths of weights leave out the names of models, so that two
    networks in one model share them.

    Args:
        layer: The layer.
        path: The names down to the layer, each followed by a slash.
    """
    if isinstance(layer, UnitStack):
        prefix = path.removesuffix(f"{layer.name}/")
        pattern = layer.pattern()
        parts = {id(variable): part for variable, part in _variables(pattern)}
        for home, variable in zip(
            layer.stacked, pattern.variables, strict=True
        ):
            part = parts.get(id(variable))  # a random state has none
            if part is not None:
                yield home, [f"{prefix}{u}/{part}" for u in unit_names(layer)]
        return
    inner = (
        layer.layers
        if isinstance(layer, keras.Model)
        else layer._flatten_layers(include_self=False, recursive=False)
    )
    inside = {id(weight) for part in inner for weight in part.weights}
    for weight in layer.weights:
        if id(weight) not in inside:
            yield weight, path + weight.name
    for part in inner:
        yield from _variables(part, f"{path}{part.name}/")


def _shapes(homes: Homes) -> Shapes:
    shapes: Shapes = {}
    for variable, paths in homes:
        if isinstance(paths, str):
            shapes[paths] = tuple(variable.shape)
        else:
            shapes.update(dict.fromkeys(paths, tuple(variable.shape[1:])))
    return shapes


def _assign(homes: Homes, arrays: Arrays) -> None:
    for variable, paths in homes:
        value = (
            arrays[paths]
            if isinstance(paths, str)
            else np.stack([arrays[path] for path in paths])
        )
        variable.assign(keras.ops.cast(value, variable.dtype))


# --- Networks inside models --------------------------------------------------

# What only a network of this package has.
_OWN_LAYER = re.compile(
    r"(?:^|/)(?:stem_conv|stem_norm|stage\d+_(?:unit\d+|stack)|final_norm)/"
)


def _networks(paths: Iterable[str]) -> list[str]:
    """Where networks stand: "" or the names of the models around, "left/".

    >>> _networks(["left/stem_conv/kernel", "right/stem_conv/kernel", "a/b"])
    ['left/', 'right/']
    """
    found: dict[str, None] = {}
    for path in paths:
        match = _OWN_LAYER.search(path)
        if match:
            start = match.start()
            found[path[: start + 1] if path[start] == "/" else ""] = None
    return list(found)


def _names(paths: Iterable[str]) -> dict[str, str]:
    """Names of weights that leave out what the only network is called.

    >>> _names(["left/stem_conv/kernel", "top/kernel"])
    {'left/stem_conv/kernel': 'stem_conv/kernel', 'top/kernel': 'top/kernel'}
    """
    paths = list(paths)
    networks = _networks(paths)
    if len(networks) != 1:
        return {path: path for path in paths}
    (network,) = networks
    inside = {p: p[len(network) :] for p in paths if p.startswith(network)}
    layers = {path.rpartition("/")[0] for path in inside.values()}
    return {
        # A network and the model around it may each have a classifier.
        path: inside.get(
            path, f"../{path}" if path.rpartition("/")[0] in layers else path
        )
        for path in paths
    }


def _check_networks(arrays: Arrays, shapes: Shapes, is_file: bool) -> None:
    """Raises a ValueError unless the networks of both sides have one name."""
    found, wanted = _networks(arrays), _networks(shapes)
    if not found or not wanted or set(found) == set(wanted):
        return
    target = f"target{_getting(wanted[0])}"
    if is_file and len(found) == 1:
        remedy = f"keras_resnet.weights.load({target}, path)"
    else:
        remedy = (
            f"keras_resnet.weights.copy(source{_getting(found[0])}, {target})"
        )
        if is_file:
            remedy += ", where the source has loaded the whole file"
    raise ValueError(
        "the networks of the two must have the same names, received "
        f"{_described(found)} for {_described(wanted)}. Take one at a time: "
        f"{remedy}"
    )


def _described(networks: list[str]) -> str:
    names = [network.rstrip("/") for network in networks if network]
    return f"{len(networks)} ({', '.join(names)})" if names else "1"


def _getting(network: str) -> str:
    """Code that takes a network from a model.

    >>> _getting("left/base/")
    ".get_layer('left').get_layer('base')"
    """
    names = network.rstrip("/").split("/") if network else []
    return "".join(f".get_layer({name!r})" for name in names)


def _within(network: str, others: Iterable[str], entries: dict) -> dict:
    """The entries of one network, by their paths in it."""
    others = [other for other in others if len(other) > len(network)]
    return {
        path[len(network) :]: entry
        for path, entry in entries.items()
        if path.startswith(network) and not path.startswith(tuple(others))
    }


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


def _canonical(arrays: Arrays, shapes: Shapes) -> Arrays:
    """The arrays of a file by the weight paths of this package.

    An array whose name is not known keeps it.
    """
    if any("_preact_bn" in name for name in arrays):
        raise ValueError(
            "keras.applications' V2 networks have another layout than those of "
            "[2], which this package builds"
        )
    arrays = _translated(arrays, {path.rpartition("/")[0] for path in shapes})
    names = _names(arrays)
    arrays = {names[path]: array for path, array in arrays.items()}
    arrays = _unstacked(_with_leaves(arrays, shapes), shapes)
    networks = _networks(arrays)
    for network in networks:
        own = _within(network, networks, arrays)
        for path in own:
            del arrays[network + path]
        own_shapes = _within(network, networks, shapes)
        _move_norms(own, own_shapes)
        _fold_biases(own, own_shapes)
        arrays |= {network + path: array for path, array in own.items()}
    return arrays


def _translated(arrays: Arrays, layers: set[str]) -> Arrays:
    """The arrays of a file with their layers called as here.

    Args:
        arrays: By their names in the file.
        layers: Paths of the model's layers, which are not translated.
    """
    of_keras = {name.rpartition("/")[0] for name in arrays if "/" in name}
    own = {layer for layer in of_keras if _OWN_LAYER.search(f"{layer}/")}
    of_torch = _torch_layers(
        {name.rpartition(".")[0] for name in arrays if "/" not in name}
    )
    translated: Arrays = {}
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
                leaf = _NORM_LEAVES.get(leaf, leaf)
            elif leaf == "weight":
                leaf = "kernel"  # [out, in, height, width] or [out, in]
                array = np.moveaxis(array, (0, 1), (-1, -2))
            path = f"{ours}/{leaf}"
        if path in translated:
            raise ValueError(f"the file has two arrays for {path}")
        translated[path] = array
    return translated


def _torch_layers(layers: Iterable[str]) -> dict[str, str]:
    """The paths here of torch's layers whose names are known.

    Where a network is part of another module, its name stands in front.

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


def _with_leaves(arrays: Arrays, shapes: Shapes) -> Arrays:
    """The arrays with names for the variables that Keras has numbered."""
    counts = collections.Counter(path.rpartition("/")[0] for path in arrays)
    ours = collections.defaultdict(list)
    for path in shapes:
        layer, _, leaf = path.rpartition("/")
        ours[layer].append(leaf)
    named: Arrays = {}
    for path, array in arrays.items():
        layer, _, leaf = path.rpartition("/")
        leaves = ours[layer]
        if len(leaves) != counts[layer]:
            leaves = list(_SAVED_LEAVES.get(counts[layer], ()))
        is_numbered = leaf.isdecimal() and int(leaf) < len(leaves)
        if is_numbered and not layer.endswith("_stack"):
            path = f"{layer}/{leaves[int(leaf)]}"
        if path in named:
            raise ValueError(f"the file has two arrays for {path}")
        named[path] = array
    return named


# The variables of a stack: of units of which stage, and the name or number.
_STACKED = re.compile(r"((?:.*/)?\w+)_stack/(.+)")


def _unstacked(arrays: Arrays, shapes: Shapes) -> Arrays:
    """The arrays of a looped network by the units that they belong to.

    Where Keras numbered the variables of a stack, the model's second unit of
    that stage has their names.
    """
    parts = collections.defaultdict(list)
    for path in shapes:
        stage, unit2, part = path.partition("_unit2/")
        if unit2:
            parts[stage].append(part)
    for stage in parts:  # Keras saves the states after what is trained
        parts[stage].sort(key=lambda part: "/moving_" in part)
    stacked: dict[str, dict[str, np.ndarray]] = collections.defaultdict(dict)
    unstacked: Arrays = {}
    for path, array in arrays.items():
        match = _STACKED.fullmatch(path)
        if match and (
            match[1] in parts or re.search(r"(?:^|/)stage\d+$", match[1])
        ):
            # Random states, whole numbers, are nobody's weights, and the
            # network of the file may have them where this one has none.
            if not (match[2].isdecimal() and array.dtype.kind in "iu"):
                stacked[match[1]][match[2]] = array
        else:
            unstacked[path] = array
    for stage, leaves in stacked.items():
        numbers = sorted((n for n in leaves if n.isdecimal()), key=int)
        # `_check_fit` says what is missing or too much.
        numbered = dict(zip(numbers, parts[stage], strict=False))
        for leaf, array in leaves.items():
            part = re.sub(
                r"^(conv\d|norm\d|shortcut)_(?:(projection|norm|gate)_)?",
                lambda match: (
                    "/".join(part for part in match.groups() if part) + "/"
                ),
                numbered.get(leaf, leaf),
            )
            if part.startswith(("seed", "unit/")):
                continue  # the random state, and the pattern of the units
            for i, value in enumerate(array if array.ndim else [], 2):
                unstacked[f"{stage}_unit{i}/{part}"] = value
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
    networks = _networks(arrays)
    around = [n for n in networks if problems[0].startswith(n)]
    network = max(around, key=len, default="")
    advice = _advice(_within(network, networks, arrays))
    raise ValueError(f"{problems[0]}{more}. {advice}")


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
