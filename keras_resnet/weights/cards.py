"""Cards of weights that stay with a model: saved, cloned and loaded with it."""

import keras

from keras_resnet.layers import Convolution
from keras_resnet.weights.published import Card


@keras.saving.register_keras_serializable(package="keras_resnet")
class Stem(Convolution):
    """First convolution of a network, which keeps the card of its weights.

    The function is that of `Convolution`. Every copy of a model that starts
    with this layer has the card: its `.keras` file, its clone, and a model with
    another classifier.

    Args:
        filters, ...: As in `Convolution`.
        card: The card of the weights, its JSON, or None.
    """

    computes_as = Convolution

    def __init__(self, *args, card: Card | dict | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.card = Card.from_json(card) if isinstance(card, dict) else card

    def get_config(self):
        card = self.card and self.card.to_json()
        return {**super().get_config(), "card": card}


def _stems(model: keras.Model) -> list[Stem]:
    layers = model._flatten_layers()
    found = {id(layer): layer for layer in layers if isinstance(layer, Stem)}
    return list(found.values())


def card(model: keras.Model) -> Card | None:
    """Returns the card of a model's weights, or None.

    Args:
        model: A network of this package, or a model with one inside. The card
            is that of the weights that were loaded first; training does not
            change it.

    Raises:
        ValueError: If the model has networks with different cards.

    >>> import keras_resnet
    >>> card(keras_resnet.ResNet20(weights="cifar10")).top1
    92.05
    """
    found = {stem.card for stem in _stems(model)}
    if len(found) > 1:
        titles = ", ".join(sorted(c.name if c else "none" for c in found))
        raise ValueError(
            f"model must have networks with one card, received {model.name!r}, "
            f"which has {titles}"
        )
    return found.pop() if found else None


def attach(model: keras.Model, card: Card | None) -> None:
    """Gives the networks of a model a card."""
    for stem in _stems(model):
        stem.card = card


def has_classifier(model: keras.Model, card: Card) -> bool:
    """Returns whether a model has the classifier of its weights.

    A new classifier has another name or another number of classes.

    >>> import keras_resnet
    >>> model = keras_resnet.ResNet20(weights="cifar10")
    >>> has_classifier(model, card(model))
    True
    """
    return any(
        isinstance(layer, keras.layers.Dense)
        and layer.name == "predictions"
        and layer.units == card.classes
        for layer in model._flatten_layers()
    )
