"""What runs came to, in tables and pictures, beside the papers' results.

    python -m apps.report --workdirs=runs --output=report

writes results.md, results.html (one file, for a browser) and PNGs. It needs
matplotlib: pip install 'keras-resnet[report]'.
"""

from absl import flags

from . import command_line

_WORKDIRS = flags.DEFINE_list(
    "workdirs",
    None,
    "Work directories of apps.train, or directories of such; of each, "
    "config.json and metrics.csv are read.",
)
_DATA_DIR = flags.DEFINE_string(
    "data_dir",
    None,
    "Where TFDS keeps cifar10: with it, the report shows what the weights that "
    "ship get wrong.",
)
_OUTPUT = flags.DEFINE_string("output", None, "Directory for what is written.")


def main(argv):
    """Reports on the work directories."""
    for flag in (_WORKDIRS, _OUTPUT):
        if not flag.value:
            raise command_line.UsageError(flag.name, "", "name a directory")
    with command_line.extra("report"):
        from keras_resnet.papers import page
        from keras_resnet.papers import runs
    from keras_resnet.data import datasets

    with command_line.usage("workdirs", ",".join(_WORKDIRS.value)):
        found, damaged = runs.find(_WORKDIRS.value)
    command_line.show(*(f"left out: {reason}" for reason in damaged))
    finished = sum(run.is_finished for run in found)
    command_line.show(f"{len(found)} runs, {finished} of them finished")
    dataset = None
    if _DATA_DIR.value:
        with command_line.usage("data_dir", _DATA_DIR.value):
            dataset = datasets.load("cifar10", _DATA_DIR.value)
    for path in page.write(found, _OUTPUT.value, dataset, damaged):
        command_line.show(path)


def cli():
    """The console script."""
    command_line.run(main)


if __name__ == "__main__":
    cli()
