"""Pictures of runs, drawn by matplotlib: SVG for a page, PNG for elsewhere.

An SVG takes its colours of text and lines from the page, so that it can be
read on a light and on a dark one.
"""

import io
import re
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib import rcsetup
from matplotlib import ticker
from matplotlib.figure import Figure

from keras_resnet.analysis import propagation
from keras_resnet.papers.runs import Run

# Colours that stand out from white and from black alike, and from each other
# for those who do not tell red from green.
_COLOURS = (
    *("#1f88c9", "#d55e00", "#009e73", "#cc79a7", "#b8860b", "#8a6fd1"),
    *("#7f7f7f", "#8c564b"),
)
# Those of a light page; an SVG names the page's own in their place.
INK = "#24292e"
_WIDTH = 6.0  # inches; letters can be read on a telephone too
_GRID = "#d0d7dd"

# Any: matplotlib 3.11 wants the keys as literals, 3.10 as text.
_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "keras_resnet",  # the same picture is the same file
    "font.size": 11,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.grid": True,
    "grid.color": _GRID,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "axes.prop_cycle": rcsetup.cycler("color", _COLOURS),
}


def _label(run: Run) -> str:
    """The run's label; a dollar starts a formula, a "_" hides the label."""
    label = run.label.replace("$", r"\$")
    return f" {label}" if label.startswith("_") else label


def error_by_step(runs: Sequence[Run]) -> Figure:
    """Training and test error against the step, as in [1, Fig. 6].

    Args:
        runs: The runs to draw; those of one experiment share a colour.

    Returns:
        A figure: thin lines for training, bold ones for the test.
    """
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH, 4.0), layout="constrained")
        axes = figure.add_subplot()
        names = list(dict.fromkeys(_label(run) for run in runs))
        worst = 0.0
        for run in runs:
            label = _label(run)
            index = names.index(label)
            colour = _COLOURS[index % len(_COLOURS)]
            axes.plot(*run.column("train_top1_error"), color=colour, lw=0.7)
            steps, errors = run.column("test_top1_error")
            is_first = label not in axes.get_legend_handles_labels()[1]
            axes.plot(
                steps,
                errors,
                color=colour,
                lw=2.2,
                label=label if is_first else None,
            )
            worst = max(worst, *errors[len(errors) // 4 :], 0.0)
        axes.set_ylim(0, max(5.0, 1.15 * worst))
        axes.set_xlim(left=0)
        axes.set_xlabel("step")
        axes.set_ylabel("error, %  (thin: training, bold: test)")
        axes.xaxis.set_major_formatter(lambda step, _: f"{step:,.0f}")
        axes.legend(loc="upper right")
    return figure


def last_errors(runs: Sequence[Run]) -> Figure:
    """Training and test error after the last step, a line an experiment.

    Args:
        runs: Finished runs; each is a dot on the line of its experiment.

    Returns:
        A figure: rings for training, dots for the test.
    """
    with matplotlib.rc_context(_STYLE):
        names = list(dict.fromkeys(_label(run) for run in runs))
        height = 1.2 + 0.28 * len(names)
        figure = Figure(figsize=(_WIDTH, height), layout="constrained")
        axes = figure.add_subplot()
        lines = [names.index(_label(run)) for run in runs]
        for column, label, colour, face in (
            ("train_top1_error", "training", _COLOURS[0], "none"),
            ("test_top1_error", "test", _COLOURS[1], _COLOURS[1]),
        ):
            errors = [(run.column(column)[1] or [np.nan])[-1] for run in runs]
            axes.scatter(
                errors,
                lines,
                s=30,
                edgecolors=colour,
                facecolors=face,
                label=label,
            )
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
        axes.set_xlim(left=0)
        axes.set_xlabel("error after the last step, %")
        figure.legend(loc="outside upper right", ncols=2)
    return figure


def lines(
    series: Mapping[str, Mapping[float, float]], x_label: str, y_label: str
) -> Figure:
    """One line for each name, through its points, on logarithmic axes.

    Args:
        series: For each name, y of each x.
        x_label: What x is, and its unit.
        y_label: What y is, and its unit.
    """
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH, 4.0), layout="constrained")
        axes = figure.add_subplot()
        for i, (name, points) in enumerate(series.items()):
            colour = _COLOURS[i % len(_COLOURS)]
            x = sorted(points)
            y = [points[number] for number in x]
            axes.plot(x, y, color=colour, lw=2.2, marker="o", label=name)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xticks(sorted({x for line in series.values() for x in line}))
        axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axes.minorticks_off()
        axes.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
        axes.yaxis.set_major_formatter(lambda y, _: f"{y:,.4g}")
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        figure.legend(loc="outside upper left")
    return figure


def signals_and_gradients(reports: dict[str, dict[str, Any]]) -> Figure:
    """Signals and gradients by unit, one line a network.

    Args:
        reports: What `propagation.propagation` returned, by what to
            call it.
    """
    with matplotlib.rc_context(_STYLE):
        return propagation.draw(reports)


def confusion(counts: np.ndarray, names: Sequence[str]) -> Figure:
    """How often images of each class got each answer; right ones are pale.

    Args:
        counts: Images of each class (row) with each answer (column).
        names: The classes.
    """
    size = len(names)
    wrong = counts * (1 - np.eye(size, dtype=int))
    shades = np.zeros((size, size, 4))
    shades[..., :3] = matplotlib.colors.to_rgb(_COLOURS[1])
    shades[..., 3] = wrong / max(wrong.max(), 1) * 0.8
    with matplotlib.rc_context({**_STYLE, "axes.grid": False}):
        figure = Figure(figsize=(_WIDTH, 5.8), layout="constrained")
        axes = figure.add_subplot()
        corners = np.arange(size + 1) - 0.5
        axes.pcolormesh(corners, corners, shades, edgecolor=_GRID, lw=0.5)
        for row, column in np.ndindex(size, size):
            axes.text(
                column,
                row,
                f"{counts[row, column]:,}",
                ha="center",
                va="center",
                fontsize=9,
                fontweight="bold" if row == column else "normal",
            )
        axes.set_xticks(range(size), names, rotation=45, ha="right")
        axes.set_yticks(range(size), names)
        axes.invert_yaxis()
        axes.set_xlabel("answer")
        axes.set_ylabel("class")
    return figure


def wrong_answers(
    images: np.ndarray,
    labels: np.ndarray,
    probabilities: np.ndarray,
    names: Sequence[str],
    count: int = 24,
) -> Figure:
    """The images whose wrong answer was the surest.

    Args:
        images: uint8 `[images, height, width, channels]`.
        labels: The class of each.
        probabilities: `[images, classes]`.
        names: The classes.
        count: How many images, at most.
    """
    best = probabilities.argmax(-1)
    sure = np.where(best != labels, probabilities.max(-1), 0.0)
    chosen = np.argsort(-sure, kind="stable")[:count]
    chosen = chosen[sure[chosen] > 0]
    columns = 4
    rows = -(-len(chosen) // columns)
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH, 1.8 * rows), layout="constrained")
        for place, index in enumerate(chosen, 1):
            axes = figure.add_subplot(rows, columns, place)
            axes.imshow(images[index].squeeze(), cmap="gray")
            axes.set_axis_off()
            axes.set_title(
                f"{names[labels[index]]}:\n{names[best[index]]}, "
                f"{sure[index]:.0%}",
                fontsize=9,
                pad=2,
            )
    return figure


def svg(figure: Figure) -> str:
    """The figure as an `<svg>` element whose colours are the page's.

    It is as wide as what it stands in; the page defines `--ink` and `--grid`.
    """
    text = io.StringIO()
    with matplotlib.rc_context(_STYLE):
        figure.savefig(
            text, format="svg", transparent=True, metadata={"Date": None}
        )
    element = text.getvalue()
    element = element[element.index("<svg") :]
    head, rest = element.split(">", 1)
    head = re.sub(r' (width|height)="[^"]*"', "", head)
    element = f"{head}>{rest}"
    # Names that nothing refers to would be there twice with a second picture.
    element = re.sub(r' id="[A-Za-z0-9.]+_\d+"', "", element)
    element = re.sub(r"<metadata>.*?</metadata>", "", element, flags=re.DOTALL)
    return element.replace(INK, "var(--ink)").replace(_GRID, "var(--grid)")


def png(figure: Figure) -> bytes:
    """The figure on white; the same figure gives the same bytes."""
    content = io.BytesIO()
    with matplotlib.rc_context(_STYLE):
        figure.savefig(
            content,
            format="png",
            dpi=150,
            facecolor="white",
            metadata={"Software": None},
        )
    return content.getvalue()
