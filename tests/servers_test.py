"""The client and a second, independent one, against a server in process."""

import concurrent.futures
import os
import re
import subprocess
import sys
import tempfile
from unittest import mock

import grpc
import numpy as np
import pytest
import requests
import tensorflow as tf
from absl.testing import absltest
from absl.testing import parameterized
from tensorflow_serving.apis import classification_pb2
from tensorflow_serving.apis import get_model_metadata_pb2
from tensorflow_serving.apis import get_model_status_pb2
from tensorflow_serving.apis import model_service_pb2_grpc
from tensorflow_serving.apis import prediction_service_pb2_grpc

from keras_resnet.serving import client as client_lib
from keras_resnet.serving import connection
from keras_resnet.serving import errors
from keras_resnet.serving import grpc_servers
from keras_resnet.serving import rest_servers
from keras_resnet.serving import servers
from tests import answering
from tests import colours
from tests import programs
from tests import tf_serving

NAME = "colours"
OTHER_LABELS = ["schwarz", "rot", "grün", "blau"]


class ServersTestCase(parameterized.TestCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        folder = tempfile.TemporaryDirectory()
        cls.addClassCleanup(folder.cleanup)
        cls.export_dir = os.path.join(folder.name, "exported")
        cls.path = colours.publish(cls.export_dir)
        cls.loaded = {1: tf_serving.Loaded(cls.path)}
        cls.addClassCleanup(cls.loaded[1].session.close)
        tf_serving.replay(cls.path, cls.loaded[1])

    def serve(self, export_dir=None, **arguments):
        addresses = self.enter_context(
            tf_serving.serve(NAME, export_dir or self.export_dir, **arguments)
        )
        addresses.models.loaded.update(self.loaded)
        return addresses

    def connect(self, addresses, kind, name=NAME, **arguments):
        address = getattr(addresses, kind)
        return connection.connect(address, name, **arguments)


class ProtocolTest(ServersTestCase):
    """Responses of both kinds of servers."""

    @parameterized.parameters("grpc", "rest")
    def test_answers_are_those_of_the_saved_model(self, kind):
        network = self.connect(self.serve(), kind)
        images = [
            colours.image(colour, strength)
            for colour in colours.LABELS
            for strength in (20, 255)
        ]
        client = client_lib.Client(network, 3, in_flight=2)
        here = client_lib.Client(client_lib.SavedModel(self.path))
        for there, expected in zip(
            client.predict(images, top=3),
            here.predict(images, top=3),
            strict=True,
        ):
            self.assertIsNone(there.error)
            self.assertEqual(
                [label for label, _ in there.best],
                [label for label, _ in expected.best],
            )
            np.testing.assert_allclose(
                [p for _, p in there.best],
                [p for _, p in expected.best],
                rtol=1e-5,
            )

    @parameterized.parameters("grpc", "rest")
    def test_bad_image_among_good_ones_gets_its_own_error(self, kind):
        client = client_lib.Client(self.connect(self.serve(), kind))
        images = [colours.image("red"), b"", colours.image("blue"), b"text"]
        red, empty, blue, text = client.predict(images, top=1)
        self.assertEqual(red.best[0][0], "red")
        self.assertEqual(blue.best[0][0], "blue")
        for answer in (empty, text):
            self.assertEqual(
                answer.error,
                "not an image: an image must be a JPEG, PNG, GIF, BMP or WebP",
            )

    @parameterized.product(
        kind=["grpc", "rest"],
        wrong=[{"name": "other"}, {"version": "9"}],
    )
    def test_model_that_is_not_there_is_said_at_once(self, kind, wrong):
        addresses = self.serve()
        client = client_lib.Client(self.connect(addresses, kind, **wrong))
        with self.assertRaisesRegex(
            errors.ServerError, "NOT_FOUND.*Servable not found for request"
        ) as caught:
            client.predict([colours.image("red")])
        self.assertEqual(caught.exception.code, "NOT_FOUND")
        self.assertEqual(addresses.models.requests, 1)

    @parameterized.product(
        kind=["grpc", "rest"],
        wrong=[
            ("label", "NOT_FOUND.*Unrecognized servable version label"),
            ("signature", "FAILED_PRECONDITION.*Serving signature key"),
            ("input", "FAILED_PRECONDITION.*input size does not match"),
        ],
    )
    def test_what_the_model_lacks_is_not_the_fault_of_an_image(
        self, kind, wrong
    ):
        what, message = wrong
        addresses = self.serve()
        version = "canary" if what == "label" else None
        network = self.connect(addresses, kind, version=version)
        ask = tf_serving.Loaded.ask

        def of_another_model(loaded, signature, inputs):
            if what == "signature":
                signature = "other"
            if what == "input":
                inputs = {"pixels": inputs["image_bytes"]}
            return ask(loaded, signature, inputs)

        images = [colours.image("red"), colours.image("blue")]
        with (
            mock.patch.object(tf_serving.Loaded, "ask", of_another_model),
            self.assertRaisesRegex(errors.ServerError, message),
        ):
            client_lib.Client(network).predict(images)
        self.assertEqual(addresses.models.requests, 1)

    @parameterized.parameters("grpc", "rest")
    def test_question_is_asked_again_until_there_is_an_answer(self, kind):
        faults = [tf_serving.Fault("UNAVAILABLE", 0.0)] * 3
        addresses = self.serve(fault=lambda: faults.pop() if faults else None)
        client = client_lib.Client(self.connect(addresses, kind))
        (answer,) = client.predict([colours.image("green")])
        self.assertEqual(answer.best[0][0], "green")
        self.assertEqual(addresses.models.requests, 3 + 1)

    def test_pauses_double_and_differ(self):
        for attempt in range(4):
            pauses = {servers._pause_seconds(attempt) for _ in range(20)}
            self.assertGreater(len(pauses), 1)
            for pause in pauses:
                self.assertBetween(pause, 0.05 * 2**attempt, 0.15 * 2**attempt)

    @parameterized.parameters("grpc", "rest")
    def test_silence_is_a_deadline_that_is_exceeded(self, kind):
        silence = tf_serving.Fault("UNAVAILABLE", 0.5)
        addresses = self.serve(fault=lambda: silence)
        network = self.connect(addresses, kind, timeout_seconds=0.1, attempts=2)
        with self.assertRaisesRegex(
            errors.ServerError,
            "DEADLINE_EXCEEDED: no response within 0.1 seconds, in 2 attempts",
        ):
            network.predict([colours.image("red")])

    @parameterized.parameters("localhost:{}", "http://localhost:{}")
    def test_nobody_at_the_address_is_unavailable(self, address):
        with tf_serving.serve(NAME, self.export_dir) as addresses:
            port = addresses.grpc.rpartition(":")[2]
        network = connection.connect(address.format(port), NAME, attempts=2)
        with self.assertRaisesRegex(errors.ServerError, "UNAVAILABLE"):
            network.predict([colours.image("red")])

    @parameterized.parameters("grpc", "rest")
    @pytest.mark.slow
    def test_version_and_labels_of_versions_are_asked_for(self, kind):
        folder = self.enter_context(tempfile.TemporaryDirectory())
        colours.publish(folder)
        colours.publish(folder, OTHER_LABELS)
        addresses = self.serve(folder, labels={"stable": 1, "canary": 2})
        for version, expected in (
            (None, "rot"),
            ("1", "red"),
            ("2", "rot"),
            ("stable", "red"),
            ("canary", "rot"),
        ):
            network = self.connect(addresses, kind, version=version)
            (answer,) = client_lib.Client(network).predict(
                [colours.image("red")]
            )
            self.assertEqual(answer.best[0][0], expected)

    @parameterized.parameters("grpc", "rest")
    @pytest.mark.slow
    def test_labels_follow_a_server_that_goes_on_to_another_version(self, kind):
        folder = self.enter_context(tempfile.TemporaryDirectory())
        colours.publish(folder)
        client = client_lib.Client(self.connect(self.serve(folder), kind))
        images = [colours.image("green")]
        self.assertEqual(client.predict(images)[0].best[0][0], "green")
        colours.publish(folder, OTHER_LABELS)
        self.assertEqual(
            sorted(label for label, _ in client.predict(images)[0].best),
            sorted(OTHER_LABELS),
        )

    @parameterized.parameters("grpc", "rest")
    def test_rejected_request_computes_nothing(self, kind):
        addresses = self.serve()
        network = self.connect(addresses, kind)
        images = [colours.image("red")]
        network.predict(images)
        (loaded,) = addresses.models.loaded.values()
        before = list(loaded.batch_sizes)
        requests = addresses.models.requests
        self.assertIsNone(network.reject(images))
        self.assertEqual(addresses.models.requests, requests + 1)
        self.assertEqual(loaded.batch_sizes, before)
        missing = self.connect(addresses, kind, "missing")
        with self.assertRaisesRegex(errors.ServerError, "NOT_FOUND"):
            missing.reject(images)

    def test_server_that_knows_every_signature_is_not_valid(self):
        with answering.rest(answering.right) as address:
            network = connection.connect(address, NAME)
            with self.assertRaisesRegex(
                errors.ServerError, "DATA_LOSS.*must report that the signature"
            ):
                network.reject([colours.image("red")])

    def test_strangers_share_a_batch_and_not_its_bad_image(self):
        images = [colours.image(label) for label in colours.LABELS[1:]]
        images.insert(1, images[0][:40])
        with (
            tf_serving.serve(
                NAME,
                self.export_dir,
                batching=tf_serving.Batching(4, 10_000_000),
            ) as addresses,
            concurrent.futures.ThreadPoolExecutor(4) as pool,
        ):
            _, loaded = addresses.models.find(NAME)
            loaded.batch_sizes.clear()  # of the warm-up
            network = self.connect(addresses, "grpc", timeout_seconds=60.0)
            found = list(pool.map(network.predict, [[i] for i in images]))
        self.assertEqual(loaded.batch_sizes, [4])
        self.assertEqual(
            [answer.status[0].partition(":")[0] for answer in found],
            ["", "truncated", "", ""],
        )
        best = [answer.labels[0][0] for answer in found]
        self.assertEqual(best, ["red", "", "green", "blue"])

    @parameterized.parameters("grpc", "rest")
    def test_network_that_is_not_of_apps_export_is_said(self, kind):
        network = self.connect(self.serve(), kind)
        ask = network._send

        def features(*arguments):
            return {"features": ask(*arguments)["probabilities"]}

        with (
            mock.patch.object(network, "_send", features),
            self.assertRaisesRegex(
                errors.ServerError,
                "apps.export did not write this model: .*features",
            ),
        ):
            network.predict([colours.image("red")])

    def test_program_asks_servers(self):
        addresses = self.serve()
        folder = self.enter_context(tempfile.TemporaryDirectory())
        for i, colour in enumerate(["red", "blue"]):
            with open(os.path.join(folder, f"{i}.png"), "wb") as file:
                file.write(colours.image(colour))
        for address in (addresses.grpc, addresses.rest):
            code, out, err = programs.run(
                "predict",
                f"--server={address}",
                f"--model_name={NAME}",
                "--top=1",
                folder,
            )
            self.assertEqual((code, err), (0, []))
            self.assertEqual(
                [line.split()[-1] for line in out[1:]], ["red", "blue"]
            )
        code, _, err = programs.run(
            "predict", f"--server={addresses.grpc}", "--model_name=no", folder
        )
        self.assertEqual(code, 1)
        self.assertLen(err, 1)
        self.assertIn("NOT_FOUND", err[0])


class AddressTest(parameterized.TestCase):
    @parameterized.parameters(
        ("localhost:8500", grpc_servers.GrpcServer),
        ("localhost:8501", rest_servers.RestServer),
        ("http://localhost:8502", rest_servers.RestServer),
        ("https://host.example:443/", rest_servers.RestServer),
        ("HTTP://host:80/below/it", rest_servers.RestServer),
        ("[::1]:8500", grpc_servers.GrpcServer),
        ("http://[::1]:8501", rest_servers.RestServer),
    )
    def test_address_says_how_a_server_is_asked(self, address, kind):
        self.assertIsInstance(connection.connect(address, "m"), kind)

    @parameterized.parameters(
        "localhost",
        ":8500",
        "localhost:http",
        "ftp://host:21",
        "host:99999",
        "host:0",
        "host:-1",
        "host:\uff18\uff15",
        "host:1:2",
        "::1:8500",
        "[::1]",
        "http://host",
        "http://user:password@host:80",
        "user:password@host:80",
        "host:80/path",
        "http://host:80/path?query",
        "http://host:80/#fragment",
        "http://host:80/\x1b",
        "host\n:80",
        "unix:/socket",
        "",
    )
    def test_what_is_no_address_is_refused(self, address):
        with self.assertRaisesRegex(ValueError, re.escape(repr(address))):
            connection.connect(address, "m")

    def test_package_that_grpc_needs_is_named_with_its_command(self):
        with (
            mock.patch.dict(sys.modules, {"tensorflow_serving.apis": None}),
            self.assertRaisesRegex(
                ValueError, "pip install tensorflow-serving-api"
            ),
        ):
            connection.connect("localhost:8500", "m")


class TensorFlowServingTest(ServersTestCase):
    """The server of these tests says what TensorFlow Serving says."""

    def setUp(self):
        super().setUp()
        self.addresses = self.serve()
        channel = grpc.insecure_channel(self.addresses.grpc)
        self.addCleanup(channel.close)
        self.stub = prediction_service_pb2_grpc.PredictionServiceStub(channel)
        self.models = model_service_pb2_grpc.ModelServiceStub(channel)
        self.url = f"{self.addresses.rest}/v1/models/{NAME}"

    def test_warm_up_requests_replay_without_error(self):
        self.assertEqual(tf_serving.replay(self.path, self.loaded[1]), 8)

    def test_classify_gives_every_label_with_its_score(self):
        request = classification_pb2.ClassificationRequest()
        request.model_spec.name = NAME
        request.model_spec.signature_name = "classify"
        example = request.input.example_list.examples.add()
        example.features.feature["image/encoded"].bytes_list.value.append(
            colours.image("blue")
        )
        (found,) = self.stub.Classify(request).result.classifications
        scores = {c.label: c.score for c in found.classes}
        self.assertEqual(list(scores), colours.LABELS)
        self.assertEqual(max(scores, key=scores.get), "blue")
        request.model_spec.signature_name = "serving_default"
        with self.assertRaises(grpc.RpcError) as caught:
            self.stub.Classify(request)
        self.assertEqual(
            caught.exception.code(), grpc.StatusCode.INVALID_ARGUMENT
        )

    def test_status_and_metadata_are_answered(self):
        status = get_model_status_pb2.GetModelStatusRequest()
        status.model_spec.name = NAME
        (version,) = self.models.GetModelStatus(status).model_version_status
        self.assertEqual((version.version, version.state), (1, 30))
        request = get_model_metadata_pb2.GetModelMetadataRequest(
            metadata_field=["signature_def"]
        )
        request.model_spec.name = NAME
        packed = self.stub.GetModelMetadata(request).metadata["signature_def"]
        signatures = get_model_metadata_pb2.SignatureDefMap()
        packed.Unpack(signatures)
        self.assertContainsSubset(
            {"serving_default", "images", "features", "classify"},
            signatures.signature_def,
        )

    def test_rest_has_its_urls_and_its_errors(self):
        self.assertEqual(
            requests.get(self.url).json()["model_version_status"][0]["state"],
            "AVAILABLE",
        )
        answer = requests.get(self.url + "x")
        self.assertEqual(answer.status_code, 404)
        self.assertEqual(
            answer.json()["error"],
            f"Servable not found for request: Latest({NAME}x)",
        )
        body = {"instances": [{"image_bytes": {"b64": "eA=="}}]}
        answer = requests.post(self.url + ":predict", json=body)
        self.assertEqual(answer.status_code, 200)
        self.assertEqual(
            answer.json()["predictions"],
            [
                {
                    "probabilities": [0.0] * 4,
                    "classes": "",
                    "labels": [""] * 4,
                    "scores": [0.0] * 4,
                    "status": "not an image: an image must be a JPEG, PNG, "
                    "GIF, BMP or WebP",
                }
            ],
        )
        for body, message in (
            ({"signature_name": "no", "instances": [1]}, '"no" not found'),
            ({}, "input size does not match"),
        ):
            answer = requests.post(self.url + ":predict", json=body)
            self.assertEqual(answer.status_code, 400)
            self.assertIn(message, answer.json()["error"])

    @pytest.mark.slow
    def test_a_second_client_gets_the_same_answers(self):
        """ovmsclient, in a process of its own: it brings its own messages."""
        script = """
import sys
import ovmsclient
grpc, rest, name, path = sys.argv[1:]
with open(path, "rb") as file:
    image = file.read()
client = ovmsclient.make_grpc_client(grpc)
print(client.get_model_status(name, model_version=1)[1]["state"])
print(sorted(client.get_model_metadata(model_name=name, model_version=1)
             ["inputs"]))
answer = client.predict(
    {"image_bytes": [image, b"text"]}, name, model_version=1)
print(answer["labels"][0][0].decode(), answer["status"][0] == b"")
print(answer["status"][1].decode())
try:
    client.predict({"image_bytes": [image]}, "other", model_version=1)
except ovmsclient.ModelNotFoundError as error:
    print("not found")
"""
        with tempfile.NamedTemporaryFile() as file:
            file.write(colours.image("green"))
            file.flush()
            outcome = subprocess.run(
                [sys.executable, "-c", script, *self.addresses[:2], NAME]
                + [file.name],
                capture_output=True,
                text=True,
            )
        self.assertEqual(
            outcome.stdout.splitlines(),
            [
                "AVAILABLE",
                "['image_bytes']",
                "green True",
                "not an image: an image must be a JPEG, PNG, GIF, BMP or WebP",
                "not found",
            ],
            outcome.stderr,
        )


class FlakyTest(ServersTestCase):
    @parameterized.product(kind=["grpc", "rest"])
    @pytest.mark.slow
    def test_no_answer_is_lost_doubled_or_out_of_order(self, kind):
        self.ask(kind, images=100, seed=3)

    @parameterized.product(kind=["grpc", "rest"])
    @pytest.mark.large
    def test_a_thousand_images_get_their_answers(self, kind):
        self.ask(kind, images=1000, seed=4)

    def ask(self, kind, images, seed):
        rng = np.random.default_rng(seed)
        encoded = [
            tf.io.encode_png(
                np.broadcast_to(colour, [4, 4, 3]).astype(np.uint8)
            ).numpy()
            for colour in rng.integers(0, 256, [images, 3])
        ]
        here = client_lib.Client(client_lib.SavedModel(self.path), 100)
        expected = here.predict(encoded)
        self.assertLen({answer.best[0][1] for answer in expected}, images)
        addresses = self.serve(fault=tf_serving.flaky(0.1, 2.5, seed))
        network = self.connect(addresses, kind, timeout_seconds=2.0)
        client = client_lib.Client(network, 2, in_flight=8)
        found = client.predict(encoded)
        for there, answer in zip(found, expected, strict=True):
            self.assertEqual(there.best[0][0], answer.best[0][0])
            self.assertAlmostEqual(
                there.best[0][1], answer.best[0][1], places=5
            )
        asked = addresses.models.requests
        print(f"{kind}: {images} answers of {images}, {asked} requests")
        self.assertGreater(asked, images // 2 + 1)


if __name__ == "__main__":
    absltest.main()
