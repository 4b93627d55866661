"""From a work directory to weights that ship, with the card that says what.

from keras_resnet.results import shipping
from keras_resnet.training import data

shipping.ship("runs/resnet20_0", data.load("cifar10"))
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from keras_resnet import pretrained
from keras_resnet.analysis import complexity
from keras_resnet.training import data
from keras_resnet.training import evaluation
from keras_resnet.training import loop


def ship(
    workdir: str | os.PathLike,
    dataset: data.DataSet,
    folder: str | os.PathLike | None = None,
) -> dict[str, Any]:
    """Writes the weights of a run, its card and its mean into the package.

    Args:
        workdir: What `train_and_evaluate` left, finished or not.
        dataset: What it was trained on, with its own preprocessing.
        folder: Where the files go; None for `keras_resnet/pretrained`.

    Returns:
        The card, as `keras_resnet.pretrained.card` has it.

    Raises:
        ValueError: If the run was one of another data set or has arguments or
            a preprocessing that `weights="DATASET"` could not know.
    """
    folder = Path(folder or Path(pretrained.__file__).parent)
    trained = loop.load_workdir(workdir, classifier_activation=None)
    config, preprocessing = trained.config, trained.preprocessing
    if config.dataset != dataset.name or config.model_arguments:
        raise ValueError(
            f"{workdir} must be a run of a network of MODELS as it is on "
            f"{dataset.name}, received {config.model} with "
            f"{config.model_arguments} on {config.dataset}"
        )
    if (
        preprocessing.mean.ndim != 3
        or preprocessing.standard_deviation is not None
    ):
        raise ValueError(
            f"{workdir} must subtract a mean from each pixel and do no more"
        )
    evaluate = evaluation.Evaluator(trained.model)
    result = evaluate(dataset, 100, counts_classes=True)
    assert result is not None  # nobody asks it to stop
    name = f"{config.model}_{config.dataset}"
    path = folder / f"{name}.weights.h5"
    beside = folder / f".{os.getpid()}.weights.h5"
    trained.model.save_weights(beside)
    content = beside.read_bytes()
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
        "sha256": hashlib.sha256(content).hexdigest(),
        "labels": trained.labels,
    }
    np.save(folder / f"{config.dataset}_mean.npy", preprocessing.mean)
    os.replace(beside, path)
    (folder / f"{name}.json").write_text(json.dumps(card, indent=1) + "\n")
    return card
