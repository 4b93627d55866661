"""Networks to export or evaluate, with their preprocessing and labels.

`from_workdir` reads the network, its preprocessing, its labels and the name of
its data set from a work directory.

`from_model` loads a `.keras` file, or builds a network and loads weights. The
caller states the preprocessing and the labels unless the weights are known. The
preprocessing is never guessed: see `PREPROCESSING`.
"""

import contextlib
import csv
import dataclasses
import io
import os
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_resnet import graphs
from keras_resnet import models
from keras_resnet import networks
from keras_resnet import specs
from keras_resnet.data import datasets
from keras_resnet.data import views
from keras_resnet.preprocessing import PREPROCESSING_MODES
from keras_resnet.preprocessing import ImagePreparation
from keras_resnet.serving import errors
from keras_resnet.serving import exportable
from keras_resnet.serving import folding
from keras_resnet.serving import inputs
from keras_resnet.serving import verification
from keras_resnet.training import trained_networks
from keras_resnet.training import workdirs
from keras_resnet.weights import cards
from keras_resnet.weights import downloads
from keras_resnet.weights import files
from keras_resnet.weights import keras_files
from keras_resnet.weights import labels as label_sets
from keras_resnet.weights import published
from keras_resnet.weights import shipped

#: Preprocessing that a network can have been trained with: the modes of
#: `keras_resnet.preprocess_input`; `"none"` for pixels of 0 to 255, if the
#: network's layers prepare them; or `"dataset"` for that of `datasets.load`.
PREPROCESSING = (*PREPROCESSING_MODES, "none", "dataset")

# Preprocessing that the card of the weights describes.
_OF_CARD = "of the weights"

_MAX_METRICS_BYTES = 2**26
_CALIBRATION_IMAGES = 200
_PHOTO_SIZE = 224


@dataclasses.dataclass
class ModelSource:
    """A network with everything that an export needs.

    Attributes:
        model: The network, with its classifier and probabilities.
        preprocessing: Preprocessing between an image and the model.
        labels: One for each class.
        title: One line of description.
        about: Entries of the model card.
        dataset: Name of its data set, or None; see `datasets.load`.
        data_dir: Directory of the data set.
        record: Record of the training images, or None; see
            `workdirs.check_same_images`.
        recorded_error: Test error in percent that the training recorded for
            these weights, or None.
        is_assumed: Whether nothing states the preprocessing, so that
            `default_preprocessing` of `from_model` was taken.
        skip_unreadable: Whether the data set is used without the images that
            do not decode.
    """

    model: keras.Model
    preprocessing: views.Preprocessing
    labels: list[str]
    title: str
    about: dict[str, Any]
    dataset: str | None = None
    data_dir: str | None = None
    record: dict | None = None
    recorded_error: float | None = None
    is_assumed: bool = False
    skip_unreadable: bool = False

    def images(
        self, count: int, with_calibration: bool = False
    ) -> verification.Images:
        """Returns a random sample of the test images of the data set.

        Args:
            count: Number of images; all if the data set has fewer.
            with_calibration: Whether to add training images for int8.

        Raises:
            ValueError, OSError: If the data set is unknown or missing.
        """
        if self.dataset is None:
            raise ValueError("no data set is named: give --dataset")
        dataset = datasets.load(
            self.dataset,
            self.data_dir,
            preprocessing=self.preprocessing,
            skip_unreadable=self.skip_unreadable,
        )
        workdirs.check_same_images(self.record, dataset)
        labels: np.ndarray | None
        views, labels = dataset.sample(count)
        calibration = None
        if with_calibration:
            calibration, _ = dataset.sample(_CALIBRATION_IMAGES, training=True)
        source = f"{len(views):,} of the test images of {self.dataset}"
        if dataset.labels != self.labels:
            labels = None  # other classes than the network's
        recorded = None
        if self.recorded_error is not None:
            recorded = verification.Recorded(
                self.recorded_error, dataset.test_size, "metrics.csv"
            )
        return verification.Images(views, labels, calibration, source, recorded)

    def views(self, names: Sequence[str]) -> np.ndarray:
        """Returns image files as the network sees them, uint8.

        Args:
            names: Files and folders; see `inputs.expand`. Of more than 200
                images, 200 at equal distances are taken.

        Raises:
            ValueError: If an image cannot be read or decoded.
            OSError: If a folder cannot be read.
        """
        paths = inputs.expand(names)
        views = []
        for i in range(0, len(paths), -(-len(paths) // _CALIBRATION_IMAGES)):
            try:
                image = tf.constant(inputs.read(paths[i]))
                views.append(self.preprocessing.decode(image).numpy())
            except (ValueError, tf.errors.InvalidArgumentError) as error:
                (reason, *_) = str(error).splitlines()
                name = inputs.shown(paths[i])
                raise ValueError(f"{name}: {reason}") from error
        return np.stack(views)


def from_workdir(
    workdir: str | os.PathLike,
    data_dir: str | None = None,
    report: Callable[[str], None] = print,
) -> ModelSource:
    """Returns the network of the newest checkpoint of a work directory.

    Args:
        workdir: Directory that `apps.train` wrote.
        data_dir: Directory of the data set, if it has moved since.
        report: Receives a line about each damaged checkpoint.

    Raises:
        workdirs.WorkdirError: If it is not a work directory, or does not have
            a checkpoint yet.
    """
    trained = trained_networks.load_workdir(workdir, report=report)
    config = trained.config
    return ModelSource(
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
            "start_weights": config.weights
            and {"name": config.weights, "sha256": config.weights_sha256},
        },
        config.dataset,
        data_dir or workdirs.recorded_data_dir(config, workdir),
        trained.record,
        _recorded_error(workdir, trained.step),
        skip_unreadable=config.skip_unreadable,
    )


def _recorded_error(workdir: str | os.PathLike, step: int) -> float | None:
    """The test error of a step in metrics.csv, or None."""
    path = os.path.join(workdir, "metrics.csv")
    try:
        text = inputs.read_file(path, _MAX_METRICS_BYTES).decode("utf-8-sig")
        for row in csv.DictReader(io.StringIO(text, newline="")):
            if int(row["step"]) == step and row["test_top1_error"]:
                return float(row["test_top1_error"])
    except (OSError, ValueError, KeyError, TypeError, csv.Error):
        return None  # the file is missing, or was edited by hand
    return None


def from_model(
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
) -> ModelSource:
    """Returns the network of a `.keras` file, or of a builder with weights.

    Args:
        model: Path of a `.keras` file, or a name in `keras_resnet.MODELS`.
        weights: The builder's `weights`; None for random ones.
        arguments: Further arguments of the builder.
        dataset: Data set that the network is tested on. Its labels become the
            network's unless the weights or `labels` have others.
        data_dir: Directory of the data set.
        labels: One for each class. Without labels and a data set they are
            those of the weights, else "0", "1", ...
        preprocessing: A name in `PREPROCESSING`; None if the weights or the
            layers determine it. The card of the weights decides, if they have
            one (`keras_resnet.weights.card`). A file of
            keras.applications has Caffe's. A network that takes integers, or
            starts with a `Rescaling` or `Normalization` of pixels, has
            `"none"`. Random weights have the data set's, or that of photos.
        mean: Mean of each channel in 0..1, instead of `preprocessing`; 0 if
            only `standard_deviation` is stated.
        standard_deviation: Standard deviation of each channel, or 1.
        default_preprocessing: Name of the preprocessing if nothing determines
            it; None for an error.

    Raises:
        errors.ArgumentError: If there is no such network or file, or if one
            argument does not match the others; it names the argument.
        OSError: If the data set does not exist.
    """
    arguments = arguments or {}
    network, found, title = _network(
        model, weights, arguments, dataset, data_dir, labels
    )
    is_assumed = False
    if not (mean or standard_deviation):
        name = _name_of_preprocessing(
            preprocessing, network, model, weights, dataset
        )
        if name is None and default_preprocessing is None:
            raise errors.ArgumentError(
                "preprocessing", _how_to_state(model, dataset)
            )
        is_assumed = name is None
        name = name or default_preprocessing or ""
        with _blames("preprocessing" if preprocessing else "model"):
            network, prepared = _prepared(
                name, network, found, is_built=not model.endswith(".keras")
            )
        title += f", preprocessing {name}"
    elif preprocessing:
        raise errors.ArgumentError(
            "preprocessing",
            "cannot be combined with a mean or a standard deviation",
        )
    else:
        with _blames("mean" if mean else "standard_deviation"):
            prepared = _with_numbers(
                _photo_views(network, found), mean, standard_deviation
            )
    if labels is None:
        with _blames("weights" if weights else "model"):
            labels = _labels(network, found, model.endswith(".keras"))
    about = {
        "network": {"name": network.name, **networks.to_json(arguments)},
        "weights": os.path.basename(weights or "random"),
        "data": dataset,
    }
    return ModelSource(
        network,
        prepared,
        list(labels),
        title,
        about,
        dataset,
        data_dir,
        is_assumed=is_assumed,
    )


def _network(
    model: str, weights, arguments, dataset, data_dir, labels
) -> tuple[keras.Model, datasets.DataSet | None, str]:
    """The network, its data set and a title."""

    def load_dataset(image_size=None):
        with _blames("dataset"):
            return (
                datasets.load(dataset, data_dir, image_size)
                if dataset
                else None
            )

    if model.endswith(".keras"):
        network = _network_of_file(model, weights, arguments)
        found = load_dataset(network.inputs[0].shape[1])
        return network, found, os.path.basename(model)
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
    return network, found, f"{spec.name} with {weights or 'random weights'}"


@contextlib.contextmanager
def _blames(argument: str) -> Iterator[None]:
    """Turns a ValueError into an ArgumentError that names the argument."""
    try:
        yield
    except ValueError as error:
        raise errors.ArgumentError(argument, error) from error


def _network_of_file(path, weights, arguments) -> keras.Model:
    for name, value in (("weights", weights), ("arguments", arguments)):
        if value:
            raise errors.ArgumentError(
                name,
                "a .keras file has its own weights and arguments; "
                f"received {value} for {path}",
            )
    with _blames("model"):
        if not os.path.isfile(path):
            raise ValueError("there is no such file")
        network = keras_files.load(path)
        exportable.check_model(network)
    return network


def _classes(spec, labels) -> int:
    return len(labels) if labels is not None else spec.classes


def _labels(network, dataset, may_be_trained) -> list[str]:
    """The labels of the weights, else those of the data set, else numbers.

    A `.keras` file may have been trained on other classes since it got its
    card, so that the labels of its data set come first.
    """
    if dataset and may_be_trained:
        return dataset.labels
    known = None
    # Without a network, those of ImageNet may not be on this machine.
    with contextlib.suppress(downloads.DownloadError):
        known = label_sets.of_model(network)
    if dataset and not (known and label_sets.differ(known, dataset.labels)):
        return dataset.labels
    return known or [str(i) for i in range(network.outputs[0].shape[-1])]


def _name_of_preprocessing(
    stated: str | None,
    network: keras.Model,
    model: str,
    weights: str | None,
    dataset: str | None,
) -> str | None:
    """The preprocessing that was stated or is known; None for neither."""
    card = cards.card(network)
    preparation = card.preparation if card else None
    if any(isinstance(x, ImagePreparation) for x in network._flatten_layers()):
        raise errors.ArgumentError(
            "model",
            "must be the network without its layer ImagePreparation: its card "
            "has the preparation of images already",
        )
    if preparation and published.is_name(weights):
        own = _mode_of(preparation)
        if stated not in (None, own):
            raise errors.ArgumentError(
                "preprocessing",
                f"must be {own} for these weights, received {stated}",
            )
        return _OF_CARD
    if stated is not None:
        return stated
    if preparation:
        return _OF_CARD
    if weights and _is_of_keras_applications(weights):
        return "caffe"
    if not model.endswith(".keras") and weights is None:
        return "dataset" if dataset else "torch"
    return "none" if _takes_pixels(network) else None


def _mode_of(preparation: published.Preparation) -> str:
    """The name in `PREPROCESSING` of a preparation."""
    if preparation.mean_image:
        return preparation.mean_image
    return "caffe" if preparation.order == "bgr" else "torch"


def _takes_pixels(network) -> bool:
    """Whether the first layers of a network take pixels of 0 to 255.

    Either its input consists of integers, or a layer before all weights scales
    numbers of this size to about 1.
    """
    if not tf.as_dtype(network.inputs[0].dtype).is_floating:
        return True
    for node in graphs.nodes(network):
        layer = node.operation
        if isinstance(layer, keras.layers.Rescaling):
            reach = 255.0 * np.max(np.abs(layer.scale))
            return bool(0.5 <= reach <= 10.0)
        if isinstance(layer, keras.layers.Normalization):
            return bool(np.max(np.abs(layer.mean)) > 1.0)
        if folding.has_checked_graph(layer):
            return _takes_pixels(layer)
        if getattr(layer, "weights", ()):
            return False
    return False


def _how_to_state(model, dataset) -> str:
    ways = {
        "caffe, tf or torch": "the modes of keras.applications",
        "cifar10": "pixels of 0 to 1 less the mean of CIFAR-10",
        "none": "pixels of 0 to 255, for layers of the network to prepare",
    }
    if dataset:
        ways["dataset"] = f"as apps.train preprocesses {dataset}"
    named = "; ".join(
        f"--preprocessing={name} ({what})" for name, what in ways.items()
    )
    return (
        f"{os.path.basename(model)} does not contain the preprocessing that it "
        f"was trained with: give {named}; or --mean and --standard_deviation "
        "of each channel, in units of 0 to 1"
    )


def _prepared(
    name, network, dataset, is_built
) -> tuple[keras.Model, views.Preprocessing]:
    """A network that takes red, green, blue, and its preprocessing."""
    if name == "dataset":
        if dataset is None:
            raise ValueError("no data set is named: give --dataset")
        return network, dataset.preprocessing
    base = _photo_views(network, dataset)
    if name == _OF_CARD:
        return _prepared_by_card(network, base, is_built)
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
            f"{name} must have images of 3 channels, received a network of "
            f"{base.channels}"
        )
    mean = np.array([123.68, 116.779, 103.939], "float32") / 255
    return (
        _with_red_first(network, is_built),
        _with_numbers(base, mean, pixel),
    )


def _prepared_by_card(
    network, base, is_built
) -> tuple[keras.Model, views.Preprocessing]:
    """A network that takes red, green, blue, prepared as its card says."""
    card = cards.card(network)
    if card is None or card.preparation is None:
        raise ValueError("its weights do not state the preprocessing")
    preparation = card.preparation
    size, shorter_side = base.image_size, preparation.shorter_side
    if shorter_side is not None:
        shorter_side = round(shorter_side * size / preparation.image_size)
    mean = np.array(preparation.mean, "float32")
    if preparation.mean_image:
        mean = shipped.mean(preparation.mean_image)
        if mean.shape != base.image_shape:
            mean = mean.mean((0, 1))
    deviation: np.ndarray | None = np.array(preparation.deviation, "float32")
    if preparation.deviation == (1.0,) * 3:
        deviation = None
    if base.channels == 1:
        mean = mean.mean(-1, keepdims=True)
        deviation = None if deviation is None else deviation.mean(keepdims=True)
    elif preparation.order == "bgr":
        network = _with_red_first(network, is_built)
    return network, dataclasses.replace(
        base,
        shorter_side=shorter_side,
        mean=mean,
        standard_deviation=deviation,
        interpolation=preparation.interpolation,
    )


def _photo_views(network, dataset) -> views.Preprocessing:
    """The preprocessing of photos, for the network's image size.

    Images are cropped as in the data set. Without a data set, a network for
    small images sees them whole.
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

    A file that was trained on other pixels than Caffe's needs a stated
    preprocessing.
    """
    return any("conv1_conv" in name for name in files.read(path))


def _with_red_first(network: keras.Model, is_built: bool) -> keras.Model:
    """Turns a network of blue, green, red (Caffe) to red, green, blue."""
    if is_built:
        kernel = network.get_layer("stem_conv").kernel
        kernel.assign(keras.ops.flip(kernel, axis=2))
        return network
    image = keras.Input(network.inputs[0].shape[1:])
    return keras.Model(image, network(image[..., ::-1]), name=network.name)
