"""A model of a TensorFlow Serving program, over any protocol.

`connection.connect` returns a server; `grpc_servers` and `rest_servers` have
the protocols.

A server that is down, too busy, or silent until the deadline gets the request
again, after a pause that doubles. A prediction can safely be
computed twice. Every other error of a server is raised at once.

`outputs` checks every response. Its labels come with its probabilities, so they
are those of the version that computed it.
"""

import abc
import dataclasses
import random
import re
import threading
from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any
from typing import TypeVar

from keras_resnet import names
from keras_resnet.serving import errors
from keras_resnet.serving import http_client
from keras_resnet.serving import outputs

T = TypeVar("T")

# 32 images of 22,000 classes are 10 MB of JSON.
MAX_RESPONSE_BYTES = 2**24

_RETRIED_CODES = (
    "UNAVAILABLE",
    "DEADLINE_EXCEEDED",
    "RESOURCE_EXHAUSTED",
)
_FIRST_PAUSE_SECONDS = 0.1
_MAX_REASON_CHARACTERS = 500
_OUTPUTS = ("probabilities", "classes", "labels", "scores", "status")
_NO_SIGNATURE = "keras_resnet_no_signature"  # which no model has
# TensorFlow Serving reports these with INVALID_ARGUMENT, at least over REST,
# although no image is invalid: the beginning of the message, a better code.
_MODEL_ERRORS = {
    "Unrecognized servable version label": "NOT_FOUND",
    "Serving signature": "FAILED_PRECONDITION",
    "input size does not match signature": "FAILED_PRECONDITION",
}


@dataclasses.dataclass(frozen=True)
class ServedModel:
    """A model of a server, with its timeout and retry settings.

    Attributes:
        name: Name of the model on the server.
        version: A number, a label such as "canary", or None for the server's
            choice, the newest version.
        timeout_seconds: Deadline of a request, from its connection to the end
            of its response.
        attempts: Largest number of times that a request is sent.
    """

    name: str
    version: str | None = None
    timeout_seconds: float = 10.0
    attempts: int = 6


def version_number(version: str) -> int | None:
    """Returns the number of a version, or None if it is a label.

    >>> version_number("12"), version_number("canary")
    (12, None)
    """
    if re.fullmatch("[0-9]{1,19}", version) and int(version) < 2**63:
        return int(version)
    return None


class Server(abc.ABC):
    """A model of a server, with the interface of `client.Network`.

    Args:
        address: Address of the server.
        model: The served model.
    """

    def __init__(self, address: str, model: ServedModel):
        self.address = address
        self.model = model
        self._version = version_number(model.version or "")
        self._label = model.version if self._version is None else None

    def predict(
        self,
        images: Sequence[bytes],
        stopped: threading.Event | None = None,
    ) -> outputs.Predictions:
        """See `client.Network`. Several threads may call this method.

        It returns or raises within `attempts` times the timeout, plus the
        pauses between the attempts.

        Raises:
            errors.RejectedError: If the network rejects one of the images.
            errors.ServerError: If the server or its model does not exist, or
                if the response is not valid.
        """
        stopped = stopped or threading.Event()
        for attempt in range(self.model.attempts):
            try:
                return self._attempt(self._predict, images, stopped)
            except errors.ServerError as error:
                is_last = attempt + 1 == self.model.attempts
                if is_last or error.code not in _RETRIED_CODES:
                    raise
            if stopped.wait(_pause_seconds(attempt)):
                raise self._error("CANCELLED", "the request was stopped")
        raise AssertionError("attempts must be 1 or more")

    def reject(
        self,
        images: Sequence[bytes],
        stopped: threading.Event | None = None,
    ) -> None:
        """Sends images to a signature that does not exist.

        The server receives the request and parses it, and reports the missing
        signature before it computes anything. The time of this method is the
        protocol's share of a prediction.

        Raises:
            errors.ServerError: If the server does not report the signature.
        """
        try:
            self._attempt(self._rejected, images, stopped or threading.Event())
        except errors.ServerError as error:
            if error.code != "FAILED_PRECONDITION":
                raise

    def _rejected(
        self, images: Sequence[bytes], deadline: http_client.Deadline
    ) -> None:
        self._send(images, deadline, _NO_SIGNATURE)
        raise http_client.InvalidResponse(
            f"it must report that the signature {_NO_SIGNATURE} is missing"
        )

    def _attempt(
        self,
        send: Callable[[Sequence[bytes], http_client.Deadline], T],
        images: Sequence[bytes],
        stopped: threading.Event,
    ) -> T:
        deadline = http_client.Deadline(self.model.timeout_seconds, stopped)
        try:
            return send(images, deadline)
        except TimeoutError as error:
            raise self._error("DEADLINE_EXCEEDED", str(error)) from error
        except http_client.Stopped as error:
            raise self._error("CANCELLED", str(error)) from error
        except (http_client.InvalidResponse, ValueError) as error:
            raise self._error("DATA_LOSS", str(error)) from error

    def _predict(
        self, images: Sequence[bytes], deadline: http_client.Deadline
    ) -> outputs.Predictions:
        found = self._send(images, deadline)
        lacking = {"probabilities", "classes"} - found.keys()
        if lacking:
            raise self._error(
                "FAILED_PRECONDITION",
                "serving_default must return probabilities and classes, "
                f"received {', '.join(sorted(found)) or 'nothing'}",
            )
        values = {
            name: self._values(found[name])
            for name in _OUTPUTS
            if name in found
        }
        return outputs.predictions(values, len(images))

    @abc.abstractmethod
    def _send(
        self,
        images: Sequence[bytes],
        deadline: http_client.Deadline,
        signature: str = "serving_default",
    ) -> Mapping[str, Any]:
        """Sends one request; returns the outputs of the signature."""

    def _values(self, output: Any) -> Any:
        """Returns an output in the form that `outputs` checks.

        Raises:
            ValueError: If it is not an array.
        """
        return output

    def _error(self, code: str, message: str) -> Exception:
        """Returns the exception for an error code and its message."""
        reason = message[:_MAX_REASON_CHARACTERS]
        if reason != message:
            reason += "..."
        if code == "INVALID_ARGUMENT":
            codes = [
                better
                for beginning, better in _MODEL_ERRORS.items()
                if reason.startswith(beginning)
            ]
            if not codes:
                return errors.RejectedError(reason)
            code = codes[0]
        name = self.model.name
        if self.model.version is not None:
            name += f", version {self.model.version}"
        attempts = self.model.attempts
        advice = {
            "NOT_FOUND": "the model or version does not exist",
            "FAILED_PRECONDITION": "apps.export did not write this model",
            "DATA_LOSS": "the response is not valid",
            "UNAVAILABLE": f"failed {attempts} times",
            "DEADLINE_EXCEEDED": (
                f"no response within {self.model.timeout_seconds:g} seconds, "
                f"in {attempts} attempts"
            ),
        }.get(code, "the request failed")
        return errors.ServerError(
            code, f"{self.address} ({name}): {code}: {advice}: {reason}"
        )


def _pause_seconds(attempt: int) -> float:
    """Doubles; random, so that rejected clients do not return together."""
    return _FIRST_PAUSE_SECONDS * 2**attempt * random.uniform(0.5, 1.5)


def sentence(message: str) -> str:
    r"""Returns the sentence in the middle of one of TensorFlow's messages.

    The result is one line, with control characters escaped.

    >>> sentence("Graph execution error:\n\nNo.\n\t [[{{node n}}]] [Op:f]")
    'No.'
    """
    found = message.split("\n\t [[")[0].strip()
    if re.match("Graph execution error|[0-9]+ root error", found):
        found = found.split("\n")[-1]
    found = names.escaped(found[: 2 * _MAX_REASON_CHARACTERS])
    if found.startswith("assertion failed: "):
        found = re.sub(r"[][]", "", found.removeprefix("assertion failed: "))
    return found
