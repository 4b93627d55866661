"""Labels of the classes that published weights were trained on."""

import json
import os

from keras_resnet.weights import downloads
from keras_resnet.weights import shipped
from keras_resnet.weights.published import Card

# Of keras.applications.imagenet_utils, which downloads it to the same place.
_INDEX = (
    "https://storage.googleapis.com/download.tensorflow.org/data/"
    "imagenet_class_index.json"
)
_INDEX_DIGEST = "md5:c2c37ea517e94d9795004a39431a14cb"


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


def imagenet(path: str | os.PathLike) -> list[str]:
    """Returns the labels in the class index of Keras."""
    with open(path, encoding="utf-8") as file:
        index = json.load(file)
    return [index[str(i)][1] for i in range(len(index))]
