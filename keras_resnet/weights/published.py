"""Published weights, each one row: where they are, and how they were trained.

A file of weights lacks the function of a network (`Details`), the preparation
of an image (`Preparation`), the labels and the published accuracy. A row has
them. `list` returns the rows, and docs/pretrained.md shows them.
"""

import dataclasses
import functools
import json
import math
import os
from collections.abc import Iterable
from typing import Any

from keras_resnet import names
from keras_resnet.weights import shipped

#: The name that stands for the default weights of a network.
DEFAULT = "imagenet"

INTERPOLATIONS = ("bilinear", "bicubic")

# Largest ratio of the shorter side to the crop. The resized image of a larger
# one would take gigabytes of memory.
_LARGEST_RATIO = 16


@dataclasses.dataclass(frozen=True)
class Details:
    """Arguments of a network that leave no trace in its arrays.

    Attributes:
        bottleneck_stride: See `keras_resnet.resnet`.
        padding: See `keras_resnet.resnet`.
        first_norm: See `keras_resnet.resnet`.
        batch_norm_epsilon: See `keras_resnet.resnet`.
        zeros: Where option A adds its zero channels (`layers.OptionA`).
    """

    bottleneck_stride: str = "1x1"
    padding: str = "symmetric"
    first_norm: str = "stem"
    batch_norm_epsilon: float = 1e-5
    zeros: str = "end"


@dataclasses.dataclass(frozen=True)
class Preparation:
    """The way from an image of 0 to 255 to the input of a network.

    Resize, crop the centre, then `(x / 255 - mean) / deviation`.

    Attributes:
        image_size: Height and width of the network's input, in pixels.
        shorter_side: Length of the shorter side before the crop, in pixels.
            None resizes the whole image.
        interpolation: `"bilinear"` or `"bicubic"`, with antialiasing.
        mean: Mean of red, green and blue in 0..1.
        deviation: Standard deviation of red, green and blue, or 1.
        order: Order of the channels in the network's input: `"rgb"` or
            `"bgr"`.
        mean_image: Name of a mean image that ships with this package
            (`shipped.mean`), which is subtracted instead of `mean`, or "".
    """

    image_size: int
    shorter_side: int | None
    interpolation: str = "bilinear"
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    deviation: tuple[float, ...] = (0.229, 0.224, 0.225)
    order: str = "rgb"
    mean_image: str = ""

    def __post_init__(self):
        for name in ("mean", "deviation"):
            values = tuple(float(x) for x in getattr(self, name))
            if len(values) != 3 or not all(map(math.isfinite, values)):
                raise ValueError(f"{name} must be 3 numbers, received {values}")
            object.__setattr__(self, name, values)
        if min(self.deviation) <= 0:
            raise ValueError(
                f"deviation must be above 0, received {self.deviation}"
            )
        if self.interpolation not in INTERPOLATIONS:
            raise ValueError(
                f"interpolation must be one of {INTERPOLATIONS}, received "
                f"{self.interpolation!r}"
            )
        if self.order not in ("rgb", "bgr"):
            raise ValueError(
                f"order must be 'rgb' or 'bgr', received {self.order!r}"
            )
        if self.mean_image not in ("", "cifar10"):
            raise ValueError(
                "mean_image must be '' or 'cifar10', received "
                f"{self.mean_image!r}"
            )
        for name in ("image_size", "shorter_side"):
            size = getattr(self, name)
            if name == "shorter_side" and size is None:
                continue
            if type(size) is not int or not 1 <= size <= 2**14:
                raise ValueError(
                    f"{name} must be 1 to {2**14}, received {size!r}"
                )
        if self.shorter_side is not None and not (
            self.image_size
            <= self.shorter_side
            <= _LARGEST_RATIO * self.image_size
        ):
            raise ValueError(
                f"shorter_side must be 1 to {_LARGEST_RATIO} times image_size "
                f"({self.image_size}), received {self.shorter_side}"
            )


@dataclasses.dataclass(frozen=True)
class Card:
    """Facts about weights: their source, function, images and labels.

    Attributes:
        name: Name for `weights=`, or the address or file that they came from.
        network: Name of the network, a key of `keras_resnet.MODELS`.
        source: Who trained them.
        licence: Licence that the source states, or "".
        url: Address of the file, or "" if it ships with this package.
        digest: `"sha256:"` or `"md5:"` and the hash of the file in
            hexadecimal digits, or its first digits.
        megabytes: Size of the file, in 10^6 bytes; 0 if it is not stated.
        details: The function that was trained.
        preparation: The preparation of an image, or None if it is unknown.
        classes: Number of classes of the classifier; 0 without one.
        label_set: `"imagenet"` or `"cifar10"`, or "".
        labels: One for each class, if `label_set` is empty.
        top1: Accuracy that the source states, in percent, or None.
        top5: Accuracy of the best five labels, or None.
        view: The view of a test image for these accuracies.
    """

    name: str
    network: str
    source: str
    licence: str = ""
    url: str = ""
    digest: str = ""
    megabytes: float = 0.0
    details: Details = Details()
    preparation: Preparation | None = None
    classes: int = 0
    label_set: str = ""
    labels: tuple[str, ...] = ()
    top1: float | None = None
    top5: float | None = None
    view: str = ""

    @property
    def file_name(self) -> str:
        """Name of the file, the last part of the address."""
        return self.url.rpartition("/")[2]

    @property
    def is_default(self) -> bool:
        """Whether `weights="imagenet"` means this row."""
        return self.name == _DEFAULTS.get(self.network)

    def to_json(self) -> dict[str, Any]:
        """Returns a JSON object, from which `from_json` makes an equal card."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "Card":
        """Returns the card of `to_json`.

        Raises:
            ValueError: If the fields are not those of a card.
        """
        try:
            fields = dict(fields)
            for name, value in fields.items():
                kinds = _KINDS.get(name, (str,))
                if not isinstance(value, kinds) or isinstance(value, bool):
                    raise TypeError(f"{name} must be of {kinds}")
            details = Details(**fields.pop("details"))
            prepared = fields.pop("preparation")
            preparation = None if prepared is None else Preparation(**prepared)
            labels = tuple(map(str, fields.pop("labels")))
            return cls(
                **fields,
                details=details,
                preparation=preparation,
                labels=labels,
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"a card must have the fields of to_json: {error}"
            ) from error


# Types of the fields in JSON that are not text.
_KINDS: dict[str, tuple[type, ...]] = {
    "details": (dict,),
    "preparation": (dict, type(None)),
    "labels": (list, tuple),
    "classes": (int,),
    "megabytes": (int, float),
    **dict.fromkeys(("top1", "top5"), (int, float, type(None))),
}


# --- keras.applications ------------------------------------------------------
# The authors' Caffe weights, ported. Keras' own module has the address and the
# hashes; importing it keeps them up to date. Accuracies: keras.io.

#: Preparation of the authors' Caffe weights.
CAFFE = Preparation(
    224,
    256,
    mean=(123.68 / 255, 116.779 / 255, 103.939 / 255),
    deviation=(1 / 255,) * 3,
    order="bgr",
)
_KERAS = {  # top-1, top-5, megabytes with and without the classifier
    "resnet50": (74.9, 92.1, 103.0, 94.8),
    "resnet101": (76.4, 92.8, 179.6, 171.4),
    "resnet152": (76.6, 93.1, 242.9, 234.7),
}


def _keras_rows() -> Iterable[Card]:
    from keras.src.applications import resnet

    for network, (top1, top5, *sizes) in _KERAS.items():
        hashes = resnet.WEIGHTS_HASHES[network]
        for ending, size, digest in zip(
            ("", "_notop"), sizes, hashes, strict=True
        ):
            file_name = f"{network}_weights_tf_dim_ordering_tf_kernels{ending}"
            yield Card(
                name="keras_applications",
                network=network,
                source="keras.applications",
                licence="MIT",
                url=f"{resnet.BASE_WEIGHTS_PATH}{file_name}.h5",
                digest=f"md5:{digest}",
                megabytes=size,
                details=Details(batch_norm_epsilon=1.001e-5),
                preparation=CAFFE,
                classes=0 if ending else 1000,
                label_set="imagenet",
                top1=top1,
                top5=top5,
                view="224",
            )


# --- torchvision -------------------------------------------------------------
# torchvision/models/resnet.py. The names of the files have the first 8 digits
# of their SHA-256. The first files of the wide networks are in half precision.

_TORCHVISION = {  # name: file, top-1, top-5, MiB
    ("imagenet1k_v1", "resnet18"): ("resnet18-f37072fd", 69.758, 89.078, 44.7),
    ("imagenet1k_v1", "resnet34"): ("resnet34-b627a593", 73.314, 91.420, 83.3),
    ("imagenet1k_v1", "resnet50"): ("resnet50-0676ba61", 76.130, 92.862, 97.8),
    ("imagenet1k_v1", "resnet101"): (
        *("resnet101-63fe2227", 77.374, 93.546, 170.5),
    ),
    ("imagenet1k_v1", "resnet152"): (
        *("resnet152-394f9c45", 78.312, 94.046, 230.4),
    ),
    ("imagenet1k_v1", "wideresnet50_2"): (
        *("wide_resnet50_2-95faca4d", 78.468, 94.086, 131.8),
    ),
    ("imagenet1k_v1", "wideresnet101_2"): (
        *("wide_resnet101_2-32ee1156", 78.848, 94.284, 242.9),
    ),
    ("imagenet1k_v2", "resnet50"): ("resnet50-11ad3fa6", 80.858, 95.434, 97.8),
    ("imagenet1k_v2", "resnet101"): (
        *("resnet101-cd907fc2", 81.886, 95.780, 170.5),
    ),
    ("imagenet1k_v2", "resnet152"): (
        *("resnet152-f82ba261", 82.284, 96.002, 230.5),
    ),
    ("imagenet1k_v2", "wideresnet50_2"): (
        *("wide_resnet50_2-9ba9bcbe", 81.602, 95.758, 263.1),
    ),
    ("imagenet1k_v2", "wideresnet101_2"): (
        *("wide_resnet101_2-d733dc28", 82.510, 96.020, 484.7),
    ),
}


def _torchvision_rows() -> Iterable[Card]:
    for (name, network), (stem, top1, top5, size) in _TORCHVISION.items():
        shorter_side = 256 if name == "imagenet1k_v1" else 232
        yield Card(
            name=name,
            network=network,
            source="torchvision",
            licence="BSD-3-Clause",
            url=f"https://download.pytorch.org/models/{stem}.pth",
            digest=f"sha256:{stem[-8:]}",
            megabytes=round(size * 2**20 / 1e6, 1),
            details=Details(bottleneck_stride="3x3"),
            preparation=Preparation(224, shorter_side),
            classes=1000,
            label_set="imagenet",
            top1=top1,
            top5=top5,
            view=f"224 of {shorter_side}",
        )


# --- CIFAR-10 ----------------------------------------------------------------
# akamaster/pytorch_resnet_cifar10, README and pretrained_models/.

_AKAMASTER = {  # file, error in percent
    "resnet20": ("resnet20-12fca82f", 8.27),
    "resnet32": ("resnet32-d509ac18", 7.37),
    "resnet44": ("resnet44-014dd654", 6.90),
    "resnet56": ("resnet56-4bfd9763", 6.61),
    "resnet110": ("resnet110-1d1ed7c2", 6.32),
    "resnet1202": ("resnet1202-f3b1deed", 6.18),
}


def _cifar_rows() -> Iterable[Card]:
    for network in shipped.networks("cifar10"):
        card = shipped.card(network)
        images = card["test_images"]
        yield Card(
            name="cifar10",
            network=network,
            source="this package",
            licence="Apache-2.0",
            digest=f"sha256:{card['sha256']}",
            megabytes=round(shipped.size(network) / 1e6, 1),
            preparation=Preparation(
                32, None, deviation=(1.0,) * 3, mean_image="cifar10"
            ),
            classes=10,
            label_set="cifar10",
            top1=round(100 - 100 * card["top1_errors"] / images, 2),
            top5=round(100 - 100 * card["top5_errors"] / images, 2),
            view="32",
        )
    address = "https://github.com/akamaster/pytorch_resnet_cifar10/raw/master"
    for network, (stem, error) in _AKAMASTER.items():
        yield Card(
            name="cifar10_akamaster",
            network=network,
            source="akamaster/pytorch_resnet_cifar10",
            licence="BSD-2-Clause",
            url=f"{address}/pretrained_models/{stem}.th",
            digest=f"sha256:{stem[-8:]}",
            details=Details(zeros="both"),
            preparation=Preparation(32, None),
            classes=10,
            label_set="cifar10",
            top1=round(100 - error, 2),
            view="32",
        )


#: Names of the rows that `weights="imagenet"` stands for. ResNet-50, 101 and
#: 152 have the weights that keras.applications has under this name, so that its
#: preprocessing fits.
_DEFAULTS = {
    "resnet18": "imagenet1k_v1",
    "resnet34": "imagenet1k_v1",
    **dict.fromkeys(_KERAS, "keras_applications"),
    "wideresnet50_2": "imagenet1k_v2",
    "wideresnet101_2": "imagenet1k_v2",
}


@functools.cache
def _rows() -> tuple[Card, ...]:
    return (*_keras_rows(), *_torchvision_rows(), *_cifar_rows())


def rows(network: str | None = None) -> list[Card]:
    """Returns the published weights, each one row.

    Args:
        network: Name of a network, in any case; None for all.

    Raises:
        ValueError: If no weights of the network are published.

    >>> [row.name for row in rows("resnet18")]
    ['imagenet1k_v1']
    >>> rows("resnet50")[2].top1
    76.13
    """
    if network is None:
        return [*_rows()]
    found = [row for row in _rows() if row.network == network.lower()]
    if not found:
        known = list(dict.fromkeys(row.network for row in _rows()))
        raise ValueError(names.unknown("network", network, known))
    return found


def is_name(weights: Any) -> bool:
    """Whether a value of `weights` is the name of published weights.

    >>> is_name("imagenet"), is_name("resnet50.pth")
    (True, False)
    """
    return isinstance(weights, str) and (
        weights == DEFAULT or any(row.name == weights for row in _rows())
    )


def find(network: str, name: str, include_top: bool = True) -> Card:
    """Returns the row of a network's weights by their name.

    Args:
        network: Lower-case name of the network.
        name: Name of weights; `"imagenet"` is the default of the network.
        include_top: Whether the file must have the classifier. Without it, a
            smaller file is taken if there is one.

    Raises:
        ValueError: If there are no such weights of the network.

    >>> find("resnet18", "imagenet").file_name
    'resnet18-f37072fd.pth'
    """
    wanted = _DEFAULTS.get(network) if name == DEFAULT else name
    found = [
        row for row in _rows() if row.network == network and row.name == wanted
    ]
    if not found:
        have = dict.fromkeys(
            row.network
            for row in _rows()
            if row.name == name or (name == DEFAULT and row.is_default)
        )
        raise ValueError(
            f"`weights={name!r}` exist for {', '.join(have)}. "
            f"Received: {network}"
        )
    without = [row for row in found if not row.classes]
    return without[0] if without and not include_top else found[0]


def by_digest(digits: str, kind: str = "sha256") -> Card | None:
    """Returns the row whose file has a hash, or None.

    >>> by_digest("f37072fd" + 56 * "0").network
    'resnet18'
    """
    for row in _rows():
        row_kind, _, start = row.digest.partition(":")
        if row_kind == kind and digits.startswith(start):
            return row
    return None


def by_file_name(path: str | os.PathLike) -> Card | None:
    """Returns the row whose file has a name, or None.

    >>> by_file_name("downloads/resnet34-b627a593.pth").network
    'resnet34'
    """
    name = os.path.basename(os.fspath(path))
    return next((row for row in _rows() if row.file_name == name), None)


_TITLES = (
    *("weights", "network", "top-1, %", "top-5, %", "view", "source"),
    *("licence", "MB", "hash", "stride", "epsilon"),
)


def table(cards: Iterable[Card] | None = None) -> list[list[str]]:
    """Returns the rows as texts, the titles first.

    >>> table(rows("resnet18"))[1][:3]
    ['imagenet1k_v1, imagenet', 'resnet18', '69.758']
    """
    found = [[*_TITLES]]
    for row in rows() if cards is None else cards:
        name = row.name + (f", {DEFAULT}" if row.is_default else "")
        if row.label_set == "imagenet" and not row.classes:
            name += " (no top)"
        has_stride = row.label_set == "imagenet" and row.network not in (
            *("resnet18", "resnet34"),
        )
        found.append(
            [
                name,
                row.network,
                "" if row.top1 is None else f"{row.top1:g}",
                "" if row.top5 is None else f"{row.top5:g}",
                row.view,
                row.source,
                row.licence,
                f"{row.megabytes:g}" if row.megabytes else "",
                row.digest.partition(":")[0] + " " + _start(row.digest),
                row.details.bottleneck_stride if has_stride else "",
                f"{row.details.batch_norm_epsilon:g}",
            ]
        )
    return found


def _start(digest: str) -> str:
    return digest.partition(":")[2][:8]
