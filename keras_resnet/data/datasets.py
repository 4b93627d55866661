"""Images and labels: data sets, the papers' augmentation, test views.

A training batch is a pure function of (seed, step). The training images form
an endless sequence: position p is in epoch p // train_size, and each epoch is
a permutation of the images that (seed, epoch) decides. The batch of a step
has the positions step * batch_size ... (step + 1) * batch_size - 1, so that a
run can start at any step and share its batches among any number of workers.

Augmentation follows [1, Sec. 3.4 and 4.2] and [2]: see
`augmentation.AUGMENTATIONS`.
"""

import functools
import os
from collections.abc import Callable
from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from keras_resnet import atomic
from keras_resnet import names
from keras_resnet.data import augmentation as augmentations
from keras_resnet.data import sources
from keras_resnet.data import splits
from keras_resnet.data import views as views_lib

# What TensorFlow raises for an image that does not decode; it names none.
UNREADABLE = (
    tf.errors.InvalidArgumentError,
    tf.errors.DataLossError,
    tf.errors.NotFoundError,
    tf.errors.PermissionDeniedError,
)


class DataSet:
    """Images with labels: what a network is trained and tested on.

    Args:
        name: As given to `load`.
        labels: The names of the classes; a label is an index of this list.
        preprocessing: Test view and normalization; None for `make`'s.
        read: Gives the split "train" or "test"; called once for each, when
            it is needed.
        record: Gives what `record` returns.

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
        preprocessing: views_lib.Preprocessing,
        read: Callable[[str], splits.Split],
        record: Callable[[], dict] = dict,
    ):
        self.name = name
        self.labels = list(labels)
        self.preprocessing = preprocessing
        self._read = read
        self._record = record

    @functools.cached_property
    def record(self) -> dict:
        """Text and numbers that change if the images change.

        Of a folder: for each class the number of images and a digest of their
        names and sizes, and of their contents up to 1 GiB in all. Of a set of
        TensorFlow Datasets: its version, configuration and sizes.
        """
        return self._record()

    @functools.cached_property
    def _train(self) -> splits.Split:
        return self._read("train")

    @functools.cached_property
    def _test(self) -> splits.Split:
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
        row = augmentations.get_augmentation(augmentation)
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
        return _with_options(splits.map_in_order(views, finished))

    @property
    def has_photos(self) -> bool:
        """Whether the images have different sizes, and views are cropped."""
        return self.preprocessing.shorter_side is not None

    def test_batches(
        self, batch_size: int, protocol: str = "single"
    ) -> tf.data.Dataset:
        """Returns every test image once, in order.

        The last batch is smaller if `batch_size` does not divide `test_size`.
        `evaluate`, `predict` and `validation_data` of `fit` take the data set
        as it is.

        Args:
            batch_size: Number of images in a batch.
            protocol: The views of an image. `"single"`: its centre.
                `"ten_crop"`: the four corners and the centre, and their mirror
                images ([1, Sec. 3.4]; Krizhevsky et al. 2012).
                `"multi_scale"`: the whole image, its shorter side at 224, 256,
                384, 480 and 640 pixels, or in proportion for another
                `image_size` [1, Sec. 3.4]. The papers test photos so. For
                small images of one size, the crops are those of the normalized
                image with an eighth of its side of zeros on each side, and the
                scales are its enlargements.

        Returns:
            A data set of (images, labels). `images` is float32 `[batch, height,
            width, channels]`, for ten crops `[batch, 10, height, width,
            channels]`, for several scales a tuple with one tensor for each.
            `labels` is int32 `[batch]`. For several scales of photos, whose
            sizes differ, `batch` is 1.

        Raises:
            ValueError: If the protocol is unknown or `batch_size` is below 1.
        """
        if self.has_photos and protocol == "multi_scale" and batch_size > 1:
            batch_size = 1
        # One batch of all images; a larger one would only hold more filler.
        batch_size = min(batch_size, self.test_size)
        padded = self.padded_test_batches(batch_size, protocol=protocol)

        def whole(images, labels, counted):
            count = tf.reduce_sum(tf.cast(counted, tf.int32))
            return tf.nest.map_structure(
                lambda tensor: tensor[:count], (images, labels)
            )

        batches = splits.map_in_order(padded, whole)
        count = -(-self.test_size // batch_size)
        return _with_options(
            batches.apply(tf.data.experimental.assert_cardinality(count))
        )

    def padded_test_batches(
        self,
        batch_size: int,
        shard: tuple[int, int] = (0, 1),
        protocol: str = "single",
    ) -> tf.data.Dataset:
        """Returns the test images in batches of one size, with filler images.

        For `training.evaluation.Evaluator`, which shares each batch equally
        among devices. A Keras metric that ignores sample weights counts the
        filler: use `test_batches` with Keras.

        Args:
            batch_size: Images of all workers together in one batch.
            shard: As in `train_batches`.
            protocol: As in `test_batches`.

        Returns:
            A data set of (images, labels, counted). `images` and `labels` are
            those of `test_batches`, with `batch = batch_size / count`, or 1 for
            several scales of photos. `counted` is float32 `[batch]`: 1 for a
            test image, 0 for filler after the last one.

        Raises:
            ValueError: If the shard does not divide the batch or the protocol
                is unknown.
        """
        if protocol not in views_lib.PROTOCOLS:
            raise ValueError(
                names.unknown("protocol", protocol, views_lib.PROTOCOLS)
            )
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
                images = views_lib.padded_crops(images)
            elif not self.has_photos and protocol == "multi_scale":
                scales = views_lib.scaled(images.shape[1])
                images = tuple(
                    tf.image.resize(images, [scale, scale]) for scale in scales
                )
            return images, labels, tf.cast(counted, tf.float32)

        views = self._views(
            self._test, steps, batch_size, share, protocol=protocol
        )
        return _with_options(splits.map_in_order(views, finished))

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

        return DataSet(
            self.name, self.labels, self.preprocessing, read, self._record
        )

    def _one_by_one(self, batch_size, share, steps):
        """Batches of one photo each, at every scale."""

        def finished(position, image, label):
            is_counted = position < self.test_size
            views = tf.cond(
                is_counted,
                lambda: self.preprocessing.views(
                    views_lib.decode(image), "multi_scale"
                ),
                lambda: tuple(
                    tf.zeros(
                        [scale, scale, self.preprocessing.channels], "uint8"
                    )
                    for scale in views_lib.scaled(self.preprocessing.image_size)
                ),
            )
            views = tuple(self.preprocessing(view[None]) for view in views)
            return views, label[None], tf.cast(is_counted, "float32")[None]

        first, last = (step * batch_size for step in steps)
        examples = self._test.examples(
            None, first, last, _is_mine(batch_size, share)
        )
        return splits.map_in_order(examples, finished)

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
            isinstance(split, splits.Memory)
            and split.images.shape[1:] == self.image_shape
            and row is None
            and protocol == "single"
        ):
            # The whole share at once: a hundred times as fast as one by one.
            def gathered(step):
                positions = _positions(step, batch_size, share)
                return step, *split.get(split.index(positions, seed))

            return splits.map_in_order(tf.data.Dataset.range(*steps), gathered)

        def view(position, image, label):
            if seed is None:  # after the end, nothing is decoded
                count = [10] if protocol == "ten_crop" else []
                image = tf.cond(
                    position < split.size,
                    lambda: self.preprocessing.views(
                        views_lib.decode(image), protocol
                    ),
                    lambda: tf.zeros([*count, *self.image_shape], tf.uint8),
                )
            elif row is None:
                image = self.preprocessing.view(views_lib.decode(image))
            else:
                key = splits.random_key(seed, splits.WINDOW, position)
                image = augmentations.random_view(
                    self.preprocessing, row, image, key
                )
            return position // batch_size, image, label

        first, last = (step * batch_size for step in steps)
        is_mine = _is_mine(batch_size, share)
        views = splits.map_in_order(
            split.examples(seed, first, last, is_mine), view
        )
        return splits.map_in_order(
            views.batch(share[1] - share[0], drop_remainder=True),
            lambda step, images, labels: (step[0], images, labels),
        )

    def _augmented(self, row, images, draw):
        """What the network sees of a share of a training batch, float32."""
        images = self.preprocessing(images)
        height, width, channels = self.image_shape
        if row.pads:
            random = draw(tf.random.stateless_uniform)
            images = augmentations.pad_crop(
                images,
                augmentations.integer(random[:, 0], 2 * (height // 8) + 1),
                augmentations.integer(random[:, 1], 2 * (width // 8) + 1),
                (random[:, 2] < 0.5) & row.flips,
            )
        if row.shifts_colour and channels == 3:
            shift = augmentations.colour_shift(draw(tf.random.stateless_normal))
            if self.preprocessing.standard_deviation is not None:
                shift /= self.preprocessing.standard_deviation
            # As in Preprocessing, whole rows: [batch, 1, width, channels].
            images += tf.repeat(shift[:, None, None, :], width, axis=2)
        return images


def load(
    name: str,
    data_dir: str | os.PathLike | None = None,
    image_size: int | None = None,
    preprocessing: views_lib.Preprocessing | None = None,
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
        labels, read, shape, record = sources.digits()
    elif name == "synthetic":
        labels, read, shape, record = sources.synthetic(
            preprocessing.image_size if preprocessing else image_size or 32
        )
    elif kind == "folder":
        labels, read, shape, record = sources.folder(path)
    else:
        labels, read, shape, record = sources.tfds_set(name, data_dir)
    read = functools.cache(read)
    if preprocessing is None:
        preprocessing = _own_preprocessing(shape, image_size, read)
    return DataSet(name, labels, preprocessing, read, record)


def _own_preprocessing(shape, image_size, read):
    height, width, channels = shape
    is_fixed = None not in shape and max(height, width) <= sources.SMALL_SIDE
    size = image_size or (
        max(height, width) if is_fixed else views_lib.PHOTO_SIZE
    )
    train = read("train")
    if isinstance(train, splits.Memory):
        axis = 0 if (height, width) == (size, size) else (0, 1, 2)
        mean = train.images.numpy().mean(axis, np.float64) / 255
        return views_lib.Preprocessing(size, channels, None, mean)
    return views_lib.photo_preprocessing(size, channels, resizes_whole=is_fixed)


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
        atomic.write(path, tf.io.encode_png(image).numpy())
        paths.append(path)
    return paths


def _draw(seed, step, batch_size, share, distribution):
    """3 random numbers for each image of this worker's share of a batch."""
    start, stop = share
    key = splits.random_key(seed, splits.BATCH, step)
    return distribution([batch_size, 3], key)[start:stop]


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


def _with_options(batches: tf.data.Dataset) -> tf.data.Dataset:
    options = tf.data.Options()
    options.deterministic = True
    # The shares are given by `shard`; tf.distribute must not share once more.
    options.experimental_distribute.auto_shard_policy = (
        tf.data.experimental.AutoShardPolicy.OFF
    )
    return batches.prefetch(tf.data.AUTOTUNE).with_options(options)
