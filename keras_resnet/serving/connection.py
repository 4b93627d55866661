"""Connects to a model of a TensorFlow Serving program.

`connect("localhost:8500", "resnet50")` uses gRPC, and
`connect("http://localhost:8501", "resnet50")` uses REST.
"""

import re

from keras_resnet.serving import errors
from keras_resnet.serving import grpc_servers
from keras_resnet.serving import rest_servers
from keras_resnet.serving import servers

_MAX_TIMEOUT_SECONDS = 86_400.0
_REST_PORT = 8501  # of TensorFlow Serving's image
_ADDRESS = re.compile(
    r"(?:(?P<scheme>https?)://)?"
    r"(?P<place>(?:[\w.-]+|\[[0-9a-f:.]+\]):(?P<port>[0-9]{1,5}))"
    r"(?P<path>/[\w./~-]*)?",
    re.IGNORECASE | re.ASCII,
)


def connect(
    address: str,
    model_name: str,
    version: str | None = None,
    timeout_seconds: float = 10.0,
    attempts: int = 6,
) -> servers.Server:
    """Returns a model of a server.

    Args:
        address: `HOST:PORT` for gRPC; `http://HOST:PORT`, `https://HOST:PORT`
            or port 8501 for REST.
        model_name: Name of the model on the server.
        version: A number, a label, or None for the newest version.
        timeout_seconds: Deadline of a request, from its connection to the end
            of its response.
        attempts: Largest number of times that a request is sent.

    Raises:
        errors.ArgumentError: If one of them is invalid, or if gRPC needs a
            package that is not installed.
    """
    _check(model_name, version, timeout_seconds, attempts)
    model = servers.ServedModel(model_name, version, timeout_seconds, attempts)
    found = _ADDRESS.fullmatch(address)
    is_rest = found and (found["scheme"] or int(found["port"]) == _REST_PORT)
    if (
        not found
        or not 0 < int(found["port"]) < 2**16
        or (found["path"] and not is_rest)
    ):
        raise errors.ArgumentError(
            "address",
            "a server must be HOST:PORT (gRPC, 8500) or http://HOST:PORT "
            f"(REST, 8501), received {address!r}",
        )
    if is_rest:
        scheme = (found["scheme"] or "http").lower()
        path = (found["path"] or "").rstrip("/")
        return rest_servers.RestServer(
            f"{scheme}://{found['place']}{path}", model
        )
    return grpc_servers.GrpcServer(found["place"], model)


def _check(
    model_name: str,
    version: str | None,
    timeout_seconds: float,
    attempts: int,
) -> None:
    if not 0 < timeout_seconds <= _MAX_TIMEOUT_SECONDS:
        raise errors.ArgumentError(
            "timeout_seconds",
            "the timeout must be above 0 seconds and at most "
            f"{_MAX_TIMEOUT_SECONDS:,.0f}, received {timeout_seconds}",
        )
    if attempts < 1:
        raise errors.ArgumentError(
            "attempts", f"attempts must be 1 or more, received {attempts}"
        )
    if not model_name or not model_name.isprintable():
        raise errors.ArgumentError(
            "model_name",
            "the name of a model must be printable text, received "
            f"{model_name!r}",
        )
    if version is not None:
        is_too_large = (
            version.isdigit() and servers.version_number(version) is None
        )
        if not version or not version.isprintable() or is_too_large:
            raise errors.ArgumentError(
                "version",
                "a version must be a number below 2**63 or a label, received "
                f"{version!r}",
            )
