"""Ends a program with one line when SIGTERM or SIGINT arrives.

This module imports only modules that Python loads at its start, because a
signal can arrive during the first import of a program.
"""

import os
import signal
import sys

_NUMBERS = (signal.SIGTERM, signal.SIGINT)


class _State:
    descriptor = 2  # the standard error of the terminal
    received: int | None = None
    cleans_up = False


def program() -> str:
    """Returns the name of the program: `train` of `python -m apps.train`."""
    path = sys.argv[0]
    if path == "-m":  # while Python looks for the module
        path = sys.orig_argv[sys.orig_argv.index("-m") + 1].rpartition(".")[2]
    path = path.removesuffix("/__main__.py").removesuffix(".py")
    return os.path.basename(path)


def install() -> None:
    """Installs the signal handlers of this process."""
    _open_standard_files()
    _State.received = None
    _State.cleans_up = False
    if _State.descriptor == 2:
        _State.descriptor = os.dup(
            2
        )  # stays open while `quiet` drops the other
    for number in _NUMBERS:
        signal.signal(number, _stop)


def _open_standard_files() -> None:
    """Opens the null device for each standard file that the shell closed.

    The next file that the program opens would get the number of the missing
    one, and receive what libraries print.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
            os.set_inheritable(number, True)
    if sys.stderr is None:
        sys.stderr = os.fdopen(2, "w", errors="backslashreplace", closefd=False)


def clean_up() -> None:
    """Lets the program clean up before a signal ends it."""
    _State.cleans_up = True


def ignore() -> None:
    """Ignores further signals, so that the exit code stays."""
    for number in _NUMBERS:
        signal.signal(number, signal.SIG_IGN)


def exit_code() -> int | None:
    """Returns 128 + the signal that stopped the program, or None."""
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
