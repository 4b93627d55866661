"""Ends a program with one line when SIGTERM or SIGINT arrives.

Nothing here imports more than Python has at its start: a signal can arrive
while the first import of a program is under way.
"""

import os
import signal
import sys

_NUMBERS = (signal.SIGTERM, signal.SIGINT)


class _State:
    descriptor = 2  # the standard error that a person reads
    received: int | None = None
    cleans_up = False


def program() -> str:
    """The name of the program: `train` of `python -m apps.train`."""
    name = sys.argv[0]
    if name == "-m":  # while Python looks for the module
        name = sys.orig_argv[sys.orig_argv.index("-m") + 1].rpartition(".")[2]
    return os.path.basename(name).removesuffix(".py")


def install() -> None:
    """Takes over the signals of this process."""
    _State.received = None
    _State.cleans_up = False
    if _State.descriptor == 2:
        _State.descriptor = os.dup(2)  # also while `quiet` drops the other
    for number in _NUMBERS:
        signal.signal(number, _stop)


def clean_up() -> None:
    """Has a signal run the cleanup of the program before it ends."""
    _State.cleans_up = True


def ignore() -> None:
    """Keeps the outcome of a program that has one."""
    for number in _NUMBERS:
        signal.signal(number, signal.SIG_IGN)


def exit_code() -> int | None:
    """128 + the signal that asked the program to stop; None without one."""
    return None if _State.received is None else 128 + _State.received


def _stop(number, frame):
    ignore()  # a second signal would interrupt the cleaning up
    _State.received = number
    line = f"{program()}: stopped by {signal.Signals(number).name}\n"
    os.write(_State.descriptor, line.encode(errors="backslashreplace"))
    code = 128 + number
    if not _State.cleans_up:
        os._exit(code)
    # Python prints and drops an exception that is raised in a destructor.
    sys.unraisablehook = lambda _: os._exit(code)
    raise SystemExit(code)
