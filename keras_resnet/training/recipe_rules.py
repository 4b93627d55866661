"""Rules for the values of a recipe."""

import math
from collections.abc import Callable

from keras_resnet.training.schedules import SCHEDULES

# The optimizers that decay the weights themselves, not through the gradient.
DECOUPLED = ("adamw", "lamb", "lars")
COUPLED = ("momentum", "nesterov", "adam")
OPTIMIZERS = (*COUPLED, *DECOUPLED)
LOSSES = ("cross_entropy", "binary_cross_entropy")

# Fields, what their values must be, and the same in words. None is always
# allowed: the types decide where it may be.
RULES: tuple[tuple[tuple[str, ...], Callable, str], ...] = (
    (("schedule",), SCHEDULES.__contains__, f"one of {SCHEDULES}"),
    (("optimizer",), OPTIMIZERS.__contains__, f"one of {OPTIMIZERS}"),
    (("loss",), LOSSES.__contains__, f"one of {LOSSES}"),
    (
        (
            "batch_size",
            "steps",
            "micro_batches",
            "image_size",
        ),
        lambda value: value >= 1,
        "at least 1",
    ),
    (
        ("momentum", "label_smoothing", "average_momentum", "target_threshold"),
        lambda value: 0 <= value < 1,
        "at least 0 and less than 1",
    ),
    (
        (
            "learning_rate",
            "warmup_learning_rate",
            "head_learning_rate",
            "weight_decay",
            "warmup_steps",
        ),
        lambda value: 0 <= value < math.inf,
        "finite and at least 0",
    ),
    (
        ("decay_at_steps",),
        lambda value: all(0 <= step < math.inf for step in value),
        "finite and at least 0",
    ),
    (
        ("progressive_sizes",),
        lambda value: all(size >= 1 for size in value),
        "sizes of at least 1 pixel",
    ),
    (
        ("clip_norm",),
        lambda value: 0 < value < math.inf,
        "finite and above 0",
    ),
    (("test_crop_ratio",), lambda value: 0 < value <= 1, "in (0, 1]"),
)
