"""Workers wait for one another, for so long and no longer.

TensorFlow starts its servers when the strategy of several workers is made, and
the first of them then waits for the others without end, deaf to signals and
threads. So they meet before it does: all tell the first, on the port that
TensorFlow is about to take, and it lets them go when it has heard of each.
"""

import contextlib
import select
import socket
import time
from collections.abc import Sequence

_HELLO = "keras_resnet worker "
_GO = b"go"


def meet(addresses: Sequence[str], index: int, seconds: float) -> None:
    """Returns when all workers have called it.

    Args:
        addresses: `HOST:PORT` of each worker, the first's first.
        index: Which of them this is.
        seconds: How long to wait.

    Raises:
        TimeoutError: If not all came.
        OSError: If another program has the port of this worker.
    """
    deadline = time.monotonic() + seconds
    port = _port(addresses[index])
    try:
        own = _open(port, len(addresses))
    except OSError as error:
        raise OSError(
            f"port {port} of this worker, number {index} in TF_CONFIG, cannot "
            f"be opened ({error.strerror}): another program has it"
        ) from error
    with own:
        if index:
            missing = _report(addresses[0], index, deadline)
        else:
            missing = _gather(own, len(addresses), deadline)
    if missing:
        names = ", ".join(f"{i} ({addresses[i]})" for i in sorted(missing))
        raise TimeoutError(
            f"the {len(addresses)} workers of TF_CONFIG did not meet within "
            f"{seconds:g} seconds: nothing was heard of number {names}; start "
            "the same command on all of them, each with its own index"
        )


def _open(port, backlog):
    """A socket that listens on every address of this machine, as gRPC's do."""
    if socket.has_dualstack_ipv6():
        with contextlib.suppress(OSError):  # the kernel may have none
            return socket.create_server(
                ("", port),
                family=socket.AF_INET6,
                backlog=backlog,
                dualstack_ipv6=True,
            )
    return socket.create_server(("", port), backlog=backlog)


def _port(address):
    _, _, port = address.rpartition(":")
    try:
        return int(port)
    except ValueError:
        raise ValueError(
            f"a worker of TF_CONFIG must be HOST:PORT, received {address!r}"
        ) from None


def _gather(own, count, deadline):
    """Lets all go when each is here; else gives the numbers of the others."""
    here = {}  # connection -> number
    heard = set()
    with contextlib.ExitStack() as connections:
        while True:
            missing = set(range(1, count)) - set(here.values())
            if not missing:
                for connection in here:
                    connection.sendall(_GO)
                return missing
            left = deadline - time.monotonic()
            if left <= 0:  # some may have gone a moment before
                return (missing - heard) or missing
            for ready in select.select([own, *here], [], [], left)[0]:
                if ready is not own:  # it said all it had to say: it is gone
                    del here[ready]
                    continue
                connection = connections.enter_context(own.accept()[0])
                number = _hear(connection, count)
                if number is not None:
                    here[connection] = number
                    heard.add(number)


def _hear(connection, count):
    """The number that a worker tells; None from a stranger."""
    connection.settimeout(1)
    with contextlib.suppress(OSError, ValueError):
        number = int(connection.recv(100).decode().removeprefix(_HELLO))
        return number if 0 < number < count else None
    return None


def _report(address, index, deadline):
    """Tells the first worker, until it lets this one go."""
    host = address.rpartition(":")[0].strip("[]")
    while True:
        left = deadline - time.monotonic()
        if left <= 0:
            return {0}
        with (
            contextlib.suppress(OSError),  # not there yet, or gone again
            socket.create_connection((host, _port(address)), left) as first,
        ):
            first.sendall(f"{_HELLO}{index}".encode())
            first.settimeout(max(deadline - time.monotonic(), 0.01))
            if first.recv(len(_GO)) == _GO:
                return set()
        time.sleep(0.1)
