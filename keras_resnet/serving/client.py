"""Asks an exported network what is on images.

    Client(SavedModel(EXPORT_DIR)).predict([image_bytes, ...], top=5)
    Client(servers.connect("localhost:8500", "resnet50")).predict_files(paths)

The client cuts what it is asked into batches, has several of them on the way
and sorts the answers out; the network behind it is whatever has `labels` and
`probabilities`.
"""

import collections
import concurrent.futures
import dataclasses
import os
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
from typing import Any
from typing import Protocol

import numpy as np
import tensorflow as tf

from keras_resnet.serving import inputs
from keras_resnet.serving import servers
from keras_resnet.serving import versions


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

    labels: Sequence[str]

    def probabilities(self, images: Sequence[bytes]) -> np.ndarray:
        """Encoded images -> float32 [images, classes].

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
        self._loaded = tf.saved_model.load(self.directory)
        self._signature = self._loaded.signatures.get("serving_default")
        path = os.path.join(self.directory, "assets", "labels.txt")
        if not _is_ours(self._signature) or not os.path.isfile(path):
            raise ValueError(
                "an exported network has assets/labels.txt and a signature "
                "serving_default from image_bytes to probabilities; received "
                f"{self.directory}, which has not"
            )
        with open(path, encoding="utf-8", newline="\n") as file:
            self.labels = file.read().splitlines()

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """`(height, width, channels)` of what `views` takes."""
        images = self._loaded.signatures["images"]
        return tuple(images.structured_input_signature[1]["images"].shape[1:])

    def views(self, images) -> tf.Tensor:
        """Probabilities of images that are decoded and cropped already.

        Args:
            images: uint8 `[images, height, width, channels]`.

        Returns:
            float32 `[images, classes]`.
        """
        return self._loaded.signatures["images"](images=images)["probabilities"]

    def probabilities(self, images: Sequence[bytes]) -> np.ndarray:
        """See `Network.probabilities`."""
        try:
            answer = self._signature(image_bytes=tf.constant(list(images)))
        except tf.errors.InvalidArgumentError as error:
            reason = servers.sentence(error.message)
            raise servers.Refused(reason) from error
        return answer["probabilities"].numpy()


class Client:
    """Asks a network about any number of images.

    Args:
        network: a `SavedModel`, or what `servers.connect` gives.
        batch_size: how many images are sent at once, at most.
        in_flight: how many batches are on the way at once, at most; a network
            in this process keeps all processors busy with one.
    """

    def __init__(self, network: Network, batch_size: int = 32, in_flight=1):
        for name, value in (
            ("batch_size", batch_size),
            ("in_flight", in_flight),
        ):
            if value < 1:
                raise ValueError(f"{name} must be 1 or more, received {value}")
        self._network = network
        self._batch_size = batch_size
        self._in_flight = in_flight

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
        return self._in_order(inputs.read, names, top)

    def _in_order(
        self, read: Callable[[Any], bytes], items: Sequence[Any], top: int
    ) -> Iterator[Answer]:
        with concurrent.futures.ThreadPoolExecutor(self._in_flight) as pool:
            pending: collections.deque = collections.deque()
            try:
                for start in range(0, len(items), self._batch_size):
                    batch = items[start : start + self._batch_size]
                    pending.append(
                        pool.submit(self._read_and_ask, read, batch, top)
                    )
                    if len(pending) >= self._in_flight:
                        yield from pending.popleft().result()
                while pending:
                    yield from pending.popleft().result()
            finally:
                for future in pending:
                    future.cancel()

    def _read_and_ask(self, read, batch, top) -> list[Answer]:
        answers: list[Answer | None] = []
        images = []
        for item in batch:
            try:
                images.append(read(item))
                answers.append(None)
            except (OSError, ValueError) as error:
                reason = getattr(error, "strerror", None) or str(error)
                answers.append(Answer(error=reason))
        asked = iter(self._ask(images, top) if images else [])
        return [answer or next(asked) for answer in answers]

    def _ask(self, images: Sequence[bytes], top: int) -> list[Answer]:
        try:
            probabilities = self._network.probabilities(images)
        except servers.Refused as error:
            if len(images) == 1:
                return [Answer(error=str(error))]
            # One image spoils its batch: halve until it stands alone.
            half = len(images) // 2
            return self._ask(images[:half], top) + self._ask(images[half:], top)
        labels = self._network.labels
        return [Answer(_best(row, labels, top)) for row in probabilities]


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


def _is_ours(signature) -> bool:
    return (
        signature is not None
        and "image_bytes" in signature.structured_input_signature[1]
        and "probabilities" in signature.structured_outputs
    )
