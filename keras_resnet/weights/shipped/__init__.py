"""Trained weights that ship with the package, each with its card.

For each network there are three files:

- `<model>_<dataset>.weights.h5` has the weights;
- `<model>_<dataset>.json` is the card: the recipe, and the errors on the test
  images;
- `<dataset>_mean.npy` has the mean image, which preprocessing subtracts.
"""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np

_FOLDER = Path(__file__).parent


def networks(dataset: str = "cifar10") -> list[str]:
    """Returns the networks that ship with weights for a data set.

    >>> "resnet20" in networks()
    True
    """
    ending = f"_{dataset}.json"
    names = [path.name for path in _FOLDER.iterdir()]
    return sorted(n.removesuffix(ending) for n in names if n.endswith(ending))


def card(model: str, dataset: str = "cifar10") -> dict[str, Any]:
    """Returns the card of a network's weights.

    Args:
        model: One of `networks(dataset)`.
        dataset: The data set that they were trained on.

    Returns:
        A dict of

        - `model`, `dataset`, `labels` (by class), `parameters`;
        - `recipe`, `steps` (of `recipe_steps`), `seed` and `dtype` of the
          training;
        - `test_images`, `top1_errors`, `top5_errors`: counts on the single
          view of [1, Sec. 4.2], computed in float32;
        - `confusion`: number of test images of each class (row) with each
          prediction (column);
        - `sha256`: hash of the file of weights.

    Raises:
        ValueError: If no such weights ship.

    >>> card("resnet20")["parameters"]
    269722
    """
    known = networks(dataset)
    if model not in known:
        raise ValueError(
            f"`weights={dataset!r}` exist for {', '.join(known) or 'nothing'}. "
            f"Received: {model}"
        )
    return json.loads((_FOLDER / f"{model}_{dataset}.json").read_text("utf-8"))


def card_text(card: dict[str, Any]) -> str:
    """Returns a card as JSON with each array of numbers on one line.

    >>> print(card_text({"model": "nin", "mean": [[0.5], [2]]}), end="")
    {
     "model": "nin",
     "mean": [[0.5],[2]]
    }
    """
    text = json.dumps(card, indent=1, ensure_ascii=False)
    numbers = r"\[[-+.,\deE\s\[\]]*\]"
    one_line = re.sub(
        numbers, lambda array: re.sub(r"\n *", "", array[0]), text
    )
    return f"{one_line}\n"


def weights_file(model: str, dataset: str = "cifar10") -> str:
    """Returns the path of a network's weights after checking their hash.

    Raises:
        ValueError: If no such weights ship, or the file is not the one that
            the card describes.
    """
    path = _FOLDER / f"{model}_{dataset}.weights.h5"
    expected = card(model, dataset)["sha256"]
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != expected:
        raise ValueError(
            f"the sha256 of {path} must be {expected}, received {found}: "
            "install the package again"
        )
    return str(path)


def size(model: str, dataset: str = "cifar10") -> int:
    """Returns the number of bytes of a network's weights.

    >>> size("resnet20") > 4 * 269722
    True
    """
    return (_FOLDER / f"{model}_{dataset}.weights.h5").stat().st_size


def mean(dataset: str = "cifar10") -> np.ndarray:
    """Returns the mean training image, `[height, width, channels]`, in 0..1.

    [1, Sec. 4.2] subtracts it from each pixel.

    >>> mean().shape
    (32, 32, 3)
    """
    return np.load(_FOLDER / f"{dataset}_mean.npy", allow_pickle=False)
