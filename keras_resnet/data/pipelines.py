"""From a split to batches, in steps.

    1. source     (position, stored image, label)  `Split.examples`
    2. decode     within the bounds of `limits`    `_training_view`,
    3. view       window or crop, uint8            `_test_view`
    4. batch      (step, images, labels)           `_streamed`
    5. normalize  float32, and augment             `_augmented`,
                                                   `_protocol_views`

The images of a split in memory may have the network's size already. They are
gathered a batch at a time, a hundred times as fast as one by one:

    1. gather     (step, images, labels)           `_gathered`
    2. normalize  float32, and augment             as above
"""

import dataclasses
import functools
from collections.abc import Callable

import tensorflow as tf

from keras_resnet.data import augmentation as augmentations
from keras_resnet.data import decoding
from keras_resnet.data import splits
from keras_resnet.data import views


@dataclasses.dataclass(frozen=True)
class Share:
    """The images of one worker in every batch.

    Args:
        batch_size: Number of images of all workers together in a batch.
        start: Place of the worker's first image in the batch.
        stop: Place after its last image.

    >>> Share.of_shard(12, (1, 3))
    Share(batch_size=12, start=4, stop=8)
    """

    batch_size: int
    start: int
    stop: int

    @classmethod
    def of_shard(cls, batch_size: int, shard: tuple[int, int]) -> "Share":
        """Returns the share of a worker.

        Args:
            batch_size: Number of images of all workers together in a batch.
            shard: (index, count): the worker's index and the number of
                workers.

        Raises:
            ValueError: If the batch is empty or `count` does not divide it.
        """
        index, count = shard
        if batch_size < 1:
            raise ValueError(
                f"batch_size must be at least 1, received {batch_size}"
            )
        if not 0 <= index < count or batch_size % count:
            raise ValueError(
                "shard must be (index, count) with 0 <= index < count, and "
                f"count must divide batch_size ({batch_size}); received {shard}"
            )
        size = batch_size // count
        return cls(batch_size, index * size, (index + 1) * size)

    @property
    def size(self) -> int:
        """Number of images in the share."""
        return self.stop - self.start

    def positions(self, step):
        """Returns the positions of the share in the batch of a step."""
        places = tf.range(self.start, self.stop, dtype=tf.int64)
        return step * self.batch_size + places

    def sources(self, step, repeats):
        """Returns the positions of the images of the share's views.

        With `repeats` views of an image, the batch has `batch_size / repeats`
        images, rounded up. The views of one image are as far apart.
        """
        images = -(-self.batch_size // repeats)
        places = tf.range(self.start, self.stop, dtype=tf.int64)
        return step * images + places % images

    def has(self, position):
        """Returns whether a position belongs to the share."""
        place = position % self.batch_size
        return (self.start <= place) & (place < self.stop)


def train_batches(
    split: splits.Split,
    preprocessing: views.Preprocessing,
    augmentation: augmentations.Augmentation,
    share: Share,
    seed: int,
    first_step: int = 0,
) -> tf.data.Dataset:
    """Returns the endless training batches of a worker.

    Args:
        split: The training images.
        preprocessing: Normalization, and the view of an image without window.
        augmentation: The random changes of the images.
        share: The worker's share of each batch.
        seed: Of the order of the images and of the augmentation.
        first_step: Step of the first batch.

    Returns:
        A data set of (float32 images, int32 labels). With mixed images, the
        labels are those of `augmentation.mix`.

    Raises:
        ValueError: If images are mixed in pairs and the share is odd.
    """
    numbered = numbered_batches(
        split, preprocessing, augmentation, share, seed, first_step
    )
    return with_options(
        splits.map_in_order(numbered, lambda step, *batch: batch)
    )


def numbered_batches(
    split: splits.Split,
    preprocessing: views.Preprocessing,
    augmentation: augmentations.Augmentation,
    share: Share,
    seed: int,
    first_step: int = 0,
    divide: Callable | None = None,
) -> tf.data.Dataset:
    """Returns the batches of `train_batches`, each with its step.

    Args:
        split: The training images.
        preprocessing: As for `train_batches`.
        augmentation: As for `train_batches`.
        share: The worker's share of each batch.
        seed: As for `train_batches`.
        first_step: Step of the first batch.
        divide: `divide(elements, step_of)` returns some elements of a data
            set with one for each step, which is `step_of(element)`. None for
            all. Images must come from files.

    Returns:
        A data set of (int64 step, images, labels).
    """
    if augmentation.mixes and share.size % 2:
        raise ValueError(
            "mixup and CutMix mix pairs of images, so each worker must have "
            f"an even number of them, received {share.size}"
        )
    if augmentation.train_image_size not in (None, preprocessing.image_size):
        preprocessing = preprocessing.of_size(augmentation.train_image_size)
    steps = (first_step, tf.int64.max // share.batch_size)
    repeats = augmentation.repeats
    if not augmentation.changes_single_images and _holds_views(
        split, preprocessing
    ):
        batches = _gathered(split, share, steps, seed, repeats)
    else:
        view = _training_view(split, preprocessing, augmentation, seed)
        batches = _streamed(split, share, steps, seed, view, repeats, divide)

    def normalized(step, images, labels):
        draw = functools.partial(_draw, seed, step, share)
        images = _augmented(images, preprocessing, augmentation, draw)
        if augmentation.mixes:
            key = splits.random_key(seed, splits.BATCH, step)
            mixed = augmentations.mix(augmentation, images, labels, key)
            return step, *mixed
        return step, images, labels

    return splits.map_in_order(batches, normalized)


def test_batches(
    split: splits.Split,
    preprocessing: views.Preprocessing,
    share: Share,
    protocol: str = "single",
) -> tf.data.Dataset:
    """Returns the test batches of a worker, all of one size.

    Args:
        split: The test images.
        preprocessing: Views and normalization.
        share: The worker's share of each batch.
        protocol: One of `PROTOCOLS`.

    Returns:
        A data set of (views, labels, counted). `counted` is 1 for a test image
        and 0 for filler after the last one.
    """
    steps = (0, -(-split.size // share.batch_size))
    if preprocessing.is_cropped and protocol == "multi_scale":
        return with_options(_photo_scales(split, preprocessing, share, steps))
    batches = _test_views(split, preprocessing, share, steps, protocol)

    def normalized(step, images, labels):
        counted = share.positions(step) < split.size
        images = _protocol_views(images, preprocessing, protocol)
        return images, labels, tf.cast(counted, tf.float32)

    return with_options(splits.map_in_order(batches, normalized))


def without_filler(batches: tf.data.Dataset, count: int) -> tf.data.Dataset:
    """Returns the batches of `test_batches` without their filler images.

    Args:
        batches: A data set of (views, labels, counted).
        count: Number of batches.

    Returns:
        A data set of (views, labels).
    """

    def whole(images, labels, counted):
        size = tf.reduce_sum(tf.cast(counted, tf.int32))
        return tf.nest.map_structure(
            lambda tensor: tensor[:size], (images, labels)
        )

    whole_batches = splits.map_in_order(batches, whole)
    return with_options(
        whole_batches.apply(tf.data.experimental.assert_cardinality(count))
    )


def first_views(
    split: splits.Split,
    preprocessing: views.Preprocessing,
    count: int,
    seed: int | None = None,
):
    """Returns single views of images, before normalization.

    Args:
        split: The images.
        preprocessing: The view.
        count: Number of images, at most the split's size.
        seed: Of the order in which images are taken; None for their own.

    Returns:
        uint8 images and int32 labels, NumPy arrays.
    """
    share = Share(count, 0, count)
    if seed is None:
        batches = _test_views(split, preprocessing, share, (0, 1))
    elif _holds_views(split, preprocessing):
        batches = _gathered(split, share, (0, 1), seed)
    else:
        row = augmentations.Augmentation()
        view = _training_view(split, preprocessing, row, seed)
        batches = _streamed(split, share, (0, 1), seed, view)
    _, images, labels = next(batches.as_numpy_iterator())
    return images, labels


def _holds_views(split, preprocessing):
    """Returns whether the split's images are the network's views already."""
    return (
        isinstance(split, splits.Memory)
        and split.images.shape[1:] == preprocessing.image_shape
    )


def _gathered(split, share, steps, seed, repeats=1):
    """Gathers the images of a share from memory, all at once."""

    def gathered(step):
        index = split.index(share.sources(step, repeats), seed)
        return step, *split.get(index)

    return splits.map_in_order(tf.data.Dataset.range(*steps), gathered)


def _streamed(split, share, steps, seed, view, repeats=1, divide=None):
    """Reads the images of a share one by one, and batches their views.

    `view(position, image)` is the uint8 view of a stored image, and `divide`
    the function of `numbered_batches`.
    """

    def viewed(position, image, label):
        return position // share.batch_size, view(position, image), label

    if repeats > 1:
        examples = _repeated(split, share, steps, seed, repeats, divide)
    else:
        first, last = (step * share.batch_size for step in steps)
        examples = split.examples(
            seed,
            first,
            last,
            share.has,
            _by_steps(divide, share.size, share.batch_size),
        )
    batches = splits.map_in_order(examples, viewed).batch(
        share.size, drop_remainder=True
    )
    return splits.map_in_order(
        batches, lambda step, images, labels: (step[0], images, labels)
    )


def _by_steps(divide, count, whole):
    """Returns `divide` for a data set with `count` elements for each step.

    The first is the position of an image, of `whole` for each step.
    """
    if divide is None:
        return None

    def step_of(*element):
        positions, *_ = tf.nest.flatten(element)
        return positions[0] // whole

    return lambda elements: divide(elements.batch(count), step_of).unbatch()


def _repeated(split, share, steps, seed, repeats, divide):
    """Returns (position of a view, stored image, label) of a share.

    Each worker reads all images of a batch, and decodes only its views.
    """
    count = -(-share.batch_size // repeats)
    first, last = (step * count for step in steps)

    @tf.autograph.experimental.do_not_convert
    def of_batch(positions, images, labels):
        step = positions[0] // count
        index = share.sources(step, repeats) - step * count
        return tf.data.Dataset.from_tensor_slices(
            (
                share.positions(step),
                tf.gather(images, index),
                tf.gather(labels, index),
            )
        )

    examples = split.examples(
        seed,
        first,
        last,
        lambda position: position >= 0,
        _by_steps(divide, count, count),
    )
    return examples.batch(count, drop_remainder=True).flat_map(of_batch)


def _test_views(split, preprocessing, share, steps, protocol="single"):
    """Returns (step, images, labels) of test images, in their order."""
    if not preprocessing.is_cropped:
        protocol = "single"  # small images: see `_protocol_views`
    if protocol == "single" and _holds_views(split, preprocessing):
        return _gathered(split, share, steps, seed=None)
    view = _test_view(split, preprocessing, protocol)
    return _streamed(split, share, steps, None, view)


def _training_view(split, preprocessing, augmentation, seed):
    """Returns a function from (position, stored image) to a training view."""
    exif = split.has_exif and preprocessing.exif

    def view(position, image):
        image = decoding.bounded(image)
        key = splits.random_key(seed, splits.WINDOW, position)
        if augmentation.crop.window is None:
            seen = preprocessing.view(decoding.decode(image, exif))
        else:
            seen = augmentations.random_view(
                preprocessing, augmentation.crop, image, key, exif
            )
        return augmentations.changed_view(augmentation, seen, key)

    return view


def _test_view(split, preprocessing, protocol):
    """Returns a function from (position, stored image) to its test views.

    Positions from the split's size on are filler; for these nothing is decoded.
    """
    count = [10] if protocol == "ten_crop" else []
    shape = [*count, *preprocessing.image_shape]

    def view(position, image):
        return tf.cond(
            position < split.size,
            lambda: preprocessing.views(
                _decoded(split, preprocessing, image), protocol
            ),
            lambda: tf.zeros(shape, tf.uint8),
        )

    return view


def _decoded(split, preprocessing, image):
    """Decodes a stored image within the bounds of `limits`."""
    exif = split.has_exif and preprocessing.exif
    return decoding.decode(decoding.bounded(image), exif)


def _photo_scales(split, preprocessing, share, steps):
    """Returns batches of one photo each, at every scale of the test."""
    zeros = [
        [scale, scale, preprocessing.channels]
        for scale in views.scaled(preprocessing.image_size)
    ]

    def scales(position, image, label):
        is_counted = position < split.size
        found = tf.cond(
            is_counted,
            lambda: preprocessing.views(
                _decoded(split, preprocessing, image), "multi_scale"
            ),
            lambda: tuple(tf.zeros(shape, tf.uint8) for shape in zeros),
        )
        found = tuple(preprocessing(view[None]) for view in found)
        return found, label[None], tf.cast(is_counted, tf.float32)[None]

    first, last = (step * share.batch_size for step in steps)
    return splits.map_in_order(
        split.examples(None, first, last, share.has), scales
    )


def _protocol_views(images, preprocessing, protocol):
    """Normalizes test views; of small images, makes the protocol's views."""
    images = preprocessing(images)
    if preprocessing.is_cropped or protocol == "single":
        return images
    if protocol == "ten_crop":
        return views.padded_crops(images)
    scales = views.scaled(images.shape[1])
    return tuple(tf.image.resize(images, [scale, scale]) for scale in scales)


def _augmented(images, preprocessing, augmentation, draw):
    """Normalizes training views, and augments them as a batch.

    `draw(distribution)` returns 3 random numbers for each image,
    `draw(distribution, count, number)` as many of another sequence.
    """
    images = preprocessing(images)
    height, width, channels = preprocessing.image_shape
    if augmentation.crop.pads:
        random = draw(tf.random.stateless_uniform)
        images = augmentations.pad_crop(
            images,
            augmentations.integer(random[:, 0], 2 * (height // 8) + 1),
            augmentations.integer(random[:, 1], 2 * (width // 8) + 1),
            (random[:, 2] < 0.5) & augmentation.crop.flips,
        )
    if augmentation.crop.shifts_colour and channels == 3:
        shift = augmentations.colour_shift(draw(tf.random.stateless_normal))
        if preprocessing.standard_deviation is not None:
            shift /= preprocessing.standard_deviation
        # As in Preprocessing, whole rows: [batch, 1, width, channels].
        images += tf.repeat(shift[:, None, None, :], width, axis=2)
    if augmentation.cutout_size:
        random = draw(tf.random.stateless_uniform, 2, 5)
        images = augmentations.cutout(images, augmentation.cutout_size, random)
    if augmentation.erase_probability:
        random = draw(tf.random.stateless_uniform, 23, 6)
        images = augmentations.erase(
            images, random, augmentation.erase_probability
        )
    return images


def _draw(seed, step, share, distribution, count=3, number=None):
    """Draws random numbers for each image of a share."""
    key = splits.random_key(seed, splits.BATCH, step)
    if number is not None:
        key = tf.random.experimental.stateless_fold_in(key, number)
    numbers = distribution([share.batch_size, count], key)
    return numbers[share.start : share.stop]


def with_options(batches: tf.data.Dataset) -> tf.data.Dataset:
    """Returns batches that are computed ahead, in order."""
    options = tf.data.Options()
    options.deterministic = True
    # Each worker's share is chosen here; tf.distribute must not shard again.
    options.experimental_distribute.auto_shard_policy = (
        tf.data.experimental.AutoShardPolicy.OFF
    )
    return batches.prefetch(tf.data.AUTOTUNE).with_options(options)
