"""The load generator counts what it sent, on functions and on a server."""

import json
import os
import tempfile
import threading
import time
from unittest import mock

import numpy as np
import pytest
import tensorflow as tf
from absl.testing import absltest
from absl.testing import parameterized

from keras_resnet.serving import client
from keras_resnet.serving import load_testing
from tests import colours
from tests import programs
from tests import tf_serving


class HoldTest(parameterized.TestCase):
    def test_images_are_sent_in_turn(self):
        asked = []
        report = load_testing.run_load_test(
            asked.append,
            [b"0", b"1", b"2"],
            200,
            0.02,
            batch_size=2,
            in_flight=1,
        )
        self.assertEqual(
            asked, [[b"0", b"1"], [b"2", b"0"], [b"1", b"2"], [b"0", b"1"]]
        )
        self.assertEqual((report.requests, report.images), (4, 8))
        self.assertEqual(report.errors, {})

    def test_errors_are_counted_by_their_kind(self):
        def ask(images):
            if images == [b"2"]:
                raise ValueError("no")
            if images == [b"3"]:
                error = OSError("gone")
                error.code = "UNAVAILABLE"
                raise error

        report = load_testing.run_load_test(
            ask, [b"%d" % i for i in range(5)], 1000, 0.01
        )
        self.assertEqual(report.errors, {"ValueError": 2, "UNAVAILABLE": 2})
        self.assertEqual(report.to_json()["answers"], 6)

    def test_time_runs_from_when_a_request_was_due(self):
        gate = threading.Event()
        timer = threading.Timer(0.2, gate.set)
        timer.start()
        report = load_testing.run_load_test(
            lambda _: gate.wait(), [b"1"], rate=1000, seconds=0.05, in_flight=1
        )
        timer.join()
        # Each response is immediate, but all wait for the first one.
        self.assertLen(report.latencies, 50)
        self.assertGreater(report.latencies.min(), 0.1)

    def test_quantiles_are_those_of_the_latencies(self):
        latencies = np.arange(1, 102) / 1000.0
        report = load_testing.LoadReport(101, 101, {}, 2.0, latencies)
        found = report.to_json()
        self.assertAlmostEqual(found["p50_ms"], 51.0)
        self.assertAlmostEqual(found["p95_ms"], 96.0)
        self.assertAlmostEqual(found["p99_ms"], 100.0)
        self.assertAlmostEqual(found["images_per_second"], 50.5)

    def test_load_that_is_interrupted_waits_for_no_answer(self):
        gate = threading.Event()
        self.addCleanup(gate.set)

        def ask(_):
            gate.wait(60)

        with (
            mock.patch.object(time, "sleep", side_effect=KeyboardInterrupt),
            self.assertRaises(KeyboardInterrupt),
        ):
            load_testing.run_load_test(ask, [b"1"], rate=1, seconds=1)
        with (
            mock.patch.object(
                load_testing.concurrent.futures.Future,
                "result",
                side_effect=KeyboardInterrupt,
            ),
            self.assertRaises(KeyboardInterrupt),
        ):
            load_testing.run_load_test(
                ask, [b"1"], rate=100, seconds=0.1, in_flight=1
            )
        self.assertFalse(gate.is_set())

    @parameterized.parameters(
        ({"rate": float("nan")}, "rate must be above 0 and finite, rec.* nan"),
        ({"seconds": float("inf")}, "seconds must be above 0 and finite"),
        ({"rate": 0}, "rate must be above 0 and finite, received 0"),
        ({"seconds": -1}, "seconds must be above 0 and finite, received -1"),
        ({"images": []}, "the number of images must be above 0"),
    )
    def test_numbers_that_are_not_above_0_are_refused(self, change, message):
        arguments = {"images": [b"1"], "rate": 1, "seconds": 1, **change}
        with self.assertRaisesRegex(ValueError, message):
            load_testing.run_load_test(len, **arguments)


class SharesTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.now = 0.0
        self.sent = []
        self.enter_context(
            mock.patch.object(time, "perf_counter", lambda: self.now)
        )

    def takes(self, seconds):
        def send(batch):
            self.sent.append(batch)
            self.now += seconds[batch[0][:1]]

        return send

    def test_shares_are_differences_of_three_requests(self):
        predict = self.takes({b"j": 10.0, b"\x89": 4.0})
        reject = self.takes({b"j": 1.0})
        images = [b"j" * 100, b"j" * 1000, b"j" * 200]
        shares = load_testing.measure_shares(predict, reject, images, 2, 3)
        self.assertEqual(
            shares, load_testing.RequestShares(10_000.0, 0.6, 0.3, 0.1)
        )
        # A request for each kind in each turn, the warm-up included.
        self.assertLen(self.sent, 4 * 3)
        for whole, pixels, rejected in zip(
            *(self.sent[i::3] for i in range(3)), strict=True
        ):
            self.assertEqual(whole, rejected)
            self.assertEqual([*map(len, whole)], [*map(len, pixels)])

    def test_network_in_this_process_has_no_protocol(self):
        predict = self.takes({b"j": 10.0, b"\x89": 4.0})
        shares = load_testing.measure_shares(predict, None, [b"j"])
        self.assertEqual(
            (shares.decoding, shares.network, shares.protocol), (0.6, 0.4, 0.0)
        )

    @parameterized.parameters(0, 68, 69, 70, 1_000)
    def test_image_of_one_pixel_has_any_size(self, size):
        image = load_testing.pixel_image(size)
        smallest = len(load_testing.pixel_image(0))
        self.assertLen(image, max(size, smallest))
        self.assertEqual(tf.io.decode_png(image).shape, (1, 1, 3))


class ProgramTest(parameterized.TestCase):
    @pytest.mark.slow
    def test_program_loads_a_server(self):
        with tempfile.TemporaryDirectory() as folder:
            colours.publish(os.path.join(folder, "exported"))
            with open(os.path.join(folder, "red.png"), "wb") as file:
                file.write(colours.image("red"))
            with tf_serving.serve("m", f"{folder}/exported") as addresses:
                for address in addresses[:2]:
                    code, out, err = programs.run(
                        "load",
                        f"--server={address}",
                        "--model_name=m",
                        "--rate=50",
                        "--seconds=0.2",
                        "--timeout=60",
                        f"{folder}/red.png",
                    )
                    self.assertEqual((code, err), (0, []))
                    found = json.loads(out[-1])
                    self.assertEqual(found["requests"], 10)
                    self.assertEqual(found["answers"], 10)
                    self.assertEqual(found["errors"], {})
                    idle = found["idle_server"]
                    self.assertAlmostEqual(
                        idle["decoding"] + idle["network"] + idle["protocol"],
                        1.0,
                    )
                    self.assertRegex(out[0], "decoding .*network .*protocol")

    @pytest.mark.slow
    def test_shares_of_a_network_in_this_process(self):
        with tempfile.TemporaryDirectory() as folder:
            colours.publish(os.path.join(folder, "exported"))
            for name, content in (
                ("1.png", colours.image("red")),
                ("2.png", b"no image"),  # counts as an error, as before
            ):
                with open(os.path.join(folder, name), "wb") as file:
                    file.write(content)
            for flag in ("--shares", "--noshares"):
                code, out, err = programs.run(
                    "load",
                    f"--saved_model={folder}/exported",
                    flag,
                    "--seconds=0.2",
                    f"{folder}/1.png",
                    f"{folder}/2.png",
                )
                self.assertEqual((code, err), (0, []))
                found = json.loads(out[-1])
                self.assertEqual(found["errors"], {"RejectedError": 1})
                self.assertEqual("idle_server" in found, flag == "--shares")
                if flag == "--shares":
                    self.assertEqual(found["idle_server"]["protocol"], 0.0)

    def test_image_that_is_refused_is_named_in_one_line(self):
        with tempfile.TemporaryDirectory() as folder:
            colours.publish(os.path.join(folder, "exported"))
            path = os.path.join(folder, "text.png")
            with open(path, "w") as file:
                file.write("no image")
            code, out, err = programs.run(
                "load", f"--saved_model={folder}/exported", path
            )
        self.assertEqual((code, out), (1, []))
        self.assertLen(err, 1)
        self.assertRegex(err[0], f"rejects {path}: not an image")

    @parameterized.parameters(
        (["/dev/zero"], "/dev/zero: must be a regular file"),
        (["data:,1", "data:,23"], "at most 2 bytes together.*data:,23"),
        (["data:"], "data:: a data: URL must be"),
    )
    def test_what_cannot_be_read_is_named_in_one_line(self, names, message):
        with mock.patch.object(client, "MAX_BYTES_IN_FLIGHT", 2):
            code, out, err = programs.run(
                "load", "--server=127.0.0.1:1", "--model_name=m", *names
            )
        self.assertEqual((code, out), (1, []))
        self.assertLen(err, 1)
        self.assertRegex(err[0], message)

    @parameterized.parameters(
        ([], "--server=: give it or --saved_model"),
        (["--server=a", "--saved_model=b"], "--server=a"),
        (["--server=a", "--model_name=m"], "--server=a: .*HOST:PORT"),
        (["--server=a:1"], "--model_name=: give the name of the model"),
        (["--server=a:1", "--model_name=m"], "--server=a:1: name images"),
        (
            ["--saved_model=b", "--model_name=m"],
            "--model_name=m: cannot be combined",
        ),
        (["--saved_model=b", "--timeout=1"], "--timeout=1.0: cannot be"),
        (["--server=a:1", "--rate=0"], "--rate=0"),
        (["--server=a:1", "--seconds=-1"], "--seconds=-1"),
        (["--server=a:1", "--batch_size=0"], "--batch_size=0"),
        (["--server=a:1", "--in_flight=0"], "--in_flight=0"),
        (["--server=a:1", "--timeout=0"], "--timeout=0"),
        (
            ["--server=a:1", "--model_name=m", "--timeout=nan"],
            "--timeout=nan",
        ),
        (["--server=a:1", "--model_name=\t"], "--model_name=.: .*printable"),
    )
    def test_usage_error_is_one_line_and_exit_code_2(self, arguments, message):
        code, out, err = programs.run("load", *arguments)
        self.assertEqual((code, out), (2, []))
        self.assertLen(err, 1)
        self.assertRegex(err[0], message)


if __name__ == "__main__":
    absltest.main()
