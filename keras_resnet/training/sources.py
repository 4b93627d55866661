"""The data sets: bundled, drawn, in folders, of TensorFlow Datasets.

Each function here gives the labels of a set, a function from "train" or "test"
to its split, and the shape [height, width, channels] of its images, with None
for sizes that differ.
"""

import hashlib
import importlib.resources
import itertools
import os
import ssl
import urllib.error
import urllib.request

import numpy as np

from keras_resnet import names
from keras_resnet.training import splits as splits_lib

# A small image set has images of one size, at most so many pixels a side, and
# is held in memory; every other set is read and decoded as it is needed.
SMALL_SIDE = 128
_SMALL_BYTES = 2**30

_IMAGE_FILES = (".jpg", ".jpeg", ".png", ".gif", ".bmp", ".webp")


def digits():
    """1,797 digits of 8 x 8 pixels, in grey."""
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
        return splits_lib.Memory(images[chosen], labels[chosen])

    return [str(digit) for digit in range(10)], read, images.shape[1:]


def synthetic(size):
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
        return splits_lib.Memory(images, labels)

    return [str(label) for label in range(10)], read, (size, size, 3)


def folder(path):
    """Images in folders, one for each class."""
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
        test = [held_out(paths) for paths in train]
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


def held_out(paths):
    """A fifth, by a hash of their names: new files move few of the others."""
    count = max(len(paths) // 5, min(len(paths) - 1, 1))

    def rank(path):
        name = "/".join(path.split(os.sep)[-2:])
        return hashlib.sha256(name.encode()).digest()

    return sorted(sorted(paths, key=rank)[:count])


def _files(classes):
    """The split of a list of files for each class."""
    return splits_lib.Files(
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
        "train": splits_lib.Memory(stacked[: train.size], labels[: train.size]),
        "test": splits_lib.Memory(stacked[train.size :], labels[train.size :]),
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
    files = sorted(
        name
        for name in os.listdir(path)
        if name.lower().endswith(_IMAGE_FILES) and not name.startswith(".")
    )
    if not files:
        raise FileNotFoundError(
            f"{path} must hold images ({', '.join(_IMAGE_FILES)}); it has none"
        )
    return [os.path.join(path, name) for name in files]


def tfds_set(name, data_dir):
    """An image classification set of TensorFlow Datasets."""
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder(name, data_dir=data_dir)
    except tfds.core.DatasetNotFoundError:
        known = tfds.list_builders(with_community_datasets=False)
        known = ["digits", "synthetic", "folder:PATH", *known]
        allowed = (
            "digits, synthetic, folder:PATH and the image classification sets "
            "of TensorFlow Datasets"
        )
        raise ValueError(
            names.unknown("data set", name, known, allowed, count=3)
        ) from None
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
        return splits_lib.Records(builder, split, image_key, label_key)

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


def _tfds_splits(known, records):
    train = records("train")
    # Under tfds.testing.mock_data a builder does not know its splits.
    for split in ("test", "validation"):
        if not known or split in known:
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
        and max(shape[:2]) <= SMALL_SIDE
        and count * np.prod(shape, dtype=np.int64) <= _SMALL_BYTES
    )
