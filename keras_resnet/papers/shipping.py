"""Writes the weights of a run into the package, with their card.

from keras_resnet.data import datasets
from keras_resnet.papers import shipping

shipping.ship("runs/resnet20_0", datasets.load("cifar10"))
"""

import hashlib
import io
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from keras_resnet import atomic
from keras_resnet import networks
from keras_resnet.analysis import complexity
from keras_resnet.data import datasets
from keras_resnet.training import evaluation
from keras_resnet.training import trained_networks
from keras_resnet.weights import shipped


def ship(
    workdir: str | os.PathLike,
    dataset: datasets.DataSet,
    folder: str | os.PathLike | None = None,
) -> dict[str, Any]:
    """Writes the weights of a run, its card and its mean into the package.

    Args:
        workdir: Work directory of a run, finished or not.
        dataset: Data set of the run, with its preprocessing.
        folder: Folder for the files. None is `keras_resnet/weights/shipped`.

    Returns:
        The card (see `keras_resnet.weights.shipped.card`).

    Raises:
        ValueError: If the run has another data set, arguments of the network,
            or a preprocessing that `weights="DATASET"` does not support.
    """
    folder = Path(folder or Path(shipped.__file__).parent)
    trained = trained_networks.load_workdir(workdir, classifier_activation=None)
    config, preprocessing = trained.config, trained.preprocessing
    if config.dataset != dataset.name or config.model_arguments:
        raise ValueError(
            f"{workdir} must be a run of a network of MODELS without arguments "
            f"on {dataset.name}, received {config.model} with "
            f"{networks.texts(config.model_arguments)} on {config.dataset}"
        )
    if (
        preprocessing.mean.ndim != 3
        or preprocessing.standard_deviation is not None
    ):
        raise ValueError(f"{workdir} must only subtract a mean from each pixel")
    evaluate = evaluation.Evaluator(trained.model)
    result = evaluate(dataset, 100, counts_classes=True)
    assert result is not None  # it was not asked to stop
    name = f"{config.model}_{config.dataset}"
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "network.weights.h5"
        trained.model.save_weights(path)
        weights = path.read_bytes()
    card = {
        "model": config.model,
        "dataset": config.dataset,
        "parameters": complexity.complexity(trained.model)["parameters"],
        "recipe": config.recipe.name,
        "steps": trained.step,
        "recipe_steps": config.recipe.steps,
        "seed": config.seed,
        "dtype": config.dtype,
        "test_images": result.images,
        "top1_errors": result.top1_errors,
        "top5_errors": result.top5_errors,
        "confusion": result.confusion.tolist(),
        "sha256": hashlib.sha256(weights).hexdigest(),
        "labels": trained.labels,
    }
    mean = io.BytesIO()
    np.save(mean, preprocessing.mean)
    for file, content in (
        (f"{config.dataset}_mean.npy", mean.getvalue()),
        (f"{name}.weights.h5", weights),
        (f"{name}.json", shipped.card_text(card)),
    ):
        atomic.write(folder / file, content)
    return card
