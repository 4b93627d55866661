"""The papers' tables as rows: which network, trained how, to which error.

[1] He et al. 2016, "Deep Residual Learning for Image Recognition".
[2] He et al. 2016, "Identity Mappings in Deep Residual Networks".

    python -m apps.train --experiment=resnet56 --seed=0

trains a row. `apps.report` compares its error with the error that the papers
print.
"""

import dataclasses
import math
from typing import Any

from keras_resnet import names
from keras_resnet import networks
from keras_resnet.layers import shortcuts
from keras_resnet.training import recipes
from keras_resnet.training.configs import Config

#: Printed as "fail" in [2, Table 1]: a test error of more than 20%.
FAIL = math.inf

#: The subject of each table, in the order of the papers. The papers print the
#: errors of a table "at n layers" for deeper networks. Its rows train shallower
#: networks, so only the order of the errors can be compared.
TABLES: dict[str, str] = {
    "[1, Fig. 6]": "CIFAR-10: plain networks against residual ones",
    "[1, Table 6]": "CIFAR-10: networks by depth",
    "[2, Table 1]": "CIFAR-10: shortcuts of ResNet-110",
    "[2, Table 2]": "CIFAR-10: orders of the unit, ResNet-110 and 164",
    "[2, Table 3]": "Original against pre-activation units, CIFAR-10 and 100",
    "[1, Table 3] at 20 layers": "CIFAR-10: options A, B and C of ResNet-20 "
    "(errors printed: of ResNet-34 on ImageNet)",
    "[2, Table 1] at 20 layers": "CIFAR-10: shortcuts of ResNet-20 (errors "
    "printed: of ResNet-110)",
    "[2, Table 2] at 56 layers": "CIFAR-10: orders of the unit, ResNet-56 "
    "(errors printed: of ResNet-110)",
    "[1, Table 2]": "ImageNet: plain networks against residual ones, option A "
    "(top 1, 10-crop)",
    "[1, Table 3]": "ImageNet: networks by depth and option (top 1, 10-crop)",
    "[2, Table 5]": "ImageNet: ResNet-200 (top 1, single crop of 320 pixels)",
}


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A network, a recipe, and the errors that the papers print for them.

    Attributes:
        name: The key in `EXPERIMENTS`.
        model: Name of a network (`keras_resnet.networks.get_network`).
        dataset: Name of a data set (`keras_resnet.data.datasets.load`).
        recipe: A name in `RECIPES`.
        printed: Test error in percent, by the table that prints it (a key of
            `TABLES`). `FAIL` is "fail", None an error that is only drawn.
        unit: Order of the units; None for the network's own.
        shortcut: h(x), as `keras_resnet.resnet` takes it; None for the
            network's own.
        seeds: How many seeds are trained: 5, as in [2, Sec. 3], whose errors
            are medians of 5 runs, 3 at 20 layers, or 1.

    >>> EXPERIMENTS["resnet110"].printed["[1, Table 6]"]
    6.43
    """

    name: str
    model: str
    dataset: str
    recipe: str
    printed: dict[str, float | None]
    unit: str | None = None
    shortcut: str | None = None
    seeds: int = 1

    @property
    def arguments(self) -> dict[str, str]:
        """Arguments of the network's builder."""
        named = {"unit": self.unit, "shortcut": self.shortcut}
        return {name: value for name, value in named.items() if value}

    def is_trained_by(self, config: Config) -> bool:
        """Whether a configuration trains this row, at any length and dtype.

        >>> recipe = recipes.RECIPES["cifar10"].with_steps(16_000)
        >>> config = Config("resnet56", "cifar10", recipe, {"remat": True})
        >>> EXPERIMENTS["resnet56"].is_trained_by(config)
        True
        """
        network = networks.get_network(self.model)
        arguments = {
            name: value
            for name, value in config.model_arguments.items()
            if name not in ("looped", "remat")  # they do not change the result
        }
        recipe = recipes.get_recipe(self.recipe)
        return (config.model, config.dataset, config.recipe, arguments) == (
            network.name,
            self.dataset,
            recipe.with_steps(config.recipe.steps),
            network.arguments(self.arguments),
        )


# Tables of which several rows are made.
_AT_20_LAYERS = "[2, Table 1] at 20 layers"
_AT_56_LAYERS = "[2, Table 2] at 56 layers"

# [2, Table 1]: in the names of the rows, in `shortcuts.TABLE_1`, the error. The
# identity and no shortcut at all are rows of other tables too.
_SHORTCUTS: tuple[tuple[str, str, float], ...] = (
    ("scaling_half_and_one", "scaling 0.5, residual 1", FAIL),
    ("scaling_half_and_half", "scaling 0.5, residual 0.5", 12.35),
    # "fail" is printed for 0 to -5.
    ("exclusive_gating_0", "exclusive gating, bias 0", FAIL),
    ("exclusive_gating_5", "exclusive gating, bias -5", FAIL),
    ("exclusive_gating_6", "exclusive gating, bias -6", 8.70),
    ("exclusive_gating_7", "exclusive gating, bias -7", 9.81),
    ("shortcut_only_gating_0", "shortcut-only gating, bias 0", 12.86),
    ("shortcut_only_gating_6", "shortcut-only gating, bias -6", 6.91),
    ("convolution", "1x1 convolution", 12.22),
    ("dropout", "dropout 0.5", FAIL),
)

#: Orders of the unit in [2, Table 2], with the errors at 110 and 164 layers.
UNITS: dict[str, tuple[float, float]] = {
    "batch_norm_after_addition": (8.17, 6.50),
    "relu_before_addition": (7.84, 6.14),
    "relu_only_pre_activation": (6.71, 5.91),
}


def _cifar10(name, printed, model=None, recipe="cifar10", **fields):
    model = model or name
    return Experiment(name, model, "cifar10", recipe, printed, **fields)


_DEEP: dict[str, Any] = {"recipe": "cifar10_warmup", "seeds": 5}


def _networks_by_depth():
    """[1, Fig. 6 and Table 6]."""
    yield _cifar10("maxout", {"[1, Table 6]": 9.38}, recipe="cifar10_maxout")
    for name, error in (
        ("nin", 8.81),
        ("dsn", 8.22),
        ("fitnet19", 8.39),
        ("highway19", 7.54),
        ("highway32", 8.80),
    ):
        printed = {"[1, Table 6]": error}
        yield _cifar10(name, printed, recipe="cifar10_unnormalized")
    yield _cifar10("plainnet20", {"[1, Fig. 6]": None, _AT_20_LAYERS: FAIL})
    yield _cifar10(
        "resnet20",
        {
            "[1, Fig. 6]": None,
            "[1, Table 6]": 8.75,
            "[1, Table 3] at 20 layers": 25.03,
            _AT_20_LAYERS: 6.61,
        },
        seeds=3,
    )
    yield _cifar10("resnet32", {"[1, Table 6]": 7.51})
    yield _cifar10("resnet44", {"[1, Table 6]": 7.17})
    yield _cifar10("plainnet56", {"[1, Fig. 6]": None})
    yield _cifar10(
        "resnet56",
        {"[1, Fig. 6]": None, "[1, Table 6]": 6.97, _AT_56_LAYERS: 6.61},
    )
    yield _cifar10(
        "resnet110",
        {
            "[1, Table 6]": 6.43,  # the best of 5, whose mean is 6.61
            "[2, Table 1]": 6.61,
            "[2, Table 2]": 6.61,
            "[2, Table 3]": 6.61,
        },
        **_DEEP,
    )
    yield _cifar10("resnet1202", {"[1, Table 6]": 7.93}, recipe=_DEEP["recipe"])


def _networks_by_shortcut():
    """[1, Table 3] at 20 layers, and [2, Table 1]."""
    for option, error in (("B", 24.52), ("C", 24.19)):
        yield _cifar10(
            f"resnet20_option_{option.lower()}",
            {"[1, Table 3] at 20 layers": error},
            "resnet20",
            shortcut=option,
        )
    # A shortcut scaled by 0, and the residual by 1.
    yield _cifar10("plainnet110", {"[2, Table 1]": FAIL}, **_DEEP)
    for name, key, error in _SHORTCUTS:
        yield _cifar10(
            f"resnet110_{name}",
            {"[2, Table 1]": error},
            "resnet110",
            shortcut=shortcuts.TABLE_1[key],
            **_DEEP,
        )
        yield _cifar10(
            f"resnet20_{name}",
            {_AT_20_LAYERS: error},
            "resnet20",
            shortcut=shortcuts.TABLE_1[key],
            seeds=3,
        )


def _networks_by_unit():
    """[2, Tables 2 and 3]."""
    for unit, (error, error_of_164) in UNITS.items():
        for depth, table, printed in (
            (110, "[2, Table 2]", error),
            (164, "[2, Table 2]", error_of_164),
            (56, _AT_56_LAYERS, error),
        ):
            yield _cifar10(
                f"resnet{depth}_{unit}",
                {table: printed},
                f"resnet{depth}",
                unit=unit,
                **(_DEEP if depth > 56 else {}),
            )
    yield _cifar10("resnet56v2", {_AT_56_LAYERS: 6.37})
    for name, error in (
        ("resnet110v2", 6.37),
        ("resnet164", 5.93),
        ("resnet164v2", 5.46),
    ):
        printed = {"[2, Table 2]": error, "[2, Table 3]": error}
        yield _cifar10(name, printed, **_DEEP)
    yield _cifar10("resnet1001", {"[2, Table 3]": 7.61}, **_DEEP)
    yield _cifar10("resnet1001v2", {"[2, Table 3]": 4.92}, **_DEEP)
    for model, error in (
        ("resnet164", 25.16),
        ("resnet164v2", 24.33),
        ("resnet1001", 27.82),
        ("resnet1001v2", 22.71),
    ):
        yield Experiment(
            f"{model}_cifar100",
            model,
            "cifar100",
            "cifar100",
            {"[2, Table 3]": error},
            seeds=5,
        )


def _imagenet_networks():
    """[1, Tables 2 and 3] and [2, Table 5]."""

    def imagenet(name, table, error, model=None, shortcut=None):
        return Experiment(
            name,
            model or name,
            "imagenet2012",
            "imagenet",
            {table: error},
            shortcut=shortcut,
        )

    yield imagenet("plainnet18", "[1, Table 2]", 27.94)
    yield imagenet("resnet18_option_a", "[1, Table 2]", 27.88, "resnet18", "A")
    yield imagenet("plainnet34", "[1, Table 2]", 28.54)
    option_a = imagenet(
        "resnet34_option_a", "[1, Table 3]", 25.03, "resnet34", "A"
    )
    printed = {"[1, Table 2]": 25.03, "[1, Table 3]": 25.03}
    yield dataclasses.replace(option_a, printed=printed)
    yield imagenet("resnet34", "[1, Table 3]", 24.52)
    yield imagenet("resnet34_option_c", "[1, Table 3]", 24.19, "resnet34", "C")
    yield imagenet("resnet50", "[1, Table 3]", 22.85)
    yield imagenet("resnet101", "[1, Table 3]", 21.75)
    yield imagenet("resnet152", "[1, Table 3]", 21.43)
    yield Experiment(
        "resnet200v2",
        "resnet200v2",
        "imagenet2012",
        "imagenet_identity_mappings",
        {"[2, Table 5]": 20.1},  # scale and aspect ratio, as the recipe
    )


EXPERIMENTS: dict[str, Experiment] = {
    row.name: row
    for rows in (
        _networks_by_depth(),
        _networks_by_shortcut(),
        _networks_by_unit(),
        _imagenet_networks(),
    )
    for row in rows
}


def get_experiment(name: str) -> Experiment:
    """Returns the row of `EXPERIMENTS` with this name.

    Raises:
        ValueError: If the name is unknown. The message suggests near names.
    """
    if name in EXPERIMENTS:
        return EXPERIMENTS[name]
    raise ValueError(names.unknown("experiment", name, EXPERIMENTS, count=3))
