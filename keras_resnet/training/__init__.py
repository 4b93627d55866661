"""Recipes, the training loop, work directories, evaluation and search."""

import keras

_BACKENDS = {"tensorflow": "TensorFlow", "jax": "JAX"}


def require_backend(what: str, *allowed: str) -> None:
    """Raises an ImportError if Keras runs on another backend.

    Layers, networks, weights, analysis, recipes and data are for every
    backend. `loop` trains on TensorFlow and JAX, and exports need TensorFlow.

    Args:
        what: The module or program that needs the backend, for the message.
        allowed: The backends: "tensorflow", "jax".

    >>> require_backend("keras_resnet.serving.export", "tensorflow")
    """
    backend = keras.backend.backend()
    if backend not in allowed:
        raise ImportError(
            f"{what} needs Keras on "
            f"{' or '.join(_BACKENDS[name] for name in allowed)}: set "
            f"KERAS_BACKEND={allowed[0]} (layers, networks, weights, analysis "
            f"and fit run on every backend), received {backend!r}"
        )
