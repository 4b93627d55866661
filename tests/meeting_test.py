"""Workers meet, or learn in time who is missing."""

import contextlib
import socket
import time
from concurrent import futures

from absl.testing import absltest

from keras_resnet.training import meeting
from tests import runs


def addresses(count):
    return [f"127.0.0.1:{port}" for port in runs.free_ports(count)]


class MeetingTest(absltest.TestCase):
    def setUp(self):
        super().setUp()
        self.pool = self.enter_context(futures.ThreadPoolExecutor())

    def start(self, workers, index, seconds):
        return self.pool.submit(meeting.meet, workers, index, seconds)

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
        with self.assertRaisesRegex(TimeoutError, "nothing was heard of numb"):
            started[1].result()

    def test_other_says_that_the_first_did_not_come(self):
        workers = addresses(2)
        with self.assertRaisesRegex(TimeoutError, r"number 0 \(127.0.0.1"):
            meeting.meet(workers, 1, 0.3)

    def test_one_who_left_is_missing_until_it_comes_again(self):
        workers = addresses(3)
        first = self.start(workers, 0, 30)
        with self.assertRaises(TimeoutError):
            meeting.meet(workers, 1, 0.5)
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
            while True:
                with contextlib.suppress(ConnectionRefusedError):
                    stranger = socket.create_connection(("127.0.0.1", port))
                    break
                time.sleep(0.01)
            stranger.sendall(words)
            stranger.close()
        self.assertFalse(first.done())
        self.start(workers, 1, 30).result()
        first.result()

    def test_port_that_is_taken(self):
        with socket.create_server(("", 0)) as taken:
            port = taken.getsockname()[1]
            workers = [*addresses(1), f"127.0.0.1:{port}"]
            with self.assertRaisesRegex(
                OSError, f"port {port} of this worker.*another program has it"
            ):
                meeting.meet(workers, 1, 1)

    def test_address_without_a_port(self):
        with self.assertRaisesRegex(ValueError, "HOST:PORT, received 'host'"):
            meeting.meet(["host", "host:1"], 0, 1)


if __name__ == "__main__":
    absltest.main()
