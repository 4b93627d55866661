"""What the page of results shows beside its tables, each as a picture."""

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
    """A figure and where it goes.

    Attributes:
        name: Its file name without ending.
        section: Where on the page: a key of `experiments.TABLES`, or what
            `tables` calls the section.
        caption: What it shows, in sentences.
        figure: What is drawn.
        curves: Names of the runs of which it draws every error.
    """

    name: str
    section: str
    caption: str
    figure: Figure
    curves: frozenset[str] = frozenset()


# Of how many experiments the curves can be told apart.
_MOST_CURVES = 6


def run_errors(runs: Sequence[Run]) -> list[Picture]:
    """Errors of the runs of each data set and length, as `curves` draws them.

    Args:
        runs: Any runs, whether or not the papers have their like.
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
    """Draws errors of runs of one length, and returns whose curves it shows.

    They are drawn against the step. Of more than `_MOST_CURVES` experiments,
    and of runs that were tested once, those of the last step are drawn.
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
    """For each table and length what no other picture shows.

    Errors against the step; of more than `_MOST_CURVES` experiments, those of
    the last step.

    Args:
        runs: Any runs.
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
    """What the networks of [1, Sec. 4.2] cost, counted."""
    return [
        Picture(
            "cost_by_depth",
            tables.COSTS,
            "What a network of [1, Sec. 4.2] costs by its depth. Activations "
            "are about what training keeps of an image, in float32.",
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
    """Signals and gradients by depth for each shortcut of [2, Table 1]."""
    return [
        Picture(
            "propagation_by_depth",
            "[2, Table 1] at 20 layers",
            "Signals and gradients at the start of training for each shortcut "
            "of [2, Table 1]: ResNet-32 with pre-activation units, seed 0, on "
            "32 of the bundled digits. The norm of a unit's input, and of the "
            "gradient there as a share of the last one. A line that is missing "
            "is 0.",
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
    """Predictions for each class, by the weights that ship of a run."""
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
                tables.ANSWERS,
                f"{_whose(name, card['dataset'])}: {card['top1_errors']:,} "
                f"errors on {card['test_images']:,} test images.",
                figures.confusion(np.array(card["confusion"]), card["labels"]),
            )
        )
    return pictures


def wrong_answers(dataset: datasets.DataSet) -> list[Picture]:
    """Images of a data set that the weights that ship for it get wrong."""
    pictures = []
    for name in shipped.networks(dataset.name):
        model = models.resnet(name, weights=dataset.name)
        images, labels = dataset.test_images(dataset.test_size)
        x = [dataset.preprocessing(batch) for batch in _batches(images)]
        probabilities = np.concatenate([model(batch) for batch in x])
        pictures.append(
            Picture(
                f"{name}_wrong_answers",
                tables.ANSWERS,
                f"{_whose(name, dataset.name)}: the surest of its wrong "
                "answers (class: answer, its probability).",
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
