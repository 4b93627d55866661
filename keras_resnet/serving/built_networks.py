"""A network in this process that predicts encoded images, without an export."""

import threading
from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from keras_resnet.data import limits
from keras_resnet.serving import isolation
from keras_resnet.serving import model_sources
from keras_resnet.serving import outputs


class BuiltNetwork:
    """A network of a model source, as `client.Client` takes it.

    The image goes the same way as in an exported network: decoded within the
    limits, the single test view, normalized.

    Args:
        source: The network with its preprocessing and labels.
        max_pixels: Largest width x height of an image.
    """

    def __init__(
        self,
        source: model_sources.ModelSource,
        max_pixels: int = limits.MAX_PIXELS,
    ):
        self._source = source
        self._max_pixels = max_pixels

    def predict(
        self,
        images: Sequence[bytes],
        stopped: threading.Event | None = None,
    ) -> outputs.Predictions:
        """See `client.Network.predict`."""
        preprocessing = self._source.preprocessing
        views, texts = isolation.decode(
            tf.constant(list(images)), preprocessing, self._max_pixels
        )
        status = [text.decode() for text in texts.numpy()]
        rows = outputs.probabilities(
            np.asarray(self._source.model(preprocessing(views))),
            len(images),
            np.array([not text for text in status]),
        )
        best = np.argsort(-rows, axis=-1, kind="stable")
        return outputs.Predictions(
            [[self._source.labels[i] for i in row] for row in best],
            np.take_along_axis(rows, best, -1),
            status,
        )
