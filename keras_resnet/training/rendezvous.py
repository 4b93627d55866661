"""The rendezvous of several workers, with a timeout.

TensorFlow starts its servers when it builds the strategy of several workers.
The first server then waits for the others without a timeout, and ignores
signals. The workers therefore connect before that. Each one contacts the first
worker, on the port that TensorFlow will use. The first worker releases them
when all are there. A link can still be cut before the servers use it, so
`exit_after` limits the time of their start.

Messages can be lost, and a dead connection can look alive. A worker therefore
asks again every second, and opens a new connection after three seconds without
a response. The first worker leaves when each worker has confirmed its release:

    worker: keras_resnet worker 2    first: wait
    worker: keras_resnet worker 2    first: go
    worker: keras_resnet gone 2      first: bye
"""

import contextlib
import faulthandler
import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from collections.abc import Sequence

_HELLO, _GONE = "keras_resnet worker", "keras_resnet gone"
_WAIT, _GO, _BYE = "wait", "go", "bye"

_ASK_SECONDS = 1.0  # between two questions of a worker
_SILENCE_SECONDS = 3.0  # after which a connection is taken for lost
_LONGEST_LINE = 100

# A process that writes its argument to stderr if it receives any text.
_REPORT = "import sys; sys.stdin.readline() and sys.stderr.write(sys.argv[1])"


def wait_for_workers(
    addresses: Sequence[str], index: int, seconds: float
) -> None:
    """Waits until all workers have called this function.

    Args:
        addresses: `HOST:PORT` of each worker, in order.
        index: Number of this worker, from 0.
        seconds: Longest time to wait.

    Raises:
        TimeoutError: If a worker is missing after this time.
        OSError: If another program uses the port of this worker.
    """
    deadline = time.monotonic() + seconds
    port = _port(addresses[index])
    try:
        own = _open(port, len(addresses))
    except OSError as error:
        raise OSError(
            f"port {port} of this worker, number {index} in TF_CONFIG, cannot "
            f"be opened ({error.strerror}): another program uses it"
        ) from error
    with own:
        if index:
            missing = _report(addresses[0], index, deadline)
        else:
            missing = _gather(own, len(addresses), deadline)
    if missing:
        names = ", ".join(f"{i} ({addresses[i]})" for i in sorted(missing))
        raise TimeoutError(
            f"the {len(addresses)} workers of TF_CONFIG did not connect within "
            f"{seconds:g} seconds: no message came from number {names}; start "
            "the same command on all of them, each with its own index"
        )


@contextlib.contextmanager
def exit_after(seconds: float, line: str) -> Iterator[None]:
    """Ends the process with exit code 1 if the body takes too long.

    TensorFlow holds Python's lock while it starts its servers, so no thread and
    no signal handler of Python can run. The timer of `faulthandler` needs no
    lock. It writes a trace to the pipe of a small process, which writes the
    line, and exits.

    Args:
        seconds: Longest time of the body.
        line: Text for stderr, without its newline.
    """
    with subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", _REPORT, f"{line}\n"],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C does not reach it
    ) as report:
        assert report.stdin is not None
        faulthandler.dump_traceback_later(
            min(seconds, threading.TIMEOUT_MAX), exit=True, file=report.stdin
        )
        try:
            yield
        finally:
            faulthandler.cancel_dump_traceback_later()


def _open(port, backlog):
    """Returns a socket that listens on every address, as gRPC's do."""
    if socket.has_dualstack_ipv6():
        with contextlib.suppress(OSError):  # the kernel may lack IPv6
            return socket.create_server(
                ("", port),
                family=socket.AF_INET6,
                backlog=backlog,
                dualstack_ipv6=True,
            )
    return socket.create_server(("", port), backlog=backlog)


def _port(address):
    _, _, port = address.rpartition(":")
    try:
        return int(port)
    except ValueError:
        raise ValueError(
            f"a worker of TF_CONFIG must be HOST:PORT, received {address!r}"
        ) from None


def _gather(own, count, deadline):
    """Releases all workers; returns the numbers of those that are missing."""
    own.setblocking(False)
    others = set(range(1, count))
    heard, gone = set(), set()
    peers = []
    with contextlib.ExitStack() as connections:
        while gone != others:
            now = time.monotonic()
            for peer in list(peers):
                if peer.is_closed or now > peer.heard_at + _SILENCE_SECONDS:
                    peers.remove(peer)
                    peer.connection.close()
            here = gone | {peer.number for peer in peers}
            may_go = bool(gone) or others <= here
            for peer in peers:
                if may_go and peer.number in others - gone:
                    peer.say(_GO)
            if now >= deadline:
                missing = others - (gone if may_go else here)
                return (missing - heard) or missing
            wait = min(deadline - now, _ASK_SECONDS)
            for ready in select.select([own, *peers], [], [], wait)[0]:
                if ready is own:
                    with contextlib.suppress(
                        OSError
                    ):  # the peer closed at once
                        connection = connections.enter_context(own.accept()[0])
                        peers.append(_Peer(connection))
                    continue
                for word, number in ready.messages(others):
                    heard.add(number)
                    if word == _GONE:
                        gone.add(number)
                        ready.say(_BYE)
                    elif not may_go:
                        ready.say(_WAIT)
    return set()


class _Peer:
    """A connection from another worker, or from an unknown program.

    Attributes:
        number: The number of the worker; None while it is unknown.
        heard_at: Time of its last message.
        is_closed: Whether the connection is closed.
    """

    def __init__(self, connection):
        connection.setblocking(False)
        self.connection = connection
        self.number = None
        self.heard_at = time.monotonic()
        self.is_closed = False
        self._lines = _Lines(connection)

    def fileno(self):
        return self.connection.fileno()

    def messages(self, numbers):
        """Yields (word, number) of each valid message."""
        try:
            lines = self._lines.receive()
        except BlockingIOError:
            return
        except OSError:
            self.is_closed = True
            return
        for line in lines:
            word, _, number = line.rpartition(" ")
            if word not in (_HELLO, _GONE) or not number.isdecimal():
                continue
            if int(number) in numbers:
                self.number, self.heard_at = int(number), time.monotonic()
                yield word, self.number

    def say(self, word):
        with contextlib.suppress(OSError):  # the worker asks again
            self.connection.sendall(f"{word}\n".encode())


class _Lines:
    """Lines from a connection, in any number of packets."""

    def __init__(self, connection):
        self._connection = connection
        self._rest = b""

    def receive(self):
        """Returns the complete lines.

        Raises OSError at the end of the connection or of a long line.
        """
        received = self._connection.recv(_LONGEST_LINE)
        *lines, self._rest = (self._rest + received).split(b"\n")
        if not received or len(self._rest) > _LONGEST_LINE:
            raise ConnectionResetError
        return [line.decode(errors="replace") for line in lines]


def _report(address, index, deadline):
    """Contacts the first worker until it confirms the release of this one."""
    place = address.rpartition(":")[0].strip("[]"), _port(address)
    may_go = False
    while (left := deadline - time.monotonic()) > 0:
        try:
            with socket.create_connection(
                place, min(left, _SILENCE_SECONDS)
            ) as first:
                for word in _answers(first, index, may_go, deadline):
                    may_go = may_go or word == _GO
                    if word == _BYE:
                        return set()
        except OSError:  # the first worker has not started yet, or it has left
            if may_go:
                return set()
        time.sleep(0.1)
    return set() if may_go else {0}


def _answers(first, index, may_go, deadline):
    """Asks the first worker every second; ends when it is silent."""
    lines = _Lines(first)
    ask_at = heard_at = time.monotonic()
    while True:
        now = time.monotonic()
        if now >= min(heard_at + _SILENCE_SECONDS, deadline):
            return
        if now >= ask_at:
            question = _GONE if may_go else _HELLO
            first.sendall(f"{question} {index}\n".encode())
            ask_at = now + _ASK_SECONDS
        first.settimeout(max(ask_at - now, 0.01))
        try:
            words = lines.receive()
        except TimeoutError:
            continue
        for word in words:
            if word in (_WAIT, _GO, _BYE):
                heard_at = time.monotonic()
                yield word
            if word == _GO and not may_go:
                may_go, ask_at = True, heard_at
