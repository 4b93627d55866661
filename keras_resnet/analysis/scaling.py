"""A model of the time of a training step on several devices.

Training is data-parallel with a ring all-reduce (Patarasuk and Yuan 2009), as
in `training.tensorflow_trainer`. Every device computes its share of the batch.
Then gradients and moving statistics are added up over all devices in one
message.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Network:
    """The network between the devices.

    Attributes:
        bandwidth: Bandwidth of one device in one direction, in bytes a second.
        latency: Latency of one message, in seconds.
    """

    bandwidth: float
    latency: float


def all_reduce_seconds(devices: int, size: int, network: Network) -> float:
    """Returns `2 (n - 1) (latency + size / (n bandwidth))`.

    The tensors are divided into n parts. Each device sends one part in each of
    n - 1 rounds, which add them up. It sends one sum in each of n - 1 further
    rounds.

    Args:
        devices: Number n of devices.
        size: Size of all tensors, in bytes.
        network: The network between the devices.

    >>> ethernet = Network(bandwidth=1.25e9, latency=50e-6)
    >>> all_reduce_seconds(1, 10**8, ethernet)
    0.0
    >>> round(all_reduce_seconds(8, 10**8, ethernet), 4)
    0.1407
    """
    rounds = 2 * (devices - 1)
    return rounds * (network.latency + size / devices / network.bandwidth)


def step_seconds(
    devices: int, compute_seconds: float, size: int, network: Network
) -> float:
    """Returns `compute + all-reduce`. The two do not overlap.

    Args:
        devices: Number of devices.
        compute_seconds: Seconds of one device for its share of the batch.
        size: Size of gradients and moving statistics, in bytes.
        network: The network between the devices.
    """
    return compute_seconds + all_reduce_seconds(devices, size, network)


def efficiency(
    devices: int, compute_seconds: float, size: int, network: Network
) -> float:
    """Returns the share of computation in the time; 1 for one device."""
    whole = step_seconds(devices, compute_seconds, size, network)
    return compute_seconds / whole
