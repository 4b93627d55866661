"""Servers that are not what they should be: one error each, and its address."""

import json
import re
import socket
import threading
import time
from unittest import mock

import grpc
import numpy as np
import tensorflow as tf
from absl.testing import absltest
from absl.testing import parameterized
from tensorflow_serving.apis import predict_pb2

from keras_resnet.serving import client as client_lib
from keras_resnet.serving import connection
from keras_resnet.serving import errors
from tests import answering
from tests import programs

ROW = answering.ROW
RIGHT = answering.RIGHT


def twice(**changes):
    """The answer to two images, with other values of outputs."""
    return {"predictions": [{**RIGHT, **changes}] * 2}


def forever(head, again, seconds=0.0):
    """Sends a head, and then the same until nobody listens."""

    def send(connection):
        connection.sendall(head)
        while True:
            connection.sendall(again)
            time.sleep(seconds)

    return send


def at_once(content):
    return lambda connection: connection.sendall(content)


HEAD = b"HTTP/1.1 200 OK\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
DOCUMENTS = {
    "null": (None, "must be an object"),
    "list": ([], "must be an object"),
    "number": (1, "must be an object"),
    "text": ("text", "must be an object"),
    "empty": ({}, "have a list of predictions"),
    "error": ({"error": "no"}, "have a list of predictions"),
    "predictions_null": ({"predictions": None}, "have a list of predictions"),
    "predictions_object": ({"predictions": {"0": 1}}, "have a list of pred"),
    "fewer": ({"predictions": [RIGHT]}, "2 predictions, received 1"),
    "more": ({"predictions": [RIGHT] * 3}, "2 predictions, received 3"),
    "none": ({"predictions": []}, "2 predictions, received 0"),
    "first_is_null": ({"predictions": [None, RIGHT]}, "the same outputs"),
    "second_is_null": ({"predictions": [RIGHT, None]}, "the same outputs"),
    "second_differs": ({"predictions": [RIGHT, {"a": 1}]}, "same outputs"),
    "rows_null": ({"predictions": [None] * 2}, "apps.export did not write"),
    "other_outputs": ({"predictions": [{"a": 1}] * 2}, "classes, received a"),
    "probabilities_null": (twice(probabilities=None), "received null"),
    "scalar": (twice(probabilities=0.5), "a list for each image"),
    "object": (twice(probabilities={"a": 1}), "a list for each image"),
    "characters": (twice(probabilities="abc"), "a list for each image"),
    "texts": (twice(probabilities=["0.2", "0.5", "0.3"]), "be numbers"),
    "nulls": (twice(probabilities=[None, 0.5, 0.5]), "be numbers"),
    "truths": (twice(probabilities=[False, True, False]), "be numbers"),
    "nested": (twice(probabilities=[ROW]), "be numbers"),
    "no_class": (twice(probabilities=[]), "1 class or more"),
    "ragged": (
        {"predictions": [RIGHT, {**RIGHT, "probabilities": [0.5, 0.5]}]},
        "3 classes in each row, received 2",
    ),
    "nan": (twice(probabilities=[float("nan")] * 3), "be finite, received nan"),
    "infinite": (twice(probabilities=[0, float("inf"), 0]), "be finite"),
    "huge_integer": (twice(probabilities=[0, 10**400, 0]), "be finite"),
    "negative": (twice(probabilities=[-0.5, 1.0, 0.5]), "from 0 to 1"),
    "above_1": (twice(probabilities=[0, 2.0, 0]), "from 0 to 1"),
    "logits": (twice(probabilities=[0.9, 0.8, 0.7]), "the sum 1, received 2.4"),
    "4_classes": (
        twice(probabilities=[0.25] * 4),
        "be the largest",
    ),
    "1_class": (twice(probabilities=[1.0]), "be at most 1, as classes, rec"),
    "class_integer": (twice(classes=1), "classes must be text, received 1"),
    "class_null": (twice(classes=None), "classes must be text, received null"),
    "class_list": (twice(classes=["dog"]), "classes must be text"),
    "class_of_other_labels": (
        twice(classes="cow"),
        "classes must be the first label, dog, received cow",
    ),
    "labels_null": (twice(labels=None), "labels must be a list, received nul"),
    "labels_text": (twice(labels="dog"), "labels must be a list"),
    "labels_object": (twice(labels={"dog": 1}), "labels must be a list"),
    "labels_integers": (twice(labels=[1, 2]), "labels must be text"),
    "labels_nested": (twice(labels=[["dog"], ["cat"]]), "labels must be text"),
    "fewer_labels": (twice(labels=["dog"]), "have 2 values, received 1"),
    "more_labels": (twice(labels=["dog", "cat", "a"]), "have 2 values, rec.*3"),
    "other_labels": (twice(labels=["cow", "cat"]), "the first label, cow"),
    "no_labels": (twice(labels=[], scores=[]), "1 class or more"),
    "scores_null": (twice(scores=None), "scores must have a list for each"),
    "scores_nan": (twice(scores=[float("nan"), 0]), "scores must be finite"),
    "other_scores": (
        twice(scores=[0.5, 0.3]),
        "scores must be the largest probabilities, 0.25, received 0.3",
    ),
    "status_null": (twice(status=None), "status must be text, received null"),
    "status_integer": (twice(status=0), "status must be text, received 0"),
    "status_list": (twice(status=[""]), "status must be text"),
}
BODIES = {
    "no_body": (b"", "must be JSON"),
    "html": (b"<html>", "must be JSON, received '<html>'"),
    "bytes": (bytes(range(256)), "must be JSON"),
    "trailing": (json.dumps(twice()).encode() + b"x", "must be JSON"),
    "deep_lists": (b"[" * 90_000, "must be JSON"),
    "deep_objects": (b'{"a":' * 90_000, "must be JSON"),
    "many_lists": (b"[],[]," * 60_000, "more than 100,000 lists"),
    "long_integer": (b'{"predictions": %s}' % (b"1" * 9_000), "must be JSON"),
    "same_name_twice": (b'{"predictions": 1, "predictions": 2}', "twice"),
}
ANSWERS = {
    "gzip": (
        answering.http_answer(b"x", headers=("Content-Encoding: gzip",)),
        "not be compressed, received gzip",
    ),
    "longer_than_allowed": (
        at_once(HEAD + b"Content-Length: 99999999999\r\n\r\n"),
        "at most 16,777,216 bytes",
    ),
    "without_end": (forever(HEAD + b"\r\n", bytes(2**16)), "at most 16"),
    "chunks_without_end": (
        forever(CHUNKED, b"10000\r\n" + bytes(2**16) + b"\r\n"),
        "at most 16",
    ),
    "huge_chunk": (
        forever(CHUNKED + b"f" * 15 + b"\r\n", bytes(2**16)),
        "at most 16",
    ),
    "negative_chunk": (
        forever(CHUNKED + b"-1\r\n", bytes(2**16)),
        "at most 16",
    ),
    "headers_without_end": (forever(HEAD, b"A: b\r\n" * 99), "100 headers"),
    "long_header": (forever(HEAD + b"A: ", bytes(2**16)), "65536 bytes"),
    "no_http": (at_once(b"SSH-2.0-x\r\n"), "must be HTTP"),
    "bad_status": (at_once(b"HTTP/1.1 x OK\r\n\r\n"), "must be HTTP"),
    "closed": (at_once(b""), "UNAVAILABLE.*closed the connection too early"),
    "cut_in_headers": (at_once(HEAD + b"Conte"), "closed the connection"),
    "cut_in_body": (
        at_once(HEAD + b"Content-Length: 9\r\n\r\n{"),
        "closed the connection",
    ),
    "slow_headers": (forever(HEAD, b"a", 0.05), "DEADLINE_EXCEEDED"),
    "slow_body": (forever(HEAD + b"\r\n", b" ", 0.05), "DEADLINE_EXCEEDED"),
    "continued": (
        forever(b"", b"HTTP/1.1 100 Continue\r\n\r\n", 0.05),
        "DEADLINE_EXCEEDED",
    ),
    "silent": (lambda _: time.sleep(2), "DEADLINE_EXCEEDED"),
    "no_content": (b"HTTP/1.1 204 No\r\n\r\n", "HTTP 204"),
    "error_integer": (
        answering.http_answer(b'{"error": 5}', "400 Bad"),
        "HTTP 400.*error",
    ),
    "error_list": (answering.http_answer(b"[1]", "400 Bad"), "HTTP 400"),
    "error_html": (answering.http_answer(b"<b>", "500 Bad"), "HTTP 500.*<b>"),
    "error_deep": (
        answering.http_answer(b"[" * 90_000, "500 Bad"),
        "HTTP 500",
    ),
    "error_long": (
        answering.http_answer(
            json.dumps({"error": "x" * 90_000}).encode(), "500 Bad"
        ),
        "HTTP 500.*xxx[.]{3}$",
    ),
}


def tensor(values, dtype=None):
    return tf.make_tensor_proto(np.array(values, dtype))


def raw_tensor(dtype, sizes, **fields):
    found = tensor([0.0])
    found.Clear()
    found.dtype = dtype
    for size in sizes:
        found.tensor_shape.dim.add(size=size)
    for name, value in fields.items():
        if isinstance(value, bytes):
            setattr(found, name, value)
        else:
            getattr(found, name).extend(value)
    return found


FLOAT, STRING, RESOURCE = 1, 7, 20
TENSORS = {
    "fewer": ("probabilities", tensor([ROW], "float32"), "2 rows.*received 1"),
    "more": ("probabilities", tensor([ROW] * 3, "float32"), "received 3"),
    "flat": ("probabilities", tensor(ROW, "float32"), r"received \(3,\)"),
    "integers": ("probabilities", tensor([[0, 1, 0]] * 2), "floating-point"),
    "truths": ("probabilities", tensor([[True]] * 2), "floating-point"),
    "texts": ("probabilities", tensor([[b"a"]] * 2, object), "floating-point"),
    "nan": ("probabilities", tensor([[np.nan] * 3] * 2), "finite"),
    "beyond_float32": ("probabilities", tensor([[1e300] * 3] * 2), "finite"),
    "huge_shape": (
        "probabilities",
        raw_tensor(FLOAT, [2, 10**12], float_val=[0.5]),
        "at most 4,194,304 values",
    ),
    "huge_product": (
        "probabilities",
        raw_tensor(FLOAT, [2**62, 2**62], float_val=[0.5]),
        "at most 4,194,304 values",
    ),
    "negative_shape": (
        "probabilities",
        raw_tensor(FLOAT, [-2, -3], float_val=[0.5]),
        "at most 4,194,304 values",
    ),
    "too_many_values": (
        "probabilities",
        raw_tensor(FLOAT, [2, 3], float_val=[0.5] * 9),
        "values of its shape",
    ),
    "short_content": (
        "probabilities",
        raw_tensor(FLOAT, [2, 3], tensor_content=b"abc"),
        "values of its shape",
    ),
    "long_content": (
        "probabilities",
        raw_tensor(FLOAT, [2, 3], tensor_content=bytes(400)),
        "values of its shape",
    ),
    "no_values": ("probabilities", raw_tensor(FLOAT, [2, 3]), "sum 1"),
    "no_class": ("probabilities", raw_tensor(FLOAT, [2, 0]), "1 class"),
    "type_0": ("probabilities", raw_tensor(0, [2, 3]), "the type 0"),
    "type_999": ("probabilities", raw_tensor(999, [2, 3]), "the type 999"),
    "resource": ("probabilities", raw_tensor(RESOURCE, [2, 3]), "type 20"),
    "class_integers": ("classes", tensor([1, 2]), "text or floating-point"),
    "class_floats": ("classes", tensor([1.0, 2.0]), "classes must be text"),
    "fewer_classes": ("classes", tensor([b"dog"], object), "2 values"),
    "class_rows": ("classes", tensor([[b"dog"]] * 2, object), "one dimension"),
    "class_bytes": ("classes", tensor([b"\xff"] * 2, object), "be UTF-8"),
    "other_class": (
        "classes",
        tensor([b"owl"] * 2, object),
        "classes must be the first label, dog",
    ),
    "label_floats": ("labels", tensor([[1.0, 2.0]] * 2), "labels must be text"),
    "fewer_labels": ("labels", tensor([[b"dog"]] * 2, object), "have 2 values"),
    "flat_labels": ("labels", tensor([b"dog"] * 2, object), "must be a list"),
    "label_rows": ("labels", tensor([[b"dog", b"cat"]], object), "2 rows"),
    "label_bytes": ("labels", tensor([[b"dog", b"\xff"]] * 2, object), "UTF-8"),
    "flat_scores": (
        "scores",
        tensor([0.5, 0.3], "float32"),
        r"d \(2,\)",
    ),
    "score_rows": ("scores", tensor([[0.5, 0.25]], "float32"), "2 rows"),
    "status_integers": ("status", tensor([0, 0]), "text or floating-point"),
    "fewer_status": ("status", tensor([b""], object), "have 2 values"),
    "many_classes": (
        "classes",
        raw_tensor(STRING, [10**9], string_val=[b"dog"]),
        "at most 4,194,304 values",
    ),
}


def response(version=1, **outputs):
    found = predict_pb2.PredictResponse()
    if version is not None:
        found.model_spec.version.value = version
    for name, value in outputs.items():
        found.outputs[name].CopyFrom(value)
    return found.SerializeToString()


def grpc_right(message, **changes):
    """The right answer to a question, with other tensors of outputs."""
    request = predict_pb2.PredictRequest.FromString(message)
    count = len(request.inputs["image_bytes"].string_val)
    outputs = {
        "probabilities": tensor([ROW] * count, "float32"),
        "classes": tensor([b"dog"] * count, object),
        "labels": tensor([[b"dog", b"cat"]] * count, object),
        "scores": tensor([[0.5, 0.25]] * count, "float32"),
        "status": tensor([b""] * count, object),
    }
    return response(**{**outputs, **changes})


class HostileServersTest(parameterized.TestCase):
    def fails(self, address, message, images=2, **arguments):
        """Asked, the server is an error of one line that names it."""
        network = connection.connect(
            address, "m", **{"attempts": 1, "timeout_seconds": 10, **arguments}
        )
        with self.assertRaisesRegex(errors.ServerError, message) as caught:
            client_lib.Client(network).predict([b"image"] * images)
        self.assertStartsWith(str(caught.exception), f"{address} (m")
        self.assertNotIn("\n", str(caught.exception))
        self.assertLess(len(str(caught.exception)), 700)

    def test_right_answers_are_accepted(self):
        with answering.rest(answering.right) as address:
            (answer,) = self.ask(address)
        self.assertEqual(answer.best[0], ("dog", 0.5))
        with answering.grpc_server(grpc_right) as address:
            (answer,) = self.ask(address)
        self.assertEqual(answer.best[0], ("dog", 0.5))

    def ask(self, address, **arguments):
        network = connection.connect(address, "m", **arguments)
        return client_lib.Client(network).predict([b"image"])

    @parameterized.named_parameters(
        (name, *row) for name, row in DOCUMENTS.items()
    )
    def test_rest_document(self, document, message):
        content = json.dumps(document).encode()
        answer = answering.http_answer(content)
        with answering.rest(lambda *_: answer) as address:
            self.fails(address, message)

    @parameterized.named_parameters(
        (name, *row) for name, row in BODIES.items()
    )
    def test_rest_body(self, content, message):
        answer = answering.http_answer(content)
        with answering.rest(lambda *_: answer) as address:
            self.fails(address, message)

    @parameterized.named_parameters(
        (name, *row) for name, row in ANSWERS.items()
    )
    def test_http_answer(self, answer, message):
        seconds = 0.3 if message == "DEADLINE_EXCEEDED" else 10.0
        with answering.rest(lambda *_: answer) as address:
            self.fails(address, message, timeout_seconds=seconds)

    @parameterized.named_parameters(
        (name, *row) for name, row in TENSORS.items()
    )
    def test_tensor(self, output, value, message):
        with answering.grpc_server(
            lambda request: grpc_right(request, **{output: value})
        ) as address:
            self.fails(address, message)

    @parameterized.named_parameters(
        ("empty", b"", "received nothing"),
        ("bytes", b"\xff" * 99, "must be a PredictResponse"),
        (
            "cut",
            response(classes=tensor([1.0]))[:-1],
            "must be a PredictResponse",
        ),
        ("no_outputs", response(), "received nothing"),
        ("too_long", bytes(2**24 + 1), "larger than max.*batch_size"),
    )
    def test_message_of_grpc(self, message, expected):
        with answering.grpc_server(lambda _: message) as address:
            self.fails(address, expected)

    def test_other_version_than_was_asked_is_an_error(self):
        with answering.grpc_server(grpc_right) as address:
            self.fails(address, "version 2, received version 1", version="2")

    def test_compressed_message_is_rejected(self):
        with answering.grpc_server(
            grpc_right, compression=grpc.Compression.Gzip
        ) as address:
            self.fails(address, "gzip")

    @parameterized.parameters("", "http://", "https://")
    def test_program_that_never_speaks_ends_at_the_deadline(self, scheme):
        with socket.create_server(("127.0.0.1", 0)) as listening:
            address = f"{scheme}127.0.0.1:{listening.getsockname()[1]}"
            self.fails(address, "DEADLINE_EXCEEDED", timeout_seconds=0.3)

    @parameterized.parameters("grpc", "rest")
    def test_question_that_is_stopped_ends(self, kind):
        asked, stopped, released = (threading.Event() for _ in range(3))

        def silent(*_):
            asked.set()
            released.wait(60)
            return b""

        serve = answering.rest if kind == "rest" else answering.grpc_server
        with serve(silent) as address:
            network = connection.connect(address, "m", timeout_seconds=60)
            stopper = threading.Thread(
                target=lambda: (asked.wait(60), stopped.set())
            )
            stopper.start()
            with self.assertRaisesRegex(errors.ServerError, "CANCELLED"):
                network.predict([b"image"], stopped)
            stopper.join()
            released.set()

    @parameterized.parameters(301, 302, 303, 307, 308)
    def test_redirect_is_not_followed(self, status):
        elsewhere = []

        def other(path, body):
            elsewhere.append((path, body))
            return answering.right(path, body)

        with answering.rest(other) as target:
            for location in (f"{target}/x", "/v1/elsewhere", "file:///x"):
                answer = answering.http_answer(
                    b"", f"{status} Moved", (f"Location: {location}",)
                )
                with answering.rest(lambda *_, a=answer: a) as address:
                    self.fails(
                        address,
                        f"HTTP {status}: .*redirects are not followed, "
                        f"received {re.escape(location)}",
                    )
        self.assertEmpty(elsewhere)

    def test_no_proxy_is_asked(self):
        proxy = "http://127.0.0.1:9"
        proxies = dict.fromkeys(
            ("http_proxy", "HTTP_PROXY", "all_proxy"), proxy
        )
        with mock.patch.dict("os.environ", proxies):
            with answering.rest(answering.right) as address:
                self.assertEqual(self.ask(address)[0].best[0][0], "dog")
            with answering.grpc_server(grpc_right) as address:
                self.assertEqual(self.ask(address)[0].best[0][0], "dog")

    def test_program_says_it_in_one_line(self):
        for answer, message in (
            (answering.http_answer(b"[" * 90_000), "must be JSON"),
            (
                answering.http_answer(b'{"error": "\\u001b[2J"}', "500 Bad"),
                r"HTTP 500: the request failed: \x1b[2J",
            ),
            (
                answering.http_answer(b'{"error": "first\\nlast"}', "500 Bad"),
                r"HTTP 500: the request failed: first\nlast",
            ),
            (
                answering.http_answer(json.dumps(twice()).encode()),
                "1 predictions, received 2",
            ),
        ):
            with answering.rest(lambda *_, a=answer: a) as address:
                code, _, err = programs.run(
                    "predict",
                    f"--server={address}",
                    "--model_name=m",
                    "data:,x",
                )
            self.assertEqual(code, 1)
            self.assertLen(err, 1)
            self.assertStartsWith(err[0], f"predict: {address} (m)")
            self.assertIn(message, err[0])
            self.assertTrue(err[0].isprintable())

    def test_program_prints_labels_without_control_characters(self):
        labels = ["\x1b[2J\n", "\u202edog\x9b", "猫 \u2028"]

        def answer(path, body):
            text = answering.right(path, body).partition(b"\r\n\r\n")[2]
            document = json.loads(text)
            for row in document["predictions"]:
                row["classes"], row["labels"] = labels[0], labels
                row["scores"] = sorted(ROW, reverse=True)
            return answering.http_answer(json.dumps(document).encode())

        with answering.rest(answer) as address:
            arguments = [f"--server={address}", "--model_name=m", "data:,x"]
            code, out, err = programs.run("predict", *arguments)
            self.assertEqual((code, err), (0, []))
            self.assertLen(out, 4)
            for line in out:
                self.assertTrue(line.isprintable(), line)
            code, out, err = programs.run("predict", "--json", *arguments)
        self.assertEqual((code, err), (0, []))
        (line,) = out
        self.assertTrue(line.isprintable(), line)
        self.assertIn("猫", line)
        self.assertCountEqual(
            [p["label"] for p in json.loads(line)["predictions"]], labels
        )


class OutputsTest(parameterized.TestCase):
    """Answers need one request, and lack nothing but what the export lacks."""

    def ask(self, rows):
        paths = []

        def answer(path, body):
            paths.append(path)
            document = {"predictions": rows}
            return answering.http_answer(json.dumps(document).encode())

        with answering.rest(answer) as address:
            network = connection.connect(address, "m")
            client = client_lib.Client(network)
            answers = client.predict([b"image"] * len(rows))
        self.assertEqual(paths, ["/v1/models/m:predict"])
        return client, answers

    def test_labels_come_with_the_probabilities(self):
        client, (answer,) = self.ask([RIGHT])
        self.assertEqual(answer.best, (("dog", 0.5), ("cat", 0.25)))
        self.assertEqual(client.note, "")

    def test_rejected_image_has_its_status_and_the_others_their_labels(self):
        nothing = {
            "probabilities": [0.0] * 3,
            "classes": "",
            "labels": ["", ""],
            "scores": [0.0, 0.0],
            "status": "truncated: the file ends before the image does",
        }
        _, (bad, good) = self.ask([nothing, RIGHT])
        self.assertEqual(bad.error, nothing["status"])
        self.assertEqual(good.best[0], ("dog", 0.5))

    @parameterized.parameters(
        (("labels",), ["dog"], "labels, so an image gets only its best label:"),
        (("labels", "scores"), ["dog"], "labels, scores, so an image gets"),
        (("status",), ["dog", "cat"], "status, so a bad image fails its whol"),
        (("labels", "scores", "status"), ["dog"], "best label and a bad image"),
    )
    def test_export_without_an_output_is_read_with_a_note(
        self, missing, labels, note
    ):
        row = {key: RIGHT[key] for key in RIGHT if key not in missing}
        client, (answer,) = self.ask([row])
        self.assertEqual([label for label, _ in answer.best], labels)
        self.assertIn(note, client.note)
        self.assertEndsWith(client.note, ": export it again")


if __name__ == "__main__":
    absltest.main()
