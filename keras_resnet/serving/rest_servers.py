"""Models of TensorFlow Serving over REST."""

import base64
import json
import urllib.parse
from collections.abc import Sequence
from typing import Any

from keras_resnet.serving import http_client
from keras_resnet.serving import servers

_MAX_CONTAINERS = 100_000  # lists and objects take the most memory and time
_SHOWN_BYTES = 60  # of an invalid response
# gRPC's names of the HTTP codes of TensorFlow Serving.
_CODES = {
    400: "INVALID_ARGUMENT",
    404: "NOT_FOUND",
    429: "RESOURCE_EXHAUSTED",
    503: "UNAVAILABLE",
    504: "DEADLINE_EXCEEDED",
}


class RestServer(servers.Server):
    """A model of a server that speaks HTTP and JSON."""

    def __init__(self, address: str, model: servers.ServedModel):
        super().__init__(address, model)
        self._http = http_client.HttpClient(address, servers.MAX_RESPONSE_BYTES)
        self._path = f"/v1/models/{urllib.parse.quote(model.name, safe='')}"
        if self._version is not None:
            self._path += f"/versions/{self._version}"
        elif self._label is not None:
            self._path += f"/labels/{urllib.parse.quote(self._label, safe='')}"

    def _send(self, images, deadline, signature="serving_default"):
        body = _body(signature, "image_bytes", images)
        response = self._json(f"{self._path}:predict", body, deadline)
        predictions = response.get("predictions")
        if not isinstance(predictions, list):
            raise http_client.InvalidResponse(
                "it must have a list of predictions"
            )
        if len(predictions) != len(images):
            raise http_client.InvalidResponse(
                f"it must have {len(images)} predictions, received "
                f"{len(predictions)}"
            )
        if not any(isinstance(row, dict) for row in predictions):
            # The form of a signature with one output.
            return {"one output": predictions}
        for row in predictions:
            if not isinstance(row, dict) or row.keys() != predictions[0].keys():
                raise http_client.InvalidResponse(
                    "its predictions must have the same outputs"
                )
        return {
            name: [row[name] for row in predictions] for name in predictions[0]
        }

    def _json(self, path, body, deadline) -> dict[str, Any]:
        """The JSON object of a response.

        Raises:
            errors.RejectedError, errors.ServerError: If the server reports an
                error.
            http_client.InvalidResponse: If it is not a JSON object.
        """
        response = self._request(path, body, deadline)
        beginning = repr(response.content[:_SHOWN_BYTES])[1:]
        try:
            if sum(map(response.content.count, b"[{")) > _MAX_CONTAINERS:
                raise ValueError(f"more than {_MAX_CONTAINERS:,} lists")
            found = json.loads(response.content, object_pairs_hook=_unique)
        except (ValueError, RecursionError) as error:
            if response.status == 200:
                raise http_client.InvalidResponse(
                    f"it must be JSON, received {beginning}: {error}"
                ) from error
            found = None
        if response.status == 200:
            if isinstance(found, dict):
                return found
            raise http_client.InvalidResponse(
                f"it must be an object, received {beginning}"
            )
        code = _CODES.get(response.status, f"HTTP {response.status}")
        message = found.get("error") if isinstance(found, dict) else None
        if isinstance(message, str):
            raise self._error(code, servers.sentence(message))
        if code == "INVALID_ARGUMENT":  # without a message about an image
            code = f"HTTP {response.status}"
        raise self._error(code, f"received {beginning}")

    def _request(self, path, body, deadline) -> http_client.Response:
        try:
            response = self._http.request(path, body, deadline)
        except TimeoutError:
            raise
        except OSError as error:
            reason = error.strerror or str(error)
            raise self._error("UNAVAILABLE", reason) from error
        if 300 <= response.status < 400:
            raise self._error(
                f"HTTP {response.status}",
                "redirects are not followed, received "
                f"{response.location or 'no address'}",
            )
        return response


def _body(signature: str, name: str, values: Sequence[bytes]) -> bytes:
    # In pieces: a batch may be a large part of the memory.
    pieces = [b'{"signature_name": "%s", "instances": [' % signature.encode()]
    for i, value in enumerate(values):
        pieces += [
            b", " if i else b"",
            b'{"%s": {"b64": "' % name.encode(),
            base64.b64encode(value),
            b'"}}',
        ]
    pieces.append(b"]}")
    return b"".join(pieces)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name occurs twice")
    return found
