"""A network in this process that predicts encoded images, without an export."""

import threading
from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from keras_resnet.data import limits
from keras_resnet.serving import errors
from keras_resnet.serving import model_sources
from keras_resnet.serving import outputs
from keras_resnet.serving import servers
from keras_resnet.serving import signatures


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
        view = signatures.images_spec(preprocessing)
        try:
            views = limits.map_images(
                preprocessing.decode,
                tf.constant(list(images)),
                tf.TensorSpec(view.shape[1:], view.dtype),
                self._max_pixels,
            )
        except tf.errors.InvalidArgumentError as error:
            reason = servers.sentence(error.message)
            raise errors.RejectedError(reason) from error
        rows = self._source.model(preprocessing(views), training=False)
        probabilities = outputs.probabilities(np.asarray(rows), len(images))
        return outputs.Predictions(probabilities, self._source.labels)
