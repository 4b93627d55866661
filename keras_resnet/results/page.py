"""One page in two forms: Markdown for the repository, HTML for a browser.

The HTML needs no network and no other file: styles and pictures are inside.
"""

import dataclasses
import functools
import html
import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from keras_resnet import models
from keras_resnet import pretrained
from keras_resnet.analysis import complexity
from keras_resnet.results import figures
from keras_resnet.results import tables
from keras_resnet.results.runs import Run
from keras_resnet.results.tables import Table
from keras_resnet.training import data
from keras_resnet.training import experiments

_TITLE = "The papers' tables, made again"
_OTHERS = "Costs and answers"

_INTRODUCTION = (
    "[1] is He et al. 2016a, Deep Residual Learning for Image Recognition; "
    "[2] is He et al. 2016b, Identity Mappings in Deep Residual Networks.",
    "An error of ours is that of the last step, in percent of all test images, "
    "never of the best one on the way: the mean over n seeds and, where n > 1, "
    "the standard deviation of the seeds around it. Every run is listed at the "
    "end, whatever came out. A recipe that was shortened keeps its shape: an "
    "error after 16,000 steps is to be compared with the others of 16,000 "
    "steps, and with the papers' (64,000 steps) only in its order.",
    "`--experiment=NAME` of `apps.train` trains a row; `--seed` chooses the "
    "seed, `--steps` shortens the recipe. `apps.report` wrote this page.",
)


@dataclasses.dataclass(frozen=True)
class Picture:
    """A figure, its file name without ending, and the table it belongs to."""

    name: str
    table: str
    caption: str
    figure: Figure


def write(
    runs: Sequence[Run],
    output: str | os.PathLike,
    dataset: data.DataSet | None = None,
) -> list[str]:
    """Writes `results.md`, `results.html` and the pictures as PNG.

    Args:
        runs: What to report on, in the order in which they are listed.
        output: Directory for the files; made where there is none.
        dataset: Test images to show what the weights that ship for this data
            set get wrong, or None.

    Returns:
        The paths that were written.
    """
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    paper_tables = tables.paper_tables(runs)
    run_table = tables.run_table(runs)
    pictures = [*_curves(runs), _cost()]
    if dataset is not None:
        for name in pretrained.networks(dataset.name):
            pictures += _answers(name, dataset)
    written = []
    for picture in pictures:
        path = output / f"{picture.name}.png"
        _replace(path, figures.png(picture.figure))
        written.append(str(path))
    # The pages come last: what they show is there.
    for name, text in (
        ("results.md", _markdown(pictures, paper_tables, run_table)),
        ("results.html", _html(pictures, paper_tables, run_table)),
    ):
        path = output / name
        _replace(path, text.encode())
        written.append(str(path))
    return written


def _replace(path: Path, content: bytes) -> None:
    """Writes a file so that it is there as a whole or not at all."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_bytes(content)
    os.replace(beside, path)


def _curves(runs: Sequence[Run]) -> list[Picture]:
    """Curves for each table and length that show what no other one does."""
    pictures: list[Picture] = []
    drawn: list[set[str]] = []
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
            if any(names <= others for others in drawn):
                continue
            drawn.append(names)
            pictures.append(
                Picture(
                    f"table{number}_{steps}_steps",
                    source,
                    f"{about}. Recipe of {steps:,} steps.",
                    figures.error_by_step(alike),
                )
            )
    return pictures


def _cost() -> Picture:
    return Picture(
        "cost_by_depth",
        "",
        "What a network of [1, Sec. 4.2] costs by its depth. Activations are "
        "about what training keeps of an image, in float32.",
        figures.lines(_costs(), "depth", "millions"),
    )


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


def _answers(name: str, dataset: data.DataSet) -> list[Picture]:
    """What the weights of a network that ship get wrong."""
    model = models.resnet(name, weights=dataset.name)
    images, labels = dataset.test_images(dataset.test_size)
    x = [dataset.preprocessing(batch) for batch in _batches(images)]
    probabilities = np.concatenate([model(batch) for batch in x])
    best = probabilities.argmax(-1)
    errors = int((best != labels).sum())
    whose = f'{name} with weights="{dataset.name}"'
    return [
        Picture(
            f"{name}_confusion",
            "",
            f"{whose}: {errors:,} errors on {len(labels):,} test images.",
            figures.confusion(labels, best, dataset.labels),
        ),
        Picture(
            f"{name}_wrong_answers",
            "",
            f"{whose}: the surest of its wrong answers (class: answer, its "
            "probability).",
            figures.wrong_answers(
                images, labels, probabilities, dataset.labels
            ),
        ),
    ]


def _batches(images: np.ndarray) -> list[np.ndarray]:
    return np.split(images, range(500, len(images), 500))


def _markdown(
    pictures: list[Picture], paper_tables: list[Table], run_table: Table
) -> str:
    parts = [f"# {_TITLE}", *_INTRODUCTION]
    for table in paper_tables:
        parts += [f"## {table.source}. {table.title}", table.markdown()]
        parts += [
            f"![{picture.caption}]({picture.name}.png)"
            for picture in pictures
            if picture.table == table.source
        ]
    parts.append(f"## {_OTHERS}")
    parts += [
        f"![{picture.caption}]({picture.name}.png)"
        for picture in pictures
        if not picture.table
    ]
    parts += [f"## {run_table.title}", run_table.markdown()]
    return "\n\n".join(parts) + "\n"


_STYLE = """
:root { color-scheme: light dark; --ink: #24292e; --grid: #d0d7dd;
  --paper: #ffffff; --soft: #f4f6f8; --faint: #57606a; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ec;
  --grid: #3a424b; --paper: #11151a; --soft: #1b2128; --faint: #9aa4ae; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, "DejaVu Sans", sans-serif; }
main { max-width: 60rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.8rem; line-height: 1.2; }
h2 { font-size: 1.15rem; margin: 2.5rem 0 .5rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem;
  font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .75rem .25rem 0; text-align: left;
  border-bottom: 1px solid var(--grid); white-space: nowrap; }
th { font-weight: 600; }
code { white-space: nowrap; }
tr.none td { color: var(--faint); }
figure { margin: 1.25rem 0; padding: .75rem; background: var(--soft);
  border-radius: .5rem; }
figure svg { display: block; width: 100%; height: auto; }
figcaption, .note { color: var(--faint); font-size: .9rem; }
"""


def _html(
    pictures: list[Picture], paper_tables: list[Table], run_table: Table
) -> str:
    parts = [f"<h1>{html.escape(_TITLE)}</h1>"]
    parts += [
        "<p>"
        + re.sub("`(.*?)`", r"<code>\1</code>", html.escape(text, quote=False))
        + "</p>"
        for text in _INTRODUCTION
    ]
    for table in paper_tables:
        parts.append(_html_table(table))
        parts += [
            _html_picture(picture)
            for picture in pictures
            if picture.table == table.source
        ]
    parts.append(f"<h2>{html.escape(_OTHERS)}</h2>")
    parts += [_html_picture(p) for p in pictures if not p.table]
    parts.append(_html_table(run_table))
    body = "\n".join(parts)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(_TITLE)}</title>
<style>{_STYLE}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""


def _html_picture(picture: Picture) -> str:
    return (
        f"<figure>{figures.svg(picture.figure)}"
        f"<figcaption>{html.escape(picture.caption)}</figcaption></figure>"
    )


def _html_table(table: Table) -> str:
    def row(cells, tag, kind=""):
        inside = "".join(f"<{tag}>{html.escape(c)}</{tag}>" for c in cells)
        return f"<tr{kind}>{inside}</tr>"

    title = f"{table.source}. {table.title}" if table.source else table.title
    lines = [
        f"<h2>{html.escape(title)}</h2>",
        '<div class="wide"><table>',
        f"<thead>{row(table.header, 'th')}</thead>",
        "<tbody>",
        *(
            row(cells, "td", ' class="none"' if "not run" in cells else "")
            for cells in table.rows
        ),
        "</tbody></table></div>",
    ]
    lines += [f'<p class="note">{html.escape(n)}</p>' for n in table.notes]
    return "\n".join(lines)
