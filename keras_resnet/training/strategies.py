"""The devices and machines of a training run: strategies of `tf.distribute`.

A strategy only changes where a step is computed. The batch, the learning rate
and the schedule of a recipe are those of all devices together. Each device
takes an equal share of every batch. It normalizes by this share, as [1] and [2]
did on two and eight GPUs, unless normalization is synchronized.
"""

import contextlib
import functools
import json
import os
import re
import signal
import sys
import threading
from collections.abc import Callable
from collections.abc import Iterator

import tensorflow as tf

from keras_resnet.training import rendezvous

# Seconds for a cluster to start its machines and for them to load the program.
CONNECT_TIMEOUT = 300.0
STRATEGIES = ("auto", "one_device", "mirrored", "multi_worker", "tpu")

_EXAMPLE = (
    '{"cluster": {"worker": ["HOST0:PORT", "HOST1:PORT"]}, '
    '"task": {"type": "worker", "index": 0}}'
)


# Errors that TensorFlow raises after the loss of a worker.
_OF_LOST_WORKERS = (
    tf.errors.UnavailableError,
    tf.errors.AbortedError,
    tf.errors.CancelledError,
    tf.errors.DeadlineExceededError,
    tf.errors.InternalError,
    tf.errors.FailedPreconditionError,
)
_LOST = (
    "another worker stopped responding; start all workers again with the same "
    "command to resume from the last checkpoint"
)


class WorkerLostError(RuntimeError):
    """Another worker stopped responding."""


def get_strategy(
    name: str = "auto",
    num_devices: int | None = None,
    connect_timeout: float = CONNECT_TIMEOUT,
) -> tf.distribute.Strategy:
    """Returns the strategy of a name.

    A program must call this before it uses TensorFlow if the processor is
    divided or several machines train.

    Args:
        name: One of

            - `"one_device"`
            - `"mirrored"`: all devices of this machine
            - `"multi_worker"`: all devices of the machines in the environment
              variable TF_CONFIG
            - `"tpu"`
            - `"auto"`: the first of these that the machine has: workers in
              TF_CONFIG, a TPU, several GPUs or `num_devices`, one device
        num_devices: Number of devices of this machine; None for all. Without
            accelerators, the processor is divided into logical devices. With
            a device for each core, a kernel has one thread.
        connect_timeout: Longest time that a worker waits for the others, in
            seconds. If TensorFlow then takes as long to connect them, the
            process ends with one line on stderr and exit code 1.

    Returns:
        A `tf.distribute.Strategy`.

    Raises:
        ValueError: If the name is unknown, or the machine lacks the devices.
        TimeoutError: If a worker is missing.
    """
    check_name(name)
    if num_devices is not None and num_devices < 1:
        raise ValueError(
            f"num_devices must be at least 1, received {num_devices}"
        )
    if name == "auto":
        name = _automatic(num_devices)
    if name == "multi_worker":
        return _multi_worker(num_devices, connect_timeout)
    if name == "tpu":
        return _tpu(num_devices)
    devices = _devices(1 if name == "one_device" else num_devices)
    if name == "one_device":
        if num_devices not in (None, 1):
            raise ValueError(
                "one_device has one device, received num_devices="
                f"{num_devices}; mirrored takes several"
            )
        return tf.distribute.get_strategy()
    if "GPU" in devices[0]:
        return tf.distribute.MirroredStrategy(devices)
    # The default operation fails if several steps are one graph, and
    # collectives gain nothing inside of one processor.
    return tf.distribute.MirroredStrategy(
        devices, cross_device_ops=tf.distribute.ReductionToOneDevice()
    )


def check_name(name: str) -> None:
    """Raises ValueError if the name is unknown."""
    if name not in STRATEGIES:
        raise ValueError(
            f"strategy must be one of {', '.join(STRATEGIES)}, received {name}"
        )


def is_chief(strategy: tf.distribute.Strategy) -> bool:
    """Returns whether this process is the one that writes."""
    return worker_index(strategy) == 0


def worker_index(strategy: tf.distribute.Strategy) -> int:
    """Returns the number of this process among the workers, from 0."""
    resolver = strategy.cluster_resolver
    if not isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy):
        return 0
    has_chief = "chief" in resolver.cluster_spec().jobs
    is_worker = resolver.task_type == "worker"
    return resolver.task_id + (has_chief and is_worker)


def has_workers(strategy: tf.distribute.Strategy) -> bool:
    """Returns whether several workers share the steps."""
    return isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy)


def worker_count(strategy: tf.distribute.Strategy) -> int:
    """Returns the number of processes that share a batch."""
    if not has_workers(strategy):
        return 1
    jobs = strategy.cluster_resolver.cluster_spec().as_dict()
    return sum(len(jobs.get(job, ())) for job in ("chief", "worker"))


@contextlib.contextmanager
def lost_workers(strategy: tf.distribute.Strategy):
    """Turns TensorFlow's errors after the loss of a worker into one line."""
    try:
        yield
    except _OF_LOST_WORKERS as error:
        if not has_workers(strategy):
            raise
        raise WorkerLostError(_LOST) from error


def distributed(
    strategy: tf.distribute.Strategy,
    batches: Callable[[tuple[int, int]], tf.data.Dataset],
    is_shared: bool = False,
) -> Iterator:
    """Batches shared among the devices of all workers.

    Args:
        strategy: Whose devices.
        batches: Gives the batches of a shard, (index, count), as
            `DataSet.train_batches` has them. Each worker reads its own.
        is_shared: Whether these are those of one device after the other, and
            not yet to be split.

    Returns:
        An iterator without end, inside a `tf.function` too; the first device
        of the first worker has the first images of a batch, and so on.
    """

    def of_worker(context):
        workers = context.num_input_pipelines
        devices = strategy.num_replicas_in_sync // workers
        mine = batches((context.input_pipeline_id, workers))
        if devices > 1 and not is_shared:
            mine = mine.map(
                lambda *batch: tf.nest.map_structure(
                    functools.partial(_split, devices), batch
                )
            ).unbatch()
            mine = mine.prefetch(devices)
        # Of an endless data set, workers need not tell each other at every
        # step that they still have some.
        return mine.repeat()

    return iter(strategy.distribute_datasets_from_function(of_worker))


def _split(count, tensor):
    """`[batch, ...]` to `[count, batch / count, ...]`."""
    return tf.reshape(tensor, [count, -1, *tensor.shape[1:]])


def _automatic(num_devices):
    config = os.environ.get("TF_CONFIG")
    if config and len(_workers(config)[0]) > 1:
        return "multi_worker"
    if tf.config.list_physical_devices("TPU"):
        return "tpu"
    gpus = len(tf.config.list_physical_devices("GPU"))
    count = (gpus or 1) if num_devices is None else num_devices
    return "mirrored" if count > 1 else "one_device"


def _devices(count):
    """Returns names of the first devices; divides a processor if needed."""
    gpus = tf.config.list_physical_devices("GPU")
    if gpus:
        if count is not None and count > len(gpus):
            raise ValueError(
                f"num_devices must be at most {len(gpus)}, the number of GPUs "
                f"of this machine; received {count}"
            )
        return [f"GPU:{i}" for i in range(count or len(gpus))]
    if count is not None and count > 1:
        processor = tf.config.list_physical_devices("CPU")[0]
        with contextlib.suppress(RuntimeError):  # TensorFlow runs already
            tf.config.set_logical_device_configuration(
                processor, [tf.config.LogicalDeviceConfiguration()] * count
            )
            # With a device for each core, kernels that all want every core wait
            # for one another.
            if count >= _cores() and not (
                tf.config.threading.get_intra_op_parallelism_threads()
                or os.environ.get("TF_NUM_INTRAOP_THREADS")
            ):
                tf.config.threading.set_intra_op_parallelism_threads(1)
    there = len(tf.config.list_logical_devices("CPU"))
    if count is not None and count > there:
        raise ValueError(
            f"TensorFlow runs already, on {there} devices, and cannot divide "
            f"the processor into {count}; choose a strategy first"
        )
    return [f"CPU:{i}" for i in range(count or there)]


def _cores() -> int:
    """Returns the number of processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _multi_worker(num_devices, connect_timeout):
    config = os.environ.get("TF_CONFIG")
    if not config:
        raise ValueError(
            "multi_worker needs the environment variable TF_CONFIG, the same "
            f"on all workers except the index: {_EXAMPLE}; it is not set"
        )
    workers, index = _workers(config)
    gpus = tf.config.list_physical_devices("GPU")
    if num_devices is not None:
        if num_devices > max(len(gpus), 1):
            raise ValueError(
                f"num_devices of a worker must be 1 to {max(len(gpus), 1)} on "
                f"this machine, received {num_devices}"
            )
        try:
            tf.config.set_visible_devices(gpus[:num_devices], "GPU")
        except RuntimeError as error:
            raise _too_late(error) from error
    if len(workers) == 1:  # without a rendezvous
        return get_strategy("auto", num_devices)
    rendezvous.wait_for_workers(workers, index, connect_timeout)
    program = os.path.basename(sys.argv[0]).removesuffix(".py")
    line = f"{program}: {_LOST} (TensorFlow waited {connect_timeout:g} seconds)"
    try:
        with rendezvous.exit_after(connect_timeout, line):
            strategy = tf.distribute.MultiWorkerMirroredStrategy()
    except _OF_LOST_WORKERS as error:  # after the rendezvous
        raise WorkerLostError(_LOST) from error
    except RuntimeError as error:
        raise _too_late(error) from error
    # TensorFlow's servers install a handler of SIGTERM that ignores it.
    handler = signal.getsignal(signal.SIGTERM)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)
    return strategy


def _too_late(error) -> ValueError:
    return ValueError(
        f"multi_worker must be chosen before TensorFlow runs ({error})"
    )


def _workers(config):
    """Returns the addresses in TF_CONFIG, chief first, and the own index."""
    try:
        fields = json.loads(config)
        jobs, task = fields["cluster"], fields["task"]
        kind, index = task["type"], task["index"]
        if isinstance(index, str) and index.isdecimal():
            index = int(index)
        for addresses in jobs.values():
            _check_addresses(addresses)
        if kind not in ("chief", "worker"):
            raise ValueError("the type of the task must be chief or worker")
        if type(index) is not int or not 0 <= index < len(jobs[kind]):
            raise ValueError(f"the index must be that of a {kind}")
        if fields.get("rpc_layer", "grpc") != "grpc":
            raise ValueError("rpc_layer must be grpc")
        if len(jobs.get("chief", ())) > 1:
            raise ValueError("there must be one chief at most")
        workers = [*jobs.get("chief", ()), *jobs.get("worker", ())]
        if len(set(workers)) < len(workers):
            raise ValueError("every worker must have an address of its own")
        return workers, workers.index(jobs[kind][index])
    except (
        ValueError,
        TypeError,
        LookupError,
        AttributeError,
        RecursionError,
    ) as error:
        rule = f"{error}; " if type(error) is ValueError else ""
        raise ValueError(
            f"TF_CONFIG must be JSON like {_EXAMPLE}, with a task that is in "
            f"the cluster; {rule}received {config[:200]}"
        ) from error


def _check_addresses(addresses):
    """Raises a ValueError unless it is a list of HOST:PORT."""
    if not isinstance(addresses, list) or not addresses:
        raise ValueError("a job must be a list of HOST:PORT")
    for address in addresses:
        host, _, port = str(address).rpartition(":")
        if (
            not isinstance(address, str)
            or not re.fullmatch(r"[\w.-]+|\[[\w:.%]+\]", host, re.ASCII)
            or not re.fullmatch(r"\d{1,5}", port, re.ASCII)
            or not 1 <= int(port) <= 65535
        ):
            raise ValueError(
                "a worker must be HOST:PORT with a port of 1 to 65535, "
                f"received {address!r}"
            )


def _tpu(num_devices):
    if num_devices is not None:
        raise ValueError(
            "tpu takes all cores of the TPU, received "
            f"num_devices={num_devices}"
        )
    try:
        resolver = tf.distribute.cluster_resolver.TPUClusterResolver.connect(
            os.environ.get("TPU_NAME", "local")
        )
    except (ValueError, tf.errors.OpError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"tpu needs a TPU on this machine or TPU_NAME ({reason})"
        ) from error
    return tf.distribute.TPUStrategy(resolver)
