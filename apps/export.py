"""Writes a trained network as a SavedModel for TensorFlow Serving.

    python -m apps.export --workdir=DIR --export_dir=DIR
    python -m apps.export --model=FILE.keras --preprocessing=torch \
        --dataset=cifar10 --export_dir=DIR
    python -m apps.export --model=resnet20 --weights=FILE --preprocessing=tf \
        --export_dir=DIR

Each export creates the next numbered version in EXPORT_DIR. It is published
atomically, after its predictions have been verified: they must equal the
network's, and the error on test images must be the one that training recorded.
"""

from absl import flags

from . import command_line

_MAX_LABELS_BYTES = 2**24
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Directory that apps.train wrote."
)
_MODEL = flags.DEFINE_string(
    "model", None, "Name of the network, or a .keras file."
)
_WEIGHTS = flags.DEFINE_string(
    "weights", None, "With --model=NAME: its weights; random by default."
)
_SET = flags.DEFINE_multi_string(
    "set", [], "With --model=NAME: model.ARGUMENT=VALUE; can be repeated."
)
_DATASET = flags.DEFINE_string(
    "dataset",
    None,
    "With --model: data set whose test images verify the export; see "
    "apps.train.",
)
_DATA_DIR = flags.DEFINE_string(
    "data_dir",
    None,
    "Directory of the TFDS data sets; as in training by default.",
)
_LABELS = flags.DEFINE_string(
    "labels", None, "With --model: a file with one label per line."
)
_PREPROCESSING = flags.DEFINE_enum(
    "preprocessing",
    None,
    ["caffe", "tf", "torch", "cifar10", "none", "dataset"],
    "With --model: preprocessing that it was trained with. A mode of "
    "keras_resnet.preprocess_input; none for pixels of 0 to 255, which layers "
    "of the network prepare; or dataset, as apps.train preprocesses --dataset.",
)
_MEAN = flags.DEFINE_list(
    "mean",
    None,
    "With --model, instead of --preprocessing: mean of each channel, in units "
    "of 0 to 1.",
)
_STANDARD_DEVIATION = flags.DEFINE_list(
    "standard_deviation",
    None,
    "With --model: standard deviation of each channel, in units of 0 to 1.",
)
_EXPORT_DIR = flags.DEFINE_string(
    "export_dir",
    None,
    "Directory of the versions; created if it does not exist.",
)
_PRECISION = flags.DEFINE_enum(
    "precision",
    "float32",
    ["float32", "bfloat16", "int8", "int8_weights"],
    "bfloat16: kernels and activations in half the size; faster on processors "
    "with bfloat16 units. int8: kernels, activations and sums in a quarter of "
    "the size. It needs TensorFlow on x86, and is fast with VNNI or AMX. "
    "int8_weights: kernels alone in a quarter of the size, used in float32.",
)
_CALIBRATION_IMAGES = flags.DEFINE_list(
    "calibration_images",
    [],
    "With --precision=int8: image files or folders whose images determine the "
    "ranges of the activations; training images of the data set by default.",
)
_FORMATS = flags.DEFINE_list(
    "formats",
    ["saved_model"],
    "litert, onnx and openvino, in addition to saved_model.",
)
_WARMUP = flags.DEFINE_list(
    "warmup_batch_sizes",
    ["1"],
    "Batch sizes of the server's warm-up requests; empty for none.",
)
_MAX_PIXELS = flags.DEFINE_integer(
    "max_pixels",
    None,
    "Encoded images with more pixels are rejected; 64 million by default.",
    lower_bound=1,
)
_TOP = flags.DEFINE_integer(
    "top",
    5,
    "Number of the best labels in the outputs labels and scores.",
    lower_bound=1,
)
_EXIF = flags.DEFINE_bool(
    "exif", True, "Turn encoded images as their EXIF orientation states."
)
_SCALED_JPEG = flags.DEFINE_bool(
    "scaled_jpeg",
    False,
    "Decode large JPEG files at a smaller size: faster, with slightly other "
    "pixels.",
)
_CHECK_IMAGES = flags.DEFINE_integer(
    "check_images",
    1000,
    "Number of test images that verify the export.",
    lower_bound=1,
)


def main(argv):
    """Exports the one network that the flags name."""
    from keras_resnet.data import limits
    from keras_resnet.serving import export
    from keras_resnet.serving import folding
    from keras_resnet.serving import formats
    from keras_resnet.serving import int8_kernels
    from keras_resnet.serving import model_card
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
        versions.check_export_dir(_EXPORT_DIR.value)
    with command_line.usage("formats", command_line.text(_FORMATS)):
        formats.check_formats(_FORMATS.value, _PRECISION.value)
    if _PRECISION.value == "int8":
        with command_line.usage("precision", _PRECISION.value):
            int8_kernels.check()
    sizes = command_line.numbers(_WARMUP, int)
    with command_line.usage("warmup_batch_sizes", command_line.text(_WARMUP)):
        warmup.check_batch_sizes(sizes)
    source = _source()
    command_line.show(
        f"{source.title}, {len(source.labels)} labels, views of "
        f"{source.preprocessing.image_size}x{source.preprocessing.image_size} "
        "pixels"
    )
    if source.is_assumed:
        _warn(
            f"{_MODEL.value} does not contain the preprocessing that it was "
            "trained with: the export passes pixels of 0 to 255 to it. Name "
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
            top=_TOP.value,
            exif=_EXIF.value,
            scaled_jpeg=_SCALED_JPEG.value,
            images=images,
            warmup_batch_sizes=sizes,
            about=source.about,
        )
    except folding.ModelError as error:
        flag = _WORKDIR if _WORKDIR.value else _MODEL
        raise command_line.UsageError(flag.name, flag.value, error) from error
    card = model_card.read(path)
    for name, check in card["checks"].items():
        if "not_checked" in check:
            _warn(f"{name} was not checked: it {check['not_checked']}")
            continue
        command_line.show(
            f"{name}: predicts the network's class for "
            f"{check['same_class']:,} of {card['checked_on']}"
        )
    _show_error(card)
    command_line.show(f"exported {path}")
    where = f"--saved_model={_EXPORT_DIR.value}"
    predict = command_line.command("predict", where, "IMAGE")
    command_line.show(f"next: {predict}")


def _show_error(card):
    """Prints the error on test images beside chance and training."""
    from keras_resnet.serving import model_card

    (check, *_) = card["checks"].values()
    if "top1_error" not in check:
        command_line.show(
            "accuracy was not checked: these are not test images of the "
            "network's classes; name their data set by --dataset"
        )
        return
    line = (
        f"error on {card['checked_on']}: {check['top1_error']:.2f}%, by chance "
        f"{check['chance_error']:.2f}%"
    )
    if "recorded" in card:
        line += f", in training {card['recorded']['top1_error']:.2f}%"
    command_line.show(line)
    if model_card.is_near_chance(check):
        _warn(
            f"an error of {check['top1_error']:.2f}% is not below chance: the "
            "network is not trained, or was trained with another preprocessing "
            "or with classes in another order"
        )


def _warn(text):
    command_line.show(f"WARNING: {text}")


def _source():
    from keras_resnet import networks
    from keras_resnet.serving import model_sources

    if _WORKDIR.value:
        command_line.only_with(
            _WORKDIR,
            *(_WEIGHTS, _SET, _DATASET, _LABELS, _PREPROCESSING),
            *(_MEAN, _STANDARD_DEVIATION),
        )
        with command_line.usage("workdir", _WORKDIR.value):
            return model_sources.from_workdir(
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
        # Without labels and images the export claims nothing of the classes.
        default_preprocessing=(
            None if _DATASET.value or _LABELS.value else "none"
        ),
    )


def _labels():
    from keras_resnet.serving import inputs

    if not _LABELS.value:
        return None
    try:
        content = inputs.read_file(_LABELS.value, _MAX_LABELS_BYTES)
        # Other separators than line feeds may stand inside a label.
        text = content.decode("utf-8-sig").removesuffix("\n")
        return [line.removesuffix("\r") for line in text.split("\n")]
    except (OSError, ValueError) as error:  # ValueError: not text
        reason = getattr(error, "strerror", None) or error
        raise command_line.UsageError(
            "labels", _LABELS.value, reason
        ) from error


def _images(source):
    """Images that verify the export, and that calibrate int8."""
    from keras_resnet.serving import verification

    calibration = _calibration(source)
    needs_training_images = _PRECISION.value == "int8" and calibration is None
    try:
        images = source.images(_CHECK_IMAGES.value, needs_training_images)
    except (ValueError, OSError) as error:
        if needs_training_images:
            raise command_line.UsageError(
                _PRECISION.name,
                _PRECISION.value,
                f"needs training images: {error}, or --calibration_images",
            ) from error
        if calibration is not None:
            # Digits are beyond the ranges of other images.
            return verification.Images(
                calibration,
                calibration=calibration,
                source=f"{len(calibration)} calibration images",
            )
        command_line.show(
            f"no test images, so bundled digits replace them: {error}"
        )
        return None
    if calibration is not None:
        images = images._replace(calibration=calibration)
    return images


def _calibration(source):
    """The images of --calibration_images, or None."""
    names = _CALIBRATION_IMAGES.value
    if not names:
        return None
    if _PRECISION.value != "int8":
        command_line.only_with(_PRECISION, _CALIBRATION_IMAGES)
    try:
        return source.views(names)
    except (ValueError, OSError) as error:
        raise command_line.UsageError(
            _CALIBRATION_IMAGES.name, ",".join(names), error
        ) from error


def cli():
    """The console script."""
    command_line.run(main)


if __name__ == "__main__":
    cli()
