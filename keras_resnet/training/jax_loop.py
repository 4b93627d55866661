"""Training on JAX: takes the steps of a run whose images fit an accelerator.

For an accelerator that JAX drives and TensorFlow does not: `training.loop`
with the same configuration, recipe, rows and work directory. The images are in
the accelerator's memory, and the steps between two rows are one program there.
A batch and its augmentation are a function of (seed, step) as well, and what
is drawn has the same distribution; but NumPy draws it, so that runs of the two
loops with one seed are two runs.
"""

import functools
import io
import math
import os
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from keras import ops

from keras_resnet import training
from keras_resnet.training import augmentation
from keras_resnet.training import checkpoints
from keras_resnet.training import configs
from keras_resnet.training import data
from keras_resnet.training import interruption
from keras_resnet.training import losses
from keras_resnet.training import optimizers
from keras_resnet.training import workdirs

_STATE = "state.npz"
_TEST_BATCH = 1000


def train_and_evaluate(
    config: configs.Config,
    workdir: str | os.PathLike,
    dataset: data.DataSet,
    report: Callable[[str], None] = print,
    log_every: int = 100,
    eval_every: int | None = None,
    checkpoint_seconds: float = 120.0,
) -> dict:
    """Trains a network and evaluates it; goes on where an earlier call stopped.

    Args:
        config: What is trained.
        workdir: Where `config.json`, `dataset.json`, `metrics.csv`, the events
            of TensorBoard, the state of the run and at its end
            `trained.weights.h5` are kept.
        dataset: That of the configuration; its images have one size.
        report: Is given lines for a person to read.
        log_every: Steps between two rows of `metrics.csv`.
        eval_every: Steps between two evaluations; None for a twentieth of the
            run. The last step is always evaluated.
        checkpoint_seconds: Least time between two checkpoints.

    Returns:
        The last row of `metrics.csv` as a dict, with the number of test images
        (`test_images`) and the training speed (`images_per_second`).

    Raises:
        ImportError: If Keras runs on another backend.
        workdirs.WorkdirError: If the directory is another configuration's, or
            its state is damaged.
        ValueError: If the configuration has what this loop has not; it is
            named.
        interruption.TrainingDivergedError: If the loss becomes NaN or infinite.
        OSError: If something cannot be written; what was saved before stays.
        interruption.Interrupted: If SIGTERM or SIGINT arrived; everything is
            saved.
    """
    training.require_backend(__name__, "jax")
    workdir, recipe = Path(workdir), config.recipe
    check(config, dataset)
    workdirs.check(config, workdir)
    if eval_every is None:
        eval_every = workdirs.eval_every(recipe, log_every)
    with interruption.Signals() as signals:
        run = _Run(config, dataset)
        workdirs.prepare(config, dataset, workdir)
        step = first = run.restore(workdir / _STATE)
        if step:
            report(f"goes on at step {step} of {recipe.steps}")
        metrics = workdirs.Metrics(workdir, step, is_due=False, writes=True)
        signals.note_saved(step)
        saved_at = time.monotonic()
        busy, timed, speed = 0.0, 0, None
        while step < recipe.steps:
            until = min(
                (step // log_every + 1) * log_every,
                (step // eval_every + 1) * eval_every,
                recipe.steps,
            )
            start = time.monotonic()
            sums = run.advance(step, until)  # waits for the device
            signals.saved_at = None
            if step > first:  # the first steps have the compilation in them
                busy += time.monotonic() - start
                timed += until - step
                speed = timed * recipe.batch_size / busy
            step = until
            if not math.isfinite(sums[0]):
                raise interruption.TrainingDivergedError(
                    f"the loss is {sums[0]}", step
                )
            row = workdirs.train_row(step, run.rates(step - 1), sums)
            is_last = step == recipe.steps
            if is_last or step % eval_every == 0:
                row.update(run.evaluate())
            metrics.add(row)
            report(workdirs.line(row, recipe, speed))
            waited = time.monotonic() - saved_at
            if is_last:
                run.save_weights(workdir / workdirs.TRAINED)
            if is_last or signals.received or waited > checkpoint_seconds:
                run.save(workdir / _STATE, step)
                saved_at = time.monotonic()
                if not is_last:
                    signals.note_saved(step)
    row = {n: float(v) for n, v in metrics.rows[-1].items() if v}
    return {
        **row,
        "step": step,
        "test_images": dataset.test_size,
        "images_per_second": speed,
    }


def check(config: configs.Config, dataset: data.DataSet) -> None:
    """Refuses what this loop has not.

    Raises:
        ValueError: With what is allowed.
    """
    recipe = config.recipe
    row = augmentation.get_augmentation(recipe.augmentation)
    for is_refused, name, received, allowed in (
        (
            config.dtype not in ("float32", "mixed_bfloat16"),
            "dtype",
            config.dtype,
            "float32 or mixed_bfloat16",
        ),
        (config.deterministic, "deterministic", True, "false"),
        (config.sync_batch_norm, "sync_batch_norm", True, "false"),
        (recipe.micro_batches > 1, "micro_batches", recipe.micro_batches, "1"),
        (
            recipe.average_momentum > 0,
            "average_momentum",
            recipe.average_momentum,
            "0",
        ),
        (
            dataset.has_photos or row.window is not None,
            "dataset",
            config.dataset,
            "a set of small images of one size, with augmentation by padding",
        ),
    ):
        if is_refused:
            raise ValueError(
                f"on JAX {name} must be {allowed}, received {received!r}; "
                "KERAS_BACKEND=tensorflow has all of them"
            )


class _Run:
    """The state of a run on the accelerator, and the programs that use it."""

    def __init__(self, config, dataset):
        import jax

        recipe = config.recipe
        self.config = config
        self.rates = recipe.learning_rates()
        self.row = augmentation.get_augmentation(recipe.augmentation)
        self.model = configs.build_model(
            config, dataset.image_shape, dataset.classes
        )
        self.optimizer = optimizers.of_recipe(recipe)
        self.optimizer.build(self.model.trainable_variables)
        self.are_decayed = losses.are_decayed(recipe, self.model)
        self.variables = (
            self.model.trainable_variables,
            self.model.non_trainable_variables,
            self.optimizer.variables,
        )
        # Copies: what a program is given of the state, it may overwrite.
        self.state = tuple(
            [ops.copy(variable.value) for variable in variables]
            for variables in self.variables
        )
        self.preprocessing = dataset.preprocessing
        self.train_size = dataset.train_size
        images, labels = dataset.sample(dataset.train_size, training=True)
        self.train_images = ops.array(images), ops.array(labels)
        self.test_images = self._in_batches(
            *dataset.test_images(dataset.test_size)
        )
        self.take_steps = jax.jit(self._take_steps, donate_argnums=0)
        self.count_errors = jax.jit(self._count_errors)

    def advance(self, first, last):
        """Takes the steps first ... last - 1; gives their `count_errors`."""
        draws = [self._draw(step) for step in range(first, last)]
        draws = tuple(map(np.stack, zip(*draws, strict=True)))
        self.state, sums = self.take_steps(self.state, self.train_images, draws)
        return np.asarray(sums)

    def _draw(self, step):
        """What the batch of a step is: indices, crops and mirrorings.

        As in `training.data`, the images follow one another without end, each
        epoch in an order of its own.
        """
        size, count = self.config.recipe.batch_size, self.train_size
        positions = np.arange(step * size, (step + 1) * size)
        epochs = range(positions[0] // count, positions[-1] // count + 1)
        order = np.concatenate([self._order(epoch) for epoch in epochs])
        random = np.random.default_rng([self.config.seed, 1, step])
        height, width, _ = self.preprocessing.image_shape
        return (
            order[positions - epochs[0] * count],
            random.integers(0, 2 * (height // 8) + 1, size, "int32"),
            random.integers(0, 2 * (width // 8) + 1, size, "int32"),
            random.random(size) < 0.5,
        )

    @functools.lru_cache(maxsize=2)  # noqa: B019
    def _order(self, epoch):
        random = np.random.default_rng([self.config.seed, 0, epoch])
        return random.permutation(self.train_size).astype("int32")

    def _take_steps(self, state, images, draws):
        def body(state, draws):
            indices, *places = draws
            x = self._augmented(images[0][indices], *places)
            return self._step(state, x, images[1][indices])

        state, sums = ops.scan(body, state, draws)
        return state, ops.sum(sums, 0)

    def _normalized(self, images):
        x = ops.cast(images, "float32") / 255.0 - self.preprocessing.mean
        deviation = self.preprocessing.standard_deviation
        return x if deviation is None else x / deviation

    def _augmented(self, images, top, left, is_flipped):
        """As `augmentation.pad_crop` has it [1, Sec. 4.2]."""
        x = self._normalized(images)
        if not self.row.pads:
            return x
        count, height, width, _ = x.shape
        above, beside = height // 8, width // 8
        x = ops.pad(x, ((0, 0), (above,) * 2, (beside,) * 2, (0, 0)))
        row = top[:, None] + ops.arange(height)
        column = ops.arange(width)
        if self.row.flips:
            column = ops.where(is_flipped[:, None], width - 1 - column, column)
        column += left[:, None]
        image = ops.arange(count)[:, None, None]
        return x[image, row[:, :, None], column[:, None, :]]

    def _step(self, state, images, labels):
        """One step: `g + decay w` to the optimizer [1, Sec. 3.4]."""
        import jax

        trainable, others, slots = state
        recipe = self.config.recipe

        def loss_of(trainable):
            logits, after = self.model.stateless_call(
                trainable, others, images, training=True
            )
            loss = losses.of_network(recipe, self.model, labels, logits)
            return ops.mean(loss), (logits, after)

        gradient = jax.grad(loss_of, has_aux=True)
        gradients, (logits, others) = gradient(trainable)
        gradients = [
            g + recipe.weight_decay * w if is_decayed else g
            for g, w, is_decayed in zip(
                gradients, trainable, self.are_decayed, strict=True
            )
        ]
        trainable, slots = self.optimizer.stateless_apply(
            slots, gradients, trainable
        )
        sums = losses.count_errors(
            ops.cast(logits, "float32"), labels, ops.ones(len(labels))
        )
        return (trainable, others, slots), sums

    def evaluate(self):
        """The columns of `metrics.csv` for all test images, each once."""
        sums = self.count_errors(self.state, *self.test_images)
        loss, top1_errors, top5_errors, images = np.asarray(sums).tolist()
        return {
            "test_loss": loss / images,
            "test_top1_error": 100 * top1_errors / images,
            "test_top5_error": 100 * top5_errors / images,
        }

    def _count_errors(self, state, *batches):
        def of_batch(sums, batch):
            images, labels, counted = batch
            logits, _ = self.model.stateless_call(
                *state[:2], self._normalized(images), training=False
            )
            logits = ops.cast(logits, "float32")
            return sums + losses.count_errors(logits, labels, counted), None

        sums, _ = ops.scan(of_batch, ops.zeros(4), batches)
        return sums

    def _in_batches(self, images, labels):
        """Test images in batches of one size; what only fills up counts 0."""
        size = min(_TEST_BATCH, len(images))
        missing = -len(images) % size
        counted = np.repeat([1.0, 0.0], [len(images), missing])
        arrays = (
            np.pad(images, [(0, missing), (0, 0), (0, 0), (0, 0)]),
            np.pad(labels, [(0, missing)]),
            counted.astype("float32"),
        )
        return tuple(
            ops.array(a.reshape(-1, size, *a.shape[1:])) for a in arrays
        )

    def restore(self, path):
        """Reads the state, if there is one; gives how many steps it has."""
        if not path.exists():
            return 0
        try:
            with np.load(path) as file:
                state = tuple(
                    [ops.array(file[f"{i}/{j}"]) for j in range(len(group))]
                    for i, group in enumerate(self.state)
                )
                step = int(file["step"])
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise workdirs.WorkdirError(
                f"{path} is damaged ({error}): remove it to begin again"
            ) from error
        self.state = state
        return step

    def save(self, path, step):
        """Writes the state so that it is there as a whole or not at all."""
        arrays = {
            f"{i}/{j}": np.asarray(value)
            for i, group in enumerate(self.state)
            for j, value in enumerate(group)
        }
        content = io.BytesIO()
        np.savez(content, step=np.array(step), **arrays)
        checkpoints.replace_file(path, content.getvalue())

    def save_weights(self, path):
        """Writes the network as Keras does."""
        for variables, values in zip(
            self.variables[:2], self.state, strict=False
        ):
            for variable, value in zip(variables, values, strict=True):
                variable.assign(value)
        beside = path.with_name(f".{os.getpid()}.{path.name}")
        try:
            self.model.save_weights(beside)
            os.replace(beside, path)
        finally:
            beside.unlink(missing_ok=True)
