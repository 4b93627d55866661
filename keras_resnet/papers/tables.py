"""Tables of runs, and the papers' tables with the errors of our runs.

An error is that of the last step on all test images. The tables have the mean
over n runs and, if n > 1, their standard deviation (n - 1 in the denominator).
"""

import dataclasses
import functools
import html
import math
import statistics
from collections.abc import Iterable
from collections.abc import Sequence
from typing import Any

from keras_resnet import models
from keras_resnet.analysis import complexity
from keras_resnet.papers import claims
from keras_resnet.papers import experiments
from keras_resnet.papers import queues
from keras_resnet.papers.runs import Run
from keras_resnet.training import recipes

#: Sections of the page without a table of the papers.
RUNS = "Runs"
RECIPES = "Recipes"
PREDICTIONS = "Predictions"
COSTS = "Costs"
REMAINING = "Not run yet"


@dataclasses.dataclass(frozen=True)
class Table:
    """Text in rows and columns.

    Attributes:
        source: Table of the papers to compare with, or empty.
        title: Subject of the table.
        header: Titles of the columns.
        rows: Cells of each row.
        notes: Sentences below the table.
        findings: Sentences above the table.
    """

    source: str
    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()
    findings: tuple[str, ...] = ()

    @property
    def section(self) -> str:
        """Name of the section, which pictures refer to."""
        return self.source or self.title

    @property
    def heading(self) -> str:
        """Heading: the source, if it is not empty, and the title."""
        return f"{self.source}. {self.title}" if self.source else self.title

    def markdown(self) -> str:
        """Returns the table without its title as Markdown."""
        lines = [
            _line(self.header),
            _line(["---"] * len(self.header)),
            *map(_line, self.rows),
        ]
        table = ["\n".join(lines)] if self.rows else []
        above, below = (
            [html.escape(text, quote=False) for text in texts]
            for texts in (self.findings, self.notes)
        )
        return "\n\n".join([*above, *table, *below])


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(map(_cell, cells))} |"


def _cell(text: str) -> str:
    """Escapes text from a directory's name or a file for Markdown."""
    text = html.escape(" ".join(text.split()), quote=False)
    return text.replace("|", "\\|")


@dataclasses.dataclass(frozen=True)
class Result:
    """Errors of the finished runs of a row that differ only in their seeds."""

    steps: int
    dtype: str
    errors: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean error in percent."""
        return statistics.fmean(self.errors)

    def __str__(self):
        if len(self.errors) == 1:
            return f"{self.mean:.2f}"
        return f"{self.mean:.2f} ± {statistics.stdev(self.errors):.2f}"


def results(runs: Iterable[Run], experiment: str) -> list[Result]:
    """Returns the errors of the finished runs of a row, the longest runs first.

    Args:
        runs: Runs of any rows.
        experiment: A name in `EXPERIMENTS`.

    Returns:
        A `Result` for each number of steps and dtype. If a seed was run twice
        on a backend, only the first run counts.
    """
    by_kind: dict[tuple[int, str], dict[tuple[str, int], float]] = {}
    for run in runs:
        row = run.experiment
        if row is None or row.name != experiment or not run.is_finished:
            continue
        kind = (run.config.recipe.steps, run.config.dtype)
        seed = (run.config.backend, run.config.seed)
        by_kind.setdefault(kind, {}).setdefault(seed, run.test_error)
    return [
        Result(steps, dtype, tuple(errors.values()))
        for (steps, dtype), errors in sorted(by_kind.items(), reverse=True)
    ]


def paper_tables(runs: Sequence[Run]) -> list[Table]:
    """Returns the tables of the papers, with the rows that were run."""
    tables = [
        _paper_table(runs, source, about)
        for source, about in experiments.TABLES.items()
    ]
    return [table for table in tables if table.rows]


def _paper_table(runs, source, about):
    rows = [
        row for row in experiments.EXPERIMENTS.values() if source in row.printed
    ]
    cells = []
    found: dict[tuple[int, str], dict[str, Sequence[float]]] = {}
    for row in rows:
        named = (row.name, _printed(row.printed[source]))
        for result in results(runs, row.name):
            count = str(len(result.errors))
            steps = f"{result.steps:,}"
            cells.append((*named, str(result), count, steps, result.dtype))
            key = (result.steps, result.dtype)
            found.setdefault(key, {})[row.name] = result.errors
    claim = claims.CLAIMS[source]
    findings = [f"The paper's claim: {claim.text}"]
    for (steps, dtype), errors in found.items():
        if finding := claims.finding(claim, errors):
            findings.append(
                f"Our runs of {steps:,} steps in {dtype}: {finding}"
            )
    if len(findings) == 1:
        findings.append("Our runs do not compare rows of this claim yet.")
    notes = []
    names = {name for errors in found.values() for name in errors}
    if len(names) < len(rows):
        notes.append(
            f"Rows of the paper's table that were run: {len(names)} of "
            f"{len(rows)}."
        )
    if rows[0].dataset == "imagenet2012":
        notes.append(
            "Our errors are those of one central view of 224x224 pixels. "
            "`apps.evaluate --protocol=ten_crop` measures the papers' ten "
            "views."
        )
    return Table(
        source,
        about,
        ("experiment", "paper, %", "ours, %", "n", "steps", "dtype"),
        tuple(cells),
        tuple(notes),
        tuple(findings),
    )


def recipe_table(runs: Iterable[Run]) -> Table:
    """Returns the errors of networks that were trained by different recipes.

    Args:
        runs: Runs of the papers' rows, or other runs. Those that are not
            finished, that changed a field of the recipe other than its length,
            or that gave the network arguments, do not count.

    Returns:
        A row for each recipe, with those of the same network, length and dtype
        one below the other. There is none for a network with one recipe.
    """
    by_length: dict[tuple, dict[str, dict[tuple[str, int], float]]] = {}
    for run in runs:
        config = run.config
        if not run.is_finished or config.model_arguments or not _is_row(config):
            continue
        length = (
            *(config.dataset, config.model),
            *(config.recipe.steps, config.dtype),
        )
        errors = by_length.setdefault(length, {})
        errors.setdefault(config.recipe.name, {}).setdefault(
            (config.backend, config.seed), run.test_error
        )
    rows = []
    for (dataset, model, steps, dtype), by_recipe in sorted(by_length.items()):
        if len(by_recipe) < 2:
            continue
        for name, by_seed in sorted(by_recipe.items()):
            result = Result(steps, dtype, tuple(by_seed.values()))
            count = str(len(by_seed))
            rows.append(
                (dataset, model, name, f"{steps:,}", str(result), count, dtype)
            )
    header = ("data set", "network", "recipe", "steps", "error, %", "n")
    return Table("", RECIPES, (*header, "dtype"), tuple(rows))


def _is_row(config) -> bool:
    """Whether a recipe is the one of its name, at another length or not."""

    def numbers(recipe):
        return dataclasses.replace(recipe, source="", expected_errors={})

    recipe = config.recipe
    if recipe.name not in recipes.RECIPES:
        return False
    row = recipes.get_recipe(recipe.name).with_steps(recipe.steps)
    return numbers(row) == numbers(recipe)


def _printed(error: float | None) -> str:
    if error is None:
        return "-"
    return "fail (> 20)" if math.isinf(error) else f"{error:.2f}"


#: Multiply-adds a second in training, from the images/s of ResNet-56 (3 passes
#: of 125.5 million for an image) at batch 128 in bfloat16: 590 on two cores of
#: an EPYC with AVX-512, 26,000 on an H100.
_SPEEDS = {"two EPYC cores": 2.2e11, "H100": 9.8e12}


def _hours(seconds: float) -> str:
    hours = seconds / 3600
    return f"{hours:,.1f}" if hours >= 1 else f"{hours:.2f}"


def remaining_table(runs: Iterable[Run]) -> Table:
    """Returns the papers' rows without all runs of the whole recipe.

    Args:
        runs: Runs of any rows. Shortened recipes do not count.
    """
    rows = []
    for experiment, count in queues.missing(runs):
        steps = recipes.get_recipe(experiment.recipe).steps
        cost = count * queues.training_multiply_adds(experiment, steps)
        rows.append(
            (
                experiment.name,
                ", ".join(experiment.printed),
                str(count),
                f"{steps:,}",
                *(_hours(cost / speed) for speed in _SPEEDS.values()),
            )
        )
    return Table(
        "",
        REMAINING,
        (
            *("experiment", "table", "runs", "steps"),
            *(f"hours, {device}" for device in _SPEEDS),
        ),
        tuple(rows),
        (
            "The hours are those of all missing runs one after the other, for "
            "the multiply-adds of both passes at the speed of ResNet-56 in "
            "bfloat16, batch 128: 590 images/s on two cores of an EPYC "
            "processor, 26,000 on an H100. Networks for ImageNet may be faster "
            "or slower than that.",
        ),
    )


#: Multiply-adds of residual networks in [1, Table 1].
_PRINTED_MULTIPLY_ADDS = {
    "resnet18": 1.8e9,
    "resnet34": 3.6e9,
    "resnet50": 3.8e9,
    "resnet101": 7.6e9,
    "resnet152": 11.3e9,
}


def cost_table() -> Table:
    """Returns counted and printed costs of networks for ImageNet."""
    rows = [
        (
            report["name"],
            f"{report['parameters']:,}",
            f"{report['multiply_adds']:,}",
            f"{report['printed'] / 1e9:.1f}",
            report["source"],
        )
        for report in sorted(
            [*_residual_costs(), *complexity.OTHERS],
            key=lambda report: report["multiply_adds"],
        )
    ]
    return Table(
        "",
        COSTS,
        ("network", "parameters", "multiply-adds", "printed, 10⁹", "source"),
        tuple(rows),
        (
            "The counts are for one image of 224x224 pixels and 1000 classes. "
            "They come from the layouts.",
        ),
    )


@functools.cache
def _residual_costs() -> tuple[dict[str, Any], ...]:
    return tuple(
        {
            **complexity.complexity(models.resnet(name)),
            "printed": printed,
            "source": "[1, Table 1]",
        }
        for name, printed in _PRINTED_MULTIPLY_ADDS.items()
    )


def run_table(runs: Iterable[Run], damaged: Sequence[str] = ()) -> Table:
    """Returns a table of all runs, finished or not.

    Args:
        runs: Runs of the papers' rows, or other runs.
        damaged: Reasons why other runs could not be read.
    """
    rows = []
    for run in runs:
        recipe = run.config.recipe
        experiment = run.experiment
        _, training = run.column("train_top1_error")
        _, errors = run.column("test_top1_error")
        steps = f"{recipe.steps:,}"
        if not run.is_finished:
            steps = f"{run.step:,} of {steps}"
        rows.append(
            (
                run.name,
                experiment.name if experiment else f"({run.config.model})",
                str(run.config.seed),
                steps,
                run.config.dtype,
                run.config.backend,
                f"{training[-1]:.2f}" if training else "-",
                f"{errors[-1]:.2f}" if errors else "-",
            )
        )
    return Table(
        "",
        RUNS,
        (
            *("run", "experiment", "seed", "steps", "dtype", "backend"),
            *("training error, %", "test error, %"),
        ),
        tuple(rows),
        tuple(f"Left out: {' '.join(reason.split())}" for reason in damaged),
    )
