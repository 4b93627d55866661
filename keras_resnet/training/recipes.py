"""Recipes of training, each number with its section of the paper.

[1] He et al. 2016, "Deep Residual Learning for Image Recognition".
[2] He et al. 2016, "Identity Mappings in Deep Residual Networks".
"""

import dataclasses
import json
import math
import typing
from collections.abc import Mapping
from typing import Any

import keras
from keras import ops

from keras_resnet import names
from keras_resnet import networks
from keras_resnet.data.augmentation import get_augmentation

SCHEDULES = ("step", "cosine")
OPTIMIZERS = ("momentum", "nesterov", "adam")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a network is trained: `v = momentum v - rate (g + decay w); w += v`.

    This is stochastic gradient descent with momentum. `optimizer` can name
    another rule. g is the gradient of the mean cross entropy of a batch.
    `weight_decay * w` is the gradient of the L2 penalty
    `weight_decay / 2 * |w|^2`.

    Attributes:
        name: The key in `RECIPES`.
        source: The paper and section.
        batch_size: Images in a batch, over all devices together.
        steps: Number of batches, the papers' iterations.
        learning_rate: The rate after the warm-up.
        decay_at_steps: Steps at which the rate is divided by 10.
        schedule: `"step"` (by `decay_at_steps`) or `"cosine"` (to zero).
        warmup_steps: Length of the warm-up.
        warmup_learning_rate: The constant rate of the warm-up. None is a rate
            that grows linearly from 0.
        momentum: Momentum of the gradient.
        optimizer: `"momentum"` [1, Sec. 3.4], `"nesterov"` (fb.resnet.torch)
            or `"adam"` (Kingma and Ba 2015). All have the gradient
            `g + decay w`.
        weight_decay: Factor of the L2 penalty.
        decay_norms: Whether the penalty includes the parameters of batch
            normalization and the biases, as in the authors' code.
        label_smoothing: Share of the label that is spread over all classes.
        micro_batches: Number of parts of a device's share of a batch. A step
            needs the memory of one part. The gradients of the parts are added.
            Each part is normalized separately, as the share of each device is.
        average_momentum: Momentum of a moving average of the parameters, which
            are tested and exported. 0 is no average. The momentum at a step is
            `min(average_momentum, (1 + step) / (10 + step))`.
        head_learning_rate: Rate of the classifier after the warm-up, for
            fine-tuning. It follows the schedule of `learning_rate`. None is
            the same rate. Adam has no such rate.
        augmentation: Name of an augmentation (`data.augmentation`).
        image_size: Height and width of the network's input, in pixels. None is
            the size of the data set's images.
        expected_errors: Test error in percent by network, as published.

    >>> RECIPES["cifar10"].with_steps(6400).decay_at_steps
    (3200, 4800)
    """

    name: str
    source: str
    batch_size: int
    steps: int
    learning_rate: float
    decay_at_steps: tuple[int, ...] = ()
    schedule: str = "step"
    warmup_steps: int = 0
    warmup_learning_rate: float | None = None
    momentum: float = 0.9
    optimizer: str = "momentum"
    weight_decay: float = 1e-4
    decay_norms: bool = True
    label_smoothing: float = 0.0
    micro_batches: int = 1
    average_momentum: float = 0.0
    head_learning_rate: float | None = None
    augmentation: str = "none"
    image_size: int | None = None
    expected_errors: dict[str, float] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        if self.schedule not in SCHEDULES:
            raise ValueError(
                f"schedule must be one of {SCHEDULES}, received "
                f"{self.schedule!r}"
            )
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(
                f"optimizer must be one of {OPTIMIZERS}, received "
                f"{self.optimizer!r}"
            )
        if self.batch_size < 1 or self.steps < 1:
            raise ValueError(
                "batch_size and steps must be at least 1, received "
                f"batch_size={self.batch_size}, steps={self.steps}"
            )
        if self.micro_batches < 1 or self.batch_size % self.micro_batches:
            raise ValueError(
                "micro_batches must divide batch_size, received micro_batches="
                f"{self.micro_batches}, batch_size={self.batch_size}"
            )
        for name in ("momentum", "label_smoothing", "average_momentum"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(
                    f"{name} must be at least 0 and less than 1, received "
                    f"{getattr(self, name)}"
                )
        for name in (
            "learning_rate",
            "warmup_learning_rate",
            "head_learning_rate",
            "weight_decay",
            "warmup_steps",
            "decay_at_steps",
        ):
            value = getattr(self, name)
            numbers = value if isinstance(value, tuple) else [value or 0]
            if not all(0 <= number < math.inf for number in numbers):
                raise ValueError(
                    f"{name} must be finite and at least 0, received {value}"
                )
        if self.head_learning_rate is not None and (
            self.optimizer == "adam" or not self.learning_rate
        ):
            raise ValueError(
                "head_learning_rate needs the optimizer momentum or nesterov "
                f"and a learning_rate above 0, received {self.optimizer} and "
                f"{self.learning_rate}"
            )
        if self.image_size is not None and self.image_size < 1:
            raise ValueError(
                f"image_size must be at least 1, received {self.image_size}"
            )
        get_augmentation(self.augmentation)

    def with_steps(self, steps: int) -> "Recipe":
        """Returns the recipe at another length, with its shape."""
        scale = steps / self.steps
        return dataclasses.replace(
            self,
            steps=steps,
            warmup_steps=round(self.warmup_steps * scale),
            decay_at_steps=tuple(
                round(step * scale) for step in self.decay_at_steps
            ),
        )

    def scaled_to(self, batch_size: int) -> "Recipe":
        """Returns the recipe for another batch, by the linear scaling rule.

        Goyal et al. 2017, Sec. 2: a batch that is k times as large has a rate
        that is k times as high, and 1 / k of the steps. The number of epochs is
        the same. For k > 1 the rate grows linearly over the first 5 of 90
        epochs, unless the recipe has a linear warm-up.

        >>> recipe = RECIPES["imagenet_identity_mappings"].scaled_to(8192)
        >>> recipe.learning_rate, recipe.steps, recipe.warmup_steps
        (3.2, 14074, 782)
        """
        k = batch_size / self.batch_size
        scaled = dataclasses.replace(
            self.with_steps(max(round(self.steps / k), 1)),
            batch_size=batch_size,
            learning_rate=self.learning_rate * k,
            warmup_learning_rate=(
                self.warmup_learning_rate and self.warmup_learning_rate * k
            ),
            head_learning_rate=(
                self.head_learning_rate and self.head_learning_rate * k
            ),
        )
        if k <= 1 or (scaled.warmup_steps and not self.warmup_learning_rate):
            return scaled
        return dataclasses.replace(
            scaled,
            warmup_steps=round(scaled.steps / 18),
            warmup_learning_rate=None,
        )

    def with_field(self, name: str, value: str) -> "Recipe":
        """Returns the recipe with one field set from text.

        Raises:
            ValueError: If the field is unknown, or the text does not have its
                type.

        >>> RECIPES["cifar10"].with_field("learning_rate", "0.05").learning_rate
        0.05
        """
        types = typing.get_type_hints(type(self))
        settable = [n for n in types if n not in ("name", "source")]
        if name not in settable:
            raise ValueError(names.unknown("recipe field", name, settable))
        return dataclasses.replace(self, **{name: _parse(types[name], value)})

    def learning_rates(self) -> "LearningRates":
        """Returns the learning rate as a function of the step."""
        return LearningRates(
            self.learning_rate,
            self.steps,
            self.decay_at_steps,
            self.schedule,
            self.warmup_steps,
            self.warmup_learning_rate,
        )

    def to_json(self) -> dict:
        """Returns the fields as JSON has them."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def from_json(cls, fields: dict) -> "Recipe":
        """Returns the recipe from the dict of `to_json`.

        Raises:
            TypeError: If a field is missing or unknown.
            ValueError: If a value does not have the type of its field.
        """
        check_fields(cls, fields)
        return cls(
            **{**fields, "decay_at_steps": tuple(fields["decay_at_steps"])}
        )


def check_fields(kind: type, fields: dict) -> None:
    """Checks that fields from JSON are those of a dataclass.

    Raises:
        TypeError: If a field is missing or unknown.
        ValueError: If a value does not have the type of its field.
    """
    types = typing.get_type_hints(kind)
    missing = sorted(types.keys() - fields.keys())
    unknown = sorted(fields.keys() - types.keys())
    if missing or unknown:
        raise TypeError(
            f"missing fields: {', '.join(missing) or 'none'}; "
            f"unknown fields: {', '.join(unknown)[:200] or 'none'}"
        )
    for name, value in fields.items():
        if not _is_of(value, types[name]):
            raise ValueError(
                f"{name} must be of type "
                f"{getattr(types[name], '__name__', types[name])}, received "
                f"{repr(value)[:100]}"
            )


def _is_of(value, kind):
    """Whether a value from JSON fits the type of a field."""
    arguments = typing.get_args(kind)
    if kind == Mapping[str, Any]:
        return isinstance(value, dict)
    if kind == tuple[int, ...]:
        return isinstance(value, list | tuple) and all(
            type(element) is int for element in value
        )
    if kind == dict[str, float]:
        return isinstance(value, dict) and all(
            type(number) in (int, float) for number in value.values()
        )
    if arguments:  # a type or None
        return any(_is_of(value, argument) for argument in arguments)
    if kind is float:
        return type(value) in (int, float)
    if dataclasses.is_dataclass(kind):
        return isinstance(value, dict)
    return type(value) is kind


def _parse(kind, text: str):
    """Returns a value of a field's type from text."""
    try:
        if kind is str:
            return text
        if kind is bool:
            return {"true": True, "false": False}[text.lower()]
        value = json.loads(text if text != "None" else "null")
        if kind == tuple[int, ...]:
            value = value if isinstance(value, list) else [value]
            if all(type(v) is int for v in value):
                return tuple(value)
        elif kind == dict[str, float]:
            if isinstance(value, dict):
                return value
        elif value is None and type(None) in typing.get_args(kind):
            return None
        elif (kind is int or int in typing.get_args(kind)) and (
            type(value) is int
        ):
            return value
        elif (kind is float or float in typing.get_args(kind)) and (
            type(value) in (int, float)
        ):
            return float(value)
    except (KeyError, ValueError):
        pass
    name = getattr(kind, "__name__", str(kind))
    raise ValueError(f"expected a value of type {name}, received {text!r}")


@keras.saving.register_keras_serializable(package="keras_resnet")
class LearningRates(keras.optimizers.schedules.LearningRateSchedule):
    """The learning rate of a recipe: warm-up, then steps or a cosine.

    Step t counts from 0. With w warm-up steps, the rate is
    `warmup_learning_rate` (or `learning_rate * (t + 1) / w`) for t < w; then
    `learning_rate / 10^(number of decay points <= t)`, or
    `learning_rate / 2 * (1 + cos(pi (t - w) / (steps - w)))`.

    Args:
        learning_rate, steps, decay_at_steps, schedule, warmup_steps,
        warmup_learning_rate: The fields of `Recipe`.

    >>> rates = RECIPES["cifar10"].learning_rates()
    >>> [round(float(rates(t)), 4) for t in (0, 31999, 32000, 48000)]
    [0.1, 0.1, 0.01, 0.001]
    """

    def __init__(
        self,
        learning_rate,
        steps,
        decay_at_steps=(),
        schedule="step",
        warmup_steps=0,
        warmup_learning_rate=None,
    ):
        super().__init__()
        self.learning_rate = learning_rate
        self.steps = steps
        self.decay_at_steps = tuple(decay_at_steps)
        self.schedule = schedule
        self.warmup_steps = warmup_steps
        self.warmup_learning_rate = warmup_learning_rate

    def __call__(self, step):
        step = ops.cast(step, "float32")
        rate = self.learning_rate
        warmup = float(self.warmup_steps)
        if self.schedule == "cosine":
            done = (step - warmup) / max(self.steps - warmup, 1.0)
            rate *= 0.5 * (1.0 + ops.cos(math.pi * done))
        else:
            passed = [
                ops.cast(step >= float(point), "float32")
                for point in self.decay_at_steps
            ]
            rate *= ops.power(10.0, -ops.cast(sum(passed), "float32"))
        if warmup:
            start = self.warmup_learning_rate
            if start is None:
                start = self.learning_rate * (step + 1.0) / warmup
            rate = ops.where(step < warmup, start, rate)
        return rate

    def get_config(self):
        return {
            "learning_rate": self.learning_rate,
            "steps": self.steps,
            "decay_at_steps": self.decay_at_steps,
            "schedule": self.schedule,
            "warmup_steps": self.warmup_steps,
            "warmup_learning_rate": self.warmup_learning_rate,
        }


_ROWS = [
    Recipe(
        # python -m apps.train
        "digits",
        source="none: a minute's training for a first look",
        batch_size=64,
        steps=800,
        learning_rate=0.1,
        decay_at_steps=(400, 600),
        augmentation="pad_crop",
        # An aim, of the digits' test images: the papers do not use this set.
        expected_errors={"resnet20": 3.0},
    ),
    Recipe(
        # python -m apps.train --model=resnet20 --dataset=cifar10
        "cifar10",
        source="[1, Sec. 4.2]",
        batch_size=128,
        steps=64_000,
        learning_rate=0.1,
        decay_at_steps=(32_000, 48_000),
        augmentation="pad_crop_flip",
        expected_errors={  # [1, Table 6]
            "resnet20": 8.75,
            "resnet32": 7.51,
            "resnet44": 7.17,
            "resnet56": 6.97,
        },
    ),
    Recipe(
        # python -m apps.train --model=resnet110v2 --dataset=cifar10
        # Departure: [1, Sec. 4.2] warms ResNet-110 up until the training error
        # is below 80%, "about 400 iterations"; here for 400, as [2, Sec. 4].
        "cifar10_warmup",
        source="[2, Sec. 4]; [1, Sec. 4.2] for 110 layers and more",
        batch_size=128,
        steps=64_000,
        learning_rate=0.1,
        decay_at_steps=(32_000, 48_000),
        warmup_steps=400,
        warmup_learning_rate=0.01,
        augmentation="pad_crop_flip",
        expected_errors={  # [1, Table 6], [2, Table 3]
            "resnet110": 6.61,
            "resnet110v2": 6.37,
            "resnet164": 5.93,
            "resnet164v2": 5.46,
            "resnet1001": 7.61,
            "resnet1001v2": 4.92,
            "resnet1202": 7.93,
        },
    ),
    Recipe(
        # python -m apps.train --experiment=highway19
        "cifar10_unnormalized",
        source="[1, Sec. 4.2], for networks without batch normalization",
        batch_size=128,
        steps=64_000,
        learning_rate=0.01,
        decay_at_steps=(32_000, 48_000),
        augmentation="pad_crop_flip",
        expected_errors={  # as [1, Table 6] quotes them
            "nin": 8.81,
            "dsn": 8.22,
            "fitnet19": 8.39,
            "highway19": 7.54,
            "highway32": 8.80,
        },
    ),
    Recipe(
        # python -m apps.train --experiment=maxout
        # Goodfellow et al. 2013 have a rate of 0.0085 before maxouts and a
        # momentum of 0.5. The sum of steps equals that of 0.0017 at 0.9.
        "cifar10_maxout",
        source="[1, Sec. 4.2], for Maxout",
        batch_size=128,
        steps=64_000,
        learning_rate=0.002,
        decay_at_steps=(32_000, 48_000),
        augmentation="pad_crop_flip",
        expected_errors={"maxout": 9.38},  # as [1, Table 6] quotes it
    ),
    Recipe(
        # python -m apps.train --model=resnet164v2 --dataset=cifar100
        "cifar100",
        source="[2, Sec. 4]",
        batch_size=128,
        steps=64_000,
        learning_rate=0.1,
        decay_at_steps=(32_000, 48_000),
        warmup_steps=400,
        warmup_learning_rate=0.01,
        augmentation="pad_crop_flip",
        expected_errors={  # [2, Table 3]
            "resnet164": 25.16,
            "resnet164v2": 24.33,
            "resnet1001": 27.82,
            "resnet1001v2": 22.71,
        },
    ),
    Recipe(
        # python -m apps.train --model=resnet50 --dataset=imagenet2012
        # Departure: [1] divides the rate "when the error plateaus" within 60e4
        # iterations; the points here are epochs 30 and 60 of [2], in the same
        # proportion of the whole.
        "imagenet",
        source="[1, Sec. 3.4]",
        batch_size=256,
        steps=600_000,
        learning_rate=0.1,
        decay_at_steps=(200_000, 400_000),
        augmentation="scale_jitter",
        image_size=224,
        expected_errors={  # [1, Tables 2 and 3], 10-crop, option B
            "resnet34": 24.52,
            "resnet50": 22.85,
            "resnet101": 21.75,
            "resnet152": 21.43,
            "plainnet18": 27.94,
            "plainnet34": 28.54,
        },
    ),
    Recipe(
        # python -m apps.train --model=resnet200v2 --dataset=imagenet2012
        #     --recipe=imagenet_identity_mappings
        # 90 epochs of 1,281,167 images: 5,004 steps each.
        "imagenet_identity_mappings",
        source="[2, Sec. 5]",
        batch_size=256,
        steps=450_360,
        learning_rate=0.1,
        decay_at_steps=(150_120, 300_240),
        augmentation="scale_aspect",
        image_size=224,
        # [2, Table 5], single crop of 320x320; by scale alone 20.7.
        expected_errors={"resnet200v2": 20.1},
    ),
    Recipe(
        # python -m apps.train --model=resnet50 --dataset=imagenet2012
        #     --recipe=imagenet_modern --set model.bottleneck_stride=3x3
        # 90 epochs of 1,281,167 images: 1,251 steps each, 5 of them warm-up.
        "imagenet_modern",
        source="Goyal et al. 2017, Sec. 5; a cosine as He et al. 2019, Sec. 5",
        batch_size=1024,
        steps=112_590,
        learning_rate=0.4,
        schedule="cosine",
        warmup_steps=6_255,
        decay_norms=False,
        label_smoothing=0.1,
        augmentation="scale_aspect",
        image_size=224,
        # Goyal et al. 2017, Table 1, single crop: 23.60 +- 0.12. They divide
        # the rate by 10 instead of the cosine; the stride is on the 3x3.
        expected_errors={"resnet50": 23.6},
    ),
    Recipe(
        # python -m apps.train --dataset=folder:PATH --model=resnet18
        # The plan of a folder sets batch, length, rate and size: `plans`. The
        # weight decay is not of a paper: few images need more of it.
        "folder",
        source="He et al. 2019, Sec. 3.1 and 5: 0.1 for 256 images, a cosine",
        batch_size=32,
        steps=1_875,
        learning_rate=0.0125,
        schedule="cosine",
        warmup_steps=94,
        decay_norms=False,
        label_smoothing=0.1,
        weight_decay=5e-4,
        augmentation="pad_crop_flip",
        # An aim, of ten classes of 200 photos of 64x64 pixels.
        expected_errors={"resnet18": 35.0},
    ),
    Recipe(
        # python -m apps.train --dataset=folder:PATH --weights=cifar10
        # Kolesnikov et al. 2020, Sec. 3.3, for less than 20,000 images: 500
        # steps of 512, of which 100 warm up; no weight decay. Kornblith et al.
        # 2019: Nesterov's momentum, a cosine, rates of 1e-4 to 0.1.
        "fine_tune",
        source="Kolesnikov et al. 2020 (BiT-HyperRule); Kornblith et al. 2019",
        batch_size=32,
        steps=1_250,
        learning_rate=0.01,
        schedule="cosine",
        warmup_steps=250,
        optimizer="nesterov",
        decay_norms=False,
        label_smoothing=0.1,
        weight_decay=0.0,
        augmentation="pad_crop_flip",
        # An aim, of ten classes of 200 photos of 64x64 pixels.
        expected_errors={"resnet20": 25.0},
    ),
]

RECIPES: dict[str, Recipe] = {recipe.name: recipe for recipe in _ROWS}


def get_recipe(name: str) -> Recipe:
    """Returns the row of `RECIPES` with this name.

    Raises:
        ValueError: If the name is unknown. The message suggests near names.
    """
    if name in RECIPES:
        return RECIPES[name]
    raise ValueError(names.unknown("recipe", name, RECIPES))


def default_recipe(
    dataset: str, image_size: int, network: networks.Network
) -> Recipe:
    """Returns the recipe of a data set when none is named.

    Args:
        dataset: Name of the data set.
        image_size: Height of its images, in pixels.
        network: The network. On small images one without batch normalization
            has its own recipe, and one of 110 layers or more is warmed up
            [1, Sec. 4.2].

    >>> default_recipe("cifar10", 32, networks.get_network("resnet110")).name
    'cifar10_warmup'
    """
    if dataset in ("digits", "cifar100"):
        return RECIPES[dataset]
    if image_size > 64:
        return RECIPES["imagenet"]
    if network.recipe is not None:
        return RECIPES[network.recipe]
    # Departure: [2] warms up all networks on CIFAR-10; here pre-activation
    # networks of fewer than 110 layers are trained as the original ones beside
    # them, by [1] without a warm-up.
    return RECIPES["cifar10_warmup" if network.depth >= 110 else "cifar10"]
