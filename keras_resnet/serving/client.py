"""Asks an exported network what is on images.

    Client(SavedModel(EXPORT_DIR)).predict([image_bytes, ...], top=5)

The client cuts what it is asked into batches and sorts the answers out; the
network behind it is whatever has `labels` and `probabilities`.
"""

import dataclasses
import os
from collections.abc import Iterator
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import tensorflow as tf

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


class Refused(Exception):
    """The network does not take these images, whenever it is asked."""


class Network(Protocol):
    """Something that was exported and can be asked."""

    labels: Sequence[str]

    def probabilities(self, images: Sequence[bytes]) -> np.ndarray:
        """Encoded images -> float32 [images, classes].

        Raises:
            Refused: one of the images cannot be used, so none was.
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
            raise Refused(_reason(error.message)) from error
        return answer["probabilities"].numpy()


class Client:
    """Asks a network about any number of images.

    Args:
        network: for instance a `SavedModel`.
        batch_size: how many images are sent at once, at most.
    """

    def __init__(self, network: Network, batch_size: int = 32):
        if batch_size < 1:
            raise ValueError(
                f"batch_size must be 1 or more, received {batch_size}"
            )
        self._network = network
        self._batch_size = batch_size

    def predict(self, images: Sequence[bytes], top: int = 5) -> list[Answer]:
        """One answer an image, in the order of the images.

        An image that the network refuses gets an error; the others are
        answered as if it had not been there.

        Args:
            images: encoded: JPEG, PNG, GIF, BMP or WebP.
            top: how many labels an answer has, at most.
        """
        answers: list[Answer] = []
        for batch in self._batches(images):
            answers += self._ask(batch, top)
        return answers

    def predict_files(
        self, paths: Sequence[str], top: int = 5
    ) -> Iterator[Answer]:
        """`predict` of files, of which one batch at a time is read."""
        for batch in self._batches(paths):
            contents = [_read(path) for path in batch]
            answers = iter(
                self.predict([c for c in contents if isinstance(c, bytes)], top)
            )
            for content in contents:
                yield next(answers) if isinstance(content, bytes) else content

    def _batches(self, items):
        for start in range(0, len(items), self._batch_size):
            yield items[start : start + self._batch_size]

    def _ask(self, images: Sequence[bytes], top: int) -> list[Answer]:
        try:
            probabilities = self._network.probabilities(images)
        except Refused as error:
            if len(images) == 1:
                return [Answer(error=str(error))]
            # One image spoils its batch: halve until it stands alone.
            half = len(images) // 2
            return self._ask(images[:half], top) + self._ask(images[half:], top)
        return [Answer(self._best(row, top)) for row in probabilities]

    def _best(self, row: np.ndarray, top: int):
        order = np.argsort(-row, kind="stable")[:top]
        return tuple((self._network.labels[i], float(row[i])) for i in order)


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


def _read(path: str) -> bytes | Answer:
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        return Answer(error=error.strerror)


def _reason(message: str) -> str:
    r"""The sentence in the middle of one of TensorFlow's messages.

    >>> _reason("Graph execution error:\n\nNo.\n\t [[{{node n}}]] [Op:f]")
    'No.'
    """
    sentence = message.split("\n\t [[")[0].split("\n")[-1]
    return sentence.removeprefix("assertion failed: ").translate(
        str.maketrans("", "", "[]")
    )
