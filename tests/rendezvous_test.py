"""Workers find each other, or learn in time who is missing."""

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
from concurrent import futures
from unittest import mock

from absl.testing import absltest
from absl.testing import parameterized

from keras_resnet.training import rendezvous
from tests import runs


def addresses(count):
    return [f"127.0.0.1:{port}" for port in runs.free_ports(count)]


def connected(port):
    """A connection to a port that may not be open yet."""
    while True:
        with contextlib.suppress(ConnectionRefusedError):
            return socket.create_connection(("127.0.0.1", port))
        time.sleep(0.01)


class Link:
    """Passes messages on to an address but for one, then stays silent.

    Whoever sent the lost message finds its connection open, and never hears
    anything on it. Later connections are passed on.
    """

    def __init__(self, address, lost):
        self.target = address.split(":")
        self.left = lost
        self.lock = threading.Lock()
        self.server = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self.server.getsockname()[1]}"
        self.sockets = [self.server]

    def __enter__(self):
        threading.Thread(target=self.accept, daemon=True).start()
        return self

    def __exit__(self, *_):
        for opened in self.sockets:
            opened.close()

    def accept(self):
        with contextlib.suppress(OSError):
            while True:
                near, _ = self.server.accept()
                self.sockets.append(near)
                try:
                    far = socket.create_connection(self.target)
                except OSError:
                    near.close()
                    continue
                self.sockets.append(far)
                state = {"is_cut": False}
                for pair in ((near, far), (far, near)):
                    threading.Thread(
                        target=self.pass_on, args=(*pair, state), daemon=True
                    ).start()

    def pass_on(self, source, target, state):
        with contextlib.suppress(OSError):
            while received := source.recv(1000):
                with self.lock:
                    self.left -= 1
                    if self.left == -1:
                        state["is_cut"] = True
                if not state["is_cut"]:
                    target.sendall(received)
            if not state["is_cut"]:
                target.shutdown(socket.SHUT_WR)


class RendezvousTest(absltest.TestCase):
    def setUp(self):
        super().setUp()
        self.pool = self.enter_context(futures.ThreadPoolExecutor())

    def start(self, workers, index, seconds):
        return self.pool.submit(
            rendezvous.wait_for_workers, workers, index, seconds
        )

    def test_all_go_when_the_last_has_come(self):
        workers = addresses(3)
        early = [self.start(workers, index, 30) for index in (2, 0)]
        done, _ = futures.wait(early, timeout=0.5)
        self.assertEmpty(done)
        for started in [*early, self.start(workers, 1, 30)]:
            started.result()
        for worker in workers:  # TensorFlow takes the ports after this
            port = int(worker.partition(":")[2])
            socket.create_server(("", port)).close()

    def test_first_says_who_did_not_come(self):
        workers = addresses(3)
        started = [self.start(workers, 0, 1), self.start(workers, 2, 2)]
        with self.assertRaisesRegex(
            TimeoutError,
            rf"the 3 workers .* within 1 seconds: .* 1 \({workers[1]}\);",
        ):
            started[0].result()
        with self.assertRaisesRegex(TimeoutError, "no message came from numb"):
            started[1].result()

    def test_other_says_that_the_first_did_not_come(self):
        workers = addresses(2)
        with self.assertRaisesRegex(TimeoutError, r"number 0 \(127.0.0.1"):
            rendezvous.wait_for_workers(workers, 1, 0.3)

    def test_one_who_left_is_missing_until_it_comes_again(self):
        workers = addresses(3)
        first = self.start(workers, 0, 30)
        with self.assertRaises(TimeoutError):
            rendezvous.wait_for_workers(workers, 1, 0.5)
        second = self.start(workers, 2, 30)
        done, _ = futures.wait([first, second], timeout=0.5)
        self.assertEmpty(done)
        for started in (self.start(workers, 1, 30), first, second):
            started.result()

    def test_strangers_are_passed_over(self):
        workers = addresses(2)
        first = self.start(workers, 0, 30)
        port = int(workers[0].partition(":")[2])
        for words in (b"GET / HTTP/1.1\r\n\r\n", b"\xff", b""):
            stranger = connected(port)
            stranger.sendall(words)
            stranger.close()
        self.assertFalse(first.done())
        self.start(workers, 1, 30).result()
        first.result()

    def test_every_message_may_be_lost_once(self):
        """A link that takes the n-th message and never passes it on."""
        self.enter_context(mock.patch.object(rendezvous, "_ASK_SECONDS", 0.05))
        self.enter_context(
            mock.patch.object(rendezvous, "_SILENCE_SECONDS", 0.2)
        )
        for lost in range(8):
            first, port = addresses(2)
            link = self.enter_context(Link(first, lost))
            started = [
                self.start([first, port], 0, 20),
                self.start([link.address, port], 1, 20),
            ]
            for each in started:
                each.result()

    def test_message_in_many_packets_is_heard(self):
        workers = addresses(2)
        first = self.start(workers, 0, 30)
        port = int(workers[0].partition(":")[2])
        with connected(port) as other:
            heard = b""
            for letter in b"keras_resnet worker 1\n":
                other.sendall(bytes([letter]))
                time.sleep(0.002)
            while b"go" not in heard:
                heard += other.recv(100)
            other.sendall(b"keras_resnet gone 1\n")
            first.result()

    def test_silent_connections_are_no_workers(self):
        self.enter_context(
            mock.patch.object(rendezvous, "_SILENCE_SECONDS", 0.2)
        )
        workers = addresses(2)
        first = self.start(workers, 0, 1)
        port = int(workers[0].partition(":")[2])
        with connected(port) as other:
            other.sendall(b"keras_resnet worker 1\n")
            with self.assertRaisesRegex(TimeoutError, "number 1"):
                first.result()

    def test_port_that_is_taken(self):
        with socket.create_server(("", 0)) as taken:
            port = taken.getsockname()[1]
            workers = [*addresses(1), f"127.0.0.1:{port}"]
            with self.assertRaisesRegex(
                OSError, f"port {port} of this worker.*another program uses it"
            ):
                rendezvous.wait_for_workers(workers, 1, 1)

    def test_address_without_a_port(self):
        with self.assertRaisesRegex(ValueError, "HOST:PORT, received 'host'"):
            rendezvous.wait_for_workers(["host", "host:1"], 0, 1)


# Runs the module without its package, whose import takes seconds. A function
# that `PyDLL` calls holds Python's lock, as TensorFlow does.
_LIMITED = """
import ctypes, os, runpy, sys, time
library = ctypes.PyDLL(None)
exit_after = runpy.run_path(sys.argv[1])["exit_after"]
with exit_after({seconds}, "train: a worker is lost"):
    {body}
time.sleep({after})
print("went on")
"""


class ExitAfterTest(parameterized.TestCase):
    @parameterized.named_parameters(
        ("a_wait_that_holds_the_lock", 0.5, "library.sleep(600)", 1),
        ("a_wait_that_ignores_signals", 0.5, "time.sleep(600)", 1),
        ("a_body_that_ends_in_time", 1, "library.usleep(1000)", 0),
        ("a_limit_of_ages", 1e300, "pass", 0),
        ("an_error_of_the_body", 600, "raise SystemExit(3)", 3),
        ("a_process_that_is_killed", 600, "os.kill(os.getpid(), 9)", -9),
    )
    def test_process_ends_with_one_line_if_the_time_is_over(
        self, seconds, body, code
    ):
        after = seconds + 0.5 if seconds < 600 else 0
        script = _LIMITED.format(seconds=seconds, body=body, after=after)
        # Ends when the process that writes the line has ended too.
        outcome = subprocess.run(
            [sys.executable, "-c", script, rendezvous.__file__],
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONFAULTHANDLER": "1"},
        )
        self.assertEqual(outcome.returncode, code, outcome.stderr)
        line = "train: a worker is lost\n" if code == 1 else ""
        self.assertEqual(outcome.stderr, line)
        self.assertEqual(outcome.stdout, "went on\n" * (code == 0))


if __name__ == "__main__":
    absltest.main()
