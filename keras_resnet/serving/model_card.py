"""Model card of an exported version: `model_card.json`."""

import hashlib
import importlib.metadata
import json
import os
import platform
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

import keras_resnet
from keras_resnet.analysis import complexity
from keras_resnet.data import views
from keras_resnet.weights import shipped

FILE = "model_card.json"


def read(directory: str | os.PathLike) -> dict[str, Any]:
    """Returns the model card of a version."""
    with open(os.path.join(directory, FILE), encoding="utf-8") as file:
        return json.load(file)


def write(directory: str, card: dict[str, Any]) -> None:
    """Writes a card, with the SHA-256 of every other file of the version."""
    card = {**card, "sha256": _sha256(directory)}
    with open(os.path.join(directory, FILE), "w", encoding="utf-8") as file:
        file.write(shipped.card_text(card))


def describe(
    model: keras.Model,
    preprocessing: views.Preprocessing,
    labels: Sequence[str],
    about: dict[str, Any],
) -> dict[str, Any]:
    """Returns the entries of a card that do not depend on the export.

    Args:
        model: The network.
        preprocessing: Preprocessing between an image and the model.
        labels: One for each class.
        about: Further entries, such as the recipe.
    """
    try:
        counts = complexity.complexity(model, preprocessing.image_shape)
    except ValueError:  # a layer whose operations cannot be counted
        counts = {
            "parameters": sum(
                int(np.prod(weight.shape)) for weight in model.trainable_weights
            ),
            "multiply_adds": None,
        }
    return {
        **about,
        "network": {
            "name": model.name,
            **about.get("network", {}),
            "parameters": counts["parameters"],
            "multiply_adds": counts["multiply_adds"],
        },
        "classes": len(labels),
        "preprocessing": json.loads(preprocessing.to_json()),
        "versions": _package_versions(),
    }


def is_near_chance(check: dict[str, Any]) -> bool:
    """Whether a network may be no better than the most frequent class.

    Args:
        check: Entry of a card's `checks`.

    Returns:
        True if the errors are at least the mean less 3 standard deviations of
        the errors of always predicting the most frequent class.
    """
    chance = check["chance_error"] / 100.0
    deviation = np.sqrt(check["images"] * chance * (1.0 - chance))
    return bool(
        check["top1_errors"] >= check["images"] * chance - 3.0 * deviation
    )


def _package_versions() -> dict[str, str]:
    packages = ("keras", "numpy", "tensorflow")
    return {
        "python": platform.python_version(),
        "keras_resnet": keras_resnet.__version__,
        **{name: importlib.metadata.version(name) for name in packages},
    }


def _sha256(directory: str) -> dict[str, str]:
    """SHA-256 of every file below a directory, by relative path."""
    found = {}
    for folder, _, names in sorted(os.walk(directory)):
        for name in sorted(names):
            path = os.path.join(folder, name)
            with open(path, "rb") as file:
                content = file.read()
            key = os.path.relpath(path, directory)
            found[key] = hashlib.sha256(content).hexdigest()
    return found
