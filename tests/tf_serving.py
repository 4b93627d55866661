"""A server with TensorFlow Serving's protocols, in the process of a test.

No package registry has the program itself. This server consists of the official
servicers, over the same loader and session. It has the program's error codes
and messages, and the URLs and the JSON of its REST interface.

    python -m tests.tf_serving --model_name=NAME --export_dir=DIR \\
        --max_batch_size=32
"""

import argparse
import base64
import concurrent.futures
import contextlib
import http.server
import json
import os
import random
import re
import threading
import time
from collections.abc import Iterator
from typing import NamedTuple

import grpc
import numpy as np
import tensorflow as tf
from tensorflow_serving.apis import classification_pb2
from tensorflow_serving.apis import get_model_metadata_pb2
from tensorflow_serving.apis import get_model_status_pb2
from tensorflow_serving.apis import model_service_pb2_grpc
from tensorflow_serving.apis import predict_pb2
from tensorflow_serving.apis import prediction_log_pb2
from tensorflow_serving.apis import prediction_service_pb2_grpc

from keras_resnet.serving import versions
from tests import saved_models

_HTTP = {
    "INVALID_ARGUMENT": 400,
    "FAILED_PRECONDITION": 400,
    "NOT_FOUND": 404,
    "UNAVAILABLE": 503,
    "DEADLINE_EXCEEDED": 504,
    "UNIMPLEMENTED": 501,
}
_METHOD = "tensorflow/serving/"


class Error(Exception):
    """An error response of the server."""

    def __init__(self, code: str, message: str):
        super().__init__(message)
        self.code = code


class Batching(NamedTuple):
    """Values of a batching parameters file."""

    max_batch_size: int
    batch_timeout_micros: int


class _Batches:
    """Joins requests that arrive at the same time into one call."""

    def __init__(self, ask, batching):
        self._ask = ask
        self._batching = batching
        self._condition = threading.Condition()
        self._open = {}  # signature -> [(inputs, future)], not yet full

    def ask(self, signature, inputs):
        future = concurrent.futures.Future()
        size = len(next(iter(inputs.values()), []))
        with self._condition:
            batch = self._open.get(signature, [])
            if self._size(batch) + size > self._batching.max_batch_size:
                batch = []
            batch.append((inputs, future))
            self._open[signature] = batch
            self._condition.notify_all()
            if len(batch) == 1:  # the first request computes for all
                self._condition.wait_for(
                    lambda: (
                        self._open.get(signature) is not batch
                        or self._size(batch) >= self._batching.max_batch_size
                    ),
                    self._batching.batch_timeout_micros / 1e6,
                )
                if self._open.get(signature) is batch:
                    del self._open[signature]
        if batch[0][1] is future:
            self._compute(signature, batch)
        return future.result()

    def _size(self, batch):
        return sum(len(next(iter(i.values()), [])) for i, _ in batch)

    def _compute(self, signature, batch):
        try:
            together = {
                name: np.concatenate([inputs[name] for inputs, _ in batch])
                for name in batch[0][0]
            }
            found = self._ask(signature, together)
        except Exception as error:
            for _, future in batch:
                future.set_exception(error)
            return
        start = 0
        for inputs, future in batch:
            end = start + len(next(iter(inputs.values())))
            future.set_result({k: v[start:end] for k, v in found.items()})
            start = end


class Loaded:
    """One version, as the C++ loader has it."""

    def __init__(self, directory):
        self.session, self.signatures = saved_models.load(directory)
        self.batch_sizes = []

    def ask(self, signature, inputs):
        """TensorFlow Serving's checks, then the session."""
        signature = signature or "serving_default"
        if signature not in self.signatures:
            raise Error(
                "FAILED_PRECONDITION",
                f'Serving signature key "{signature}" not found.',
            )
        described = self.signatures[signature]
        if set(inputs) != set(described.inputs):
            raise Error(
                "INVALID_ARGUMENT",
                f"input size does not match signature: {len(inputs)}!="
                f"{len(described.inputs)} len({{{','.join(inputs)}}}) != "
                f"len({{{','.join(described.inputs)}}})",
            )
        outputs = list(described.outputs)
        self.batch_sizes += [len(value) for value in inputs.values()]
        for name, value in inputs.items():
            wanted = tf.as_dtype(described.inputs[name].dtype)
            given = tf.string if value.dtype == object else value.dtype
            if wanted != given:
                raise Error(
                    "INVALID_ARGUMENT",
                    f"input {name} must be {wanted.name}, received {given}",
                )
        try:
            found = self.session.run(
                [described.outputs[name].name for name in outputs],
                {described.inputs[name].name: v for name, v in inputs.items()},
            )
        except tf.errors.OpError as error:
            code = grpc.StatusCode
            names = {c.value[0]: c.name for c in code}
            raise Error(names[error.error_code], error.message) from error
        return dict(zip(outputs, found, strict=True))


class Fault(NamedTuple):
    """A fault of a request: an immediate error code, or a silence."""

    code: str | None
    seconds: float


class Models:
    """The versions of one model, of which the newest is served."""

    def __init__(
        self, name, export_dir, labels=None, fault=None, batching=None
    ):
        self.name = name
        self.batching = batching
        self.export_dir = export_dir
        self.version_labels = labels or {}  # {"stable": 1}
        self.fault = fault or (lambda: None)
        self.requests = 0
        self.loaded = {}
        self._lock = threading.Lock()

    def find(self, name, version=None, label=None):
        """(number, Loaded) of what a ModelSpec names."""
        with self._lock:
            self.requests += 1
        fault = self.fault()
        if fault:
            time.sleep(fault.seconds)
            if fault.code:
                raise Error(fault.code, "the fault that was asked for")
        there = versions.numbered(self.export_dir)
        if label is not None:
            if name != self.name or label not in self.version_labels:
                raise Error(
                    "INVALID_ARGUMENT",
                    f"Unrecognized servable version label: {label}",
                )
            version = self.version_labels[label]
        if name != self.name or not there:
            raise Error(
                "NOT_FOUND", f"Servable not found for request: Latest({name})"
            )
        if version is None:
            version = max(there)
        if version not in there:
            raise Error(
                "NOT_FOUND",
                f"Servable not found for request: Specific({name}, {version})",
            )
        with self._lock:
            if version not in self.loaded:
                loaded = Loaded(there[version])
                replay(there[version], loaded)
                if self.batching:
                    loaded.ask = _Batches(loaded.ask, self.batching).ask
                self.loaded[version] = loaded
        return version, self.loaded[version]


def replay(directory, loaded) -> int:
    """Asks the warm-up requests of a version; how many there are."""
    path = os.path.join(directory, "assets.extra", "tf_serving_warmup_requests")
    count = 0
    for record in tf.data.TFRecordDataset(path).as_numpy_iterator():
        log = prediction_log_pb2.PredictionLog.FromString(record)
        kind = log.WhichOneof("log_type")
        request = getattr(log, kind).request
        if kind == "predict_log":
            inputs = {k: tf.make_ndarray(v) for k, v in request.inputs.items()}
        else:
            inputs = {"inputs": _serialized(request.input)}
        loaded.ask(request.model_spec.signature_name, inputs)
        count += 1
    return count


def _serialized(request_input):
    examples = request_input.example_list.examples
    return np.array([e.SerializeToString() for e in examples], object)


def _in_spec(spec):
    version = spec.version.value if spec.HasField("version") else None
    return spec.name, version, spec.version_label or None


def _answered(method):
    """Turns an Error into the status of a call."""

    def answer(self, request, context):
        try:
            return method(self, request)
        except Error as error:
            context.abort(getattr(grpc.StatusCode, error.code), str(error))

    return answer


class PredictionService(prediction_service_pb2_grpc.PredictionServiceServicer):
    def __init__(self, models):
        self.models = models

    @_answered
    def Predict(self, request):
        version, loaded = self.models.find(*_in_spec(request.model_spec))
        inputs = {k: tf.make_ndarray(v) for k, v in request.inputs.items()}
        outputs = loaded.ask(request.model_spec.signature_name, inputs)
        response = predict_pb2.PredictResponse()
        response.model_spec.CopyFrom(request.model_spec)
        response.model_spec.version.value = version
        for name, value in outputs.items():
            response.outputs[name].CopyFrom(tf.make_tensor_proto(value))
        return response

    @_answered
    def Classify(self, request):
        _, loaded = self.models.find(*_in_spec(request.model_spec))
        outputs = classify(
            loaded,
            request.model_spec.signature_name,
            _serialized(request.input),
        )
        response = classification_pb2.ClassificationResponse()
        for row in outputs:
            classes = response.result.classifications.add().classes
            for label, score in row:
                classes.add(label=label, score=score)
        return response

    @_answered
    def GetModelMetadata(self, request):
        version, loaded = self.models.find(*_in_spec(request.model_spec))
        signatures = get_model_metadata_pb2.SignatureDefMap()
        for name, signature in loaded.signatures.items():
            signatures.signature_def[name].CopyFrom(signature)
        response = get_model_metadata_pb2.GetModelMetadataResponse()
        response.model_spec.name = self.models.name
        response.model_spec.version.value = version
        response.metadata["signature_def"].Pack(signatures)
        return response


class ModelService(model_service_pb2_grpc.ModelServiceServicer):
    def __init__(self, models):
        self.models = models

    @_answered
    def GetModelStatus(self, request):
        version, _ = self.models.find(*_in_spec(request.model_spec))
        response = get_model_status_pb2.GetModelStatusResponse()
        response.model_version_status.add(
            version=version,
            state=get_model_status_pb2.ModelVersionStatus.AVAILABLE,
        )
        return response


def classify(loaded, signature, examples):
    """[[(label, score), ...], ...], by the rules of Classify."""
    method = loaded.signatures[signature].method_name
    if method != _METHOD + "classify":
        raise Error(
            "INVALID_ARGUMENT",
            f"Expected classification signature method_name to be {_METHOD}"
            f"classify. Was: {method}",
        )
    outputs = loaded.ask(signature, {"inputs": examples})
    return [
        [
            (label.decode(), float(score))
            for label, score in zip(*row, strict=True)
        ]
        for row in zip(outputs["classes"], outputs["scores"], strict=True)
    ]


class _Handler(http.server.BaseHTTPRequestHandler):
    """The URLs and the JSON of TensorFlow Serving's REST interface."""

    protocol_version = "HTTP/1.1"
    models: Models

    def log_message(self, *_):
        pass

    def do_GET(self):
        self._answer(None)

    def do_POST(self):
        size = int(self.headers["Content-Length"])
        self._answer(self.rfile.read(size))

    def _answer(self, body):
        try:
            status, answer = 200, self._found(body)
        except Error as error:
            status = _HTTP.get(error.code, 500)
            answer = {"error": str(error)}
        content = json.dumps(answer).encode()
        with contextlib.suppress(OSError):  # the client has gone
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    def _found(self, body):
        pattern = (
            r"/v1/models/([^/:]+)(?:/versions/(\d+)|/labels/([^/:]+))?"
            r"(:predict|:classify|/metadata)?"
        )
        match = re.fullmatch(pattern, self.path)
        if not match:
            raise Error("INVALID_ARGUMENT", f"Malformed request: {self.path}")
        name, version, label, verb = match.groups()
        number, loaded = self.models.find(name, version and int(version), label)
        if verb is None:
            state = {
                "version": str(number),
                "state": "AVAILABLE",
                "status": {"error_code": "OK", "error_message": ""},
            }
            return {"model_version_status": [state]}
        if verb == "/metadata":
            return {"model_spec": {"name": name, "version": str(number)}}
        try:
            question = json.loads(body)
        except ValueError as error:
            raise Error(
                "INVALID_ARGUMENT", f"JSON Parse error: {error}"
            ) from error
        signature = question.get("signature_name", "serving_default")
        if verb == ":classify":
            examples = [_example(e) for e in question["examples"]]
            return {
                "results": classify(
                    loaded, signature, np.array(examples, object)
                )
            }
        return {"predictions": self._predictions(loaded, signature, question)}

    def _predictions(self, loaded, signature, question):
        """Rows in, rows out."""
        described = loaded.signatures.get(signature)
        rows = question.get("instances")
        if described is None or not rows:
            loaded.ask(signature, {})  # says what is wrong
        (name,) = described.inputs
        values = [
            row[name] if isinstance(row, dict) and name in row else row
            for row in rows
        ]
        dtype = tf.as_dtype(described.inputs[name].dtype)
        if dtype == tf.string:
            array = np.array([_bytes(value) for value in values], object)
        else:
            array = np.array(values, dtype.as_numpy_dtype)
        outputs = loaded.ask(signature, {name: array})
        columns = {key: _jsonable(value) for key, value in outputs.items()}
        if len(columns) == 1:
            return next(iter(columns.values()))
        return [
            dict(zip(columns, row, strict=True))
            for row in zip(*columns.values(), strict=True)
        ]


def _bytes(value):
    if isinstance(value, dict) and list(value) == ["b64"]:
        return base64.b64decode(value["b64"])
    if isinstance(value, str):
        return value.encode()
    raise Error("INVALID_ARGUMENT", f"JSON Value: {value} is not a string")


def _example(fields):
    example = tf.train.Example()
    for name, value in fields.items():
        example.features.feature[name].bytes_list.value.append(_bytes(value))
    return example.SerializeToString()


def _jsonable(array):
    def text(value):
        if isinstance(value, bytes):
            return value.decode()
        if isinstance(value, list):
            return [text(item) for item in value]
        return value

    return text(array.tolist())


class Addresses(NamedTuple):
    grpc: str
    rest: str
    models: Models


@contextlib.contextmanager
def serve(
    name, export_dir, labels=None, fault=None, threads=16, batching=None
) -> Iterator[Addresses]:
    """Serves the versions of a directory on two free ports of this machine."""
    models = Models(name, export_dir, labels, fault, batching)
    pool = concurrent.futures.ThreadPoolExecutor(threads)
    server = grpc.server(
        pool,
        options=[
            ("grpc.max_receive_message_length", -1),
            ("grpc.max_send_message_length", -1),
        ],
    )
    prediction_service_pb2_grpc.add_PredictionServiceServicer_to_server(
        PredictionService(models), server
    )
    model_service_pb2_grpc.add_ModelServiceServicer_to_server(
        ModelService(models), server
    )
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    handler = type("Handler", (_Handler,), {"models": models})
    front = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    front.daemon_threads = True
    thread = threading.Thread(target=front.serve_forever, daemon=True)
    thread.start()
    try:
        yield Addresses(
            f"127.0.0.1:{port}",
            f"http://127.0.0.1:{front.server_address[1]}",
            models,
        )
    finally:
        front.shutdown()
        front.server_close()
        server.stop(None).wait()
        pool.shutdown()


def flaky(share: float, silence_seconds: float, seed: int = 0):
    """A fault for a share of the requests: silence, delay or a refusal."""
    randomness, lock = random.Random(seed), threading.Lock()

    def fault():
        with lock:
            if randomness.random() >= share:
                return None
            kind = randomness.randrange(3)
        return (
            Fault("UNAVAILABLE", silence_seconds),  # longer than any deadline
            Fault(None, 0.05),
            Fault("UNAVAILABLE", 0.0),
        )[kind]

    return fault


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model_name", required=True)
    parser.add_argument("--export_dir", required=True)
    parser.add_argument("--max_batch_size", type=int)
    parser.add_argument("--batch_timeout_micros", type=int, default=1000)
    arguments = parser.parse_args()
    batching = arguments.max_batch_size and Batching(
        arguments.max_batch_size, arguments.batch_timeout_micros
    )
    with serve(
        arguments.model_name, arguments.export_dir, batching=batching
    ) as addresses:
        print(addresses.grpc, addresses.rest, flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()
