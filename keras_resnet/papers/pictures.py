"""Pictures of the page of results."""

import dataclasses
import functools
from collections.abc import Sequence

import keras
import numpy as np
from matplotlib.figure import Figure

from keras_resnet import models
from keras_resnet.analysis import complexity
from keras_resnet.analysis import propagation
from keras_resnet.data import datasets
from keras_resnet.layers import shortcuts
from keras_resnet.papers import experiments
from keras_resnet.papers import figures
from keras_resnet.papers import tables
from keras_resnet.papers.runs import Run
from keras_resnet.weights import shipped


@dataclasses.dataclass(frozen=True)
class Picture:
    """Figure with its name and its place on the page.

    Attributes:
        name: File name without ending.
        section: Section of the page: a key of `experiments.TABLES`, or a
            section of `tables`.
        caption: Sentences that describe the figure.
        figure: The figure.
        curves: Names of the runs whose errors are drawn at every step.
    """

    name: str
    section: str
    caption: str
    figure: Figure
    curves: frozenset[str] = frozenset()


# Largest number of experiments whose curves are distinguishable.
_MOST_CURVES = 6


def run_errors(runs: Sequence[Run]) -> list[Picture]:
    """Draws the errors of runs, one picture for each data set and length.

    Args:
        runs: Runs of the papers' rows, or other runs.
    """
    pictures = []
    kinds = dict.fromkeys(
        (run.config.dataset, run.config.recipe.steps) for run in runs
    )
    for number, (dataset, steps) in enumerate(kinds, 1):
        alike = [
            run
            for run in runs
            if (run.config.dataset, run.config.recipe.steps) == (dataset, steps)
        ]
        figure, shown = _errors(alike)
        if figure is not None:
            pictures.append(
                Picture(
                    f"runs{number}_errors",
                    tables.RUNS,
                    f"{dataset}: recipe of {steps:,} steps.",
                    figure,
                    shown,
                )
            )
    return pictures


def _errors(runs: list[Run]) -> tuple[Figure | None, frozenset[str]]:
    """Draws the errors of runs of one length.

    The errors are drawn against the step. For more than `_MOST_CURVES`
    experiments, and for runs that were tested once, only the errors of the last
    step are drawn.

    Returns:
        The figure, and the names of the runs that it draws at every step.
    """
    tested = [run for run in runs if len(run.column("test_top1_error")[0]) > 1]
    finished = [run for run in runs if run.is_finished]
    if len({run.label for run in finished}) > _MOST_CURVES or not tested:
        order = list(experiments.EXPERIMENTS)
        finished.sort(
            key=lambda run: (
                order.index(run.label) if run.experiment else len(order)
            )
        )
        figure = figures.last_errors(finished) if finished else None
        return figure, frozenset()
    return figures.error_by_step(tested), frozenset(run.name for run in tested)


def curves(
    runs: Sequence[Run], others: Sequence[Picture] = ()
) -> list[Picture]:
    """Draws the errors of each table and length that no other picture shows.

    The errors are drawn against the step. For more than `_MOST_CURVES`
    experiments, only the errors of the last step are drawn.

    Args:
        runs: Runs of the papers' rows, or other runs.
        others: Pictures of the same page.
    """
    pictures: list[Picture] = []
    drawn = [set(picture.curves) for picture in others]
    for number, (source, about) in enumerate(experiments.TABLES.items(), 1):
        shown = [
            run
            for run in runs
            if run.experiment
            and source in run.experiment.printed
            and len(run.column("test_top1_error")[0]) > 1
        ]
        for steps in sorted({run.config.recipe.steps for run in shown}):
            alike = [run for run in shown if run.config.recipe.steps == steps]
            names = {run.name for run in alike}
            figure, _ = _errors(alike)
            if figure is None or any(names <= others for others in drawn):
                continue
            drawn.append(names)
            pictures.append(
                Picture(
                    f"table{number}_{steps}_steps",
                    source,
                    f"{about}. Recipe of {steps:,} steps.",
                    figure,
                )
            )
    return pictures


def costs() -> list[Picture]:
    """Draws the counted costs of the networks of [1, Sec. 4.2]."""
    return [
        Picture(
            "cost_by_depth",
            tables.COSTS,
            "Costs of the networks of [1, Sec. 4.2] by depth. Training keeps "
            "about this size of activations for an image, in float32.",
            figures.lines(_costs(), "depth", "millions"),
        )
    ]


@functools.cache
def _costs() -> dict[str, dict[float, float]]:
    reports = {
        float(depth): complexity.complexity(models.resnet(f"resnet{depth}"))
        for depth in (20, 32, 44, 56, 110, 1202)
    }
    return {
        what: {depth: report[count] / 1e6 for depth, report in reports.items()}
        for count, what in (
            ("parameters", "parameters"),
            ("multiply_adds", "multiply-adds of an image"),
            ("activation_bytes", "bytes of activations of an image"),
        )
    }


def propagations() -> list[Picture]:
    """Draws signals and gradients for the shortcuts of [2, Table 1]."""
    return [
        Picture(
            "propagation_by_depth",
            "[2, Table 1] at 20 layers",
            "Signals and gradients at the start of training for each shortcut "
            "of [2, Table 1]: ResNet-32 with pre-activation units, seed 0, on "
            "32 of the bundled digits. The pictures show the norm of the input "
            "of a unit, and the norm of the gradient there, divided by the "
            "last gradient. A missing line is 0.",
            figures.signals_and_gradients(_propagations()),
        )
    ]


@functools.cache
def _propagations() -> dict[str, dict]:
    batches = datasets.load("digits").train_batches(32, seed=0)
    images, labels = next(iter(batches))
    reports = {}
    for name, shortcut in shortcuts.TABLE_1.items():
        keras.utils.set_random_seed(0)
        model = models.resnet(
            "resnet32",
            input_shape=images.shape[1:],
            unit="pre_activation",
            shortcut=shortcut,
        )
        reports[name] = propagation.propagation(model, images, labels)
    return reports


def confusions(runs: Sequence[Run]) -> list[Picture]:
    """Draws the confusion matrices of shipped weights of the runs."""
    trained = {
        (c.model, c.dataset, c.recipe.name, c.recipe.steps, c.seed, c.dtype)
        for c in (run.config for run in runs)
    }
    pictures = []
    for name in shipped.networks():
        card = shipped.card(name)
        fields = ("model", "dataset", "recipe", "steps", "seed", "dtype")
        if tuple(card[field] for field in fields) not in trained:
            continue
        pictures.append(
            Picture(
                f"{name}_confusion",
                tables.PREDICTIONS,
                f"{_whose(name, card['dataset'])}: {card['top1_errors']:,} "
                f"errors on {card['test_images']:,} test images.",
                figures.confusion(np.array(card["confusion"]), card["labels"]),
            )
        )
    return pictures


def wrong_answers(dataset: datasets.DataSet) -> list[Picture]:
    """Draws the images of a data set that its shipped weights get wrong."""
    pictures = []
    for name in shipped.networks(dataset.name):
        model = models.resnet(name, weights=dataset.name)
        images, labels = dataset.test_images(dataset.test_size)
        x = [dataset.preprocessing(batch) for batch in _batches(images)]
        probabilities = np.concatenate([model(batch) for batch in x])
        pictures.append(
            Picture(
                f"{name}_wrong_answers",
                tables.PREDICTIONS,
                f"{_whose(name, dataset.name)}: the most probable of its wrong "
                "predictions (class: prediction, its probability).",
                figures.wrong_answers(
                    images, labels, probabilities, dataset.labels
                ),
            )
        )
    return pictures


def _whose(network: str, weights: str) -> str:
    return f'{network} with weights="{weights}"'


def _batches(images: np.ndarray) -> list[np.ndarray]:
    return np.split(images, range(500, len(images), 500))
