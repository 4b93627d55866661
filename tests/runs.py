"""Programs in their own processes, which a test can kill.

They are forked from a server that has imported TensorFlow without using it. A
start takes one second instead of seven.
"""

import contextlib
import json
import multiprocessing
import os
import pathlib
import signal
import socket
import sys
import time
from unittest import mock

import keras
import numpy as np

# As the programs have it, and as the server will: jax, where it is installed,
# would set another one when Keras imports it.
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"

# Imported by the server too: nothing here may use TensorFlow.
import keras_resnet
from apps import command_line  # noqa: F401
from keras_resnet import baselines
from keras_resnet.data import splits
from keras_resnet.training import loop  # noqa: F401

TINY = keras_resnet.Spec("tiny", (1, 2), (4, 8), stem="cifar", shortcut="A")


def _with_companion(x, classes):
    x = keras.layers.Conv2D(4, 3, 2)(x)
    x = keras_resnet.layers.BatchNormalization()(x)
    x = baselines.Companion(classes)(x)
    x = keras.layers.Conv2D(8, 3, 2, activation="relu")(x)
    x = keras_resnet.layers.BatchNormalization()(x)
    x = keras.layers.GlobalAveragePooling2D()(x)
    return keras.layers.Dense(classes)(x)


COMPANION = baselines.Baseline("companion", 4, _with_companion, 0, "a test")
CIFAR10 = os.path.join(os.environ.get("KERAS_RESNET_DATA", ""), "tfds")

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload([__name__])


class Process:
    """A running program: `python -m apps.NAME ARGUMENTS`.

    Args:
        directory: Where its output goes.
        name: Of the program.
        arguments: Its flags.
        environment: Further variables.
    """

    def __init__(self, directory, name, arguments, environment=None):
        directory = pathlib.Path(directory)
        # Numbered, so that a start does not overwrite what another one said.
        number = len(list(directory.glob("*.stdout")))
        self._paths = [
            directory / f"{number}.{kind}" for kind in ("stdout", "stderr")
        ]
        for path in self._paths:
            path.touch()
        self.process = _context.Process(
            target=_main,
            args=(name, arguments, self._paths, environment or {}),
        )
        self.process.start()

    @property
    def out(self) -> list[str]:
        return self._paths[0].read_text().splitlines()

    @property
    def err(self) -> list[str]:
        return self._paths[1].read_text().splitlines()

    def send(self, number: int) -> None:
        os.kill(self.process.pid, number)

    def kill(self) -> None:
        """Sends signal 9, which a process cannot handle."""
        self.process.kill()
        self.process.join()

    def wait(self) -> int:
        """Returns the exit code."""
        self.process.join()
        return self.process.exitcode

    def wait_for(self, is_so, pause=0.002) -> None:
        """Waits until a function returns True or the program has ended."""
        while self.process.is_alive() and not is_so():
            time.sleep(pause)


def call(function, *arguments):
    """Returns the result of a function of a test module, in its own process."""
    receiver, sender = _context.Pipe(duplex=False)
    process = _context.Process(target=_call, args=(sender, function, arguments))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    finally:
        process.join()


def _call(sender, function, arguments):
    sender.send(function(*arguments))


def train(directory, *arguments, environment=None) -> Process:
    return Process(directory, "train", arguments, environment)


def workers(
    directory, count, *arguments, each=None, environment=None
) -> list[Process]:
    """Starts workers on the loopback address.

    Args:
        directory: Where their output goes.
        count: Number of workers.
        arguments: Flags of all.
        each: Further flags of each.
        environment: Further variables of all.
    """
    addresses = [f"127.0.0.1:{port}" for port in free_ports(count)]
    runs = []
    for index in range(count):
        task = {"type": "worker", "index": index}
        config = {"cluster": {"worker": addresses}, "task": task}
        flags = [*arguments, *(each[index] if each else ())]
        variables = {**(environment or {}), "TF_CONFIG": json.dumps(config)}
        runs.append(train(directory, *flags, environment=variables))
    return runs


def values(workdir) -> dict[str, np.ndarray]:
    """Returns every value of the newest checkpoint, by name."""
    import tensorflow as tf

    path = tf.train.latest_checkpoint(pathlib.Path(workdir) / "checkpoints")
    reader = tf.train.load_checkpoint(path)
    names = reader.get_variable_to_shape_map()
    return {
        name: np.asarray(reader.get_tensor(name))
        for name in names
        if name != "_CHECKPOINTABLE_OBJECT_GRAPH"
    }


def free_ports(count):
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def _main(name, arguments, paths, environment):
    """Runs a program in this process."""
    os.environ.update(environment)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for path, descriptor in zip(paths, (1, 2), strict=True):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), descriptor)
    sys.stdout = os.fdopen(1, "w", buffering=1)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    sys.argv = [f"{name}.py", *arguments]
    keras_resnet.MODELS["tiny"] = TINY
    baselines.BASELINES["companion"] = COMPANION
    program = __import__(f"apps.{name}", fromlist=["cli"])
    with mock.patch.object(splits.Records, "in_memory", _cached_in_memory):
        program.cli()


def _cached_in_memory(records):
    """A split decoded once for all processes of a test."""
    directory = os.environ.get("DECODED")
    if not directory:
        return _in_memory(records)
    path = pathlib.Path(directory) / f"{records._builder.name}{records._split}"
    if not path.exists():
        memory = _in_memory(records)
        beside = path.with_suffix(f".{os.getpid()}")
        with beside.open("wb") as file:
            np.save(file, memory.images.numpy())
            np.save(file, memory.labels.numpy())
        os.replace(beside, path)
    with path.open("rb") as file:
        return splits.Memory(np.load(file), np.load(file))


_in_memory = splits.Records.in_memory
