"""Load tests: requests at a fixed rate, and the latencies of the responses.

`measure_shares` splits the time of a request on an idle server into decoding,
network and protocol. `run_load_test` loads the server: it sends requests at
fixed times, even before earlier ones have a response. The latency of a request
counts from the time at which it was due. A server that pauses for a second thus
delays every request that was due in that second.
"""

import collections
import concurrent.futures
import dataclasses
import itertools
import math
import struct
import time
import zlib
from collections.abc import Callable
from collections.abc import Sequence
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class LoadReport:
    """Result of a load test.

    Attributes:
        requests: Number of requests.
        images: Number of images in the successful requests.
        errors: kind of error -> number of requests.
        seconds: Time from the first request to the last response.
        latencies: Seconds of each response, in ascending order.
    """

    requests: int
    images: int
    errors: dict[str, int]
    seconds: float
    latencies: np.ndarray

    def to_json(self) -> dict[str, Any]:
        """Returns throughput and percentiles of latency, in milliseconds."""
        quantiles = {
            f"p{q}_ms": float(np.percentile(self.latencies, q) * 1e3)
            for q in (50, 90, 95, 99)
            if len(self.latencies)
        }
        return {
            "requests": self.requests,
            "answers": len(self.latencies),
            "errors": self.errors,
            "seconds": self.seconds,
            "images_per_second": self.images / self.seconds,
            **quantiles,
        }


@dataclasses.dataclass(frozen=True)
class RequestShares:
    """Time of one request on an idle server, by what takes it.

    Attributes:
        milliseconds: Time of a request.
        decoding: Share of decoding and resizing the images.
        network: Share of the network and everything else that the server and
            the client do once the request is parsed: the wait for a batch, the
            response and its check.
        protocol: Share of sending, receiving and parsing the request; 0 in
            this process.
    """

    milliseconds: float
    decoding: float
    network: float
    protocol: float

    def to_json(self) -> dict[str, float]:
        """Returns the fields."""
        return dataclasses.asdict(self)


def measure_shares(
    predict: Callable[[Sequence[bytes]], Any],
    reject: Callable[[Sequence[bytes]], Any] | None,
    images: Sequence[bytes],
    batch_size: int = 1,
    turns: int = 10,
) -> RequestShares:
    """Measures the shares of a request, one request at a time.

    Each turn sends three requests of the same number of bytes:

        1. the images,
        2. images of one pixel, which take no time to decode,
        3. the images, to a signature that does not exist.

    The protocol takes the third time, the network the second minus the third,
    and decoding the first minus the second. So the shares have the sum 1. All
    times are medians over the turns. A share near 0 may be negative, by the
    noise of the measurement.

    Args:
        predict: Takes images, and returns or raises.
        reject: Takes images, and returns when the server rejected them; None
            for a network in this process.
        images: Encoded images, which are sent in turn.
        batch_size: Images in a request.
        turns: Number of turns after the first one, which warms up.

    >>> shares = measure_shares(len, None, [b"an image"])
    >>> round(shares.decoding + shares.network + shares.protocol, 6)
    1.0
    """
    endless = itertools.cycle(images)

    def seconds(send, batch):
        start = time.perf_counter()
        send(batch)
        return time.perf_counter() - start

    rows = []
    for _ in range(turns + 1):
        batch = list(itertools.islice(endless, batch_size))
        pixels = [pixel_image(len(image)) for image in batch]
        rows.append(
            [
                seconds(predict, batch),
                seconds(predict, pixels),
                seconds(reject, batch) if reject else 0.0,
            ]
        )
    whole, undecoded, protocol = np.median(rows[1:], axis=0)
    parts = np.array([whole - undecoded, undecoded - protocol, protocol])
    return RequestShares(float(whole * 1e3), *map(float, parts / whole))


def pixel_image(size: int) -> bytes:
    """Returns a PNG of one pixel, filled up with zeros to a number of bytes.

    A decoder stops before the zeros.

    >>> len(pixel_image(100_000))
    100000
    """

    def chunk(name, data):
        checksum = zlib.crc32(name + data)
        return b"".join(
            [struct.pack(">I", len(data)), name, data]
            + [struct.pack(">I", checksum)]
        )

    header = struct.pack(">IIBBBBB", 1, 1, 8, 2, 0, 0, 0)
    png = b"".join(
        [
            b"\x89PNG\r\n\x1a\n",
            chunk(b"IHDR", header),
            chunk(b"IDAT", zlib.compress(bytes(4))),
            chunk(b"IEND", b""),
        ]
    )
    return png.ljust(size, b"\0")


def run_load_test(
    predict: Callable[[Sequence[bytes]], Any],
    images: Sequence[bytes],
    rate: float,
    seconds: float,
    batch_size: int = 1,
    in_flight: int = 64,
) -> LoadReport:
    """Sends requests at a fixed rate.

    Args:
        predict: Takes images, and returns or raises. Several threads call it.
        images: Encoded images, which are sent in turn.
        rate: Requests per second.
        seconds: Time during which requests are sent.
        batch_size: Images in a request.
        in_flight: Largest number of requests at the same time. Further
            requests wait, and the wait counts as latency.

    Raises:
        ValueError: Unless all numbers are finite and above 0, and there is at
            least one image.

    >>> run_load_test(len, [b"1", b"2"], rate=100, seconds=0.1).requests
    10
    """
    numbers = {
        "rate": rate,
        "seconds": seconds,
        "batch_size": batch_size,
        "in_flight": in_flight,
        "the number of images": len(images),
    }
    for name, value in numbers.items():
        if not 0 < value < math.inf:
            raise ValueError(
                f"{name} must be above 0 and finite, received {value}"
            )
    endless = itertools.cycle(images)

    def timed(batch, due):
        try:
            predict(batch)
        except Exception as error:  # any error is counted
            return getattr(error, "code", type(error).__name__)
        return time.perf_counter() - due

    futures = []
    start = time.perf_counter()
    pool = concurrent.futures.ThreadPoolExecutor(in_flight)
    try:
        for i in range(max(1, round(rate * seconds))):
            due = start + i / rate
            time.sleep(max(0.0, due - time.perf_counter()))
            batch = list(itertools.islice(endless, batch_size))
            futures.append(pool.submit(timed, batch, due))
        found = [future.result() for future in futures]
    finally:  # an interrupted test does not wait for responses
        pool.shutdown(wait=False, cancel_futures=True)
    latencies = np.sort([f for f in found if isinstance(f, float)])
    return LoadReport(
        len(found),
        len(latencies) * batch_size,
        dict(collections.Counter(f for f in found if isinstance(f, str))),
        time.perf_counter() - start,
        latencies,
    )
