"""Trains rows of the papers' tables, one after the other or several at once.

    python -m apps.experiments --experiments=resnet20,resnet56 --dry_run
    python -m apps.experiments --experiments=resnet20 --seeds=0,1,2

Runs that are complete are skipped, and the others are started or resumed. After
a stop, run the same command again. `apps.report` reads the work directories.
"""

import concurrent.futures
import os
import subprocess
import sys
import threading
import time

from absl import flags

from . import command_line

_EXPERIMENTS = flags.DEFINE_list(
    "experiments",
    None,
    "Names of rows of the papers' tables (keras_resnet.papers.experiments).",
)
_SEEDS = flags.DEFINE_list(
    "seeds", None, "Seeds of each row. Default: as many as the row has."
)
_STEPS = flags.DEFINE_integer(
    "steps",
    None,
    "Steps of each run; the recipes keep their shape. Default: the whole "
    "recipe.",
    lower_bound=1,
)
_WORKDIRS = flags.DEFINE_string(
    "workdirs", "runs", "Parent directory of the work directories."
)
_DATA_DIR = flags.DEFINE_string(
    "data_dir", None, "Directory of the TFDS data sets."
)
_DTYPE = flags.DEFINE_string(
    "dtype", "float32", "As for apps.train; the same for all runs."
)
_AT_ONCE = flags.DEFINE_integer(
    "at_once",
    1,
    "Number of runs at the same time. Without an accelerator each has its "
    "share of the processor's cores.",
    lower_bound=1,
)
_DRY_RUN = flags.DEFINE_bool(
    "dry_run",
    False,
    "Prints the plan with the estimated time, and trains nothing.",
)


def main(argv):
    """Trains the runs that the flags name and that are not complete."""
    from keras_resnet.papers import queues
    from keras_resnet.training import workdirs

    if not _EXPERIMENTS.value:
        raise command_line.UsageError(
            "experiments", "", "name one or more rows of the papers' tables"
        )
    seeds = _seeds()
    with command_line.usage("workdirs", _WORKDIRS.value):
        directory = workdirs.local(_WORKDIRS.value)
    with command_line.usage("experiments", command_line.text(_EXPERIMENTS)):
        planned = queues.queue(
            _EXPERIMENTS.value,
            seeds,
            directory,
            _STEPS.value,
            _DTYPE.value,
        )
    _show_plan(planned)
    left = [run for run in planned if not run.is_complete]
    if _DRY_RUN.value or not left:
        return
    failed = _train(left)
    if failed:
        raise ChildProcessError(
            f"{len(failed)} of {len(left)} runs ended with an error: "
            f"{', '.join(failed)}; run the same command again to resume"
        )
    command_line.show(f"{len(left)} runs are complete")


def _seeds():
    """Returns the seeds of --seeds, each once, or None."""
    seeds = command_line.numbers(_SEEDS, int)
    if seeds is not None and (
        not seeds or not all(0 <= seed < 2**32 for seed in seeds)
    ):
        raise command_line.UsageError(
            "seeds",
            command_line.text(_SEEDS),
            "must be numbers of at least 0 and below 2**32",
        )
    return seeds


def _show_plan(planned):
    left = [run for run in planned if not run.is_complete]
    speed = _multiply_adds_per_second() if left else 1.0
    total = 0.0
    for run in planned:
        hours = run.remaining_multiply_adds / speed / 3600.0
        total += hours
        state = "complete"
        if not run.is_complete:
            state = (
                f"step {run.completed_steps:,} of {run.steps:,}, about "
                f"{hours:.1f} hours left"
            )
        command_line.show(f"{run.workdir}: {state}")
    if left:
        command_line.show(
            f"{len(left)} of {len(planned)} runs are left, about {total:.1f} "
            f"hours at {speed / 1e9:,.0f} billion multiply-adds a second, "
            "which training ResNet-20 reaches here"
        )


def _multiply_adds_per_second() -> float:
    """Measures how fast this machine trains ResNet-20, in a few steps."""
    import keras
    import numpy as np

    import keras_resnet
    from keras_resnet.analysis import complexity

    with command_line.usage("dtype", _DTYPE.value):
        policy = keras.DTypePolicy(_DTYPE.value)
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    try:
        model = keras_resnet.ResNet20()
    finally:
        keras.config.set_dtype_policy(before)
    model.compile("sgd", "sparse_categorical_crossentropy")
    images, labels = np.zeros((128, 32, 32, 3), "float32"), np.zeros(128, int)
    model.train_on_batch(images, labels)
    start, steps = time.monotonic(), 0
    while time.monotonic() < start + 2.0:
        model.train_on_batch(images, labels)
        steps += 1
    seconds = time.monotonic() - start
    forward = complexity.complexity(model)["multiply_adds"]
    return 3.0 * forward * len(labels) * steps / seconds


def _train(left) -> list[str]:
    """Trains runs in processes of their own; returns those that failed."""
    running: set[subprocess.Popen] = set()
    lock = threading.Lock()
    stopped = threading.Event()
    at_once = min(_AT_ONCE.value, len(left))
    shares = _core_shares(at_once)

    def keep_to_share():
        # The processes that this thread starts inherit its cores.
        with lock:
            if shares:
                os.sched_setaffinity(0, shares.pop())

    def train(run):
        with lock:
            if stopped.is_set():
                return None
            process = subprocess.Popen(
                [sys.executable, "-m", f"{__package__}.train", *_flags(run)],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="backslashreplace",
            )
            running.add(process)
        name = run.workdir.name
        for line in process.stdout or ():
            command_line.show(f"{name}: {line.rstrip()}")
        code = process.wait()
        with lock:
            running.discard(process)
        return name if code else None

    with concurrent.futures.ThreadPoolExecutor(
        at_once, initializer=keep_to_share
    ) as pool:
        try:
            found = list(pool.map(train, left))
        finally:
            # After an interruption the runs save, so that nothing is lost.
            with lock:
                stopped.set()
                for process in running:
                    process.terminate()
    return [name for name in found if name]


def _core_shares(count: int) -> list[set[int]]:
    """Returns the cores of each of the runs that train at the same time.

    Runs that share all cores wait for one another. The list is empty if an
    accelerator trains, if there are fewer cores than runs, or if the system
    cannot keep a process to some cores.
    """
    import keras

    if not hasattr(os, "sched_setaffinity"):
        return []
    cores = sorted(os.sched_getaffinity(0))
    devices = keras.distribution.list_devices()
    if len(cores) < count or not all(d.startswith("cpu") for d in devices):
        return []
    return [set(cores[i::count]) for i in range(count)]


def _flags(run) -> list[str]:
    words = [*run.flags(), f"--dtype={_DTYPE.value}"]
    if _DATA_DIR.value:
        words.append(f"--data_dir={_DATA_DIR.value}")
    return words


def cli():
    """The console script."""
    command_line.run(main, backends=("tensorflow", "jax"))


if __name__ == "__main__":
    cli()
