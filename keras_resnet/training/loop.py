"""Training: `strategy.run` under one `tf.function`, resumable at any step.

The state of a run is the model, the optimizer, the step and the sums of the
metrics since the last row; all of it is in each checkpoint, and a batch is a
function of (seed, step), so that a run goes on where it stopped.
"""

import csv
import dataclasses
import difflib
import functools
import inspect
import io
import json
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import keras
import tensorflow as tf
import tqdm

from keras_resnet import baselines
from keras_resnet import layers
from keras_resnet import models
from keras_resnet import training
from keras_resnet.training import data
from keras_resnet.training import evaluation
from keras_resnet.training import optimizers
from keras_resnet.training.recipes import Recipe

training.require_tensorflow(__name__)

DTYPES = ("float32", "mixed_bfloat16", "mixed_float16")
COLUMNS = (
    "step",
    "learning_rate",
    "train_loss",
    "train_top1_error",
    "train_top5_error",
    "test_loss",
    "test_top1_error",
    "test_top5_error",
)
_CHUNK_SECONDS = 1.0  # time between two looks at signals and the clock
_CHECKPOINT_SECONDS = 120.0


class WorkdirError(ValueError):
    """A work directory that cannot be used as asked; one line says why."""


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


@dataclasses.dataclass(frozen=True)
class Config:
    """What is trained: everything that the result depends on.

    Attributes:
        model: A name in `keras_resnet.MODELS` or `baselines.BASELINES`.
        dataset: A name that `training.data.load` knows.
        recipe: How.
        model_arguments: Further arguments of `keras_resnet.resnet`, such as
            `{"shortcut": "C"}`.
        dtype: One of `DTYPES`.
        seed: Seed of the weights, the batches and the augmentation.
        deterministic: Whether equal runs are equal to the bit.
        data_dir: Where the data set is; no part of the result.
    """

    model: str
    dataset: str
    recipe: Recipe
    model_arguments: dict = dataclasses.field(default_factory=dict)
    dtype: str = "float32"
    seed: int = 0
    deterministic: bool = False
    data_dir: str | None = None

    def __post_init__(self):
        network = baselines.get_network(self.model)
        if self.dtype not in DTYPES:
            raise ValueError(
                f"dtype must be one of {DTYPES}, received {self.dtype!r}"
            )
        check_model_arguments(network, self.model_arguments)

    def to_json(self) -> dict:
        """The fields as JSON has them."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def from_json(cls, fields: dict) -> "Config":
        """The configuration from the dict of `to_json`."""
        recipe = Recipe.from_json(fields["recipe"])
        return cls(**{**fields, "recipe": recipe})


def check_model_arguments(
    network: models.Spec | baselines.Baseline, arguments: dict
) -> None:
    """Refuses values that no network can have, before any data is read.

    Raises:
        ValueError: As the units and shortcuts raise it, or if a network that
            is not residual is given arguments.
    """
    if isinstance(network, baselines.Baseline):
        if arguments:
            raise ValueError(
                f"{network.name} takes no arguments, received {arguments}"
            )
        return
    arguments = {"unit": network.unit, **arguments}
    for name in ("looped", "first_norm"):  # of the network, not of a unit
        arguments.pop(name, None)
    layers.units.get(arguments.pop("unit"))(1, **arguments)


def parse_model_argument(name: str, text: str) -> str | float | bool | None:
    """The value of a keyword argument of `keras_resnet.resnet` from text.

    Raises:
        ValueError: If there is no such argument or its value is no number.

    >>> parse_model_argument("survival_probability", "0.8")
    0.8
    """
    allowed = {
        parameter.name: parameter
        for parameter in inspect.signature(models.resnet).parameters.values()
        if parameter.kind is parameter.KEYWORD_ONLY
    }
    if name not in allowed:
        near = difflib.get_close_matches(name, allowed, 1)
        raise ValueError(
            f"unknown model argument {name!r}"
            + (f" (did you mean {near[0]!r}?)" if near else "")
            + f": allowed are {', '.join(allowed)}"
        )
    words = {"true": True, "false": False, "none": None}
    if name in ("looped", "remat"):
        if text.lower() in words:
            return words[text.lower()]
        raise ValueError(f"{name} must be true or false, received {text!r}")
    if not isinstance(allowed[name].default, float):
        return text
    try:
        return float(text)
    except ValueError:
        raise ValueError(
            f"{name} must be a number, received {text!r}"
        ) from None


def build_model(
    config: Config,
    image_shape: tuple[int, int, int],
    classes: int,
    classifier_activation=None,
) -> keras.Model:
    """The network of a configuration, in its dtype, with weights by its seed.

    Args:
        config: The configuration.
        image_shape: Height, width and channels of the input.
        classes: Number of classes.
        classifier_activation: As in `keras_resnet.resnet`.

    Returns:
        A `keras.Model`.
    """
    before = keras.config.dtype_policy()
    keras.utils.set_random_seed(config.seed)
    keras.config.set_dtype_policy(config.dtype)
    try:
        return baselines.build(
            config.model,
            input_shape=image_shape,
            classes=classes,
            classifier_activation=classifier_activation,
            **config.model_arguments,
        )
    finally:
        keras.config.set_dtype_policy(before)


@dataclasses.dataclass
class Trained:
    """What a work directory holds: see `load_workdir`."""

    model: keras.Model
    config: Config
    preprocessing: data.Preprocessing
    labels: list[str]
    step: int


def load_workdir(
    workdir: str | os.PathLike, classifier_activation="softmax"
) -> Trained:
    """The network of a work directory as its newest checkpoint has it.

    Args:
        workdir: A directory that `train_and_evaluate` wrote.
        classifier_activation: None for logits.

    Returns:
        A `Trained`; its model computes in float32.

    Raises:
        WorkdirError: If it is no work directory or has no checkpoint yet.
    """
    workdir = Path(workdir)
    if not (workdir / "config.json").is_file():
        raise WorkdirError(
            f"{workdir} is no work directory: it has no config.json, which "
            "apps.train writes"
        )
    config = Config.from_json(_read_json(workdir / "config.json"))
    about = _read_json(workdir / "dataset.json")
    newest = tf.train.latest_checkpoint(workdir / "checkpoints")
    if newest is None:
        raise WorkdirError(
            f"{workdir} has no checkpoint yet: train for some steps first"
        )
    model = build_model(
        dataclasses.replace(config, dtype="float32"),
        tuple(about["image_shape"]),
        len(about["labels"]),
        classifier_activation,
    )
    step = tf.Variable(0, dtype="int64")
    status = tf.train.Checkpoint(model=model, step=step).restore(newest)
    status.assert_existing_objects_matched().expect_partial()
    return Trained(
        model,
        config,
        data.Preprocessing.from_json(json.dumps(about["preprocessing"])),
        about["labels"],
        int(step.numpy()),
    )


def train_and_evaluate(
    config: Config,
    workdir: str | os.PathLike,
    strategy: tf.distribute.Strategy | None = None,
    report: Callable[[str], None] = print,
    log_every: int = 100,
    eval_every: int | None = None,
    keep: int = 3,
    dataset: data.DataSet | None = None,
) -> dict:
    """Trains a network and evaluates it; goes on where an earlier call stopped.

    Args:
        config: What is trained.
        workdir: Where `config.json`, `dataset.json`, `checkpoints/`,
            `metrics.csv` and the events of TensorBoard are kept.
        strategy: A `tf.distribute` strategy; None for one device.
        report: Is given lines for a person to read.
        log_every: Steps between two rows of `metrics.csv`.
        eval_every: Steps between two evaluations; None for a twentieth of the
            run. The last step is always evaluated.
        keep: How many checkpoints are kept.
        dataset: That of the configuration where it is loaded already.

    Returns:
        The last row of `metrics.csv` as a dict, with the number of test images
        (`test_images`) and the training speed (`images_per_second`).

    Raises:
        WorkdirError: If the directory belongs to another configuration.
        TrainingDivergedError: If the loss becomes NaN or infinite.
        Interrupted: If SIGTERM or SIGINT arrived; everything is saved.
    """
    workdir = Path(workdir)
    recipe = config.recipe
    if config.deterministic:
        tf.config.experimental.enable_op_determinism()
    _check_workdir(config, workdir)
    if dataset is None:
        dataset = data.load(
            config.dataset, config.data_dir, image_size=recipe.image_size
        )
    run = _Run(config, dataset, strategy or tf.distribute.get_strategy())
    # Nothing is written before everything that can be refused has been.
    workdir.mkdir(parents=True, exist_ok=True)
    _write_json(
        workdir / "dataset.json",
        {
            "image_shape": list(dataset.image_shape),
            "labels": list(dataset.labels),
            "preprocessing": json.loads(dataset.preprocessing.to_json()),
        },
    )
    _write_json(workdir / "config.json", config.to_json())

    manager = tf.train.CheckpointManager(
        run.checkpoint, str(workdir / "checkpoints"), max_to_keep=keep
    )
    if manager.latest_checkpoint:
        run.checkpoint.restore(manager.latest_checkpoint).assert_consumed()
        report(f"goes on at step {run.completed_steps} of {recipe.steps}")
    metrics = _Metrics(workdir, run.completed_steps)
    if eval_every is None:
        eval_every = max(recipe.steps // 20 // log_every, 1) * log_every
    steps_done = run.completed_steps
    speed = _train(
        run, manager, metrics, dataset, report, log_every, eval_every
    )
    if not metrics.rows or int(metrics.rows[-1]["step"]) != recipe.steps:
        raise WorkdirError(
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


class _Run:
    """The variables of a run and the function that advances them."""

    def __init__(self, config, dataset, strategy):
        recipe = config.recipe
        self.config = config
        self.strategy = strategy
        with strategy.scope():
            self.model = build_model(
                config, dataset.image_shape, dataset.classes
            )
            self.rates = recipe.learning_rates()
            self.optimizer = optimizers.of_recipe(recipe)
            if config.dtype == "mixed_float16":
                self.optimizer = keras.optimizers.LossScaleOptimizer(
                    self.optimizer
                )
            self.optimizer.build(self.model.trainable_variables)
            self.step = tf.Variable(0, dtype="int64")
            self.sums = tf.Variable(tf.zeros([4]))
        # TensorFlow's checkpoints do not find the seeds of random layers.
        weights = set(map(id, self.model.weights))
        seeds = [v.value for v in self.model.variables if id(v) not in weights]
        self.checkpoint = tf.train.Checkpoint(
            model=self.model,
            optimizer=self.optimizer,
            step=self.step,
            sums=self.sums,
            seeds=seeds,
        )
        self.decayed = [
            recipe.decay_norms or variable.name.endswith("kernel")
            for variable in self.model.trainable_variables
        ]
        self.evaluate = evaluation.make_evaluator(
            functools.partial(self.model, training=False), strategy
        )
        self.advance = tf.function(self._advance)

    @property
    def completed_steps(self) -> int:
        return int(self.step.numpy())

    def _advance(self, iterator, steps):
        """Takes `steps` training steps, all of them in one graph."""
        sums = tf.convert_to_tensor(self.sums)
        for _ in tf.range(steps):
            images, labels = next(iterator)
            replicas = self.strategy.run(self.train_step, (images, labels))
            sums += self.strategy.reduce("SUM", replicas, axis=None)
        self.sums.assign(sums)
        self.step.assign_add(tf.cast(steps, "int64"))

    def train_step(self, images, labels):
        """One step on one device; gives the sums of `count_errors`."""
        recipe = self.config.recipe
        variables = self.model.trainable_variables
        with tf.GradientTape() as tape:
            logits = self.model(images, training=True)
            # The mean over the global batch; the devices' gradients are added.
            loss = tf.reduce_sum(
                self._losses(labels, tf.cast(logits, "float32"))
            )
            loss /= float(recipe.batch_size)
            scaled = loss
            if self.config.dtype == "mixed_float16":
                scaled = self.optimizer.scale_loss(loss)
        gradients = tape.gradient(scaled, [v.value for v in variables])
        replicas = self.strategy.num_replicas_in_sync
        scale = recipe.weight_decay / replicas
        if self.config.dtype == "mixed_float16":
            scale = self.optimizer.scale_loss(scale)
        # The gradient of the L2 penalty [1, Sec. 3.4], which is no part of
        # the loss that is reported.
        gradients = [
            gradient + scale * variable.value if is_decayed else gradient
            for gradient, variable, is_decayed in zip(
                gradients, variables, self.decayed, strict=True
            )
        ]
        self.optimizer.apply(gradients, variables)
        counted = tf.ones_like(labels, dtype="float32")
        return evaluation.count_errors(
            tf.cast(logits, "float32"), labels, counted
        )

    def _losses(self, labels, logits):
        """Of the network, and of its companions in the same call."""
        losses = self._cross_entropies(labels, logits)
        for weight, companion in baselines.companion_logits(self.model):
            companion = tf.cast(companion, "float32")
            losses += weight * self._cross_entropies(labels, companion)
        return losses

    def _cross_entropies(self, labels, logits):
        smoothing = self.config.recipe.label_smoothing
        if not smoothing:
            return keras.ops.sparse_categorical_crossentropy(
                labels, logits, from_logits=True
            )
        classes = logits.shape[-1]
        targets = tf.one_hot(
            labels,
            classes,
            on_value=1.0 - smoothing + smoothing / classes,
            off_value=smoothing / classes,
        )
        return keras.ops.categorical_crossentropy(
            targets, logits, from_logits=True
        )


def _train(run, manager, metrics, dataset, report, log_every, eval_every):
    """Takes the remaining steps; gives the speed in images a second."""
    recipe = run.config.recipe
    first = step = run.completed_steps
    if step == recipe.steps:
        return None
    iterator = iter(
        dataset.train_batches(
            recipe.batch_size,
            seed=run.config.seed,
            first_step=step,
            augmentation=recipe.augmentation,
        )
    )
    chunk, busy = 1, 0.0
    saved_at = time.monotonic()
    is_terminal = sys.stderr.isatty()
    with (
        _Signals() as signals,
        tqdm.tqdm(
            total=recipe.steps,
            initial=step,
            unit="step",
            disable=not is_terminal,
            leave=False,
        ) as bar,
    ):
        while step < recipe.steps:
            until = min(
                (step // log_every + 1) * log_every, recipe.steps, step + chunk
            )
            start = time.monotonic()
            try:
                run.advance(iterator, tf.constant(until - step))
            except tf.errors.InvalidArgumentError:
                dataset.check()  # names the image that does not decode
                raise
            before, step = step, run.completed_steps  # waits for the device
            seconds = time.monotonic() - start
            if before > first:  # the first chunk has the tracing in it
                busy += seconds
                chunk = max(
                    1, round((step - before) / seconds * _CHUNK_SECONDS)
                )
            bar.update(step - before)
            sums = run.sums.numpy()
            if not math.isfinite(sums[0]):
                raise TrainingDivergedError(
                    f"the loss is {sums[0]} at step {step}: the run diverged; "
                    "lower recipe.learning_rate or lengthen "
                    "recipe.warmup_steps"
                )
            is_last = step == recipe.steps
            if step % log_every == 0 or is_last:
                row = _train_row(run, step, sums)
                if step % eval_every == 0 or is_last:
                    row.update(_test_row(run, dataset))
                metrics.add(row)
                run.sums.assign(tf.zeros([4]))
                counted = (step - first - 1) * recipe.batch_size
                speed = counted / busy if busy else 0.0
                left = (recipe.steps - step) * recipe.batch_size
                bar.set_postfix_str(f"{speed:,.0f} images/s")
                if not is_terminal or "test_loss" in row:
                    with tqdm.tqdm.external_write_mode(file=sys.stderr):
                        report(_line(row, recipe.steps, speed, left))
            is_asked = signals.received is not None
            waited = time.monotonic() - saved_at
            if is_last or is_asked or waited > _CHECKPOINT_SECONDS:
                manager.save(step)
                saved_at = time.monotonic()
            if is_asked and not is_last:
                raise Interrupted(signals.received, step)
    return (step - first - 1) * recipe.batch_size / busy if busy else None


def _train_row(run, step, sums):
    loss, top1_errors, top5_errors, images = sums.tolist()
    return {
        "step": step,
        "learning_rate": float(run.rates(step - 1)),
        "train_loss": loss / images,
        "train_top1_error": 100 * top1_errors / images,
        "train_top5_error": 100 * top5_errors / images,
    }


def _test_row(run, dataset):
    batch_size = min(1000, max(run.config.recipe.batch_size, 100))
    result = run.evaluate(dataset.test_batches(batch_size))
    return {
        "test_loss": result.loss,
        "test_top1_error": result.top1_error,
        "test_top5_error": result.top5_error,
    }


def _line(row, steps, speed, left):
    """What a person wants to know about a row."""
    words = [
        f"step {row['step']:,} of {steps:,}",
        f"loss {row['train_loss']:.3f}",
        f"error {row['train_top1_error']:.2f}%",
    ]
    if "test_loss" in row:
        words.append(f"test error {row['test_top1_error']:.2f}%")
    if speed:
        words.append(f"{speed:,.0f} images/s")
        minutes, seconds = divmod(round(left / speed), 60)
        hours, minutes = divmod(minutes, 60)
        words.append(f"{hours}:{minutes:02d}:{seconds:02d} left")
    return ", ".join(words)


class _Metrics:
    """`metrics.csv` and the events of TensorBoard, one row at a time.

    The rows hold nothing but what the configuration decides: a run that was
    stopped and went on writes the same file as one that was not.
    """

    def __init__(self, workdir, step):
        self.path = workdir / "metrics.csv"
        self.rows = []
        if self.path.exists():
            # A row after the checkpoint, whole or not, will be made again.
            for row in csv.DictReader(io.StringIO(self.path.read_text())):
                is_whole = None not in row.values() and None not in row
                if is_whole and int(row["step"]) <= step:
                    self.rows.append(row)
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        _write(self.path, text.getvalue())
        self.events = tf.summary.create_file_writer(str(workdir / "events"))

    def add(self, row):
        text = {
            name: value if name == "step" else f"{value:.8g}"
            for name, value in row.items()
        }
        text = {name: text.get(name, "") for name in COLUMNS}
        with self.path.open("a", newline="") as file:
            csv.DictWriter(file, COLUMNS, lineterminator="\n").writerow(text)
            file.flush()
            os.fsync(file.fileno())
        self.rows.append(text)
        with self.events.as_default(step=row["step"]):
            for name, value in row.items():
                tf.summary.scalar(name, value)
        self.events.flush()


class _Signals:
    """Notes SIGTERM and SIGINT, so that a run can save before it stops."""

    def __enter__(self):
        self.received = None
        self.before = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self.before[number] = signal.signal(number, self._note)
        return self

    def _note(self, number, frame):
        self.received = number

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)


def _check_workdir(config, workdir):
    """Refuses a directory of another configuration, and says what differs."""
    path = workdir / "config.json"
    if not path.exists():
        if workdir.is_dir() and any(workdir.iterdir()):
            raise WorkdirError(
                f"{workdir} is neither empty nor a work directory (it has no "
                "config.json): choose another"
            )
        return
    old, new = _flat(_read_json(path)), _flat(config.to_json())
    differing = [
        f"{name} was {old.get(name)!r}, is {new.get(name)!r}"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name) and name != "data_dir"
    ]
    if differing:
        raise WorkdirError(
            f"{workdir} belongs to another configuration: "
            f"{'; '.join(differing)}. Choose another directory or the old "
            "configuration"
        )


def _flat(fields, prefix=""):
    flat = {}
    for name, value in fields.items():
        if isinstance(value, dict) and name in ("recipe", "model_arguments"):
            flat.update(_flat(value, f"{name}."))
        else:
            flat[prefix + name] = value
    return flat


def _read_json(path):
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise WorkdirError(f"{path} cannot be read: {error}") from error


def _write_json(path, value):
    _write(path, json.dumps(value, indent=1) + "\n")


def _write(path, text):
    """Writes a file so that it is there as a whole or not at all."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(text)
    os.replace(beside, path)
