"""Tables of what was measured, and plots against depth and batch size."""

from collections.abc import Callable
from collections.abc import Sequence
from typing import Any

from keras_resnet.benchmark.measure import Result
from keras_resnet.benchmark.works import Work

Measured = Sequence[tuple[str, Work, list[Result]]]

# For each plot: the group, x and y as text, and y of a result.
_PLOTS: dict[str, tuple[str, str, str, Callable[[Result], Any]]] = {
    "step_by_depth": (
        "depth",
        "layers",
        "seconds a step, 8 images",
        lambda result: result.seconds,
    ),
    "first_step_by_depth": (
        "depth",
        "layers",
        "seconds to the end of the first step",
        lambda result: result.first_step_seconds,
    ),
    "memory_by_depth": (
        "depth",
        "layers",
        "peak memory of training, GiB",
        lambda result: result.peak_bytes / 2**30,
    ),
    "speed_by_batch": (
        "batches",
        "images in a batch",
        "images a second, ResNet-20",
        lambda result: result.images_per_second,
    ),
}


def table(work: Work, results: Sequence[Result]) -> str:
    """The results of one work in Markdown; a ratio is ours to theirs."""
    lines = [
        f"### {work.name}",
        "",
        "| contender | images/s | ms a step | spread | ours is | goal "
        "| first step | peak memory | graph nodes |",
        "|---|---|---|---|---|---|---|---|---|",
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
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def plots(measured: Measured) -> dict[str, str]:
    """The plots of the groups that were measured: name -> SVG.

    Args:
        measured: (group, work, results) of each work.

    Returns:
        Standalone SVG files.
    """
    # matplotlib belongs to the extra "report": tables do without it.
    from keras_resnet.results import figures

    found = {}
    for name, (group, x_label, y_label, y) in _PLOTS.items():
        series: dict[str, dict[float, float]] = {}
        for its_group, work, results in measured:
            if its_group == group:
                x = work.spec().depth if group == "depth" else work.batch_size
                for result in results:
                    series.setdefault(result.contender, {})[x] = y(result)
        if series:
            figure = figures.lines(series, x_label, y_label)
            found[name] = figures.svg_file(figure)
    return found
