"""The images of training or of test: in memory, in files, in TFDS's records.

The images form an endless sequence. Position p belongs to epoch p // size. The
pair (seed, epoch) decides the order of the images in an epoch.
"""

import abc
import dataclasses
import math
import os
import re
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from keras_resnet.data import decoding
from keras_resnet.data import limits

# A small image has at most so many pixels a side; a set of small images is
# held in memory if all of them take at most so many bytes.
SMALL_SIDE = 128
_SMALL_BYTES = 2**30

# Records in the shuffle buffer of a set that is too large for memory. TFDS
# wrote them in random order, and their files are shuffled too.
_SHUFFLE_BUFFER = 4096

# The purposes of random numbers; each purpose has a sequence of its own.
ORDER, WINDOW, BATCH = range(3)


@dataclasses.dataclass(frozen=True)
class Source:
    """The stored images and labels of a data set.

    Args:
        labels: The names of the classes.
        read: Returns the split "train" or "test".
        image_shape: `(height, width, channels)` of the images, with None for
            sizes that differ.
        record: Returns a dict of text and numbers that changes if the images
            change.
        notes: What was left out, in words; empty for nothing.
    """

    labels: list[str]
    read: Callable[[str], "Split"]
    image_shape: tuple[int | None, int | None, int]
    record: Callable[[], dict] = dict
    notes: str = ""


class Split(abc.ABC):
    """The images of training or of test, in a fixed order.

    Attributes:
        size: Number of images.
        has_exif: Whether an encoded image is turned as its EXIF orientation
            says. The published errors on the sets of TensorFlow Datasets are
            those of images as they are stored.
    """

    size: int
    has_exif: bool = False

    @abc.abstractmethod
    def examples(
        self, seed, first, last, is_mine, divide=None
    ) -> tf.data.Dataset:
        """Returns (position, image, label) of positions first ... last - 1.

        Args:
            seed: Of the order of each epoch; None for the images' own order,
                in which positions after the end repeat some image.
            first: The first position.
            last: The position after the last one.
            is_mine: `position -> bool`: other positions are left out, and
                their images are not read if possible.
            divide: Function on a data set of what is left, which leaves some
                of it to others; None for all.

        Returns:
            A data set; an image is uint8 pixels or encoded bytes.
        """

    @abc.abstractmethod
    def stored(self) -> tf.data.Dataset:
        """Returns (image, label) of each image in order."""

    @abc.abstractmethod
    def part(self, is_held_out: bool) -> "Split":
        """Returns a tenth of the images, or the other nine tenths."""

    @abc.abstractmethod
    def name(self, index: int) -> str:
        """Returns the name of an image for messages."""

    def decoded(self, exif: bool = True) -> Iterator[tuple[np.ndarray, int]]:
        """Yields (image, label) of each image in order, as NumPy arrays.

        Args:
            exif: Whether images are turned if `has_exif` is true.

        Raises:
            ValueError: If an image does not decode or exceeds the bounds of
                `limits`; names the first such image.
        """

        def decode(image, label):
            image = decoding.bounded(image)
            return decoding.decode(image, exif and self.has_exif), label

        decoded = map_in_order(self.stored(), decode)
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
                    "PNG, GIF, BMP or WebP image of at most "
                    f"{limits.MAX_PIXELS:,} pixels ({reason(error)})"
                ) from error


class RandomAccess(Split):
    """A split that reads an image by its index."""

    labels: tf.Tensor

    @abc.abstractmethod
    def get(self, index):
        """Returns (image, label) of an index, or those of several indices."""

    def index(self, position, seed):
        """Returns the index of a position, or the indices of several."""
        if seed is None:
            return tf.minimum(position, self.size - 1)
        epoch = position // self.size
        first = tf.reduce_min(epoch)
        epochs = 1
        if position.shape.rank:  # a batch may reach over the end of an epoch
            epochs = (position.shape[0] - 1) // self.size + 2
        keys = tf.stack([_epoch_key(seed, first + i) for i in range(epochs)])
        # tf.random.experimental.index_shuffle mixes seeds too little: from
        # one seed to the next, 82 of 1442 digits kept their place, not 1.
        return tf.raw_ops.RandomIndexShuffle(
            index=position % self.size,
            seed=tf.gather(keys, epoch - first),
            max_index=tf.constant(self.size - 1, tf.int64),
            rounds=16,
        )

    def tenth(self, is_held_out):
        """Returns the indices of every tenth image of a class, or the rest."""
        labels = self.labels.numpy()
        rank = np.empty(self.size, int)  # of an image in its class
        for label in np.unique(labels):
            rank[labels == label] = np.arange(np.sum(labels == label))
        return np.flatnonzero((rank % 10 == 9) == is_held_out)

    def examples(self, seed, first, last, is_mine, divide=None):
        mine = tf.data.Dataset.range(first, last).filter(is_mine)
        return map_in_order(
            divide(mine) if divide else mine,
            lambda position: (position, *self.get(self.index(position, seed))),
        )

    def stored(self):
        return map_in_order(tf.data.Dataset.range(self.size), self.get)


class Memory(RandomAccess):
    """Images of one size in memory: uint8 `[size, height, width, channels]`.

    Args:
        images: The images.
        labels: Label of each image.
        names: Name of each image; None for its number.
    """

    def __init__(
        self,
        images: np.ndarray,
        labels: Sequence[int] | np.ndarray,
        names: Sequence[str] | None = None,
    ):
        with tf.device("CPU"):
            self.images = tf.constant(images, tf.uint8)
            self.labels = tf.constant(labels, tf.int32)
        self.size = len(images)
        self.names = names

    def get(self, index):
        return tf.gather(self.images, index), tf.gather(self.labels, index)

    def part(self, is_held_out):
        chosen = self.tenth(is_held_out)
        names = self.names and [self.names[i] for i in chosen]
        return Memory(
            self.images.numpy()[chosen], self.labels.numpy()[chosen], names
        )

    def name(self, index):
        return self.names[index] if self.names else f"image {index}"

    def decoded(self, exif=True):
        return zip(self.images.numpy(), self.labels.numpy(), strict=True)


class Files(RandomAccess):
    """Encoded images, each in a file of its own."""

    has_exif = True

    def __init__(self, paths: Sequence[str], labels: Sequence[int]):
        with tf.device("CPU"):
            # As bytes: a name may have bytes that are not UTF-8.
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
    """The encoded images of a split of TFDS, which are read in order only.

    A start inside an epoch reads the records before it, and decodes none.
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
        """Decodes the split, whose images are all of one size."""
        whole = self._read(decodes=True).batch(self.size)
        try:
            return Memory(*next(whole.as_numpy_iterator()))
        except (tf.errors.InvalidArgumentError, tf.errors.DataLossError):
            for _ in self.decoded():  # raises an error that names the image
                pass
            raise

    def examples(self, seed, first, last, is_mine, divide=None):
        @tf.autograph.experimental.do_not_convert
        def shuffled(epoch):
            # tf.data mixes the seed of the surrounding graph into its own.
            # This graph's seed is fixed, so that only (seed, epoch) matters.
            # It is not 0: tf.data cannot compare (0, tensor) with (0, 0).
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
            divide(mine) if divide else mine,
            lambda position, example: (position, *example),
        )

    def _read(self, file_seed=None, decodes=False):
        """Reads the records, file by file in order, or in a seed's order."""
        image_key, label_key = self._keys
        decoder = self._tfds.decode.SkipDecoding()
        if decodes:
            decoder = _bounded_decoder(self._tfds)
        records = self._builder.as_dataset(
            split=self._split,
            shuffle_files=file_seed is not None,
            decoders={image_key: decoder},
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


def _bounded_decoder(tfds):
    """Returns TFDS's own decoder of an image, after `decoding.bounded`."""

    @tfds.decode.make_decoder()
    def decode(image, feature):
        return feature.decode_example(decoding.bounded(image))

    return decode()


def fits_memory(shape: Sequence[int | None], count: int) -> bool:
    """Returns whether images are small enough to be held in memory.

    Args:
        shape: `[height, width, channels]` of the images; None for sizes that
            differ.
        count: Number of images.
    """
    sides = [side for side in shape if side is not None]
    if len(sides) < len(shape):
        return False
    return max(sides[:2]) <= SMALL_SIDE and (
        count * math.prod(sides) <= _SMALL_BYTES
    )


def reason(error: Exception) -> str:
    """Returns an error's first line, without TensorFlow's own names."""
    lines = (getattr(error, "message", None) or str(error)).splitlines()
    if lines and lines[0].startswith("Graph execution error"):
        lines = [
            line for line in lines if "assertion failed: " in line
        ] or lines
        lines[0] = lines[0][max(lines[0].find("assertion failed: "), 0) :]
    text = re.sub(r"\{\{.*?\}\} ?", "", lines[0] if lines else "")
    text = re.sub(r"^Error in user-defined .* iterator: \S+: ", "", text)
    if text.startswith("assertion failed: "):
        text = re.sub(r"[][]", "", text.removeprefix("assertion failed: "))
    return text[:500]


def random_key(seed, purpose, index):
    """Returns the key of stateless random numbers, int64 `[2]`."""
    return tf.stack([tf.constant(3 * seed + purpose, tf.int64), index])


def _epoch_key(seed, epoch):
    """Returns the key of an epoch's order: 3 random integers of 64 bits."""
    key = random_key(seed, ORDER, epoch)
    return tf.random.stateless_uniform([3], key, None, None, tf.int64)


def map_in_order(
    dataset: tf.data.Dataset, function: Callable
) -> tf.data.Dataset:
    """Maps a data set in parallel and in order, without AutoGraph."""
    return dataset.map(
        tf.autograph.experimental.do_not_convert(function),
        num_parallel_calls=tf.data.AUTOTUNE,
        deterministic=True,
    )
