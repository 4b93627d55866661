"""Data sets: training batches, test batches, and their loading by name.

A training batch is a pure function of (seed, step). The training images form
an endless sequence: position p belongs to epoch p // train_size, and the pair
(seed, epoch) decides the order of the images in an epoch. The batch of a step
has the positions step * batch_size ... (step + 1) * batch_size - 1. A run can
start at any step, and share its batches among any number of workers.

`pipelines` has the steps from a stored image to a batch.
"""

import dataclasses
import functools
import os
from collections.abc import Callable
from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from keras_resnet import atomic
from keras_resnet import names
from keras_resnet.data import augmentation as augmentations
from keras_resnet.data import bundled
from keras_resnet.data import folders
from keras_resnet.data import pipelines
from keras_resnet.data import splits
from keras_resnet.data import tfds_sets
from keras_resnet.data import views as views_lib

# Errors of TensorFlow for an image that does not decode. Their messages name
# no image: see `DataSet.check`.
UNREADABLE = (
    tf.errors.InvalidArgumentError,
    tf.errors.DataLossError,
    tf.errors.NotFoundError,
    tf.errors.PermissionDeniedError,
)


class DataSet:
    """Images with labels, on which networks are trained and tested.

    Args:
        name: The name that `load` received.
        labels: The names of the classes; a label is an index of this list.
        preprocessing: Test view and normalization.
        read: Returns the split "train" or "test"; called once for each, when
            it is needed.
        record: Returns the value of the attribute `record`.
        notes: What was left out, in words; empty for nothing.

    Attributes:
        name, labels, preprocessing, notes: The arguments.

    >>> digits = load("digits")
    >>> digits.image_shape, digits.classes, digits.train_size, digits.test_size
    ((8, 8, 1), 10, 1442, 355)
    >>> images, labels = next(iter(digits.train_batches(128, seed=0)))
    >>> images.shape, labels.dtype
    (TensorShape([128, 8, 8, 1]), tf.int32)
    """

    #: What may be the reason if a batch never comes; empty if nothing is known.
    stall_reason = ""

    def __init__(
        self,
        name: str,
        labels: Sequence[str],
        preprocessing: views_lib.Preprocessing,
        read: Callable[[str], splits.Split],
        record: Callable[[], dict] = dict,
        notes: str = "",
    ):
        self.name = name
        self.labels = list(labels)
        self.preprocessing = preprocessing
        self._read = read
        self._record = record
        self.notes = notes

    @functools.cached_property
    def record(self) -> dict:
        """Text and numbers that change if the images change.

        The record of a folder has the number of images of each class, and a
        digest of their names and sizes, and of their contents up to 1 GiB in
        all. The record of a set of TensorFlow Datasets has its version,
        configuration and sizes.
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
        """Number of classes."""
        return len(self.labels)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """`(height, width, channels)` of the network's input."""
        return self.preprocessing.image_shape

    @property
    def train_size(self) -> int:
        """Number of training images, and of positions in an epoch."""
        return self._train.size

    @property
    def test_size(self) -> int:
        """Number of test images."""
        return self._test.size

    @property
    def summary(self) -> str:
        """One line: the number of images and classes, and what is left out.

        >>> load("digits").summary
        '1,442 training images of 10 classes, 355 for validation'
        """
        line = (
            f"{self.train_size:,} training images of {self.classes:,} classes, "
            f"{self.test_size:,} for validation"
        )
        return f"{line}, {self.notes}" if self.notes else line

    @property
    def train_counts(self) -> list[int]:
        """Number of training images of each class; empty if that is unknown.

        It is known of images in memory and of a folder.
        """
        if not isinstance(self._train, splits.RandomAccess):
            return []
        labels = self._train.labels.numpy()
        return np.bincount(labels, minlength=self.classes).tolist()

    def train_batches(
        self,
        batch_size: int,
        seed: int,
        first_step: int = 0,
        augmentation: str | augmentations.Augmentation = "none",
        shard: tuple[int, int] = (0, 1),
    ) -> tf.data.Dataset:
        """Returns endless batches, each a pure function of (seed, step).

        Args:
            batch_size: Number of images of all workers together in one step.
            seed: Of the order of the images and of the augmentation.
            first_step: Step of the first batch.
            augmentation: An `Augmentation`, or the name of a row of `CROPS`.
            shard: (index, count): the worker's index and the number of
                workers. A worker gets its contiguous share of every batch.

        Returns:
            A data set of (images, labels): float32 `[batch_size / count,
            height, width, channels]` and int32 `[batch_size / count]`. With
            mixed images the labels are a tuple: see `augmentation.mix`.

        Raises:
            ValueError: If the augmentation is unknown or the shard does not
                divide the batch.
        """
        if isinstance(augmentation, str):
            augmentation = augmentations.Augmentation(augmentation)
        return pipelines.train_batches(
            self._train,
            self.preprocessing,
            augmentation,
            pipelines.Share.of_shard(batch_size, shard),
            seed,
            first_step,
        )

    @property
    def has_photos(self) -> bool:
        """Whether the images have different sizes, and views are cropped."""
        return self.preprocessing.is_cropped

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
                `image_size` [1, Sec. 3.4]. The papers test photos so. Small
                images of one size are normalized first. Their crops are those
                of the image with an eighth of its side of zeros on each side,
                and their scales are enlargements.

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
        count = -(-self.test_size // batch_size)
        return pipelines.without_filler(padded, count)

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
        share = pipelines.Share.of_shard(batch_size, shard)
        return pipelines.test_batches(
            self._test, self.preprocessing, share, protocol
        )

    def with_preprocessing(
        self,
        image_size: int | None = None,
        preprocessing: views_lib.Preprocessing | None = None,
        test_crop_ratio: float | None = None,
    ) -> "DataSet":
        """Returns the same images for another network.

        Args:
            image_size: Height and width of the network's input, in pixels.
            preprocessing: All of the preprocessing, instead of `image_size`.
            test_crop_ratio: As for `load`.

        >>> load("digits").with_preprocessing(image_size=16).image_shape
        (16, 16, 1)
        """
        if preprocessing is None:
            train = self._train
            shape: tuple = (None, None, 3)
            if isinstance(train, splits.Memory):
                shape = tuple(train.images.shape[1:])
            preprocessing = _own_preprocessing(
                shape,
                image_size,
                self._read,
                self.preprocessing.exif,
                test_crop_ratio,
            )
        return DataSet(
            self.name,
            self.labels,
            preprocessing,
            self._read,
            self._record,
            self.notes,
        )

    def with_validation(self) -> "DataSet":
        """Returns the set whose test images are a tenth of the training images.

        It is for choices that the test images must not decide. [1, Sec. 4.2]
        splits CIFAR's 50,000 training images into 45,000 and 5,000. Of images
        in memory and in folders every tenth image of each class is held out.

        >>> validation = load("digits").with_validation()
        >>> validation.train_size, validation.test_size
        (1302, 140)
        """

        @functools.cache
        def read(split):
            return self._train.part(is_held_out=split == "test")

        return DataSet(
            self.name,
            self.labels,
            self.preprocessing,
            read,
            self._record,
            self.notes,
        )

    def test_images(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the first test images: single views, before normalization.

        Args:
            count: Number of images; fewer if the set has fewer.

        Returns:
            uint8 `[count, height, width, channels]` and int32 `[count]`.

        Raises:
            ValueError: If an image does not decode or exceeds the bounds of
                `limits`; names it.
        """
        return self._views(self._test, count)

    def test_name(self, index: int) -> str:
        """Returns the name of a test image: its file, if it has one."""
        return self._test.name(index)

    def sample(
        self, count: int, training: bool = False
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns a fixed random sample of the images, without repetition.

        Args:
            count: Number of images; fewer if the set has fewer.
            training: Whether the sample is of the training images, without
                augmentation; else of the test images.

        Returns:
            The arrays that `test_images` returns.
        """
        split = self._train if training else self._test
        return self._views(split, count, seed=0)

    def _views(self, split, count, seed=None):
        count = min(count, split.size)
        try:
            return pipelines.first_views(split, self.preprocessing, count, seed)
        except UNREADABLE:
            self.check()  # names the image that does not decode
            raise

    def check(self, error: Exception | None = None) -> None:
        """Decodes every image, to name one that does not decode.

        A program calls it after a batch failed with an error of `UNREADABLE`.

        Args:
            error: The error of the batch, for sets that know others.

        Raises:
            ValueError: If an image does not decode or exceeds the bounds of
                `limits`; names the first such image.
        """
        for split in (self._train, self._test):
            for _ in split.decoded():
                pass


def load(
    name: str,
    data_dir: str | os.PathLike | None = None,
    image_size: int | None = None,
    preprocessing: views_lib.Preprocessing | None = None,
    test_crop_ratio: float | None = None,
    skip_unreadable: bool = False,
    exif: bool = True,
) -> DataSet:
    """Loads a data set by its name.

    A set of small images (of one size, at most 128 pixels a side, at most
    1 GiB in all) is held in memory. The network receives the images as they
    are, less the mean of each pixel over the training images. Of other sets
    the network receives 224 x 224 pixels of a shorter side of 256, normalized
    by the mean and standard deviation of ImageNet's channels.

    Args:
        name: `"digits"`, `"synthetic"`, `"folder:PATH"` with one folder a
            class (in PATH, or in PATH/train and PATH/test), or an image
            classification set of TensorFlow Datasets, such as `"cifar10"`.
            A fixed rule keeps a fifth of a set without test images for test.
        data_dir: Directory of the sets of TensorFlow Datasets; None for the
            default of TensorFlow Datasets. A missing set is downloaded.
        image_size: Height and width of the network's input, in pixels; None
            for the data set's own.
        preprocessing: Preprocessing of a trained network that is tested on
            this set; None for the data set's own.
        test_crop_ratio: Side of the test view of a photo over the shorter side
            of the photo; None for 224 / 256.
        skip_unreadable: Whether a folder is used without the images that do
            not decode and the classes that have none.
        exif: Whether the photos of a folder are turned as their EXIF
            orientation says. `preprocessing` has its own `exif`.

    Returns:
        A `DataSet`.

    Raises:
        ValueError: If the name is unknown, the set is not one for image
            classification, or an image does not decode.
        FileNotFoundError: If the set cannot be found or downloaded, or a
            folder holds no images.
    """
    if image_size is not None and preprocessing is not None:
        raise ValueError(
            "give image_size or preprocessing, not both: preprocessing has an "
            f"image_size of its own ({preprocessing.image_size})"
        )
    kind, _, path = name.partition(":")
    if name == "digits":
        source = bundled.digits()
    elif name == "synthetic":
        size = preprocessing.image_size if preprocessing else image_size or 32
        source = bundled.synthetic(size)
    elif kind == "folder":
        if preprocessing is not None:
            exif = preprocessing.exif
        source = folders.folder(path, skip_unreadable, exif)
    else:
        source = _tfds_set(name, data_dir)
    read = functools.cache(source.read)
    if preprocessing is None:
        preprocessing = _own_preprocessing(
            source.image_shape, image_size, read, exif, test_crop_ratio
        )
    return DataSet(
        name, source.labels, preprocessing, read, source.record, source.notes
    )


def _tfds_set(name, data_dir):
    """Opens a set of TFDS; an unknown one may be a folder."""
    try:
        return tfds_sets.tfds_set(name, data_dir)
    except ValueError as error:
        if not os.path.isdir(os.path.expanduser(name)):
            raise
        raise ValueError(
            "a folder of images must be named folder:PATH, received "
            f"{name!r}: did you mean folder:{name}?"
        ) from error


def _own_preprocessing(shape, image_size, read, exif, test_crop_ratio=None):
    """Returns the preprocessing of a set whose images have a shape."""
    height, width, channels = shape
    is_small = None not in shape and max(height, width) <= splits.SMALL_SIDE
    size = image_size or (
        max(height, width) if is_small else views_lib.PHOTO_SIZE
    )
    train = read("train")
    if isinstance(train, splits.Memory):
        axis = 0 if (height, width) == (size, size) else (0, 1, 2)
        mean = train.images.numpy().mean(axis, np.float64) / 255
        return views_lib.Preprocessing(size, channels, None, mean, exif=exif)
    photo = views_lib.photo_preprocessing(size, channels, is_small)
    if test_crop_ratio is not None and photo.is_cropped:
        photo = dataclasses.replace(
            photo, shorter_side=round(size / test_crop_ratio)
        )
    return dataclasses.replace(photo, exif=exif)


def write_examples(
    dataset: DataSet, directory: str | os.PathLike, count: int = 10
) -> list[str]:
    """Writes the first test images as PNG files, as examples to predict.

    Args:
        dataset: The data set.
        directory: Directory of the files, which is made if it is missing.
        count: Number of images.

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
