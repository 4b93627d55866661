"""How the time of a step grows with the number of devices that share it.

A model of data-parallel training with a ring all-reduce (Patarasuk and Yuan
2009), as `training.steps` has it: every device computes its share of the batch,
then gradients and moving statistics are added up over all of them, at once.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Network:
    """What connects the devices.

    Attributes:
        bandwidth: Of one device in one direction, bytes a second.
        latency: Of one message, seconds.
    """

    bandwidth: float
    latency: float


def all_reduce_seconds(devices: int, size: int, network: Network) -> float:
    """`2 (n - 1) (latency + size / (n bandwidth))`.

    Of the n parts of the tensors, each device sends one in each of n - 1 rounds
    to add them up, and in n - 1 rounds to hand the sums round.

    Args:
        devices: n.
        size: Of all tensors, in bytes.
        network: What connects them.

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
    """`compute + all-reduce`: nothing of the one overlaps with the other.

    Args:
        devices: How many.
        compute_seconds: Of one device for its share of the batch.
        size: Of gradients and moving statistics, in bytes.
        network: What connects the devices.
    """
    return compute_seconds + all_reduce_seconds(devices, size, network)


def efficiency(
    devices: int, compute_seconds: float, size: int, network: Network
) -> float:
    """The share of the time that is computation, 1 for one device."""
    whole = step_seconds(devices, compute_seconds, size, network)
    return compute_seconds / whole
