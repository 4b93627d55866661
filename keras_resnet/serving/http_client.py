"""HTTP requests with a deadline and a limit on the response's size.

`http.client` and `requests` limit the time of each read, so a server that sends
one byte a second holds them forever. Here a deadline covers the look-up of the
address, the connection, TLS, the request, and the headers and body of the
response. Another thread can stop a request earlier.

The client does not follow redirects, does not use proxies, and rejects
compressed responses.
"""

import concurrent.futures
import errno
import http.client
import io
import os
import select
import socket
import ssl
import threading
import time
import urllib.parse
import weakref
from collections.abc import Callable
from typing import NamedTuple
from typing import TypeVar

T = TypeVar("T")

_STEP_SECONDS = 0.1  # between two looks at the event that stops a wait
_SENT_BYTES = 2**16


class Stopped(Exception):
    """Another thread stopped the request."""


class InvalidResponse(Exception):
    """A response is not HTTP, or larger than the limit."""


class Deadline:
    """Time at which every wait ends.

    Args:
        seconds: Time from now.
        stopped: Event that ends the waits earlier.
    """

    def __init__(self, seconds: float, stopped: threading.Event):
        self._end = time.monotonic() + seconds
        self._stopped = stopped

    @property
    def seconds_left(self) -> float:
        """Remaining time.

        Raises:
            Stopped: If another thread stopped the request.
            TimeoutError: If the deadline has passed.
        """
        if self._stopped.is_set():
            raise Stopped("the request was stopped")
        left = self._end - time.monotonic()
        if left <= 0:
            raise TimeoutError("the deadline has passed")
        return left

    def wait(
        self,
        operation: Callable[[float], T],
        waits: type[Exception] = TimeoutError,
    ) -> T:
        """Calls the operation until it returns, and returns its value.

        Args:
            operation: Takes seconds, after which it raises `waits`.
            waits: Exception that leads to another call.

        Raises:
            Stopped: If another thread stopped the request.
            TimeoutError: If the deadline has passed.
        """
        while True:
            seconds = min(self.seconds_left, _STEP_SECONDS)
            try:
                return operation(seconds)
            except waits:
                continue


class Response(NamedTuple):
    """A server's response, with any status."""

    status: int
    location: str | None
    content: bytes


class HttpClient:
    """Connections to one server, for any number of threads.

    Args:
        address: `http://HOST:PORT` or `https://HOST:PORT`, with the path of
            the server if it has one.
        max_response_bytes: Size of the largest response, with its headers.
    """

    def __init__(self, address: str, max_response_bytes: int):
        parts = urllib.parse.urlsplit(address)
        self._host = parts.hostname or ""
        self._port = parts.port or 0
        self._netloc = parts.netloc
        self._path = parts.path.rstrip("/")
        self._context = None
        if parts.scheme == "https":
            self._context = ssl.create_default_context()
        self._max_response_bytes = max_response_bytes
        self._idle: list[_Connection] = []
        self._lock = threading.Lock()
        weakref.finalize(self, _close, self._idle)

    def request(
        self, path: str, body: bytes | None, deadline: Deadline
    ) -> Response:
        """Posts a body of JSON, or gets the path without a body.

        Raises:
            InvalidResponse: If the response is too large or is not HTTP.
            OSError: If the server cannot be reached or closes the connection.
            TimeoutError: If the deadline has passed.
            Stopped: If another thread stopped the request.
        """
        method = "GET" if body is None else "POST"
        lines = [
            f"{method} {self._path}{path} HTTP/1.1",
            f"Host: {self._netloc}",
            "Accept: application/json",
            "Accept-Encoding: identity",
        ]
        if body is not None:
            lines += [
                "Content-Type: application/json",
                f"Content-Length: {len(body)}",
            ]
        head = "\r\n".join([*lines, "", ""]).encode("ascii")
        connection = self._idle_connection() or self._connect(deadline)
        try:
            connection.begin(deadline, self._max_response_bytes)
            connection.send(head)
            connection.send(body or b"")
            response, stays_open = self._read(connection, method)
        except (http.client.HTTPException, ValueError) as error:
            connection.close()
            if connection.has_ended:
                raise _cut_off() from error
            reason = f"{type(error).__name__} {error}".strip()
            raise InvalidResponse(f"it must be HTTP: {reason}") from error
        except BaseException:
            connection.close()
            raise
        if stays_open:
            with self._lock:
                self._idle.append(connection)
        else:
            connection.close()
        return response

    def _read(self, connection, method) -> tuple[Response, bool]:
        response = http.client.HTTPResponse(connection, method=method)
        response.begin()
        coding = response.headers.get("Content-Encoding", "identity")
        if coding.lower() != "identity":
            raise InvalidResponse(
                f"it must not be compressed, received {coding[:40]}"
            )
        limit = self._max_response_bytes
        if response.length is not None and response.length > limit:
            raise InvalidResponse(_too_large(limit))
        # One byte more than allowed: lengths and chunk sizes may be wrong.
        content = response.read(limit + 1)
        if len(content) > limit:
            raise InvalidResponse(_too_large(limit))
        # Truncated headers lack the length of the body.
        if connection.has_ended and (response.length or not content):
            raise _cut_off()
        location = response.headers.get("Location")
        stays_open = response.isclosed() and not response.will_close
        response.close()
        return Response(response.status, location, content), stays_open

    def _idle_connection(self) -> "_Connection | None":
        while True:
            with self._lock:
                if not self._idle:
                    return None
                connection = self._idle.pop()
            if connection.is_idle():
                return connection
            connection.close()

    def _connect(self, deadline: Deadline) -> "_Connection":
        error: OSError | None = None
        for family, kind, protocol, _, address in self._addresses(deadline):
            opened = socket.socket(family, kind, protocol)
            try:
                opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                _connect(opened, address, deadline)
                if self._context:
                    opened = self._with_tls(opened, deadline)
                return _Connection(opened)
            except TimeoutError:
                opened.close()
                raise
            except OSError as failed:
                opened.close()
                error = failed
            except BaseException:
                opened.close()
                raise
        raise error or OSError(f"{self._host} has no address")

    def _addresses(self, deadline: Deadline) -> list:
        """Looks up the host in another thread: the call cannot time out."""
        found: concurrent.futures.Future = concurrent.futures.Future()

        def look_up():
            try:
                found.set_result(
                    socket.getaddrinfo(
                        self._host, self._port, type=socket.SOCK_STREAM
                    )
                )
            except (OSError, UnicodeError) as error:
                found.set_exception(error)

        threading.Thread(target=look_up, daemon=True).start()
        try:
            return deadline.wait(found.result, concurrent.futures.TimeoutError)
        except UnicodeError as error:
            raise OSError(f"the host name {self._host} is malformed") from error

    def _with_tls(self, opened: socket.socket, deadline: Deadline):
        assert self._context is not None
        secured = self._context.wrap_socket(
            opened,
            server_hostname=self._host,
            do_handshake_on_connect=False,
        )

        def shake_hands(seconds):
            secured.settimeout(seconds)
            secured.do_handshake()

        try:
            deadline.wait(shake_hands)
        except BaseException:
            secured.close()
            raise
        return secured


def _close(connections: "list[_Connection]") -> None:
    for connection in connections:
        connection.close()


def _connect(opened: socket.socket, address, deadline: Deadline) -> None:
    opened.setblocking(False)
    code = opened.connect_ex(address)
    poll = select.poll()
    poll.register(opened, select.POLLOUT)
    while code == errno.EINPROGRESS:
        seconds = min(deadline.seconds_left, _STEP_SECONDS)
        if poll.poll(1000 * seconds):
            code = opened.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    if code:
        raise OSError(code, os.strerror(code))


class _Connection:
    """A connection with the interface that `http.client.HTTPResponse` needs."""

    def __init__(self, opened: socket.socket):
        self._socket = opened

    def begin(self, deadline: Deadline, max_bytes: int) -> None:
        """Sets the limits of the next request."""
        self._deadline = deadline
        self._max_bytes = max_bytes
        self._left = max_bytes
        self.has_ended = False

    def send(self, content: bytes) -> None:
        view = memoryview(content)
        while view:

            def some(seconds, view=view):
                self._socket.settimeout(seconds)
                return self._socket.send(view[:_SENT_BYTES])

            view = view[self._deadline.wait(some) :]

    def receive_into(self, buffer) -> int:
        if self._left <= 0:
            raise InvalidResponse(_too_large(self._max_bytes))

        def some(seconds):
            self._socket.settimeout(seconds)
            return self._socket.recv_into(buffer)

        count = self._deadline.wait(some)
        self._left -= count
        self.has_ended = count == 0
        return count

    def makefile(self, _mode: str) -> io.BufferedReader:
        return io.BufferedReader(_Reader(self))

    def is_idle(self) -> bool:
        """Whether the server has not closed it and has not sent data."""
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        return not poll.poll(0)

    def close(self) -> None:
        self._socket.close()


class _Reader(io.RawIOBase):
    def __init__(self, connection: _Connection):
        self._connection = connection

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        return self._connection.receive_into(buffer)


def _cut_off() -> ConnectionResetError:
    return ConnectionResetError(
        errno.ECONNRESET, "the server closed the connection too early"
    )


def _too_large(limit: int) -> str:
    return (
        f"it must have at most {limit:,} bytes; send fewer images (batch_size)"
    )
