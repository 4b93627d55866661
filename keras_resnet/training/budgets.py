"""The length of a run that must end in time."""

import dataclasses
import os
import time
from collections.abc import Callable
from typing import NamedTuple

from keras_resnet.training import configs
from keras_resnet.training import workdirs

_SHARE = 0.92  # of the time; the rest is for saving and for slower moments
_MEASURED = 0.03  # of the time, for measuring the speed
_MOST_MEASURED = 60.0  # seconds
_EVALUATIONS = 20  # of a run without `eval_every`

# A test image costs a forward pass, a training image a backward pass also.
_TEST_COST = 1 / 3


class BudgetError(ValueError):
    """A time that a run cannot keep; the message says why."""


def with_length(
    config: configs.Config,
    workdir: str | os.PathLike,
    minutes: float,
    make_trainer: Callable,
    test_size: int,
    eval_every: int | None = None,
) -> configs.Config:
    """Returns the configuration with as many steps as fit into the time.

    A run that exists keeps the length in its `config.json`. For a new one, a
    trainer takes a few steps and is dropped: the run then starts from the same
    weights as a run with `steps` of the same number. Each of
    `progressive_sizes` is measured.

    Args:
        config: The configuration of the run.
        workdir: The work directory.
        minutes: Time from now to the end of the run.
        make_trainer: Function that returns a trainer of a configuration.
        test_size: Number of test images.
        eval_every: As in `loop.train_and_evaluate`.

    Raises:
        BudgetError: If not even one step fits.
        workdirs.WorkdirError: If `config.json` cannot be read.
    """
    path = workdirs.local(workdir)
    if (path / "config.json").exists():
        return _of_length(config, workdirs.read_config(path).recipe.steps)
    sizes = config.recipe.progressive_sizes or (None,)
    least = min(_MEASURED * 60 * minutes, _MOST_MEASURED)
    measured = {
        size: _measured(make_trainer, _of_size(config, size), least)
        for size in dict.fromkeys(sizes)
    }
    starting = sum(speed.starting for speed in measured.values())
    seconds = sum(speed.seconds for speed in measured.values())
    each = sum(measured[size].each for size in sizes) / len(sizes)
    # The run starts once more: it builds and traces again.
    left = _SHARE * 60 * minutes - 2 * starting - seconds
    largest = max(speed.each for speed in measured.values())
    test = _TEST_COST * largest * test_size / config.recipe.batch_size
    if eval_every is None:
        steps = int((left - _EVALUATIONS * test) / each)
    else:
        steps = int((left - test) / (each + test / eval_every))
    if steps < 1:
        raise BudgetError(
            f"minutes must be enough for one step, received {minutes:.2g}: the "
            f"start takes {2 * starting:.0f} seconds, a step {each:.2g}, and a "
            f"test {test:.2g}"
        )
    return _of_length(config, steps)


class _Speed(NamedTuple):
    """Seconds: of the start, of the steps after it, of each step."""

    starting: float
    seconds: float
    each: float


def _measured(make_trainer, config, at_least):
    """Returns the speed of a few steps, which take some seconds."""
    start = time.monotonic()
    trainer = make_trainer(config)
    trainer.take(1, False, 0.0)  # with tracing and compilation
    starting = time.monotonic() - start
    count, taken, seconds = 1, 0, 0.0
    while seconds < at_least or taken < 3:
        before = time.monotonic()
        trainer.take(count, False, 0.0)
        seconds += time.monotonic() - before
        taken += count
        count *= 2
    return _Speed(starting, seconds, seconds / taken)


def _of_size(config, size):
    """Returns the configuration with training images of one size."""
    if size is None:
        return config
    recipe = dataclasses.replace(config.recipe, progressive_sizes=(size,))
    return dataclasses.replace(config, recipe=recipe)


def _of_length(config, steps):
    return dataclasses.replace(config, recipe=config.recipe.with_steps(steps))
