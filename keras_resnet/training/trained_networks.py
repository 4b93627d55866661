"""The trained network of a work directory."""

import contextlib
import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_resnet import training
from keras_resnet.data import views
from keras_resnet.training import checkpoints
from keras_resnet.training import configs
from keras_resnet.training import memory
from keras_resnet.training import optimizers
from keras_resnet.training import workdirs
from keras_resnet.training.workdirs import WorkdirError
from keras_resnet.weights import bounds
from keras_resnet.weights import cards
from keras_resnet.weights import keras_files
from keras_resnet.weights import published
from keras_resnet.weights import shipped


@dataclasses.dataclass
class TrainedNetwork:
    """A network with its configuration, from `load_workdir`.

    Attributes:
        model: The network, in float32.
        config: The configuration of its run.
        preprocessing: The preprocessing of its images.
        labels: Name of each class.
        step: Number of steps of the checkpoint.
        record: Record of the training images, see `datasets.DataSet.record`.
    """

    model: keras.Model
    config: configs.Config
    preprocessing: views.Preprocessing
    labels: list[str]
    step: int
    record: dict | None = None


def load_workdir(
    workdir: str | os.PathLike,
    classifier_activation="softmax",
    checkpoint: str = "last",
    report: Callable[[str], None] = print,
) -> TrainedNetwork:
    """Returns the network of a work directory, from one of its checkpoints.

    Args:
        workdir: A directory that `train_and_evaluate` wrote.
        classifier_activation: None for logits.
        checkpoint: `"last"`, or `"best"` for the lowest test error.
        report: Receives a line for each damaged checkpoint, which is skipped.

    Returns:
        A `TrainedNetwork`. Its model computes in float32, and has a card
        (`keras_resnet.weights.card`) with the labels and the preparation of
        images.

    Raises:
        WorkdirError: If the directory is not a work directory, lacks a
            checkpoint, or describes a network of more weights than any of its
            checkpoints holds.
        ImportError: If Keras does not run on TensorFlow. The backend of the
            training may have been JAX.
    """
    training.require_backend(__name__, "tensorflow")
    workdir = workdirs.local(workdir)
    if checkpoint not in workdirs.CHECKPOINTS:
        raise ValueError(
            f"checkpoint must be one of {', '.join(workdirs.CHECKPOINTS)}, "
            f"received {checkpoint!r}"
        )
    if not os.path.lexists(workdir / "config.json"):
        raise WorkdirError(
            f"{workdir} must be a work directory of apps.train, received a "
            "directory without config.json"
        )
    config = workdirs.read_config(workdir)
    directory = workdir / workdirs.CHECKPOINTS[checkpoint]
    if not checkpoints.steps(directory):
        raise WorkdirError(
            f"{workdir} has no checkpoint yet: train for some steps first"
        )
    preprocessing, labels, record = workdirs.read_dataset(workdir)

    def build(dtype):
        return configs.build_model(
            dataclasses.replace(config, dtype=dtype),
            preprocessing.image_shape,
            len(labels),
            classifier_activation,
        )

    # The author of the directory also wrote config.json.
    with _bounded_network(workdir, directory):
        model = build("float64" if config.dtype == "float64" else "float32")
    step = _restore(model, config, directory, report)
    if config.dtype == "float64":
        weights = model.get_weights()
        model = build("float32")
        model.set_weights(weights)
    cards.attach(model, _card(workdir, config, preprocessing, labels))
    return TrainedNetwork(model, config, preprocessing, labels, step, record)


def _card(workdir, config, preprocessing, labels) -> published.Card:
    """Returns the card of a trained network, which its `.keras` file keeps."""
    settings = dict(config.model_arguments)
    details: dict[str, Any] = {
        field.name: settings[field.name]
        for field in dataclasses.fields(published.Details)
        if settings.get(field.name) is not None
    }
    if str(settings.get("shortcut")) == "A(zeros='both')":
        details["zeros"] = "both"
    return published.Card(
        name=os.path.basename(os.path.abspath(workdir)),
        network=config.model,
        source="keras_resnet",
        details=published.Details(**details),
        preparation=_preparation(preprocessing),
        classes=len(labels),
        labels=tuple(labels),
    )


def _preparation(
    preprocessing: views.Preprocessing,
) -> published.Preparation | None:
    """Returns the preparation of a card; None for another mean image."""
    mean, deviation = preprocessing.mean, preprocessing.standard_deviation
    mean_image = ""
    if mean.ndim == 3:
        if not np.array_equal(mean, shipped.mean()):
            return None
        mean_image, mean = "cifar10", np.zeros(3)
    if deviation is None:
        deviation = np.ones(3)
    return published.Preparation(
        preprocessing.image_size,
        preprocessing.shorter_side,
        preprocessing.interpolation,
        tuple(np.broadcast_to(mean, 3).tolist()),
        tuple(np.broadcast_to(deviation, 3).tolist()),
        mean_image=mean_image,
    )


@contextlib.contextmanager
def _bounded_network(workdir: Path, directory: Path):
    """Bounds the weights of a network by the bytes of the checkpoints.

    A weight takes 4 bytes or more in a checkpoint, and memory as soon as Keras
    builds its layer.
    """
    most = checkpoints.largest_bytes(directory)
    available = memory.available_bytes()
    if available is not None:
        most = min(most, available)
    try:
        with keras_files.bounded_variables(most // 4 + bounds.FREE_ELEMENTS):
            yield
    except keras_files.TooManyWeightsError as error:
        raise WorkdirError(
            f"{workdir}/config.json must not describe more weights than the "
            f"checkpoints in {directory} hold and the memory has room for"
        ) from error


def _restore(model, config, directory, report):
    """Reads the newest checkpoint that is not damaged; returns its step."""
    averages = optimizers.averages(config.recipe, model)
    step_inside = tf.Variable(0, dtype="int64")
    saved = tf.train.Checkpoint(
        model=model,
        averages=averages,
        untracked=[v.value for v in checkpoints.untracked(model)],
        step=step_inside,
    )
    if config.backend == "jax":
        saved = tf.train.Checkpoint(
            weights=[v.value for v in model.weights], step=step_inside
        )

    def read(path):
        checkpoints.read(
            saved,
            path,
            [*model.weights, *averages, step_inside],
            is_partial=True,
        )
        return int(step_inside.numpy())

    step = checkpoints.restore(read, directory, report)
    if step is None:  # removed since they were listed
        raise WorkdirError(f"{directory} has no checkpoint")
    for variable, value in zip(
        model.trainable_variables, averages, strict=False
    ):
        variable.assign(value)
    return step
