"""Networks behind the address of a TensorFlow Serving program.

    connect("localhost:8500", "resnet50")          gRPC
    connect("http://localhost:8501", "resnet50")   REST

A question is asked again, after a pause that doubles, where the server is not
there, too busy, or silent for longer than the deadline: to answer twice does no
harm. Everything else that a server says is an error at once.

Every answer is checked by `outputs`, and its labels are those of the version
that gave it.

gRPC needs the package tensorflow-serving-api; REST and networks in this process
(`client.SavedModel`) do not.
"""

import abc
import base64
import dataclasses
import json
import random
import re
import threading
import urllib.parse
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from keras_resnet.serving import http_client
from keras_resnet.serving import outputs

# Of ABORTED, the server has unloaded the version between two requests.
_RETRIED = ("UNAVAILABLE", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED", "ABORTED")
_FIRST_PAUSE_SECONDS = 0.1
_MAX_TIMEOUT_SECONDS = 86_400.0
# 32 images of 22,000 classes are 10 MB of JSON.
_MAX_ANSWER_BYTES = 2**24
_MAX_ANSWER_VALUES = _MAX_ANSWER_BYTES // 4
_MAX_CONTAINERS = 100_000  # which take the most memory, and time
_MAX_REASON_CHARACTERS = 500
_SHOWN_BYTES = 60  # of an answer that is not valid
_MAX_VERSIONS = 8  # whose labels are kept
# What gRPC calls the codes of HTTP that TensorFlow Serving answers with.
_CODES = {
    400: "INVALID_ARGUMENT",
    404: "NOT_FOUND",
    429: "RESOURCE_EXHAUSTED",
    503: "UNAVAILABLE",
    504: "DEADLINE_EXCEEDED",
}
# As numbers of a message.
_DTYPES = {
    dtype.as_datatype_enum
    for dtype in (tf.string, tf.bfloat16, tf.float16, tf.float32, tf.float64)
}
_REST_PORT = 8501  # of TensorFlow Serving's image
_ADDRESS = re.compile(
    r"(?:(?P<scheme>https?)://)?"
    r"(?P<place>(?:[\w.-]+|\[[0-9a-f:.]+\]):(?P<port>[0-9]{1,5}))"
    r"(?P<path>/[\w./~-]*)?",
    re.IGNORECASE | re.ASCII,
)
# What TensorFlow Serving calls INVALID_ARGUMENT, over REST at least, and is
# not the fault of an image: the beginning of what it says, and the better code.
_OF_THE_MODEL = {
    "Unrecognized servable version label": "NOT_FOUND",
    "Serving signature": "FAILED_PRECONDITION",
    "input size does not match signature": "FAILED_PRECONDITION",
}


class ArgumentError(ValueError):
    """An argument of `connect` that is wrong.

    Attributes:
        argument: its name.
    """

    def __init__(self, argument: str, message: str):
        super().__init__(message)
        self.argument = argument


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
        timeout_seconds: deadline of a question, from its connection to the
            end of its answer.
        attempts: how often it is asked in all.
    """

    name: str
    version: str | None = None
    timeout_seconds: float = 10.0
    attempts: int = 6


def _number(version: str) -> int | None:
    """The number of a version, or None if it is none."""
    if re.fullmatch("[0-9]{1,19}", version) and int(version) < 2**63:
        return int(version)
    return None


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
        timeout_seconds: deadline of a question, from its connection to the
            end of its answer.
        attempts: how often a question is asked in all.

    Raises:
        ArgumentError: one of them is wrong, or gRPC needs a package that is
            not installed.
    """
    if not 0 < timeout_seconds <= _MAX_TIMEOUT_SECONDS:
        raise ArgumentError(
            "timeout_seconds",
            "the timeout must be above 0 seconds and at most "
            f"{_MAX_TIMEOUT_SECONDS:,.0f}, received {timeout_seconds}",
        )
    if attempts < 1:
        raise ArgumentError(
            "attempts", f"attempts must be 1 or more, received {attempts}"
        )
    if not model_name or not model_name.isprintable():
        raise ArgumentError(
            "model_name",
            "the name of a model must be printable text, received "
            f"{model_name!r}",
        )
    if version is not None:
        is_too_large = version.isdigit() and _number(version) is None
        if not version or not version.isprintable() or is_too_large:
            raise ArgumentError(
                "version",
                "a version must be a number below 2**63 or a label, received "
                f"{version!r}",
            )
    model = Model(model_name, version, timeout_seconds, attempts)
    found = _ADDRESS.fullmatch(address)
    is_rest = found and (found["scheme"] or int(found["port"]) == _REST_PORT)
    if (
        not found
        or not 0 < int(found["port"]) < 2**16
        or (found["path"] and not is_rest)
    ):
        raise ArgumentError(
            "address",
            "a server is HOST:PORT (gRPC, 8500) or http://HOST:PORT (REST, "
            f"8501), received {address!r}",
        )
    if is_rest:
        scheme = (found["scheme"] or "http").lower()
        path = (found["path"] or "").rstrip("/")
        return RestServer(f"{scheme}://{found['place']}{path}", model)
    return GrpcServer(found["place"], model)


class Server(abc.ABC):
    """A model of a server, asked as `client.Network` is."""

    def __init__(self, address: str, model: Model):
        self.address = address
        self.model = model
        self._version = _number(model.version or "")
        self._label = model.version if self._version is None else None
        self._labels: dict[int, list[str]] = {}
        self._unnamed: set[int] = set()  # versions without `classify`

    def predict(
        self,
        images: Sequence[bytes],
        stopped: threading.Event | None = None,
    ) -> outputs.Predictions:
        """See `client.Network`; may be called by several threads.

        It ends within `attempts` times the timeout and the pauses between.

        Raises:
            Refused: one of the images cannot be used, so none was.
            Unanswered: the server, or its model, is not there, or its answer
                is not valid.
        """
        stopped = stopped or threading.Event()
        for attempt in range(self.model.attempts):
            try:
                return self._attempt(images, stopped)
            except Unanswered as error:
                is_last = attempt + 1 == self.model.attempts
                if is_last or error.code not in _RETRIED:
                    raise
            if stopped.wait(_pause_seconds(attempt)):
                raise self._error("CANCELLED", "the question was stopped")
        raise AssertionError("at least one attempt is made")

    def _attempt(
        self, images: Sequence[bytes], stopped: threading.Event
    ) -> outputs.Predictions:
        deadline = http_client.Deadline(self.model.timeout_seconds, stopped)
        try:
            return self._predict(images, deadline)
        except TimeoutError as error:
            raise self._error("DEADLINE_EXCEEDED", str(error)) from error
        except http_client.Stopped as error:
            raise self._error("CANCELLED", str(error)) from error
        except (http_client.InvalidAnswer, ValueError) as error:
            raise self._error("DATA_LOSS", str(error)) from error

    def _predict(
        self, images: Sequence[bytes], deadline: http_client.Deadline
    ) -> outputs.Predictions:
        version, found = self._ask(
            "serving_default", {"image_bytes": images}, self._version, deadline
        )
        missing = {"probabilities", "classes"} - found.keys()
        if missing:
            raise self._error(
                "FAILED_PRECONDITION",
                "serving_default answers with "
                + (", ".join(sorted(found)) or "nothing"),
            )
        rows = outputs.probabilities(
            self._values(found["probabilities"]), len(images)
        )
        classes = outputs.texts(
            "classes", self._values(found["classes"]), len(images)
        )
        labels = self._labels_of(version, rows, classes, deadline)
        return outputs.Predictions(rows, labels)

    @abc.abstractmethod
    def _ask(
        self,
        signature: str,
        inputs: Mapping[str, Sequence[bytes]],
        version: int | None,
        deadline: http_client.Deadline,
    ) -> tuple[int, Mapping[str, Any]]:
        """Asks once; returns the version that answers, and its outputs."""

    def _values(self, output: Any) -> Any:
        """An output as `outputs` checks it.

        Raises:
            ValueError: it is no array.
        """
        return output

    def _labels_of(
        self,
        version: int,
        rows: np.ndarray,
        classes: Sequence[str],
        deadline: http_client.Deadline,
    ) -> Sequence[str]:
        """The labels of the version that has answered.

        Raises:
            ValueError: they are not those of the answer.
        """
        count = rows.shape[-1]
        labels = self._labels.get(version)
        if labels is None:
            labels = self._all_labels(version, count, deadline)
        if len(labels) != count:
            raise ValueError(
                f"probabilities must have {len(labels)} classes, as the "
                f"labels of version {version}, received {count}"
            )
        if version in self._unnamed:
            # Not of apps.export: what was not the best so far has a number.
            labels = list(labels)
            for row, label in zip(rows, classes, strict=True):
                labels[row.argmax()] = label
        else:
            outputs.check_best(rows, classes, labels)
        if len(self._labels) >= _MAX_VERSIONS:
            self._labels.clear()
            self._unnamed &= {version}
        self._labels[version] = labels
        return labels

    def _all_labels(
        self, version: int, count: int, deadline: http_client.Deadline
    ) -> list[str]:
        feature = tf.train.Feature(
            bytes_list=tf.train.BytesList(value=[_PIXEL])
        )
        example = tf.train.Example(
            features=tf.train.Features(feature={"image/encoded": feature})
        )
        inputs = {"inputs": [example.SerializeToString()]}
        try:
            _, found = self._ask("classify", inputs, version, deadline)
        except Refused:
            found = {}
        except Unanswered as error:
            if error.code == "NOT_FOUND" and self._version is None:
                raise self._error(
                    "ABORTED", f"version {version} has gone"
                ) from error
            if error.code != "FAILED_PRECONDITION":
                raise
            found = {}
        if "classes" not in found:
            self._unnamed.add(version)
            return [str(i) for i in range(count)]
        classes = self._values(found["classes"])
        if isinstance(classes, np.ndarray) and classes.ndim != 2:
            raise ValueError(
                f"labels must be [1, classes], received {classes.shape}"
            )
        if len(classes) != 1:
            raise ValueError(f"labels must be of 1 image, not {len(classes)}")
        return outputs.texts("labels", classes[0], count)

    def _error(self, code: str, message: str) -> Exception:
        """What is raised for what a server says."""
        reason = message[:_MAX_REASON_CHARACTERS]
        if reason != message:
            reason += "..."
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
            "ABORTED": f"asked {self.model.attempts} times",
            "DATA_LOSS": "its answer is not valid",
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
            from google.protobuf import message
            from tensorflow_serving.apis import predict_pb2
        except ImportError as error:
            raise ArgumentError(
                "address",
                f"gRPC needs the package {error.name}: pip install "
                "tensorflow-serving-api, or use REST: "
                f"http://HOST:{_REST_PORT}",
            ) from error
        self._grpc = grpc
        self._decode_error = message.DecodeError
        self._request = predict_pb2.PredictRequest
        self._response = predict_pb2.PredictResponse
        channel = grpc.insecure_channel(
            address,
            options=[
                ("grpc.max_send_message_length", -1),
                ("grpc.max_receive_message_length", _MAX_ANSWER_BYTES),
                # Compressed, an answer of any size is a small one.
                ("grpc.compression_enabled_algorithms_bitset", 1),
                ("grpc.enable_http_proxy", 0),
                ("grpc.enable_retries", 0),  # `predict` does
                ("grpc.initial_reconnect_backoff_ms", 100),
            ],
        )
        # gRPC's own stub would log the trace of an answer that is not valid.
        self._call = channel.unary_unary(
            "/tensorflow.serving.PredictionService/Predict"
        )

    def _ask(self, signature, inputs, version, deadline):
        request = self._request()
        request.model_spec.name = self.model.name
        request.model_spec.signature_name = signature
        if version is not None:
            request.model_spec.version.value = version
        elif self._label is not None:
            request.model_spec.version_label = self._label
        for name, values in inputs.items():
            tensor = request.inputs[name]
            tensor.dtype = tf.string.as_datatype_enum
            tensor.tensor_shape.dim.add(size=len(values))
            tensor.string_val.extend(values)
        response = self._response()
        try:
            response.ParseFromString(self._answer(request, deadline))
        except self._decode_error as error:
            raise http_client.InvalidAnswer("it is no PredictResponse") from (
                error
            )
        if response.model_spec.HasField("version"):
            answered = response.model_spec.version.value
        else:
            answered = version
        if answered is None or answered < 0:
            raise http_client.InvalidAnswer(_NO_VERSION)
        if version not in (None, answered):
            raise http_client.InvalidAnswer(
                f"it is of version {answered}, asked was version {version}"
            )
        return answered, dict(response.outputs)

    def _answer(self, request, deadline) -> bytes:
        call = self._call.future(
            request.SerializeToString(), timeout=deadline.seconds_left
        )
        try:
            return deadline.wait(call.result, self._grpc.FutureTimeoutError)
        except self._grpc.RpcError as error:
            code = error.code().name
            message = sentence(error.details() or "")
            if "larger than max" in message:
                raise http_client.InvalidAnswer(
                    f"{message}; send fewer images (batch_size)"
                ) from error
            raise self._error(code, message) from error
        finally:
            call.cancel()

    def _values(self, output):
        shape = output.tensor_shape
        sizes = [dim.size for dim in shape.dim]
        count = 1
        for size in sizes:
            count = count * size if size >= 0 else _MAX_ANSWER_VALUES + 1
        if shape.unknown_rank or count > _MAX_ANSWER_VALUES:
            raise ValueError(
                f"a tensor must have at most {_MAX_ANSWER_VALUES:,} values, "
                f"received the shape {str(sizes)[:60]}"
            )
        if output.dtype not in _DTYPES:
            raise ValueError(
                "a tensor must be text or floating-point, received the type "
                f"{output.dtype}"
            )
        try:
            return tf.make_ndarray(output)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"a tensor must have the values of its shape: {error}"
            ) from error


_NO_VERSION = (
    "it does not say which version gave it, so that its labels are not known; "
    "name the version (--version=NUMBER)"
)


class RestServer(Server):
    """A server asked over HTTP, in JSON."""

    def __init__(self, address: str, model: Model):
        super().__init__(address, model)
        self._http = http_client.HttpClient(address, _MAX_ANSWER_BYTES)
        self._path = f"/v1/models/{urllib.parse.quote(model.name, safe='')}"

    def _ask(self, signature, inputs, version, deadline):
        answered = self._served(deadline) if version is None else version
        ((name, values),) = inputs.items()
        # In pieces: a batch may be a large part of the memory.
        pieces = [
            b'{"signature_name": "%s", "instances": [' % signature.encode()
        ]
        for i, value in enumerate(values):
            pieces += [
                b", " if i else b"",
                b'{"%s": {"b64": "' % name.encode(),
                base64.b64encode(value),
                b'"}}',
            ]
        pieces.append(b"]}")
        body = b"".join(pieces)
        del pieces
        try:
            answer = self._json(
                f"{self._path}/versions/{answered}:predict", body, deadline
            )
        except Unanswered as error:
            if error.code == "NOT_FOUND" and version is None:
                raise self._error(
                    "ABORTED", f"version {answered} has gone"
                ) from error
            raise
        predictions = answer.get("predictions")
        if not isinstance(predictions, list):
            raise http_client.InvalidAnswer("it has no list of predictions")
        if len(predictions) != len(values):
            raise http_client.InvalidAnswer(
                f"it must have {len(values)} predictions, received "
                f"{len(predictions)}"
            )
        if not any(isinstance(row, dict) for row in predictions):
            # So it is where there is one output.
            return answered, {"one output": predictions}
        for row in predictions:
            if not isinstance(row, dict) or row.keys() != predictions[0].keys():
                raise http_client.InvalidAnswer(
                    "its predictions must have the same outputs"
                )
        return answered, {
            name: [row[name] for row in predictions] for name in predictions[0]
        }

    def _served(self, deadline) -> int:
        """The version that the server would answer with.

        Nothing in an answer to `:predict` says which version gave it.
        """
        label = ""
        if self._label is not None:
            label = f"/labels/{urllib.parse.quote(self._label, safe='')}"
        answer = self._json(f"{self._path}{label}/metadata", None, deadline)
        spec = answer.get("model_spec")
        version = spec.get("version") if isinstance(spec, dict) else None
        number = _number(version) if isinstance(version, str) else None
        if number is None:
            raise http_client.InvalidAnswer(_NO_VERSION)
        return number

    def _json(self, path, body, deadline) -> dict[str, Any]:
        """The object that the server answers with.

        Raises:
            Refused, Unanswered: the server says why there is none.
            InvalidAnswer: the answer is none.
        """
        try:
            answer = self._http.ask(path, body, deadline)
        except TimeoutError:
            raise
        except OSError as error:
            reason = error.strerror or str(error)
            raise self._error("UNAVAILABLE", reason) from error
        status = answer.status
        if 300 <= status < 400:
            raise self._error(
                f"HTTP {status}",
                f"redirects are not followed, received "
                f"{answer.location or 'no address'}",
            )
        beginning = repr(answer.content[:_SHOWN_BYTES])[1:]
        try:
            if sum(map(answer.content.count, b"[{")) > _MAX_CONTAINERS:
                raise ValueError(f"more than {_MAX_CONTAINERS:,} lists")
            found = json.loads(answer.content, object_pairs_hook=_unique)
        except (ValueError, RecursionError) as error:
            if status == 200:
                raise http_client.InvalidAnswer(
                    f"it must be JSON, received {beginning}: {error}"
                ) from error
            found = None
        if status == 200:
            if isinstance(found, dict):
                return found
            raise http_client.InvalidAnswer(
                f"it must be an object, received {beginning}"
            )
        code = _CODES.get(status, f"HTTP {status}")
        message = found.get("error") if isinstance(found, dict) else None
        if isinstance(message, str):
            raise self._error(code, sentence(message))
        if code == "INVALID_ARGUMENT":  # it blames no image
            code = f"HTTP {status}"
        raise self._error(code, f"it answers {beginning}")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name is there twice")
    return found


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


_PIXEL = base64.b64decode(  # a PNG of one black pixel
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAA"
    "AABJRU5ErkJggg=="
)
