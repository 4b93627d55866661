"""Writes a trained network as a SavedModel for TensorFlow Serving.

    python -m apps.export --workdir=DIR --export_dir=DIR
    python -m apps.export --model=FILE.keras --dataset=cifar10 --export_dir=DIR
    python -m apps.export --model=resnet20 --weights=FILE --export_dir=DIR

EXPORT_DIR gets the next integer version, which appears at once and whole, and
only if it answers test images as the trained network does.
"""

from absl import flags

from . import command_line

_WORKDIR = flags.DEFINE_string("workdir", None, "What apps.train wrote.")
_MODEL = flags.DEFINE_string(
    "model", None, "Name of the network, or a .keras file."
)
_WEIGHTS = flags.DEFINE_string(
    "weights", None, "With --model=NAME: its weights; default: random ones."
)
_SET = flags.DEFINE_multi_string(
    "set", [], "With --model=NAME: model.ARGUMENT=VALUE; can be repeated."
)
_DATASET = flags.DEFINE_string(
    "dataset", None, "With --model: what it was trained on, as for apps.train."
)
_DATA_DIR = flags.DEFINE_string(
    "data_dir", None, "Where TFDS keeps its sets; default: as in training."
)
_LABELS = flags.DEFINE_string(
    "labels", None, "With --model: a file with one label a line."
)
_MEAN = flags.DEFINE_list(
    "mean", None, "With --model: of each channel, in units of 0 to 1."
)
_STANDARD_DEVIATION = flags.DEFINE_list(
    "standard_deviation", None, "With --model: of each channel, likewise."
)
_EXPORT_DIR = flags.DEFINE_string(
    "export_dir", None, "Where the versions are; made where there is none."
)
_PRECISION = flags.DEFINE_enum(
    "precision",
    "float32",
    ["float32", "bfloat16", "int8"],
    "bfloat16: kernels and activations, half the size, faster on processors "
    "that multiply in it faster than in float32. int8: kernels, a quarter of "
    "the size; LiteRT computes in int8 too.",
)
_FORMATS = flags.DEFINE_list(
    "formats",
    ["saved_model"],
    "saved_model, which is always written, litert and onnx.",
)
_WARMUP = flags.DEFINE_list(
    "warmup_batch_sizes",
    ["1"],
    "Of the requests that a server warms up with; empty for none.",
)
_MAX_PIXELS = flags.DEFINE_integer(
    "max_pixels",
    None,
    "Encoded images with more are refused; default: 64 million.",
    lower_bound=1,
)
_CHECK_IMAGES = flags.DEFINE_integer(
    "check_images", 1000, "Test images it is checked on.", lower_bound=1
)


def main(argv):
    """Exports the one network that the flags name."""
    from keras_resnet.serving import export
    from keras_resnet.serving import formats
    from keras_resnet.serving import limits
    from keras_resnet.serving import versions
    from keras_resnet.serving import warmup

    if not _EXPORT_DIR.value:
        raise command_line.UsageError("export_dir", "", "give a directory")
    if bool(_WORKDIR.value) == bool(_MODEL.value):
        raise command_line.UsageError(
            "workdir",
            _WORKDIR.value or "",
            "give --workdir, or --model=NAME or a .keras file",
        )
    with command_line.usage("export_dir", _EXPORT_DIR.value):
        versions.check(_EXPORT_DIR.value)
    with command_line.usage("formats", command_line.text(_FORMATS)):
        formats.check(_FORMATS.value, _PRECISION.value)
    sizes = command_line.numbers(_WARMUP, int)
    with command_line.usage("warmup_batch_sizes", command_line.text(_WARMUP)):
        warmup.check(sizes)
    source = _source()
    command_line.show(
        f"{source.title}, {len(source.labels)} labels, views of "
        f"{source.preprocessing.image_size}x{source.preprocessing.image_size} "
        "pixels"
    )
    path = export.export(
        source.model,
        source.preprocessing,
        source.labels,
        _EXPORT_DIR.value,
        precision=_PRECISION.value,
        formats=_FORMATS.value,
        max_pixels=_MAX_PIXELS.value or limits.MAX_PIXELS,
        images=_images(source),
        warmup_batch_sizes=sizes,
        about=source.about,
    )
    card = export.read_card(path)
    for name, check in card["checks"].items():
        command_line.show(
            f"{name}: the class of the trained network for "
            f"{check['same_class']:,} of {card['checked_on']}"
        )
    command_line.show(f"exported {path}")
    command_line.show(
        f"next: python -m apps.predict --saved_model={_EXPORT_DIR.value} IMAGE"
    )


def _source():
    from keras_resnet import models
    from keras_resnet.serving import sources

    if _WORKDIR.value:
        command_line.only_with(
            _WORKDIR,
            *(_WEIGHTS, _SET, _DATASET, _LABELS, _MEAN, _STANDARD_DEVIATION),
        )
        with command_line.usage("workdir", _WORKDIR.value):
            return sources.of_workdir(_WORKDIR.value, _DATA_DIR.value)
    if _MODEL.value.endswith(".keras"):
        command_line.only_with(_MODEL, _WEIGHTS, _SET)
    arguments = {}
    given = command_line.settings(_SET.value, "model")["model"]
    if given:
        with command_line.usage("model", _MODEL.value):
            spec = models.get_spec(_MODEL.value)
        arguments = command_line.model_arguments(spec, given)
    return command_line.of_model(
        _MODEL.value,
        _WEIGHTS.value,
        arguments,
        dataset=_DATASET.value,
        data_dir=_DATA_DIR.value,
        labels=_labels(),
        mean=command_line.numbers(_MEAN),
        standard_deviation=command_line.numbers(_STANDARD_DEVIATION),
    )


def _labels():
    if not _LABELS.value:
        return None
    try:
        with open(_LABELS.value, encoding="utf-8") as file:
            return file.read().splitlines()
    except (OSError, ValueError) as error:  # or it is no text
        reason = getattr(error, "strerror", None) or error
        raise command_line.UsageError(
            "labels", _LABELS.value, reason
        ) from error


def _images(source):
    """Test images; None, after a note, where there are none."""
    is_calibrated = _PRECISION.value == "int8" and "litert" in _FORMATS.value
    try:
        return source.images(_CHECK_IMAGES.value, is_calibrated)
    except (ValueError, OSError) as error:
        if is_calibrated:
            raise command_line.UsageError(
                "precision", "int8", f"needs training images: {error}"
            ) from error
        command_line.show(
            f"no test images, so it is checked on digits: {error}"
        )
        return None


def cli():
    """The console script."""
    command_line.run(main)


if __name__ == "__main__":
    cli()
