"""Asks an exported network what is on images.

    Client(SavedModel(EXPORT_DIR)).predict([image_bytes, ...], top=5)
    Client(servers.connect("localhost:8500", "resnet50")).predict_files(paths)

The client cuts what it is asked into batches, has several of them on the way
and sorts the answers out; the network behind it is whatever has `predict`.
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

from keras_resnet.serving import inputs
from keras_resnet.serving import outputs
from keras_resnet.serving import servers
from keras_resnet.serving import versions

# Of images; while they are sent, a batch is in memory up to four times.
MAX_BYTES_IN_FLIGHT = 256_000_000
_MAX_LABELS_BYTES = 2**24


@dataclasses.dataclass(frozen=True)
class Answer:
    """What the network says of one image, or why it says nothing.

    Attributes:
        best: (label, probability) pairs, the most probable first.
        error: None, or a sentence.
    """

    best: tuple[tuple[str, float], ...] = ()
    error: str | None = None


class Network(Protocol):
    """Something that was exported and can be asked."""

    def predict(
        self,
        images: Sequence[bytes],
        stopped: threading.Event | None = None,
    ) -> outputs.Predictions:
        """What it says of encoded images, with the labels of that answer.

        Args:
            images: encoded.
            stopped: once it is set, nobody waits for the answer any more.

        Raises:
            servers.Refused: one of the images cannot be used, so none was.
        """


class SavedModel:
    """An exported directory, in this process.

    Args:
        directory: one version, or a directory of versions: the newest one.

    Raises:
        ValueError: it is neither, or was not written by `export`.
    """

    def __init__(self, directory: str | os.PathLike):
        self.directory = _version_directory(directory)
        # The object that was loaded owns the variables: keep it.
        self._loaded = _load(self.directory)
        self._signature = self._loaded.signatures.get("serving_default")
        path = os.path.join(self.directory, "assets", "labels.txt")
        if not _is_ours(self._signature) or not os.path.exists(path):
            raise ValueError(
                "an exported network has assets/labels.txt and a signature "
                "serving_default from image_bytes to probabilities; received "
                f"{self.directory}, which has not"
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
        """`(height, width, channels)` of what `views` takes."""
        images = self._loaded.signatures.get("images")
        if images is None:
            raise ValueError(f"{self.directory} has no signature images")
        return tuple(images.structured_input_signature[1]["images"].shape[1:])

    def views(self, images) -> tf.Tensor:
        """Probabilities of images that are decoded and cropped already.

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
        """See `Network.predict`; an answer that is computed is not stopped.

        Raises:
            ValueError: the answer is not valid.
        """
        try:
            answer = self._signature(image_bytes=tf.constant(list(images)))
        except tf.errors.InvalidArgumentError as error:
            reason = servers.sentence(error.message)
            raise servers.Refused(reason) from error
        except tf.errors.OpError as error:
            reason = servers.sentence(error.message)
            raise ValueError(f"{self.directory}: {reason}") from error
        try:
            rows = outputs.probabilities(
                answer["probabilities"].numpy(), len(images)
            )
        except ValueError as error:
            raise ValueError(f"{self.directory}: {error}") from error
        self._check_labels(rows.shape[-1])
        return outputs.Predictions(rows, self.labels)


class Client:
    """Asks a network about any number of images.

    Batches on the way have at most `MAX_BYTES_IN_FLIGHT` together, or one image
    that is larger.

    Args:
        network: a `SavedModel`, or what `servers.connect` gives.
        batch_size: how many images are sent at once, at most.
        in_flight: how many batches are on the way at once, at most; a network
            in this process keeps all processors busy with one.
        max_image_bytes: size of the largest file that is read.
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

    def predict(self, images: Sequence[bytes], top: int = 5) -> list[Answer]:
        """One answer an image, in the order of the images.

        An image that the network refuses gets an error; the others are
        answered as if it had not been there.

        Args:
            images: encoded: JPEG, PNG, GIF, BMP or WebP.
            top: how many labels an answer has, at most.

        Raises:
            servers.Unanswered: the network is behind a server that does not
                answer.
        """
        return list(self._in_order(lambda image: image, images, top))

    def predict_files(
        self, names: Sequence[str], top: int = 5
    ) -> Iterator[Answer]:
        """`predict` of what `inputs.read` reads, a few batches at a time."""

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
                future = pool.submit(self._answers, batch, top, stopped)
                pending.append((batch.bytes, future))
                del batch  # which the next one replaces in memory
                while len(pending) >= self._in_flight:
                    yield from next_answers()
            while pending:
                yield from next_answers()
        finally:
            stopped.set()
            pool.shutdown(cancel_futures=True)

    def _has_room(self, pending, batch: "_Batch") -> bool:
        on_the_way = sum(size for size, _ in pending)
        return on_the_way + batch.bytes <= MAX_BYTES_IN_FLIGHT

    def _batches(self, read, items) -> Iterator["_Batch"]:
        """Reads the items, and cuts them by their number and their bytes."""
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

    def _answers(self, batch: "_Batch", top, stopped) -> list[Answer]:
        images = [part for part in batch.parts if isinstance(part, bytes)]
        asked = iter(self._ask(images, top, stopped) if images else [])
        return [
            next(asked) if isinstance(part, bytes) else part
            for part in batch.parts
        ]

    def _ask(self, images: Sequence[bytes], top, stopped) -> list[Answer]:
        try:
            found = self._network.predict(images, stopped)
        except servers.Refused as error:
            if len(images) == 1:
                return [Answer(error=str(error))]
            # One image spoils its batch: halve until it stands alone.
            half = len(images) // 2
            return [
                *self._ask(images[:half], top, stopped),
                *self._ask(images[half:], top, stopped),
            ]
        return [
            Answer(_best(row, found.labels, top)) for row in found.probabilities
        ]


class _Batch:
    """Images, and the answers of what could not be read, in order."""

    def __init__(self):
        self.parts: list[bytes | Answer] = []
        self.bytes = 0

    def add(self, part: "bytes | Answer") -> None:
        self.parts.append(part)
        if isinstance(part, bytes):
            self.bytes += len(part)


def _best(row: np.ndarray, labels: Sequence[str], top: int):
    order = np.argsort(-row, kind="stable")[:top]
    return tuple((labels[i], float(row[i])) for i in order)


def _version_directory(directory: str | os.PathLike) -> str:
    if os.path.isfile(os.path.join(directory, "saved_model.pb")):
        return os.fspath(directory)
    numbered = versions.numbered(directory)
    if not numbered:
        raise ValueError(
            "a SavedModel directory holds saved_model.pb or versions (1, 2, "
            f"...), received {directory}, which holds neither"
        )
    return list(numbered.values())[-1]


def _load(directory: str):
    for folder, _, names in os.walk(directory):
        for name in names:  # TensorFlow would wait for a FIFO
            path = os.path.join(folder, name)
            if not os.path.isfile(path):
                raise ValueError(f"{path} must be a regular file")
    try:
        return tf.saved_model.load(directory)
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
