"""Load tests: requests at a fixed rate, and the latencies of the responses.

Requests are sent at fixed times, even before earlier ones have a response. The
latency of a request counts from the time at which it was due. A server that
pauses for a second thus delays every request that was due in that second.
"""

import collections
import concurrent.futures
import dataclasses
import itertools
import math
import time
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
            for q in (50, 90, 99)
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
