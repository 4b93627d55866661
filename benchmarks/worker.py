"""Process of one contender at one work.

    python -m benchmarks.worker CONTENDER WORK DATA_DIR

The process writes a line of JSON after its first step. Then it reads numbers of
steps from its standard input, and writes a line with the duration of these
steps. It runs on Linux.
"""

import ctypes
import gc
import json
import resource
import signal
import sys
import time

from benchmarks import contenders
from benchmarks import works

_PR_SET_PDEATHSIG = 1  # of <linux/prctl.h>


def _peak_bytes() -> int:
    # The peak of getrusage may be that of the parent process.
    with open("/proc/self/status") as file:
        peak = next(line for line in file if line.startswith("VmHWM:"))
    return int(peak.split()[1]) * 1024


def _bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def main(name: str, fields: str, data_dir: str) -> None:
    """Serves the parent process until it closes the standard input."""
    answers = sys.stdout
    sys.stdout = sys.stderr  # libraries may print text

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
    seconds = time.perf_counter() - start
    # A quantization needs gigabytes, and the others start after this one.
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    answer(first_step_seconds=seconds, **facts)
    for line in sys.stdin:
        steps = int(line)
        if times_itself:  # one call takes all steps, and returns a mean
            seconds = steps * step()
        else:
            start = time.perf_counter()
            for _ in range(steps):
                step()
            seconds = time.perf_counter() - start
        answer(seconds=seconds, peak_bytes=_peak_bytes() - before)


if __name__ == "__main__":
    # The kernel ends this process with its parent. A stopped process would not
    # notice the end of its parent, and would keep its memory.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    main(*sys.argv[1:])
