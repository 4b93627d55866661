"""The data sets of the package itself: `digits` and `synthetic`."""

import importlib.resources
import math

import numpy as np

from keras_resnet.data import splits

# Largest size of the images of `synthetic`, which are held in memory.
_SYNTHETIC_BYTES = 2**32


def digits() -> splits.Source:
    """Returns 1,797 handwritten digits, grey images of 8 x 8 pixels."""
    file = importlib.resources.files(__package__) / "digits.npz"
    with file.open("rb") as opened, np.load(opened) as arrays:
        images, labels = arrays["images"], arrays["labels"]
    # 0 ... 16 pen strokes become 0 ... 255, rounded.
    images = np.round(images[..., None] * (255 / 16)).astype(np.uint8)
    # Every fifth image of each class, in the published order, is for test.
    nth = np.array([np.sum(labels[:i] == c) for i, c in enumerate(labels)])
    is_test = nth % 5 == 4

    def read(split):
        chosen = is_test if split == "test" else ~is_test
        return splits.Memory(images[chosen], labels[chosen])

    names = [str(digit) for digit in range(10)]
    return splits.Source(names, read, images.shape[1:])


def synthetic(size: int) -> splits.Source:
    """Draws ten classes of 4 x 4 coloured squares, half covered by noise.

    Args:
        size: Height and width of the images, in pixels.

    Raises:
        ValueError: If the images are too large for memory.
    """
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
        return splits.Memory(images, labels)

    names = [str(label) for label in range(10)]
    return splits.Source(names, read, (size, size, 3))
