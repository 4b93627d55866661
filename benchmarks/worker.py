"""One contender at one work, in a process of its own.

    python -m benchmarks.worker CONTENDER WORK DATA_DIR

It answers in lines of JSON: once when its first step is done, then for each
number on its standard input, with the seconds that so many steps took. It runs
on Linux.
"""

import ctypes
import json
import resource
import signal
import sys
import time

from benchmarks import contenders
from benchmarks import works

_PR_SET_PDEATHSIG = 1  # of <linux/prctl.h>


def _peak_bytes() -> int:
    # Not getrusage: its peak is that of the parent where that held more.
    with open("/proc/self/status") as file:
        peak = next(line for line in file if line.startswith("VmHWM:"))
    return int(peak.split()[1]) * 1024


def _bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def main(name: str, fields: str, data_dir: str) -> None:
    """Serves the parent until it closes our standard input."""
    answers = sys.stdout
    sys.stdout = sys.stderr  # what libraries print is no answer

    def answer(**numbers):
        print(json.dumps(numbers), file=answers, flush=True)

    work = works.Work(**json.loads(fields))
    contender = contenders.CONTENDERS[work.kind][name]
    contenders.prepare(contender.packages)
    arguments = dict(contender.arguments)
    if data_dir:
        arguments["data_dir"] = data_dir
    before, start = _bytes(), time.perf_counter()
    step, facts = contender.make(work, **arguments)
    times_itself = facts.pop("times_itself", False)
    step()
    answer(first_step_seconds=time.perf_counter() - start, **facts)
    for line in sys.stdin:
        steps = int(line)
        if times_itself:  # it takes the steps, and says how long one took
            seconds = steps * step()
        else:
            start = time.perf_counter()
            for _ in range(steps):
                step()
            seconds = time.perf_counter() - start
        answer(seconds=seconds, peak_bytes=_peak_bytes() - before)


if __name__ == "__main__":
    # Ends with its parent, however that ends: a process that is stopped would
    # notice nothing, and keep its memory.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    main(*sys.argv[1:])
