"""Measures all contenders of a work in turn, A B A B.

Each contender has its own process, which is stopped while another has its turn.
Absolute times depend on the machine and the hour. Ratios of turns that follow
one another mostly do not.
"""

import contextlib
import dataclasses
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile

from benchmarks import contenders
from benchmarks.works import Work


@dataclasses.dataclass(frozen=True)
class Result:
    """Measurements of a contender.

    Attributes:
        contender: Name of the contender.
        seconds: Duration of a step, the median over the turns.
        spread: Duration of the slowest turn divided by the fastest, minus 1.
        images_per_second: Speed from `seconds`.
        ratio: Speed of this package divided by that of the contender: the
            median over the rounds of the ratio of the durations.
        goal: Smallest `ratio` that we want, or None.
        first_step_seconds: Duration from the end of the imports to the end of
            the first step: build, trace, compile and run.
        peak_bytes: Peak memory of the process above that after the imports.
        graph_nodes: Nodes of the graph of a training step, or None.
        agreement: In int8, share of the pictures that get the class of the same
            network in float32; or None.
    """

    contender: str
    seconds: float
    spread: float
    images_per_second: float
    ratio: float
    goal: float | None
    first_step_seconds: float
    peak_bytes: int
    graph_nodes: int | None = None
    agreement: float | None = None


def missing(work: Work) -> dict[str, list[str]]:
    """Returns the contenders of a work that are skipped.

    Returns:
        The packages that are not installed, by the name of the contender.
    """
    rows = contenders.CONTENDERS[work.kind]
    found = {name: rows[name].missing() for name in work.contenders}
    return {name: packages for name, packages in found.items() if packages}


class ContenderError(ChildProcessError):
    """Failure of a contender's process. The message has its last line."""


class _Process:
    """Process of a contender, which runs only during its turns."""

    def __init__(self, name, work, data_dir, log):
        self.name = name
        self.log = log
        self.process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "benchmarks.worker",
                name,
                json.dumps(dataclasses.asdict(work)),
                data_dir or "",
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
        )
        self.peak_bytes = 0

    def start(self):
        """Waits for the end of the first step, and keeps its measurements."""
        self.ready = self._answer()

    def take(self, steps: int) -> float:
        """Takes steps, and returns the mean duration of a step in seconds."""
        self.process.send_signal(signal.SIGCONT)
        with contextlib.suppress(BrokenPipeError):  # `_answer` raises the error
            self.process.stdin.write(f"{steps}\n")
            self.process.stdin.flush()
        answer = self._answer()
        self.peak_bytes = answer["peak_bytes"]
        return answer["seconds"] / steps

    def _answer(self):
        line = self.process.stdout.readline()
        if not line:
            self.log.seek(0)
            *_, last = self.log.read().strip().splitlines() or ["no output"]
            raise ContenderError(f"{self.name} failed: {last}")
        self.process.send_signal(signal.SIGSTOP)
        return json.loads(line)

    def close(self):
        self.process.kill()
        self.process.wait()
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.stdout.close()


def measure(
    work: Work, rounds: int = 5, data_dir: str | os.PathLike | None = None
) -> list[Result]:
    """Measures the contenders that are installed, this package first.

    Args:
        work: Work to measure.
        rounds: Number of turns of each contender.
        data_dir: Directory for works on real data, with `photos/` (JPEG) or the
            sets of TensorFlow Datasets.

    Returns:
        A `Result` for each contender.

    Raises:
        ContenderError: If a contender fails.
    """
    rows = contenders.CONTENDERS[work.kind]
    names = [name for name in work.contenders if not rows[name].missing()]
    needs_data = work.kind in ("program", "input")
    with contextlib.ExitStack() as stack:
        processes = []
        for name in names:
            takes = needs_data and name != "bare step"
            log = stack.enter_context(tempfile.TemporaryFile("w+"))
            process = _Process(name, work, data_dir if takes else None, log)
            stack.callback(process.close)
            process.start()
            processes.append(process)
        for process in processes:  # a warm-up round
            process.take(1)
        turns: list[list[float]] = [[] for _ in processes]
        for _ in range(rounds):
            for process, seconds in zip(processes, turns, strict=True):
                seconds.append(process.take(work.steps))
    ours = turns[0]
    return [
        Result(
            process.name,
            statistics.median(seconds),
            max(seconds) / min(seconds) - 1,
            work.batch_size / statistics.median(seconds),
            statistics.median(
                theirs / our for theirs, our in zip(seconds, ours, strict=True)
            ),
            work.goals.get(process.name),
            process.ready["first_step_seconds"],
            process.peak_bytes,
            process.ready.get("graph_nodes"),
            process.ready.get("agreement"),
        )
        for process, seconds in zip(processes, turns, strict=True)
    ]
