"""Pictures of runs, drawn by matplotlib, as SVG for a page and as PNG.

An SVG uses the page's colours of text and lines, so that it is readable on a
light and on a dark page.
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

# Colours that are visible on white and on black. A reader who does not
# distinguish red from green can distinguish them.
_COLOURS = (
    *("#1f88c9", "#d55e00", "#009e73", "#cc79a7", "#b8860b", "#8a6fd1"),
    *("#7f7f7f", "#8c564b"),
)
# Colours of a light page. An SVG has variables of the page instead.
INK = "#24292e"
_WIDTH = 6.0  # inches; the letters are readable on a telephone
_GRID = "#d0d7dd"

# The type is Any because matplotlib 3.11 expects literal keys, 3.10 text.
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
    """Returns the label of a run, without the special meaning of $ and _."""
    label = run.label.replace("$", r"\$")
    return f" {label}" if label.startswith("_") else label


def error_by_step(runs: Sequence[Run]) -> Figure:
    """Draws training and test error against the step, as in [1, Fig. 6].

    Args:
        runs: Runs to draw. Runs of one experiment have the same colour.

    Returns:
        A figure with thin lines for training and bold lines for the test.
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
    """Draws the errors after the last step, with a line for each experiment.

    Args:
        runs: Finished runs. Each is a dot on the line of its experiment.

    Returns:
        A figure with rings for training and dots for the test.
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
    """Draws one line for each name, on logarithmic axes.

    Args:
        series: For each name, the value of y at each x.
        x_label: Name and unit of x.
        y_label: Name and unit of y.
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
    """Draws signals and gradients by unit, with one line for each network.

    Args:
        reports: Results of `propagation.propagation` by label.
    """
    with matplotlib.rc_context(_STYLE):
        return propagation.draw(reports)


def confusion(counts: np.ndarray, names: Sequence[str]) -> Figure:
    """Draws a confusion matrix, in which only the errors are coloured.

    Args:
        counts: Number of images of each class (row) with each prediction
            (column).
        names: Names of the classes.
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
    """Draws the images with the most probable wrong predictions.

    Args:
        images: uint8 `[images, height, width, channels]`.
        labels: Class of each image.
        probabilities: `[images, classes]`.
        names: Names of the classes.
        count: Largest number of images.
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
    """Returns the figure as an `<svg>` element with the colours of the page.

    The element fills the width of its parent. The page must define `--ink` and
    `--grid`.
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
    # Unused names would not be unique on a page with two pictures.
    element = re.sub(r' id="[A-Za-z0-9.]+_\d+"', "", element)
    element = re.sub(r"<metadata>.*?</metadata>", "", element, flags=re.DOTALL)
    return element.replace(INK, "var(--ink)").replace(_GRID, "var(--grid)")


def png(figure: Figure) -> bytes:
    """Returns the figure on white as PNG. Equal figures give equal bytes."""
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
