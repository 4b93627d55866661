"""Trains a network, evaluates it and leaves what the other programs need.

    python -m apps.train
    python -m apps.train --model=resnet56 --dataset=cifar10
    python -m apps.train --experiment=plainnet56  # a row of the papers' tables

Run the same command again to resume. Set KERAS_BACKEND=jax to train on an
accelerator that TensorFlow does not support, with small images of one size.
"""

import dataclasses
import json
import os
import time

from absl import flags

from . import command_line

_MODEL = flags.DEFINE_string("model", "resnet20", "Name of the network.")
_EXPERIMENT = flags.DEFINE_string(
    "experiment",
    None,
    "A row of the papers' tables (keras_resnet.papers.experiments). It sets "
    "--model, --dataset and --recipe.",
)
_DATASET = flags.DEFINE_string(
    "dataset",
    "digits",
    "digits, a TFDS image classification set (cifar10, imagenet2012, ...), "
    "folder:PATH (one folder a class) or synthetic.",
)
_DATA_DIR = flags.DEFINE_string(
    "data_dir", None, "Directory of the data sets of TFDS."
)
_DATA_SERVICE = flags.DEFINE_string(
    "data_service",
    None,
    "HOST:PORT of the dispatcher of a tf.data service, whose workers decode "
    "and augment the training images. The batches are the same as without it.",
)
_WORKDIR = flags.DEFINE_string(
    "workdir",
    None,
    "Directory of the run. Default: runs/MODEL_DATASET, with _from_WEIGHTS "
    "if there are any, or runs/EXPERIMENT_SEED.",
)
_SKIP_UNREADABLE = flags.DEFINE_bool(
    "skip_unreadable",
    False,
    "With folder:PATH: leave out files that do not decode and empty classes.",
)
_EXIF = flags.DEFINE_bool(
    "exif",
    True,
    "With folder:PATH: turn photos as their EXIF orientation says.",
)
_WEIGHTS = flags.DEFINE_string(
    "weights",
    None,
    "Weights to start from: a name such as cifar10 or imagenet, a file, or a "
    "work directory. The classifier is replaced if the classes differ.",
)
_FREEZE = flags.DEFINE_string(
    "freeze",
    "none",
    "With --weights: all (but the classifier), none, or the layers that are "
    "not trained, such as stem,stage1.",
)
_RECIPE = flags.DEFINE_string(
    "recipe",
    None,
    "Name of the recipe. Default: by data set and network; of a folder and "
    "with --weights, by the number of images.",
)
_STEPS = flags.DEFINE_integer(
    "steps",
    None,
    "Total number of steps. The recipe keeps its shape.",
    lower_bound=1,
)
_MINUTES = flags.DEFINE_float(
    "minutes",
    None,
    "Minutes that a new run may take. The program measures the speed of the "
    "first steps, and sets the number of steps. A run that is resumed keeps "
    "its number.",
    lower_bound=0,
    upper_bound=1e6,
)
_LIST_RECIPES = flags.DEFINE_bool(
    "list_recipes", False, "Print the recipes with errors and costs, and end."
)
_PROFILE_STEPS = flags.DEFINE_list(
    "profile_steps",
    [],
    "A,B: let TensorFlow's profiler observe the steps after A up to B.",
)
_EPOCHS = flags.DEFINE_float(
    "epochs",
    None,
    "Total number of passes over the images, instead of --steps.",
    lower_bound=1e-3,
)
_BATCH_SIZE = flags.DEFINE_integer(
    "batch_size", None, "Number of images in a batch of all devices."
)
_LINEAR_SCALING = flags.DEFINE_bool(
    "linear_scaling",
    False,
    "With --batch_size: scale the learning rate with the batch, keep the "
    "number of epochs, and warm up over the first of them.",
)
_STRATEGY = flags.DEFINE_string(
    "strategy",
    "auto",
    "one_device, mirrored (all devices of this machine), multi_worker (the "
    "machines of TF_CONFIG), tpu, or auto (by the devices that are found).",
)
_NUM_DEVICES = flags.DEFINE_integer(
    "num_devices",
    None,
    "Number of devices of this machine. Without accelerators the processor "
    "is divided.",
)
_CONNECT_TIMEOUT = flags.DEFINE_float(
    "connect_timeout",
    300.0,
    "Longest time that a worker waits for the others at the start, in seconds.",
    lower_bound=0,
)
_SYNC_BATCH_NORM = flags.DEFINE_bool(
    "sync_batch_norm",
    False,
    "Normalize by the batch of all devices instead of the share of each.",
)
_DTYPE = flags.DEFINE_string(
    "dtype",
    "float32",
    "float32, mixed_bfloat16, mixed_float16, or float64 for exact comparisons.",
)
_SEED = flags.DEFINE_integer(
    "seed",
    0,
    "Seed of weights and batches.",
    lower_bound=0,
    upper_bound=2**32 - 1,
)
_DETERMINISTIC = flags.DEFINE_bool(
    "deterministic", False, "Make equal runs equal to the bit."
)
_LOG_EVERY = flags.DEFINE_integer(
    "log_every", 100, "Steps between two rows of metrics.csv.", lower_bound=1
)
_EVAL_EVERY = flags.DEFINE_integer(
    "eval_every", None, "Steps between two evaluations.", lower_bound=1
)
_CHECKPOINT_SECONDS = flags.DEFINE_float(
    "checkpoint_seconds",
    None,
    "Seconds between two checkpoints. A killed run loses at most this time. "
    "Default: 50 times the duration of a save, at least 10 and at most 1,800.",
    lower_bound=0,
)
_SET = flags.DEFINE_multi_string(
    "set",
    [],
    "recipe.FIELD=VALUE or model.ARGUMENT=VALUE, such as "
    "recipe.learning_rate=0.05 or model.shortcut=C. Can be repeated.",
)


def _row():
    """Returns the row of --experiment, or None."""
    from keras_resnet.papers import experiments

    if not _EXPERIMENT.value:
        return None
    for flag in (_MODEL, _DATASET, _RECIPE):
        if flag.present:
            raise command_line.UsageError(
                "experiment",
                _EXPERIMENT.value,
                f"it sets --{flag.name} itself: leave that out",
            )
    with command_line.usage("experiment", _EXPERIMENT.value):
        return experiments.get_experiment(_EXPERIMENT.value)


def _config(row):
    """Returns the configuration that the flags describe, and its data set."""
    from keras_resnet import networks
    from keras_resnet.data import datasets
    from keras_resnet.training import configs
    from keras_resnet.training import start_weights
    from keras_resnet.training import summaries

    model = row.model if row else _MODEL.value
    dataset_name = row.dataset if row else _DATASET.value
    with command_line.usage("model", model):
        network = networks.get_network(model)
    with command_line.usage("recipe", row.recipe if row else _RECIPE.value):
        recipe = _named_recipe(row)
    if dataset_name.startswith("folder:"):
        path = dataset_name.partition(":")[2]
        command_line.show(f"checking the files in {path}")
    with command_line.usage("dataset", dataset_name):
        dataset = datasets.load(
            dataset_name,
            _DATA_DIR.value,
            skip_unreadable=_SKIP_UNREADABLE.value,
            exif=_EXIF.value,
        )
    if dataset.name.startswith("folder:"):
        command_line.show(dataset.summary, *summaries.imbalance(dataset))
    given = command_line.settings(_SET.value, "recipe", "model")
    arguments = command_line.model_arguments(
        network, given["model"], row.arguments if row else {}
    )
    start = _start_weights(network, arguments, dataset)
    if start is not None:
        merged = {**start.arguments, **arguments}
        if str(merged.get("shortcut")) == "A":  # the weights know its zeros
            merged.update(
                {k: v for k, v in start.arguments.items() if k == "shortcut"}
            )
        arguments = network.arguments(merged)
    is_planned = recipe is None
    if recipe is None:
        recipe = _planned_recipe(network, dataset, start)
    recipe = _with_length(recipe, dataset, is_planned)
    recipe = command_line.with_fields(recipe, "recipe", given["recipe"])
    with command_line.usage("set", f"recipe.image_size={recipe.image_size}"):
        dataset = start_weights.with_views(dataset, recipe, start)
    with command_line.usage("dtype", _DTYPE.value):
        config = configs.Config(
            network.name,
            dataset_name,
            recipe,
            arguments,
            _DTYPE.value,
            _SEED.value,
            _DETERMINISTIC.value,
            _DATA_DIR.value,
            exif=_EXIF.value,
            skip_unreadable=_SKIP_UNREADABLE.value,
            weights=_WEIGHTS.value,
            weights_sha256=start and start.sha256,
            freeze=_FREEZE.value,
        )
    with command_line.usage("sync_batch_norm", _SYNC_BATCH_NORM.value):
        config = dataclasses.replace(
            config, sync_batch_norm=_SYNC_BATCH_NORM.value
        )
    if config.freeze not in ("none", "all"):
        with command_line.usage("freeze", config.freeze):
            configs.build_model(config, dataset.image_shape, dataset.classes)
    if row and row.is_trained_by(config):
        config = dataclasses.replace(config, experiment=row.name)
    return config, dataset


def _named_recipe(row):
    """Returns the recipe that a flag names, or None."""
    from keras_resnet.training import recipes

    name = row.recipe if row else _RECIPE.value
    return recipes.get_recipe(name) if name else None


def _start_weights(network, arguments, dataset):
    """Returns the start weights of --weights, or None.

    A run that resumes has them in its checkpoint: its `config.json` has their
    hash, and its `dataset.json` their preprocessing.
    """
    from keras_resnet.training import start_weights

    if not _WEIGHTS.value:
        if _FREEZE.value != "none":
            raise command_line.UsageError(
                "freeze", _FREEZE.value, "it needs --weights: give that too"
            )
        return None
    with command_line.usage("weights", _WEIGHTS.value):
        recorded = start_weights.recorded(_workdir(None), _WEIGHTS.value)
        return recorded or start_weights.read(
            _WEIGHTS.value,
            network,
            arguments,
            dataset.preprocessing.channels,
        )


def _planned_recipe(network, dataset, start):
    """Returns the recipe of a data set for which no flag names one."""
    from keras_resnet.training import plans
    from keras_resnet.training import recipes

    if start is None and not dataset.name.startswith("folder:"):
        height = dataset.image_shape[0]
        return recipes.default_recipe(dataset.name, height, network)
    prepared = None if start is None else start.preprocessing
    plan = plans.plan(
        dataset.train_size,
        prepared.image_size if prepared else dataset.image_shape[0],
        network,
        dataset.has_photos,
        plans.mode(start is not None, _FREEZE.value),
        keeps_size=prepared is not None,
    )
    command_line.show(plan.reason)
    return plan.recipe


def _with_length(recipe, dataset, is_planned):
    """Returns the recipe with the batch and the length of the flags."""
    from keras_resnet.training import plans

    if _BATCH_SIZE.value is not None:
        with command_line.usage("batch_size", _BATCH_SIZE.value):
            changed = dataclasses.replace(recipe, batch_size=_BATCH_SIZE.value)
            if _LINEAR_SCALING.value or (is_planned and _is_by_size(recipe)):
                changed = recipe.scaled_to(_BATCH_SIZE.value)
            recipe = changed
    elif _LINEAR_SCALING.value:
        raise command_line.UsageError(
            "linear_scaling", True, "it scales with --batch_size: give that too"
        )
    if _STEPS.value and _EPOCHS.value:
        raise command_line.UsageError(
            "epochs", _EPOCHS.value, "cannot be combined with --steps"
        )
    if _EPOCHS.value:
        return recipe.with_steps(
            plans.steps_of(_EPOCHS.value, dataset.train_size, recipe.batch_size)
        )
    return recipe.with_steps(_STEPS.value) if _STEPS.value else recipe


def _is_by_size(recipe):
    return recipe.name in ("folder", "fine_tune")


def _workdir(row):
    """Returns the directory of the run."""
    if _WORKDIR.value:
        return _WORKDIR.value
    if row:
        return f"runs/{row.name}_{_SEED.value}"
    name = command_line.short_name(_DATASET.value)
    workdir = f"runs/{_MODEL.value.lower()}_{name}"
    if _WEIGHTS.value:
        workdir += f"_from_{command_line.short_name(_WEIGHTS.value)}"
    return workdir


def _with_fitting_batch(config, dataset, workdir):
    """Returns the configuration with a batch that should fit in memory.

    A batch that a flag sets is kept: the loop rejects it if it cannot fit.
    """
    from keras_resnet.training import memory

    is_planned = _is_by_size(config.recipe) or dataset.has_photos
    if _sets_batch() or not is_planned:
        return config
    return memory.with_fitting_batch(
        config, dataset, workdir, command_line.show
    )


def _sets_batch():
    return _BATCH_SIZE.value is not None or any(
        value.startswith("recipe.batch_size=") for value in _SET.value
    )


def _leave_to_jax():
    """Leaves the accelerator to JAX; rejects flags that JAX does not use."""
    import jax
    import tensorflow as tf

    for flag in (_STRATEGY, _NUM_DEVICES, _CONNECT_TIMEOUT):
        if flag.present:
            raise command_line.UsageError(
                flag.name,
                command_line.text(flag),
                "on JAX one device trains: leave it out, or set "
                "KERAS_BACKEND=tensorflow",
            )
    tf.config.set_visible_devices([], "GPU")
    command_line.show(f"JAX trains on {jax.devices()[0].device_kind}")


def _check_config_on_jax(config, dataset):
    from keras_resnet.training import jax_trainer

    try:
        jax_trainer.check(config, dataset)
    except jax_trainer.UnsupportedError as error:
        flag, value = error.name, error.received
        if flag.startswith("recipe."):
            flag, value = "set", f"{flag}={value}"
        raise command_line.UsageError(flag, value, error) from error


def _check_batch(recipe, images):
    """Rejects a flag with a batch larger than the data set.

    For a recipe with such a batch, prints the largest batch without repeats.
    """
    if recipe.batch_size <= images:
        return
    rule = f"must be at most {images}, the number of training images"
    if _sets_batch():
        raise _usage_error(recipe, "batch_size", rule)
    command_line.show(
        f"the recipe's batch of {recipe.batch_size} has some of the {images} "
        f"training images several times: --batch_size={images} is the largest "
        "that has each once"
    )


def _usage_error(recipe, field, reason):
    """Returns an error about the flag that sets a field of the recipe."""
    value = getattr(recipe, field)
    if field == "batch_size" and _BATCH_SIZE.value is not None:
        return command_line.UsageError(field, value, reason)
    return command_line.UsageError("set", f"recipe.{field}={value}", reason)


def _profile_steps():
    """Returns the two numbers of --profile_steps, or None."""
    steps = command_line.numbers(_PROFILE_STEPS, int)
    if not steps:
        return None
    if len(steps) != 2 or not 0 <= steps[0] < steps[1]:
        raise command_line.UsageError(
            "profile_steps",
            command_line.text(_PROFILE_STEPS),
            "must be two steps A,B with 0 <= A < B",
        )
    return tuple(steps)


def _minutes_left(start):
    """Returns the rest of --minutes, or None."""
    if _MINUTES.value is None:
        return None
    for flag in (_STEPS, _EPOCHS):
        if flag.value is not None:
            raise command_line.UsageError(
                "minutes",
                _MINUTES.value,
                f"cannot be combined with --{flag.name}",
            )
    return max(_MINUTES.value - (time.monotonic() - start) / 60, 0.0)


def _show_result(config, workdir, result):
    """Prints the table of a run, the commands that follow, and JSON."""
    from keras_resnet.training import summaries

    command_line.show(*summaries.table(result))
    command_line.show(
        f"test error {result['test_top1_error']:.2f}%, "
        f"of {result['test_images']:,} images"
    )
    on = "KERAS_BACKEND=tensorflow " if config.backend == "jax" else ""
    where = f"--workdir={workdir}"
    per_class = ["--per_class"] if config.dataset.startswith("folder:") else []
    name = os.path.basename(os.path.abspath(workdir))
    export_dir = f"--export_dir=exports/{name}"
    command_line.show(
        f"next: {on}{command_line.command('evaluate', where, *per_class)}",
        f"      {on}{command_line.command('export', where, export_dir)}",
    )
    command_line.show(json.dumps(result))


def _list_recipes():
    from keras_resnet.training import recipe_table
    from keras_resnet.training import recipes

    command_line.show(*recipe_table.lines(recipes.RECIPES))


def _devices():
    """Returns the strategy, None on JAX, and the number of devices."""
    import keras

    if keras.backend.backend() == "jax":
        _leave_to_jax()
        return None, 1
    strategy = command_line.strategy(
        _STRATEGY.value,
        _NUM_DEVICES.value,
        connect_timeout=_CONNECT_TIMEOUT.value,
    )
    return strategy, strategy.num_replicas_in_sync


def _check(config, dataset, devices):
    """Rejects flags that do not fit the devices, the data or the backend."""
    from keras_resnet.training import configs

    with command_line.usage("batch_size", config.recipe.batch_size):
        configs.check_devices(config.recipe, devices)
    _check_batch(config.recipe, dataset.train_size)
    if config.backend == "jax":
        _check_config_on_jax(config, dataset)


def _served(config, dataset):
    """Returns the data set, with its batches from --data_service if given."""
    from keras_resnet.training import configs

    address = _DATA_SERVICE.value
    if address is None:
        return dataset
    with command_line.usage("data_service", address):
        return configs.served(config, dataset, address)


def _show_start(config, workdir):
    """Prints what is trained, how long and where."""
    recipe = config.recipe
    source, _, _ = recipe.source.partition("; planned")
    length = f"{recipe.steps:,} steps"
    if _MINUTES.value is not None:
        length = f"{_MINUTES.value:g} minutes"
    command_line.show(
        f"{config.model} on {config.dataset} by the recipe {recipe.name}"
        f" ({source}): {length} of {recipe.batch_size} images, in {workdir}"
    )


def _train(config, dataset, workdir, strategy, minutes, profile_steps):
    """Returns the result of the loop, whose errors name a flag."""
    from keras_resnet.training import budgets
    from keras_resnet.training import checkpoints
    from keras_resnet.training import loop
    from keras_resnet.training import memory
    from keras_resnet.training import workdirs

    try:
        return loop.train_and_evaluate(
            config,
            workdir,
            strategy,
            report=command_line.show,
            dataset=dataset,
            log_every=_LOG_EVERY.value,
            eval_every=_EVAL_EVERY.value,
            checkpoint_seconds=_CHECKPOINT_SECONDS.value,
            minutes=minutes,
            profile_steps=profile_steps,
        )
    except (workdirs.WorkdirError, checkpoints.StateError) as error:
        raise command_line.UsageError("workdir", workdir, error) from error
    except budgets.BudgetError as error:
        raise command_line.UsageError(
            "minutes", _MINUTES.value, error
        ) from error
    except memory.DoesNotFitError as error:
        raise _usage_error(config.recipe, error.field, error) from error


def main(argv):
    """Trains the network that the flags describe."""
    start = time.monotonic()
    if _LIST_RECIPES.value:
        _list_recipes()
        return
    command_line.check_not_empty(
        _WEIGHTS, _WORKDIR, _DATA_DIR, _RECIPE, _EXPERIMENT
    )
    profile_steps, _ = _profile_steps(), _minutes_left(start)
    # The devices come first: TensorFlow divides them only once.
    strategy, devices = _devices()
    row = _row()
    config, dataset = _config(row)
    _check(config, dataset, devices)
    workdir = _workdir(row)
    config = _with_fitting_batch(config, dataset, workdir)
    dataset = _served(config, dataset)
    _show_start(config, workdir)
    minutes = _minutes_left(start)
    result = _train(config, dataset, workdir, strategy, minutes, profile_steps)
    _show_result(config, workdir, result)


def cli():
    """The console script."""
    command_line.run(main, backends=("tensorflow", "jax"))


if __name__ == "__main__":
    cli()
