"""Data, recipes, the training loops and evaluation."""

import keras

_BACKENDS = {"tensorflow": "TensorFlow", "jax": "JAX"}


def require_backend(what: str, *allowed: str) -> None:
    """Raises an ImportError where Keras runs on another backend.

    Layers, networks, weights, analysis, recipes and data are for every
    backend; `loop` and exports are written for TensorFlow, `jax_loop` for JAX.

    Args:
        what: What needs it, for the message.
        allowed: "tensorflow", "jax".

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
