"""The training loop: takes the steps of a run, and resumes at any of them.

How a run starts, from `train_and_evaluate`:

1. Check the configuration, the devices and the work directory.
2. Load the data set and build the network.
3. Lock the work directory and describe the run in it.
4. Resume from the newest checkpoint, or start from trained weights.
5. Restore the rows of `metrics.csv` from the checkpoint.
6. Take the remaining steps.

The state of a run is the model, the optimizer, the step and the sums of the
metrics since the last row. Each checkpoint has all of it, and a batch is a
function of (seed, step). A resumed run therefore ends with the same bits.
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
from keras_resnet.training import budgets
from keras_resnet.training import checkpoints
from keras_resnet.training import configs
from keras_resnet.training import memory
from keras_resnet.training import metrics
from keras_resnet.training import profiles
from keras_resnet.training import start_weights
from keras_resnet.training import strategies
from keras_resnet.training import summaries
from keras_resnet.training import workdirs

_CHUNK_SECONDS = 1.0  # time between two looks at signals and the clock

# Without `checkpoint_seconds`, the pause before the next save is 50 times the
# duration of the last save: saving then takes at most 2% of the time. The
# bounds, in seconds, are for very fast saves and for very slow disks.
_PAUSE_FACTOR = 50
_MIN_PAUSE = 10.0
_MAX_PAUSE = 1800.0


class TrainingDivergedError(ArithmeticError):
    """The loss or a weight is no longer a finite number."""


class Interrupted(BaseException):
    """A signal stopped the run, and everything is saved.

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
    minutes: float | None = None,
    profile_steps: tuple[int, int] | None = None,
) -> dict:
    """Trains a network and evaluates it, or resumes an earlier call.

    With several workers, each worker calls this function. The first one
    writes and reports.

    Args:
        config: The configuration of the run.
        workdir: Directory for `config.json`, `dataset.json`, `checkpoints/`,
            `best/`, `metrics.csv` and the events of TensorBoard.
        strategy: From `training.strategies.get_strategy`; None for one device.
        report: Receives progress lines.
        log_every: Steps between two rows of `metrics.csv`.
        eval_every: Steps between two evaluations; None for a twentieth of the
            run. The last step is always evaluated.
        keep: Number of checkpoints to keep.
        dataset: The data set of the configuration, if it is already loaded.
        checkpoint_seconds: Time between two checkpoints; None for 50 times the
            duration of a save, at least 10 and at most 1,800 seconds.
        minutes: Time of a new run: the recipe gets as many steps as fit. None
            for the steps of the recipe.
        profile_steps: `(first, last)`: TensorFlow's profiler observes the
            steps after the first up to the last.

    Returns:
        The last row of `metrics.csv` as a dict, with the number of test images
        (`test_images`), the training speed (`images_per_second`), the best row
        (`best_step`, `best_test_top1_error`), the time of this call
        (`seconds`) and the `device`.

    Raises:
        workdirs.WorkdirError: If the directory belongs to another
            configuration, or another process uses it.
        checkpoints.StateError: If its checkpoints belong to another run, or
            none of them can be read.
        ImportError: If Keras does not run on the configuration's backend.
        ValueError: If the devices cannot share a batch equally, or the backend
            does not support the configuration.
        budgets.BudgetError: If no step fits into `minutes`, or several workers
            train.
        memory.DoesNotFitError: If a step cannot fit in memory.
        TrainingDivergedError: If the loss becomes NaN or infinite.
        strategies.WorkerLostError: If another worker stopped.
        OSError: If a file cannot be written; earlier checkpoints stay.
        Interrupted: If SIGTERM or SIGINT arrived; everything is saved.
    """
    training.require_backend(__name__, config.backend)
    start = time.monotonic()
    workdir = workdirs.local(workdir)
    strategy = strategy or tf.distribute.get_strategy()
    profiler = profiles.Profiler(workdir / "events", profile_steps)
    if not strategies.is_chief(strategy):
        report = _ignore
    with (
        _Signals(can_raise=not strategies.has_workers(strategy)) as signals,
        contextlib.ExitStack() as stack,
    ):
        if minutes is not None:
            if dataset is None:
                dataset = start_weights.load_dataset(config, workdir)
            is_new = not (workdir / "config.json").exists()
            if is_new:  # the measured steps are dropped
                signals.note_saved(0)
            config = _fitted(
                config, workdir, strategy, dataset, minutes, eval_every
            )
            why = "many as fit into the time" if is_new else "config.json has"
            report(f"{config.recipe.steps:,} steps, as {why}")
        loop = _start(
            config, workdir, strategy, dataset, signals, stack, report
        )
        loop.profiler = profiler
        stack.callback(profiler.close)
        first_step = loop.trainer.completed_steps
        if loop.is_chief:
            _report_pause(loop.trainer, checkpoint_seconds, report)
        loop.run(log_every, eval_every, checkpoint_seconds, keep)
        loop.trainer.synchronize()  # one that leaves early stops the others
        if loop.is_chief and not workdirs.is_described(workdir):
            workdirs.prepare(config, loop.dataset, workdir)
    if first_step == config.recipe.steps:
        report(f"{workdir} has all its {config.recipe.steps} steps already")
    return {**loop.result(), "seconds": time.monotonic() - start}


# --- How a run starts ---------------------------------------------------------


def _start(config, workdir, strategy, dataset, signals, stack, report):
    """Returns the loop of a run, ready to take its next step.

    `stack` unlocks the directory and closes its files at the end.
    """
    is_chief = strategies.is_chief(strategy)

    # 1. Check. Nothing is written before step 3.
    _check(config, workdir, strategy)

    # 2. Load the data set and build the network.
    if dataset is None:
        dataset = start_weights.load_dataset(config, workdir)
    trainer = _build(config, dataset, strategy)

    # 3. Lock the work directory and describe the run in it.
    lock = None
    if is_chief:
        lock = stack.enter_context(workdirs.Lock(workdir, report))
        workdirs.check(config, workdir)  # another process had the lock
        workdirs.prepare(config, dataset, workdir)

    # 4. Resume from the newest checkpoint, or start from weights.
    if not _resume(trainer, workdir, is_chief, report) and config.weights:
        start_weights.start(trainer, dataset.labels, report)
    signals.note_saved(trainer.completed_steps)

    # 5. Restore the rows of metrics.csv from the checkpoint.
    rows = metrics.MetricsFile(workdir, trainer.rows, is_chief, report)
    stack.callback(rows.close)
    if is_chief:
        _report_lost_work(trainer, rows, workdir, report)
        if trainer.completed_steps == 0 and config.backend == "tensorflow":
            rows.show_images(summaries.first_images(config, dataset))

    return _Loop(trainer, dataset, lock, rows, signals, report)


def _fitted(config, workdir, strategy, dataset, minutes, eval_every):
    """Returns the configuration with the length that fits into the time."""
    if strategies.has_workers(strategy):
        raise budgets.BudgetError(
            "minutes must be used in one process, received several workers: "
            "measure the speed, and set the steps of the recipe"
        )
    if not (workdir / "config.json").exists():
        _check(config, workdir, strategy)
    return budgets.with_length(
        config,
        workdir,
        minutes,
        lambda: _build(config, dataset, strategy),
        dataset.test_size,
        eval_every,
    )


def _check(config, workdir, strategy):
    """Raises for a configuration that cannot train here."""
    configs.check_devices(config.recipe, strategy.num_replicas_in_sync)
    if config.deterministic:
        tf.config.experimental.enable_op_determinism()
    if strategies.is_chief(strategy):
        workdirs.check(config, workdir)


def _build(config, dataset, strategy):
    """Returns the trainer of the backend; its first step fits in memory."""
    with strategies.lost_workers(strategy):
        if config.backend == "jax":
            from keras_resnet.training import jax_trainer

            trainer = jax_trainer.JaxTrainer(config, dataset)
        else:
            from keras_resnet.training import tensorflow_trainer

            trainer = tensorflow_trainer.TensorFlowTrainer(
                config, dataset, strategy
            )
    memory.check_training(
        config, trainer.step.network, strategies.worker_count(strategy)
    )
    return trainer


def _resume(trainer, workdir, is_chief, report):
    """Reads the newest checkpoint, if any, and removes the later ones."""
    last, best = (workdir / workdirs.CHECKPOINTS[n] for n in ("last", "best"))
    found = trainer.restore(last, report)
    step, steps = trainer.completed_steps, trainer.config.recipe.steps
    if step > steps:
        raise checkpoints.StateError(
            f"{last} holds step {step}, the run has {steps} steps: the "
            "checkpoint is of another run; move it away"
        )
    if found is not None:
        report(f"resuming at step {step} of {steps}")
    if not is_chief:
        return found is not None
    checkpoints.set_aside(last, after=step)
    checkpoints.drop(best, after=step)
    for directory in (last, best):
        checkpoints.clean(directory)
    checkpoints.prune(best, keep=1)
    return found is not None


def _report_lost_work(trainer, rows, workdir, report):
    """Reports the steps and the network that the last kill lost."""
    step = trainer.completed_steps
    if rows.logged > step:
        report(
            f"repeating {rows.logged - step} steps of metrics.csv, because "
            f"the last checkpoint is of step {step}"
        )
    best = rows.best()
    folder = workdir / workdirs.CHECKPOINTS["best"]
    kept = checkpoints.steps(folder)
    if best and rows.error_at((kept or [-1])[-1]) > best[1]:
        report(
            f"the best network so far, of step {best[0]}, is not in {folder}; "
            "the best network from now on is kept there"
        )


def _report_pause(trainer, checkpoint_seconds, report):
    """Reports how much work a kill can lose from now on."""
    if trainer.completed_steps == trainer.config.recipe.steps:
        return
    if checkpoint_seconds is None:
        often = f"{_MIN_PAUSE:g} seconds, or less often if a save is slow"
    else:
        often = f"{checkpoint_seconds:g} seconds"
    report(
        f"saving a checkpoint every {often}; a kill loses the steps since the "
        "last one (--checkpoint_seconds)"
    )


# --- The steps ----------------------------------------------------------------


class _Loop:
    """Takes the remaining steps of a run; writes its rows and checkpoints.

    Args:
        trainer: A `TensorFlowTrainer` or a `JaxTrainer`.
        dataset: The data set of the run.
        lock: The `workdirs.Lock` of the directory; None in a process that does
            not write.
        rows: The `MetricsFile` of the directory.
        signals: The signals that arrived.
        report: Receives progress lines.
    """

    def __init__(self, trainer, dataset, lock, rows, signals, report):
        self.trainer = trainer
        self.recipe = trainer.config.recipe
        self.dataset = dataset
        self.lock = lock
        self.rows = rows
        self.signals = signals
        self.report = report
        self.keep = None  # number of checkpoints; None for all
        self.is_chief = lock is not None
        self.is_saved = True
        self.saved_at = time.monotonic()
        self.pause = _MIN_PAUSE  # seconds between two saves
        self.speed = None  # in images a second
        self.profiler = profiles.Profiler("", None)

    def run(self, log_every, eval_every, checkpoint_seconds, keep):
        """Takes the remaining steps; the arguments of `train_and_evaluate`."""
        trainer, recipe = self.trainer, self.recipe
        self.keep = keep
        if eval_every is None:
            eval_every = max(recipe.steps // 20 // log_every, 1) * log_every
        chunk_seconds = _CHUNK_SECONDS
        if checkpoint_seconds is not None:
            chunk_seconds = min(chunk_seconds, checkpoint_seconds)
        first = step = trainer.completed_steps
        chunk, busy, seconds = 1, 0.0, 0.0
        with self.progress_bar(step) as bar:
            while True:
                # Write the row, evaluate and save, if due.
                is_last = step == recipe.steps
                is_tested = is_last or step % eval_every == 0
                is_due = is_tested or step % log_every == 0
                if trainer.images_since_row and is_due:
                    self.show_row(self.add_row(step, is_tested), bar)
                self.save_if_due(step, checkpoint_seconds)
                if is_last:
                    return

                # Take the steps that fit in a second, in one program.
                self.profiler.reach(step)
                until = min(
                    self.profiler.next(step),
                    (step // log_every + 1) * log_every,
                    (step // eval_every + 1) * eval_every,
                    recipe.steps,
                    step + chunk,
                )
                start = time.monotonic()
                is_stopped, seconds = self.advance(until - step, seconds)
                before, step = step, trainer.completed_steps

                # Measure. All workers choose the same chunk, by their mean
                # time.
                if seconds:
                    chunk = max(1, round(chunk_seconds / seconds))
                if before > first:  # the first chunk includes the tracing
                    busy += time.monotonic() - start
                    self.speed = (step - first - 1) * recipe.batch_size / busy
                    seconds = (time.monotonic() - start) / (step - before)
                bar.update(step - before)
                self.show_progress(step, bar)
                if is_stopped and step < recipe.steps:
                    self.stop(step)

    def advance(self, steps, seconds):
        """Calls `take` of the trainer, and explains its errors."""
        stop_requested = self.signals.received is not None
        try:
            stops, seconds = self.trainer.take(steps, stop_requested, seconds)
        except datasets.UNREADABLE:
            self.dataset.check()  # names the image that does not decode
            raise
        self.signals.saved_at = None
        self.is_saved = False
        loss, *_ = self.trainer.read_sums()
        if not math.isfinite(loss):
            self.diverged(f"the loss is {loss}")
        return stops, seconds

    # --- Rows ---

    def add_row(self, step, is_tested):
        """Adds the row of a step to the metrics, and keeps the best network."""
        row = _train_row(self.trainer, step)
        if is_tested:
            batch_size = min(1000, max(self.recipe.batch_size, 100))
            result = self.trainer.evaluate(
                batch_size, lambda: self.signals.received is not None
            )
            if result is None:
                self.stop(step)
            row["test_loss"] = result.loss
            row["test_top1_error"] = result.top1_error
            row["test_top5_error"] = result.top5_error
            if self.is_chief and result.top1_error < self.best_error():
                # The previous best one stays until the next checkpoint: a run
                # that is killed before then resumes without this step.
                self.write("best", step, keep=None)
        # TensorBoard has more than metrics.csv, which is the same each time.
        seen = {"gradient_norm": self.trainer.last_gradient_norm()}
        seen["images_per_second"] = self.speed
        self.rows.add(row, {k: v for k, v in seen.items() if v is not None})
        self.trainer.clear_sums()
        self.is_saved = False
        return row

    def progress_bar(self, step):
        self.is_terminal = sys.stderr.isatty() and self.is_chief
        return tqdm.tqdm(
            total=self.recipe.steps,
            initial=step,
            unit="step",
            disable=not self.is_terminal,
            leave=False,
        )

    def show_progress(self, step, bar):
        """Shows loss, error and epoch on the bar of a terminal."""
        if self.is_terminal and self.trainer.images_since_row:
            row = _train_row(self.trainer, step)
            epochs = _epochs(step, self.recipe, self.dataset)
            bar.set_postfix_str(
                f"{epochs}, loss {row['train_loss']:.3f}, error "
                f"{row['train_top1_error']:.1f}%, "
                f"{self.speed or 0:,.0f} images/s"
            )

    def show_row(self, row, bar):
        """Reports a row; a terminal has a bar for rows without a test."""
        if not self.is_terminal or "test_loss" in row:
            with tqdm.tqdm.external_write_mode(file=sys.stderr):
                epochs = _epochs(row["step"], self.recipe, self.dataset)
                self.report(_line(row, self.recipe, self.speed, epochs))

    # --- Checkpoints ---

    def save_if_due(self, step, checkpoint_seconds):
        """Saves at the last step and when the pause is over."""
        waited = time.monotonic() - self.saved_at
        pause = self.pause if checkpoint_seconds is None else checkpoint_seconds
        if step < self.recipe.steps and waited <= pause:
            return
        self.save(step)
        if checkpoint_seconds is None and self.pause > 2 * pause:
            self.report(
                "saving is slow: the next checkpoint follows in "
                f"{self.pause:.0f} seconds (--checkpoint_seconds)"
            )

    def save(self, step):
        """Writes a checkpoint, unless the state is saved already."""
        if self.is_saved:
            return
        if not self.trainer.is_finite():
            self.diverged("a weight is not a finite number")
        if self.is_chief:
            start = time.monotonic()
            self.write("last", step, self.keep)
            checkpoints.prune(self.folder("best"), keep=1)
            seconds = _PAUSE_FACTOR * (time.monotonic() - start)
            self.pause = min(max(seconds, _MIN_PAUSE), _MAX_PAUSE)
        self.is_saved = True
        self.saved_at = time.monotonic()

    def write(self, name, step, keep):
        """Writes the state and the rows so far to a folder of checkpoints."""
        self.lock.check()
        rows = self.rows.text()
        checkpoints.save(
            lambda path: self.trainer.write(path, rows),
            self.folder(name),
            step,
            keep,
        )

    def folder(self, name):
        return self.lock.directory / workdirs.CHECKPOINTS[name]

    def best_error(self):
        """Returns the test error of the network in `best/`."""
        kept = checkpoints.steps(self.folder("best"))
        return self.rows.error_at(kept[-1]) if kept else math.inf

    # --- Ends ---

    def result(self):
        """Returns the last row, with the test images and the speed."""
        numbers = {
            name: float(value)
            for name, value in self.rows.rows[-1].items()
            if value
        }
        best_step, best_error = self.rows.best()
        return {
            **numbers,
            "step": int(numbers["step"]),
            "best_step": best_step,
            "best_test_top1_error": best_error,
            "device": summaries.device(),
            "test_images": self.dataset.test_size,
            "images_per_second": self.speed,
        }

    def stop(self, step):
        """Saves and raises, because a worker was asked to stop."""
        self.save(step)
        self.trainer.synchronize()
        raise Interrupted(self.signals.received or signal.SIGTERM, step)

    def diverged(self, what):
        raise TrainingDivergedError(
            f"{what} at step {self.trainer.completed_steps}: the run diverged, "
            "and this step is not saved; lower recipe.learning_rate or "
            "lengthen recipe.warmup_steps, and start in another work directory"
        )


def _train_row(trainer, step):
    loss, top1_errors, top5_errors, images = trainer.read_sums()
    return {
        "step": step,
        "learning_rate": float(trainer.rates(step - 1)),
        "train_loss": loss / images,
        "train_top1_error": 100 * top1_errors / images,
        "train_top5_error": 100 * top5_errors / images,
    }


def _epochs(step, recipe, dataset):
    """Returns the number of epochs so far, and of the run."""
    each = recipe.batch_size / dataset.train_size
    return f"epoch {step * each:.1f} of {recipe.steps * each:.1f}"


def _line(row, recipe, speed, epochs):
    """Returns the progress line of a row."""
    words = [
        f"step {row['step']:,} of {recipe.steps:,}",
        epochs,
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


# --- Signals ------------------------------------------------------------------


class _Signals:
    """Notes SIGTERM and SIGINT, so that a run can save before it stops.

    Args:
        can_raise: Whether to raise at once if everything is saved, as in the
            first minutes of a large network.

    Attributes:
        received: The first signal, or None.
        saved_at: The step of the checkpoint if no step followed it.
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
        """Notes that everything up to a step is saved."""
        self.saved_at = step
        if self.received is not None:  # before the first step was known
            self._stop_if_saved()

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)


def _ignore(line):
    """Drops the progress lines, which the first worker reports."""
