"""Servers with the responses of a test, over HTTP and gRPC.

with answering.rest(answer) as address: ...
with answering.grpc_server(answer) as address: ...
"""

import concurrent.futures
import contextlib
import json
import re
import socketserver
import threading
from collections.abc import Callable
from collections.abc import Iterator

import grpc

LABELS = ["cat", "dog", "owl"]
ROW = [0.25, 0.5, 0.25]
RIGHT = {
    "probabilities": ROW,
    "classes": "dog",
    "labels": ["dog", "cat"],
    "scores": [0.5, 0.25],
    "status": "",
}


def http_answer(
    content: bytes, status: str = "200 OK", headers: tuple[str, ...] = ()
) -> bytes:
    """An answer whose length is right."""
    lines = [
        f"HTTP/1.1 {status}",
        "Content-Type: application/json",
        f"Content-Length: {len(content)}",
        *headers,
    ]
    return "\r\n".join([*lines, "", ""]).encode() + content


def right(path: str, body: bytes) -> bytes:
    """The response of TensorFlow Serving for a model with `LABELS`."""
    del path
    rows = [RIGHT] * len(json.loads(body)["instances"])
    return http_answer(json.dumps({"predictions": rows}).encode())


class _Server(socketserver.ThreadingTCPServer):
    daemon_threads = True
    allow_reuse_address = True


@contextlib.contextmanager
def rest(answer: Callable[[str, bytes], object]) -> Iterator[str]:
    """Its address.

    Args:
        answer: Takes the path and the body of a request, and returns bytes to
            send, or a function that takes the connection.
    """

    class Handler(socketserver.StreamRequestHandler):
        def handle(self):
            with contextlib.suppress(OSError):
                while self.answer():
                    pass

        def answer(self):
            head = b""
            while not head.endswith(b"\r\n\r\n"):
                line = self.rfile.readline()
                if not line:
                    return False
                head += line
            path = head.split()[1].decode()
            length = re.search(rb"Content-Length: (\d+)", head)
            body = self.rfile.read(int(length[1])) if length else b""
            found = answer(path, body)
            if callable(found):
                found(self.connection)
                return False
            self.connection.sendall(found)
            return True

    with _Server(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(
            target=server.serve_forever, args=[0.01], daemon=True
        )
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


@contextlib.contextmanager
def grpc_server(
    answer: Callable[[bytes], bytes], compression=None
) -> Iterator[str]:
    """Its address; it answers messages with messages, as bytes."""

    class Handler(grpc.GenericRpcHandler):
        def service(self, _):
            return grpc.unary_unary_rpc_method_handler(
                lambda request, _: answer(request)
            )

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        server = grpc.server(
            pool,
            handlers=[Handler()],
            compression=compression,
            options=[
                ("grpc.max_receive_message_length", -1),
                ("grpc.max_send_message_length", -1),
            ],
        )
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        try:
            yield f"127.0.0.1:{port}"
        finally:
            server.stop(None).wait()
