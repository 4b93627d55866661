"""The search for a network and its recipe, by keras-tuner.

A trial is a run of the training loop, and `apps.train` trains the best one
again. Trials are compared on a tenth of the training images, on which none of
them trains, as [1, Sec. 4.2] splits CIFAR-10. The test images are only for the
best network.
"""

import contextlib
import dataclasses
import functools
import io
import json
import math
import os
import re
import time
import typing
from collections.abc import Callable
from collections.abc import Mapping

import keras
import keras_tuner
import tensorflow as tf
from keras_tuner.engine.base_tuner import BaseTuner

from keras_resnet import atomic
from keras_resnet import names
from keras_resnet import networks
from keras_resnet import specs
from keras_resnet.data import datasets
from keras_resnet.training import configs
from keras_resnet.training import interrupts
from keras_resnet.training import loop
from keras_resnet.training import recipe_rules
from keras_resnet.training import recipes
from keras_resnet.training import start_weights
from keras_resnet.training import tuner_processes
from keras_resnet.training import workdirs

ALGORITHMS = ("random", "hyperband", "bayesian")

_OBJECTIVE = "validation_top1_error"
# Hyperband's longest trials are this many times as long as its shortest, in
# rounds that keep a third of the networks (Li et al. 2018, Sec. 3).
_ROUNDS = 9
_FACTOR = 3


@dataclasses.dataclass(frozen=True)
class Space:
    """The choices of a search, and the bounds of two numbers.

    Attributes:
        depth: Depths of networks in `keras_resnet.MODELS`.
        unit: Orders of the unit.
        shortcut: Shortcuts h(x), as `keras_resnet.resnet` accepts them.
        width: Factors of the numbers of filters (`Spec.widened`).
        optimizer: Names in `recipe_rules.COUPLED`.
        learning_rate: Lowest and highest rate. The logarithm is drawn
            uniformly.
        weight_decay: Lowest and highest decay, drawn in the same way.
        augmentation: Names in `augmentation.CROPS`.

    >>> Space().with_field("depth", "20,32").depth
    (20, 32)
    """

    depth: tuple[int, ...] = (20, 32, 44, 56)
    unit: tuple[str, ...] = ("original", "pre_activation")
    shortcut: tuple[str, ...] = ("A", "B", "C")
    width: tuple[float, ...] = (0.5, 1.0, 2.0)
    optimizer: tuple[str, ...] = recipe_rules.COUPLED
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
            spec = specs.get_spec(f"resnet{depth}")
            network = networks.get_network(spec.name)
            for width in self.width:
                spec.widened(width)
            for unit in self.unit:
                for shortcut in self.shortcut:
                    network.arguments({"unit": unit, "shortcut": shortcut})
        for field, values in (
            ("augmentation", self.augmentation),
            ("optimizer", self.optimizer),
        ):
            for value in values:
                recipes.RECIPES["digits"].with_field(field, value)

    def with_field(self, name: str, text: str) -> "Space":
        """Returns the space with one field set from text: `VALUE,VALUE`.

        Raises:
            ValueError: If the field is unknown, or a value has another type.
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
    """Returns the space for images of a height, in pixels.

    >>> default_space(224).depth
    (18, 34, 50)
    """
    if image_size <= 64:
        return Space()
    return Space(
        depth=(18, 34, 50), augmentation=("scale_jitter", "scale_aspect")
    )


def fine_tuning_space(
    model: str, arguments: Mapping[str, typing.Any], has_photos: bool
) -> Space:
    """Returns the space of trials that start from the weights of a network.

    The network is not searched. The rates and decays are those of Kornblith
    et al. 2019, "Do Better ImageNet Models Transfer Better?".

    Args:
        model: Name of the network.
        arguments: Arguments of the network that the weights decide.
        has_photos: Whether the images have several sizes.

    Raises:
        ValueError: If the network is none that a search can name.

    >>> fine_tuning_space("resnet18", {}, has_photos=True).depth
    (18,)
    """
    spec = specs.get_spec(model)
    match = re.fullmatch(r"resnet(\d+)", spec.name)
    if not match:
        raise ValueError(
            "a search from weights must have a network resnet18, resnet20, ..."
            f", received {spec.name}"
        )
    return Space(
        depth=(int(match[1]),),
        unit=(spec.unit,),
        shortcut=(str(arguments.get("shortcut", spec.shortcut)),),
        width=(1.0,),
        learning_rate=(1e-4, 0.1),
        weight_decay=(1e-6, 1e-3),
        augmentation=("scale_jitter", "scale_aspect")
        if has_photos
        else ("pad_crop", "pad_crop_flip"),
    )


class HyperModel(keras_tuner.HyperModel):
    """Builds networks of this package for keras-tuner, with their recipes.

    Args:
        config: Everything that is not searched: the data set, the batch size,
            the number of steps, the dtype, the seed.
        space: The choices of the search.
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
        """Returns the configuration of a trial."""

        def choice(name):
            # A list, because keras-tuner compares the values with its JSON.
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
                augmentation=dataclasses.replace(
                    self.base.recipe.augmentation, name=choice("augmentation")
                ),
            ),
            model_arguments={
                **self.base.model_arguments,
                "unit": choice("unit"),
                "shortcut": choice("shortcut"),
            },
        )

    def build(self, hp: keras_tuner.HyperParameters) -> keras.Model:
        """Returns the network of a trial; it returns logits."""
        return configs.build_model(
            self.config(hp), self.image_shape, self.classes
        )


@dataclasses.dataclass(frozen=True)
class Search:
    """A search: its space, its algorithm and its length.

    Attributes:
        config: The configuration of `HyperModel`, with the full recipe.
        space: The choices of the search.
        algorithm: `"random"`, `"hyperband"` (many short trials, the best third
            of them again three times as long, and so on) or `"bayesian"`
            (a Gaussian process of the earlier trials).
        trials: Largest number of trials.
        steps: Steps of the longest trial; None for those of the recipe.
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
        """Returns the fields as JSON values."""
        fields = {**vars(self), "config": self.config.to_json()}
        fields["space"] = dataclasses.asdict(self.space)
        return json.loads(json.dumps(fields))

    def load(self) -> datasets.DataSet:
        """Returns the data set of the trials; its test images validate."""
        return start_weights.load_dataset(self.config).with_validation()

    def oracle(self) -> keras_tuner.Oracle:
        """Returns keras-tuner's algorithm, which chooses the next trial."""
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
    """One trial of a search.

    Attributes:
        name: Name of its work directory in `trials/`.
        config: Its configuration, with the full recipe.
        steps: Number of steps of the trial.
        validation_error: In percent of the validation images; None if the
            trial is not finished.
    """

    name: str
    config: configs.Config
    steps: int
    validation_error: float | None

    def values(self) -> dict[str, typing.Any]:
        """Returns the choices of the trial by name."""
        config, recipe = self.config, self.config.recipe
        return {
            "model": config.model,
            **networks.texts(config.model_arguments),
            "optimizer": recipe.optimizer,
            "learning_rate": recipe.learning_rate,
            "weight_decay": recipe.weight_decay,
            "augmentation": recipe.augmentation.name,
            "steps": self.steps,
        }


def tune(
    search: Search,
    directory: str | os.PathLike,
    workers: int = 1,
    report: Callable[[str], None] = print,
) -> list[Trial]:
    """Runs a search, or resumes an earlier call.

    Args:
        search: The search.
        directory: Gets `search.json`, the files of keras-tuner in `tuner/`, and
            a work directory of each trial in `trials/`, with the choices for
            TensorBoard's HParams. With several processes, each has a log.
        workers: Number of processes that train at the same time, on this
            machine. With more than one, keras-tuner's chief distributes the
            trials.
        report: Receives progress lines.

    Returns:
        The trials, from the best to the worst.

    Raises:
        WorkdirError: If the directory belongs to another search, or another
            process uses it.
        ChildProcessError: If a worker failed.
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
            tuner_processes.run(
                functools.partial(_search, search, directory),
                directory,
                workers,
                report,
            )
        tuner = _Tuner(search, directory, report)  # reads their results
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
        "weights": config.weights,
    }
    if config.recipe.steps != recipe.steps:
        flags["steps"] = config.recipe.steps
        recipe = recipe.with_steps(config.recipe.steps)
    words = [f"--{name}={v}" for name, v in flags.items() if v is not None]
    words += [
        f"--set=model.{name}={value}"
        for name, value in networks.texts(config.model_arguments).items()
    ]
    before = recipe.fields()
    for name, value in config.recipe.fields().items():
        if name in ("name", "source"):
            continue  # of a recipe that was planned for the size of the data
        if value != before[name]:
            text = (
                json.dumps(value) if isinstance(value, tuple | dict) else value
            )
            words.append(f"--set=recipe.{name}={text}")
    names = ("dtype", "seed", "deterministic", "exif", "skip_unreadable")
    for name in (*names, "freeze"):
        value = getattr(config, name)
        if value != configs.Config.__dataclass_fields__[name].default:
            words.append(f"--{name}={str(value).lower()}")
    return [*words, f"--workdir={os.fspath(workdir)}"]


class _Tuner(BaseTuner):
    """A tuner of keras-tuner whose trials are runs of the training loop."""

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
        # keras-tuner would build networks to find the space.
        hp = self.oracle.get_space()
        self.hypermodel.config(hp)
        self.oracle.update_space(hp)

    # keras-tuner stores a state for each process by its name, so a search could
    # not resume with another number of them. The oracle has all that is needed.

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
        # A process that waits for the trials of others asks without a pause.
        time.sleep(0.1)

    def trial(self, trial):
        """Returns the `Trial` of a trial of keras-tuner."""
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
        # The method of keras-tuner would catch our errors and continue.
        self._run_and_update_trial(trial, *arguments, **options)
        trial.status = "COMPLETED"


def _write_hparams(trial, error, workdir):
    """Writes the choices and the error for TensorBoard's HParams."""
    from tensorboard.plugins.hparams import api

    with tf.summary.create_file_writer(str(workdir)).as_default(step=0):
        api.hparams(trial.values(), trial_id=trial.name)
        tf.summary.scalar(_OBJECTIVE, error)


def _check_directory(search, directory):
    path = directory / "search.json"
    fields = search.to_json()
    if os.path.lexists(path):
        old = workdirs.read_json(path)
        # A search with more trials resumes.
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
            f"{directory} must be empty or of a search, received one without "
            "search.json: choose another directory"
        )


def _search(search, directory, report):
    """Runs a search in one of several processes; a signal stops it."""
    with contextlib.suppress(interrupts.Interrupted, KeyboardInterrupt):
        _Tuner(search, directory, report).search()
