"""Data sets of TFDS, as small as a test needs them."""

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


def tfds_set(
    test,
    shape,
    unlabelled=(),
    broken=None,
    damage=lambda image: b"broken",
    /,
    **splits,
):
    """Prepares a set of TFDS in several files a split, and returns its path.

    Every image is of one grey, its number. The labels are the numbers modulo
    3, or -1 in the splits that are `unlabelled`. Of the image with the number
    `broken`, the set has the bytes that `damage` returns.
    """
    import tensorflow_datasets as tfds

    directory = scratch(test)

    def examples(split, count):
        for i in range(count):
            sides = [side or 30 + 3 * (i % 4) for side in shape[:2]]
            image = np.full((*sides, shape[2]), i, np.uint8)
            if i == broken:
                content, image = damage(image), f"{directory}/broken.png"
                pathlib.Path(image).write_bytes(content)
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
