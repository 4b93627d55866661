"""Writes docs/augmentation/*.jpg: training images as the network sees them.

    python docs/contact_sheets.py

The photos are china.jpg and flower.jpg of scikit-learn, and tests/cat.png.
"""

import pathlib
import shutil
import sys
import tempfile

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parent.parent
OUTPUT = ROOT / "docs" / "augmentation"

SIZE = 72  # of an image, in pixels
GAP = 4
COLUMNS, ROWS = 6, 2

# The fields of the augmentation of each sheet, and the images of a batch. All
# images of a batch are mixed with the same share, so a batch has one pair.
SHEETS: dict[str, tuple[dict, int]] = {
    "scale_aspect": ({"name": "scale_aspect"}, 12),
    "trivial_augment_wide": ({"policy": "trivial_augment_wide"}, 12),
    "rand_augment_9": ({"policy": "rand_augment_9"}, 12),
    "colour_jitter": ({"colour_jitter": 0.4}, 12),
    "erasing": ({"erase_probability": 1.0}, 12),
    "mixup": ({"mixup_alpha": 1.0}, 2),
    "cutmix": ({"cutmix_alpha": 1.0}, 2),
}


def photos(folder: pathlib.Path) -> None:
    """Writes the photos as a folder of training and test images."""
    import sklearn.datasets

    sources = pathlib.Path(sklearn.datasets.__file__).parent / "images"
    for split in ("train", "test"):
        for path in (
            sources / "china.jpg",
            sources / "flower.jpg",
            ROOT / "tests" / "cat.png",
        ):
            place = folder / split / path.stem / path.name
            place.parent.mkdir(parents=True)
            shutil.copyfile(path, place)


def images(dataset, fields: dict, batch_size: int) -> np.ndarray:
    """Returns uint8 images of the first batches, `[count, SIZE, SIZE, 3]`."""
    from keras_resnet.data import augmentation

    batches = dataset.train_batches(
        batch_size, seed=4, augmentation=augmentation.Augmentation(**fields)
    )
    seen = [
        batch[0].numpy() for batch in batches.take(COLUMNS * ROWS // batch_size)
    ]
    preprocessing = dataset.preprocessing
    pixels = np.concatenate(seen) * preprocessing.standard_deviation
    return np.uint8(255 * np.clip(pixels + preprocessing.mean, 0, 1) + 0.5)


def sheet(tiles: np.ndarray) -> np.ndarray:
    """Returns the images side by side, in rows, on white."""
    step = SIZE + GAP
    page = np.full((ROWS * step - GAP, COLUMNS * step - GAP, 3), 255, np.uint8)
    for i, tile in enumerate(tiles):
        top, left = i // COLUMNS * step, i % COLUMNS * step
        page[top : top + SIZE, left : left + SIZE] = tile
    return page


def main() -> None:
    """Writes all sheets."""
    import tensorflow as tf

    from keras_resnet import atomic
    from keras_resnet.data import datasets

    OUTPUT.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        photos(pathlib.Path(folder))
        dataset = datasets.load(f"folder:{folder}", image_size=SIZE)
        for name, (fields, batch_size) in SHEETS.items():
            page = sheet(images(dataset, fields, batch_size))
            content = tf.io.encode_jpeg(page, quality=72).numpy()
            atomic.write(OUTPUT / f"{name}.jpg", content)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
