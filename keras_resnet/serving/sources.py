"""Where a network to export comes from.

A work directory has everything: the network, its preprocessing, its labels and
the name of its data set. A `.keras` file has the network; a builder's name and
a file of weights make one. What these two lack is said, or taken from a data
set, or as for photos of ImageNet.
"""

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from keras_resnet import models
from keras_resnet.serving import export
from keras_resnet.training import data
from keras_resnet.training import workdirs

_CALIBRATION_IMAGES = 200
_PHOTO_SIZE = 224


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


def of_workdir(workdir: str | os.PathLike) -> Source:
    """The newest checkpoint of what `apps.train` wrote.

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
        config.data_dir,
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
            network's, where the arguments below do not say otherwise.
        data_dir: where the data set is.
        labels: one for each class; without a data set "0", "1", ...
        mean: of each channel, in 0..1; without a data set that of ImageNet.
        standard_deviation: likewise. Where one of them is given, the other is
            0 or 1.

    Raises:
        ValueError: there is no such network, or it does not fit the rest.
        OSError: there is no such file.
    """
    arguments = arguments or {}
    found = data.load(dataset, data_dir) if dataset else None
    if model.endswith(".keras"):
        if weights or arguments:
            raise ValueError(
                "a .keras file has its own weights and arguments; received "
                f"weights {weights} and arguments {arguments}"
            )
        network = _load_keras(model)
        title = os.path.basename(model)
    else:
        spec = models.get_spec(model)
        shape = found.image_shape if found else None
        network = models.resnet(
            spec,
            weights=weights,
            input_shape=shape,
            classes=found.classes if found else _classes(spec, labels),
            **arguments,
        )
        if weights == "imagenet":
            _take_red_first(network)
        title = f"{spec.name} with {weights or 'random weights'}"
    preprocessing = (
        found.preprocessing if found else _preprocessing(network, weights)
    )
    if mean or standard_deviation:
        preprocessing = dataclasses.replace(
            preprocessing,
            mean=np.array(mean or np.zeros(preprocessing.channels), "float32"),
            standard_deviation=(
                np.array(standard_deviation, "float32")
                if standard_deviation
                else None
            ),
        )
    if labels is None and found:
        labels = found.labels
    if labels is None:
        labels = [str(i) for i in range(network.output_shape[-1])]
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


def _load_keras(path: str) -> keras.Model:
    if not os.path.isfile(path):
        raise FileNotFoundError(f"there is no file {path}")
    return keras.models.load_model(path, compile=False)


def _classes(spec, labels) -> int:
    return len(labels) if labels is not None else spec.classes


def _take_red_first(network: keras.Model) -> None:
    """The weights of keras.applications take blue, green, red (Caffe's)."""
    kernel = network.get_layer("stem_conv").kernel
    kernel.assign(keras.ops.flip(kernel, axis=2))


def _preprocessing(network, weights) -> data.Preprocessing:
    """That of photos; a network for small images sees them whole."""
    height, _, channels = network.input_shape[1:]
    size = height or _PHOTO_SIZE
    found = data.photo_preprocessing(
        size, channels, resizes_whole=size < _PHOTO_SIZE // 2
    )
    if weights != "imagenet":
        return found
    # Caffe's: pixels of 0..255, less their mean.
    mean = np.array([123.68, 116.779, 103.939], "float32") / 255
    deviation = np.full(3, 1 / 255, "float32")
    return dataclasses.replace(found, mean=mean, standard_deviation=deviation)
