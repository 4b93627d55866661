"""Predicts images with an exported network.

    Client(SavedModel(EXPORT_DIR)).predict([image_bytes, ...], top=5)
    Client(connect("localhost:8500", "resnet50")).predict_files(paths)

The client splits the images into batches, has several batches in flight, and
returns the answers in order. Its network is any object with `predict`.
"""

import collections
import concurrent.futures
import dataclasses
import os
import threading
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
from typing import Any
from typing import Protocol

import numpy as np
import tensorflow as tf

from keras_resnet.serving import errors
from keras_resnet.serving import inputs
from keras_resnet.serving import outputs
from keras_resnet.serving import saved_model_paths
from keras_resnet.serving import servers
from keras_resnet.serving import versions

# Bytes of images. While a batch is sent, memory holds it up to four times.
MAX_BYTES_IN_FLIGHT = 256_000_000
_MAX_LABELS_BYTES = 2**24


@dataclasses.dataclass(frozen=True)
class Answer:
    """Prediction for one image, or the reason for the error.

    Attributes:
        best: (label, probability) pairs, the most probable first.
        error: None, or a sentence.
    """

    best: tuple[tuple[str, float], ...] = ()
    error: str | None = None


class Network(Protocol):
    """An exported network, on a server or in this process."""

    def predict(
        self,
        images: Sequence[bytes],
        stopped: threading.Event | None = None,
    ) -> outputs.Predictions:
        """Returns the best labels of encoded images, with their scores.

        Args:
            images: Encoded images.
            stopped: Event that ends the wait for a response.

        Raises:
            errors.RejectedError: If the network has no output `status`, and
                rejects the whole batch for one of the images.
        """


class SavedModel:
    """An exported network in this process.

    Args:
        directory: A version, or a directory of versions, whose newest is
            loaded.

    Raises:
        ValueError: If it is neither, or if `export` did not write it.
    """

    def __init__(self, directory: str | os.PathLike):
        self.directory = _version_directory(directory)
        # The loaded object owns the variables, so it is kept.
        self._loaded = _load(self.directory)
        self._signature = self._loaded.signatures.get("serving_default")
        path = os.path.join(self.directory, "assets", "labels.txt")
        if not _is_ours(self._signature) or not os.path.exists(path):
            raise ValueError(
                "an exported network must have assets/labels.txt and a "
                "signature serving_default from image_bytes to probabilities; "
                f"received {self.directory}"
            )
        try:
            content = inputs.read_file(path, _MAX_LABELS_BYTES)
            self.labels = content.decode().splitlines()
        except (OSError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from error
        classes = self._signature.structured_outputs["probabilities"].shape[-1]
        if classes is not None:
            self._check_labels(classes)

    def _check_labels(self, classes: int) -> None:
        if classes != len(self.labels):
            raise ValueError(
                f"{self.directory}: assets/labels.txt must have a line for "
                f"each of the {classes} classes, received {len(self.labels)}"
            )

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """`(height, width, channels)` of the images that `views` takes."""
        images = self._loaded.signatures.get("images")
        if images is None:
            raise ValueError(f"{self.directory} must have the signature images")
        return tuple(images.structured_input_signature[1]["images"].shape[1:])

    def views(self, images) -> tf.Tensor:
        """Returns the probabilities of decoded and cropped images.

        Args:
            images: uint8 `[images, height, width, channels]`.

        Returns:
            float32 `[images, classes]`.
        """
        return self._loaded.signatures["images"](images=images)["probabilities"]

    def predict(
        self,
        images: Sequence[bytes],
        stopped: threading.Event | None = None,
    ) -> outputs.Predictions:
        """See `Network.predict`; `stopped` does not interrupt a computation.

        Raises:
            ValueError: If the outputs are not valid.
        """
        try:
            found = self._signature(image_bytes=tf.constant(list(images)))
        except tf.errors.InvalidArgumentError as error:
            reason = servers.sentence(error.message)
            raise errors.RejectedError(reason) from error
        except tf.errors.OpError as error:
            reason = servers.sentence(error.message)
            raise ValueError(f"{self.directory}: {reason}") from error
        try:
            status = [""] * len(images)
            if "status" in found:
                texts = found["status"].numpy()
                status = outputs.texts("status", texts, len(images))
            rows = outputs.probabilities(
                found["probabilities"].numpy(),
                len(images),
                np.array([not text for text in status]),
            )
        except ValueError as error:
            raise ValueError(f"{self.directory}: {error}") from error
        self._check_labels(rows.shape[-1])
        # The file has all labels, so an answer may have more than `labels`.
        best = np.argsort(-rows, axis=-1, kind="stable")
        return outputs.Predictions(
            [[self.labels[i] for i in row] for row in best],
            np.take_along_axis(rows, best, -1),
            status,
            outputs.missing({*found, "labels", "scores"}),
        )


class Client:
    """Predicts any number of images with a network.

    The batches in flight have at most `MAX_BYTES_IN_FLIGHT` together, except
    for a single image that is larger.

    Args:
        network: A `SavedModel`, or a server of `connection.connect`.
        batch_size: Largest number of images in a batch.
        in_flight: Largest number of batches in flight. For a network in this
            process one is enough: it keeps all processors busy.
        max_image_bytes: Size of the largest file that is read.

    Attributes:
        note: Empty, or a sentence about outputs that the network lacks. It is
            known after the first answer.
    """

    def __init__(
        self,
        network: Network,
        batch_size: int = 32,
        in_flight: int = 1,
        max_image_bytes: int = inputs.MAX_IMAGE_BYTES,
    ):
        for name, value in (
            ("batch_size", batch_size),
            ("in_flight", in_flight),
            ("max_image_bytes", max_image_bytes),
        ):
            if value < 1:
                raise ValueError(f"{name} must be 1 or more, received {value}")
        self._network = network
        self._batch_size = batch_size
        self._in_flight = in_flight
        self._max_image_bytes = max_image_bytes
        self.note = ""

    def predict(self, images: Sequence[bytes], top: int = 5) -> list[Answer]:
        """Returns an answer for each image, in the order of the images.

        An image that the network rejects gets an error, and does not change
        the answers for the other images.

        Args:
            images: Encoded images: JPEG, PNG, GIF, BMP or WebP.
            top: Largest number of labels in an answer. A server returns as
                many as were chosen at the export.

        Raises:
            errors.ServerError: If a server does not return a valid response.
        """
        return list(self._in_order(lambda image: image, images, top))

    def predict_files(
        self, names: Sequence[str], top: int = 5
    ) -> Iterator[Answer]:
        """Reads images with `inputs.read`, and yields their answers."""

        def read(name):
            return inputs.read(name, self._max_image_bytes)

        return self._in_order(read, names, top)

    def _in_order(
        self, read: Callable[[Any], bytes], items: Sequence[Any], top: int
    ) -> Iterator[Answer]:
        stopped = threading.Event()
        pool = concurrent.futures.ThreadPoolExecutor(self._in_flight)
        pending: collections.deque = collections.deque()  # (bytes, future)

        def next_answers():
            answers = pending[0][1].result()
            pending.popleft()
            return answers

        try:
            for batch in self._batches(read, items):
                while pending and not self._has_room(pending, batch):
                    yield from next_answers()
                future = pool.submit(self._answer, batch, top, stopped)
                pending.append((batch.bytes, future))
                del batch  # frees memory for the next one
                while len(pending) >= self._in_flight:
                    yield from next_answers()
            while pending:
                yield from next_answers()
        finally:
            stopped.set()
            pool.shutdown(cancel_futures=True)

    def _has_room(self, pending, batch: "_Batch") -> bool:
        in_flight = sum(size for size, _ in pending)
        return in_flight + batch.bytes <= MAX_BYTES_IN_FLIGHT

    def _batches(self, read, items) -> Iterator["_Batch"]:
        """Reads the items, and splits them by number and bytes."""
        max_bytes = MAX_BYTES_IN_FLIGHT // self._in_flight
        batch = _Batch()
        for item in items:
            try:
                image = read(item)
            except ValueError as error:
                batch.add(Answer(error=str(error)))
            else:
                if batch.bytes and batch.bytes + len(image) > max_bytes:
                    yield batch
                    batch = _Batch()
                batch.add(image)
                del image
            if len(batch.parts) == self._batch_size:
                yield batch
                batch = _Batch()
        if batch.parts:
            yield batch

    def _answer(self, batch: "_Batch", top, stopped) -> list[Answer]:
        images = [part for part in batch.parts if isinstance(part, bytes)]
        predicted = iter(self._predict(images, top, stopped) if images else [])
        return [
            next(predicted) if isinstance(part, bytes) else part
            for part in batch.parts
        ]

    def _predict(self, images: Sequence[bytes], top, stopped) -> list[Answer]:
        try:
            found = self._network.predict(images, stopped)
        except errors.RejectedError as error:
            reason = str(error)
            if len(images) > 1:
                reason = (
                    f"an image of the same batch was rejected: {reason}; "
                    "export the network again, or set the batch size to 1"
                )
            return [Answer(error=reason)] * len(images)
        self.note = self.note or found.note
        return [
            _answer(labels[:top], scores[:top], status)
            for labels, scores, status in zip(
                found.labels, found.scores, found.status, strict=True
            )
        ]


class _Batch:
    """Images, and answers for images that could not be read, in order."""

    def __init__(self):
        self.parts: list[bytes | Answer] = []
        self.bytes = 0

    def add(self, part: "bytes | Answer") -> None:
        self.parts.append(part)
        if isinstance(part, bytes):
            self.bytes += len(part)


def _answer(labels, scores, status) -> Answer:
    if status:
        return Answer(error=status)
    return Answer(tuple(zip(labels, scores.tolist(), strict=True)))


def _version_directory(directory: str | os.PathLike) -> str:
    if os.path.isfile(os.path.join(directory, "saved_model.pb")):
        return os.fspath(directory)
    numbered = versions.numbered(directory)
    if not numbered:
        raise ValueError(
            "a SavedModel directory must hold saved_model.pb or versions (1, "
            f"2, ...), received {directory}, which holds neither"
        )
    return list(numbered.values())[-1]


def _load(directory: str):
    for folder, _, names in os.walk(directory):
        for name in names:  # TensorFlow would wait for a FIFO's writer
            path = os.path.join(folder, name)
            if not os.path.isfile(path):
                raise ValueError(f"{path} must be a regular file")
    try:
        with saved_model_paths.without_wildcards(directory) as path:
            return tf.saved_model.load(path)
    except Exception as error:  # TensorFlow's loader raises any of them
        reason = servers.sentence(str(error)) or type(error).__name__
        raise ValueError(
            f"{directory} must be a SavedModel, received {reason[:200]}"
        ) from error


def _is_ours(signature) -> bool:
    if signature is None:
        return False
    _, taken = signature.structured_input_signature
    found = signature.structured_outputs.get("probabilities")
    return (
        taken.keys() == {"image_bytes"}
        and taken["image_bytes"].dtype == tf.string
        and found is not None
        and found.dtype.is_floating
        and found.shape.rank == 2
    )
