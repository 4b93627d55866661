"""Trains a network, evaluates it and leaves what the other programs need.

    python -m apps.train
    python -m apps.train --model=resnet56 --dataset=cifar10
    python -m apps.train --experiment=plainnet56  # a row of the papers' tables

Run the same command again to resume. Set KERAS_BACKEND=jax to train on an
accelerator that TensorFlow does not support, with small images of one size.
"""

import dataclasses
import json
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
_WORKDIR = flags.DEFINE_string(
    "workdir",
    None,
    "Directory of the run. Default: runs/MODEL_DATASET or "
    "runs/EXPERIMENT_SEED.",
)
_RECIPE = flags.DEFINE_string(
    "recipe", None, "Name of the recipe. Default: by data set and network."
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
)
_LIST_RECIPES = flags.DEFINE_bool(
    "list_recipes", False, "Print the recipes with errors and costs, and end."
)
_PROFILE_STEPS = flags.DEFINE_list(
    "profile_steps",
    [],
    "A,B: let TensorFlow's profiler observe the steps after A up to B.",
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
_MEETING_SECONDS = flags.DEFINE_float(
    "meeting_seconds",
    300.0,
    "Seconds that workers wait for one another at the start.",
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
    from keras_resnet.training import recipes

    model = row.model if row else _MODEL.value
    dataset_name = row.dataset if row else _DATASET.value
    recipe_name = row.recipe if row else _RECIPE.value
    with command_line.usage("model", model):
        network = networks.get_network(model)
    if recipe_name:
        with command_line.usage("recipe", recipe_name):
            recipe = recipes.get_recipe(recipe_name)
    with command_line.usage("dataset", dataset_name):
        dataset = datasets.load(dataset_name, _DATA_DIR.value)
    height = dataset.image_shape[0]
    if not recipe_name:
        recipe = recipes.default_recipe(dataset_name, height, network)
    if _BATCH_SIZE.value is not None:
        with command_line.usage("batch_size", _BATCH_SIZE.value):
            changed = dataclasses.replace(recipe, batch_size=_BATCH_SIZE.value)
            if _LINEAR_SCALING.value:
                changed = recipe.scaled_to(_BATCH_SIZE.value)
            recipe = changed
    elif _LINEAR_SCALING.value:
        raise command_line.UsageError(
            "linear_scaling", True, "it scales with --batch_size: give that too"
        )
    if _STEPS.value:
        recipe = recipe.with_steps(_STEPS.value)
    given = command_line.settings(_SET.value, "recipe", "model")
    recipe = command_line.with_fields(recipe, "recipe", given["recipe"])
    arguments = command_line.model_arguments(
        network, given["model"], row.arguments if row else {}
    )
    if recipe.image_size not in (None, height) or recipe.test_crop_ratio:
        size = f"recipe.image_size={recipe.image_size}"
        with command_line.usage("set", size):
            dataset = datasets.load(
                dataset_name,
                _DATA_DIR.value,
                image_size=recipe.image_size,
                test_crop_ratio=recipe.test_crop_ratio,
            )
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
        )
    with command_line.usage("sync_batch_norm", _SYNC_BATCH_NORM.value):
        config = dataclasses.replace(
            config, sync_batch_norm=_SYNC_BATCH_NORM.value
        )
    if row and row.is_trained_by(config):
        config = dataclasses.replace(config, experiment=row.name)
    return config, dataset


def _leave_to_jax():
    """Leaves the accelerator to JAX; rejects flags that JAX does not use."""
    import jax
    import tensorflow as tf

    for flag in (_STRATEGY, _NUM_DEVICES, _MEETING_SECONDS):
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
    is_set = any(value.startswith("recipe.batch_size=") for value in _SET.value)
    if is_set or _BATCH_SIZE.value is not None:
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
    texts = _PROFILE_STEPS.value
    if not texts:
        return None
    if len(texts) != 2 or not all(text.isdecimal() for text in texts):
        raise command_line.UsageError(
            "profile_steps", ",".join(texts), "must be two steps A,B"
        )
    first, last = map(int, texts)
    if first >= last:
        raise command_line.UsageError(
            "profile_steps", ",".join(texts), "A must be less than B"
        )
    return first, last


def _minutes_left(start):
    """Returns the rest of --minutes, or None."""
    if _MINUTES.value is None:
        return None
    if _STEPS.value is not None:
        raise command_line.UsageError(
            "minutes", _MINUTES.value, "cannot be combined with --steps"
        )
    return max(_MINUTES.value - (time.monotonic() - start) / 60, 0.0)


def _file_name(config):
    """Returns the name of the data set as a part of a file name."""
    return config.dataset.replace(":", "_").replace("/", "_")


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
    export_dir = f"--export_dir=exports/{config.model}_{_file_name(config)}"
    command_line.show(
        f"next: {on}{command_line.command('evaluate', where)}",
        f"      {on}{command_line.command('export', where, export_dir)}",
    )
    command_line.show(json.dumps(result))


def main(argv):
    """Trains the network that the flags describe."""
    start = time.monotonic()
    import keras

    from keras_resnet.training import budgets
    from keras_resnet.training import checkpoints
    from keras_resnet.training import configs
    from keras_resnet.training import loop
    from keras_resnet.training import memory
    from keras_resnet.training import recipe_table
    from keras_resnet.training import recipes
    from keras_resnet.training import workdirs

    if _LIST_RECIPES.value:
        for line in recipe_table.lines(recipes.RECIPES):
            command_line.show(line)
        return
    profile_steps, _ = _profile_steps(), _minutes_left(start)
    is_on_jax = keras.backend.backend() == "jax"
    strategy, devices = None, 1
    if is_on_jax:
        _leave_to_jax()
    else:
        # This comes first: TensorFlow divides its devices only once.
        strategy = command_line.strategy(
            _STRATEGY.value,
            _NUM_DEVICES.value,
            meeting_seconds=_MEETING_SECONDS.value,
        )
        devices = strategy.num_replicas_in_sync
    row = _row()
    config, dataset = _config(row)
    with command_line.usage("batch_size", config.recipe.batch_size):
        configs.check_devices(config.recipe, devices)
    _check_batch(config.recipe, dataset.train_size)
    if is_on_jax:
        _check_config_on_jax(config, dataset)
    workdir = _WORKDIR.value or f"runs/{config.model}_{_file_name(config)}"
    if row and not _WORKDIR.value:
        workdir = f"runs/{row.name}_{config.seed}"
    length = f"{config.recipe.steps:,} steps"
    if _MINUTES.value is not None:
        length = f"{_MINUTES.value:g} minutes"
    command_line.show(
        f"{config.model} on {config.dataset} by the recipe {config.recipe.name}"
        f" ({config.recipe.source}): {length} of "
        f"{config.recipe.batch_size} images, in {workdir}"
    )
    try:
        result = loop.train_and_evaluate(
            config,
            workdir,
            strategy,
            report=command_line.show,
            dataset=dataset,
            log_every=_LOG_EVERY.value,
            eval_every=_EVAL_EVERY.value,
            checkpoint_seconds=_CHECKPOINT_SECONDS.value,
            minutes=_minutes_left(start),
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
    _show_result(config, workdir, result)


def cli():
    """The console script."""
    command_line.run(main, backends=("tensorflow", "jax"))


if __name__ == "__main__":
    cli()
