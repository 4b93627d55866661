"""The search for a network and its recipe, by keras-tuner.

A trial is a run of the training loop, so what wins is trained again by
`apps.train`. The networks are compared on a tenth of the training images that
no trial trains on, as [1, Sec. 4.2] splits CIFAR-10; the test images are for
the one that wins.
"""

import contextlib
import dataclasses
import io
import json
import math
import multiprocessing
import os
import re
import signal
import socket
import sys
import threading
import time
import typing
from collections.abc import Callable
from multiprocessing import connection

import keras
import keras_tuner
import tensorflow as tf
from keras_tuner.engine.base_tuner import BaseTuner

from keras_resnet import atomic
from keras_resnet import models
from keras_resnet import names
from keras_resnet.data import datasets
from keras_resnet.training import configs
from keras_resnet.training import loop
from keras_resnet.training import recipes
from keras_resnet.training import workdirs

ALGORITHMS = ("random", "hyperband", "bayesian")

_OBJECTIVE = "validation_top1_error"
# Hyperband's longest trials are this many times as long as its shortest, in
# rounds that keep a third of the networks (Li et al. 2018, Sec. 3).
_ROUNDS = 9
_FACTOR = 3


@dataclasses.dataclass(frozen=True)
class Space:
    """What is searched: choices, and (lowest, highest) of two numbers.

    Attributes:
        depth: Of the networks in `keras_resnet.MODELS`.
        unit: Orders of the unit.
        shortcut: Shortcuts h(x), as `keras_resnet.resnet` takes them.
        width: Factors of the numbers of filters (`Spec.widened`).
        optimizer: Of `recipes.OPTIMIZERS`.
        learning_rate: Lowest and highest rate; drawn evenly in its logarithm.
        weight_decay: Likewise.
        augmentation: Of `augmentation.AUGMENTATIONS`.

    >>> Space().with_field("depth", "20,32").depth
    (20, 32)
    """

    depth: tuple[int, ...] = (20, 32, 44, 56)
    unit: tuple[str, ...] = ("original", "pre_activation")
    shortcut: tuple[str, ...] = ("A", "B", "C")
    width: tuple[float, ...] = (0.5, 1.0, 2.0)
    optimizer: tuple[str, ...] = recipes.OPTIMIZERS
    learning_rate: tuple[float, ...] = (0.001, 0.3)
    weight_decay: tuple[float, ...] = (1e-5, 1e-3)
    augmentation: tuple[str, ...] = ("none", "pad_crop", "pad_crop_flip")

    def __post_init__(self):
        for name, values in dataclasses.asdict(self).items():
            is_range = name in ("learning_rate", "weight_decay")
            if not values or (is_range and not _is_range(values)):
                raise ValueError(
                    f"{name} must be "
                    + ("its lowest and highest" if is_range else "choices")
                    + f", received {values}"
                )
        for depth in self.depth:
            spec = models.get_spec(f"resnet{depth}")
            for width in self.width:
                spec.widened(width)
            for unit in self.unit:
                for shortcut in self.shortcut:
                    arguments = {"unit": unit, "shortcut": shortcut}
                    configs.check_model_arguments(spec, arguments)
        for field, values in (
            ("augmentation", self.augmentation),
            ("optimizer", self.optimizer),
        ):
            for value in values:
                recipes.RECIPES["digits"].with_field(field, value)

    def with_field(self, name: str, text: str) -> "Space":
        """The space with one field set from text: values and commas.

        Raises:
            ValueError: If there is no such field or a value is not of its
                type.
        """
        kinds = typing.get_type_hints(type(self))
        if name not in kinds:
            raise ValueError(names.unknown("field of the space", name, kinds))
        kind, _ = typing.get_args(kinds[name])
        # Not the commas between the arguments of a shortcut.
        values = tuple(map(kind, re.split(r",(?![^(]*\))", text)))
        return dataclasses.replace(self, **{name: values})


def _is_range(values):
    return len(values) == 2 and 0 < values[0] <= values[1]


def default_space(image_size: int) -> Space:
    """The space for images of a height, in pixels.

    >>> default_space(224).depth
    (18, 34, 50)
    """
    if image_size <= 64:
        return Space()
    return Space(
        depth=(18, 34, 50), augmentation=("scale_jitter", "scale_aspect")
    )


class HyperModel(keras_tuner.HyperModel):
    """Networks of this package, and how they are trained, by keras-tuner.

    Args:
        config: What is not searched: the data set, the batch size, the number
            of steps, the dtype, the seed.
        space: What is.
        image_shape: Height, width and channels of an image.
        classes: Number of classes.

    >>> config = configs.Config("resnet20", "digits", recipes.RECIPES["digits"])
    >>> hypermodel = HyperModel(config, Space(width=(0.5,)), (8, 8, 1), 10)
    >>> hypermodel.build(keras_tuner.HyperParameters()).name
    'resnet20x0.5'
    """

    def __init__(
        self,
        config: configs.Config,
        space: Space,
        image_shape: tuple[int, int, int],
        classes: int,
    ):
        super().__init__()
        self.base = config
        self.space = space
        self.image_shape = image_shape
        self.classes = classes

    def config(self, hp: keras_tuner.HyperParameters) -> configs.Config:
        """What a trial trains."""

        def choice(name):
            # keras-tuner compares what it wrote with what it reads.
            return hp.Choice(name, list(getattr(self.space, name)))

        def number(name):
            low, high = getattr(self.space, name)
            value = hp.Float(name, low, high, sampling="log")
            return float(f"{value:.3g}")  # as it is printed

        width = choice("width")
        model = f"resnet{choice('depth')}" + f"x{width:g}" * (width != 1)
        return dataclasses.replace(
            self.base,
            model=model,
            recipe=dataclasses.replace(
                self.base.recipe,
                optimizer=choice("optimizer"),
                learning_rate=number("learning_rate"),
                weight_decay=number("weight_decay"),
                augmentation=choice("augmentation"),
            ),
            model_arguments={
                **self.base.model_arguments,
                "unit": choice("unit"),
                "shortcut": choice("shortcut"),
            },
        )

    def build(self, hp: keras_tuner.HyperParameters) -> keras.Model:
        """The network of a trial; it gives logits."""
        return configs.build_model(
            self.config(hp), self.image_shape, self.classes
        )


@dataclasses.dataclass(frozen=True)
class Search:
    """What is searched, on what, how and for how long.

    Attributes:
        config: As in `HyperModel`; its recipe is at its full length.
        space: As in `HyperModel`.
        algorithm: `"random"`, `"hyperband"` (many short trials, the best third
            of them again three times as long, and so on) or `"bayesian"`
            (a Gaussian process of the trials before).
        trials: How many trials there are at most.
        steps: Of the longest trial; None for those of the recipe.
    """

    config: configs.Config
    space: Space
    algorithm: str = "random"
    trials: int = 20
    steps: int | None = None

    def __post_init__(self):
        if self.algorithm not in ALGORITHMS:
            raise ValueError(
                f"algorithm must be one of {ALGORITHMS}, received "
                f"{self.algorithm!r}"
            )
        if self.trials < 1:
            raise ValueError(
                f"trials must be at least 1, received {self.trials}"
            )

    def to_json(self) -> dict:
        """The fields as JSON has them."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    def load(self) -> datasets.DataSet:
        """The images of the trials: training, and validation as its test."""
        config = self.config
        return datasets.load(
            config.dataset,
            config.data_dir,
            image_size=config.recipe.image_size,
        ).with_validation()

    def oracle(self) -> keras_tuner.Oracle:
        """keras-tuner's algorithm, which names the next trial."""
        arguments = {
            "objective": keras_tuner.Objective(_OBJECTIVE, "min"),
            # 0 would be a random one.
            "seed": self.config.seed + 1,
        }
        if self.algorithm == "hyperband":
            oracle = keras_tuner.oracles.HyperbandOracle(
                max_epochs=_ROUNDS, factor=_FACTOR, **arguments
            )
            oracle.max_trials = self.trials
        elif self.algorithm == "bayesian":
            oracle = keras_tuner.oracles.BayesianOptimizationOracle(
                max_trials=self.trials, **arguments
            )
        else:
            oracle = keras_tuner.oracles.RandomSearchOracle(
                max_trials=self.trials, **arguments
            )
        oracle.verbose = 0
        return oracle


@dataclasses.dataclass(frozen=True)
class Trial:
    """One network that was tried.

    Attributes:
        name: Of its work directory, in `trials/`.
        config: What was trained, with the recipe at its full length.
        steps: For how many steps.
        validation_error: In percent of the validation images; None where the
            trial is not finished.
    """

    name: str
    config: configs.Config
    steps: int
    validation_error: float | None

    def values(self) -> dict[str, typing.Any]:
        """What was searched, by name."""
        config, recipe = self.config, self.config.recipe
        return {
            "model": config.model,
            **config.model_arguments,
            "optimizer": recipe.optimizer,
            "learning_rate": recipe.learning_rate,
            "weight_decay": recipe.weight_decay,
            "augmentation": recipe.augmentation,
            "steps": self.steps,
        }


def tune(
    search: Search,
    directory: str | os.PathLike,
    workers: int = 1,
    report: Callable[[str], None] = print,
) -> list[Trial]:
    """Runs a search; goes on where an earlier call stopped.

    Args:
        search: What is searched.
        directory: Gets `search.json`, keras-tuner's own files in `tuner/` and
            the work directory of each trial in `trials/`, with the values for
            TensorBoard's HParams; of several processes a log each.
        workers: How many processes train at a time. With more than one,
            keras-tuner's chief gives them their trials, on this machine.
        report: Is given lines for a person to read.

    Returns:
        The trials, from the best to the worst.

    Raises:
        WorkdirError: If the directory belongs to another search, or another
            process uses it.
        ChildProcessError: If a worker ended before its time.
    """
    directory = workdirs.local(directory)
    if workers < 1:
        raise ValueError(f"workers must be at least 1, received {workers}")
    _check_directory(search, directory)
    with workdirs.Lock(directory, report):
        _check_directory(search, directory)  # another process had the lock
        atomic.write(
            directory / "search.json",
            json.dumps(search.to_json(), indent=1) + "\n",
        )
        if workers > 1:
            _in_processes(search, directory, workers, report)
        tuner = _Tuner(search, directory, report)  # which reads what they left
        if workers == 1:
            tuner.search()
    return sorted(
        map(tuner.trial, tuner.oracle.trials.values()),
        key=lambda trial: (
            math.inf
            if trial.validation_error is None
            else trial.validation_error
        ),
    )


def train_flags(
    config: configs.Config, workdir: str | os.PathLike
) -> list[str]:
    """Returns the flags with which the train program trains a configuration.

    >>> recipe = recipes.RECIPES["digits"].with_field("optimizer", "adam")
    >>> config = configs.Config("resnet20", "digits", recipe)
    >>> train_flags(config, "best")[2:]
    ['--recipe=digits', '--set=recipe.optimizer=adam', '--workdir=best']
    """
    recipe = recipes.get_recipe(config.recipe.name)
    flags: dict[str, typing.Any] = {
        "model": config.model,
        "dataset": config.dataset,
        "data_dir": config.data_dir,
        "recipe": recipe.name,
    }
    if config.recipe.steps != recipe.steps:
        flags["steps"] = config.recipe.steps
        recipe = recipe.with_steps(config.recipe.steps)
    words = [f"--{name}={v}" for name, v in flags.items() if v is not None]
    words += [
        f"--set=model.{name}={value}"
        for name, value in config.model_arguments.items()
    ]
    for field in dataclasses.fields(recipe):
        value = getattr(config.recipe, field.name)
        if value != getattr(recipe, field.name):
            text = (
                json.dumps(value) if isinstance(value, tuple | dict) else value
            )
            words.append(f"--set=recipe.{field.name}={text}")
    for name in ("dtype", "seed", "deterministic"):
        value = getattr(config, name)
        if value != configs.Config.__dataclass_fields__[name].default:
            words.append(f"--{name}={str(value).lower()}")
    return [*words, f"--workdir={os.fspath(workdir)}"]


class _Tuner(BaseTuner):
    """keras-tuner's tuner, whose trials are runs of the training loop."""

    def __init__(self, search, directory, report):
        self.search_config = search
        self.trials = directory / "trials"
        self.report = report
        self.dataset = search.load()
        with contextlib.redirect_stdout(io.StringIO()):  # "Reloading ..."
            super().__init__(
                search.oracle(),
                HyperModel(
                    search.config,
                    search.space,
                    self.dataset.image_shape,
                    self.dataset.classes,
                ),
                directory=str(directory),
                project_name="tuner",
            )

    def _populate_initial_space(self):
        # What keras-tuner would do by building networks.
        hp = self.oracle.get_space()
        self.hypermodel.config(hp)
        self.oracle.update_space(hp)

    # keras-tuner keeps the state of each process by its name, so a search would
    # not go on with another number of them. What counts is the oracle's.

    def _get_tuner_fname(self):
        return os.path.join(self.project_dir, "oracle.json")

    def save(self):
        if not self._is_worker():
            self.oracle.save()

    def reload(self):
        if self._is_worker():
            return
        try:
            self.oracle.reload()
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise workdirs.WorkdirError(
                f"{self.project_dir} was changed by hand or written by another "
                f"version of keras-tuner ({error!r}): choose another directory"
            ) from error

    def pre_create_trial(self):
        # Where the next one depends on others, it is asked for all the time.
        time.sleep(0.1)

    def trial(self, trial):
        """A `Trial` of one of keras-tuner's."""
        config = self.hypermodel.config(trial.hyperparameters)
        steps = self.search_config.steps or config.recipe.steps
        rounds = trial.hyperparameters.values.get("tuner/epochs", _ROUNDS)
        is_whole = trial.status == "COMPLETED"
        return Trial(
            trial.trial_id,
            config,
            math.ceil(steps * rounds / _ROUNDS),
            trial.score if is_whole else None,
        )

    def run_trial(self, trial):
        trial = self.trial(trial)
        workdir = self.trials / trial.name
        recipe = trial.config.recipe.with_steps(trial.steps)
        try:
            result = loop.train_and_evaluate(
                dataclasses.replace(trial.config, recipe=recipe),
                workdir,
                report=lambda line: None,
                keep=1,
                dataset=self.dataset,
            )
            error = result["test_top1_error"]
        except loop.TrainingDivergedError:
            error = 100.0
        _write_hparams(trial, error, workdir)
        values = " ".join(f"{n}={v}" for n, v in trial.values().items())
        self.report(f"trial {trial.name}: error {error:.2f}%, {values}")
        return {_OBJECTIVE: error}

    def _try_run_and_update_trial(self, trial, *arguments, **options):
        # keras-tuner's would note a mistake of ours and go on.
        self._run_and_update_trial(trial, *arguments, **options)
        trial.status = "COMPLETED"


def _write_hparams(trial, error, workdir):
    """What was searched and what came of it, for TensorBoard's HParams."""
    from tensorboard.plugins.hparams import api

    with tf.summary.create_file_writer(str(workdir)).as_default(step=0):
        api.hparams(trial.values(), trial_id=trial.name)
        tf.summary.scalar(_OBJECTIVE, error)


def _check_directory(search, directory):
    path = directory / "search.json"
    fields = search.to_json()
    if os.path.lexists(path):
        old = workdirs.read_json(path)
        # More trials go on from those there are.
        for one in (old, fields):
            one.pop("trials", None)
        if old != fields:
            differing = [
                name
                for name in sorted(old.keys() | fields.keys())
                if old.get(name) != fields.get(name)
            ]
            raise workdirs.WorkdirError(
                f"{directory} belongs to a search with another "
                f"{' and '.join(differing)}: choose another directory or the "
                "old search"
            )
    elif not workdirs.is_empty(directory):
        raise workdirs.WorkdirError(
            f"{directory} is neither empty nor of a search (it has no "
            "search.json): choose another"
        )


# --- Several processes -------------------------------------------------------


def _in_processes(search, directory, workers, report):
    """keras-tuner's chief and its workers, each a process of this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    lines = context.SimpleQueue()
    listener = threading.Thread(
        target=lambda: [report(line) for line in iter(lines.get, None)]
    )
    listener.start()
    running = {}
    try:
        for name in ("chief", *(f"worker{i}" for i in range(workers))):
            log = directory / f"{name}.log"
            process = context.Process(
                target=_run_process, args=(search, directory, name, port, lines)
            )
            with _stderr_in(log):
                process.start()
            running[name] = process
        # The chief ends when every worker that it has met is done.
        while running.keys() - {"chief"} and "chief" in running:
            connection.wait([process.sentinel for process in running.values()])
            for name in [n for n, p in running.items() if not p.is_alive()]:
                code = running.pop(name).exitcode
                if code:
                    raise ChildProcessError(
                        f"the {name} ended with exit code {code}, see "
                        f"{directory / name}.log; the same search goes on from "
                        "there"
                    )
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.join()
        lines.put(None)
        listener.join()


@contextlib.contextmanager
def _stderr_in(path):
    """Gives processes that are started a file for their stderr.

    TensorFlow reports there how it was built, once a process.
    """
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with path.open("a") as file:
            os.dup2(file.fileno(), 2)
            yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _run_process(search, directory, name, port, lines):
    os.environ.update(
        KERASTUNER_TUNER_ID=name,
        KERASTUNER_ORACLE_IP="127.0.0.1",
        KERASTUNER_ORACLE_PORT=str(port),
        TQDM_DISABLE="1",  # the bars of several runs in one terminal
    )
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with contextlib.suppress(loop.Interrupted, KeyboardInterrupt):
        _Tuner(search, directory, lines.put).search()


def _end_with_parent():
    """Asks this process to save and end when the one that started it has."""
    multiprocessing.parent_process().join()
    os.kill(os.getpid(), signal.SIGTERM)
