"""Cards of weights that stay with a model: saved, cloned and loaded with it."""

import json
import math
from typing import Any

import keras
import numpy as np

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
        network: The arguments of the network that leave no trace in its
            arrays, by name. A file of weights has them too.
    """

    computes_as = Convolution

    def __init__(
        self,
        *args,
        card: Card | dict | None = None,
        network: dict[str, Any] | None = None,
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        self.card: Card | None = (
            card
            if card is None or isinstance(card, Card)
            else Card.from_json(card)
        )
        self.network = _checked(network or {})

    def save_own_variables(self, store):
        super().save_own_variables(store)
        if self.network:
            text = json.dumps(self.network, sort_keys=True)
            store[NETWORK] = np.frombuffer(text.encode(), "uint8")

    def load_own_variables(self, store):
        names = list(store.keys())  # the store of Keras is not iterable
        arrays = {name: store[name] for name in names}
        stored = parse_network(arrays.pop(NETWORK, None))
        for name in stored.keys() & self.network.keys():
            if not is_same(name, stored[name], self.network[name]):
                raise ValueError(
                    f"the weights are those of a network with {name}="
                    f"{stored[name]!r}, received one with "
                    f"{self.network[name]!r}"
                )
        super().load_own_variables(arrays)

    def get_config(self):
        card = self.card and self.card.to_json()
        return {**super().get_config(), "card": card, "network": self.network}


#: Name of the arguments of a network beside the arrays of its first layer.
NETWORK = "network"

_MOST_BYTES = 10_000  # of these arguments


def parse_network(text: np.ndarray | None) -> dict[str, Any]:
    """Returns the arguments of a network that are stored beside its weights.

    Args:
        text: The bytes of a JSON object of texts and numbers, or None.

    Raises:
        ValueError: If they are of another form.
    """
    if text is None:
        return {}
    text = np.asarray(text)
    if text.ndim != 1 or text.size > _MOST_BYTES or text.dtype != "uint8":
        raise ValueError("the arguments of the network must be a short text")
    try:
        found = json.loads(text.tobytes())
    except (ValueError, RecursionError) as error:
        raise ValueError("the arguments of the network must be JSON") from error
    return _checked(found)


def _checked(found: Any) -> dict[str, Any]:
    if not isinstance(found, dict) or not all(
        isinstance(value, str | float) for value in found.values()
    ):
        raise ValueError(
            "the arguments of the network must be texts and numbers"
        )
    return dict(found)


def is_same(name: str, value: Any, other: Any) -> bool:
    """Whether two values of an argument are one function.

    The epsilon of keras.applications is 1.001e-5, which is as good as 1e-5.

    >>> is_same("batch_norm_epsilon", 1e-5, 1.001e-5)
    True
    """
    if name == "batch_norm_epsilon":
        return math.isclose(value, other, rel_tol=2e-3)
    return bool(value == other)


def _stems(model: keras.Model) -> list[Stem]:
    if not isinstance(model, keras.Layer):
        raise ValueError(f"model must be a Keras model, received {model!r}")
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
        ValueError: If `model` is no model, or has networks with different
            cards.

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
