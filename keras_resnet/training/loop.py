"""Training: takes the steps of a run, resumable at any of them.

The state of a run is the model, the optimizer, the step and the sums of the
metrics since the last row; all of it is in each checkpoint, and a batch is a
function of (seed, step), so that a run goes on where it stopped.
"""

import math
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import tensorflow as tf
import tqdm

from keras_resnet import training
from keras_resnet.training import checkpoints
from keras_resnet.training import configs
from keras_resnet.training import data
from keras_resnet.training import interruption
from keras_resnet.training import steps
from keras_resnet.training import strategies
from keras_resnet.training import workdirs

training.require_backend(__name__, "tensorflow")

_CHUNK_SECONDS = 1.0  # time between two looks at signals and the clock


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

    With several workers, each calls this; the first writes and reports.

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
        ValueError: If the devices cannot share a batch equally.
        interruption.TrainingDivergedError: If the loss becomes NaN or infinite.
        strategies.WorkerLostError: If another worker is gone.
        OSError: If something cannot be written; what was saved before stays.
        interruption.Interrupted: If SIGTERM or SIGINT arrived; everything is
            saved.
    """
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
    with interruption.Signals(
        can_raise=not strategies.has_workers(strategy)
    ) as signals:
        if dataset is None:
            dataset = data.load(
                config.dataset, config.data_dir, image_size=recipe.image_size
            )
        with strategies.lost_workers(strategy):
            run = steps.Run(config, dataset, strategy)
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
            eval_every = workdirs.eval_every(recipe, log_every)
        trainer = _Trainer(
            run, dataset, workdir, metrics, signals, report, keep
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


class _Trainer:
    """Takes the remaining steps of a run; writes its rows and checkpoints."""

    def __init__(self, run, dataset, workdir, metrics, signals, report, keep):
        self.run = run
        self.dataset = dataset
        self.workdir = workdir
        self.metrics = metrics
        self.signals = signals
        self.report = report
        self.keep = keep
        self.is_chief = strategies.is_chief(run.strategy)
        self.is_saved = True
        self.saved_at = time.monotonic()

    def train(self, log_every, eval_every, checkpoint_seconds):
        """Gives the speed in images a second; None where nothing was done."""
        run, recipe = self.run, self.run.config.recipe
        first = step = run.completed_steps
        chunk, busy, seconds = 1, 0.0, 0.0
        speed = batches = None
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
                            self.report(workdirs.line(row, recipe, speed))
                waited = time.monotonic() - self.saved_at
                if is_last or waited > checkpoint_seconds:
                    self.save(step)
                if is_last:
                    return speed
                if batches is None:
                    batches = self.batches(step)
                until = min(
                    (step // log_every + 1) * log_every,
                    (step // eval_every + 1) * eval_every,
                    recipe.steps,
                    step + chunk,
                )
                start = time.monotonic()
                is_stopped, seconds = self.advance(
                    batches, until - step, seconds
                )
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

    def batches(self, step):
        """What follows after a step, without end."""
        config = self.run.config
        return strategies.distributed(
            self.run.strategy,
            lambda shard: self.dataset.train_batches(
                config.recipe.batch_size,
                seed=config.seed,
                first_step=step,
                augmentation=config.recipe.augmentation,
                shard=shard,
            ),
        )

    def advance(self, batches, steps, seconds):
        """Takes up to so many steps.

        Args:
            batches: What comes next.
            steps: How many, alike on all workers.
            seconds: Of a step, as this worker measured them; 0 for unknown.

        Returns:
            Whether a worker was asked to stop, and the mean of `seconds` over
            all workers: both alike on all of them.
        """
        asked = float(self.signals.received is not None)
        try:
            with strategies.lost_workers(self.run.strategy):
                heard = self.run.advance(
                    batches, tf.constant(steps), tf.constant([asked, seconds])
                )
                stops, seconds = heard.numpy().tolist()  # waits for the device
        except data.UNREADABLE:
            self.dataset.check()  # names the image that does not decode
            raise
        self.signals.saved_at = None
        self.is_saved = False
        loss, *_ = self.run.sums.numpy()
        if not math.isfinite(loss):
            self.diverged(f"the loss is {loss}")
        seconds /= self.run.strategy.num_replicas_in_sync
        return stops > 0, seconds

    def add_row(self, step, is_tested):
        """Adds the row of a step to the metrics, and keeps the best network."""
        row = workdirs.train_row(
            step, self.run.rates(step - 1), self.run.sums.numpy()
        )
        if is_tested:
            batch_size = min(1000, max(self.run.config.recipe.batch_size, 100))
            with strategies.lost_workers(self.run.strategy):
                result = self.run.evaluate(
                    self.dataset,
                    batch_size,
                    is_asked=lambda: self.signals.received is not None,
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
                checkpoints.save(self.run.checkpoint, best, step, keep=1)
        self.metrics.add(row)
        self.run.sums.assign(tf.zeros([4]))
        self.is_saved = False
        return row

    def save(self, step):
        """Writes what has not been written yet, if it is worth keeping."""
        if self.is_saved:
            return
        if not self.run.is_finite().numpy():
            self.diverged("a weight is no finite number")
        if self.is_chief:
            last = self.workdir / workdirs.CHECKPOINTS["last"]
            checkpoints.save(self.run.checkpoint, last, step, self.keep)
        self.is_saved = True
        self.saved_at = time.monotonic()

    def stop(self, step):
        """Saves because this worker or another was asked to stop."""
        self.save(step)
        self.run.meet()
        raise interruption.Interrupted(
            self.signals.received or signal.SIGTERM, step
        )

    def diverged(self, what):
        raise interruption.TrainingDivergedError(what, self.run.completed_steps)


def _nothing(line):
    """Takes the lines that the first worker reports."""
