"""The learning rate of a recipe as a function of the step."""

import math

import keras
from keras import ops

SCHEDULES = ("step", "cosine", "one_cycle")


@keras.saving.register_keras_serializable(package="keras_resnet")
class LearningRates(keras.optimizers.schedules.LearningRateSchedule):
    """The learning rate of a recipe: warm-up, then steps, cosine or a line.

    Step t counts from 0. With w warm-up steps, the rate is
    `warmup_learning_rate` (or `learning_rate * (t + 1) / w`) for t < w; then
    `learning_rate / 10^(number of decay points <= t)`,
    `learning_rate / 2 * (1 + cos(pi (t - w) / (steps - w)))` or
    `learning_rate * (1 - (t - w) / (steps - w))`.

    Args:
        learning_rate, steps, decay_at_steps, schedule, warmup_steps,
        warmup_learning_rate: The fields of `Recipe`.

    >>> rates = LearningRates(0.1, 64_000, (32_000, 48_000))
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
        done = (step - warmup) / max(self.steps - warmup, 1.0)
        if self.schedule == "cosine":
            rate *= 0.5 * (1.0 + ops.cos(math.pi * done))
        elif self.schedule == "one_cycle":
            rate *= 1.0 - done
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
