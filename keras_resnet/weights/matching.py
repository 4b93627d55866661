"""Arrays of a file, matched with the weights of a model by their paths.

`canonical` gives every array the path of a weight in this package;
`check_networks` and `check_fit` raise an error if the two sides differ.
"""

import collections
import re

from keras_resnet.weights import bounds
from keras_resnet.weights.advice import advice
from keras_resnet.weights.bounds import Arrays
from keras_resnet.weights.model_paths import Shapes
from keras_resnet.weights.model_paths import networks_in
from keras_resnet.weights.model_paths import within
from keras_resnet.weights.model_paths import without_only_network
from keras_resnet.weights.source_names import translated

# The variables of one layer in the order in which Keras saves them.
_SAVED_LEAVES = {
    1: ("kernel",),
    2: ("kernel", "bias"),
    4: ("gamma", "beta", "moving_mean", "moving_variance"),
}

# The variables of a stack: of units of which stage, and the name or number.
_STACKED = re.compile(r"((?:.*/)?\w+)_stack/(.+)")


def canonical(arrays: Arrays, shapes: Shapes) -> Arrays:
    """Returns the arrays of a file by the weight paths of this package.

    An array whose name is not known keeps it.

    Args:
        arrays: By their names in the file.
        shapes: The shapes of the model's weights, by their paths.

    Raises:
        ValueError: If two arrays are of one weight.
    """
    if any("_preact_bn" in name for name in arrays):
        raise ValueError(
            "a file of keras.applications must be of its ResNet50, 101 or 152, "
            "received one of its V2 networks, which have another layout than "
            "those of [2]"
        )
    arrays = translated(arrays, {path.rpartition("/")[0] for path in shapes})
    names = without_only_network(arrays)
    arrays = {names[path]: array for path, array in arrays.items()}
    arrays = _unstacked(_with_leaves(arrays, shapes), shapes)
    networks = networks_in(arrays)
    for network in networks:
        own = within(network, networks, arrays)
        for path in own:
            del arrays[network + path]
        own_shapes = within(network, networks, shapes)
        _move_norms(own, own_shapes)
        _fold_biases(own, own_shapes)
        arrays |= {network + path: array for path, array in own.items()}
    return arrays


def without_classifiers(arrays: Arrays, shapes: Shapes) -> Arrays:
    """Returns the arrays without classifiers that the model does not have."""
    for network in networks_in(shapes):
        classifier = f"{network}predictions/"
        if not any(name.startswith(classifier) for name in shapes):
            arrays = {
                name: array
                for name, array in arrays.items()
                if not name.startswith(classifier)
            }
    return arrays


# --- Keras' numbers ----------------------------------------------------------


def _with_leaves(arrays: Arrays, shapes: Shapes) -> Arrays:
    """Returns the arrays with names for the variables that Keras numbers."""
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
            raise ValueError(
                f"the file must have one array for {path}, received two"
            )
        named[path] = array
    return named


# --- Looped networks ---------------------------------------------------------


def check_stacked(arrays: Arrays) -> None:
    """Raises ValueError if stacks hold the weights of too many units."""
    stacked = [array for name, array in arrays.items() if "_stack/" in name]
    if sum(len(a) for a in stacked if a.ndim) > bounds.MOST_ARRAYS:
        raise ValueError(
            f"its stacks must have at most {bounds.MOST_ARRAYS:,} arrays of "
            "units"
        )


def _unstacked(arrays: Arrays, shapes: Shapes) -> Arrays:
    """Returns the arrays of a looped network by the units they belong to.

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
    stacked: dict[str, Arrays] = collections.defaultdict(dict)
    unstacked: Arrays = {}
    for path, array in arrays.items():
        match = _STACKED.fullmatch(path)
        if match and (
            match[1] in parts or re.search(r"(?:^|/)stage\d+$", match[1])
        ):
            # Random states are integers and not weights. A file may have them
            # although the model needs none.
            if not (match[2].isdecimal() and array.dtype.kind in "iu"):
                stacked[match[1]][match[2]] = array
        else:
            unstacked[path] = array
    for stage, leaves in stacked.items():
        numbers = sorted((n for n in leaves if n.isdecimal()), key=int)
        # `check_fit` names those that are missing or too many.
        numbered = dict(zip(numbers, parts[stage], strict=False))
        for leaf, array in leaves.items():
            part = _part(numbered.get(leaf, leaf))
            if part.startswith(("seed", "unit/")):
                continue  # the random state, and the pattern of the units
            for i, value in enumerate(array if array.ndim else [], 2):
                unstacked[f"{stage}_unit{i}/{part}"] = value
    return unstacked


def _part(variable: str) -> str:
    """Returns the path in a unit of a stack's variable, old or new.

    >>> _part("shortcut_projection_kernel"), _part("conv1/kernel")
    ('shortcut/projection/kernel', 'conv1/kernel')
    """
    return re.sub(
        r"^(conv\d|norm\d|shortcut)_(?:(projection|norm|gate)_)?",
        lambda match: "/".join(part for part in match.groups() if part) + "/",
        variable,
    )


# --- The same function in other words ----------------------------------------


def _move(arrays: Arrays, source: str, target: str) -> None:
    for path in [path for path in arrays if path.startswith(source + "/")]:
        arrays[target + path[len(source) :]] = arrays.pop(path)


def _move_norms(arrays: Arrays, shapes: Shapes) -> None:
    """Moves normalizations whose names are ambiguous.

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
    """Folds biases into moving means.

    BN(x + b) with mean m is BN(x) with mean m - b.
    """
    if "final_norm/gamma" in arrays:  # there the convolution comes last
        return
    for path in [path for path in arrays if path.endswith("/bias")]:
        layer = path.removesuffix("/bias")
        norm = re.sub(r"conv(\d?)$", r"norm\1", layer)
        norm = re.sub(r"/projection$", "/norm", norm)
        mean = f"{norm}/moving_mean"
        if norm != layer and path not in shapes and mean in arrays:
            arrays[mean] = arrays[mean] - arrays.pop(path)


# --- Checks ------------------------------------------------------------------


def check_networks(arrays: Arrays, shapes: Shapes, is_file: bool) -> None:
    """Raises a ValueError unless the networks of both sides have one name.

    Args:
        arrays: The arrays of the source, by their paths.
        shapes: The shapes of the target's weights, by their paths.
        is_file: Whether the source is a file, and not a model.
    """
    found, wanted = networks_in(arrays), networks_in(shapes)
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
    """Returns code that takes a network from a model.

    >>> _getting("left/base/")
    ".get_layer('left').get_layer('base')"
    """
    names = network.rstrip("/").split("/") if network else []
    return "".join(f".get_layer({name!r})" for name in names)


def check_fit(arrays: Arrays, shapes: Shapes) -> None:
    """Raises a ValueError unless every array has a weight of its shape.

    The error names the first weight that differs, and a network that fits.
    """
    # The order of the file may differ from that of the layers.
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
        f"{path} {array.shape} of the file is not in the model"
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
    networks = networks_in(arrays)
    around = [n for n in networks if problems[0].startswith(n)]
    network = max(around, key=len, default="")
    raise ValueError(
        f"{problems[0]}{more}. {advice(within(network, networks, arrays))}"
    )
