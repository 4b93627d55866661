"""Writes a trained network as a SavedModel for TensorFlow Serving.

    python -m apps.export --workdir=DIR --export_dir=DIR

EXPORT_DIR gets the next integer version, which appears at once and whole.
"""

from absl import flags

from . import command_line

_WORKDIR = flags.DEFINE_string("workdir", None, "What apps.train wrote.")
_EXPORT_DIR = flags.DEFINE_string(
    "export_dir", None, "Where the versions are; made where there is none."
)


def main(argv):
    """Exports the newest checkpoint of the work directory."""
    for flag in (_WORKDIR, _EXPORT_DIR):
        if not flag.value:
            raise command_line.UsageError(flag.name, "", "give a directory")
    from keras_resnet.serving import export
    from keras_resnet.training import loop

    with command_line.usage("workdir", _WORKDIR.value):
        trained = loop.load_workdir(_WORKDIR.value)
    path = export.export(
        trained.model, trained.preprocessing, trained.labels, _EXPORT_DIR.value
    )
    size = trained.preprocessing.image_size
    print(
        f"{trained.config.model} after {trained.step:,} steps, "
        f"{len(trained.labels)} labels, views of {size}x{size} pixels"
    )
    print(f"exported {path}")
    print(
        f"next: python -m apps.predict --saved_model={_EXPORT_DIR.value} IMAGE"
    )


def cli():
    """The console script."""
    command_line.run(main)


if __name__ == "__main__":
    cli()
