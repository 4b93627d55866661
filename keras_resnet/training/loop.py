"""Training: takes the steps of a run, resumable at any of them.

The state of a run is the model, the optimizer, the step and the sums of the
metrics since the last row; all of it is in each checkpoint, and a batch is a
function of (seed, step), so that a run goes on where it stopped.
"""

import contextlib
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable

import tensorflow as tf
import tqdm

from keras_resnet import training
from keras_resnet.data import datasets
from keras_resnet.training import checkpoints
from keras_resnet.training import configs
from keras_resnet.training import memory
from keras_resnet.training import strategies
from keras_resnet.training import workdirs

_CHUNK_SECONDS = 1.0  # time between two looks at signals and the clock

# Without `checkpoint_seconds`, the next save follows so many times as long as
# the last one took: saving then takes at most 2% of the time. The bounds, in
# seconds, are for saves that take next to nothing, and for very slow disks.
_SAVES_APART = 50
_LEAST_APART = 10.0
_MOST_APART = 1800.0


class TrainingDivergedError(ArithmeticError):
    """The loss is no longer a finite number."""


class Interrupted(BaseException):
    """A signal asked the run to stop, and everything is saved.

    Attributes:
        signal_number: The signal, 15 (SIGTERM) or 2 (SIGINT).
        step: The step of the checkpoint.
    """

    def __init__(self, signal_number: int, step: int):
        super().__init__(f"stopped at step {step}; the state is saved")
        self.signal_number = signal_number
        self.step = step


def train_and_evaluate(
    config: configs.Config,
    workdir: str | os.PathLike,
    strategy: tf.distribute.Strategy | None = None,
    report: Callable[[str], None] = print,
    log_every: int = 100,
    eval_every: int | None = None,
    keep: int = 3,
    dataset: datasets.DataSet | None = None,
    checkpoint_seconds: float | None = None,
) -> dict:
    """Trains a network and evaluates it; goes on where an earlier call stopped.

    The steps are those of `training.steps` on TensorFlow, of
    `training.jax_steps` on JAX. With several workers, each calls this; the
    first writes and reports.

    Args:
        config: What is trained.
        workdir: Where `config.json`, `dataset.json`, `checkpoints/`, `best/`,
            `metrics.csv` and the events of TensorBoard are kept.
        strategy: As `training.strategies.get_strategy` gives it; None for one
            device.
        report: Is given lines for a person to read.
        log_every: Steps between two rows of `metrics.csv`.
        eval_every: Steps between two evaluations; None for a twentieth of the
            run. The last step is always evaluated.
        keep: How many checkpoints are kept.
        dataset: That of the configuration where it is loaded already.
        checkpoint_seconds: Time between two checkpoints; None for 50 times as
            long as a save takes, at least 10 and at most 1,800 seconds.

    Returns:
        The last row of `metrics.csv` as a dict, with the number of test images
        (`test_images`) and the training speed (`images_per_second`).

    Raises:
        workdirs.WorkdirError: If the directory is another configuration's, or
            another process uses it.
        checkpoints.StateError: If its checkpoints are not this run's, or none
            of them can be read.
        ImportError: If Keras does not run on the configuration's backend.
        ValueError: If the devices cannot share a batch equally, or the
            configuration has what its backend has not.
        memory.DoesNotFitError: If a step cannot fit in memory.
        TrainingDivergedError: If the loss becomes NaN or infinite.
        strategies.WorkerLostError: If another worker is gone.
        OSError: If something cannot be written; what was saved before stays.
        Interrupted: If SIGTERM or SIGINT arrived; everything is saved.
    """
    training.require_backend(__name__, config.backend)
    workdir = workdirs.local(workdir)
    recipe = config.recipe
    strategy = strategy or tf.distribute.get_strategy()
    is_chief = strategies.is_chief(strategy)
    if not is_chief:
        report = _nothing
    configs.check_devices(recipe, strategy.num_replicas_in_sync)
    if config.deterministic:
        tf.config.experimental.enable_op_determinism()
    if is_chief:
        workdirs.check(config, workdir)
    with (
        _Signals(can_raise=not strategies.has_workers(strategy)) as signals,
        contextlib.ExitStack() as stack,
    ):
        if dataset is None:
            dataset = datasets.load(
                config.dataset, config.data_dir, image_size=recipe.image_size
            )
        with strategies.lost_workers(strategy):
            run = _run(config, dataset, strategy)
        memory.check_training(
            config, run.model, strategies.worker_count(strategy)
        )
        # Nothing is written before everything that can be refused has been.
        lock = None
        if is_chief:
            lock = stack.enter_context(workdirs.Lock(workdir, report))
            workdirs.check(config, workdir)  # another process had the lock
            workdirs.prepare(config, dataset, workdir)
        _restore(run, workdir, is_chief, report)
        steps_done = run.completed_steps
        signals.note_saved(steps_done)
        metrics = workdirs.Metrics(workdir, run.rows, is_chief, report)
        stack.callback(metrics.close)
        if is_chief:
            _report_losses(metrics, run, workdir, checkpoint_seconds, report)
        if eval_every is None:
            eval_every = max(recipe.steps // 20 // log_every, 1) * log_every
        trainer = _Trainer(run, dataset, lock, metrics, signals, report, keep)
        speed = trainer.train(log_every, eval_every, checkpoint_seconds)
        run.meet()  # a worker that left would take the others with it
        if is_chief and not workdirs.is_described(workdir):
            workdirs.prepare(config, dataset, workdir)
    if steps_done == recipe.steps:
        report(f"{workdir} has all its {recipe.steps} steps already")
    numbers = {
        name: float(value) for name, value in metrics.rows[-1].items() if value
    }
    return {
        **numbers,
        "step": int(numbers["step"]),
        "test_images": dataset.test_size,
        "images_per_second": speed,
    }


def _run(config, dataset, strategy):
    """The run on the backend that Keras has."""
    if config.backend == "jax":
        from keras_resnet.training import jax_steps

        return jax_steps.Run(config, dataset)
    from keras_resnet.training import steps

    return steps.Run(config, dataset, strategy)


def _restore(run, workdir, is_chief, report):
    """Resumes at the newest checkpoint, and removes what came after it."""
    last, best = (workdir / workdirs.CHECKPOINTS[n] for n in ("last", "best"))
    run.restore(last, report)
    step, steps = run.completed_steps, run.config.recipe.steps
    if step > steps:
        raise checkpoints.StateError(
            f"{last} holds step {step}, the run has {steps} steps: the "
            "checkpoint is of another run; move it away"
        )
    if not is_chief:
        return
    checkpoints.set_aside(last, after=step)
    checkpoints.drop(best, after=step)
    for directory in (last, best):
        checkpoints.clean(directory)
    checkpoints.prune(best, keep=1)


def _report_losses(metrics, run, workdir, checkpoint_seconds, report):
    """Reports the work that the last kill cost and the next one can cost."""
    step = run.completed_steps
    if metrics.logged > step:
        report(
            f"repeats {metrics.logged - step} of the steps in metrics.csv, "
            f"because the last checkpoint is of step {step}"
        )
    best = metrics.best()
    kept = checkpoints.steps(workdir / workdirs.CHECKPOINTS["best"])
    if best and metrics.error_at((kept or [-1])[-1]) > best[1]:
        report(
            f"the best network so far, of step {best[0]}, is not in "
            f"{workdir / workdirs.CHECKPOINTS['best']}, which keeps the best "
            "one from here on"
        )
    if step == run.config.recipe.steps:
        return
    if checkpoint_seconds is None:
        often = f"{_LEAST_APART:g} seconds, or less often if a save is slow"
    else:
        often = f"{checkpoint_seconds:g} seconds"
    report(
        f"saves a checkpoint every {often}; a kill costs the work since the "
        "last one (--checkpoint_seconds)"
    )


class _Trainer:
    """Takes the remaining steps of a run; writes its rows and checkpoints.

    Args:
        lock: The `workdirs.Lock` of the directory; None in a process that does
            not write.
    """

    def __init__(self, run, dataset, lock, metrics, signals, report, keep):
        self.run = run
        self.dataset = dataset
        self.lock = lock
        self.metrics = metrics
        self.signals = signals
        self.report = report
        self.keep = keep
        self.is_chief = lock is not None
        self.is_saved = True
        self.saved_at = time.monotonic()
        self.apart = _LEAST_APART  # seconds between two saves

    def train(self, log_every, eval_every, checkpoint_seconds):
        """Gives the speed in images a second; None where nothing was done."""
        run, recipe = self.run, self.run.config.recipe
        first = step = run.completed_steps
        chunk, busy, seconds = 1, 0.0, 0.0
        speed = None
        chunk_seconds = _CHUNK_SECONDS
        if checkpoint_seconds is not None:
            chunk_seconds = min(chunk_seconds, checkpoint_seconds)
        is_terminal = sys.stderr.isatty() and self.is_chief
        with tqdm.tqdm(
            total=recipe.steps,
            initial=step,
            unit="step",
            disable=not is_terminal,
            leave=False,
        ) as bar:
            while True:
                is_last = step == recipe.steps
                is_tested = is_last or step % eval_every == 0
                is_due = is_tested or step % log_every == 0
                if run.images_since_row and is_due:
                    row = self.add_row(step, is_tested)
                    bar.set_postfix_str(f"{speed or 0:,.0f} images/s")
                    if not is_terminal or "test_loss" in row:
                        with tqdm.tqdm.external_write_mode(file=sys.stderr):
                            self.report(_line(row, recipe, speed))
                waited = time.monotonic() - self.saved_at
                apart = checkpoint_seconds
                if apart is None:
                    apart = self.apart
                if is_last or waited > apart:
                    self.save(step)
                    if checkpoint_seconds is None and self.apart > 2 * apart:
                        self.report(
                            f"a save is slow: the next checkpoint follows in "
                            f"{self.apart:.0f} seconds (--checkpoint_seconds)"
                        )
                if is_last:
                    return speed
                until = min(
                    (step // log_every + 1) * log_every,
                    (step // eval_every + 1) * eval_every,
                    recipe.steps,
                    step + chunk,
                )
                start = time.monotonic()
                is_stopped, seconds = self.advance(until - step, seconds)
                before, step = step, run.completed_steps
                if seconds:
                    chunk = max(1, round(chunk_seconds / seconds))
                if before > first:  # the first chunk has the tracing in it
                    busy += time.monotonic() - start
                    speed = (step - first - 1) * recipe.batch_size / busy
                    seconds = (time.monotonic() - start) / (step - before)
                bar.update(step - before)
                if is_stopped and step < recipe.steps:
                    self.stop(step)

    def advance(self, steps, seconds):
        """`Run.take`, and what can go wrong in it."""
        is_asked = self.signals.received is not None
        try:
            stops, seconds = self.run.take(steps, is_asked, seconds)
        except datasets.UNREADABLE:
            self.dataset.check()  # names the image that does not decode
            raise
        self.signals.saved_at = None
        self.is_saved = False
        loss, *_ = self.run.read_sums()
        if not math.isfinite(loss):
            self.diverged(f"the loss is {loss}")
        return stops, seconds

    def add_row(self, step, is_tested):
        """Adds the row of a step to the metrics, and keeps the best network."""
        row = _train_row(self.run, step)
        if is_tested:
            batch_size = min(1000, max(self.run.config.recipe.batch_size, 100))
            result = self.run.evaluate(
                batch_size, lambda: self.signals.received is not None
            )
            if result is None:
                self.stop(step)
            row["test_loss"] = result.loss
            row["test_top1_error"] = result.top1_error
            row["test_top5_error"] = result.top5_error
            if self.is_chief and result.top1_error < self.best_error():
                # The one before is kept until a checkpoint is as far: a run
                # that is killed before goes another way.
                self.write("best", step, keep=None)
        self.metrics.add(row)
        self.run.clear_sums()
        self.is_saved = False
        return row

    def save(self, step):
        """Writes what has not been written yet, if it is worth keeping."""
        if self.is_saved:
            return
        if not self.run.is_finite():
            self.diverged("a weight is no finite number")
        if self.is_chief:
            start = time.monotonic()
            self.write("last", step, self.keep)
            checkpoints.prune(self.folder("best"), keep=1)
            seconds = _SAVES_APART * (time.monotonic() - start)
            self.apart = min(max(seconds, _LEAST_APART), _MOST_APART)
        self.is_saved = True
        self.saved_at = time.monotonic()

    def write(self, name, step, keep):
        """Writes the state and the rows so far to a folder of checkpoints."""
        self.lock.check()
        rows = self.metrics.text()
        checkpoints.save(
            lambda path: self.run.write(path, rows),
            self.folder(name),
            step,
            keep,
        )

    def folder(self, name):
        return self.lock.directory / workdirs.CHECKPOINTS[name]

    def best_error(self):
        """The test error of the network in `best/`."""
        kept = checkpoints.steps(self.folder("best"))
        return self.metrics.error_at(kept[-1]) if kept else math.inf

    def stop(self, step):
        """Saves because this worker or another was asked to stop."""
        self.save(step)
        self.run.meet()
        raise Interrupted(self.signals.received or signal.SIGTERM, step)

    def diverged(self, what):
        raise TrainingDivergedError(
            f"{what} at step {self.run.completed_steps}: the run diverged, and "
            "this step is not saved; lower recipe.learning_rate or lengthen "
            "recipe.warmup_steps, and begin in another work directory"
        )


def _train_row(run, step):
    loss, top1_errors, top5_errors, images = run.read_sums()
    return {
        "step": step,
        "learning_rate": float(run.rates(step - 1)),
        "train_loss": loss / images,
        "train_top1_error": 100 * top1_errors / images,
        "train_top5_error": 100 * top5_errors / images,
    }


def _line(row, recipe, speed):
    """What a person wants to know about a row."""
    words = [
        f"step {row['step']:,} of {recipe.steps:,}",
        f"loss {row['train_loss']:.3f}",
        f"error {row['train_top1_error']:.2f}%",
    ]
    if "test_loss" in row:
        words.append(f"test error {row['test_top1_error']:.2f}%")
    if speed:
        words.append(f"{speed:,.0f} images/s")
        left = (recipe.steps - row["step"]) * recipe.batch_size
        minutes, seconds = divmod(round(left / speed), 60)
        hours, minutes = divmod(minutes, 60)
        words.append(f"{hours}:{minutes:02d}:{seconds:02d} left")
    return ", ".join(words)


class _Signals:
    """Notes SIGTERM and SIGINT, so that a run can save before it stops.

    Args:
        can_raise: Whether to raise at once while there is nothing to save, as
            in the first minutes of a large network.

    Attributes:
        received: The signal, or None.
        saved_at: The step of the checkpoint while nothing came after it.
    """

    def __init__(self, can_raise):
        self.can_raise = can_raise
        self.received = None
        self.saved_at = None

    def __enter__(self):
        self.before = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self.before[number] = signal.signal(number, self._note)
        return self

    def _note(self, number, frame):
        if self.received is None:  # only the first one counts
            self.received = number
            self._stop_if_saved()

    def _stop_if_saved(self):
        if self.can_raise and self.saved_at is not None:
            raise Interrupted(self.received, self.saved_at)

    def note_saved(self, step):
        """Tells that everything up to a step is saved."""
        self.saved_at = step
        if self.received is not None:  # while there was nothing to say yet
            self._stop_if_saved()

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)


def _nothing(line):
    """Takes the lines that the first worker reports."""
