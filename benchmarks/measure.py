"""Measures a work: every contender in turn, A B A B, in one run.

Each contender has a process of its own, which is stopped while another has
its turn. Absolute times do not travel from one machine, or hour, to another;
ratios of turns that lie side by side do.
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
    """What a contender did.

    Attributes:
        contender: Its name.
        seconds: Of one step, the median over the turns.
        spread: The slowest turn over the fastest, minus 1.
        images_per_second: By that median.
        ratio: How many times as fast as it ours is: the median over the turns
            of its seconds over those of ours in the same round.
        goal: What `ratio` should be at least, or None.
        first_step_seconds: From a fresh process with its packages imported to
            the end of the first step: build, trace, compile and run.
        peak_bytes: The largest memory of the process, above what it had when
            its packages were imported.
        graph_nodes: Nodes of the graph of a training step, or None.
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


class ContenderError(ChildProcessError):
    """A contender's process ended; the message has its last line."""


class _Process:
    """A contender's process, which runs while it is asked something."""

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
        """Waits until the first step is done; keeps what it says of it."""
        self.ready = self._answer()

    def take(self, steps: int) -> float:
        """The seconds of one of so many steps."""
        self.process.send_signal(signal.SIGCONT)
        with contextlib.suppress(BrokenPipeError):  # `_answer` says who ended
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
    """The results of the contenders that are installed, ours first.

    Args:
        work: What is done.
        rounds: How often each contender has its turn.
        data_dir: For works on real data: a folder with `photos/` (JPEG), or
            where TFDS keeps its sets.

    Returns:
        A `Result` for each contender.

    Raises:
        ContenderError: If one of them fails.
    """
    rows = contenders.CONTENDERS[work.kind]
    names = [name for name in work.contenders if rows[name].is_installed()]
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
        for process in processes:  # a round that does not count
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
        )
        for process, seconds in zip(processes, turns, strict=True)
    ]
