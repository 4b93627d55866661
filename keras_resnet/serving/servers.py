"""Networks behind the address of a TensorFlow Serving program.

    connect("localhost:8500", "resnet50")          gRPC
    connect("http://localhost:8501", "resnet50")   REST

A question is asked again, after a pause that doubles, where the server is not
there, too busy, or silent for longer than the deadline: to answer twice does no
harm. Everything else that a server says is an error at once.

gRPC needs the package tensorflow-serving-api; REST and networks in this process
(`client.SavedModel`) do not.
"""

import abc
import base64
import dataclasses
import random
import threading
import time
from collections.abc import Mapping
from collections.abc import Sequence

import numpy as np
import requests
import tensorflow as tf

_RETRIED = ("UNAVAILABLE", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED")
_FIRST_PAUSE_SECONDS = 0.1
# What gRPC calls the codes of HTTP that TensorFlow Serving answers with.
_CODES = {
    400: "INVALID_ARGUMENT",
    404: "NOT_FOUND",
    429: "RESOURCE_EXHAUSTED",
    503: "UNAVAILABLE",
    504: "DEADLINE_EXCEEDED",
}
_REST_PORT = 8501  # of TensorFlow Serving's image
# What TensorFlow Serving calls INVALID_ARGUMENT, over REST at least, and is
# not the fault of an image: the beginning of what it says, and the better code.
_OF_THE_MODEL = {
    "Unrecognized servable version label": "NOT_FOUND",
    "Serving signature": "FAILED_PRECONDITION",
    "input size does not match signature": "FAILED_PRECONDITION",
}


class Refused(Exception):
    """The network does not take these images, whenever it is asked."""


class Unanswered(OSError):
    """A server gave no answer; says which, why, and what may help.

    Attributes:
        code: as gRPC names it, such as "NOT_FOUND".
    """

    def __init__(self, code: str, message: str):
        super().__init__(message)
        self.code = code


@dataclasses.dataclass(frozen=True)
class Model:
    """Which model of a server, and how patiently it is asked.

    Attributes:
        name: what the server calls it.
        version: a number, a label such as "canary", or None: the server's
            choice, the newest.
        timeout_seconds: until a question counts as unanswered.
        attempts: how often it is asked in all.
    """

    name: str
    version: str | None = None
    timeout_seconds: float = 10.0
    attempts: int = 6


def connect(
    address: str,
    model_name: str,
    version: str | None = None,
    timeout_seconds: float = 10.0,
    attempts: int = 6,
) -> "Server":
    """The network of a server.

    Args:
        address: `HOST:PORT` is gRPC; `http://HOST:PORT`, `https://HOST:PORT`
            and port 8501 are REST.
        model_name: what the server calls the network.
        version: a number, a label, or None: the newest.
        timeout_seconds: until a question counts as unanswered.
        attempts: how often a question is asked in all.

    Raises:
        ValueError: this is no address; or the package that gRPC needs is not
            installed.
    """
    if timeout_seconds <= 0 or attempts < 1:
        raise ValueError(
            "the timeout must be above 0 seconds and the attempts 1 or more, "
            f"received {timeout_seconds} and {attempts}"
        )
    model = Model(model_name, version, timeout_seconds, attempts)
    scheme, separator, place = address.rpartition("://")
    host, _, port = place.rstrip("/").partition("/")[0].rpartition(":")
    has_port = port.isdigit() and 0 < int(port) < 2**16
    if not host or not has_port or scheme not in ("", "http", "https"):
        raise ValueError(
            "a server is HOST:PORT (gRPC, 8500) or http://HOST:PORT (REST, "
            f"8501), received {address!r}"
        )
    if separator or int(port) == _REST_PORT:
        return RestServer(address if separator else f"http://{place}", model)
    return GrpcServer(place, model)


class Server(abc.ABC):
    """A model of a server; `labels` and `probabilities` as a network has."""

    def __init__(self, address: str, model: Model):
        self.address = address
        self.model = model
        self._labels: Sequence[str] | None = None
        self._lock = threading.Lock()

    @property
    def labels(self) -> Sequence[str]:
        """The label of each class, as the last answers had them."""
        return self._labels or ()

    def probabilities(self, images: Sequence[bytes]) -> np.ndarray:
        """See `client.Network`; may be called by several threads.

        Raises:
            Refused: one of the images cannot be used, so none was.
            Unanswered: the server, or its model, is not there.
        """
        outputs = self.ask("serving_default", {"image_bytes": images})
        if not outputs.keys() >= {"probabilities", "classes"}:
            raise self._error(
                "FAILED_PRECONDITION",
                f"serving_default answers with {', '.join(sorted(outputs))}",
            )
        rows = np.asarray(outputs["probabilities"], np.float32)
        self._check_labels(rows, outputs["classes"])
        return rows

    def ask(
        self, signature: str, inputs: Mapping[str, Sequence[bytes]]
    ) -> dict[str, list]:
        """The outputs of a signature, asked again where that may help."""
        for attempt in range(self.model.attempts):
            try:
                return self._ask(signature, inputs)
            except Unanswered as error:
                is_last = attempt + 1 == self.model.attempts
                if is_last or error.code not in _RETRIED:
                    raise
            time.sleep(_pause_seconds(attempt))
        raise AssertionError("at least one attempt is made")

    @abc.abstractmethod
    def _ask(
        self, signature: str, inputs: Mapping[str, Sequence[bytes]]
    ) -> dict[str, list]:
        """One question, asked once."""

    def _check_labels(self, rows: np.ndarray, classes: Sequence[str]) -> None:
        """Asks for all labels where those of before, if any, do not fit.

        A server may have gone on to a version with others.
        """
        best = dict(zip(rows.argmax(-1).tolist(), classes, strict=True))
        with self._lock:
            known = self._labels
            if known and all(known[i] == label for i, label in best.items()):
                return
            try:
                self._labels = self._all_labels()
            except (Refused, Unanswered) as error:
                if getattr(error, "code", None) in _RETRIED:
                    raise
                # Not of apps.export: what was not the best so far has a number.
                numbers = [str(i) for i in range(rows.shape[-1])]
                self._labels = [
                    best.get(i, label)
                    for i, label in enumerate(known or numbers)
                ]

    def _all_labels(self) -> Sequence[str]:
        feature = tf.train.Feature(
            bytes_list=tf.train.BytesList(value=[_PIXEL])
        )
        example = tf.train.Example(
            features=tf.train.Features(feature={"image/encoded": feature})
        )
        inputs = {"inputs": [example.SerializeToString()]}
        return self.ask("classify", inputs)["classes"][0]

    def _error(self, code: str, message: str) -> Exception:
        """What is raised for what a server says."""
        reason = sentence(message)
        if code == "INVALID_ARGUMENT":
            known = [
                better
                for beginning, better in _OF_THE_MODEL.items()
                if reason.startswith(beginning)
            ]
            if not known:
                return Refused(reason)
            code = known[0]
        name = self.model.name
        if self.model.version is not None:
            name += f", version {self.model.version}"
        advice = {
            "NOT_FOUND": "it has no such model or version",
            "FAILED_PRECONDITION": "its model was not written by apps.export",
            "UNAVAILABLE": f"asked {self.model.attempts} times",
            "DEADLINE_EXCEEDED": (
                f"no answer within {self.model.timeout_seconds:g} seconds, "
                f"asked {self.model.attempts} times"
            ),
        }.get(code, "it failed")
        return Unanswered(
            code, f"{self.address} ({name}): {code}: {advice}: {reason}"
        )


class GrpcServer(Server):
    """A server asked over gRPC."""

    def __init__(self, address: str, model: Model):
        super().__init__(address, model)
        try:
            import grpc
            from tensorflow_serving.apis import predict_pb2
            from tensorflow_serving.apis import prediction_service_pb2_grpc
        except ImportError as error:
            raise ValueError(
                f"gRPC needs the package {error.name}: pip install "
                "'keras-resnet[serving]', or ask over REST: "
                f"http://HOST:{_REST_PORT}"
            ) from error
        self._grpc = grpc
        self._request = predict_pb2.PredictRequest
        channel = grpc.insecure_channel(
            address,
            options=[
                ("grpc.max_send_message_length", -1),
                ("grpc.max_receive_message_length", -1),
                ("grpc.enable_retries", 0),  # `ask` does
                ("grpc.initial_reconnect_backoff_ms", 100),
            ],
        )
        self._stub = prediction_service_pb2_grpc.PredictionServiceStub(channel)

    def _ask(self, signature, inputs):
        request = self._request()
        request.model_spec.name = self.model.name
        request.model_spec.signature_name = signature
        version = self.model.version
        if version is not None and version.isdigit():
            request.model_spec.version.value = int(version)
        elif version is not None:
            request.model_spec.version_label = version
        for name, values in inputs.items():
            tensor = tf.make_tensor_proto(list(values), tf.string)
            request.inputs[name].CopyFrom(tensor)
        try:
            response = self._stub.Predict(
                request, timeout=self.model.timeout_seconds
            )
        except self._grpc.RpcError as error:
            raise self._error(error.code().name, error.details()) from error
        return {
            name: _as_list(tf.make_ndarray(tensor))
            for name, tensor in response.outputs.items()
        }


class RestServer(Server):
    """A server asked over HTTP, in JSON."""

    def __init__(self, address: str, model: Model):
        super().__init__(address, model)
        version = ""
        if model.version is not None:
            kind = "versions" if model.version.isdigit() else "labels"
            version = f"/{kind}/{model.version}"
        self._url = (
            f"{address.rstrip('/')}/v1/models/{model.name}{version}:predict"
        )
        self._session = threading.local()

    def _ask(self, signature, inputs):
        columns = [
            [{"b64": base64.b64encode(v).decode()} for v in values]
            for values in inputs.values()
        ]
        question = {
            "signature_name": signature,
            "instances": [
                dict(zip(inputs, row, strict=True))
                for row in zip(*columns, strict=True)
            ],
        }
        try:
            response = self._own_session().post(
                self._url, json=question, timeout=self.model.timeout_seconds
            )
            answer = response.json()
        except requests.Timeout as error:
            raise self._error("DEADLINE_EXCEEDED", str(error)) from error
        except requests.RequestException as error:
            raise self._error("UNAVAILABLE", str(error)) from error
        if response.status_code != 200:
            code = _CODES.get(
                response.status_code, f"HTTP {response.status_code}"
            )
            raise self._error(code, str(answer.get("error", answer)))
        rows = answer["predictions"]
        if not isinstance(rows[0], dict):  # so it is where there is one output
            return {"one output": rows}
        return {name: [row[name] for row in rows] for name in rows[0]}

    def _own_session(self) -> requests.Session:
        """A connection of this thread, which stays open between questions."""
        if not hasattr(self._session, "value"):
            self._session.value = requests.Session()
        return self._session.value


def _pause_seconds(attempt: int) -> float:
    """Doubles; not the same for all clients that a server has turned away."""
    return _FIRST_PAUSE_SECONDS * 2**attempt * random.uniform(0.5, 1.5)


def sentence(message: str) -> str:
    r"""The sentence in the middle of one of TensorFlow's messages.

    >>> sentence("Graph execution error:\n\nNo.\n\t [[{{node n}}]] [Op:f]")
    'No.'
    """
    found = message.split("\n\t [[")[0].strip().split("\n")[-1]
    return found.removeprefix("assertion failed: ").translate(
        str.maketrans("", "", "[]")
    )


def _as_list(array: np.ndarray) -> list:
    if array.dtype != object:
        return list(array)
    return _decoded(array.tolist())


def _decoded(value):
    if isinstance(value, bytes):
        return value.decode()
    return [_decoded(item) for item in value]


_PIXEL = base64.b64decode(  # a PNG of one black pixel
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAA"
    "AABJRU5ErkJggg=="
)
