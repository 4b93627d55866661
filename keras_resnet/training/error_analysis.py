"""Where a network is wrong: classes, pairs of classes, single images."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from keras_resnet.data import datasets
from keras_resnet.training import evaluation


def class_rows(
    result: evaluation.Evaluation, labels: Sequence[str]
) -> list[list[str]]:
    """Returns a table of class, images and error, the worst class first.

    A class without images has no error.

    >>> confusion = np.array([[3, 1], [0, 4]])
    >>> result = evaluation.Evaluation(8, 1, 0, 0.5, confusion)
    >>> class_rows(result, ["cat", "dog"])
    [['class', 'images', 'error'], ['cat', '4', '25.00%'], ['dog', '4', \
'0.00%']]
    """
    found = result.per_class(labels)

    def error(label):
        return found[label]["top1_errors"] / max(found[label]["images"], 1)

    def shown(label):
        return f"{100 * error(label):.2f}%" if found[label]["images"] else "-"

    rows = [
        [label, f"{found[label]['images']:,}", shown(label)]
        for label in sorted(found, key=lambda label: (-error(label), label))
    ]
    return [["class", "images", "error"], *rows]


def confused_pairs(
    result: evaluation.Evaluation, labels: Sequence[str], count: int
) -> list[tuple[str, str, int]]:
    """Returns the most frequent errors as (label, prediction, images).

    >>> confusion = np.array([[3, 1], [2, 4]])
    >>> result = evaluation.Evaluation(10, 3, 0, 0.5, confusion)
    >>> confused_pairs(result, ["cat", "dog"], count=1)
    [('dog', 'cat', 2)]
    """
    errors = result.confusion.copy()
    np.fill_diagonal(errors, 0)
    order = np.argsort(-errors, axis=None, kind="stable")[:count]
    pairs = zip(*np.unravel_index(order, errors.shape), strict=True)
    return [
        (labels[row], labels[column], int(errors[row, column]))
        for row, column in pairs
        if errors[row, column]
    ]


@dataclasses.dataclass(frozen=True)
class Mistake:
    """An image with a wrong prediction.

    Attributes:
        name: Name of the image: its file in a folder.
        label: Name of its class.
        prediction: Name of the predicted class.
        probability: Probability of the prediction.
    """

    name: str
    label: str
    prediction: str
    probability: float


def worst(
    answers: evaluation.Answers,
    dataset: datasets.DataSet,
    labels: Sequence[str],
    count: int,
) -> list[Mistake]:
    """Returns the wrong predictions with the highest probabilities.

    Args:
        answers: The answers for the test images of the data set.
        dataset: The data set, which has the names of the images.
        labels: Names of the classes.
        count: Number of images.
    """
    is_wrong = answers.predictions != answers.labels
    highest = np.where(is_wrong, answers.probabilities, -1.0)
    return [
        Mistake(
            dataset.test_name(int(index)),
            labels[answers.labels[index]],
            labels[answers.predictions[index]],
            float(highest[index]),
        )
        for index in np.argsort(-highest, kind="stable")[:count]
        if is_wrong[index]
    ]
