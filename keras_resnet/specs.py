"""The table of networks of [1] and [2], each one row.

[1] He et al. 2016, "Deep Residual Learning for Image Recognition".
[2] He et al. 2016, "Identity Mappings in Deep Residual Networks".
"""

import dataclasses
import numbers
import re
from collections.abc import Iterable

from keras_resnet import names


@dataclasses.dataclass(frozen=True)
class Spec:
    """One network: a stem, stages of residual units, a classifier.

    Attributes:
        name: Lower-case name, the key in `MODELS`.
        units: Number of units in each stage.
        filters: Number of filters of the 3x3 convolutions in each stage. The
            output of a bottleneck has 4 times as many channels.
        bottleneck: Whether the units are bottlenecks.
        stem: `"imagenet"` is a 7x7 convolution of stride 2 and 3x3 max pooling
            of stride 2. `"cifar"` is a 3x3 convolution. Both convolutions have
            `filters[0]` filters, batch normalization and ReLU.
        unit: Default order of the units.
        shortcut: Default shortcut.
        classes: Default number of classes.
        image_size: Default height and width, in pixels.
        source: The paper and section that describe the network.
        width: Factor of the filters inside a bottleneck: 1, 2 or 4. The output
            of the bottleneck does not change.

    >>> MODELS["resnet110"].units
    (18, 18, 18)
    >>> MODELS["resnet110"].depth
    110
    """

    name: str
    units: tuple[int, ...]
    filters: tuple[int, ...]
    bottleneck: bool = False
    stem: str = "imagenet"
    unit: str = "original"
    shortcut: str = "B"
    classes: int = 1000
    image_size: int = 224
    source: str = ""
    width: int = 1

    def __post_init__(self):
        stages = [
            tuple(entries) if isinstance(entries, Iterable) else ()
            for entries in (self.units, self.filters)
        ]
        if not stages[0] or len(stages[0]) != len(stages[1]):
            raise ValueError(
                "units and filters must have one entry for each stage, "
                f"received units={self.units}, filters={self.filters}"
            )
        if not all(
            isinstance(n, numbers.Integral) and n >= 1
            for n in (*stages[0], *stages[1])
        ):
            raise ValueError(
                "units and filters must be at least 1 in each stage, and "
                f"whole, received units={self.units}, filters={self.filters}"
            )
        for field, entries in zip(("units", "filters"), stages, strict=True):
            object.__setattr__(self, field, tuple(map(int, entries)))
        if self.stem not in ("imagenet", "cifar"):
            raise ValueError(
                f"stem must be 'imagenet' or 'cifar', received {self.stem!r}"
            )
        if self.width not in ((1, 2, 4) if self.bottleneck else (1,)):
            raise ValueError(
                "width must be 1, or 2 or 4 in bottlenecks, received "
                f"{self.width!r}"
            )

    @property
    def depth(self) -> int:
        """Number of weighted layers, shortcuts not counted [1, Sec. 4.1]."""
        return sum(self.units) * (3 if self.bottleneck else 2) + 2

    def widened(self, width: float) -> "Spec":
        """Returns the network with `width` times as many filters everywhere.

        Zagoruyko and Komodakis 2016, "Wide Residual Networks".

        Raises:
            ValueError: If the number of filters of a stage is not whole.

        >>> MODELS["resnet20"].widened(0.5).filters
        (8, 16, 32)
        """
        filters = tuple(width * count for count in self.filters)
        if min(filters) < 1 or any(count % 1 for count in filters):
            raise ValueError(
                f"width times {self.filters} filters must be whole numbers, "
                f"received width {width:g}"
            )
        return dataclasses.replace(
            self,
            name=f"{self.name}x{width:g}",
            filters=tuple(map(int, filters)),
        )

    @property
    def stride(self) -> int:
        """Product of all strides: the least height and width of an image.

        Each stage after the first halves the image, and so do both layers of
        the ImageNet stem.
        """
        return 2 ** (len(self.units) - 1) * (
            4 if self.stem == "imagenet" else 1
        )


_IMAGENET = {  # [1, Table 1]; 200: [2, Sec. 5]
    18: ((2, 2, 2, 2), False),
    34: ((3, 4, 6, 3), False),
    50: ((3, 4, 6, 3), True),
    101: ((3, 4, 23, 3), True),
    152: ((3, 8, 36, 3), True),
    200: ((3, 24, 36, 3), True),
}


def cifar_units(depth: int, bottleneck: bool = False) -> tuple[int, int, int]:
    """Returns the number of units in the three stages of a CIFAR network.

    n = (depth - 2) / 6 units of two layers [1, Sec. 4.2], or (depth - 2) / 9
    bottlenecks of three [2, Sec. 5].

    Raises:
        ValueError: If no whole n gives the depth.

    >>> cifar_units(56)
    (9, 9, 9)
    """
    layers = 9 if bottleneck else 6
    n, rest = divmod(depth - 2, layers)
    if rest or n < 1:
        examples = "164, 1001" if bottleneck else "20, 32, 44"
        raise ValueError(
            f"depth must be {layers}n + 2 ({examples}, ...), received {depth}"
        )
    return (n, n, n)


def _rows():
    imagenet = {"filters": (64, 128, 256, 512)}
    cifar = {
        "filters": (16, 32, 64),
        "stem": "cifar",
        "classes": 10,
        "image_size": 32,
    }
    v2 = {"unit": "pre_activation"}
    for depth, (units, bottleneck) in _IMAGENET.items():
        row = {"units": units, "bottleneck": bottleneck, **imagenet}
        source = "[1, Table 1]" if depth < 200 else "[2, Sec. 5]"
        yield Spec(f"resnet{depth}", **row, source=source)
        yield Spec(f"resnet{depth}v2", **row, **v2, source="[2, Sec. 5]")
    for depth in (20, 32, 44, 56, 110, 1202):
        row = {"units": cifar_units(depth), "shortcut": "A", **cifar}
        yield Spec(f"resnet{depth}", **row, source="[1, Sec. 4.2]")
        yield Spec(f"resnet{depth}v2", **row, **v2, source="[2, Sec. 4]")
    for depth in (164, 1001):
        row = {"units": cifar_units(depth, True), "bottleneck": True, **cifar}
        yield Spec(f"resnet{depth}", **row, source="[2, Table 3]")
        yield Spec(f"resnet{depth}v2", **row, **v2, source="[2, Table 3]")
    for depth in (50, 101):
        units, _ = _IMAGENET[depth]
        row = {"units": units, "bottleneck": True, "width": 2, **imagenet}
        source = "Zagoruyko and Komodakis 2016, Sec. 4"
        yield Spec(f"wideresnet{depth}_2", **row, source=source)
    plain = {"shortcut": "none", "source": "[1, Sec. 3.3]"}
    for depth in (18, 34):
        units, _ = _IMAGENET[depth]
        yield Spec(f"plainnet{depth}", units=units, **imagenet, **plain)
    for depth in (20, 32, 44, 56, 110):
        row = {"units": cifar_units(depth), **cifar, **plain}
        yield Spec(f"plainnet{depth}", **row)


MODELS: dict[str, Spec] = {spec.name: spec for spec in _rows()}


def get_spec(spec: Spec | str) -> Spec:
    """Returns the row of `MODELS` with this name, or the spec itself.

    Args:
        spec: A `Spec`, or a key of `MODELS` in any case. `"resnet20x2"` is
            ResNet-20 with twice as many filters (`Spec.widened`).

    Raises:
        ValueError: If the name is unknown. The message suggests near names.

    >>> get_spec("ResNet56").units
    (9, 9, 9)
    >>> get_spec("resnet20x2").filters
    (32, 64, 128)
    """
    if isinstance(spec, Spec):
        return spec
    if not isinstance(spec, str):
        raise ValueError(
            "spec must be a keras_resnet.Spec or a name in "
            f"keras_resnet.MODELS, received {spec!r}"
        )
    name = spec.lower()
    if name in MODELS:
        return MODELS[name]
    wide = re.fullmatch(r"(\w+)x([0-9]+(?:\.[0-9]+)?)", name)
    if wide and wide[1] in MODELS:
        return MODELS[wide[1]].widened(float(wide[2]))
    raise ValueError(
        f"unknown network {spec!r}{names.hint(name, MODELS, 3)}: "
        f"keras_resnet.MODELS has {', '.join(MODELS)}"
    )
