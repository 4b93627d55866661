"""Images in folders, one folder for each class: `folder:PATH`."""

import functools
import hashlib
import itertools
import os
import unicodedata

import numpy as np

from keras_resnet.data import inspection
from keras_resnet.data import splits

# Largest set whose record has a digest of the images' contents: reading more
# would delay every start.
_DIGEST_BYTES = 2**30


# Names of the folders of training images and of test images, in any case. If
# there are several of test images, the first of these is used.
_TRAIN = ("train", "training")
_TEST = ("test", "validation", "valid", "val")


def folder(
    path: str, skip_unreadable: bool = False, exif: bool = True
) -> splits.Source:
    """Finds the images of a folder, and keeps small ones in memory.

    All files are checked first. Hidden files and files that are not images are
    left out.

    Args:
        path: A folder with one folder for each class, or with `train` and
            perhaps `test`, `validation`, `valid` or `val`, each with one folder
            for each class. Their names may have capitals. Without test images a
            fifth of each class is kept for test.
        skip_unreadable: Whether to leave out images that cannot be used and
            classes without an image.
        exif: Whether images are turned as their EXIF orientation says.

    Raises:
        FileNotFoundError: If the folder is missing or has no folder.
        ValueError: If the classes are fewer than two, train and test have
            different classes, there is an unknown folder beside `train`, or a
            file or a class cannot be used.
    """
    root = os.path.expanduser(path)
    if not os.path.isdir(root):
        raise FileNotFoundError(
            "folder:PATH must name a folder with one folder for each class; "
            f"{root!r} is none"
        )
    train_root, test_root, notes = _roots(root)
    findings = inspection.Findings()
    labels, train, test = _classes(root, train_root, test_root, findings)
    if not skip_unreadable:
        findings.check(root)
    labels, train, test = _whole_classes(
        train_root, test_root, labels, train, test
    )
    found = {"train": _files(train), "test": _files(test)}
    record = functools.partial(_record, labels, {"train": train, "test": test})
    notes = "; ".join(filter(None, [findings.words(), notes, _alike(labels)]))
    small = _small_images(**found, exif=exif)
    shape = (None, None, 3)
    if small is not None:
        shape, found = small["train"].images.shape[1:], small
    return splits.Source(labels, found.__getitem__, shape, record, notes)


def _roots(root):
    """Returns the folders of training and test images, and a note.

    A class may be called "train"; then its folder holds no folders.
    """
    folders = _folders(root)
    has_splits = [
        name
        for name in folders
        if name.lower() in _TRAIN and _folders(os.path.join(root, name))
    ]
    if not has_splits:
        if folders and all(map(_is_split, folders)):
            raise ValueError(
                f"{root} must have one folder for each class inside "
                f"{', '.join(folders)}, received none there"
            )
        return root, None, ""
    known = [n for n in folders if n.lower() in (*_TRAIN, *_TEST)]
    unknown = [name for name in folders if name not in known]
    if unknown or len(has_splits) > 1:
        raise ValueError(
            f"{root} must have one folder {_TRAIN[0]} and folders named "
            f"{', '.join(_TEST)}, in any case; received {', '.join(folders)}"
        )
    tests = [n for word in _TEST for n in known if n.lower() == word]
    train = os.path.join(root, has_splits[0])
    if not tests:
        return train, None, ""
    notes = ""
    if tests[1:]:
        notes = f"{', '.join(tests[1:])} not used beside {tests[0]}"
    return train, os.path.join(root, tests[0]), notes


def _is_split(name):
    """Returns whether a folder has the name of a split, as "test1" too."""
    return name.lower().rstrip("0123456789") in (*_TRAIN, *_TEST)


def _alike(labels):
    """Returns a note about classes whose names may be one name.

    Letters are classes too, so that "A" and "a" are not an error.
    """
    forms = {}
    for label in labels:
        form = unicodedata.normalize("NFKC", label).casefold()
        forms.setdefault(" ".join(form.split()), []).append(label)
    alike = [repr(label) for found in forms.values() for label in found[1:]]
    return f"classes with nearly the name of another: {', '.join(alike)}" * (
        bool(alike)
    )


def _classes(root, train_root, test_root, findings):
    """Returns the labels, and the files of each class for train and test."""
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

    def images(folder):
        here = [name for name in labels if name in _folders(folder)]
        classes = [
            inspection.images_of_class(
                root, os.path.join(folder, label), findings
            )
            if label in here
            else []
            for label in labels
        ]
        classes = inspection.without_unreadable(root, classes, findings)
        for label, found in zip(labels, classes, strict=True):
            if not found and label in here:
                name = os.path.relpath(os.path.join(folder, label), root)
                findings.add(inspection.EMPTY, name)
        return classes

    if test_root is None:
        train = images(train_root)
        test = [held_out(paths) for paths in train]
        train = [
            [path for path in paths if path not in kept]
            for paths, kept in zip(train, map(set, test), strict=True)
        ]
        return labels, train, test
    train = images(train_root)
    found = _folders(test_root)
    rows = zip(labels, train, strict=True)
    missing = {label for label, paths in rows if paths} - set(found)
    if missing or set(found) - set(labels):
        raise ValueError(
            f"{test_root} must have the classes of {train_root}: "
            f"{', '.join(labels)}; it has {', '.join(found) or 'none'}"
        )
    return labels, train, images(test_root)


def _whole_classes(train_root, test_root, labels, train, test):
    """Returns the classes with training images; raises if too few are left."""
    rows = zip(labels, train, test, strict=True)
    rows = [row for row in rows if row[1]]
    if len(rows) < 2:
        raise ValueError(
            f"{train_root} must have images of 2 classes or more, received "
            f"images of {', '.join(row[0] for row in rows) or 'none'}"
        )
    labels, train, test = map(list, zip(*rows, strict=True))
    if not any(test) and test_root:
        raise ValueError(f"{test_root} must have images, received none")
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


def _small_images(train, test, exif=True):
    """Decodes the splits into memory, or returns None if one does not fit."""
    images, labels = [], []
    total = train.size + test.size
    for image, label in itertools.chain(
        train.decoded(exif), test.decoded(exif)
    ):
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
    names = [s.name(i) for s in (train, test) for i in range(s.size)]
    parts = {"train": slice(train.size), "test": slice(train.size, None)}
    return {
        split: splits.Memory(stacked[part], labels[part], names[part])
        for split, part in parts.items()
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
