"""The processes of a search: keras-tuner's chief and its workers."""

import contextlib
import multiprocessing
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from multiprocessing import connection
from pathlib import Path


def run(
    search: Callable[[Callable[[str], None]], None],
    directory: Path,
    workers: int,
    report: Callable[[str], None],
) -> None:
    """Runs a search in a chief and several workers, on this machine.

    Args:
        search: Runs the search in each process; it receives the function that
            reports a line. It must be picklable.
        directory: Gets a log of each process.
        workers: Number of workers, each of which trains one trial at a time.
        report: Receives the lines of all processes.

    Raises:
        ChildProcessError: If a process failed.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    lines = context.SimpleQueue()

    def forward():
        for line in iter(lines.get, None):
            report(line)

    listener = threading.Thread(target=forward)
    listener.start()
    running = {}
    try:
        for name in ("chief", *(f"worker{i}" for i in range(workers))):
            log = directory / f"{name}.log"
            process = context.Process(
                target=_run_process, args=(search, name, port, lines)
            )
            with _stderr_in(log):
                process.start()
            running[name] = process
        # The chief ends after every worker that it knows.
        while running.keys() - {"chief"} and "chief" in running:
            connection.wait([process.sentinel for process in running.values()])
            for name in [n for n, p in running.items() if not p.is_alive()]:
                code = running.pop(name).exitcode
                if code:
                    raise ChildProcessError(
                        f"the {name} exited with code {code}, see "
                        f"{directory / name}.log; run the same search again "
                        "to resume"
                    )
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.join()
        lines.put(None)
        listener.join()


@contextlib.contextmanager
def _stderr_in(path):
    """Redirects the stderr of new processes to a file.

    TensorFlow reports there how it was built, once a process.
    """
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW
        file = os.open(path, flags, 0o666)
        os.dup2(file, 2)
        os.close(file)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _run_process(search, name, port, lines):
    os.environ.update(
        KERASTUNER_TUNER_ID=name,
        KERASTUNER_ORACLE_IP="127.0.0.1",
        KERASTUNER_ORACLE_PORT=str(port),
        TQDM_DISABLE="1",  # the bars of several runs in one terminal
    )
    threading.Thread(target=_end_with_parent, daemon=True).start()
    search(lines.put)


def _end_with_parent():
    """Asks this process to save and end after its parent process ended."""
    multiprocessing.parent_process().join()
    os.kill(os.getpid(), signal.SIGTERM)
