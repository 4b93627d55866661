"""TensorFlow's profiler around some steps of a run."""

import math
import os

import tensorflow as tf


class Profiler:
    """Profiles the steps after `first` up to `last`, if they are taken.

    Args:
        directory: Directory of the events, for TensorBoard.
        steps: `(first, last)`, or None for no profile.

    Raises:
        ValueError: Unless `0 <= first < last`.
    """

    def __init__(
        self, directory: str | os.PathLike, steps: tuple[int, int] | None
    ):
        if steps is not None and not 0 <= steps[0] < steps[1]:
            raise ValueError(
                "profile_steps must be A,B with 0 <= A < B, received "
                f"{','.join(map(str, steps))}"
            )
        self.directory = os.fspath(directory)
        self.steps = steps
        self.is_on = False

    def next(self, step: int) -> float:
        """Returns the next step at which the profiler starts or stops."""
        return min((s for s in self.steps or () if s > step), default=math.inf)

    def reach(self, step: int) -> None:
        """Starts or stops the profiler at a step."""
        if self.steps is None:
            return
        first, last = self.steps
        if self.is_on and step >= last:
            self.close()
        elif not self.is_on and first <= step < last:
            tf.profiler.experimental.start(self.directory)
            self.is_on = True

    def close(self) -> None:
        """Stops the profiler and writes its file."""
        if self.is_on:
            tf.profiler.experimental.stop()
            self.is_on = False
