"""Measures our networks beside the peers that are installed, A B A B.

    python -m benchmarks --groups=training
    python -m benchmarks --data_dir=DIR --output=DIR

Peers, none of them needed: keras, tf_keras, torch, onnxruntime, openvino (these
two with torch and onnx) and pillow. Nothing else should run meanwhile.
"""

import importlib
import json
import pathlib

from absl import flags

from apps import command_line

_GROUPS = flags.DEFINE_list(
    "groups",
    None,
    "Which works: training, inference, depth, memory, batches; with --data_dir "
    "program and input too. Default: all of them.",
)
_ROUNDS = flags.DEFINE_integer(
    "rounds", 5, "Turns that each contender has.", lower_bound=1
)
_DATA_DIR = flags.DEFINE_string(
    "data_dir",
    None,
    "Where TFDS keeps cifar10 (program), and a folder photos of JPEG files "
    "(input).",
)
_OUTPUT = flags.DEFINE_string(
    "output", None, "Directory for benchmark.json, benchmark.md and plots."
)


def _groups(known):
    """The names of the groups that the flags ask for."""
    needing = ("program", "input")
    if _GROUPS.value is None:
        return [g for g in known if _DATA_DIR.value or g not in needing]
    for name in _GROUPS.value:
        with command_line.usage("groups", name):
            if name not in known:
                raise ValueError(f"allowed are {', '.join(known)}")
            if name in needing and not _DATA_DIR.value:
                raise ValueError("it needs --data_dir=DIR")
    return _GROUPS.value


def _write(name, content):
    from keras_resnet import atomic

    output = pathlib.Path(_OUTPUT.value)
    output.mkdir(parents=True, exist_ok=True)
    atomic.write(output / name, content)


def main(argv):
    """Measures what the flags name, and says each table when it is there."""
    from benchmarks import measure
    from benchmarks import report
    from benchmarks import works

    groups = _groups(works.GROUPS)
    if _OUTPUT.value:  # what draws is missed before anything is measured
        with command_line.needs("matplotlib"):
            importlib.import_module("keras_resnet.papers.figures")
    measured, rows, tables = [], [], []
    for group, work in ((g, w) for g in groups for w in works.GROUPS[g]):
        results = measure.measure(work, _ROUNDS.value, _DATA_DIR.value)
        measured.append((group, work, results))
        rows.append(report.row(group, work, results))
        tables.append(report.table(work, results))
        command_line.show(*tables[-1].splitlines(), "")
        if _OUTPUT.value:  # what is measured is kept, whatever comes
            _write("benchmark.json", json.dumps(rows, indent=1) + "\n")
            _write("benchmark.md", "\n".join(tables))
    if _OUTPUT.value:
        from keras_resnet.papers import figures

        files = {
            f"{plot.name}.png": figures.png(plot.figure)
            for plot in report.plots(measured)
        }
        for name, png in files.items():
            _write(name, png)
        command_line.show(
            f"in {pathlib.Path(_OUTPUT.value)}: benchmark.json, "
            f"benchmark.md{''.join(f', {name}' for name in files)}"
        )


def cli():
    """The program."""
    command_line.run(main)


if __name__ == "__main__":
    cli()
