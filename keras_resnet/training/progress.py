"""The progress of a run: a line for each row, and a bar on a terminal."""

import sys
from collections.abc import Callable

import tqdm

from keras_resnet.data import datasets
from keras_resnet.training.recipe import Recipe


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


class Progress:
    """Shows the rows of a run, and between them a bar on a terminal.

    Args:
        recipe: The recipe of the run.
        dataset: Its data set.
        report: Receives the lines.
        has_bar: Whether the bar is shown if stderr is a terminal.
    """

    def __init__(
        self,
        recipe: Recipe,
        dataset: datasets.DataSet,
        report: Callable[[str], None],
        has_bar: bool,
    ):
        self.recipe = recipe
        self.dataset = dataset
        self.report = report
        self.has_bar = has_bar and sys.stderr.isatty()

    def bar(self, step: int) -> tqdm.tqdm:
        """Returns the bar of a run that starts at a step."""
        return tqdm.tqdm(
            total=self.recipe.steps,
            initial=step,
            unit="step",
            disable=not self.has_bar,
            leave=False,
        )

    def show_step(
        self, bar: tqdm.tqdm, trainer, step: int, speed: float | None
    ) -> None:
        """Shows loss, error and epoch on the bar."""
        if self.has_bar and trainer.images_since_row:
            row = train_row(trainer, step)
            bar.set_postfix_str(
                f"{self._epochs(step)}, loss {row['train_loss']:.3f}, error "
                f"{row['train_top1_error']:.1f}%, {speed or 0:,.0f} images/s"
            )

    def show_row(self, row: dict, speed: float | None) -> None:
        """Reports a row; a terminal has a bar for rows without a test."""
        if not self.has_bar or "test_loss" in row:
            with tqdm.tqdm.external_write_mode(file=sys.stderr):
                self.report(self._line(row, speed))

    def _epochs(self, step):
        """Returns the number of epochs so far, and of the run."""
        each = self.recipe.batch_size / self.dataset.train_size
        return f"epoch {step * each:.1f} of {self.recipe.steps * each:.1f}"

    def _line(self, row, speed):
        """Returns the progress line of a row."""
        step, steps = row["step"], self.recipe.steps
        words = [
            f"step {step:,} of {steps:,}",
            self._epochs(step),
            f"loss {row['train_loss']:.3f}",
            f"error {row['train_top1_error']:.2f}%",
        ]
        if "test_loss" in row:
            words.append(f"test error {row['test_top1_error']:.2f}%")
        if speed:
            words.append(f"{speed:,.0f} images/s")
            left = (steps - step) * self.recipe.batch_size
            minutes, seconds = divmod(round(left / speed), 60)
            hours, minutes = divmod(minutes, 60)
            words.append(f"{hours}:{minutes:02d}:{seconds:02d} left")
        return ", ".join(words)
