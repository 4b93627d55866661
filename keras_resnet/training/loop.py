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
import time
from collections.abc import Callable

import tensorflow as tf

from keras_resnet import training
from keras_resnet.data import datasets
from keras_resnet.training import budgets
from keras_resnet.training import checkpoints
from keras_resnet.training import configs
from keras_resnet.training import interrupts
from keras_resnet.training import memory
from keras_resnet.training import metrics
from keras_resnet.training import profiles
from keras_resnet.training import progress
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
        (`seconds`), the `device` and the cost of all steps (`multiply_adds`).

    Raises:
        workdirs.WorkdirError: If the directory is in use, or of another run.
        checkpoints.StateError: If its checkpoints are damaged, or of another
            run.
        ImportError: If Keras does not run on the configuration's backend.
        ValueError: If the devices cannot share a batch equally, or the backend
            does not support the configuration.
        budgets.BudgetError: If `minutes` are too few, or several workers train.
        memory.DoesNotFitError: If a step cannot fit in memory.
        TrainingDivergedError: If the loss becomes NaN or infinite.
        strategies.WorkerLostError: If another worker stopped.
        OSError: If a file cannot be written; earlier checkpoints stay.
        interrupts.Interrupted: After SIGTERM or SIGINT; everything is saved.
    """
    training.require_backend(__name__, config.backend)
    return _run(
        config,
        workdirs.local(workdir),
        strategy or tf.distribute.get_strategy(),
        report,
        dataset,
        minutes,
        profile_steps,
        (log_every, eval_every, checkpoint_seconds, keep),
    )


def _run(
    config, workdir, strategy, report, dataset, minutes, profile_steps, options
):
    """Takes all steps of a run; the arguments of `train_and_evaluate`."""
    start = time.monotonic()
    profiler = profiles.Profiler(workdir / "events", profile_steps)
    if not strategies.is_chief(strategy):
        report = _ignore
    with (
        interrupts.Signals(
            can_raise=not strategies.has_workers(strategy)
        ) as signals,
        contextlib.ExitStack() as stack,
    ):
        if minutes is not None:
            if dataset is None:
                dataset = start_weights.load_dataset(config, workdir)
            _, eval_every, *_ = options
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
        loop.run(*options)
        loop.finish()
    return {**loop.result(), "seconds": time.monotonic() - start}


# --- How a run starts ---------------------------------------------------------


def _start(config, workdir, strategy, dataset, signals, stack, report):
    """Returns the loop of a run, ready to take its next step.

    `stack` unlocks the directory and closes its files at the end.
    """
    is_chief = strategies.is_chief(strategy)

    # 1. Check. Nothing is written before step 3.
    _check(config, workdir, strategy, dataset)

    # 2. Load the data set and build the network.
    if dataset is None:
        dataset = start_weights.load_dataset(config, workdir)
    trainer = _build(config, dataset, strategy)

    # 3. Lock the work directory and describe the run in it.
    lock = None
    if is_chief:
        lock = stack.enter_context(workdirs.Lock(workdir, report))
        workdirs.check(config, workdir, dataset)  # another had the lock
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
        _check(config, workdir, strategy, dataset)
    return budgets.with_length(
        config,
        workdir,
        minutes,
        lambda config: _build(config, dataset, strategy),
        dataset.test_size,
        eval_every,
    )


def _check(config, workdir, strategy, dataset=None):
    """Raises for a configuration that cannot train here."""
    configs.check_devices(config.recipe, strategy.num_replicas_in_sync)
    if config.deterministic:
        tf.config.experimental.enable_op_determinism()
    if strategies.is_chief(strategy):
        workdirs.check(config, workdir, dataset)


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
        self.progress = progress.Progress(
            self.recipe, dataset.train_size, report, self.is_chief
        )

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
        self.first_step = first
        self.report_pause(checkpoint_seconds)
        chunk, busy, seconds = 1, 0.0, 0.0

        def is_tested():
            return step == recipe.steps or step % eval_every == 0

        def is_due():
            return is_tested() or step % log_every == 0

        with self.progress.bar(step):
            while True:
                # Write the row, evaluate and save, if due.
                if trainer.images_since_row and is_due():
                    row = self.add_row(step, is_tested())
                    self.progress.show_row(row, self.speed)
                self.save_if_due(step, checkpoint_seconds)
                if step == recipe.steps:
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
                if trainer.images_since_row:
                    row = progress.train_row(trainer, step)
                    self.progress.show_step(
                        step - before, row, self.speed, is_due()
                    )
                if is_stopped and step < recipe.steps:
                    self.stop(step)

    def advance(self, steps, seconds):
        """Calls `take` of the trainer, and explains its errors."""
        stop_requested = self.signals.received is not None
        try:
            with progress.stalls(self.report, self.dataset.stall_reason):
                stops, seconds = self.trainer.take(
                    steps, stop_requested, seconds
                )
        except datasets.UNREADABLE as error:
            self.dataset.check(error)  # names the image that does not decode
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
        row = progress.train_row(self.trainer, step)
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

    # --- Checkpoints ---

    def report_pause(self, checkpoint_seconds):
        """Reports how much work a kill can lose from now on."""
        if not self.is_chief or self.first_step == self.recipe.steps:
            return
        if checkpoint_seconds is None:
            often = f"{_MIN_PAUSE:g} seconds, or less often if a save is slow"
        else:
            often = f"{checkpoint_seconds:g} seconds"
        self.report(
            f"saving a checkpoint every {often}; a kill loses the steps since "
            "the last one (--checkpoint_seconds)"
        )

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

    def finish(self):
        """Waits for the other workers, and completes the work directory."""
        self.trainer.synchronize()  # one that leaves early stops the others
        if not self.is_chief:
            return
        workdir = self.lock.directory
        if not workdirs.is_described(workdir):
            workdirs.prepare(self.trainer.config, self.dataset, workdir)
        steps = self.recipe.steps
        if self.first_step == steps:
            self.report(f"{workdir} has all its {steps} steps already")

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
            "multiply_adds": summaries.multiply_adds(
                self.trainer.config, self.trainer.model
            ),
            "test_images": self.dataset.test_size,
            "images_per_second": self.speed,
        }

    def stop(self, step):
        """Saves and raises, because a worker was asked to stop."""
        self.save(step)
        self.trainer.synchronize()
        received = self.signals.received or signal.SIGTERM
        raise interrupts.Interrupted(received, step)

    def diverged(self, what):
        raise TrainingDivergedError(
            f"{what} at step {self.trainer.completed_steps}: the run diverged, "
            "and this step is not saved; lower recipe.learning_rate or "
            "lengthen recipe.warmup_steps, and start in another work directory"
        )


def _ignore(line):
    """Drops the progress lines, which the first worker reports."""
