"""Tables of measurements, and plots against depth and batch size."""

import dataclasses
from collections.abc import Callable
from collections.abc import Sequence
from typing import TYPE_CHECKING
from typing import Any

from benchmarks.measure import Result
from benchmarks.works import Work

if TYPE_CHECKING:
    from keras_resnet.papers.pictures import Picture

Measured = Sequence[tuple[str, Work, list[Result]]]

_ON = "measured by `benchmarks` on one machine"

# For each plot: the group, the labels of x and y, the caption, y of a result.
_PLOTS: dict[str, tuple[str, str, str, str, Callable[[Result], Any]]] = {
    "step_by_depth": (
        "depth",
        "layers",
        "seconds a step, 8 images",
        f"A training step by depth, {_ON}.",
        lambda result: result.seconds,
    ),
    "first_step_by_depth": (
        "depth",
        "layers",
        "seconds to the end of the first step",
        f"From a fresh process to the end of the first step by depth, {_ON}.",
        lambda result: result.first_step_seconds,
    ),
    "memory_by_depth": (
        "depth",
        "layers",
        "peak memory, GiB",
        f"Memory of training with 8 images by depth, {_ON}.",
        lambda result: result.peak_bytes / 2**30,
    ),
    "memory_by_batch": (
        "memory",
        "images in a batch",
        "peak memory, GiB",
        f"Memory of training ResNet-1202, {_ON}.",
        lambda result: result.peak_bytes / 2**30,
    ),
    "speed_by_batch": (
        "batches",
        "images in a batch",
        "images a second, ResNet-20",
        f"Speed of training ResNet-20 by batch, {_ON}.",
        lambda result: result.images_per_second,
    ),
}


def table(work: Work, results: Sequence[Result]) -> str:
    """Returns the results of a work as Markdown. A ratio is ours to theirs."""
    lines = [
        f"### {work.name}",
        "",
        "| contender | images/s | ms a step | spread | ours is | goal "
        "| first step | peak memory | graph nodes | class of float32 |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in results:
        cells = (
            r.contender,
            f"{r.images_per_second:.4g}",
            f"{1000 * r.seconds:.4g}",
            f"{100 * r.spread:.0f}%",
            f"{r.ratio:.2f} x",
            f"{r.goal:.2f} x" if r.goal else "",
            f"{r.first_step_seconds:.2f} s",
            f"{r.peak_bytes / 2**30:.2f} GiB",
            f"{r.graph_nodes:,}" if r.graph_nodes else "",
            "" if r.agreement is None else f"{r.agreement:.1%}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def row(group: str, work: Work, results: Sequence[Result]) -> dict[str, Any]:
    """Returns the entry of a work in `benchmark.json`."""
    return {
        "group": group,
        "work": dataclasses.asdict(work),
        "results": [dataclasses.asdict(result) for result in results],
    }


def plots(measured: Measured) -> list["Picture"]:
    """Draws the plots of the groups that were measured.

    Args:
        measured: (group, work, results) of each work.

    Returns:
        A picture for each plot with results.
    """
    # matplotlib is optional, and tables do not need it.
    from keras_resnet.papers import figures
    from keras_resnet.papers.pictures import Picture

    found = []
    for name, (group, x_label, y_label, caption, y) in _PLOTS.items():
        series: dict[str, dict[float, float]] = {}
        for its_group, work, results in measured:
            if its_group == group:
                x = work.spec().depth if group == "depth" else work.batch_size
                for result in results:
                    series.setdefault(result.contender, {})[x] = y(result)
        if series:
            figure = figures.lines(series, x_label, y_label)
            found.append(Picture(name, "Speed", caption, figure))
    return found
