"""Training: `strategy.run` under one `tf.function`, resumable at any step.

The state of a run is the model, the optimizer, the step and the sums of the
metrics since the last row; all of it is in each checkpoint, and a batch is a
function of (seed, step), so that a run goes on where it stopped. A step is a
pure function on each device; its results are added up over all devices at
once, and only then is anything written.
"""

import contextlib
import csv
import dataclasses
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
from keras_resnet import names
from keras_resnet import training
from keras_resnet.training import checkpoints
from keras_resnet.training import data
from keras_resnet.training import evaluation
from keras_resnet.training import optimizers
from keras_resnet.training import strategies
from keras_resnet.training.recipes import Recipe

training.require_tensorflow(__name__)

# float64 is for proofs: a difference that stays in it is no rounding.
DTYPES = ("float32", "mixed_bfloat16", "mixed_float16", "float64")
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
# The folders of a work directory that hold checkpoints.
CHECKPOINTS = {"last": "checkpoints", "best": "best"}
_CHUNK_SECONDS = 1.0  # time between two looks at signals and the clock


class WorkdirError(ValueError):
    """A work directory that cannot be used as asked; one line says why."""


class TrainingDivergedError(ArithmeticError):
    """The loss is no longer a finite number."""


class WorkerLostError(RuntimeError):
    """Another worker does not answer any more."""


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
        sync_batch_norm: Whether normalization is by the batch of all devices
            together, not by each device's share as in the papers.
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
    sync_batch_norm: bool = False

    def __post_init__(self):
        network = baselines.get_network(self.model)
        if self.dtype not in DTYPES:
            raise ValueError(
                f"dtype must be one of {DTYPES}, received {self.dtype!r}"
            )
        check_model_arguments(network, self.model_arguments)
        if self.sync_batch_norm and self.model_arguments.get("looped"):
            raise ValueError(
                "sync_batch_norm needs model.looped=false, because TensorFlow "
                "adds nothing up over devices inside of a loop; received "
                "model.looped=true"
            )

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
        raise ValueError(names.unknown("model argument", name, allowed))
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
    arguments = dict(config.model_arguments)
    if config.sync_batch_norm and config.model not in baselines.BASELINES:
        arguments["looped"] = False  # as `Config` says
    before = keras.config.dtype_policy()
    keras.utils.set_random_seed(config.seed)
    keras.config.set_dtype_policy(config.dtype)
    try:
        model = baselines.build(
            config.model,
            input_shape=image_shape,
            classes=classes,
            classifier_activation=classifier_activation,
            **arguments,
        )
    finally:
        keras.config.set_dtype_policy(before)
    if config.sync_batch_norm:
        for layer in model._flatten_layers():
            if isinstance(layer, keras.layers.BatchNormalization):
                layer.synchronized = True
    return model


@dataclasses.dataclass
class Trained:
    """What a work directory holds: see `load_workdir`."""

    model: keras.Model
    config: Config
    preprocessing: data.Preprocessing
    labels: list[str]
    step: int


def load_workdir(
    workdir: str | os.PathLike,
    classifier_activation="softmax",
    checkpoint: str = "last",
    report: Callable[[str], None] = print,
) -> Trained:
    """The network of a work directory as a checkpoint of it has it.

    Args:
        workdir: A directory that `train_and_evaluate` wrote.
        classifier_activation: None for logits.
        checkpoint: `"last"`, or `"best"` for that of the lowest test error.
        report: Is told of damaged checkpoints, which are passed over.

    Returns:
        A `Trained`; its model computes in float32.

    Raises:
        WorkdirError: If it is no work directory or has no checkpoint yet.
    """
    workdir = Path(workdir)
    if checkpoint not in CHECKPOINTS:
        raise ValueError(
            f"checkpoint must be one of {', '.join(CHECKPOINTS)}, received "
            f"{checkpoint!r}"
        )
    if not (workdir / "config.json").is_file():
        raise WorkdirError(
            f"{workdir} is no work directory: it has no config.json, which "
            "apps.train writes"
        )
    config = _read_config(workdir)
    directory = workdir / CHECKPOINTS[checkpoint]
    if not checkpoints.steps(directory):
        raise WorkdirError(
            f"{workdir} has no checkpoint yet: train for some steps first"
        )
    about = _read_json(workdir / "dataset.json")

    def build(dtype):
        return build_model(
            dataclasses.replace(config, dtype=dtype),
            tuple(about["image_shape"]),
            len(about["labels"]),
            classifier_activation,
        )

    model = build("float64" if config.dtype == "float64" else "float32")
    averages = _averages(config.recipe, model)
    saved = tf.train.Checkpoint(model=model, averages=averages)
    step = checkpoints.restore(
        lambda path: (
            saved.read(path).assert_existing_objects_matched().expect_partial()
        ),
        directory,
        report,
    )
    if step is None:
        raise WorkdirError(f"every checkpoint in {directory} is damaged")
    for variable, value in zip(
        model.trainable_variables, averages, strict=False
    ):
        variable.assign(value)
    if config.dtype == "float64":
        weights = model.get_weights()
        model = build("float32")
        model.set_weights(weights)
    return Trained(
        model,
        config,
        data.Preprocessing.from_json(json.dumps(about["preprocessing"])),
        about["labels"],
        step,
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
        WorkdirError: If the directory belongs to another configuration.
        ValueError: If the devices cannot share a batch equally.
        TrainingDivergedError: If the loss becomes NaN or infinite.
        WorkerLostError: If another worker is gone.
        OSError: If something cannot be written; what was saved before stays.
        Interrupted: If SIGTERM or SIGINT arrived; everything is saved.
    """
    workdir = Path(workdir)
    recipe = config.recipe
    strategy = strategy or tf.distribute.get_strategy()
    is_chief = strategies.is_chief(strategy)
    if not is_chief:
        report = _nothing
    check_devices(config, strategy)
    if config.deterministic:
        tf.config.experimental.enable_op_determinism()
    if is_chief:
        _check_workdir(config, workdir)
    with _Signals(can_raise=not _has_workers(strategy)) as signals:
        if dataset is None:
            dataset = data.load(
                config.dataset, config.data_dir, image_size=recipe.image_size
            )
        with lost_workers(strategy):
            run = _Run(config, dataset, strategy)
        # Nothing is written before everything that can be refused has been.
        if is_chief:
            _prepare(config, dataset, workdir)
        run.restore(workdir / CHECKPOINTS["last"], report)
        signals.saved_at = run.completed_steps
        steps_done = run.completed_steps
        metrics = _Metrics(
            workdir, steps_done, run.images_since_row > 0, is_chief
        )
        if eval_every is None:
            eval_every = max(recipe.steps // 20 // log_every, 1) * log_every
        trainer = _Trainer(
            run, dataset, workdir, metrics, signals, report, keep
        )
        speed = trainer.train(log_every, eval_every, checkpoint_seconds)
        run.meet()  # a worker that left would take the others with it
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


def check_devices(config: Config, strategy: tf.distribute.Strategy) -> None:
    """Refuses devices that cannot share a batch equally.

    Raises:
        ValueError: With the rule.
    """
    devices, recipe = strategy.num_replicas_in_sync, config.recipe
    if recipe.batch_size % (devices * recipe.micro_batches):
        parts = f" of {recipe.micro_batches} micro-batches each"
        raise ValueError(
            "the batch is that of all devices together, which take equal "
            f"shares; received {recipe.batch_size} images for {devices} devices"
            f"{parts if recipe.micro_batches > 1 else ''}"
        )


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
            self.optimizer = optimizers.of_recipe(recipe, adds_replicas=False)
            if config.dtype == "mixed_float16":
                self.optimizer = keras.optimizers.LossScaleOptimizer(
                    self.optimizer
                )
            self.optimizer.build(self.model.trainable_variables)
            self.step = tf.Variable(0, dtype="int64")
            self.sums = tf.Variable(tf.zeros([4]))
            self.averages = _averages(recipe, self.model)
        self.devices = tf.Variable(0, dtype="int64")
        # Moving statistics, and the seeds of random layers, which TensorFlow's
        # checkpoints do not find by themselves.
        weights = set(map(id, self.model.weights))
        self.states = self.model.non_trainable_variables
        self.checkpoint = tf.train.Checkpoint(
            model=self.model,
            optimizer=self.optimizer,
            step=self.step,
            sums=self.sums,
            devices=self.devices,
            averages=self.averages,
            seeds=[v.value for v in self.states if id(v) not in weights],
        )
        self.decayed = [
            recipe.decay_norms or variable.name.endswith("kernel")
            for variable in self.model.trainable_variables
        ]
        self.evaluate = evaluation.Evaluator(self.predict, strategy)
        self.advance = tf.function(self._advance)

    @property
    def completed_steps(self) -> int:
        return int(self.step.numpy())

    @property
    def images_since_row(self) -> int:
        return int(self.sums.numpy()[3])

    def restore(self, directory, report):
        """Reads the newest checkpoint that is whole, if there is any."""
        step = checkpoints.restore(
            lambda path: self.checkpoint.read(path).assert_consumed(),
            directory,
            report,
        )
        if step is None and checkpoints.steps(directory):
            report("every checkpoint is damaged; starts at step 0")
        if strategies.is_chief(self.strategy):
            checkpoints.set_aside(directory, after=-1 if step is None else step)
            checkpoints.clean(directory)
        if self.meet() != self.completed_steps:
            raise WorkdirError(
                f"{directory} must be the same for all workers; worker "
                f"{strategies.worker_index(self.strategy)} finds step "
                f"{self.completed_steps} there, another one does not"
            )
        if step is not None:
            report(f"goes on at step {step} of {self.config.recipe.steps}")
            before, now = (
                int(self.devices.numpy()),
                self.strategy.num_replicas_in_sync,
            )
            if before != now:
                report(
                    f"on {now} device{'s' * (now > 1)} now, on {before} before:"
                    " the batches stay the same, the share that a device "
                    "normalizes by does not"
                )
        self.devices.assign(self.strategy.num_replicas_in_sync)

    def meet(self):
        """Waits for all workers; gives the mean of their steps."""
        if not _has_workers(self.strategy):
            return self.completed_steps
        with lost_workers(self.strategy):
            return float(self._mean_step().numpy())

    @tf.function
    def _mean_step(self):
        each = self.strategy.run(lambda: tf.cast(self.step, "float64"))
        return self.strategy.reduce("MEAN", each, axis=None)

    @tf.function
    def is_finite(self):
        """Whether every weight is a finite number."""
        finite = [
            tf.reduce_all(tf.math.is_finite(tf.convert_to_tensor(v.value)))
            for v in self.model.weights
        ]
        return tf.reduce_all(finite)

    def _advance(self, iterator, steps, told):
        """Takes up to `steps` training steps, all of them in one graph.

        All workers must ask for as many steps: TensorFlow matches what they
        add up by its place in the loop.

        Args:
            iterator: Of batches, for all devices.
            steps: How many at most.
            told: What this worker tells the others: whether it was asked to
                stop, 1 or 0, and the seconds that a step takes.

        Returns:
            The sum of `told` over all devices. If one was asked to stop, all
            end after the first step.
        """
        sums = tf.convert_to_tensor(self.sums)
        heard, done = tf.zeros([2]), tf.constant(0)
        while (done < steps) & (heard[0] == 0.0):
            images, labels = next(iterator)
            states, totals = self.strategy.run(
                self.train_step, (images, labels, told)
            )
            for variable, state in zip(self.states, states, strict=True):
                self.strategy.extended.update(
                    variable.value, _assign, (state,), group=False
                )
            totals = self.strategy.experimental_local_results(totals)[0]
            sums, heard = sums + totals[:4], totals[4:]
            done += 1
            self.move_averages(tf.cast(self.step, "float32"), done)
        self.sums.assign(sums)
        self.step.assign_add(tf.cast(done, "int64"))
        return heard

    def move_averages(self, step, done):
        """Lets the moving average follow the parameters after a step."""
        step += tf.cast(done, "float32")
        momentum = tf.minimum(
            self.config.recipe.average_momentum, (1.0 + step) / (10.0 + step)
        )
        for average, variable in zip(
            self.averages, self.model.trainable_variables, strict=False
        ):
            self.strategy.extended.update(
                average, _move, (variable.value, momentum), group=False
            )

    def predict(self, images):
        """The logits of test images, by the moving average if there is one."""
        if not self.averages:
            return self.model(images, training=False)
        mapping = zip(
            self.model.trainable_variables, self.averages, strict=True
        )
        with keras.StatelessScope(mapping):
            return self.model(images, training=False)

    def train_step(self, images, labels, told):
        """One step on one device.

        Returns:
            The new values of `states`, and the sums of `count_errors` with
            of `told`: both alike on all devices.
        """
        context = tf.distribute.get_replica_context()
        replicas = self.strategy.num_replicas_in_sync
        # Each device draws numbers of its own; one device, those of Keras.
        shift = tf.constant([1, 0], "int64") * tf.cast(
            context.replica_id_in_sync_group, "int64"
        )
        shift *= 2**32
        values = [
            v.value + shift if _is_seed(v) else v.value for v in self.states
        ]
        gradients, values, sums = self.accumulated(images, labels, values)
        total = {
            "gradients": gradients,
            "statistics": [
                value / replicas
                for v, value in zip(self.states, values, strict=True)
                if not _is_seed(v)
            ],
            # Of the dtype of the others: workers send them as one.
            "sums": tf.cast(tf.concat([sums, told], 0), gradients[0].dtype),
        }
        if replicas > 1:  # once over the network, for all there is to add
            total = context.all_reduce("SUM", total)
        self.optimizer.apply(
            self.regularized(total["gradients"]), self.model.trainable_variables
        )
        statistics = iter(total["statistics"])
        states = [
            value - shift if _is_seed(v) else next(statistics)
            for v, value in zip(self.states, values, strict=True)
        ]
        return states, tf.cast(total["sums"], "float32")

    def accumulated(self, images, labels, values):
        """`gradients` of the micro-batches, one after the other, added up."""
        count = self.config.recipe.micro_batches
        if count == 1:
            return self.gradients(images, labels, values)
        images, labels = self.parts(images), self.parts(labels)
        is_seed = [_is_seed(v) for v in self.states]

        def body(i, gradients, totals, sums):
            # Each starts with the statistics from before, as devices do.
            before = [
                total if is_one else value
                for total, value, is_one in zip(
                    totals, values, is_seed, strict=True
                )
            ]
            with tf.control_dependencies(gradients):  # one after the other
                part = tf.identity(images[i])
            more, after, counted = self.gradients(part, labels[i], before)
            totals = [
                new if is_one else total + new / count
                for total, new, is_one in zip(
                    totals, after, is_seed, strict=True
                )
            ]
            gradients = [a + b for a, b in zip(gradients, more, strict=True)]
            return i + 1, gradients, totals, sums + counted

        none = [
            tf.zeros(v.shape, v.dtype) for v in self.model.trainable_variables
        ]
        totals = [
            tf.convert_to_tensor(value) if is_one else tf.zeros_like(value)
            for value, is_one in zip(values, is_seed, strict=True)
        ]
        state = (0, none, totals, tf.zeros([4]))
        if self.config.sync_batch_norm:
            for _ in range(count):
                state = body(*state)
        else:
            state = tf.while_loop(
                lambda i, *_: i < count,
                body,
                state,
                parallel_iterations=1,
                maximum_iterations=count,
            )
        return state[1:]

    def parts(self, tensor):
        """The micro-batches of the share of a device, `[count, n, ...]`.

        Synchronized, they are every `count`-th image, so that a micro-batch
        has the same images on however many devices.
        """
        count = self.config.recipe.micro_batches
        if self.config.sync_batch_norm:
            return tf.stack([tensor[i::count] for i in range(count)])
        return tf.reshape(tensor, [count, -1, *tensor.shape[1:]])

    def gradients(self, images, labels, values):
        """Gradients of the mean loss of the global batch, by some images of it.

        Args:
            images: Of one device.
            labels: Of the same.
            values: Of the variables `states`.

        Returns:
            The gradients, the new values of `states`, the sums of
            `count_errors`; no variable is changed.
        """
        variables = self.model.trainable_variables
        mapping = list(zip(self.states, values, strict=True))
        with tf.GradientTape() as tape:
            with keras.StatelessScope(mapping) as scope:
                logits = self.model(images, training=True)
            logits = _widened(logits)
            loss = tf.reduce_sum(self._losses(labels, logits))
            loss /= float(self.config.recipe.batch_size)
            scaled = loss
            if self.config.dtype == "mixed_float16":
                scaled = self.optimizer.scale_loss(loss)
        gradients = tape.gradient(scaled, [v.value for v in variables])
        values = [scope.get_current_value(v) for v in self.states]
        counted = tf.ones_like(labels, dtype="float32")
        return (
            gradients,
            values,
            evaluation.count_errors(
                tf.cast(logits, "float32"), labels, counted
            ),
        )

    def regularized(self, gradients):
        """With the gradient of the L2 penalty [1, Sec. 3.4].

        It is no part of the loss that is reported.
        """
        scale = self.config.recipe.weight_decay
        if self.config.dtype == "mixed_float16":
            scale = self.optimizer.scale_loss(scale)
        return [
            gradient + scale * variable.value if is_decayed else gradient
            for gradient, variable, is_decayed in zip(
                gradients,
                self.model.trainable_variables,
                self.decayed,
                strict=True,
            )
        ]

    def _losses(self, labels, logits):
        """Of the network, and of its companions in the same call."""
        losses = self._cross_entropies(labels, logits)
        for weight, companion in baselines.companion_logits(self.model):
            companion = _widened(companion)
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


def _averages(recipe, model):
    """Variables for the moving average of the parameters; none without."""
    if not recipe.average_momentum:
        return []
    return [
        tf.Variable(v.value, trainable=False) for v in model.trainable_variables
    ]


def _move(average, value, momentum):
    share = tf.cast(1.0 - momentum, average.dtype)
    average.assign(average + (value - average) * share)


def _widened(logits):
    """In float32 at least: a softmax in half precision loses its tail."""
    return logits if logits.dtype == "float64" else tf.cast(logits, "float32")


def _assign(variable, value):
    variable.assign(value)


def _is_seed(variable):
    return not variable.dtype.startswith("float")


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
                if run.images_since_row and (step % log_every == 0 or is_last):
                    row = self.add_row(step, is_last or step % eval_every == 0)
                    bar.set_postfix_str(f"{speed or 0:,.0f} images/s")
                    if not is_terminal or "test_loss" in row:
                        with tqdm.tqdm.external_write_mode(file=sys.stderr):
                            self.report(_line(row, recipe, speed))
                waited = time.monotonic() - self.saved_at
                if is_last or waited > checkpoint_seconds:
                    self.save(step)
                if is_last:
                    return speed
                if batches is None:
                    batches = self.batches(step)
                until = min(
                    (step // log_every + 1) * log_every,
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
            with lost_workers(self.run.strategy):
                heard = self.run.advance(
                    batches, tf.constant(steps), tf.constant([asked, seconds])
                )
                stops, seconds = heard.numpy().tolist()  # waits for the device
        except (tf.errors.InvalidArgumentError, tf.errors.DataLossError):
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
        row = _train_row(self.run, step)
        if is_tested:
            batch_size = min(1000, max(self.run.config.recipe.batch_size, 100))
            with lost_workers(self.run.strategy):
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
            if self.is_chief and result.top1_error < self.metrics.best_error():
                best = self.workdir / CHECKPOINTS["best"]
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
            last = self.workdir / CHECKPOINTS["last"]
            checkpoints.save(self.run.checkpoint, last, step, self.keep)
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
    loss, top1_errors, top5_errors, images = run.sums.numpy().tolist()
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


class _Metrics:
    """`metrics.csv` and the events of TensorBoard, one row at a time.

    The rows hold nothing but what the configuration decides: a run that was
    stopped and went on writes the same file as one that was not.

    Args:
        workdir: Where they are.
        step: The last step that is done.
        is_due: Whether the row of that step is still to be made.
        writes: Whether this process writes them.
    """

    def __init__(self, workdir, step, is_due, writes):
        self.path = workdir / "metrics.csv"
        self.rows = []
        self.events = None
        if self.path.exists():
            # A row after the checkpoint, whole or not, will be made again.
            for row in csv.DictReader(io.StringIO(self.path.read_text())):
                is_whole = None not in row.values() and None not in row
                if is_whole and int(row["step"]) <= step - is_due:
                    self.rows.append(row)
        if writes:
            text = io.StringIO()
            writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(self.rows)
            checkpoints.replace_file(self.path, text.getvalue())
            self.events = tf.summary.create_file_writer(str(workdir / "events"))

    def best_error(self):
        """The lowest test error of all rows."""
        errors = (row["test_top1_error"] for row in self.rows)
        return min((float(e) for e in errors if e), default=math.inf)

    def add(self, row):
        text = {
            name: value if name == "step" else f"{value:.8g}"
            for name, value in row.items()
        }
        text = {name: text.get(name, "") for name in COLUMNS}
        self.rows.append(text)
        if self.events is None:
            return
        with self.path.open("a", newline="") as file:
            csv.DictWriter(file, COLUMNS, lineterminator="\n").writerow(text)
            file.flush()
            os.fsync(file.fileno())
        with self.events.as_default(step=row["step"]):
            for name, value in row.items():
                tf.summary.scalar(name, value)
        self.events.flush()


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

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def lost_workers(strategy: tf.distribute.Strategy):
    """Turns what TensorFlow says when another worker is gone into one line."""
    try:
        yield
    except (
        tf.errors.UnavailableError,
        tf.errors.AbortedError,
        tf.errors.CancelledError,
        tf.errors.DeadlineExceededError,
        tf.errors.InternalError,
        tf.errors.FailedPreconditionError,
    ) as error:
        if not _has_workers(strategy):
            raise
        raise WorkerLostError(
            "another worker does not answer any more; start all of them again "
            "with the same command, and they go on from the last checkpoint"
        ) from error


def _has_workers(strategy):
    return isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy)


def _nothing(line):
    """Takes the lines that the first worker reports."""


def _prepare(config, dataset, workdir):
    """Makes the work directory; the configuration is the first thing in it."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        for path in checkpoints.remains(workdir):
            path.unlink()
        _write_json(workdir / "config.json", config.to_json())
        _write_json(
            workdir / "dataset.json",
            {
                "image_shape": list(dataset.image_shape),
                "labels": list(dataset.labels),
                "preprocessing": json.loads(dataset.preprocessing.to_json()),
            },
        )
    except OSError as error:
        raise OSError(
            f"the work directory {workdir} cannot be written "
            f"({error.strerror or error}); nothing in it was changed: make it "
            "writable or name another by --workdir"
        ) from error


def _check_workdir(config, workdir):
    """Refuses a directory of another configuration, and says what differs."""
    if not (workdir / "config.json").exists():
        if workdir.is_dir() and (
            set(workdir.iterdir()) - set(checkpoints.remains(workdir))
        ):
            raise WorkdirError(
                f"{workdir} is neither empty nor a work directory (it has no "
                "config.json): choose another"
            )
        return
    # Not a Config: to make one, Keras makes layers, which it numbers, and the
    # bytes of a checkpoint would depend on how often a run was started.
    path = workdir / "config.json"
    old, new = _flat(_read_json(path)), _flat(config.to_json())
    strangers = [
        name
        for name in sorted(old.keys() ^ new.keys())
        if not name.startswith("model_arguments.")
    ]
    if strangers:
        raise _other_version(path, ", ".join(strangers))
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


def _read_config(workdir):
    path = workdir / "config.json"
    fields = _read_json(path)
    try:
        return Config.from_json(fields)
    except (TypeError, KeyError) as error:
        raise _other_version(path, error) from error


def _other_version(path, what):
    return WorkdirError(
        f"{path} was written by another version of keras_resnet, whose work "
        f"directories this one does not read ({what})"
    )


def _read_json(path):
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise WorkdirError(f"{path} cannot be read: {error}") from error


def _write_json(path, value):
    checkpoints.replace_file(path, json.dumps(value, indent=1) + "\n")
