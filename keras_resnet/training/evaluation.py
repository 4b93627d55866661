"""The error of a network on test images, every image counted once."""

import csv
import dataclasses
import io
import math
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Sequence

import keras
import numpy as np
import tensorflow as tf

from keras_resnet.data import datasets
from keras_resnet.training import step
from keras_resnet.training import strategies


@dataclasses.dataclass(frozen=True, eq=False)
class Answers:
    """The answers of a network for test images, in their order.

    Attributes:
        labels: int32 `[images]`: the true classes.
        predictions: int32 `[images]`: the best classes.
        probabilities: float32 `[images]`: the probabilities of the best
            classes.
    """

    labels: np.ndarray
    predictions: np.ndarray
    probabilities: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Evaluation:
    """The errors of a network on a set of images.

    Attributes:
        images: Number of images, each counted once.
        top1_errors: Images whose best class is not their label.
        top5_errors: Images whose label is not among the best five classes.
        loss: Mean cross entropy, in nats.
        confusion: int64 `[classes, classes]`: number of images of a label (row)
            with a predicted class (column); empty unless requested.
        answers: The answer for each image; None unless requested.
    """

    images: int
    top1_errors: int
    top5_errors: int
    loss: float
    confusion: np.ndarray = dataclasses.field(
        default_factory=lambda: np.zeros([0, 0], "int64")
    )
    answers: Answers | None = None

    @property
    def top1_error(self) -> float:
        """Top-1 error in percent."""
        return 100.0 * self.top1_errors / self.images

    @property
    def top5_error(self) -> float:
        """Top-5 error in percent."""
        return 100.0 * self.top5_errors / self.images

    def to_json(self) -> dict:
        """Returns the numbers for JSON, with the errors in percent."""
        return {
            "images": self.images,
            "top1_errors": self.top1_errors,
            "top5_errors": self.top5_errors,
            "loss": self.loss,
            "top1_error": self.top1_error,
            "top5_error": self.top5_error,
        }

    def per_class(self, labels: Sequence[str]) -> dict[str, dict[str, int]]:
        """Returns the number of images and of errors of each label."""
        images = self.confusion.sum(axis=1)
        errors = images - self.confusion.diagonal()
        return {
            label: {"images": int(n), "top1_errors": int(wrong)}
            for label, n, wrong in zip(labels, images, errors, strict=True)
        }

    def confusion_csv(self, labels: Sequence[str]) -> str:
        """Returns a row for each label, a column for each predicted class."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["label", *labels])
        for label, row in zip(labels, self.confusion.tolist(), strict=True):
            writer.writerow([label, *row])
        return text.getvalue()


def any_size(model: keras.Model, side: int | None = None) -> keras.Model:
    """Returns the network for images of any size, with the same weights.

    Args:
        model: A network that is convolutional up to its global pooling.
        side: Height and width of the images; None for any.
    """
    image = keras.Input((side, side, model.input_shape[-1]))
    return keras.models.clone_model(
        model, input_tensors=image, clone_function=lambda layer: layer
    )


def average(predict: Callable, views) -> tf.Tensor:
    """Returns `log(mean of softmax(logits))` over the views of an image.

    Args:
        predict: Function from `n` images to logits or log probabilities
            `[n, classes]`.
        views: `[batch, height, width, channels]`, with an axis of crops after
            the first if there are several; or a tuple, one for each scale.

    Returns:
        float32 `[batch, classes]`: log probabilities; of a single view, the
        result of `predict`.
    """
    if isinstance(views, tuple):
        scores = [_log_probabilities(predict(view)) for view in views]
        return _log_mean(tf.stack(scores, axis=1))
    if views.shape.rank != 5:
        return tf.cast(predict(views), "float32")
    count = views.shape[1]
    logits = predict(tf.reshape(views, [-1, *views.shape[2:]]))
    scores = _log_probabilities(logits)
    return _log_mean(tf.reshape(scores, [-1, count, scores.shape[-1]]))


def _log_probabilities(logits):
    return tf.nn.log_softmax(tf.cast(logits, "float32"))


def _log_mean(scores):
    """Returns `log(mean(exp(scores)))` over the views, without underflow."""
    return tf.reduce_logsumexp(scores, axis=1) - math.log(scores.shape[1])


class Evaluator:
    """Evaluates a network on all devices, with its current weights.

    Args:
        predict: Function from images to logits `[batch, classes]`, or to log
            probabilities.
        strategy: The strategy under which the network was built; None for one
            device.
    """

    def __init__(
        self, predict: Callable, strategy: tf.distribute.Strategy | None = None
    ):
        self.predict = predict
        self.strategy = strategy or tf.distribute.get_strategy()
        self._step = tf.function(self._sums)

    def __call__(
        self,
        dataset: datasets.DataSet,
        batch_size: int,
        protocol: str = "single",
        counts_classes: bool = False,
        stop_requested: Callable[[], bool] = lambda: False,
        progress: Callable[[int], None] = lambda images: None,
    ) -> Evaluation | None:
        """Evaluates on the test images of a data set, each counted once.

        Args:
            dataset: The data set of the images.
            batch_size: Images in a batch of all devices together. It is
                rounded up, so that all shares have one size. Photos of several
                scales are evaluated one by one.
            protocol: A name in `PROTOCOLS` of `keras_resnet.data`; the softmax
                scores of several views are averaged.
            counts_classes: Whether the result has a confusion matrix and, in a
                single process, the answers.
            stop_requested: Function that returns whether this worker was asked
                to stop.
            progress: Receives the number of images of each batch.

        Returns:
            An `Evaluation`, or None if a worker was asked to stop.

        Raises:
            ValueError: If the data set has no test images.
        """
        devices = self.strategy.num_replicas_in_sync
        is_shared = protocol == "multi_scale" and dataset.has_photos
        if is_shared:
            batch_size = 1
        batch_size = min(
            batch_size, dataset.test_size
        )  # or a batch would be padding only
        batch_size = -(-batch_size // devices) * devices
        batches = strategies.distributed(
            self.strategy,
            lambda shard: dataset.padded_test_batches(
                batch_size, shard, protocol
            ),
            is_shared,
        )
        classes = dataset.classes if counts_classes else 0
        total = _Total(classes)
        for _ in range(-(-dataset.test_size // batch_size)):
            asked = tf.constant(float(stop_requested()))
            try:
                parts, rows = self._step(batches, asked, classes)
                rows = [self._local(row) for row in rows]
            except datasets.UNREADABLE:
                dataset.check()  # names the image that does not decode
                raise
            *sums, stops = parts[0].numpy().tolist()
            if stops:
                return None
            confusion = parts[1].numpy() if classes else 0
            total.add(sums, confusion, rows)
            progress(int(sums[3]))
        return total.evaluation()

    def _sums(self, batches, asked, classes):
        def replica(views, labels, counted):
            logits = average(self.predict, views)
            sums = step.count_errors(logits, labels, counted)
            parts = [tf.concat([sums, [asked]], 0)]
            if not classes:
                return parts, ()
            best = tf.argmax(logits, -1, tf.int32)
            parts.append(
                tf.math.confusion_matrix(
                    labels, best, classes, counted, "float32"
                )
            )
            highest = tf.reduce_max(tf.nn.softmax(logits), -1)
            return parts, (counted, labels, best, highest)

        parts, rows = self.strategy.run(replica, next(batches))
        sums = [self.strategy.reduce("SUM", part, axis=None) for part in parts]
        return sums, rows

    def _local(self, row):
        """Returns a row of each image of a batch, of all local devices."""
        parts = self.strategy.experimental_local_results(row)
        return np.concatenate([part.numpy() for part in parts])


class _Total:
    """Sums of `step.count_errors` over batches."""

    def __init__(self, classes=0):
        self.sums = np.zeros(4)
        self.confusion = np.zeros([classes, classes], "int64")
        self.rows = []

    def add(self, sums, confusion=0, rows=()):
        self.sums += sums
        self.confusion += np.asarray(confusion, "int64")
        if rows:
            counted, *rows = rows
            self.rows.append([row[counted > 0] for row in rows])

    def evaluation(self):
        loss, top1_errors, top5_errors, images = self.sums.tolist()
        if not images:
            raise ValueError(
                "evaluation must have at least one test image, received none"
            )
        return Evaluation(
            int(images),
            int(top1_errors),
            int(top5_errors),
            loss / images,
            self.confusion,
            self._answers(),
        )

    def _answers(self):
        if not self.rows:
            return None
        columns = zip(*self.rows, strict=True)
        return Answers(*map(np.concatenate, columns))


def evaluate(predict: Callable, batches: Iterable) -> Evaluation:
    """Returns the errors of a network on one device.

    Args:
        predict: Function from images to logits `[batch, classes]`, or to log
            probabilities.
        batches: Pairs `(images, labels)`, as of `DataSet.test_batches`.

    Returns:
        An `Evaluation`.

    Raises:
        ValueError: If the batches are empty.
    """

    @tf.function(reduce_retracing=True)
    def sums(images, labels):
        counted = tf.ones_like(labels, "float32")
        return step.count_errors(average(predict, images), labels, counted)

    total = _Total()
    for batch in batches:
        total.add(sums(*batch).numpy())
    return total.evaluation()
