"""A recipe: how a network is trained.

[1] He et al. 2016, "Deep Residual Learning for Image Recognition".
[2] He et al. 2016, "Identity Mappings in Deep Residual Networks".
"""

import dataclasses
import json
import typing
from collections.abc import Mapping
from typing import Any

from keras_resnet import names
from keras_resnet.data.augmentation import Augmentation
from keras_resnet.training import fields as fields_lib
from keras_resnet.training import recipe_rules
from keras_resnet.training.schedules import LearningRates


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a network is trained: `v = momentum v - rate (g + decay w); w += v`.

    This is stochastic gradient descent with momentum. `optimizer` can name
    another rule. g is the gradient of the mean cross entropy of a batch.
    `weight_decay * w` is the gradient of the L2 penalty
    `weight_decay / 2 * |w|^2`.

    Attributes:
        name: The key in `recipes.RECIPES`.
        source: The paper and section.
        batch_size: Images in a batch, over all devices together.
        steps: Number of batches, the papers' iterations.
        learning_rate: The rate after the warm-up.
        decay_at_steps: Steps at which the rate is divided by 10.
        schedule: `"step"` (by `decay_at_steps`), `"cosine"` (to zero), or
            `"one_cycle"` (linear to zero, which is the second half of the cycle
            of Smith and Topin 2018; a linear warm-up is the first).
        warmup_steps: Length of the warm-up.
        warmup_learning_rate: The constant rate of the warm-up. None is a rate
            that grows linearly from 0.
        momentum: Momentum of the gradient.
        optimizer: `"momentum"` [1, Sec. 3.4], `"nesterov"` (fb.resnet.torch)
            or `"adam"` (Kingma and Ba 2015). These have the gradient
            `g + decay w`. `"adamw"` (Loshchilov and Hutter 2019), `"lamb"`
            (You et al. 2020) and `"lars"` (You et al. 2017) decay the weights
            as their papers write.
        clip_norm: Largest norm of the gradient of all parameters, which is
            scaled down to it. None turns it off.
        weight_decay: Factor of the L2 penalty, or of the decay.
        decay_norms: Whether the penalty includes the parameters of batch
            normalization and the biases, as in the authors' code.
        loss: `"cross_entropy"`, or `"binary_cross_entropy"`: the mean over the
            classes of the cross entropy of each class against all others
            (Wightman et al. 2021, Sec. 3.1).
        label_smoothing: Share of the label that is spread over all classes.
        target_threshold: Share of a label in a mixed image from which its
            target is 1; below it is 0. None keeps the shares.
        micro_batches: Number of parts of a device's share of a batch. A step
            needs the memory of one part. The gradients of the parts are added.
            Each part is normalized separately, as the share of each device is.
        average_momentum: Momentum of a moving average of the parameters, which
            are tested and exported. 0 is no average. The momentum at a step is
            `min(average_momentum, (1 + step) / (10 + step))`.
        head_learning_rate: Rate of the classifier after the warm-up, for
            fine-tuning. It follows the schedule of `learning_rate`. None is
            the same rate. Adam has no such rate.
        augmentation: How training images are changed.
        progressive_sizes: Sizes of the training images in pixels, one after
            the other, each for an equal part of the steps (Howard 2018, "Now
            anyone can train Imagenet in 18 minutes"; Tan and Le 2021, Sec. 4).
            A size may be repeated. Empty for `train_image_size` all the time.
        image_size: Height and width of the network's input in the test, in
            pixels. None is the size of the data set's images.
        test_crop_ratio: Side of the test view over the shorter side of the
            image. None is 224 / 256.
        model_arguments: Arguments of the network, if none are given.
        expected_errors: Test error in percent by network, as published.

    >>> from keras_resnet.training.recipes import RECIPES
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
    clip_norm: float | None = None
    weight_decay: float = 1e-4
    decay_norms: bool = True
    loss: str = "cross_entropy"
    label_smoothing: float = 0.0
    target_threshold: float | None = None
    micro_batches: int = 1
    average_momentum: float = 0.0
    head_learning_rate: float | None = None
    augmentation: Augmentation = dataclasses.field(default_factory=Augmentation)
    progressive_sizes: tuple[int, ...] = ()
    image_size: int | None = None
    test_crop_ratio: float | None = None
    model_arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    expected_errors: dict[str, float] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        for fields, is_allowed, rule in recipe_rules.RULES:
            for name in fields:
                value = getattr(self, name)
                if value is not None and not is_allowed(value):
                    raise ValueError(
                        f"{name} must be {rule}, received {value!r}"
                    )
        if self.batch_size % self.micro_batches:
            raise ValueError(
                "micro_batches must divide batch_size, received micro_batches="
                f"{self.micro_batches}, batch_size={self.batch_size}"
            )
        if self.head_learning_rate is not None and (
            self.optimizer not in ("momentum", "nesterov")
            or not self.learning_rate
        ):
            raise ValueError(
                "head_learning_rate needs the optimizer momentum or nesterov "
                f"and a learning_rate above 0, received {self.optimizer} and "
                f"{self.learning_rate}"
            )
        size = self.augmentation.train_image_size
        if self.progressive_sizes and size is not None:
            raise ValueError(
                "progressive_sizes cannot be combined with train_image_size, "
                f"received {self.progressive_sizes} and {size}"
            )

    def augmentation_at(self, step: int) -> Augmentation:
        """Returns the augmentation of the batch after `step` steps.

        >>> sizes = (128, 224)
        >>> recipe = Recipe("x", "", 64, 100, 0.1, progressive_sizes=sizes)
        >>> recipe.augmentation_at(49).train_image_size
        128
        >>> recipe.augmentation_at(50).train_image_size
        224
        """
        if not self.progressive_sizes:
            return self.augmentation
        return dataclasses.replace(
            self.augmentation,
            train_image_size=self.progressive_sizes[self._part(step)],
        )

    def same_size_until(self, step: int) -> int | None:
        """Returns the step at which the next size begins; None for no other.

        Args:
            step: Number of completed steps.
        """
        parts = len(self.progressive_sizes)
        after = self._part(step) + 1
        return -(-after * self.steps // parts) if after < parts else None

    def _part(self, step):
        parts = len(self.progressive_sizes)
        return max(min(step * parts // self.steps, parts - 1), 0)

    def decays(self, variable) -> bool:
        """Returns whether a parameter is decayed."""
        return self.decay_norms or variable.name.endswith("kernel")

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

        >>> from keras_resnet.training.recipes import RECIPES
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

        Args:
            name: A field of the recipe or of its augmentation, as in
                `to_json`.
            value: The text.

        Raises:
            ValueError: If the field is unknown, or the text does not have its
                type.

        >>> from keras_resnet.training.recipes import RECIPES
        >>> RECIPES["cifar10"].with_field("learning_rate", "0.05").learning_rate
        0.05
        """
        types = _types()
        kept = ("name", "source", "model_arguments")
        settable = [n for n in types if n not in kept]
        if name not in settable:
            raise ValueError(names.unknown("recipe field", name, settable))
        changed = {name: fields_lib.parse(types[name], value)}
        return _of_fields({**self.fields(), **changed})

    def fields(self) -> dict[str, Any]:
        """Returns the fields by name, with those of the augmentation.

        `"augmentation"` is the name of the augmentation.

        >>> from keras_resnet.training.recipes import RECIPES
        >>> fields = RECIPES["cifar10"].fields()
        >>> fields["augmentation"], fields["mixup_alpha"]
        ('pad_crop_flip', 0.0)
        """
        fields = dataclasses.asdict(self)
        augmentation = fields.pop("augmentation")
        return {
            **fields,
            "augmentation": augmentation.pop("name"),
            **augmentation,
        }

    def learning_rates(self) -> LearningRates:
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
        """Returns `fields` as JSON has them."""
        return json.loads(json.dumps(self.fields()))

    @classmethod
    def from_json(cls, fields: dict) -> "Recipe":
        """Returns the recipe from the dict of `to_json`.

        Raises:
            TypeError: If a field is missing or unknown.
            ValueError: If a value does not have the type of its field.
        """
        fields_lib.check_fields(_types(), fields)
        lists = ("decay_at_steps", "progressive_sizes")
        tuples = {name: tuple(fields[name]) for name in lists}
        return _of_fields({**fields, **tuples})


def _types() -> dict[str, Any]:
    """Returns the types of `Recipe.fields`."""
    types = typing.get_type_hints(Recipe)
    augmentation = typing.get_type_hints(Augmentation)
    return {**types, "augmentation": augmentation.pop("name"), **augmentation}


def _of_fields(fields: dict[str, Any]) -> Recipe:
    """Returns the recipe from the dict of `Recipe.fields`."""
    fields = dict(fields)
    augmentation = {
        field.name: fields.pop(field.name)
        for field in dataclasses.fields(Augmentation)
        if field.name != "name"
    }
    name = fields.pop("augmentation")
    return Recipe(augmentation=Augmentation(name, **augmentation), **fields)
