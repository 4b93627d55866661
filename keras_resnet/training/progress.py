"""The visible progress of a run: a bar on a terminal, lines elsewhere."""

import contextlib
import sys
import threading
import time
from collections.abc import Callable
from collections.abc import Iterator

import tqdm

from keras_resnet.training.recipe import Recipe

# Time until the first line, and between two lines, if no row is due. A log
# then shows early that a run is alive, and how long it will take.
_FIRST_SECONDS = 5.0
_SECONDS = 30.0
# Time between two lines about a step that does not end.
_STALL_SECONDS = 60.0


def train_row(trainer, step: int) -> dict:
    """Returns the row of `metrics.csv` of a step, without the test errors.

    Args:
        trainer: A `TensorFlowTrainer` or a `JaxTrainer` at this step.
        step: The step.
    """
    loss, top1_errors, top5_errors, images = trainer.read_sums()
    return {
        "step": step,
        "learning_rate": float(trainer.rates(step - 1)),
        "train_loss": loss / images,
        "train_top1_error": 100 * top1_errors / images,
        "train_top5_error": 100 * top5_errors / images,
    }


@contextlib.contextmanager
def stalls(
    report: Callable[[str], None], reason: str, seconds: float = _STALL_SECONDS
) -> Iterator[None]:
    """Reports again and again that the steps inside do not end.

    Args:
        report: Receives lines, in another thread.
        reason: What may be the reason; empty for no lines.
        seconds: Time until the first line, and between two lines.
    """
    ended = threading.Event()
    start = time.monotonic()

    def wait():
        while not ended.wait(seconds):
            waited = time.monotonic() - start
            report(f"no step for {waited:.0f} seconds: {reason}")

    thread = threading.Thread(target=wait, daemon=True)
    if reason:
        thread.start()
    try:
        yield
    finally:
        ended.set()
        if reason:
            thread.join()


class Progress:
    """Shows the rows of a run as they come, and the steps between them.

    Args:
        recipe: The recipe of the run.
        images: Number of training images.
        report: Receives lines.
        is_shown: Whether this process shows a bar.
    """

    def __init__(
        self,
        recipe: Recipe,
        images: int,
        report: Callable[[str], None],
        is_shown: bool,
    ):
        self.recipe = recipe
        self.report = report
        self.is_terminal = is_shown and sys.stderr.isatty()
        self._epochs_of_step = recipe.batch_size / images
        self._silent_from = time.monotonic()
        self._silence = _FIRST_SECONDS
        self._bar: tqdm.tqdm | None = None

    @contextlib.contextmanager
    def bar(self, step: int) -> Iterator[None]:
        """Shows a bar on a terminal, which starts at a step."""
        with tqdm.tqdm(
            total=self.recipe.steps,
            initial=step,
            unit="step",
            disable=not self.is_terminal,
            leave=False,
        ) as self._bar:
            yield

    def show_step(
        self, count: int, row: dict, speed: float | None, is_due: bool
    ) -> None:
        """Shows steps: on the bar, or in a line after a silence.

        Args:
            count: Number of steps since the last call.
            row: The metrics so far.
            speed: Images a second, or None.
            is_due: Whether the row of this step follows.
        """
        if self._bar is not None:
            self._bar.update(count)
        if self.is_terminal and self._bar is not None:
            self._bar.set_postfix_str(
                f"{self._epochs(row)}, loss {row['train_loss']:.3f}, error "
                f"{row['train_top1_error']:.1f}%, {speed or 0:,.0f} images/s"
            )
            return
        silence = time.monotonic() - self._silent_from
        if not is_due and silence > self._silence:
            self._show(row, speed)

    def show_row(self, row: dict, speed: float | None) -> None:
        """Reports a row; a terminal has the bar for rows without a test."""
        if not self.is_terminal or "test_loss" in row:
            with tqdm.tqdm.external_write_mode(file=sys.stderr):
                self._show(row, speed)

    def _show(self, row, speed):
        self.report(self._line(row, speed))
        self._silent_from = time.monotonic()
        self._silence = _SECONDS

    def _epochs(self, row):
        """Returns the number of epochs so far, and of the run."""
        each = self._epochs_of_step
        steps = self.recipe.steps
        return f"epoch {row['step'] * each:.1f} of {steps * each:.1f}"

    def _line(self, row, speed):
        """Returns the line of a row."""
        words = [
            f"step {row['step']:,} of {self.recipe.steps:,}",
            self._epochs(row),
            f"loss {row['train_loss']:.3f}",
            f"error {row['train_top1_error']:.2f}%",
        ]
        if "test_loss" in row:
            words.append(f"test error {row['test_top1_error']:.2f}%")
        if speed:
            words.append(f"{speed:,.0f} images/s")
            left = (self.recipe.steps - row["step"]) * self.recipe.batch_size
            minutes, seconds = divmod(round(left / speed), 60)
            hours, minutes = divmod(minutes, 60)
            words.append(f"{hours}:{minutes:02d}:{seconds:02d} left")
        return ", ".join(words)
