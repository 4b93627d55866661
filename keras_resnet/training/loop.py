"""Training: takes the steps of a run, resumable at any of them.

The state of a run is the model, the optimizer, the step and the sums of the
metrics since the last row; all of it is in each checkpoint, and a batch is a
function of (seed, step), so that a run goes on where it stopped.
"""

import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import tensorflow as tf
import tqdm

from keras_resnet import training
from keras_resnet.training import checkpoints
from keras_resnet.training import configs
from keras_resnet.training import data
from keras_resnet.training import memory
from keras_resnet.training import strategies
from keras_resnet.training import workdirs

_CHUNK_SECONDS = 1.0  # time between two looks at signals and the clock


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
    dataset: data.DataSet | None = None,
    checkpoint_seconds: float = 120.0,
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
        checkpoint_seconds: Time between two checkpoints.

    Returns:
        The last row of `metrics.csv` as a dict, with the number of test images
        (`test_images`) and the training speed (`images_per_second`).

    Raises:
        workdirs.WorkdirError: If the directory is another configuration's.
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
    workdir = Path(workdir)
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
    with _Signals(can_raise=not strategies.has_workers(strategy)) as signals:
        if dataset is None:
            dataset = data.load(
                config.dataset, config.data_dir, image_size=recipe.image_size
            )
        with strategies.lost_workers(strategy):
            run = _run(config, dataset, strategy)
        memory.check_training(
            config, run.model, strategies.worker_count(strategy)
        )
        # Nothing is written before everything that can be refused has been.
        if is_chief:
            workdirs.prepare(config, dataset, workdir)
        run.restore(workdir / workdirs.CHECKPOINTS["last"], report)
        steps_done = run.completed_steps
        if is_chief:
            checkpoints.drop(workdir / workdirs.CHECKPOINTS["best"], steps_done)
        signals.note_saved(steps_done)
        metrics = workdirs.Metrics(
            workdir, steps_done, run.images_since_row > 0, is_chief
        )
        if eval_every is None:
            eval_every = max(recipe.steps // 20 // log_every, 1) * log_every
        trainer = _Trainer(
            run, dataset, workdir, metrics, signals, report, keep, is_chief
        )
        speed = trainer.train(log_every, eval_every, checkpoint_seconds)
        run.meet()  # a worker that left would take the others with it
    if not metrics.rows or int(metrics.rows[-1]["step"]) != recipe.steps:
        raise workdirs.WorkdirError(
            f"{workdir}/metrics.csv lacks the row of step {recipe.steps}: it "
            "was changed by hand; restore it or start in another directory"
        )
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


class _Trainer:
    """Takes the remaining steps of a run; writes its rows and checkpoints."""

    def __init__(
        self, run, dataset, workdir, metrics, signals, report, keep, is_chief
    ):
        self.run = run
        self.dataset = dataset
        self.workdir = workdir
        self.metrics = metrics
        self.signals = signals
        self.report = report
        self.keep = keep
        self.is_chief = is_chief
        self.is_saved = True
        self.saved_at = time.monotonic()

    def train(self, log_every, eval_every, checkpoint_seconds):
        """Gives the speed in images a second; None where nothing was done."""
        run, recipe = self.run, self.run.config.recipe
        first = step = run.completed_steps
        chunk, busy, seconds = 1, 0.0, 0.0
        speed = None
        chunk_seconds = min(_CHUNK_SECONDS, checkpoint_seconds)
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
                if is_last or waited > checkpoint_seconds:
                    self.save(step)
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
        except data.UNREADABLE:
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
            best = self.workdir / workdirs.CHECKPOINTS["best"]
            if self.is_chief and (
                result.top1_error < self.metrics.best_error()
                or not checkpoints.steps(best)  # it went another way
            ):
                checkpoints.save(self.run.write, best, step, keep=1)
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
            last = self.workdir / workdirs.CHECKPOINTS["last"]
            checkpoints.save(self.run.write, last, step, self.keep)
        self.is_saved = True
        self.saved_at = time.monotonic()

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
        self.received = number
        if self.can_raise and self.saved_at is not None:
            raise Interrupted(number, self.saved_at)

    def note_saved(self, step):
        """Tells that everything up to a step is saved."""
        self.saved_at = step
        if self.received is not None:  # while there was nothing to say yet
            self._note(self.received, None)

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)


def _nothing(line):
    """Takes the lines that the first worker reports."""
