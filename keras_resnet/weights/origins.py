"""Who wrote a file of weights, and which function its names leave open.

A file of torchvision and one of the authors' Caffe weights can have the same
names and shapes, and another stride. The published files are recognized by
their hash. Other files get the details of the most likely source, and a doubt
for each argument that they leave open.
"""

import dataclasses
import os
import re
import zipfile
from typing import Any

from keras_resnet import names
from keras_resnet.specs import Spec
from keras_resnet.weights import archives
from keras_resnet.weights import bounds
from keras_resnet.weights import cards
from keras_resnet.weights import downloads
from keras_resnet.weights import published
from keras_resnet.weights import source_names
from keras_resnet.weights.bounds import Arrays
from keras_resnet.weights.model_paths import OWN_LAYER
from keras_resnet.weights.model_paths import without_only_network
from keras_resnet.weights.published import Card
from keras_resnet.weights.published import Details

_CAFFE = (
    "bottleneck_stride='1x1' if they were converted from the authors' Caffe"
)
_MOST_REASON = 400  # letters of an error of zipfile

_TORCH = "bottleneck_stride='3x3' as in torchvision and timm"
_PYTORCHCV = "bottleneck_stride='3x3' for its networks that end in b"


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where weights come from.

    Attributes:
        card: Their card.
        decided: Arguments that the weights decide, by name.
        doubts: Alternatives to an argument of `decided`, in words.
        note: A sentence that the caller should read, or "".
        is_published: Whether the weights are those of a network by name, so
            that its unit and shortcut are known too.
    """

    card: Card
    decided: dict[str, Any]
    doubts: dict[str, str] = dataclasses.field(default_factory=dict)
    note: str = ""
    is_published: bool = False


def of_row(row: Card, spec: Spec) -> Origin:
    """Returns the origin of published weights."""
    decided = dataclasses.asdict(row.details)
    if not spec.bottleneck:
        del decided["bottleneck_stride"]
    return Origin(row, decided, is_published=True)


def of_file(path: str | os.PathLike, arrays: Arrays, spec: Spec) -> Origin:
    """Returns the origin of a file, by its hash, else by its names.

    Args:
        path: The file.
        arrays: Its arrays, by their names in the file.
        spec: The network that gets them.

    Raises:
        ValueError: If it is a published file of another network.
    """
    path = os.fspath(path)
    digest = downloads.digest_of(path)
    row = published.by_digest(digest) or published.by_digest(
        downloads.digest_of(path, "md5"), "md5"
    )
    if row is not None:
        _check_network(path, row, spec)
        return of_row(row, spec)
    row = published.by_file_name(path)
    if row is not None and row.network == spec.name:
        origin = of_row(row, spec)
        card = Card(os.path.basename(path), spec.name, row.source)
        card = dataclasses.replace(
            card,
            digest=f"sha256:{digest}",
            details=row.details,
            preparation=row.preparation,
        )
        kind, _, digits = row.digest.partition(":")
        note = (
            f"{path} has the name of published weights, but another hash: the "
            f"{kind} must start with {digits[:8]}, received "
            f"{downloads.digest_of(path, kind)[:8]}. It is read as a file of "
            f"{row.source}"
        )
        return Origin(card, origin.decided, note=note)
    origin = _by_names(path, arrays, spec)
    # The card that a file of Keras keeps is of the weights that it began with.
    card = origin.card
    if not card.digest:
        card = dataclasses.replace(card, digest=f"sha256:{digest}")
    return dataclasses.replace(origin, card=card)


def _check_network(path: str, row: Card, spec: Spec) -> None:
    if row.network != spec.name:
        raise ValueError(
            f"{path} has the published weights of {row.network} ({row.name}, "
            f"{row.source}). Received: {spec.name}"
        )


def _by_names(path: str, arrays: Arrays, spec: Spec) -> Origin:
    layers = _layers(arrays)
    decided: dict[str, Any] = {}
    doubts: dict[str, str] = {}
    first_norm = _first_norm(arrays)
    if spec.unit == "pre_activation":
        decided["first_norm"] = first_norm
    name = os.path.basename(path)
    if any("conv1_conv" in layer for layer in layers):
        decided |= {"padding": "symmetric", "batch_norm_epsilon": 1.001e-5}
        if spec.bottleneck:
            decided["bottleneck_stride"] = "1x1"
        card = Card(name, spec.name, "keras.applications")
        card = dataclasses.replace(card, preparation=published.CAFFE)
    elif any(OWN_LAYER.search(f"{layer}/") for layer in layers):
        stored, kept = _of_own_file(path, arrays)
        if not spec.bottleneck:
            stored.pop("bottleneck_stride", None)
        if kept is not None:
            return Origin(kept, stored)
        decided |= stored
        card = Card(name, spec.name, "keras_resnet")
    else:
        source, uses_1x1 = _torch_source(layers, spec)
        card = Card(name, spec.name, source)
        decided |= {"padding": "symmetric", "batch_norm_epsilon": 1e-5}
        if spec.bottleneck:
            decided["bottleneck_stride"] = "1x1" if uses_1x1 else "3x3"
            doubts["bottleneck_stride"] = _CAFFE
            if source == "pytorchcv":
                doubts["bottleneck_stride"] = _PYTORCHCV if uses_1x1 else _CAFFE
        if not any("projection" in path for path in _paths(arrays)):
            decided["zeros"] = "both"
            if source != "torch code for CIFAR":
                doubts["zeros"] = (
                    "shortcut=\"A(zeros='end')\" as in fb.resnet.torch"
                )
    known = {f.name for f in dataclasses.fields(Details)} & set(decided)
    details = dataclasses.replace(
        Details(), **{field: decided[field] for field in known}
    )
    return Origin(dataclasses.replace(card, details=details), decided, doubts)


def _layers(arrays: Arrays) -> set[str]:
    return {re.split(r"[/.](?=[^/.]*$)", name)[0] for name in arrays}


def _torch_source(layers: set[str], spec: Spec) -> tuple[str, bool]:
    """Returns the source of torch names, and whether its 1x1 one strides.

    Only pytorchcv's bottlenecks for ImageNet stride there.
    """
    text = "\n".join(sorted(layers))
    if "encoder.stages." in text:
        return "transformers", False
    if "init_block" in text:
        return "pytorchcv", spec.stem == "imagenet"
    if re.search(r"(?m)\.shortcut\.\d$|(?:^|\.)linear$", text):
        return "torch code for CIFAR", False
    return "torchvision", False


def _paths(arrays: Arrays) -> Arrays:
    """Returns the arrays by the paths of this package, as far as known."""
    found = source_names.translated(arrays, set())
    names = without_only_network(found)
    return {names[path]: array for path, array in found.items()}


def _first_norm(arrays: Arrays) -> str:
    """Returns where a pre-activation network normalizes first."""
    paths = _paths(arrays)
    layers = {path.rpartition("/")[0] for path in paths}
    kernel = paths.get("stem_conv/kernel", paths.get("stem_conv/0"))
    gamma = paths.get("stem_norm/gamma")
    has_stem = "stem_norm" in layers and (
        gamma is None or kernel is None or gamma.shape[0] == kernel.shape[-1]
    )
    if "stage1_unit1/norm1" not in layers:
        return "stem"
    if has_stem:
        return "both"
    projects = "stage1_unit1/shortcut/projection" in layers
    is_small = kernel is not None and kernel.shape[0] == 3
    return "stem" if projects and is_small else "unit"


def _of_own_file(
    path: str, arrays: Arrays
) -> tuple[dict[str, Any], Card | None]:
    """Returns the arguments and the card of a network in a file of Keras.

    A `.weights.h5` file has the arguments, a `.keras` file has both. Only a
    file with one network decides.

    Raises:
        ValueError: If they are damaged.
    """
    try:
        return _arguments_and_card(path, arrays)
    except Exception as error:  # zipfile raises nearly everything
        reason = names.escaped(" ".join(str(error)[:_MOST_REASON].split()))
        raise ValueError(
            f"{path} cannot be read as weights: "
            f"{reason or type(error).__name__}"
        ) from error


def _arguments_and_card(path, arrays):
    if not zipfile.is_zipfile(path):
        found = [
            array
            for name, array in arrays.items()
            if name.endswith(f"/{cards.NETWORK}")
        ]
        stored = cards.parse_network(found[0]) if len(found) == 1 else {}
        known = {field.name for field in dataclasses.fields(Details)}
        return {n: v for n, v in stored.items() if n in known}, None
    with (
        open(path, "rb") as file,
        archives.opened(file, os.path.getsize(path)) as archive,
    ):
        if "config.json" not in archive.namelist():
            return {}, None
        text = archives.read(archive, "config.json", bounds.MOST_CONFIG_BYTES)
    found: dict[str, set[Any]] = {}
    kept: list[Card] = []
    pending: list[Any] = [bounds.parse_json(text)]
    while pending:
        value = pending.pop()
        if isinstance(value, list):
            pending += value
        if not isinstance(value, dict):
            continue
        pending += value.values()
        config = value.get("config")
        registered = str(value.get("registered_name", ""))
        if not registered.startswith("keras_resnet>") or not isinstance(
            config, dict
        ):
            continue
        for name in (
            *("bottleneck_stride", "padding", "batch_norm_epsilon", "zeros"),
        ):
            if isinstance(config.get(name), str | float):
                found.setdefault(name, set()).add(config[name])
        if isinstance(config.get("card"), dict):
            kept.append(Card.from_json(config["card"]))
    decided = {
        name: next(iter(values))
        for name, values in found.items()
        if len(values) == 1
    }
    return decided, kept[0] if len(kept) == 1 else None
