"""Writes a trained network as a SavedModel for TensorFlow Serving.

    python -m apps.export --workdir=DIR --export_dir=DIR
    python -m apps.export --model=FILE.keras --preprocessing=torch \
        --dataset=cifar10 --export_dir=DIR
    python -m apps.export --model=resnet20 --weights=FILE --preprocessing=tf \
        --export_dir=DIR

EXPORT_DIR gets the next integer version, which appears at once and whole, and
only if it answers images as the network does, and test images with the error
that the training recorded.
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
    "dataset",
    None,
    "With --model: whose test images it is checked on, as for apps.train.",
)
_DATA_DIR = flags.DEFINE_string(
    "data_dir", None, "Where TFDS keeps its sets; default: as in training."
)
_LABELS = flags.DEFINE_string(
    "labels", None, "With --model: a file with one label a line."
)
_PREPROCESSING = flags.DEFINE_enum(
    "preprocessing",
    None,
    ["caffe", "tf", "torch", "cifar10", "none", "dataset"],
    "With --model: what it was trained on. A mode of "
    "keras_resnet.preprocess_input; none for pixels of 0 to 255, which layers "
    "of the network prepare; dataset for what apps.train does for --dataset.",
)
_MEAN = flags.DEFINE_list(
    "mean",
    None,
    "With --model, instead of --preprocessing: of each channel, in units of 0 "
    "to 1.",
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
    "check_images", 1000, "Images that it is checked on.", lower_bound=1
)


def main(argv):
    """Exports the one network that the flags name."""
    from keras_resnet.data import limits
    from keras_resnet.serving import export
    from keras_resnet.serving import folding
    from keras_resnet.serving import formats
    from keras_resnet.serving import sources
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
    if source.preprocessing_source == sources.ASSUMED:
        _warn(
            f"{_MODEL.value} does not tell which preprocessing it was trained "
            "on: the export gives it pixels of 0 to 255 as they are. Name "
            "another by --preprocessing"
        )
    images = _images(source)
    try:
        path = export.export(
            source.model,
            source.preprocessing,
            source.labels,
            _EXPORT_DIR.value,
            precision=_PRECISION.value,
            formats=_FORMATS.value,
            max_pixels=_MAX_PIXELS.value or limits.MAX_PIXELS,
            images=images,
            warmup_batch_sizes=sizes,
            about=source.about,
        )
    except folding.ModelError as error:
        flag = _WORKDIR if _WORKDIR.value else _MODEL
        raise command_line.UsageError(flag.name, flag.value, error) from error
    card = export.read_card(path)
    for name, check in card["checks"].items():
        command_line.show(
            f"{name}: the class of the network for {check['same_class']:,} of "
            f"{card['checked_on']}"
        )
    _show_error(card)
    command_line.show(f"exported {path}")
    where = f"--saved_model={_EXPORT_DIR.value}"
    predict = command_line.command("predict", where, "IMAGE")
    command_line.show(f"next: {predict}")


def _show_error(card):
    """Prints the error on test images, and what it is compared with."""
    from keras_resnet.serving import export

    (check, *_) = card["checks"].values()
    if "top1_error" not in check:
        command_line.show(
            "accuracy was not checked: these are not test images of the "
            "network's labels; --dataset names those"
        )
        return
    line = (
        f"error on {card['checked_on']}: {check['top1_error']:.2f}%, by chance "
        f"{check['chance_error']:.2f}%"
    )
    if "recorded" in card:
        line += f", in training {card['recorded']['top1_error']:.2f}%"
    command_line.show(line)
    if export.is_near_chance(check):
        _warn(
            f"an error of {check['top1_error']:.2f}% is not below chance: the "
            "network is not trained, or was trained on another preprocessing "
            "or on classes in another order"
        )


def _warn(text):
    command_line.show(f"WARNING: {text}")


def _source():
    from keras_resnet import networks
    from keras_resnet.serving import sources

    if _WORKDIR.value:
        command_line.only_with(
            _WORKDIR,
            *(_WEIGHTS, _SET, _DATASET, _LABELS, _PREPROCESSING),
            *(_MEAN, _STANDARD_DEVIATION),
        )
        with command_line.usage("workdir", _WORKDIR.value):
            return sources.of_workdir(
                _WORKDIR.value, _DATA_DIR.value, command_line.show
            )
    if _MODEL.value.endswith(".keras"):
        command_line.only_with(_MODEL, _WEIGHTS, _SET)
    arguments = {}
    given = command_line.settings(_SET.value, "model")["model"]
    if given:
        with command_line.usage("model", _MODEL.value):
            network = networks.get_network(_MODEL.value)
        arguments = command_line.model_arguments(network, given)
    return command_line.of_model(
        _MODEL.value,
        _WEIGHTS.value,
        arguments,
        dataset=_DATASET.value,
        data_dir=_DATA_DIR.value,
        labels=_labels(),
        preprocessing=_PREPROCESSING.value,
        mean=command_line.numbers(_MEAN),
        standard_deviation=command_line.numbers(_STANDARD_DEVIATION),
        # Without labels and images nothing is said of what the network does.
        default_preprocessing=(
            None if _DATASET.value or _LABELS.value else "none"
        ),
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
            f"no test images, so digits stand in for them: {error}"
        )
        return None


def cli():
    """The console script."""
    command_line.run(main)


if __name__ == "__main__":
    cli()
