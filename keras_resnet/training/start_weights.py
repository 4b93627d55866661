"""The weights from which a training starts, and their preprocessing.

A name or a file goes through the network's builder, so that every source of
`keras_resnet.resnet(weights=...)` can be fine-tuned. The classifier is left
out. The weights of a work directory keep their classifier if its classes are
those of the new images: that is the second phase of a fine-tuning.
"""

import dataclasses
import hashlib
import os
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np

from keras_resnet import arguments as rules
from keras_resnet import networks
from keras_resnet import specs
from keras_resnet.data import datasets
from keras_resnet.data import views
from keras_resnet.training import checkpoints
from keras_resnet.training import configs
from keras_resnet.training import trained_networks
from keras_resnet.training import workdirs
from keras_resnet.training.recipe import Recipe
from keras_resnet.weights import pretrained
from keras_resnet.weights import shipped

# Shorter side of a resized photo over the side of its crop, for weights that
# were trained on whole images. Photos of several sizes show more than those.
_ENLARGEMENT = 8 / 7


@dataclasses.dataclass(frozen=True, eq=False)
class StartWeights:
    """Weights by their paths, with the preprocessing of their images.

    Attributes:
        arrays: Values by the path of the weight.
        sha256: Hash of the file, or of the arrays of a name or a directory.
        preprocessing: That of the images on which they were trained, with
            their crop; None if that is unknown.
        labels: Names of the classes of `arrays`' classifier; None without one.
        source: One line about the preprocessing.
        arguments: Arguments of the network that the weights decide.
    """

    arrays: dict[str, np.ndarray]
    sha256: str
    preprocessing: views.Preprocessing | None
    labels: list[str] | None
    source: str
    arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def preprocessing_for(
        self, own: views.Preprocessing, image_size: int | None = None
    ) -> views.Preprocessing:
        """Returns the preprocessing for new images.

        Args:
            own: The preprocessing of the new images.
            image_size: Height and width of the input, in pixels; None for
                those of the weights.

        Raises:
            ValueError: If the weights have a mean image of another size.
        """
        found = self.preprocessing
        if found is None:
            return own
        size = image_size or found.image_size
        if size != found.image_size and found.mean.ndim == 3:
            raise ValueError(
                "image_size must be that of the weights' mean image "
                f"({found.image_size}), received {size}"
            )
        shorter_side = None
        if own.is_cropped:
            shorter_side = round(size * _enlargement(found))
        return dataclasses.replace(
            found, image_size=size, shorter_side=shorter_side, exif=own.exif
        )


def read(
    weights: str, network: networks.Network, arguments=None, channels: int = 3
) -> StartWeights:
    """Reads weights by their name, from a file or from a work directory.

    Args:
        weights: A value of `weights` of `keras_resnet.resnet`, or a work
            directory of the train program.
        network: The network that is trained.
        arguments: Arguments of its variant.
        channels: Channels of the new images.

    Raises:
        ValueError: If the weights are not those of the network.
    """
    if os.path.isdir(weights):
        return _of_workdir(weights, network, arguments or {})
    if channels != 3:
        raise ValueError(
            "weights of colour images need images of 3 channels, received "
            f"images of {channels}: store them as colour images"
        )
    spec = specs.get_spec(network.name)
    rules.check_weights(spec, weights, False, spec.classes)
    origin = pretrained.known(spec, weights, include_top=False)
    if origin is None:
        origin = pretrained.read(spec, weights, include_top=False).origin
    given = dict(arguments or {})
    decided = {**_decided(origin, spec, given), **given}
    if "shortcut" in given and str(given["shortcut"]) == "A":
        decided.update(_decided(origin, spec, given))
    preprocessing, source = _preprocessing(origin.card)
    size = preprocessing.image_size if preprocessing else views.PHOTO_SIZE
    model = network.build(
        input_shape=(size, size, channels),
        include_top=False,
        weights=weights,
        **network.arguments(decided),
    )
    arrays = _arrays(model)
    preparation = origin.card.preparation
    if preparation is not None and preparation.order == "bgr":
        arrays["stem_conv/kernel"] = arrays["stem_conv/kernel"][:, :, ::-1]
    return StartWeights(
        arrays, _sha256(weights, arrays), preprocessing, None, source, decided
    )


def recorded(workdir, weights: str) -> StartWeights | None:
    """Returns what a work directory records of its start weights.

    Args:
        workdir: A work directory.
        weights: The weights that a flag names.

    Returns:
        `StartWeights` without arrays; None if the directory has no checkpoint
        or another start.
    """
    workdir = workdirs.local(workdir)
    last = workdir / workdirs.CHECKPOINTS["last"]
    if not workdirs.is_described(workdir) or not checkpoints.steps(last):
        return None
    config = workdirs.read_config(workdir)
    if config.weights != weights or config.weights_sha256 is None:
        return None
    preprocessing, *_ = workdirs.read_dataset(workdir)
    return StartWeights(
        {},
        config.weights_sha256,
        preprocessing,
        None,
        "",
        config.model_arguments,
    )


def load_dataset(config: configs.Config, workdir=None) -> datasets.DataSet:
    """Returns the data set of a run, with the weights' preprocessing.

    Args:
        config: The configuration of the run.
        workdir: Its work directory, whose preprocessing a resumed run has, or
            None.
    """
    dataset = configs.load_dataset(config)
    if not config.weights:
        return dataset
    if workdir is not None and workdirs.is_described(workdir):
        prepared, *_ = workdirs.read_dataset(workdir)
    else:
        network = networks.get_network(config.model)
        start = read(
            config.weights,
            network,
            config.model_arguments,
            dataset.preprocessing.channels,
        )
        prepared = start.preprocessing_for(
            dataset.preprocessing, config.recipe.image_size
        )
    return dataset.with_preprocessing(preprocessing=prepared)


def with_views(
    dataset: datasets.DataSet, recipe: Recipe, start: StartWeights | None
) -> datasets.DataSet:
    """Returns the data set with the views of the recipe or the weights.

    Args:
        dataset: The data set.
        recipe: The recipe, with its `image_size` and `test_crop_ratio`.
        start: The start weights, if any.

    Raises:
        ValueError: If the images or the weights do not allow the size.
    """
    size, ratio = recipe.image_size, recipe.test_crop_ratio
    if start is not None and start.preprocessing is not None:
        return dataset.with_preprocessing(
            preprocessing=start.preprocessing_for(dataset.preprocessing, size)
        )
    if ratio is None and size in (None, dataset.image_shape[0]):
        return dataset
    if dataset.name == "synthetic":  # its images are drawn at a size
        return datasets.load(dataset.name, image_size=size)
    return dataset.with_preprocessing(image_size=size, test_crop_ratio=ratio)


def start(trainer, labels: list[str], report) -> None:
    """Gives a new run its start weights.

    Args:
        trainer: A `TensorFlowTrainer` before its first step.
        labels: The classes of its network.
        report: Receives a line about the weights.

    Raises:
        ValueError: If the weights are not those of the configuration.
    """
    config = trainer.config
    network = networks.get_network(config.model)
    found = read(config.weights, network, config.model_arguments)
    if config.weights_sha256 not in (None, found.sha256):
        raise ValueError(
            f"the weights {config.weights} must be those of the configuration "
            f"(sha256 {config.weights_sha256}), received {found.sha256}"
        )
    keeps_head = assign(trainer.model, found, labels)
    for average, variable in zip(
        trainer.averages, trainer.model.trainable_variables, strict=False
    ):
        average.assign(variable.value)
    head = "with its classifier" if keeps_head else "with a new classifier"
    report(
        f"starting from the weights {config.weights} (sha256 "
        f"{found.sha256[:16]}), {head}; preprocessing: {found.source}"
    )


def assign(model: keras.Model, start: StartWeights, labels: list[str]) -> bool:
    """Gives a network the start weights, except those of another classifier.

    Args:
        model: The network.
        start: The weights.
        labels: The classes of the network.

    Returns:
        Whether the classifier has start weights too.

    Raises:
        ValueError: If a weight has another shape, or is missing.
    """
    keeps_head = start.labels == labels
    head = f"{configs.CLASSIFIER}/"
    for variable in model.weights:
        path = variable.path
        if path.startswith(head) and not keeps_head:
            continue
        value = start.arrays.get(path)
        if value is None or value.shape != tuple(variable.shape):
            if not path.endswith(_SEED):
                shape = None if value is None else value.shape
                raise ValueError(
                    f"the start weights must have {path} of the shape "
                    f"{tuple(variable.shape)}, received {shape}"
                )
            continue
        variable.assign(value)
    return keeps_head


_SEED = "seed_generator_state"


def _arrays(model):
    return {v.path: keras.ops.convert_to_numpy(v) for v in model.weights}


def _of_workdir(workdir, network, given):
    trained = trained_networks.load_workdir(
        workdir, classifier_activation=None, report=lambda line: None
    )
    if trained.config.model != network.name:
        raise ValueError(
            f"the weights must be of {network.name}, {workdir} has "
            f"{trained.config.model}"
        )
    _check_function(workdir, network, trained.config.model_arguments, given)
    arrays = _arrays(trained.model)
    return StartWeights(
        arrays,
        _digest(arrays),
        trained.preprocessing,
        trained.labels,
        f"that of {workdir}",
        trained.config.model_arguments,
    )


def _enlargement(preprocessing):
    if preprocessing.shorter_side is None:
        return _ENLARGEMENT
    return preprocessing.shorter_side / preprocessing.image_size


# Arguments that change neither the weights nor what a trained network computes.
_COSTS = ("remat", "survival_probability", "batch_norm_momentum")


def _check_function(workdir, network, trained, given):
    """Raises ValueError if given arguments contradict those of a training."""
    for name in given.keys() - set(_COSTS):
        values = [
            _function(network, name, arguments.get(name))
            for arguments in (trained, given)
        ]
        if values[0] != values[1]:
            raise ValueError(
                f"the weights of {workdir} were trained with {name}="
                f"{values[0]}, received {name}={values[1]}"
            )


def _function(network, name, value):
    """Returns the value of an argument; of None, the one that it stands for."""
    if value is None:
        value = rules.OF_PAPERS.get(name)
    if value is None:
        value = getattr(specs.get_spec(network.name), name, None)
    return network.takes[name].value(value)


def _preprocessing(card):
    """Returns the preprocessing of weights and its name; None if unknown."""
    preparation = card.preparation
    if preparation is None:
        return None, "unknown: that of the new images is used"
    mean = np.array(preparation.mean, "float32")
    if preparation.mean_image:
        mean = shipped.mean(preparation.mean_image)
    deviation = None
    if preparation.deviation != (1.0,) * 3:
        deviation = np.array(preparation.deviation, "float32")
    size = preparation.image_size
    view = views.Preprocessing(
        size,
        3,
        preparation.shorter_side,
        mean,
        deviation,
        interpolation=preparation.interpolation,
    )
    return view, (
        f"that of {card.name}, {size}x{size} pixels, {view.interpolation}"
    )


def _decided(origin, spec, arguments):
    """Returns the arguments that the weights decide, other than the papers'.

    The network is trained with them, so that it computes the function that
    the weights were trained for.
    """
    decided = {
        name: value
        for name, value in origin.decided.items()
        if name in rules.OF_PAPERS and value != rules.OF_PAPERS[name]
    }
    if not spec.bottleneck:
        decided.pop("bottleneck_stride", None)
    shortcut = str(arguments.get("shortcut", spec.shortcut))
    zeros = origin.decided.get("zeros", "end")
    if shortcut == "A" and zeros != "end":
        decided["shortcut"] = f"A(zeros={zeros!r})"
    return decided


def _sha256(weights, arrays):
    if os.path.isfile(weights):
        with open(weights, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    return _digest(arrays)


def _digest(arrays):
    digest = hashlib.sha256()
    for path in sorted(arrays):
        digest.update(path.encode())
        digest.update(np.ascontiguousarray(arrays[path]).tobytes())
    return digest.hexdigest()
