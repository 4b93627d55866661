"""Measures this package beside the peers that are installed, A B A B.

    python -m benchmarks --groups=training
    python -m benchmarks --data_dir=DIR --output=DIR

Possible peers are keras, tf_keras, torch, torchvision, timm, onnxruntime,
openvino, ai-edge-litert and pillow. Each is optional. onnxruntime and openvino
also need torch and onnx, openvino needs nncf in int8, and timm needs
torchvision. Run nothing else at the same time.
"""

import importlib
import json
import pathlib

from absl import flags

from apps import command_line

_GROUPS = flags.DEFINE_list(
    "groups",
    None,
    "Groups to measure: training, inference, files, int8, depth, memory, "
    "batches, and with --data_dir program, input and augmentation. Default: "
    "all groups.",
)
_ROUNDS = flags.DEFINE_integer(
    "rounds", 5, "Number of turns of each contender.", lower_bound=1
)
_DATA_DIR = flags.DEFINE_string(
    "data_dir",
    None,
    "Directory in which TensorFlow Datasets has cifar10 (for program), with a "
    "folder photos of JPEG files (for input and augmentation).",
)
_OUTPUT = flags.DEFINE_string(
    "output", None, "Directory for benchmark.json, benchmark.md and plots."
)


def _groups(known):
    """Returns the names of the groups that the flags select."""
    needing = ("program", "input", "augmentation")
    if _GROUPS.value is None:
        return [g for g in known if _DATA_DIR.value or g not in needing]
    for name in _GROUPS.value:
        with command_line.usage("groups", name):
            if name not in known:
                raise ValueError(f"must be one of {', '.join(known)}")
            if name in needing and not _DATA_DIR.value:
                raise ValueError("needs --data_dir=DIR")
    return _GROUPS.value


def _write(name, content):
    from keras_resnet import atomic

    output = pathlib.Path(_OUTPUT.value)
    output.mkdir(parents=True, exist_ok=True)
    atomic.write(output / name, content)


def main(argv):
    """Measures the selected groups, and prints each table when it is ready."""
    from benchmarks import measure
    from benchmarks import report
    from benchmarks import works
    from keras_resnet import atomic

    groups = _groups(works.GROUPS)
    if _OUTPUT.value:  # a missing matplotlib is an error before the first turn
        with command_line.usage("output", _OUTPUT.value):
            atomic.local(_OUTPUT.value, "a directory of results")
        with command_line.needs("matplotlib"):
            importlib.import_module("keras_resnet.papers.figures")
    todo = [(g, w) for g in groups for w in works.GROUPS[g]]
    skipped = {n: p for _, w in todo for n, p in measure.missing(w).items()}
    for name, packages in skipped.items():
        command_line.show(f"skipped: {name} needs {', '.join(packages)}")
    # The first contender is ours, to which all are compared.
    todo = [(g, w) for g, w in todo if w.contenders[0] not in skipped]
    measured, rows, tables = [], [], []
    for group, work in todo:
        results = measure.measure(work, _ROUNDS.value, _DATA_DIR.value)
        measured.append((group, work, results))
        rows.append(report.row(group, work, results))
        tables.append(report.table(work, results))
        command_line.show(*tables[-1].splitlines(), "")
        if _OUTPUT.value:  # keeps the results if a later group fails
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
    """Runs the program."""
    command_line.run(main)


if __name__ == "__main__":
    cli()
