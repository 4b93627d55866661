"""Writes a trained network as a SavedModel for TensorFlow Serving.

    python -m apps.export --workdir=DIR --export_dir=DIR

EXPORT_DIR gets the next integer version, which appears at once and whole. In
another precision than float32 it is asked for the classes of test images too,
and the share of those that are the trained network's is printed.
"""

from absl import flags

from . import command_line

_WORKDIR = flags.DEFINE_string("workdir", None, "What apps.train wrote.")
_EXPORT_DIR = flags.DEFINE_string(
    "export_dir", None, "Where the versions are; made where there is none."
)
_PRECISION = flags.DEFINE_enum(
    "precision",
    "float32",
    ["float32", "bfloat16"],
    "Of kernels and activations. bfloat16 halves the size, and is faster on "
    "processors that multiply in it faster than in float32.",
)

_TEST_IMAGES = 1000


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
        trained.model,
        trained.preprocessing,
        trained.labels,
        _EXPORT_DIR.value,
        precision=_PRECISION.value,
    )
    size = trained.preprocessing.image_size
    print(
        f"{trained.config.model} after {trained.step:,} steps, "
        f"{len(trained.labels)} labels, views of {size}x{size} pixels"
    )
    print(f"exported {path}")
    if _PRECISION.value != "float32":
        _compare(path, trained)
    print(
        f"next: python -m apps.predict --saved_model={_EXPORT_DIR.value} IMAGE"
    )


def _compare(path, trained):
    from keras_resnet.serving import export
    from keras_resnet.training import data

    try:
        dataset = data.load(
            trained.config.dataset,
            trained.config.data_dir,
            preprocessing=trained.preprocessing,
        )
        images, _ = dataset.test_images(_TEST_IMAGES)
    except (ValueError, OSError) as error:
        print(f"{_PRECISION.value}: no test images to compare on: {error}")
        return
    share = export.agreement(path, trained.model, trained.preprocessing, images)
    print(
        f"{_PRECISION.value}: the class of the trained network for "
        f"{share:.1%} of {len(images):,} test images"
    )


def cli():
    """The console script."""
    command_line.run(main)


if __name__ == "__main__":
    cli()
