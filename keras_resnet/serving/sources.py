"""Where a network to export comes from.

A work directory has everything: the network, its preprocessing, its labels and
the name of its data set. A `.keras` file has the network; a builder's name and
a file of weights make one. What these two lack is said, or known of the
weights. The preprocessing is never guessed: see `PREPROCESSING`.
"""

import contextlib
import csv
import dataclasses
import os
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_resnet import models
from keras_resnet import networks
from keras_resnet import specs
from keras_resnet.data import datasets
from keras_resnet.data import views
from keras_resnet.preprocessing import PREPROCESSING_MODES
from keras_resnet.serving import export
from keras_resnet.serving import folding
from keras_resnet.training import trained_networks
from keras_resnet.training import workdirs
from keras_resnet.weights import files
from keras_resnet.weights import keras_files
from keras_resnet.weights import shipped

#: What a network can have been trained on: the modes of
#: `keras_resnet.preprocess_input`; pixels of 0 to 255 as they are, which is
#: right where layers of the network prepare them; or what `datasets.load` does
#: for the data set.
PREPROCESSING = (*PREPROCESSING_MODES, "none", "dataset")

#: The preprocessing of weights that have a name.
PUBLISHED = {"cifar10": "cifar10", "imagenet": "caffe"}

# Where a preprocessing is known from.
TRAINED = "the work directory"
STATED = "the arguments"
ASSUMED = "nothing"
_PUBLISHED = "the published weights"

_CALIBRATION_IMAGES = 200
_PHOTO_SIZE = 224


class ArgumentError(ValueError):
    """An argument of `of_model` is not as it must be.

    Attributes:
        argument: its name.
    """

    def __init__(self, argument: str, reason):
        super().__init__(str(reason))
        self.argument = argument


@dataclasses.dataclass
class Source:
    """A network and what belongs to it.

    Attributes:
        model: whole, with probabilities.
        preprocessing: what stands between an image and the model.
        labels: one for each class.
        title: what it is, in a line.
        about: what a model card says of it.
        preprocessing_source: where the preprocessing is known from.
        dataset: the name of its data set, or None; see `datasets.load`.
        data_dir: where that is.
        record: that of the images it was trained on, where it is known; see
            `workdirs.check_same_images`.
        recorded_error: the test error that the training has recorded of these
            weights, in percent, or None.
    """

    model: keras.Model
    preprocessing: views.Preprocessing
    labels: list[str]
    title: str
    about: dict[str, Any]
    preprocessing_source: str = TRAINED
    dataset: str | None = None
    data_dir: str | None = None
    record: dict | None = None
    recorded_error: float | None = None

    def images(
        self, count: int, with_calibration: bool = False
    ) -> export.Images:
        """Test images of its data set, drawn at random.

        Args:
            count: how many; fewer if there are not as many.
            with_calibration: whether training images for int8 are wanted.

        Raises:
            ValueError, OSError: it has no data set, or that is not there.
        """
        if self.dataset is None:
            raise ValueError("no data set is named")
        dataset = datasets.load(
            self.dataset, self.data_dir, preprocessing=self.preprocessing
        )
        workdirs.check_same_images(self.record, dataset)
        labels: np.ndarray | None
        views, labels = dataset.sample(count)
        calibration = None
        if with_calibration:
            calibration, _ = dataset.sample(_CALIBRATION_IMAGES, training=True)
        source = f"{len(views):,} of the test images of {self.dataset}"
        if dataset.labels != self.labels:
            labels = None  # of other classes than the network's
        recorded = None
        if self.recorded_error is not None:
            recorded = export.Recorded(
                self.recorded_error, dataset.test_size, "metrics.csv"
            )
        return export.Images(views, labels, calibration, source, recorded)


def of_workdir(
    workdir: str | os.PathLike,
    data_dir: str | None = None,
    report: Callable[[str], None] = print,
) -> Source:
    """The newest checkpoint of what `apps.train` wrote.

    Args:
        workdir: its directory.
        data_dir: where the data set is, if it has moved since.
        report: is told of damaged checkpoints, which are passed over.

    Raises:
        workdirs.WorkdirError: it is no work directory or has no checkpoint yet.
    """
    trained = trained_networks.load_workdir(workdir, report=report)
    config = trained.config
    return Source(
        trained.model,
        trained.preprocessing,
        trained.labels,
        f"{config.model} after {trained.step:,} steps",
        {
            "network": {
                "name": config.model,
                **networks.to_json(config.model_arguments),
            },
            "recipe": {
                **dataclasses.asdict(config.recipe),
                "steps_done": trained.step,
                "dtype": config.dtype,
                "seed": config.seed,
            },
            "data": config.dataset,
        },
        TRAINED,
        config.dataset,
        data_dir or workdirs.recorded_data_dir(config, workdir),
        trained.record,
        _recorded_error(workdir, trained.step),
    )


def _recorded_error(workdir: str | os.PathLike, step: int) -> float | None:
    """The test error in the row of metrics.csv of a step, if it has one."""
    path = os.path.join(workdir, "metrics.csv")
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            for row in csv.DictReader(file):
                if int(row["step"]) == step and row["test_top1_error"]:
                    return float(row["test_top1_error"])
    except (OSError, ValueError, KeyError, TypeError, csv.Error):
        return None  # it is not there, or was changed by hand
    return None


def of_model(
    model: str,
    weights: str | None = None,
    arguments: dict[str, Any] | None = None,
    *,
    dataset: str | None = None,
    data_dir: str | None = None,
    labels: Sequence[str] | None = None,
    preprocessing: str | None = None,
    mean: Sequence[float | str] | None = None,
    standard_deviation: Sequence[float | str] | None = None,
    default_preprocessing: str | None = None,
) -> Source:
    """A `.keras` file, or a builder's name with its weights.

    Args:
        model: the path of a `.keras` file, or a name in `keras_resnet.MODELS`.
        weights: as the builder takes them; None: random ones.
        arguments: further arguments of the builder.
        dataset: what it is tested on; its labels are the network's unless the
            weights or `labels` have others.
        data_dir: where the data set is.
        labels: one for each class; without a data set those of `"cifar10"`,
            else "0", "1", ...
        preprocessing: a name in `PREPROCESSING`. None: that of the weights
            where it is known: `"cifar10"`, and those of keras.applications,
            published or in a file (Caffe's); `"none"` if the network takes
            integers or has a `Rescaling` or `Normalization` of pixels in front;
            and of random weights, which know none, the data set's or that of
            photos.
        mean: instead, of each channel, in 0..1.
        standard_deviation: instead, likewise. Where one of the two is given,
            the other is 0 or 1.
        default_preprocessing: the name to take where it is not known; None for
            an error.

    Raises:
        ArgumentError: there is no such network or file, or one argument does
            not fit the rest; says which.
        OSError: the data set is not there.
    """
    arguments = arguments or {}

    def load_dataset(image_size=None):
        with _blames("dataset"):
            return (
                datasets.load(dataset, data_dir, image_size)
                if dataset
                else None
            )

    if model.endswith(".keras"):
        for other, value in (("weights", weights), ("arguments", arguments)):
            if value:
                raise ArgumentError(
                    other,
                    "a .keras file has its own weights and arguments; "
                    f"received {value} for {model}",
                )
        with _blames("model"):
            network = _load_keras(model)
            export.check_model(network)
        found = load_dataset(network.inputs[0].shape[1])
        title = os.path.basename(model)
    else:
        with _blames("model"):
            spec = specs.get_spec(model)
        found = load_dataset()
        with _blames("weights" if weights else "model"):
            network = models.resnet(
                spec,
                weights=weights,
                input_shape=found.image_shape if found else None,
                classes=found.classes if found else _classes(spec, labels),
                **arguments,
            )
        title = f"{spec.name} with {weights or 'random weights'}"
    if preprocessing and (mean or standard_deviation):
        raise ArgumentError(
            "preprocessing",
            "cannot be combined with a mean or a standard deviation",
        )
    if mean or standard_deviation:
        known_from = STATED
        with _blames("mean" if mean else "standard_deviation"):
            prepared = _with_numbers(
                _views(network, found), mean, standard_deviation
            )
    else:
        name, known_from = _named(
            preprocessing,
            _known(network, model, weights, found),
            default_preprocessing,
        )
        if name is None:
            raise ArgumentError("preprocessing", _how_to_state(model, dataset))
        with _blames("preprocessing" if preprocessing else "model"):
            network, prepared = _prepared(
                name, network, found, is_built=not model.endswith(".keras")
            )
        title += f", preprocessing {name}"
    if labels is None:
        labels = _labels(network, found, model, weights)
    return Source(
        network,
        prepared,
        list(labels),
        title,
        {
            "network": {"name": network.name, **networks.to_json(arguments)},
            "weights": os.path.basename(weights or "random"),
            "data": dataset,
        },
        known_from,
        dataset,
        data_dir,
    )


@contextlib.contextmanager
def _blames(argument: str) -> Iterator[None]:
    """Says which argument an error is about."""
    try:
        yield
    except ValueError as error:
        raise ArgumentError(argument, error) from error


def _load_keras(path: str) -> keras.Model:
    if not os.path.isfile(path):
        raise ValueError("there is no such file")
    return keras_files.load(path)


def _classes(spec, labels) -> int:
    return len(labels) if labels is not None else spec.classes


def _labels(network, dataset, model, weights) -> list[str]:
    if dataset:
        return dataset.labels
    if weights == "cifar10":
        return shipped.card(specs.get_spec(model).name)["labels"]
    return [str(i) for i in range(network.outputs[0].shape[-1])]


def _named(
    stated: str | None, known: tuple[str | None, str], default: str | None
) -> tuple[str | None, str]:
    """The name of the preprocessing, and where it is known from."""
    name, known_from = known
    if stated is None:
        return known if name else (default, ASSUMED)
    if known_from == _PUBLISHED and stated != name:
        raise ArgumentError(
            "preprocessing",
            f"must be {name} for these weights, received {stated}",
        )
    return stated, STATED


def _known(network, model, weights, dataset) -> tuple[str | None, str]:
    """The preprocessing that the weights or layers tell; which of the two."""
    if weights in PUBLISHED:
        return PUBLISHED[weights], _PUBLISHED
    if weights and _is_of_keras_applications(weights):
        return "caffe", "the weights"
    if not model.endswith(".keras") and weights is None:
        return "dataset" if dataset else "torch", "random weights"
    return "none" if _takes_pixels(network) else None, "the layers"


def _takes_pixels(network) -> bool:
    """Whether the first layers of a network take pixels of 0 to 255.

    That is, its input are integers, or a layer in front of all weights brings
    numbers of this size to about 1.
    """
    if not tf.as_dtype(network.inputs[0].dtype).is_floating:
        return True
    for node in reversed(folding.nodes(network)):
        layer = node.operation
        if isinstance(layer, keras.layers.Rescaling):
            reach = 255.0 * np.max(np.abs(layer.scale))
            return bool(0.5 <= reach <= 10.0)
        if isinstance(layer, keras.layers.Normalization):
            return bool(np.max(np.abs(layer.mean)) > 1.0)
        if isinstance(layer, keras.Model):
            with contextlib.suppress(folding.ModelError):
                return _takes_pixels(layer)
        if getattr(layer, "weights", ()):
            return False
    return False


def _how_to_state(model, dataset) -> str:
    ways = {
        "caffe, tf or torch": "what keras.applications' preprocess_input does",
        "cifar10": "pixels of 0 to 1 less the mean of CIFAR-10",
        "none": "pixels of 0 to 255, which layers of the network prepare",
    }
    if dataset:
        ways["dataset"] = f"what apps.train does for {dataset}"
    named = "; ".join(
        f"--preprocessing={name} ({what})" for name, what in ways.items()
    )
    return (
        f"{os.path.basename(model)} does not tell which preprocessing it was "
        f"trained on: give {named}; or --mean and --standard_deviation of each "
        "channel, in units of 0 to 1"
    )


def _prepared(
    name, network, dataset, is_built
) -> tuple[keras.Model, views.Preprocessing]:
    """A network of colours in the usual order, and what is in front of it."""
    if name == "dataset":
        if dataset is None:
            raise ValueError("no data set is named: give --dataset")
        return network, dataset.preprocessing
    base = _views(network, dataset)
    if name == "torch":
        return network, base
    if name == "tf":
        half = [0.5] * base.channels
        return network, _with_numbers(base, half, half)
    pixel = [1 / 255] * base.channels
    if name == "none":
        return network, _with_numbers(base, None, pixel)
    if name == "cifar10":
        return network, dataclasses.replace(
            base,
            shorter_side=None,
            mean=shipped.mean(),
            standard_deviation=None,
        )
    if base.channels != 3:
        raise ValueError(
            f"{name} is for images of 3 channels, received a network of "
            f"{base.channels}"
        )
    mean = np.array([123.68, 116.779, 103.939], "float32") / 255
    return (
        _with_red_first(network, is_built),
        _with_numbers(base, mean, pixel),
    )


def _views(network, dataset) -> views.Preprocessing:
    """That of photos, for the views that the network takes.

    What is cropped of an image is that of the data set. Without one, a network
    for small images sees them whole.
    """
    height, width, channels = network.inputs[0].shape[1:]
    size = height or width
    if dataset:
        size = size or dataset.preprocessing.image_size
        is_whole = dataset.preprocessing.shorter_side is None
    else:
        size = size or _PHOTO_SIZE
        is_whole = size < _PHOTO_SIZE // 2
    return views.photo_preprocessing(size, channels, is_whole)


def _with_numbers(preprocessing, mean, deviation) -> views.Preprocessing:
    channels = preprocessing.channels
    return dataclasses.replace(
        preprocessing,
        mean=np.zeros(channels) if mean is None else np.array(mean, "float32"),
        standard_deviation=deviation and np.array(deviation, "float32"),
    )


def _is_of_keras_applications(path: str) -> bool:
    """Whether a file has the weights of a network of keras.applications.

    Who has trained such a file on other pixels than Caffe's says so.
    """
    return any("conv1_conv" in name for name in files.read(path))


def _with_red_first(network: keras.Model, is_built: bool) -> keras.Model:
    """A network of red, green, blue of one of blue, green, red (Caffe's)."""
    if is_built:
        kernel = network.get_layer("stem_conv").kernel
        kernel.assign(keras.ops.flip(kernel, axis=2))
        return network
    image = keras.Input(network.inputs[0].shape[1:])
    return keras.Model(image, network(image[..., ::-1]), name=network.name)
