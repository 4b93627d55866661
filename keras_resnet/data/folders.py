"""Images in folders, one folder for each class: `folder:PATH`."""

import functools
import hashlib
import itertools
import os

import numpy as np

from keras_resnet.data import files
from keras_resnet.data import splits

_IMAGE_FILES = (".jpg", ".jpeg", ".png", ".gif", ".bmp", ".webp")

# Largest set whose record has a digest of the images' contents: reading more
# would delay every start.
_DIGEST_BYTES = 2**30


def folder(path: str) -> splits.Source:
    """Finds the images of a folder, and keeps small ones in memory.

    Args:
        path: A folder with one folder for each class, or with `train` and
            perhaps `test`, `validation` or `val`, each with one folder for
            each class. Without test images a fifth of each class is kept for
            test.

    Raises:
        FileNotFoundError: If a folder or its images are missing.
        ValueError: If the classes are fewer than two, train and test have
            different classes, or an image is damaged.
    """
    root = os.path.expanduser(path)
    if not os.path.isdir(root):
        raise FileNotFoundError(
            "folder:PATH must name a folder with one folder for each class; "
            f"{root!r} is none"
        )
    labels, train, test = _classes(root)
    found = {"train": _files(train), "test": _files(test)}
    record = functools.partial(_record, labels, {"train": train, "test": test})
    small = _small_images(**found)
    if small is None:
        shape = (None, None, 3)
        return splits.Source(labels, found.__getitem__, shape, record)
    shape = small["train"].images.shape[1:]
    return splits.Source(labels, small.__getitem__, shape, record)


def _classes(root):
    """Returns the labels, and the files of each class for train and test."""
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
            [path for path in paths if path not in kept]
            for paths, kept in zip(train, test, strict=True)
        ]
    if not any(test):
        raise ValueError(
            f"a class in {train_root} must have 2 images or more, one of them "
            "for test; every one has 1"
        )
    return labels, train, test


def held_out(paths: list[str]) -> list[str]:
    """Returns the fifth of a class's files that is kept for test.

    A hash of the names decides, so that new files move few of the others.
    """
    count = max(len(paths) // 5, min(len(paths) - 1, 1))

    def rank(path):
        name = "/".join(path.split(os.sep)[-2:])
        return hashlib.sha256(os.fsencode(name)).digest()

    return sorted(sorted(paths, key=rank)[:count])


def _files(classes):
    """Returns the split of a list of files for each class."""
    return splits.Files(
        [path for paths in classes for path in paths],
        [label for label, paths in enumerate(classes) for _ in paths],
    )


def _record(labels, classes_of):
    """Returns the number of images and a digest of the files of each class.

    The digest covers names and sizes; contents too, up to `_DIGEST_BYTES`.

    Args:
        labels: Names of the classes.
        classes_of: A list of files for each class, by split.
    """
    classes = itertools.chain.from_iterable(classes_of.values())
    sizes = map(os.path.getsize, itertools.chain.from_iterable(classes))
    reads = sum(sizes) <= _DIGEST_BYTES

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
        for split, classes in classes_of.items()
    }


def _small_images(train, test):
    """Decodes the splits into memory, or returns None if one does not fit."""
    images, labels = [], []
    total = train.size + test.size
    for image, label in itertools.chain(train.decoded(), test.decoded()):
        # Photos show it early: their first two images mostly differ in size.
        if not splits.fits_memory(image.shape, total) or (
            images and image.shape[:2] != images[0].shape[:2]
        ):
            return None
        images.append(image[..., : 3 if image.shape[-1] >= 3 else 1])
        labels.append(label)
    channels = max(image.shape[-1] for image in images)
    shape = (*images[0].shape[:2], channels)
    stacked = np.stack([np.broadcast_to(image, shape) for image in images])
    return {
        "train": splits.Memory(stacked[: train.size], labels[: train.size]),
        "test": splits.Memory(stacked[train.size :], labels[train.size :]),
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
    found = [
        os.path.join(path, name)
        for name in sorted(os.listdir(path))
        if name.lower().endswith(_IMAGE_FILES) and not name.startswith(".")
    ]
    if not found:
        raise FileNotFoundError(
            f"{path} must hold images ({', '.join(_IMAGE_FILES)}); it has none"
        )
    for file in found:
        files.check_file(file, files.IMAGE_BYTES)
    return found
