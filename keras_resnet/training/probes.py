"""Linear probes: the frozen network runs once over the images.

If all but the classifier is frozen and no image is augmented, the input of the
classifier is the same in every epoch. It is computed once and kept in memory.
"""

import functools

import keras
import numpy as np
import tensorflow as tf

from keras_resnet.data import datasets
from keras_resnet.data import pipelines
from keras_resnet.data import splits
from keras_resnet.training import configs

_BATCH_SIZE = 64  # images of one call of the frozen network
_MOST_BYTES = 2**30  # of the features of all images


def is_cached(
    config: configs.Config, model: keras.Model, dataset: datasets.DataSet
) -> bool:
    """Returns whether a run trains on features that are kept in memory."""
    if not configs.is_probe(config):
        return False
    layer = model.get_layer(configs.CLASSIFIER)
    count = dataset.train_size + dataset.test_size
    return 4 * count * layer.kernel.shape[0] <= _MOST_BYTES


def parts(model: keras.Model) -> tuple[keras.Model, keras.Model]:
    """Returns the network without its classifier, and the classifier alone.

    Both share their weights with the model.

    >>> import keras_resnet
    >>> features, head = parts(keras_resnet.ResNet20())
    >>> features.output_shape, head.output_shape
    ((None, 64), (None, 10))
    """
    layer = model.get_layer(configs.CLASSIFIER)
    features = keras.Model(model.input, layer.input)
    image = keras.Input(features.output_shape[1:])
    return features, keras.Model(image, layer(image))


class FeatureSet:
    """A data set whose images are the features of a frozen network.

    Args:
        dataset: The data set of the images.
        features: The network without its classifier.

    Attributes:
        dataset: The argument.
    """

    has_photos = False

    def __init__(self, dataset: datasets.DataSet, features: keras.Model):
        self.dataset = dataset
        self._features = tf.function(
            lambda images: features(images, training=False),
            reduce_retracing=True,
        )
        self.classes = dataset.classes
        self.test_size = dataset.test_size

    def check(self, error: Exception | None = None) -> None:
        """Calls `DataSet.check`."""
        self.dataset.check(error)

    def _computed(self, batches, size):
        """Returns the features of `size` images as a split in memory."""
        found, labels = [], []
        for images, label, *_ in batches:
            found.append(self._features(images).numpy())
            labels.append(label.numpy())
        return _Features(
            np.concatenate(found)[:size], np.concatenate(labels)[:size]
        )

    @functools.cached_property
    def _train(self):
        # The test view of the training images, each once.
        size = self.dataset.train_size
        split = self.dataset._train
        share = pipelines.Share(_BATCH_SIZE, 0, _BATCH_SIZE)
        batches = pipelines.test_batches(
            split, self.dataset.preprocessing, share
        )
        return self._computed(batches, size)

    @functools.cached_property
    def _test(self):
        batches = self.dataset.padded_test_batches(_BATCH_SIZE)
        return self._computed(batches, self.test_size)

    def train_batches(
        self, batch_size, seed, first_step=0, augmentation="none", shard=(0, 1)
    ) -> tf.data.Dataset:
        """Returns the batches of `DataSet.train_batches` as features."""
        share = pipelines.Share.of_shard(batch_size, shard)
        last = tf.int64.max // batch_size
        split = self._train
        return splits.map_in_order(
            tf.data.Dataset.range(first_step, last),
            lambda step: split.get(split.index(share.positions(step), seed)),
        )

    def padded_test_batches(
        self, batch_size, shard=(0, 1), protocol="single"
    ) -> tf.data.Dataset:
        """Returns the batches of `DataSet.padded_test_batches` as features."""
        share = pipelines.Share.of_shard(batch_size, shard)
        split = self._test

        def batch(step):
            positions = share.positions(step)
            counted = tf.cast(positions < split.size, tf.float32)
            return *split.get(split.index(positions, None)), counted

        steps = -(-split.size // batch_size)
        return splits.map_in_order(tf.data.Dataset.range(steps), batch)


class _Features(splits.RandomAccess):
    """Features in memory: float32 `[size, channels]`."""

    def __init__(self, features, labels):
        with tf.device("CPU"):
            self.features = tf.constant(features)
            self.labels = tf.constant(labels, tf.int32)
        self.size = len(features)

    def get(self, index):
        return tf.gather(self.features, index), tf.gather(self.labels, index)

    def part(self, is_held_out):
        raise NotImplementedError("features are not divided")

    def name(self, index):
        return f"features {index}"
