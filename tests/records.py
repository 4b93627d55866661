"""Data sets of TFDS, as small as a test needs them."""

import os
import pathlib
import tempfile

import numpy as np


def scratch(test):
    """A directory that goes when the test, or the class of tests, has run."""
    directory = tempfile.TemporaryDirectory()
    is_class = isinstance(test, type)
    add = test.addClassCleanup if is_class else test.addCleanup
    add(directory.cleanup)
    return directory.name


def tfds_set(test, shape, unlabelled=(), broken=None, /, **splits):
    """The directory of a prepared set of TFDS in several files a split.

    Every image is of one grey, its number; the labels are the numbers modulo
    3, or -1 in the splits that are `unlabelled`. The number `broken` is a
    file that is no image.
    """
    import tensorflow_datasets as tfds

    directory = scratch(test)

    def examples(split, count):
        for i in range(count):
            sides = [side or 30 + 3 * (i % 4) for side in shape[:2]]
            image = np.full((*sides, shape[2]), i, np.uint8)
            if i == broken:
                image = os.path.join(directory, "broken.png")
                pathlib.Path(image).write_bytes(b"broken")
            label = -1 if split in unlabelled else i % 3
            yield i, {"image": image, "label": label}

    tfds.dataset_builders.store_as_tfds_dataset(
        "tiny",
        "1.0.0",
        tfds.features.FeaturesDict(
            {
                "image": tfds.features.Image(shape=shape),
                "label": tfds.features.ClassLabel(names=["a", "b", "c"]),
            }
        ),
        {split: examples(split, count) for split, count in splits.items()},
        data_dir=directory,
        download_config=tfds.download.DownloadConfig(num_shards=3),
    )
    return directory
