"""Image classification sets of TensorFlow Datasets (TFDS).

A prepared set is a directory that a stranger may have written. No class that
it names is imported except those of TFDS, and a malformed file is an error of
one line.
"""

import contextlib
import os
import re
import ssl
import threading
import urllib.error
import urllib.request

import numpy as np

from keras_resnet import names
from keras_resnet.data import files
from keras_resnet.data import splits as splits_lib

# Largest text file of a prepared set.
_TEXT_BYTES = 2**26

# Most classes of a set: their names are a list in memory.
_MOST_CLASSES = 2**20

# NAME, NAME/CONFIG, NAME:VERSION. TFDS accepts more: `huggingface:NAME`,
# community sets, whose code it downloads and runs, and arguments of a builder,
# such as NAME/data_dir=PATH.
_NAME = re.compile(
    r"[A-Za-z]\w*(/[\w+-][\w.+-]*)?(:(\d+|\*)(\.(\d+|\*)){2})?", re.ASCII
)
_CLASS = re.compile(r"tensorflow_datasets(\.[A-Za-z_]\w*)+", re.ASCII)
_LOCK = threading.Lock()


def tfds_set(name: str, data_dir: str | os.PathLike | None):
    """Opens a set, and downloads it if it is not prepared.

    Args:
        name: NAME, NAME/CONFIG or NAME:1.0.0.
        data_dir: Directory of prepared sets; None for TFDS's own default.

    Returns:
        A `splits.Source`.

    Raises:
        ValueError: If the name is unknown, the set is not one for image
            classification, or its files are malformed.
        FileNotFoundError: If the set cannot be downloaded.
    """
    if not _NAME.fullmatch(name):
        raise ValueError(
            "the name of a data set must be digits, synthetic, folder:PATH or "
            "that of an image classification set of TensorFlow Datasets, as "
            f"NAME, NAME/CONFIG or NAME:1.0.0; received {name!r}"
        )
    _check_prepared_files(name, data_dir)
    builder = _builder(name, data_dir)
    image_key, label_key = _image_and_label(name, builder)
    labels = _labels(name, builder.info.features[label_key])

    def records(split):
        with _one_line(name):
            found = splits_lib.Records(builder, split, image_key, label_key)
        if found.size < 1:
            raise ValueError(
                f"the data set {name} has no images in its split {split}"
            )
        return found

    found = _train_and_test(name, _prepared_splits(name, builder), records)
    shape = builder.info.features[image_key].shape
    if shape[-1] is None:
        shape = (*shape[:2], 3)
    total = sum(split.size for split in found.values())

    def read(split):
        if not splits_lib.fits_memory(shape, total):
            return found[split]
        return _in_memory(name, found[split], len(labels))

    def record():
        config = builder.builder_config
        return {
            "version": str(builder.version),
            "config": config and config.name,
            **{split: images.size for split, images in found.items()},
        }

    return splits_lib.Source(labels, read, shape, record)


def _check_prepared_files(name, data_dir):
    """Raises if the directory of a set has a pipe, a device or a huge text."""
    import tensorflow_datasets as tfds

    root = os.path.expanduser(data_dir or tfds.core.constants.DATA_DIR)
    words = tfds.core.naming.camelcase_to_snakecase(re.split("[/:]", name)[0])
    directory = os.path.join(root, words)
    for folder, _, found in os.walk(directory):
        for file in found:
            is_text = file.endswith((".json", ".txt"))
            files.check_file(
                os.path.join(folder, file), _TEXT_BYTES if is_text else None
            )


def _builder(name, data_dir):
    """Returns TFDS's builder of a set."""
    import tensorflow_datasets as tfds

    with _one_line(name), _only_own_features():
        try:
            return tfds.builder(name, data_dir=data_dir)
        except tfds.core.DatasetNotFoundError:
            pass
    known = tfds.list_builders(with_community_datasets=False)
    known = ["digits", "synthetic", "folder:PATH", *known]
    allowed = (
        "digits, synthetic, folder:PATH and the image classification sets of "
        "TensorFlow Datasets"
    )
    raise ValueError(names.unknown("data set", name, known, allowed, count=3))


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
def _only_own_features():
    """Lets TFDS load no feature classes except its own.

    TFDS imports the module of any class that `features.json` or
    `dataset_info.json` names.
    """
    import tensorflow_datasets as tfds

    connector = tfds.features.FeatureConnector
    with _LOCK:
        original = vars(connector)["cls_from_name"]

        def cls_from_name(cls, name):
            if not _CLASS.fullmatch(name):
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


def _image_and_label(name, builder):
    """Returns the keys of the image and of the label in a record."""
    import tensorflow_datasets as tfds

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


def _labels(name, feature):
    """Returns the names of the classes."""
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


def _prepared_splits(name, builder):
    """Returns the names of the splits, after a download if one is needed."""
    try:
        with _one_line(name, AssertionError):
            splits = list(builder.info.splits)
            if not splits or "train" in splits:  # mock_data tells none
                builder.as_dataset(split="train")
    except AssertionError:  # TFDS raises it if the set is not prepared
        _download(name, builder)
        splits = list(builder.info.splits)
    if splits and "train" not in splits:
        raise ValueError(
            f"the data set must have a split called train; {name} has "
            f"{', '.join(splits)}"
        )
    return splits


def _train_and_test(name, known, records):
    """Chooses the splits for training and test.

    Args:
        name: Name of the set.
        known: Names of its splits; empty with `tfds.testing.mock_data`.
        records: Returns the `Records` of a split.
    """
    train = records("train")
    for split in ("test", "validation"):
        if not known or split in known:
            test = records(split)
            with _one_line(name):
                first = test.stored().take(1).as_numpy_iterator()
                _, label = next(first)
            if label >= 0:  # ImageNet's test labels are -1: unpublished
                return {"train": train, "test": test}
    return {"train": records("train[:80%]"), "test": records("train[80%:]")}


def _in_memory(name, records, classes):
    """Decodes a split of small images into memory."""
    with _one_line(name, ValueError):
        images = records.in_memory()
    labels = images.labels.numpy()
    if labels.min() < 0 or labels.max() >= classes:
        raise ValueError(
            f"the labels of {name} must be below {classes}, its number of "
            f"classes; received {labels.min()} to {labels.max()}"
        )
    return images


def _download(name, builder):
    urls = [url for url in builder.url_infos or () if url.startswith("http")]
    try:
        # Without a network, TFDS would try for minutes and leave folders.
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
        # Any response shows a network, also an error or an untrusted one.
        if isinstance(error.reason, OSError) and not isinstance(
            error.reason, ssl.SSLError
        ):
            raise
