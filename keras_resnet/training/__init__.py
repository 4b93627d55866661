"""Data, recipes, the training loop and evaluation."""

import keras


def require_tensorflow(what: str) -> None:
    """Raises an ImportError where Keras runs on another backend.

    Layers, networks, weights, analysis, recipes and data are for every
    backend; the training loop and exports are written for TensorFlow.

    Args:
        what: What needs it, for the message.

    >>> require_tensorflow("keras_resnet.serving.export")
    """
    backend = keras.backend.backend()
    if backend != "tensorflow":
        raise ImportError(
            f"{what} needs Keras on TensorFlow: set KERAS_BACKEND=tensorflow "
            "(layers, networks, weights, analysis and fit run on every "
            f"backend), received {backend!r}"
        )
