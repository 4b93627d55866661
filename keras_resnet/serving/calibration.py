"""Ranges of activations in 8 bits, from training images.

Integers of 8 bits have the step s = T / limit for numbers up to T, and numbers
beyond T become T. A small T makes the steps fine, and cuts the largest numbers.
The range of a tensor is the T with the least squared error on the images:

    error(T) = sum over |x| <= T of s^2 / 12  +  sum over |x| > T of (|x| - T)^2

The first sum is the variance of a number that is rounded to a step.
"""

from collections.abc import Callable
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from keras_resnet.serving import int8_kernels

_BATCH_SIZE = 32
_BINS = 2048


class Range(NamedTuple):
    """The range of a tensor in 8 bits.

    Attributes:
        largest: Real number that the largest integer stands for.
        is_signed: Whether the tensor had negative numbers.
    """

    largest: float
    is_signed: bool


def ranges(
    observe: Callable[[tf.Tensor], Sequence[tf.Tensor]],
    image: tf.TensorSpec,
    images: np.ndarray,
) -> list[Range]:
    """Returns the ranges of tensors.

    Args:
        observe: Function from a batch of images to float32 tensors.
        image: Specification of its input.
        images: Images, `[count, height, width, channels]`.

    Raises:
        ValueError: If a tensor has a number that is not finite.
    """

    def extremes(batch):
        tensors = observe(batch)
        return (
            tf.stack([tf.reduce_min(x) for x in tensors]),
            tf.stack([tf.reduce_max(x) for x in tensors]),
        )

    batches = np.split(images, range(_BATCH_SIZE, len(images), _BATCH_SIZE))
    run = _compiled(extremes, image)
    lows, highs = zip(*map(run, batches), strict=True)
    low, high = np.min(lows, 0), np.max(highs, 0)
    largest = np.maximum(-low, high)
    if not np.all(np.isfinite(largest)):
        raise ValueError(
            "the activations of a network in int8 must be finite, received "
            "some on the calibration images that are not"
        )
    largest = np.where(largest > 0.0, largest, 1.0)

    def histograms(batch):
        return tf.stack(
            [
                tf.histogram_fixed_width(tf.abs(x), [0.0, end], _BINS)
                for x, end in zip(observe(batch), largest, strict=True)
            ]
        )

    run = _compiled(histograms, image)
    counts = sum(run(batch).numpy().astype("int64") for batch in batches)
    is_signed = low < 0.0
    return [
        Range(least_error(bins, end, int8_kernels.limit(signed)), bool(signed))
        for bins, end, signed in zip(counts, largest, is_signed, strict=True)
    ]


def _compiled(function, image: tf.TensorSpec):
    """The function of a batch as one graph, which is traced once."""
    concrete = tf.function(
        function, [image], autograph=False
    ).get_concrete_function()
    return lambda batch: concrete(tf.constant(batch))


def least_error(counts: np.ndarray, largest: float, limit: int) -> float:
    """Returns the T with the least squared error of this module's formula.

    Args:
        counts: Histogram of |x| in bins of equal width, from 0 to `largest`.
        largest: The largest |x|.
        limit: The largest integer.

    >>> least_error(np.array([0, 10, 10, 10]), largest=4.0, limit=127)
    4.0
    """
    counts = np.append(counts, 0).astype("float64")
    counts[0] = 0.0  # mostly zeros, which are exact
    ends = np.arange(len(counts)) * (float(largest) / (len(counts) - 1))
    centres = ends + ends[1] / 2.0
    # Sums over the bins from each one to the last.
    above, first, second = (
        np.cumsum((counts * centres**power)[::-1])[::-1] for power in range(3)
    )
    cut = second - 2.0 * ends * first + ends**2 * above
    rounded = (above[0] - above) * (ends / limit) ** 2 / 12.0
    error = (cut + rounded)[1:]
    # The largest of equal ones, as for a tensor of zeros.
    return float(ends[1:][::-1][np.argmin(error[::-1])])
