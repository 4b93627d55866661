"""Weights on the Hugging Face hub: `hf://OWNER/NAME`, or `...@REVISION`.

The networks of timm whose layout is one of this package are read, with the
preparation, labels and licence of their config.json.
"""

import dataclasses
import os
from pathlib import Path
from typing import Any

from keras_resnet.specs import MODELS
from keras_resnet.specs import Spec
from keras_resnet.weights import bounds
from keras_resnet.weights import downloads
from keras_resnet.weights.published import INTERPOLATIONS
from keras_resnet.weights.published import Card
from keras_resnet.weights.published import Details
from keras_resnet.weights.published import Preparation

PREFIX = "hf://"
_FILES = ("config.json", "model.safetensors")


def is_address(weights: Any) -> bool:
    """Whether a value of `weights` is an address on the hub.

    >>> is_address("hf://timm/resnet18.a1_in1k"), is_address("resnet18.pth")
    (True, False)
    """
    return isinstance(weights, str) and weights.startswith(PREFIX)


def read_card(address: str, spec: Spec) -> Card:
    """Returns the card of weights on the hub.

    Args:
        address: Such as `"hf://timm/resnet18.a1_in1k"`.
        spec: The network that gets the weights.

    Raises:
        ValueError: If `huggingface_hub` is not installed, or the weights are of
            another network or layout.
        downloads.DownloadError: If the configuration cannot be downloaded.
    """
    path = _file(address, "config.json")
    if bounds.regular_size(path) > bounds.MOST_CONFIG_BYTES:
        raise ValueError(f"{path} must be at most {bounds.MOST_CONFIG_BYTES}")
    config = bounds.parse_json(Path(path).read_bytes())
    try:
        return _card(address, spec, config)
    except ValueError as error:
        if address in str(error):
            raise
        raise ValueError(
            f"{address} must have a valid config.json of timm: {error}"
        ) from error
    except (KeyError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(
            f"{address} must have a config.json of timm, received one without "
            f"{error}"
        ) from error


def weights_file(address: str) -> str:
    """Returns the path of the arrays, downloaded once.

    Raises:
        ValueError, downloads.DownloadError: As `read_card`.
    """
    return _file(address, "model.safetensors")


def _card(address: str, spec: Spec, config: dict[str, Any]) -> Card:
    if "architecture" not in config:
        raise ValueError(
            f"{address} must have an architecture of timm in its config.json, "
            f"received {bounds.short(sorted(config))}"
        )
    architecture = str(config["architecture"])
    network = architecture.replace("wide_resnet", "wideresnet")
    if network != spec.name:
        allowed = [n for n, s in MODELS.items() if s.stem == "imagenet"]
        raise ValueError(
            f"{address} is {bounds.short(architecture)[1:-1]}"
            + (
                f": build it by keras_resnet.resnet({network!r}, weights=...)"
                if network in allowed
                else ", a layout that this package does not have"
            )
            + f". Received: {spec.name}"
        )
    entry = config["pretrained_cfg"]
    _, height, width = entry["input_size"]
    crop = float(entry.get("crop_pct", 0.875))
    interpolation = entry.get("interpolation", "bilinear")
    if height != width or not 0.1 <= crop <= 1.0:
        raise ValueError(
            f"{address} must have square images and a crop of 0.1 to 1, "
            f"received {height} x {width} and {crop}"
        )
    # The shapes of the arrays show the first two.
    shown = ("num_classes", "in_chans", "global_pool")
    found = dict(config.get("model_args") or {})
    others = {name: found[name] for name in found if name not in shown}
    pool = found.get("global_pool", config.get("global_pool", "avg"))
    settings: tuple[tuple[str, Any, tuple], ...] = (
        ("interpolation", interpolation, INTERPOLATIONS),
        ("crop_mode", entry.get("crop_mode", "center"), ("center",)),
        ("global_pool", pool, ("avg",)),
        ("model_args", others, ({},)),
    )
    for name, value, choices in settings:
        if value not in choices:
            raise ValueError(
                f"{address} must have the {name} "
                f"{' or '.join(map(str, choices))}, received "
                f"{bounds.short(value)}"
            )
    classes = int(entry.get("num_classes", config.get("num_classes", 0)))
    labels = entry.get("label_names") or config.get("label_names") or ()
    if len(labels) != classes:
        labels = ()
    return Card(
        name=address,
        network=spec.name,
        source="Hugging Face hub",
        licence=str(entry.get("license", config.get("license", ""))),
        url=f"https://huggingface.co/{_repository(address)[0]}",
        details=Details(bottleneck_stride="3x3"),
        preparation=Preparation(
            int(height),
            int(height / crop),
            interpolation,
            tuple(entry["mean"]),
            tuple(entry["std"]),
        ),
        classes=classes,
        label_set="imagenet" if classes == 1000 and not labels else "",
        labels=tuple(map(str, labels)),
    )


def with_digest(card: Card, path: str) -> Card:
    """Returns the card with the hash of the file that was read."""
    digest = f"sha256:{downloads.digest_of(path)}"
    return dataclasses.replace(card, digest=digest)


def _repository(address: str) -> tuple[str, str | None]:
    """Returns the name of a repository, and its revision or None.

    >>> _repository("hf://timm/resnet18.a1_in1k@main")
    ('timm/resnet18.a1_in1k', 'main')
    """
    name, _, revision = address.removeprefix(PREFIX).partition("@")
    parts = name.split("/")
    if (
        len(parts) != 2
        or not all(parts)
        or any(p.startswith(".") for p in parts)
    ):
        raise ValueError(
            "weights on the hub must be hf://OWNER/NAME or "
            f"hf://OWNER/NAME@REVISION, received {address}"
        )
    return name, revision or None


def _file(address: str, file_name: str) -> str:
    name, revision = _repository(address)
    folder = os.environ.get(downloads.FOLDER_VARIABLE)
    if folder and os.path.isfile(os.path.join(folder, name, file_name)):
        return os.path.join(folder, name, file_name)
    try:
        import huggingface_hub
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{address} needs a package: pip install huggingface_hub. "
            + _by_hand(name)
        ) from error
    try:
        return str(
            huggingface_hub.hf_hub_download(name, file_name, revision=revision)
        )
    except Exception as error:  # of its own and of its requests
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise downloads.DownloadError(
            f"{file_name} of {address} cannot be downloaded: {reason}. "
            + _by_hand(name)
        ) from error


def _by_hand(name: str) -> str:
    return (
        f"To get it by hand, save {' and '.join(_FILES)} of "
        f"https://huggingface.co/{name} in {name} inside the folder of "
        f"{downloads.FOLDER_VARIABLE}"
    )
