"""Compares runs with the results of the papers, in tables and pictures.

    python -m apps.report --workdirs=runs --output=report

The command writes results.md, results.html (one file, for a browser) and PNG
files. It needs matplotlib: pip install matplotlib.
"""

from absl import flags

from . import command_line

_WORKDIRS = flags.DEFINE_list(
    "workdirs",
    None,
    "Work directories of the train program, or directories of work "
    "directories. The report reads config.json and metrics.csv of each.",
)
_DATA_DIR = flags.DEFINE_string(
    "data_dir",
    None,
    "Directory in which TensorFlow Datasets has cifar10. If it is set, the "
    "report shows the images that the shipped weights get wrong.",
)
_OUTPUT = flags.DEFINE_string("output", None, "Directory for the report.")


def main(argv):
    """Reports on the work directories."""
    for flag in (_WORKDIRS, _OUTPUT):
        if not flag.value:
            raise command_line.UsageError(
                flag.name, "", "must name a directory"
            )
    with command_line.needs("matplotlib"):
        from keras_resnet.papers import page
        from keras_resnet.papers import runs
    from keras_resnet import atomic
    from keras_resnet.data import datasets

    with command_line.usage("output", _OUTPUT.value):
        output = atomic.local(_OUTPUT.value, "a directory of a report")
    with command_line.usage("workdirs", ",".join(_WORKDIRS.value)):
        found, damaged = runs.find(_WORKDIRS.value)
    command_line.show(*(f"left out: {reason}" for reason in damaged))
    finished = sum(run.is_finished for run in found)
    command_line.show(f"{len(found)} runs, {finished} of them finished")
    dataset = None
    if _DATA_DIR.value:
        with command_line.usage("data_dir", _DATA_DIR.value):
            dataset = datasets.load("cifar10", _DATA_DIR.value)
    for path in page.write(found, output, dataset, damaged):
        command_line.show(path)


def cli():
    """The console script."""
    command_line.run(main)


if __name__ == "__main__":
    cli()
