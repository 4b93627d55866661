"""The error of a network on test images, every image counted once."""

import dataclasses
from collections.abc import Callable
from collections.abc import Iterable

import keras
import tensorflow as tf


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What a network got wrong.

    Attributes:
        images: Number of images, each counted once.
        top1_errors: Images whose best class is not their label.
        top5_errors: Images whose label is not among the best five classes.
        loss: Mean cross entropy, in nats.
    """

    images: int
    top1_errors: int
    top5_errors: int
    loss: float

    @property
    def top1_error(self) -> float:
        """In percent."""
        return 100.0 * self.top1_errors / self.images

    @property
    def top5_error(self) -> float:
        """In percent."""
        return 100.0 * self.top5_errors / self.images


def count_errors(logits, labels, counted):
    """Sums over a batch: loss, top-1 errors, top-5 errors, images.

    Args:
        logits: `[batch, classes]`, float32.
        labels: `[batch]`, int32.
        counted: `[batch]`, float32: 1 for an image, 0 for padding.

    Returns:
        A float32 tensor of shape `[4]`.
    """
    losses = keras.ops.sparse_categorical_crossentropy(
        labels, logits, from_logits=True
    )
    k = min(5, logits.shape[-1])
    correct1 = tf.cast(tf.math.in_top_k(labels, logits, 1), "float32")
    correct5 = tf.cast(tf.math.in_top_k(labels, logits, k), "float32")
    # Padding may hold anything, NaN too: 0 * NaN must not reach the sum.
    losses = tf.where(counted > 0, losses, 0.0)
    return tf.stack(
        [
            tf.reduce_sum(losses),
            tf.reduce_sum(counted * (1.0 - correct1)),
            tf.reduce_sum(counted * (1.0 - correct5)),
            tf.reduce_sum(counted),
        ]
    )


def make_evaluator(predict: Callable, strategy: tf.distribute.Strategy):
    """A function that evaluates a network as it is when called.

    Args:
        predict: Gives the logits `[batch, classes]` of images; log
            probabilities will do.
        strategy: The strategy under which the network was made.

    Returns:
        A function from batches `(images, labels, counted)` to an
        `Evaluation`; it is traced once.
    """

    @tf.function(reduce_retracing=True)
    def step(images, labels, counted):
        def replica(images, labels, counted):
            logits = tf.cast(predict(images), "float32")
            return count_errors(logits, labels, counted)

        sums = strategy.run(replica, (images, labels, counted))
        return strategy.reduce("SUM", sums, axis=None)

    def evaluate(batches: Iterable) -> Evaluation:
        total = [0.0] * 4
        for images, labels, counted in batches:
            sums = step(images, labels, counted).numpy().tolist()
            total = [a + b for a, b in zip(total, sums, strict=True)]
        loss, top1_errors, top5_errors, images = total
        if not images:
            raise ValueError("there are no test images to evaluate on")
        return Evaluation(
            int(images), int(top1_errors), int(top5_errors), loss / images
        )

    return evaluate


def evaluate(predict: Callable, batches: Iterable) -> Evaluation:
    """The errors of a network on one device.

    Args:
        predict: Gives the logits `[batch, classes]` of images; log
            probabilities will do.
        batches: `(images, labels, counted)` as `DataSet.test_batches` has
            them; `counted` is 0 where the last batch is padded.

    Returns:
        An `Evaluation`.

    Raises:
        ValueError: If there are no images.
    """
    return make_evaluator(predict, tf.distribute.get_strategy())(batches)
