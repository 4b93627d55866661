"""Labels of the classes that published weights were trained on."""

import json
import os
from collections.abc import Sequence

import keras

from keras_resnet.weights import cards
from keras_resnet.weights import downloads
from keras_resnet.weights import shipped
from keras_resnet.weights.published import Card

# Of keras.applications.imagenet_utils, which downloads it to the same place.
_INDEX = (
    "https://storage.googleapis.com/download.tensorflow.org/data/"
    "imagenet_class_index.json"
)
_INDEX_DIGEST = "md5:c2c37ea517e94d9795004a39431a14cb"


def of_model(model: keras.Model) -> list[str] | None:
    """Returns the label of each class of a model, or None if they are unknown.

    A model with another classifier has other classes, and its card is that of
    the rest.

    Args:
        model: A model, maybe with a card (`cards.card`).

    Raises:
        ValueError: If the card has another number of labels than of classes.
        downloads.DownloadError: As `of_card`.

    >>> import keras_resnet
    >>> model = keras_resnet.ResNet20(weights="cifar10")
    >>> of_model(model)[3]
    'cat'
    >>> head = keras.layers.Dense(10)(model.get_layer("pool").output)
    >>> of_model(keras.Model(model.input, head))
    """
    card = cards.card(model)
    classes = model.outputs[0].shape[-1]
    if (
        card is None
        or card.classes != classes
        or not cards.has_classifier(model, card)
    ):
        return None
    found = of_card(card)
    if found is not None and len(found) != classes:
        raise ValueError(
            f"the card of {model.name!r} must have a label for each of "
            f"{classes} classes, received {len(found)}"
        )
    return found


def of_card(card: Card) -> list[str] | None:
    """Returns the label of each class of some weights, or None.

    Those of ImageNet are downloaded once.

    Raises:
        downloads.DownloadError: If they cannot be downloaded.

    >>> from keras_resnet.weights import published
    >>> of_card(published.find("resnet20", "cifar10"))[3]
    'cat'
    """
    if card.label_set == "cifar10":
        return shipped.card(shipped.networks("cifar10")[0])["labels"]
    if card.label_set == "imagenet":
        return imagenet(downloads.get(_INDEX, _INDEX_DIGEST))
    return [*card.labels] or None


def differ(labels: Sequence[str], others: Sequence[str]) -> bool:
    """Returns whether a label has another place among other labels.

    Labels of another language or another form, such as the synsets of
    ImageNet, do not differ in this sense: only the order tells.

    >>> differ(["cat", "dog"], ["dog", "cat"])
    True
    >>> differ(["cat", "dog"], ["n02121620", "n02084071"])
    False
    """
    return any(
        label != other and (label in others or other in labels)
        for label, other in zip(labels, others, strict=False)
    )


def imagenet(path: str | os.PathLike) -> list[str]:
    """Returns the labels in the class index of Keras."""
    with open(path, encoding="utf-8") as file:
        index = json.load(file)
    return [index[str(i)][1] for i in range(len(index))]
