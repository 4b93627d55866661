"""Page of results in two forms: Markdown for the repository, and HTML.

The HTML file contains its styles and pictures, so a browser can open it without
a network.
"""

import html
import os
import re
from collections.abc import Sequence

from keras_resnet import atomic
from keras_resnet.data import datasets
from keras_resnet.papers import figures
from keras_resnet.papers import pictures
from keras_resnet.papers import tables
from keras_resnet.papers.pictures import Picture
from keras_resnet.papers.runs import Run
from keras_resnet.papers.tables import Table

_TITLE = "Results"

_INTRODUCTION = (
    "`python -m apps.report --workdirs=runs --output=report` writes such a "
    "page. A test error is that of the last step, in percent of all test "
    "images, never that of the best step. The table lists every run.",
)

_PAPERS = Table(
    "",
    "Beside the papers",
    (),
    (),
    (
        "[1] is He et al. 2016a, Deep Residual Learning for Image Recognition; "
        "[2] is He et al. 2016b, Identity Mappings in Deep Residual Networks.",
        "The tables have the rows of the papers that were run to their last "
        'step. The column "ours" has the mean over n runs and, if n > 1, '
        "their standard deviation. The runs differ in their seed or backend. "
        "A shortened recipe keeps its shape. Compare an error after 16,000 "
        "steps with other errors after 16,000 steps. Compare only the order "
        "of the errors with the papers, which train for 64,000 steps.",
        "`python -m apps.train --experiment=resnet20 --seed=0` trains a row, "
        "and `--steps=16000` shortens its recipe.",
    ),
)


def write(
    runs: Sequence[Run],
    output: str | os.PathLike,
    dataset: datasets.DataSet | None = None,
    damaged: Sequence[str] = (),
) -> list[str]:
    """Writes `results.md`, `results.html` and the pictures as PNG.

    Args:
        runs: Runs of the report, in this order.
        output: Directory for the files. It is created if it does not exist.
        dataset: Test images, or None. The page shows the images that the
            shipped weights for this data set get wrong.
        damaged: Reasons why other runs could not be read.

    Returns:
        The paths of the files.

    Raises:
        ValueError: If `output` is not a local path.
    """
    output = atomic.local(output, "a directory of a report")
    output.mkdir(parents=True, exist_ok=True)
    shown = [
        *(errors := pictures.run_errors(runs)),
        *pictures.confusions(runs),
        *(pictures.wrong_answers(dataset) if dataset else ()),
    ]
    sections = [
        tables.run_table(runs, damaged),
        tables.recipe_table(runs),
        tables.Table("", tables.PREDICTIONS, (), ()),
    ]
    if papers := tables.paper_tables(runs):
        shown += pictures.curves(runs, errors)
        shown += pictures.propagations() + pictures.costs()
        sections += [
            *(_PAPERS, *papers),
            *(tables.remaining_table(runs), tables.cost_table()),
        ]
    parts = [
        (table, [p for p in shown if p.section == table.section])
        for table in sections
    ]
    parts = [
        (table, own) for table, own in parts if table.rows or table.notes or own
    ]
    shown = [picture for _, own in parts for picture in own]
    written = []
    for picture in shown:
        path = output / f"{picture.name}.png"
        atomic.write(path, figures.png(picture.figure))
        written.append(str(path))
    # The pages come last, when their pictures exist.
    for name, text in (
        ("results.md", _markdown(parts)),
        ("results.html", _html(parts)),
    ):
        path = output / name
        atomic.write(path, text)
        written.append(str(path))
    return written


def _markdown(parts: list[tuple[Table, list[Picture]]]) -> str:
    lines = [f"# {_TITLE}", *_INTRODUCTION]
    for table, own in parts:
        lines.append(f"## {table.heading}")
        if table.rows or table.notes:
            lines.append(table.markdown())
        lines += [
            f"![{picture.caption}]({picture.name}.png)" for picture in own
        ]
    return "\n\n".join(lines) + "\n"


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
code { overflow-wrap: anywhere; }
@media (max-width: 40rem) { th, td { padding-right: .5rem; }
  td:first-child { white-space: normal; min-width: 8rem; } }
figure { margin: 1.25rem 0; padding: .75rem; background: var(--soft);
  border-radius: .5rem; max-width: 48rem; }
figure svg { display: block; width: 100%; height: auto; }
figcaption, .note { color: var(--faint); font-size: .9rem; }
"""


def _html(parts: list[tuple[Table, list[Picture]]]) -> str:
    lines = [f"<h1>{html.escape(_TITLE)}</h1>"]
    lines += [f"<p>{_text(text)}</p>" for text in _INTRODUCTION]
    for table, own in parts:
        lines.append(f"<h2>{html.escape(table.heading)}</h2>")
        if table.rows or table.notes:
            lines.append(_html_table(table))
        lines += map(_html_picture, own)
    body = "\n".join(lines)
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
        f"<figcaption>{_text(picture.caption)}</figcaption></figure>"
    )


def _text(text: str) -> str:
    text = html.escape(text, quote=False)
    return re.sub("`(.*?)`", r"<code>\1</code>", text)


def _html_table(table: Table) -> str:
    def row(cells, tag):
        first, *others = map(html.escape, cells)
        first = first.replace("_", "_<wbr>")  # a long name may wrap there
        inside = "".join(f"<{tag}>{c}</{tag}>" for c in (first, *others))
        return f"<tr>{inside}</tr>"

    lines = [f"<p>{_text(finding)}</p>" for finding in table.findings]
    if table.rows:
        lines += [
            '<div class="wide"><table>',
            f"<thead>{row(table.header, 'th')}</thead>",
            "<tbody>",
            *(row(cells, "td") for cells in table.rows),
            "</tbody></table></div>",
        ]
    lines += [f'<p class="note">{_text(note)}</p>' for note in table.notes]
    return "\n".join(lines)
