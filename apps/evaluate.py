"""The test error of a network; the last line of stdout is one JSON object.

python -m apps.evaluate --workdir=DIR
python -m apps.evaluate --saved_model=DIR --dataset=cifar10
python -m apps.evaluate --model=resnet20 --weights=FILE --dataset=cifar10
"""

import contextlib
import dataclasses
import io
import json
import os
import pathlib
import sys
import time

from absl import flags

from . import command_line

_WORKDIR = flags.DEFINE_string("workdir", None, "Work directory of apps.train.")
_SAVED_MODEL = flags.DEFINE_string("saved_model", None, "An exported model.")
_MODEL = flags.DEFINE_string("model", None, "Name of the network.")
_WEIGHTS = flags.DEFINE_string("weights", None, "With --model: its weights.")
_DATASET = flags.DEFINE_string(
    "dataset", None, "As for apps.train; default: that of --workdir."
)
_DATA_DIR = flags.DEFINE_string("data_dir", None, "Where TFDS keeps its sets.")
_CHECKPOINT = flags.DEFINE_enum(
    "checkpoint",
    "last",
    ["last", "best"],
    "With --workdir: the last checkpoint, or that of the lowest test error.",
)
_PROTOCOL = flags.DEFINE_enum(
    "protocol",
    "single",
    ["single", "ten_crop", "multi_scale"],
    "single: one central view; ten_crop and multi_scale: the mean softmax "
    "scores of several views, as in the papers.",
)
_BATCH_SIZE = flags.DEFINE_integer(
    "batch_size", 100, "Images in a batch of all devices.", lower_bound=1
)
_NUM_DEVICES = flags.DEFINE_integer(
    "num_devices",
    None,
    "Devices of this machine; without accelerators the processor is divided.",
)
_PER_CLASS = flags.DEFINE_bool(
    "per_class",
    False,
    "Print the error of each class, the most confused pairs and the images "
    "with the most certain wrong predictions.",
)
_SKIP_UNREADABLE = flags.DEFINE_bool(
    "skip_unreadable",
    False,
    "With folder:PATH: as for apps.train. Default with --workdir: as trained.",
)
_CONFUSION_MATRIX = flags.DEFINE_string(
    "confusion_matrix",
    None,
    "File to write, .csv or a picture .png: a row for each label, a column for "
    "each prediction.",
)
_MEAN = flags.DEFINE_list(
    "mean", None, "With --model: mean of each channel, in units of 0 to 1."
)
_STANDARD_DEVIATION = flags.DEFINE_list(
    "standard_deviation", None, "With --model: deviation of each channel."
)
_SET = flags.DEFINE_multi_string(
    "set", [], "With --model: model.ARGUMENT=VALUE; can be repeated."
)


# Pairs of classes, and images, that --per_class prints.
_SHOWN = 5


def main(argv):
    """Evaluates the network that the flags name."""
    _check_confusion_file()
    given = [flag for flag in (_WORKDIR, _SAVED_MODEL, _MODEL) if flag.value]
    if len(given) != 1:
        raise command_line.UsageError(
            given[1].name if given else "workdir",
            given[1].value if given else "",
            "give one of --workdir, --saved_model, and --model with --weights",
        )
    # This comes first: TensorFlow divides its devices once.
    strategy = command_line.strategy("auto", _NUM_DEVICES.value)
    import keras

    from keras_resnet.training import evaluation
    from keras_resnet.training import memory

    if _CONFUSION_MATRIX.value:
        from keras_resnet import atomic

        with command_line.usage("confusion_matrix", _CONFUSION_MATRIX.value):
            path = atomic.local(_CONFUSION_MATRIX.value, "a file of a matrix")
        _check_place(path)
    sources = {
        "workdir": _of_workdir,
        "saved_model": _of_saved_model,
        "model": _of_model,
    }
    if not _WORKDIR.value:
        command_line.only_with(given[0], _CHECKPOINT)
    if not _MODEL.value:
        command_line.only_with(
            given[0], _WEIGHTS, _MEAN, _STANDARD_DEVIATION, _SET
        )
    with strategy.scope():
        predict, labels, dataset = sources[given[0].name]()
        order = _order(labels, dataset)
        with command_line.usage("batch_size", _BATCH_SIZE.value):
            memory.check_evaluation(
                dataset.image_shape,
                min(_BATCH_SIZE.value, dataset.test_size),
                predict if isinstance(predict, keras.Model) else None,
            )
        if _PROTOCOL.value == "multi_scale":
            predict = evaluation.any_size(predict)
        if order is not None:
            predict = _reordered(predict, order)
    counts_classes = _PER_CLASS.value or _CONFUSION_MATRIX.value is not None
    command_line.show(
        f"evaluating on {dataset.test_size:,} test images of {dataset.name}"
    )
    with _progress(dataset.test_size) as update:
        result = evaluation.Evaluator(predict, strategy)(
            dataset,
            _BATCH_SIZE.value,
            _PROTOCOL.value,
            counts_classes,
            progress=update,
        )
    command_line.show(
        f"test error {result.top1_error:.2f}% (top 5: {result.top5_error:.2f}%)"
        f", {result.top1_errors:,} of {result.images:,} images"
    )
    numbers = {
        "dataset": dataset.name,
        "protocol": _PROTOCOL.value,
        **result.to_json(),
    }
    if _PER_CLASS.value:
        numbers["classes"] = result.per_class(dataset.labels)
        _show_classes(result, dataset)
    if _CONFUSION_MATRIX.value:
        _write_confusion(result, dataset.labels)
    command_line.show(json.dumps(numbers))


@contextlib.contextmanager
def _progress(images):
    """Yields a function that shows how many images were evaluated.

    A terminal has a bar. Other outputs get a line now and then.
    """
    import tqdm

    done, shown_at = 0, time.monotonic()
    is_terminal = sys.stderr.isatty()
    with tqdm.tqdm(
        total=images, unit="image", leave=False, disable=not is_terminal
    ) as bar:

        def update(count):
            nonlocal done, shown_at
            done += count
            bar.update(count)
            if is_terminal or done >= images:
                return
            if time.monotonic() - shown_at >= command_line.QUIET_SECONDS:
                shown_at = time.monotonic()
                command_line.show(f"{done:,} of {images:,} images")

        yield update


def _show_classes(result, dataset):
    """Prints classes, the most confused pairs, and the worst images."""
    from keras_resnet.analysis import complexity
    from keras_resnet.training import error_analysis

    rows = error_analysis.class_rows(result, dataset.labels)
    command_line.show(*complexity.columns(rows).splitlines())
    pairs = error_analysis.confused_pairs(result, dataset.labels, _SHOWN)
    if pairs:
        command_line.show("most confused:")
    for label, prediction, images in pairs:
        command_line.show(f"  {label} as {prediction}: {images:,} images")
    mistakes = error_analysis.worst(
        result.answers, dataset, dataset.labels, _SHOWN
    )
    if mistakes:
        command_line.show("most certain of a wrong prediction:")
    for mistake in mistakes:
        command_line.show(
            f"  {mistake.name}: {mistake.prediction} "
            f"({100 * mistake.probability:.1f}%) instead of {mistake.label}"
        )


def _check_confusion_file():
    """Rejects a file of another kind before anything is computed."""
    path = _CONFUSION_MATRIX.value
    if path and not path.lower().endswith((".csv", ".png")):
        raise command_line.UsageError(
            "confusion_matrix", path, "must end in .csv or .png"
        )


def _check_place(path):
    """Rejects a place that cannot be written before anything is computed."""
    if path.exists() and not path.is_file():
        raise command_line.UsageError(
            "confusion_matrix", path, "must not be a folder or a special file"
        )
    if not os.access(path.parent, os.W_OK):
        raise command_line.UsageError(
            "confusion_matrix", path, "must be in a folder that can be written"
        )


def _write_confusion(result, labels):
    """Writes the confusion matrix as text or as a picture."""
    from keras_resnet import atomic

    path = pathlib.Path(_CONFUSION_MATRIX.value)
    if path.suffix.lower() == ".csv":
        atomic.write(path, result.confusion_csv(labels))
        return
    with command_line.needs("matplotlib"):
        from keras_resnet.papers import figures

        figure = figures.confusion(result.confusion, list(labels))
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=150)
    atomic.write(path, picture.getvalue())


def _load(name, data_dir=None, **arguments):
    from keras_resnet.data import datasets

    if not name:
        raise _no_dataset()
    with command_line.usage("dataset", name):
        arguments.setdefault("skip_unreadable", _SKIP_UNREADABLE.value)
        return datasets.load(name, _DATA_DIR.value or data_dir, **arguments)


def _no_dataset():
    return command_line.UsageError("dataset", "", "name the test images")


def _order(labels, dataset):
    """Returns the place of each class of the images in the network.

    None is the same place for all.

    Raises:
        UsageError: If network and images have other classes.
    """
    from keras_resnet.weights import labels as label_sets

    if len(labels) != dataset.classes:
        raise command_line.UsageError(
            "dataset",
            dataset.name,
            f"the network has {len(labels)} classes, the images have "
            f"{dataset.classes}",
        )
    labels, others = list(labels), list(dataset.labels)
    if labels == others:
        return None
    names = (
        f"the network calls its classes {', '.join(labels[:5])}, ..., the "
        f"images theirs {', '.join(others[:5])}, ..."
    )
    if sorted(labels) == sorted(set(others)):
        command_line.show(f"{names}; they are compared by their names")
        return [labels.index(label) for label in others]
    if label_sets.differ(labels, others):
        raise command_line.UsageError("dataset", dataset.name, names)
    command_line.show(f"{names}; they are compared by their place")
    return None


def _reordered(predict, order):
    """Returns `predict` with its classes in the order of the images."""
    import tensorflow as tf

    return lambda images: tf.gather(predict(images), order, axis=-1)


def _of_workdir():
    from keras_resnet.training import trained_networks
    from keras_resnet.training import workdirs

    with command_line.usage("workdir", _WORKDIR.value):
        trained = trained_networks.load_workdir(
            _WORKDIR.value,
            classifier_activation=None,
            checkpoint=_CHECKPOINT.value,
            report=command_line.show,
        )
        data_dir = None
        if not _DATA_DIR.value:
            data_dir = workdirs.recorded_data_dir(
                trained.config, _WORKDIR.value
            )
    dataset = _load(
        _DATASET.value or trained.config.dataset,
        data_dir,
        preprocessing=trained.preprocessing,
        skip_unreadable=_SKIP_UNREADABLE.value
        or trained.config.skip_unreadable,
    )
    if not _DATASET.value:
        with command_line.usage("workdir", _WORKDIR.value):
            workdirs.check_same_images(trained.record, dataset)
    return trained.model, trained.labels, dataset


def _of_saved_model():
    import numpy as np
    import tensorflow as tf

    from keras_resnet.serving import client

    if _PROTOCOL.value != "single":
        raise command_line.UsageError(
            "protocol",
            _PROTOCOL.value,
            "an exported model has single views only: use --workdir",
        )
    with command_line.usage("saved_model", _SAVED_MODEL.value):
        network = client.SavedModel(_SAVED_MODEL.value)
    size = network.image_shape[0]
    dataset = _load(_DATASET.value, image_size=size)
    # The exported graph has the preprocessing, so the batches are pixels in
    # units of 0 to 1.
    bare = dataclasses.replace(
        dataset.preprocessing,
        mean=np.zeros(network.image_shape[-1], "float32"),
        standard_deviation=None,
    )
    dataset = _load(_DATASET.value, preprocessing=bare)

    def predict(images):
        pixels = tf.cast(tf.round(images * 255.0), "uint8")
        return tf.math.log(tf.maximum(network.views(pixels), 1e-37))

    return predict, network.labels, dataset


def _of_model():
    from keras_resnet import networks

    with command_line.usage("model", _MODEL.value):
        network = networks.get_network(_MODEL.value)
    if not _WEIGHTS.value:
        raise command_line.UsageError(
            "weights", "", "name a file of weights, or cifar10 or imagenet"
        )
    if not _DATASET.value:
        raise _no_dataset()
    given = command_line.settings(_SET.value, "model")["model"]
    arguments = command_line.model_arguments(network, given)
    source = command_line.of_model(
        _MODEL.value,
        _WEIGHTS.value,
        {**arguments, "classifier_activation": None},
        dataset=_DATASET.value,
        data_dir=_DATA_DIR.value,
        mean=command_line.numbers(_MEAN),
        standard_deviation=command_line.numbers(_STANDARD_DEVIATION),
        default_preprocessing="dataset",
    )
    dataset = _load(_DATASET.value, preprocessing=source.preprocessing)
    return source.model, source.labels, dataset


def cli():
    """The console script."""
    command_line.run(main)


if __name__ == "__main__":
    cli()
