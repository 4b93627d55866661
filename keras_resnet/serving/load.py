"""Holds a rate of requests and says how long their answers took.

Requests leave at fixed times, whether those before were answered or not, and a
request's time counts from when it had to leave: a server that stops for a
second is charged for all that should have come in that second.
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
class Report:
    """What a server did under load.

    Attributes:
        requests: how many were sent.
        images: how many were in those that were answered.
        errors: kind of error -> how many requests ended so.
        seconds: from the first request to the last answer.
        latencies: seconds of each answer, in ascending order.
    """

    requests: int
    images: int
    errors: dict[str, int]
    seconds: float
    latencies: np.ndarray

    def to_json(self) -> dict[str, Any]:
        """The numbers to compare; times in milliseconds."""
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


def hold(
    ask: Callable[[Sequence[bytes]], Any],
    images: Sequence[bytes],
    rate: float,
    seconds: float,
    batch_size: int = 1,
    in_flight: int = 64,
) -> Report:
    """Asks at a rate for a time.

    Args:
        ask: is given images, answers or raises; called by several threads.
        images: are sent in turn.
        rate: requests a second.
        seconds: how long requests are sent.
        batch_size: images of a request.
        in_flight: requests on the way at once, at most; those that are due
            meanwhile wait, and their time runs.

    Raises:
        ValueError: one of the numbers is not above 0 and finite, or there are
            no images.

    >>> hold(len, [b"1", b"2"], rate=100, seconds=0.1).requests
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
            ask(batch)
        except Exception as error:  # whatever it is, it is counted
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
    finally:  # an interrupted load does not wait for its answers
        pool.shutdown(wait=False, cancel_futures=True)
    latencies = np.sort([f for f in found if isinstance(f, float)])
    return Report(
        len(found),
        len(latencies) * batch_size,
        dict(collections.Counter(f for f in found if isinstance(f, str))),
        time.perf_counter() - start,
        latencies,
    )
