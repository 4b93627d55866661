"""The images of training or of test: in memory, in files, in TFDS's records.

They form an endless sequence: position p is in epoch p // size, and each epoch
is a permutation of the images that (seed, epoch) decides.
"""

import abc
import os
import re
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from keras_resnet.data.views import decode

# Records in the shuffle buffer of a set that is too large for memory. TFDS
# wrote them in random order, and their files are shuffled too.
_SHUFFLE_BUFFER = 4096

# What is drawn at random, each from numbers of its own.
ORDER, WINDOW, BATCH = range(3)


class Split(abc.ABC):
    """The images of training or of test, in a fixed order."""

    size: int

    @abc.abstractmethod
    def examples(self, seed, first, last, is_mine) -> tf.data.Dataset:
        """(position, image, label) of the positions of first ... last - 1.

        An image is uint8 or encoded. With a seed, the epochs are shuffled;
        without, positions after the end repeat some image. Positions where
        `is_mine(position)` is false are left out, and not read if possible.
        """

    @abc.abstractmethod
    def stored(self) -> tf.data.Dataset:
        """(image, label) of each image in order."""

    @abc.abstractmethod
    def part(self, is_held_out: bool) -> "Split":
        """A tenth of the images, or the other nine tenths."""

    @abc.abstractmethod
    def name(self, index: int) -> str:
        """How a message names an image."""

    def decoded(self) -> Iterator[tuple[np.ndarray, int]]:
        """(image, label) of each image in order, as NumPy has them.

        Raises:
            ValueError: At the first image that does not decode; names it.
        """
        decoded = map_in_order(
            self.stored(), lambda image, label: (decode(image), label)
        )
        iterator = decoded.as_numpy_iterator()
        for index in range(self.size):
            try:
                yield next(iterator)
            except tf.errors.DataLossError as error:
                raise ValueError(
                    f"the file of {self.name(index)} is damaged "
                    f"({reason(error)}); "
                    "delete the data set and prepare it again"
                ) from error
            except tf.errors.OpError as error:
                raise ValueError(
                    f"{self.name(index)} does not decode; it must be a JPEG, "
                    f"PNG, GIF, BMP or WebP image ({reason(error)})"
                ) from error


class RandomAccess(Split):
    """A split whose images are found by their index."""

    labels: tf.Tensor

    @abc.abstractmethod
    def get(self, index):
        """(image, label) of an index, or images and labels of several."""

    def index(self, position, seed):
        """The index of a position, or of several."""
        if seed is None:
            return tf.minimum(position, self.size - 1)
        epoch = position // self.size
        first = tf.reduce_min(epoch)
        epochs = 1
        if position.shape.rank:  # a batch may reach over the end of an epoch
            epochs = (position.shape[0] - 1) // self.size + 2
        keys = tf.stack([_epoch_key(seed, first + i) for i in range(epochs)])
        # Not tf.random.experimental.index_shuffle: it mixes seeds too little
        # (of 0, 1, 2, ..., 82 of 1442 digits stayed where they were, not 1).
        return tf.raw_ops.RandomIndexShuffle(
            index=position % self.size,
            seed=tf.gather(keys, epoch - first),
            max_index=tf.constant(self.size - 1, tf.int64),
            rounds=16,
        )

    def tenth(self, is_held_out):
        """The indices of every tenth image of each class, or of the others."""
        labels = self.labels.numpy()
        rank = np.empty(self.size, int)  # of an image in its class
        for label in np.unique(labels):
            rank[labels == label] = np.arange(np.sum(labels == label))
        return np.flatnonzero((rank % 10 == 9) == is_held_out)

    def examples(self, seed, first, last, is_mine):
        return map_in_order(
            tf.data.Dataset.range(first, last).filter(is_mine),
            lambda position: (position, *self.get(self.index(position, seed))),
        )

    def stored(self):
        return map_in_order(tf.data.Dataset.range(self.size), self.get)


class Memory(RandomAccess):
    """Images of one size in memory: uint8 `[size, height, width, channels]`."""

    def __init__(self, images: np.ndarray, labels: Sequence[int] | np.ndarray):
        with tf.device("CPU"):
            self.images = tf.constant(images, tf.uint8)
            self.labels = tf.constant(labels, tf.int32)
        self.size = len(images)

    def get(self, index):
        return tf.gather(self.images, index), tf.gather(self.labels, index)

    def part(self, is_held_out):
        chosen = self.tenth(is_held_out)
        return Memory(self.images.numpy()[chosen], self.labels.numpy()[chosen])

    def name(self, index):
        return f"image {index}"

    def decoded(self):
        return zip(self.images.numpy(), self.labels.numpy(), strict=True)


class Files(RandomAccess):
    """One encoded image a file."""

    def __init__(self, paths: Sequence[str], labels: Sequence[int]):
        with tf.device("CPU"):
            # As bytes: a name need not be UTF-8.
            self.paths = tf.constant([os.fsencode(path) for path in paths])
            self.labels = tf.constant(labels, tf.int32)
        self.size = len(paths)

    def get(self, index):
        path = tf.gather(self.paths, index)
        return tf.io.read_file(path), tf.gather(self.labels, index)

    def part(self, is_held_out):
        chosen = self.tenth(is_held_out)
        return Files(self.paths.numpy()[chosen], self.labels.numpy()[chosen])

    def name(self, index):
        return os.fsdecode(self.paths[index].numpy())


class Records(Split):
    """The encoded images of a split of TFDS, which can only be read in order.

    Starting inside an epoch reads the records before, but decodes none.
    """

    def __init__(self, builder, split: str, image_key: str, label_key: str):
        import tensorflow_datasets as tfds

        self._tfds = tfds
        self._builder = builder
        self._split = split
        self._keys = (image_key, label_key)
        self.size = int(self.stored().cardinality())

    def stored(self):
        return self._read()

    def in_memory(self) -> Memory:
        """The split decoded, whose images are all of one size."""
        whole = self._read(decodes=True).batch(self.size)
        try:
            return Memory(*next(whole.as_numpy_iterator()))
        except (tf.errors.InvalidArgumentError, tf.errors.DataLossError):
            for _ in self.decoded():  # tells which one it was
                pass
            raise

    def examples(self, seed, first, last, is_mine):
        @tf.autograph.experimental.do_not_convert
        def shuffled(epoch):
            # tf.data mixes the seed of the surrounding graph into its own;
            # this graph's is fixed, so that only (seed, epoch) matters.
            # (It may not be 0: tf.data cannot compare (0, tensor) with (0, 0).)
            tf.random.set_seed(1)
            epoch_seed = _epoch_key(seed, epoch)[0] % (2**31 - 1)
            return self._read(epoch_seed).shuffle(
                _SHUFFLE_BUFFER, epoch_seed, reshuffle_each_iteration=False
            )

        if seed is None:
            records = self.stored()
            padding = records.take(1).repeat(last - self.size)
            records = records.concatenate(padding)
        else:
            epochs = tf.data.Dataset.range(first // self.size, tf.int64.max)
            records = epochs.flat_map(shuffled).skip(first % self.size)
        mine = records.enumerate(first).filter(lambda p, _: is_mine(p))
        return map_in_order(
            mine, lambda position, example: (position, *example)
        )

    def _read(self, file_seed=None, decodes=False):
        """The records, their files in order, or in an order of a seed."""
        image_key, label_key = self._keys
        records = self._builder.as_dataset(
            split=self._split,
            shuffle_files=file_seed is not None,
            decoders=None
            if decodes
            else {image_key: self._tfds.decode.SkipDecoding()},
            read_config=self._tfds.ReadConfig(
                shuffle_seed=file_seed,
                shuffle_reshuffle_each_iteration=False,
                try_autocache=False,
            ),
        )
        return map_in_order(
            records,
            lambda record: (
                record[image_key],
                tf.cast(record[label_key], tf.int32),
            ),
        )

    def part(self, is_held_out):
        # Of a split such as "train" or "train[:80%]".
        name, _, rest = self._split.partition("[:")
        end = int(rest.removesuffix("%]") or 100)
        start = end - end // 10
        part = f"{start}%:{end}%" if is_held_out else f":{start}%"
        return Records(self._builder, f"{name}[{part}]", *self._keys)

    def name(self, index):
        return f"record {index} of {self._builder.name}/{self._split}"


def reason(error: Exception) -> str:
    """Returns what an error says, in one line without names of graphs."""
    lines = (getattr(error, "message", None) or str(error)).splitlines()
    text = re.sub(r"\{\{.*?\}\} ?", "", lines[0] if lines else "")
    return text[:500]


def random_key(seed, purpose, index):
    """The key of stateless random numbers, int64 `[2]`."""
    return tf.stack([tf.constant(3 * seed + purpose, tf.int64), index])


def _epoch_key(seed, epoch):
    """What decides the order of an epoch: 3 integers of 64 random bits."""
    key = random_key(seed, ORDER, epoch)
    return tf.random.stateless_uniform([3], key, None, None, tf.int64)


def map_in_order(
    dataset: tf.data.Dataset, function: Callable
) -> tf.data.Dataset:
    """`dataset.map`, in parallel and in order, traced as it is written."""
    return dataset.map(
        tf.autograph.experimental.do_not_convert(function),
        num_parallel_calls=tf.data.AUTOTUNE,
        deterministic=True,
    )
