"""Where a network to export comes from.

A work directory has everything: the network, its preprocessing, its labels and
the name of its data set. A `.keras` file has the network; a builder's name and
a file of weights make one. What these two lack is said, or known of the
weights, or taken from a data set, or as for photos of ImageNet.
"""

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from keras_resnet import keras_files
from keras_resnet import models
from keras_resnet import pretrained
from keras_resnet import weight_files
from keras_resnet.serving import export
from keras_resnet.training import data
from keras_resnet.training import workdirs

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
        dataset: the name of its data set, or None; see `data.load`.
        data_dir: where that is.
    """

    model: keras.Model
    preprocessing: data.Preprocessing
    labels: list[str]
    title: str
    about: dict[str, Any]
    dataset: str | None = None
    data_dir: str | None = None

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
        dataset = data.load(
            self.dataset, self.data_dir, preprocessing=self.preprocessing
        )
        labels: np.ndarray | None
        views, labels = dataset.sample(count)
        calibration = None
        if with_calibration:
            calibration, _ = dataset.sample(_CALIBRATION_IMAGES, training=True)
        source = f"{len(views):,} of the test images of {self.dataset}"
        if dataset.labels != self.labels:
            labels = None  # of other classes than the network's
        return export.Images(views, labels, calibration, source)


def of_workdir(
    workdir: str | os.PathLike, data_dir: str | None = None
) -> Source:
    """The newest checkpoint of what `apps.train` wrote.

    Args:
        workdir: its directory.
        data_dir: where the data set is, if it has moved since.

    Raises:
        workdirs.WorkdirError: it is no work directory or has no checkpoint yet.
    """
    trained = workdirs.load_workdir(workdir)
    config = trained.config
    return Source(
        trained.model,
        trained.preprocessing,
        trained.labels,
        f"{config.model} after {trained.step:,} steps",
        {
            "network": {"name": config.model, **config.model_arguments},
            "recipe": {
                **dataclasses.asdict(config.recipe),
                "steps_done": trained.step,
                "dtype": config.dtype,
                "seed": config.seed,
            },
            "data": config.dataset,
        },
        config.dataset,
        data_dir or config.data_dir,
    )


def of_model(
    model: str,
    weights: str | None = None,
    arguments: dict[str, Any] | None = None,
    *,
    dataset: str | None = None,
    data_dir: str | None = None,
    labels: Sequence[str] | None = None,
    mean: Sequence[float | str] | None = None,
    standard_deviation: Sequence[float | str] | None = None,
) -> Source:
    """A `.keras` file, or a builder's name with its weights.

    Args:
        model: the path of a `.keras` file, or a name in `keras_resnet.MODELS`.
        weights: as the builder takes them; None: random ones.
        arguments: further arguments of the builder.
        dataset: what it was trained on; its preprocessing and labels are the
            network's, where neither the weights nor the arguments below say
            otherwise.
        data_dir: where the data set is.
        labels: one for each class; without a data set those of `"cifar10"`,
            else "0", "1", ...
        mean: of each channel, in 0..1. By default that of the weights:
            `"cifar10"` has its own, and those of keras.applications, published
            or in a file, Caffe's, which also takes blue first; then that of
            the data set; then ImageNet's.
        standard_deviation: likewise. Where one of them is given, the other is
            0 or 1.

    Raises:
        ArgumentError: there is no such network or file, or one argument does
            not fit the rest; says which.
        OSError: the data set is not there.
    """
    arguments = arguments or {}
    with _blames("dataset"):
        found = data.load(dataset, data_dir) if dataset else None
    if model.endswith(".keras"):
        for name, value in (("weights", weights), ("arguments", arguments)):
            if value:
                raise ArgumentError(
                    name,
                    "a .keras file has its own weights and arguments; "
                    f"received {value} for {model}",
                )
        with _blames("model"):
            network = _load_keras(model)
        title = os.path.basename(model)
    else:
        with _blames("model"):
            spec = models.get_spec(model)
        with _blames("weights" if weights else "model"):
            network = models.resnet(
                spec,
                weights=weights,
                input_shape=found.image_shape if found else None,
                classes=found.classes if found else _classes(spec, labels),
                **arguments,
            )
        title = f"{spec.name} with {weights or 'random weights'}"
    is_given = bool(mean or standard_deviation)
    preprocessing = found.preprocessing if found else _of_photos(network)
    if weights == "cifar10":
        with _blames("weights"):  # a mean for each pixel, of 32x32
            preprocessing = dataclasses.replace(
                preprocessing, mean=pretrained.mean(), standard_deviation=None
            )
    elif _is_caffes(weights, is_given):
        _take_red_first(network)
        preprocessing = _of_caffe(preprocessing)
        title += ", pixels as keras.applications prepares them"
    if is_given:
        channels = preprocessing.channels
        with _blames("mean" if mean else "standard_deviation"):
            preprocessing = dataclasses.replace(
                preprocessing,
                mean=np.array(mean or np.zeros(channels), "float32"),
                standard_deviation=(
                    np.array(standard_deviation, "float32")
                    if standard_deviation
                    else None
                ),
            )
    if labels is None:
        labels = _labels(network, found, model, weights)
    return Source(
        network,
        preprocessing,
        list(labels),
        title,
        {
            "network": {"name": network.name, **arguments},
            "weights": os.path.basename(weights or "random"),
            "data": dataset,
        },
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
        return pretrained.card(models.get_spec(model).name)["labels"]
    return [str(i) for i in range(network.outputs[0].shape[-1])]


def _of_photos(network) -> data.Preprocessing:
    """That of photos; a network for small images sees them whole."""
    height, _, channels = network.inputs[0].shape[1:]
    size = height or _PHOTO_SIZE
    return data.photo_preprocessing(
        size, channels, resizes_whole=size < _PHOTO_SIZE // 2
    )


def _is_caffes(weights, is_given: bool) -> bool:
    """Whether weights are of keras.applications, published or in a file.

    Who has trained such a file otherwise says so by a mean.
    """
    if weights is None or weights == "imagenet":
        return weights == "imagenet"
    names = () if is_given else weight_files.read(weights)
    return any("conv1_conv" in name for name in names)


def _take_red_first(network: keras.Model) -> None:
    """The weights of keras.applications take blue, green, red (Caffe's)."""
    kernel = network.get_layer("stem_conv").kernel
    kernel.assign(keras.ops.flip(kernel, axis=2))


def _of_caffe(preprocessing) -> data.Preprocessing:
    """Caffe's: pixels of 0..255, less their mean."""
    mean = np.array([123.68, 116.779, 103.939], "float32") / 255
    deviation = np.full(3, 1 / 255, "float32")
    return dataclasses.replace(
        preprocessing, mean=mean, standard_deviation=deviation
    )
