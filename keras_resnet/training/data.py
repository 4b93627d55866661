"""Images and labels: data sets, the papers' augmentation, test views.

A training batch is a pure function of (seed, step). The training images form
an endless sequence: position p is in epoch p // train_size, and each epoch is
a permutation of the images that (seed, epoch) decides. The batch of a step
has the positions step * batch_size ... (step + 1) * batch_size - 1, so that a
run can start at any step and share its batches among any number of workers.

Augmentation follows [1, Sec. 3.4 and 4.2] and [2]: see `AUGMENTATIONS`.
"""

import abc
import dataclasses
import difflib
import functools
import hashlib
import importlib.resources
import itertools
import json
import os
import ssl
import urllib.error
import urllib.request
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Sequence

import numpy as np
import tensorflow as tf

# A small image set has images of one size, at most so many pixels a side, and
# is held in memory; every other set is read and decoded as it is needed.
_SMALL_SIDE = 128
_SMALL_BYTES = 2**30

# Records in the shuffle buffer of a set that is too large for memory. TFDS
# wrote them in random order, and their files are shuffled too.
_SHUFFLE_BUFFER = 4096

# What is drawn at random, each from numbers of its own.
_ORDER, _WINDOW, _BATCH = range(3)

# Departure: [1, Sec. 3.4] subtracts a per-pixel mean from photos; here they
# have the mean and standard deviation of each channel, as in torchvision and
# fb.resnet.torch, so that weights can be exchanged and any size be tested.
_PHOTO_SIZE = 224
_PHOTO_SHORTER_SIDE = 256
_PHOTO_MEAN = (0.485, 0.456, 0.406)
_PHOTO_STANDARD_DEVIATION = (0.229, 0.224, 0.225)

# The principal components of the colours of ImageNet, [Krizhevsky et al. 2012,
# Sec. 4.1], for pixels of 0..1; the numbers are those of fb.resnet.torch.
_COLOUR_SIGMA = 0.1
_COLOUR_EIGENVALUES = (0.2175, 0.0188, 0.0045)
_COLOUR_EIGENVECTORS = (
    (-0.5675, 0.7192, 0.4009),
    (-0.5808, -0.0045, -0.8140),
    (-0.5836, -0.6948, 0.4203),
)

# What a network is shown of a test image: see `DataSet.test_batches`.
PROTOCOLS = ("single", "ten_crop", "multi_scale")

# Shorter sides of the multi-scale test, in pixels, of a network for 224 x 224
# [1, Sec. 3.4].
_SCALES = (224, 256, 384, 480, 640)

_IMAGE_FILES = (".jpg", ".jpeg", ".png", ".gif", ".bmp", ".webp")


@dataclasses.dataclass(frozen=True, eq=False)
class Preprocessing:
    """`(x / 255 - mean) / standard_deviation`, on one view of an image.

    It stands between an image and the network, in training, in evaluation and
    in the exported graph: TensorFlow operations only.

    Args:
        image_size: Height and width of the network's input, in pixels.
        channels: 3 for colour, 1 for grey.
        shorter_side: To how many pixels the shorter side of an image is
            resized before its centre is cropped. None: both sides are resized
            to `image_size`.
        mean: `[channels]` or `[image_size, image_size, channels]`, of pixels
            in 0..1.
        standard_deviation: `[channels]` or None.

    Raises:
        ValueError: If these do not fit together.

    >>> grey = Preprocessing(8, 1, None, mean=[0.2])
    >>> float(grey(tf.fill([1, 8, 8, 1], 51.0))[0, 0, 0, 0])
    0.0
    >>> Preprocessing.from_json(grey.to_json()).mean
    array([0.2], dtype=float32)
    """

    image_size: int
    channels: int
    shorter_side: int | None
    mean: np.ndarray
    standard_deviation: np.ndarray | None = None

    def __post_init__(self):
        for name in ("mean", "standard_deviation"):
            if getattr(self, name) is not None:
                value = np.array(getattr(self, name), np.float32)
                object.__setattr__(self, name, value)
        if self.channels not in (1, 3):
            raise ValueError(
                f"channels must be 1 or 3, received {self.channels}"
            )
        if self.image_size < 1:
            raise ValueError(
                f"image_size must be at least 1, received {self.image_size}"
            )
        if self.shorter_side and self.shorter_side < self.image_size:
            raise ValueError(
                f"shorter_side must be at least image_size ({self.image_size})"
                f", received {self.shorter_side}"
            )
        if self.mean.shape not in ((self.channels,), self.image_shape):
            raise ValueError(
                f"mean must have the shape {(self.channels,)} or "
                f"{self.image_shape}, received {self.mean.shape}"
            )
        deviation = self.standard_deviation
        if deviation is not None and not (
            deviation.shape == (self.channels,) and np.all(deviation > 0)
        ):
            raise ValueError(
                f"standard_deviation must be {self.channels} numbers above 0, "
                f"received {deviation.tolist()}"
            )

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """`(height, width, channels)` of the network's input."""
        return (self.image_size, self.image_size, self.channels)

    def __call__(self, images):
        """What the network sees of views.

        Args:
            images: `[..., image_size, image_size, channels]`, 0..255; of any
                size if there is no mean for each pixel.

        Returns:
            float32 tensor of the same shape.
        """
        images = tf.cast(images, tf.float32)
        width = images.shape[-2]

        def rows(numbers):
            # TensorFlow repeats 3 numbers four times as slowly as a whole row.
            if numbers.ndim == 3 or width is None:
                return numbers
            return np.broadcast_to(numbers, (width, self.channels))

        images = images / 255.0 - rows(self.mean)
        if self.standard_deviation is not None:
            images /= rows(self.standard_deviation)
        return images

    def view(self, image):
        """The single test view of an image.

        Args:
            image: uint8 `[height, width, c]`; c is 1 or 2 (grey, alpha) or 3
                or 4 (red, green, blue, alpha). Alpha is dropped.

        Returns:
            uint8 tensor `[image_size, image_size, channels]`.
        """
        image = tf.convert_to_tensor(image)
        size = self.image_size
        if self.shorter_side is None:
            view = _resize_to(image, size)
        else:
            view = _resized_centre(image, self.shorter_side, size)
        view = _with_channels(view, self.channels)
        return tf.ensure_shape(view, self.image_shape)

    def views(self, image, protocol: str):
        """The test views of a photo, of which `view` is the single one.

        Args:
            image: As in `view`; there is a `shorter_side`.
            protocol: One of `PROTOCOLS`.

        Returns:
            uint8: `"single"` `[image_size, image_size, channels]`,
            `"ten_crop"` `[10, image_size, image_size, channels]`,
            `"multi_scale"` one `[height, width, channels]` for each scale.
        """
        if protocol == "single":
            return self.view(image)
        image = _with_channels(tf.convert_to_tensor(image), self.channels)
        shape = tf.shape(image)[:2]

        def resized(shorter_side):
            sides = shorter_side * shape // tf.reduce_min(shape)
            view = _resize(image, sides)
            return tf.ensure_shape(view, [None, None, self.channels])

        if protocol == "multi_scale":
            return tuple(map(resized, _scaled(self.image_size)))
        return _ten_crops(resized(self.shorter_side), self.image_size)

    def decode(self, image_bytes):
        """The test view of an encoded image.

        Args:
            image_bytes: string scalar: JPEG, PNG (16 bits too), GIF (its
                first frame), BMP or WebP (no animation).

        Returns:
            uint8 tensor `[image_size, image_size, channels]`.
        """
        return self.view(_decode(image_bytes))

    def to_json(self) -> str:
        """One JSON object, from which `from_json` makes the same bits."""
        fields = {
            name: value.tolist() if isinstance(value, np.ndarray) else value
            for name, value in vars(self).items()
        }
        return json.dumps(fields)

    @classmethod
    def from_json(cls, text: str) -> "Preprocessing":
        """The inverse of `to_json`."""
        return cls(**json.loads(text))


# Augmentation


def scale_jitter(height, width, random):
    """The window of [1, Sec. 3.4]: a square of 224 / s of the shorter side.

    The papers resize the shorter side to s, an integer of 256 ... 480 drawn
    uniformly, and crop 224 x 224 anywhere. This is that crop in the pixels of
    the original, so that nothing outside of it need be decoded.

    Args:
        height: int32 scalar, of the original in pixels.
        width: The same.
        random: At least 3 uniform numbers of [0, 1).

    Returns:
        int32 `[4]`: top, left, height, width of the window.
    """
    shorter = tf.cast(tf.minimum(height, width), tf.float32)
    scale = 256.0 + tf.floor(random[0] * (480 - 256 + 1))
    side = tf.cast(tf.round(shorter * 224.0 / scale), tf.int32)
    side = tf.maximum(side, 1)
    return _placed(side, side, height, width, random[1:3])


def scale_aspect(height, width, random):
    """The window of scale and aspect ratio augmentation, as in [2].

    Its area is uniform in 8% ... 100% of the image, its aspect ratio in
    3/4 ... 4/3, or with the inverse of that; the first of ten draws that fits
    into the image is taken, else the largest square in the centre
    (RandomSizedCrop of fb.resnet.torch, which trained the ResNet-200 of [2]).

    Args:
        height: int32 scalar, of the original in pixels.
        width: The same.
        random: At least 32 uniform numbers of [0, 1).

    Returns:
        int32 `[4]`: top, left, height, width of the window.
    """
    area = tf.cast(height * width, tf.float32) * (0.08 + 0.92 * random[2:12])
    aspect = 3 / 4 + (4 / 3 - 3 / 4) * random[12:22]
    aspect = tf.where(random[22:32] < 0.5, aspect, 1.0 / aspect)
    heights = tf.cast(tf.round(tf.sqrt(area / aspect)), tf.int32)
    widths = tf.cast(tf.round(tf.sqrt(area * aspect)), tf.int32)
    heights, widths = tf.maximum(heights, 1), tf.maximum(widths, 1)
    fits = (heights <= height) & (widths <= width)
    first = tf.argmax(fits)
    shorter = tf.minimum(height, width)
    return tf.where(
        tf.reduce_any(fits),
        _placed(heights[first], widths[first], height, width, random[:2]),
        tf.stack(
            [(height - shorter) // 2, (width - shorter) // 2, shorter, shorter]
        ),
    )


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """What is drawn at random of a training image: a row of `AUGMENTATIONS`.

    Args:
        window: `(height, width, random) -> [top, left, height, width]`, what
            is decoded and resized to the network's input; None: the test view.
        pads: Whether it is then padded and cropped back at a random place.
        flips: Whether half of the images are mirrored.
        shifts_colour: Whether colours are shifted along the principal
            components of ImageNet's.
    """

    window: Callable | None = None
    pads: bool = False
    flips: bool = False
    shifts_colour: bool = False


AUGMENTATIONS = {
    # The test view.
    "none": Augmentation(),
    # The next without flips: for digits, letters and signs.
    "pad_crop": Augmentation(pads=True),
    # CIFAR, [1, Sec. 4.2]: the mean is subtracted, an eighth of the side of
    # zeros (4 pixels of 32) is added on each side, the size is cropped back.
    "pad_crop_flip": Augmentation(pads=True, flips=True),
    # ImageNet, [1, Sec. 3.4].
    "scale_jitter": Augmentation(scale_jitter, flips=True, shifts_colour=True),
    # ImageNet, [2], and most recipes since.
    "scale_aspect": Augmentation(scale_aspect, flips=True),
}


def pad_crop(images, top, left, is_flipped):
    """Zeros around images, cropped back to their size, perhaps mirrored.

    Args:
        images: `[batch, height, width, channels]`, the mean subtracted.
        top: int32 `[batch]` in 0 ... 2 * (height // 8), the row of the padded
            image where the crop begins; height // 8 is the image itself.
        left: The same of columns.
        is_flipped: bool `[batch]`.

    Returns:
        A tensor of the shape of `images`.
    """
    _, height, width, channels = images.shape
    above, beside = height // 8, width // 8
    padded = tf.pad(images, [[0, 0], [above] * 2, [beside] * 2, [0, 0]])
    padded_width = width + 2 * beside
    row = top[:, None] + tf.range(height)
    column = tf.range(width)
    column = tf.where(is_flipped[:, None], width - 1 - column, column)
    column += left[:, None]
    # One gather of whole pixels is the fastest of the ways that were measured
    # (52,000 images/s a core; ImageProjectiveTransform 33,000, slices 38,000).
    pixel = row[:, :, None] * padded_width + column[:, None, :]
    pixels = tf.reshape(
        padded, [-1, (height + 2 * above) * padded_width, channels]
    )
    return tf.gather(pixels, pixel, batch_dims=1)


def colour_shift(normal):
    """`E (alpha * eigenvalues)` with alpha = 0.1 `normal`, [1, Sec. 3.4].

    Args:
        normal: float32 `[batch, 3]`, standard normal numbers.

    Returns:
        float32 `[batch, 3]`: what is added to red, green and blue in 0..1.
    """
    scaled = _COLOUR_SIGMA * normal * tf.constant(_COLOUR_EIGENVALUES)
    return tf.matmul(
        scaled, tf.constant(_COLOUR_EIGENVECTORS), transpose_b=True
    )


# Where images come from


class _Split(abc.ABC):
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
    def part(self, is_held_out: bool) -> "_Split":
        """A tenth of the images, or the other nine tenths."""

    @abc.abstractmethod
    def name(self, index: int) -> str:
        """How a message names an image."""

    def decoded(self) -> Iterator[tuple[np.ndarray, int]]:
        """(image, label) of each image in order, as NumPy has them.

        Raises:
            ValueError: At the first image that does not decode; names it.
        """
        decoded = _map(
            self.stored(), lambda image, label: (_decode(image), label)
        )
        iterator = decoded.as_numpy_iterator()
        for index in range(self.size):
            try:
                yield next(iterator)
            except tf.errors.DataLossError as error:
                reason = str(error.message).splitlines()[0]
                raise ValueError(
                    f"the file of {self.name(index)} is damaged ({reason}); "
                    "delete the data set and prepare it again"
                ) from error
            except tf.errors.OpError as error:
                reason = str(error.message).splitlines()[0]
                raise ValueError(
                    f"{self.name(index)} does not decode; it must be a JPEG, "
                    f"PNG, GIF, BMP or WebP image ({reason})"
                ) from error


class _RandomAccess(_Split):
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
        return _map(
            tf.data.Dataset.range(first, last).filter(is_mine),
            lambda position: (position, *self.get(self.index(position, seed))),
        )

    def stored(self):
        return _map(tf.data.Dataset.range(self.size), self.get)


class _Memory(_RandomAccess):
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
        return _Memory(self.images.numpy()[chosen], self.labels.numpy()[chosen])

    def name(self, index):
        return f"image {index}"

    def decoded(self):
        return zip(self.images.numpy(), self.labels.numpy(), strict=True)


class _Files(_RandomAccess):
    """One encoded image a file."""

    def __init__(self, paths: Sequence[str], labels: Sequence[int]):
        with tf.device("CPU"):
            self.paths = tf.constant(paths)
            self.labels = tf.constant(labels, tf.int32)
        self.size = len(paths)

    def get(self, index):
        path = tf.gather(self.paths, index)
        return tf.io.read_file(path), tf.gather(self.labels, index)

    def part(self, is_held_out):
        chosen = self.tenth(is_held_out)
        return _Files(self.paths.numpy()[chosen], self.labels.numpy()[chosen])

    def name(self, index):
        return self.paths[index].numpy().decode()


class _Records(_Split):
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

    def in_memory(self) -> _Memory:
        """The split decoded, whose images are all of one size."""
        whole = self._read(decodes=True).batch(self.size)
        try:
            return _Memory(*next(whole.as_numpy_iterator()))
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
        return _map(mine, lambda position, example: (position, *example))

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
        return _map(
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
        return _Records(self._builder, f"{name}[{part}]", *self._keys)

    def name(self, index):
        return f"record {index} of {self._builder.name}/{self._split}"


class DataSet:
    """Images with labels: what a network is trained and tested on.

    Args:
        name: As given to `load`.
        labels: The names of the classes; a label is an index of this list.
        preprocessing: Test view and normalization; None for `make`'s.
        read: Gives the split "train" or "test"; called once for each, when
            it is needed.

    Attributes:
        name, labels, preprocessing: As above.

    >>> digits = load("digits")
    >>> digits.image_shape, digits.classes, digits.train_size, digits.test_size
    ((8, 8, 1), 10, 1442, 355)
    >>> images, labels = next(iter(digits.train_batches(128, seed=0)))
    >>> images.shape, labels.dtype
    (TensorShape([128, 8, 8, 1]), tf.int32)
    """

    def __init__(
        self,
        name: str,
        labels: Sequence[str],
        preprocessing: Preprocessing,
        read: Callable[[str], _Split],
    ):
        self.name = name
        self.labels = list(labels)
        self.preprocessing = preprocessing
        self._read = read

    @functools.cached_property
    def _train(self) -> _Split:
        return self._read("train")

    @functools.cached_property
    def _test(self) -> _Split:
        return self._read("test")

    @property
    def classes(self) -> int:
        """The number of classes."""
        return len(self.labels)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """`(height, width, channels)` of the network's input."""
        return self.preprocessing.image_shape

    @property
    def train_size(self) -> int:
        """The number of training images, so of positions in an epoch."""
        return self._train.size

    @property
    def test_size(self) -> int:
        """The number of test images."""
        return self._test.size

    def train_batches(
        self,
        batch_size: int,
        seed: int,
        first_step: int = 0,
        augmentation: str = "none",
        shard: tuple[int, int] = (0, 1),
    ) -> tf.data.Dataset:
        """Endless batches, each a pure function of (seed, step).

        Args:
            batch_size: Images of all workers together in one step.
            seed: Of the order of the images and of the augmentation.
            first_step: The step of the first batch.
            augmentation: A name of `AUGMENTATIONS`.
            shard: (index, count): this worker of how many; it gets its
                contiguous share of every batch.

        Returns:
            A data set of (images, labels): float32 `[batch_size / count,
            height, width, channels]` and int32 `[batch_size / count]`.

        Raises:
            ValueError: If the augmentation is unknown or the shard does not
                divide the batch.
        """
        if augmentation not in AUGMENTATIONS:
            raise ValueError(
                _unknown(
                    "augmentation",
                    augmentation,
                    AUGMENTATIONS,
                    ", ".join(AUGMENTATIONS),
                )
            )
        row = AUGMENTATIONS[augmentation]
        share = _share(batch_size, shard)

        def finished(step, images, labels):
            draw = functools.partial(_draw, seed, step, batch_size, share)
            return self._augmented(row, images, draw), labels

        views = self._views(
            self._train,
            (first_step, tf.int64.max // batch_size),
            batch_size,
            share,
            seed,
            row if row.window else None,
        )
        return _with_options(_map(views, finished))

    @property
    def has_photos(self) -> bool:
        """Whether the images have different sizes, and views are cropped."""
        return self.preprocessing.shorter_side is not None

    def test_batches(
        self,
        batch_size: int,
        shard: tuple[int, int] = (0, 1),
        protocol: str = "single",
    ) -> tf.data.Dataset:
        """Every test image once, in order, in batches of one size.

        Args:
            batch_size: Images of all workers together in one batch.
            shard: As in `train_batches`.
            protocol: What a network is shown of an image. `"single"`: its
                centre. `"ten_crop"`: the four corners and the centre, and
                their mirror images ([1, Sec. 3.4]; Krizhevsky et al. 2012).
                `"multi_scale"`: the whole image, its shorter side at 224, 256,
                384, 480 and 640 pixels, or in proportion for another
                `image_size` [1, Sec. 3.4]. The papers test photos so; for
                small images of one size, the crops are those of the
                normalized image with an eighth of its side of zeros on each
                side, and the scales are its enlargements.

        Returns:
            A data set of (images, labels, counted); images is float32
            `[batch, height, width, channels]`, for ten crops `[batch, 10,
            height, width, channels]`, for several scales a tuple with one
            tensor for each; counted is float32 `[batch]`: 1, and 0 for the
            images that only fill the last batch. `batch` is `batch_size /
            count`; for several scales of photos, whose sizes differ, it is 1.

        Raises:
            ValueError: If the shard does not divide the batch or the protocol
                is unknown.
        """
        if protocol not in PROTOCOLS:
            allowed = ", ".join(PROTOCOLS)
            raise ValueError(_unknown("protocol", protocol, PROTOCOLS, allowed))
        share = _share(batch_size, shard)
        size = self.test_size
        steps = (0, -(-size // batch_size))
        if self.has_photos and protocol == "multi_scale":
            batches = self._one_by_one(batch_size, share, steps)
            return _with_options(batches)

        def finished(step, images, labels):
            counted = _positions(step, batch_size, share) < size
            images = self.preprocessing(images)
            if not self.has_photos and protocol == "ten_crop":
                images = _padded_crops(images)
            elif not self.has_photos and protocol == "multi_scale":
                scales = _scaled(images.shape[1])
                images = tuple(
                    tf.image.resize(images, [scale, scale]) for scale in scales
                )
            return images, labels, tf.cast(counted, tf.float32)

        views = self._views(
            self._test, steps, batch_size, share, protocol=protocol
        )
        return _with_options(_map(views, finished))

    def with_validation(self) -> "DataSet":
        """The set whose test images are a tenth of its training images.

        For choices that the test images must not decide: [1, Sec. 4.2] splits
        CIFAR's 50,000 training images into 45,000 and 5,000 so. Of images in
        memory and in folders it is every tenth one of each class.

        >>> validation = load("digits").with_validation()
        >>> validation.train_size, validation.test_size
        (1302, 140)
        """

        @functools.cache
        def read(split):
            return self._train.part(is_held_out=split == "test")

        return DataSet(self.name, self.labels, self.preprocessing, read)

    def _one_by_one(self, batch_size, share, steps):
        """Batches of one photo each, at every scale."""

        def finished(position, image, label):
            is_counted = position < self.test_size
            views = tf.cond(
                is_counted,
                lambda: self.preprocessing.views(_decode(image), "multi_scale"),
                lambda: tuple(
                    tf.zeros(
                        [scale, scale, self.preprocessing.channels], "uint8"
                    )
                    for scale in _scaled(self.preprocessing.image_size)
                ),
            )
            views = tuple(self.preprocessing(view[None]) for view in views)
            return views, label[None], tf.cast(is_counted, "float32")[None]

        first, last = (step * batch_size for step in steps)
        examples = self._test.examples(
            None, first, last, _is_mine(batch_size, share)
        )
        return _map(examples, finished)

    def test_images(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """The first test images, as the network would see them, but uint8.

        Args:
            count: How many; fewer if there are not as many.

        Returns:
            uint8 `[count, height, width, channels]` and int32 `[count]`.
        """
        count = min(count, self.test_size)
        views = self._views(self._test, (0, 1), count, (0, count))
        _, images, labels = next(views.as_numpy_iterator())
        return images, labels

    def sample(
        self, count: int, training: bool = False
    ) -> tuple[np.ndarray, np.ndarray]:
        """Images drawn at random, each at most once; the same every time.

        Args:
            count: How many; fewer if there are not as many.
            training: Whether of the training images; else of the test images.

        Returns:
            What `test_images` returns; training images are not augmented.
        """
        split = self._train if training else self._test
        count = min(count, split.size)
        views = self._views(split, (0, 1), count, (0, count), seed=0)
        _, images, labels = next(views.as_numpy_iterator())
        return images, labels

    def check(self) -> None:
        """Decodes every image, to find one that does not.

        For a program whose batch failed with `tf.errors.InvalidArgumentError`
        or `DataLossError`, which cannot tell of which image.

        Raises:
            ValueError: Names the first image that does not decode.
        """
        for split in (self._train, self._test):
            for _ in split.decoded():
                pass

    def _views(
        self,
        split,
        steps,
        batch_size,
        share,
        seed=None,
        row=None,
        protocol="single",
    ):
        """(step, images, labels) of this worker's share, uint8."""
        if not self.has_photos:
            protocol = "single"
        if (
            isinstance(split, _Memory)
            and split.images.shape[1:] == self.image_shape
            and row is None
            and protocol == "single"
        ):
            # The whole share at once: a hundred times as fast as one by one.
            def gathered(step):
                positions = _positions(step, batch_size, share)
                return step, *split.get(split.index(positions, seed))

            return _map(tf.data.Dataset.range(*steps), gathered)

        def view(position, image, label):
            if seed is None:  # after the end, nothing is decoded
                count = [10] if protocol == "ten_crop" else []
                image = tf.cond(
                    position < split.size,
                    lambda: self.preprocessing.views(_decode(image), protocol),
                    lambda: tf.zeros([*count, *self.image_shape], tf.uint8),
                )
            elif row is None:
                image = self.preprocessing.view(_decode(image))
            else:
                key = _key(seed, _WINDOW, position)
                image = _random_view(self.preprocessing, row, image, key)
            return position // batch_size, image, label

        first, last = (step * batch_size for step in steps)
        is_mine = _is_mine(batch_size, share)
        views = _map(split.examples(seed, first, last, is_mine), view)
        return _map(
            views.batch(share[1] - share[0], drop_remainder=True),
            lambda step, images, labels: (step[0], images, labels),
        )

    def _augmented(self, row, images, draw):
        """What the network sees of a share of a training batch, float32."""
        images = self.preprocessing(images)
        height, width, channels = self.image_shape
        if row.pads:
            random = draw(tf.random.stateless_uniform)
            images = pad_crop(
                images,
                _integer(random[:, 0], 2 * (height // 8) + 1),
                _integer(random[:, 1], 2 * (width // 8) + 1),
                (random[:, 2] < 0.5) & row.flips,
            )
        if row.shifts_colour and channels == 3:
            shift = colour_shift(draw(tf.random.stateless_normal))
            if self.preprocessing.standard_deviation is not None:
                shift /= self.preprocessing.standard_deviation
            # As in Preprocessing, whole rows: [batch, 1, width, channels].
            images += tf.repeat(shift[:, None, None, :], width, axis=2)
        return images


def load(
    name: str,
    data_dir: str | os.PathLike | None = None,
    image_size: int | None = None,
    preprocessing: Preprocessing | None = None,
) -> DataSet:
    """The data set of a name.

    A set of small images (of one size, at most 128 pixels a side, at most
    1 GiB in all) is held in memory; the network sees the images as they are,
    and the mean of each pixel over the training images is subtracted. Of
    other sets the network sees 224 x 224 pixels from a shorter side of 256,
    normalized by the mean and standard deviation of ImageNet's channels.

    Args:
        name: `"digits"`, `"synthetic"`, `"folder:PATH"` with one folder a
            class (in PATH, or in PATH/train and PATH/test), or an image
            classification set of TensorFlow Datasets, such as `"cifar10"`.
            Where a set has no test images, a fifth of it is kept for test, by
            a fixed rule.
        data_dir: Where TensorFlow Datasets keeps its sets; None for its own
            default. What is not there is downloaded.
        image_size: Height and width of the network's input, in pixels; None
            for that of the data set.
        preprocessing: Instead of the data set's own: that of a trained
            network, which is to be tested on this set.

    Returns:
        A `DataSet`.

    Raises:
        ValueError: If the name is unknown, the set is not one for image
            classification, or an image does not decode.
        FileNotFoundError: If the set is not there and cannot be downloaded,
            or a folder holds no images.
    """
    if image_size is not None and preprocessing is not None:
        raise ValueError(
            "give image_size or preprocessing, not both: preprocessing has an "
            f"image_size of its own ({preprocessing.image_size})"
        )
    kind, _, path = name.partition(":")
    if name == "digits":
        labels, read, shape = _digits()
    elif name == "synthetic":
        labels, read, shape = _synthetic(
            preprocessing.image_size if preprocessing else image_size or 32
        )
    elif kind == "folder":
        labels, read, shape = _folder(path)
    else:
        labels, read, shape = _tfds(name, data_dir)
    read = functools.cache(read)
    if preprocessing is None:
        preprocessing = _own_preprocessing(shape, image_size, read)
    return DataSet(name, labels, preprocessing, read)


def write_examples(
    dataset: DataSet, directory: str | os.PathLike, count: int = 10
) -> list[str]:
    """Writes the first test images as PNG files, to try predictions on.

    Args:
        dataset: Whose.
        directory: Is made where there is none.
        count: How many.

    Returns:
        The paths, such as `directory/03_label_7.png`.
    """
    os.makedirs(directory, exist_ok=True)
    paths = []
    images, labels = dataset.test_images(count)
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        word = dataset.labels[label].replace(os.sep, "-")
        path = os.path.join(directory, f"{i:02d}_label_{word}.png")
        tf.io.write_file(f"{path}.part", tf.io.encode_png(image))
        os.replace(f"{path}.part", path)
        paths.append(path)
    return paths


# The sets: each gives its labels, its splits, and the shape [height, width,
# channels] of its images, with None for sizes that differ.


def _digits():
    file = importlib.resources.files(__package__) / "digits.npz"
    with file.open("rb") as opened, np.load(opened) as arrays:
        images, labels = arrays["images"], arrays["labels"]
    # 0 ... 16 pen strokes become 0 ... 255, rounded.
    images = np.round(images[..., None] * (255 / 16)).astype(np.uint8)
    # Every fifth image of each class, in their published order, is for test.
    nth = np.array([np.sum(labels[:i] == c) for i, c in enumerate(labels)])
    is_test = nth % 5 == 4

    def read(split):
        chosen = is_test if split == "test" else ~is_test
        return _Memory(images[chosen], labels[chosen])

    return [str(digit) for digit in range(10)], read, images.shape[1:]


def _synthetic(size):
    """Ten classes: 4 x 4 coloured squares each, half covered by noise."""

    def read(split):
        # RandomState's numbers never change between versions of NumPy.
        squares = np.random.RandomState(0).randint(0, 256, (10, 4, 4, 3))
        count, seed = {"train": (1000, 1), "test": (200, 2)}[split]
        labels = np.arange(count) % 10
        place = np.arange(size) * 4 // size
        squares = (squares // 2).astype(np.uint8)[:, place][:, :, place]
        images = np.random.RandomState(seed).randint(
            0, 128, (count, size, size, 3), np.uint8
        )
        images += squares[labels]
        return _Memory(images, labels)

    return [str(label) for label in range(10)], read, (size, size, 3)


def _folder(path):
    root = os.path.expanduser(path)
    if not os.path.isdir(root):
        raise FileNotFoundError(
            "folder:PATH must name a folder with one folder for each class; "
            f"{root!r} is none"
        )
    # A class may be called "train"; then its folder holds no folders.
    has_splits = bool(_folders(os.path.join(root, "train")))
    train_root = os.path.join(root, "train") if has_splits else root
    test_roots = [
        os.path.join(root, split)
        for split in ("test", "validation", "val")
        if has_splits and os.path.isdir(os.path.join(root, split))
    ]
    labels = _folders(train_root)
    if not labels:
        raise FileNotFoundError(
            f"{train_root} must have one folder with images for each class; it "
            "has no folder"
        )
    if len(labels) == 1:
        raise ValueError(
            f"{train_root} must have a folder for each of 2 classes or more, "
            f"it has only {labels[0]}"
        )
    train = [_image_files(os.path.join(train_root, word)) for word in labels]
    if test_roots:
        if _folders(test_roots[0]) != labels:
            raise ValueError(
                f"{test_roots[0]} must have the classes of {train_root}: "
                f"{', '.join(labels)}; it has "
                f"{', '.join(_folders(test_roots[0])) or 'none'}"
            )
        test = [_image_files(os.path.join(test_roots[0], w)) for w in labels]
    else:
        test = [_held_out(paths) for paths in train]
        train = [
            [path for path in paths if path not in held_out]
            for paths, held_out in zip(train, test, strict=True)
        ]
    if not any(test):
        raise ValueError(
            f"a class in {train_root} must have 2 images or more, one of them "
            "for test; every one has 1"
        )
    splits = {"train": _files(train), "test": _files(test)}
    small = _small_folder(**splits)
    if small is None:
        return labels, splits.__getitem__, (None, None, 3)
    return labels, small.__getitem__, small["train"].images.shape[1:]


def _held_out(paths):
    """A fifth, by a hash of their names: new files move few of the others."""
    count = max(len(paths) // 5, min(len(paths) - 1, 1))

    def rank(path):
        name = "/".join(path.split(os.sep)[-2:])
        return hashlib.sha256(name.encode()).digest()

    return sorted(sorted(paths, key=rank)[:count])


def _files(classes):
    """The split of a list of files for each class."""
    return _Files(
        [path for paths in classes for path in paths],
        [label for label, paths in enumerate(classes) for _ in paths],
    )


def _small_folder(train, test):
    """The splits in memory, or None if they are no set of small images."""
    images, labels = [], []
    total = train.size + test.size
    for image, label in itertools.chain(train.decoded(), test.decoded()):
        # Photos show it early: their first two images mostly differ in size.
        if not _is_small(image.shape, total) or (
            images and image.shape[:2] != images[0].shape[:2]
        ):
            return None
        images.append(image[..., : 3 if image.shape[-1] >= 3 else 1])
        labels.append(label)
    channels = max(image.shape[-1] for image in images)
    shape = (*images[0].shape[:2], channels)
    stacked = np.stack([np.broadcast_to(image, shape) for image in images])
    return {
        "train": _Memory(stacked[: train.size], labels[: train.size]),
        "test": _Memory(stacked[train.size :], labels[train.size :]),
    }


def _folders(path):
    if not os.path.isdir(path):
        return []
    with os.scandir(path) as entries:
        return sorted(
            entry.name
            for entry in entries
            if entry.is_dir() and not entry.name.startswith(".")
        )


def _image_files(path):
    names = sorted(
        name
        for name in os.listdir(path)
        if name.lower().endswith(_IMAGE_FILES) and not name.startswith(".")
    )
    if not names:
        raise FileNotFoundError(
            f"{path} must hold images ({', '.join(_IMAGE_FILES)}); it has none"
        )
    return [os.path.join(path, name) for name in names]


def _tfds(name, data_dir):
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder(name, data_dir=data_dir)
    except tfds.core.DatasetNotFoundError:
        names = tfds.list_builders(with_community_datasets=False)
        known = ["digits", "synthetic", "folder:PATH", *names]
        allowed = (
            "digits, synthetic, folder:PATH and the image classification sets "
            "of TensorFlow Datasets"
        )
        raise ValueError(_unknown("data set", name, known, allowed)) from None
    image_key, label_key = _image_and_label(name, builder, tfds)
    try:
        builder.as_dataset(split="train")
    except AssertionError:  # how TFDS says that it has not been prepared
        _download(name, builder)
    except ValueError as error:
        raise ValueError(
            f"the data set must have a split called train; {name} has "
            f"{', '.join(builder.info.splits)}"
        ) from error

    def records(split):
        return _Records(builder, split, image_key, label_key)

    splits = _tfds_splits(builder.info.splits, records)
    shape = builder.info.features[image_key].shape
    if shape[-1] is None:
        shape = (*shape[:2], 3)
    total = sum(split.size for split in splits.values())
    labels = builder.info.features[label_key].names

    def read(split):
        if _is_small(shape, total):
            return splits[split].in_memory()
        return splits[split]

    return labels, read, shape


def _image_and_label(name, builder, tfds):
    """The keys of the image and of the label in a record."""
    features = builder.info.features
    kinds = (tfds.features.Image, tfds.features.ClassLabel)
    keys = builder.info.supervised_keys
    if not keys:
        keys = [
            [key for key in features if isinstance(features[key], kind)]
            for kind in kinds
        ]
        keys = [found[0] for found in keys if len(found) == 1]
    if (
        len(keys) != 2
        or any(key not in features for key in keys)
        or not all(map(isinstance, map(features.__getitem__, keys), kinds))
        or features[keys[0]].np_dtype != np.uint8
    ):
        raise ValueError(
            f"the data set must be one for image classification: a record must "
            f"have an image of 8 bits and a label; {name} has "
            f"{', '.join(features)}"
        )
    return keys


def _tfds_splits(names, records):
    train = records("train")
    # Under tfds.testing.mock_data a builder does not know its splits.
    for split in ("test", "validation"):
        if not names or split in names:
            test = records(split)
            _, label = next(test.stored().take(1).as_numpy_iterator())
            if label >= 0:  # ImageNet's test labels are -1: unpublished
                return {"train": train, "test": test}
    return {"train": records("train[:80%]"), "test": records("train[80%:]")}


def _download(name, builder):
    urls = [url for url in builder.url_infos or () if url.startswith("http")]
    try:
        # Where there is no network, TFDS would try for minutes and leave
        # folders behind.
        if urls:
            _reach(urls[0])
        builder.download_and_prepare()
    except Exception as error:
        raise FileNotFoundError(
            f"the data set {name} is not in {builder.data_dir} and could not "
            f"be downloaded ({' '.join(str(error).split())}); where there is a "
            f"network, prepare it by `tfds build {name} --data_dir=DIR`, then "
            "pass --data_dir=DIR"
        ) from error


def _reach(url):
    try:
        urllib.request.urlopen(url, timeout=20).close()
    except urllib.error.URLError as error:
        # Any answer will do, also one that is an error or is not trusted.
        if isinstance(error.reason, OSError) and not isinstance(
            error.reason, ssl.SSLError
        ):
            raise


def _is_small(shape, count):
    """Whether images of a shape are held in memory and used as they are."""
    return (
        None not in shape
        and max(shape[:2]) <= _SMALL_SIDE
        and count * np.prod(shape, dtype=np.int64) <= _SMALL_BYTES
    )


def _own_preprocessing(shape, image_size, read):
    height, width, channels = shape
    is_fixed = None not in shape and max(height, width) <= _SMALL_SIDE
    size = image_size or (max(height, width) if is_fixed else _PHOTO_SIZE)
    train = read("train")
    if isinstance(train, _Memory):
        axis = 0 if (height, width) == (size, size) else (0, 1, 2)
        mean = train.images.numpy().mean(axis, np.float64) / 255
        return Preprocessing(size, channels, None, mean)
    return photo_preprocessing(size, channels, resizes_whole=is_fixed)


def photo_preprocessing(
    image_size: int, channels: int = 3, resizes_whole: bool = False
) -> Preprocessing:
    """That of photos, with the mean and standard deviation of ImageNet.

    Args:
        image_size: Height and width of the network's input.
        channels: 3 for colour, 1 for grey.
        resizes_whole: Whether an image is resized whole; else its shorter side
            is resized to 8/7 of `image_size` (256 to 224), and its centre
            taken.
    """
    mean, deviation = map(np.array, (_PHOTO_MEAN, _PHOTO_STANDARD_DEVIATION))
    if channels == 1:
        mean, deviation = (np.mean(a, keepdims=True) for a in (mean, deviation))
    shorter_side = round(image_size * _PHOTO_SHORTER_SIDE / _PHOTO_SIZE)
    return Preprocessing(
        image_size,
        channels,
        None if resizes_whole else shorter_side,
        mean,
        deviation,
    )


# TensorFlow operations on one image


def _decode(image):
    """uint8 `[height, width, c]` with the channels that the image has.

    What is decoded already stays as it is.
    """
    if image.dtype == tf.uint8:
        return image
    head = tf.io.decode_raw(image, tf.uint8, fixed_length=32)

    def has(text, at):
        return tf.reduce_all(head[at : at + len(text)] == list(text))

    # TensorFlow 2.21 finds the channels of PNG, JPEG, GIF and BMP itself
    # (channels=0). Of WebP it wants them said, 3 or 4; left to find them, it
    # writes beyond its memory where an animation has no alpha.
    is_webp = has(b"RIFF", 0) & has(b"WEBP", 8)
    flags = tf.where(has(b"VP8X", 12), head[20], tf.constant(0, tf.uint8))
    flags = tf.where(has(b"VP8L", 12), head[24], flags)
    has_alpha = tf.bitwise.bitwise_and(flags, 16) > 0
    has_palette = has(b"BM", 0) & (head[28] == 8) & (head[29] == 0)
    kind = tf.where(is_webp, tf.where(has_alpha, 2, 1), 0)
    decode = functools.partial(tf.io.decode_image, expand_animations=False)
    return tf.switch_case(
        tf.where(has_palette, 3, kind),
        [
            *(functools.partial(decode, image, c) for c in (0, 3, 4)),
            lambda: _in_colours(decode(image), image),
        ],
    )


def _in_colours(numbers, image):
    """A BMP of 8 bits a pixel, of which TensorFlow gives colours by number."""
    colours = tf.strings.substr(tf.strings.join([image, "\0" * 2048]), 14, 1200)
    data = tf.io.decode_raw(colours, tf.uint8)
    header_bytes = tf.cast(data[0], tf.int32)
    table = tf.reshape(data[header_bytes:][:1024], [256, 4])
    return tf.gather(table[:, 2::-1], tf.cast(numbers[..., 0], tf.int32))


def _decode_window(image, choose, channels):
    """The window that `choose(height, width)` names of an image.

    Of a JPEG, only the window is decoded, to so many channels.
    """

    def of_jpeg():
        shape = tf.image.extract_jpeg_shape(image)
        window = choose(shape[0], shape[1])
        return tf.image.decode_and_crop_jpeg(image, window, channels)

    def of_any():
        decoded = _decode(image)
        shape = tf.shape(decoded)
        top, left, height, width = tf.unstack(choose(shape[0], shape[1]))
        decoded = decoded[top : top + height, left : left + width]
        return _with_channels(decoded, channels)

    if image.dtype == tf.uint8:
        return of_any()
    return tf.cond(tf.io.is_jpeg(image), of_jpeg, of_any)


def _random_view(preprocessing, row, image, key):
    """uint8 `[image_size, image_size, channels]`: a random window, resized."""
    random = tf.random.stateless_uniform([33], key)
    image = _decode_window(
        image,
        lambda height, width: row.window(height, width, random[1:]),
        preprocessing.channels,
    )
    size = preprocessing.image_size
    # Down to a half, bilinear resizing reads every pixel as it is, in a
    # quarter of the time that antialiasing takes.
    image = tf.cond(
        tf.reduce_max(tf.shape(image)) <= 2 * size,
        lambda: _resize(image, [size, size], antialias=False),
        lambda: _resize(image, [size, size]),
    )
    if row.flips:
        # A slice with a negative stride takes six times as long.
        image = tf.cond(
            random[0] < 0.5, lambda: tf.reverse(image, [1]), lambda: image
        )
    return tf.ensure_shape(image, preprocessing.image_shape)


def _with_channels(image, channels):
    """Alpha is dropped; grey is repeated, colour is weighed to grey."""
    if image.shape[-1] == channels:
        return image
    colours = tf.where(tf.shape(image)[-1] >= 3, 3, 1)
    image = image[..., :colours]
    if channels == 3:
        return tf.tile(image, [1, 1, 3 // colours])
    return tf.cond(
        colours == 3,
        lambda: tf.image.rgb_to_grayscale(
            tf.ensure_shape(image, [None, None, 3])
        ),
        lambda: image,
    )


def _resize(image, sides, antialias=True):
    """uint8; bilinear with antialiasing, as Pillow and torchvision resize."""
    return _rounded(tf.image.resize(image, sides, antialias=antialias))


def _rounded(image):
    return tf.cast(image + 0.5, tf.uint8)  # rounds: nothing is negative


def _resize_to(image, size):
    """`[size, size, c]`, in memory that a long side does not multiply.

    TensorFlow resizes the height first, into floats of the whole width.
    """
    height, width = tf.unstack(tf.shape(image, tf.int64)[:2])

    def of_transposed():
        turned = tf.transpose(image, [1, 0, 2])
        return tf.transpose(_resize(turned, [size, size]), [1, 0, 2])

    return tf.cond(
        width > 16 * height, of_transposed, lambda: _resize(image, [size, size])
    )


def _resized_centre(image, shorter_side, size):
    """The centre, `[size, size, c]`, of the image with that shorter side.

    The same as resizing and then cropping, but only what the centre is made
    of is resized: a strip of 4 x 2,000,000 pixels would need gigabytes.
    """
    sides = tf.shape(image, tf.int64)[:2]
    resized = shorter_side * sides // tf.reduce_min(sides)
    scale = tf.cast(resized, tf.float64) / tf.cast(sides, tf.float64)
    start = (resized - size) // 2
    # A pixel is made of those within one pixel, of the larger of the images.
    reach = tf.maximum(1.0 / scale, 1.0) + 1.0
    first = tf.maximum(
        tf.cast(tf.cast(start, tf.float64) / scale - reach, tf.int64), 0
    )
    last = tf.cast(tf.cast(start + size, tf.float64) / scale + reach, tf.int64)
    window = image[first[0] : last[0], first[1] : last[1]]
    before = tf.cast(first, tf.float64) * scale - tf.cast(start, tf.float64)
    view = tf.raw_ops.ScaleAndTranslate(
        images=window[None],
        size=[size, size],
        scale=tf.cast(scale, tf.float32),
        translation=tf.cast(before, tf.float32),
        kernel_type="triangle",
        antialias=True,
    )
    return _rounded(view[0])


def _scaled(image_size):
    """The shorter sides of the multi-scale test of a network."""
    return [round(image_size * scale / _SCALES[0]) for scale in _SCALES]


def _ten_crops(image, size):
    """`[..., h, w, c]` to `[..., 10, size, size, c]`.

    The four corners and the centre, then their mirror images.
    """
    height, width = tf.unstack(tf.shape(image)[-3:-1])
    bottom, right = height - size, width - size
    places = [
        (0, 0),
        (0, right),
        (bottom, 0),
        (bottom, right),
        (bottom // 2, right // 2),
    ]
    crops = [
        image[..., top : top + size, left : left + size, :]
        for top, left in places
    ]
    crops = tf.stack(crops, axis=-4)
    crops = tf.concat([crops, crops[..., ::-1, :]], axis=-4)
    shape = [*image.shape[:-3], 10, size, size, image.shape[-1]]
    return tf.ensure_shape(crops, shape)


def _padded_crops(images):
    """The ten crops of `[batch, size, size, c]` with zeros around it."""
    size = images.shape[1]
    around = [size // 8] * 2
    return _ten_crops(tf.pad(images, [[0, 0], around, around, [0, 0]]), size)


# Positions, shares and random numbers


def _key(seed, purpose, index):
    """The key of stateless random numbers, int64 `[2]`."""
    return tf.stack([tf.constant(3 * seed + purpose, tf.int64), index])


def _epoch_key(seed, epoch):
    """What decides the order of an epoch: 3 integers of 64 random bits."""
    key = _key(seed, _ORDER, epoch)
    return tf.random.stateless_uniform([3], key, None, None, tf.int64)


def _draw(seed, step, batch_size, share, distribution):
    """3 random numbers for each image of this worker's share of a batch."""
    start, stop = share
    key = _key(seed, _BATCH, step)
    return distribution([batch_size, 3], key)[start:stop]


def _integer(random, count):
    """Integers of 0 ... count - 1 from uniform numbers of [0, 1)."""
    return tf.cast(random * tf.cast(count, tf.float32), tf.int32)


def _placed(height, width, full_height, full_width, random):
    """A window of a size anywhere in the image: int32 `[4]`."""
    top = _integer(random[0], full_height - height + 1)
    left = _integer(random[1], full_width - width + 1)
    return tf.stack([top, left, height, width])


def _positions(step, batch_size, share):
    return step * batch_size + tf.range(*share, dtype=tf.int64)


def _is_mine(batch_size, share):
    """Whether a position is in a worker's share of its batch, as a function."""
    start, stop = share

    def is_mine(position):
        place = position % batch_size
        return (start <= place) & (place < stop)

    return is_mine


def _share(batch_size, shard):
    """(start, stop) in a batch of the images of a worker."""
    index, count = shard
    if batch_size < 1:
        raise ValueError(
            f"batch_size must be at least 1, received {batch_size}"
        )
    if not 0 <= index < count or batch_size % count:
        raise ValueError(
            "shard must be (index, count) with 0 <= index < count, and count "
            f"must divide batch_size ({batch_size}); received {shard}"
        )
    size = batch_size // count
    return index * size, (index + 1) * size


def _map(dataset: tf.data.Dataset, function: Callable) -> tf.data.Dataset:
    """`dataset.map`, in parallel and in order, traced as it is written."""
    return dataset.map(
        tf.autograph.experimental.do_not_convert(function),
        num_parallel_calls=tf.data.AUTOTUNE,
        deterministic=True,
    )


def _with_options(batches: tf.data.Dataset) -> tf.data.Dataset:
    options = tf.data.Options()
    options.deterministic = True
    # The shares are given by `shard`; tf.distribute must not share once more.
    options.experimental_distribute.auto_shard_policy = (
        tf.data.experimental.AutoShardPolicy.OFF
    )
    return batches.prefetch(tf.data.AUTOTUNE).with_options(options)


def _unknown(what: str, name: str, known: Iterable[str], allowed: str) -> str:
    near = difflib.get_close_matches(name, list(known))
    hint = f"; did you mean {' or '.join(near)}?" if near else ";"
    return f"unknown {what} {name!r}{hint} allowed: {allowed}"
