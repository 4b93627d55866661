"""Queues of runs: rows of the papers' tables that are left to train.

A queue lists one run for each row and seed, with its work directory and the
steps that it has already. A run that is complete is skipped, and any other is
started or resumed by the same command.
"""

import dataclasses
import functools
import os
from collections.abc import Iterable
from collections.abc import Sequence
from pathlib import Path

from keras_resnet import networks
from keras_resnet.papers import experiments
from keras_resnet.papers import runs
from keras_resnet.papers.experiments import Experiment
from keras_resnet.training import recipes

# The backward pass computes two products for each product of the forward pass:
# the gradients of the input and of the kernel.
_PASSES = 3


@dataclasses.dataclass(frozen=True)
class QueuedRun:
    """One run of a queue.

    Attributes:
        experiment: Row of the papers' tables.
        seed: Seed of the run.
        steps: Number of steps of the whole run.
        workdir: Its work directory.
        completed_steps: Number of steps in its `metrics.csv`.
        is_complete: Whether all steps were taken and the network was tested.
    """

    experiment: Experiment
    seed: int
    steps: int
    workdir: Path
    completed_steps: int = 0
    is_complete: bool = False

    @property
    def remaining_multiply_adds(self) -> int:
        """Multiply-adds of the steps that are left, of both passes."""
        if self.is_complete:
            return 0
        recipe = recipes.get_recipe(self.experiment.recipe)
        steps = self.steps - self.completed_steps
        images = steps * recipe.batch_size
        return _PASSES * images * _multiply_adds(self.experiment.name)

    def flags(self) -> list[str]:
        """Returns the flags of the train program for this run."""
        return [
            f"--experiment={self.experiment.name}",
            f"--seed={self.seed}",
            f"--steps={self.steps}",
            f"--workdir={self.workdir}",
        ]


def queue(
    names: Iterable[str],
    seeds: Sequence[int] | None,
    directory: str | os.PathLike,
    steps: int | None = None,
) -> list[QueuedRun]:
    """Returns the runs of some rows and seeds, and how far each one is.

    Args:
        names: Names of rows, keys of `experiments.EXPERIMENTS`.
        seeds: Seeds of each row; None for as many as the row has.
        directory: Parent of the work directories.
        steps: Number of steps of each run; None for the whole recipe.

    Raises:
        ValueError: If a row is unknown, or a work directory contains another
            run or cannot be read.

    >>> (run,) = queue(["resnet20"], [0], "runs", 16_000)
    >>> run.workdir.name, run.completed_steps
    ('resnet20_16000_0', 0)
    """
    found = []
    for name in names:
        row = experiments.get_experiment(name)
        whole = recipes.get_recipe(row.recipe).steps
        for seed in range(row.seeds) if seeds is None else seeds:
            folder = (
                f"{name}_{seed}" if steps is None else f"{name}_{steps}_{seed}"
            )
            found.append(
                _with_progress(
                    QueuedRun(
                        row, seed, steps or whole, Path(directory) / folder
                    )
                )
            )
    return found


def _with_progress(run: QueuedRun) -> QueuedRun:
    """Adds the progress that the work directory of a run records."""
    if not (run.workdir / "config.json").exists():
        return run
    read = runs.load(run.workdir)
    wanted = (run.experiment.name, run.seed, run.steps)
    config = read.config
    received = (config.experiment, config.seed, config.recipe.steps)
    if received != wanted:
        raise ValueError(
            f"{run.workdir} must contain the run of experiment, seed and steps "
            f"{wanted}, received {received}"
        )
    return dataclasses.replace(
        run, completed_steps=read.step, is_complete=read.is_finished
    )


@functools.cache
def _multiply_adds(name: str) -> int:
    """Multiply-adds of one image in the forward pass of a row."""
    row = experiments.get_experiment(name)
    network = networks.get_network(row.model)
    size, classes = _IMAGES[row.dataset]
    return network.multiply_adds(
        size, classes, network.arguments(row.arguments)
    )


# Size of the square images in pixels, and number of classes.
_IMAGES = {
    "cifar10": (32, 10),
    "cifar100": (32, 100),
    "imagenet2012": (224, 1000),
}
