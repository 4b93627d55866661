"""The data sets: bundled, drawn, in folders, of TensorFlow Datasets.

Each function here returns the labels of a set, a function from "train" or
"test" to its split, the shape [height, width, channels] of its images, with
None for sizes that differ, and a function that returns the record of its
images. A record is a dict of text and numbers that changes if the images
change.
"""

import contextlib
import functools
import hashlib
import importlib.resources
import itertools
import math
import os
import re
import ssl
import stat
import threading
import urllib.error
import urllib.request

import numpy as np

from keras_resnet import names
from keras_resnet.data import splits as splits_lib

# A small image set has images of one size, at most so many pixels a side, and
# is held in memory; every other set is read and decoded as it is needed.
SMALL_SIDE = 128
_SMALL_BYTES = 2**30

# Most bytes of the images of `synthetic`, which are held in memory too.
_SYNTHETIC_BYTES = 2**32

_IMAGE_FILES = (".jpg", ".jpeg", ".png", ".gif", ".bmp", ".webp")

# Largest file of one image, and of the text that describes a set of TFDS.
_IMAGE_BYTES = 2**28
_TEXT_BYTES = 2**26

# Most classes of a set: their names are a list in memory.
_MOST_CLASSES = 2**20

# A data set of TFDS: NAME, NAME/CONFIG, NAME:VERSION. TFDS accepts more:
# `huggingface:NAME`, community sets, whose code it downloads and runs, and
# arguments of a builder, such as NAME/data_dir=PATH.
_TFDS_NAME = re.compile(
    r"[A-Za-z]\w*(/[\w+-][\w.+-]*)?(:(\d+|\*)(\.(\d+|\*)){2})?", re.ASCII
)
_TFDS_CLASS = re.compile(r"tensorflow_datasets(\.[A-Za-z_]\w*)+", re.ASCII)
_TFDS_LOCK = threading.Lock()


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

    return [str(digit) for digit in range(10)], read, images.shape[1:], dict


def synthetic(size):
    """Ten classes: 4 x 4 coloured squares each, half covered by noise."""
    counts = {"train": 1000, "test": 200}
    largest = math.isqrt(_SYNTHETIC_BYTES // (3 * sum(counts.values())))
    if size > largest:
        raise ValueError(
            f"image_size must be at most {largest} for synthetic, whose images "
            f"are in memory; received {size}"
        )

    def read(split):
        # RandomState's numbers never change between versions of NumPy.
        squares = np.random.RandomState(0).randint(0, 256, (10, 4, 4, 3))
        count, seed = counts[split], {"train": 1, "test": 2}[split]
        labels = np.arange(count) % 10
        place = np.arange(size) * 4 // size
        squares = (squares // 2).astype(np.uint8)[:, place][:, :, place]
        images = np.random.RandomState(seed).randint(
            0, 128, (count, size, size, 3), np.uint8
        )
        images += squares[labels]
        return splits_lib.Memory(images, labels)

    return [str(label) for label in range(10)], read, (size, size, 3), dict


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
    record = functools.partial(
        _folder_record, labels, {"train": train, "test": test}
    )
    small = _small_folder(**splits)
    if small is None:
        return labels, splits.__getitem__, (None, None, 3), record
    shape = small["train"].images.shape[1:]
    return labels, small.__getitem__, shape, record


def _folder_record(labels, splits):
    """For each class its number of images, and a digest of their files.

    The digest is that of the names and sizes, and of the contents if the set
    has at most `_SMALL_BYTES`: to read more would delay every start.
    """
    classes = itertools.chain.from_iterable(splits.values())
    sizes = map(os.path.getsize, itertools.chain.from_iterable(classes))
    reads = sum(sizes) <= _SMALL_BYTES

    def described(paths):
        digest = hashlib.sha256()
        for path in paths:
            name = os.fsencode(os.path.basename(path))
            digest.update(b"%s\0%d\0" % (name, os.path.getsize(path)))
            if reads:
                with open(path, "rb") as file:
                    digest.update(hashlib.sha256(file.read()).digest())
        count = f"{len(paths)} image{'s' * (len(paths) != 1)}"
        return f"{count} (sha256 {digest.hexdigest()[:16]})"

    return {
        split: {
            label: described(paths)
            for label, paths in zip(labels, classes, strict=True)
        }
        for split, classes in splits.items()
    }


def held_out(paths):
    """A fifth, by a hash of their names: new files move few of the others."""
    count = max(len(paths) // 5, min(len(paths) - 1, 1))

    def rank(path):
        name = "/".join(path.split(os.sep)[-2:])
        return hashlib.sha256(os.fsencode(name)).digest()

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
    files = [
        os.path.join(path, name)
        for name in sorted(os.listdir(path))
        if name.lower().endswith(_IMAGE_FILES) and not name.startswith(".")
    ]
    if not files:
        raise FileNotFoundError(
            f"{path} must hold images ({', '.join(_IMAGE_FILES)}); it has none"
        )
    for file in files:
        _check_file(file, _IMAGE_BYTES)
    return files


def _check_file(path, most_bytes=None):
    """Raises unless reading a path ends: a pipe or a device may not.

    Raises:
        ValueError: If it is not a regular file, or a larger one than allowed.
    """
    try:
        status = os.stat(path)
    except OSError as error:  # a link to nothing, among others
        raise ValueError(
            f"{path} must be a regular file, it cannot be opened "
            f"({error.strerror}): remove it"
        ) from error
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(
            f"{path} must be a regular file, received {_kind(status.st_mode)}: "
            "remove it"
        )
    if most_bytes is not None and status.st_size > most_bytes:
        raise ValueError(
            f"{path} must have at most {most_bytes:,} bytes, received "
            f"{status.st_size:,}: remove it"
        )


def _kind(mode):
    kinds = {
        stat.S_ISDIR: "a directory",
        stat.S_ISFIFO: "a pipe",
        stat.S_ISSOCK: "a socket",
        stat.S_ISCHR: "a device",
        stat.S_ISBLK: "a device",
    }
    return next((kind for is_kind, kind in kinds.items() if is_kind(mode)), "?")


def tfds_set(name, data_dir):
    """An image classification set of TensorFlow Datasets."""
    import tensorflow_datasets as tfds

    if not _TFDS_NAME.fullmatch(name):
        raise ValueError(
            "the name of a data set must be digits, synthetic, folder:PATH or "
            "that of an image classification set of TensorFlow Datasets, as "
            f"NAME, NAME/CONFIG or NAME:1.0.0; received {name!r}"
        )
    _check_prepared_files(name, data_dir, tfds)
    with _one_line(name), _only_own_features(tfds):
        try:
            builder = tfds.builder(name, data_dir=data_dir)
        except tfds.core.DatasetNotFoundError:
            builder = None
    if builder is None:
        known = tfds.list_builders(with_community_datasets=False)
        known = ["digits", "synthetic", "folder:PATH", *known]
        allowed = (
            "digits, synthetic, folder:PATH and the image classification sets "
            "of TensorFlow Datasets"
        )
        raise ValueError(
            names.unknown("data set", name, known, allowed, count=3)
        )
    image_key, label_key = _image_and_label(name, builder, tfds)
    labels = _labels(name, builder.info.features[label_key])
    try:
        with _one_line(name, AssertionError):
            splits = list(builder.info.splits)
            if not splits or "train" in splits:  # mock_data tells none
                builder.as_dataset(split="train")
    except AssertionError:  # how TFDS says that it has not been prepared
        _download(name, builder)
        splits = list(builder.info.splits)
    if splits and "train" not in splits:
        raise ValueError(
            f"the data set must have a split called train; {name} has "
            f"{', '.join(splits)}"
        )

    def records(split):
        with _one_line(name):
            found = splits_lib.Records(builder, split, image_key, label_key)
        if found.size < 1:
            raise ValueError(
                f"the data set {name} has no images in its split {split}"
            )
        return found

    found = _tfds_splits(name, splits, records)
    shape = builder.info.features[image_key].shape
    if shape[-1] is None:
        shape = (*shape[:2], 3)
    total = sum(split.size for split in found.values())

    def read(split):
        if not _is_small(shape, total):
            return found[split]
        with _one_line(name, ValueError):
            images = found[split].in_memory()
        of_labels = images.labels.numpy()
        if of_labels.min() < 0 or of_labels.max() >= len(labels):
            raise ValueError(
                f"the labels of {name} must be below {len(labels)}, its number "
                f"of classes; received {of_labels.min()} to {of_labels.max()}"
            )
        return images

    def record():
        config = builder.builder_config
        return {
            "version": str(builder.version),
            "config": config and config.name,
            **{split: images.size for split, images in found.items()},
        }

    return labels, read, shape, record


def _check_prepared_files(name, data_dir, tfds):
    """Raises if the directory of a set has a pipe, a device or a huge text."""
    root = os.path.expanduser(data_dir or tfds.core.constants.DATA_DIR)
    words = tfds.core.naming.camelcase_to_snakecase(re.split("[/:]", name)[0])
    directory = os.path.join(root, words)
    for folder, _, files in os.walk(directory):
        for file in files:
            is_text = file.endswith((".json", ".txt"))
            _check_file(
                os.path.join(folder, file), _TEXT_BYTES if is_text else None
            )


@contextlib.contextmanager
def _one_line(name, *passed):
    """Turns an error of TFDS about a malformed file into one line."""
    try:
        yield
    except passed:
        raise
    except Exception as error:
        reason = splits_lib.reason(error) or type(error).__name__
        raise ValueError(
            f"TensorFlow Datasets cannot read the data set {name} ({reason}); "
            "delete its directory and prepare it again, or pass --data_dir=DIR"
        ) from error


@contextlib.contextmanager
def _only_own_features(tfds):
    """Lets TFDS load no class of features but its own.

    TFDS imports the module of any class that `features.json` or
    `dataset_info.json` names, and a stranger may have written these files.
    """
    connector = tfds.features.FeatureConnector
    with _TFDS_LOCK:
        original = vars(connector)["cls_from_name"]

        def cls_from_name(cls, name):
            if not _TFDS_CLASS.fullmatch(name):
                raise ValueError(
                    "the class of a feature must be one of tensorflow_datasets"
                    f", received {name!r}, which is not imported"
                )
            return original.__get__(None, cls)(name)

        connector.cls_from_name = classmethod(cls_from_name)
        try:
            yield
        finally:
            connector.cls_from_name = original


def _labels(name, feature):
    """The names of the classes."""
    count = feature.num_classes or 0
    if not 1 <= count <= _MOST_CLASSES:
        raise ValueError(
            f"the data set {name} must have 1 to {_MOST_CLASSES:,} classes, "
            f"received {count}"
        )
    labels = feature.names
    if len(set(labels)) != count:
        raise ValueError(
            f"the data set {name} must have {count} different names of its "
            f"classes, received {len(set(labels))} different of {len(labels)}"
        )
    return labels


def _image_and_label(name, builder, tfds):
    """The keys of the image and of the label in a record."""
    with _one_line(name):
        features = dict(builder.info.features.items())
        keys = builder.info.supervised_keys
    kinds = (tfds.features.Image, tfds.features.ClassLabel)
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


def _tfds_splits(name, known, records):
    train = records("train")
    # Under tfds.testing.mock_data a builder does not know its splits.
    for split in ("test", "validation"):
        if not known or split in known:
            test = records(split)
            with _one_line(name):
                first = test.stored().take(1).as_numpy_iterator()
                _, label = next(first)
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
