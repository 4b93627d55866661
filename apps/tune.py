r"""Searches for a network and its recipe, and prints how to train the best.

    python -m apps.tune --trials=20 --steps=200
    python -m apps.tune --dataset=cifar10 --workers=4 --algorithm=hyperband \
        --set=space.depth=20,32 --set=space.shortcut=A,B
    python -m apps.tune --dataset=folder:PATH --model=resnet18 \
        --weights=imagenet

Trials are compared on training images that no trial trains on. The test images
are only for the best network. Run the same command again to resume, also with
more --trials.
"""

import dataclasses
import functools

from absl import flags

from . import command_line

_DATASET = flags.DEFINE_string("dataset", "digits", "As for apps.train.")
_DATA_DIR = flags.DEFINE_string("data_dir", None, "Where TFDS keeps its sets.")
_SKIP_UNREADABLE = flags.DEFINE_bool(
    "skip_unreadable", False, "As for apps.train."
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Default: runs/tune_DATASET in the current directory."
)
_MODEL = flags.DEFINE_string(
    "model", None, "With --weights: the network that has them."
)
_WEIGHTS = flags.DEFINE_string(
    "weights",
    None,
    "Weights from which each trial starts, as for apps.train. The network is "
    "then not searched.",
)
_ALGORITHM = flags.DEFINE_enum(
    "algorithm",
    "random",
    ["random", "hyperband", "bayesian"],
    "hyperband starts many short trials; bayesian learns from earlier trials.",
)
_TRIALS = flags.DEFINE_integer(
    "trials", 20, "Largest number of trials.", lower_bound=1
)
_WORKERS = flags.DEFINE_integer(
    "workers", 1, "Processes that train at the same time.", lower_bound=1
)
_RECIPE = flags.DEFINE_string(
    "recipe", None, "Default: the recipe of the data set."
)
_STEPS = flags.DEFINE_integer(
    "steps",
    None,
    "Steps of a trial; default: those of the recipe.",
    lower_bound=1,
)
_BATCH_SIZE = flags.DEFINE_integer(
    "batch_size", None, "Images in a batch.", lower_bound=1
)
_DTYPE = flags.DEFINE_string("dtype", "float32", "As for apps.train.")
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the search and the trials.")
_SET = flags.DEFINE_multi_string(
    "set",
    [],
    "space.NAME=VALUE,VALUE (depth, unit, shortcut, width, optimizer, "
    "augmentation; learning_rate and weight_decay: lowest,highest), or "
    "recipe.FIELD=VALUE for a fixed field; can be repeated.",
)


def _search():
    """Returns the search that the flags describe."""
    from keras_resnet import networks
    from keras_resnet.data import datasets
    from keras_resnet.training import configs
    from keras_resnet.training import plans
    from keras_resnet.training import recipes
    from keras_resnet.training import tuning

    with command_line.usage("dataset", _DATASET.value):
        dataset = datasets.load(
            _DATASET.value,
            _DATA_DIR.value,
            skip_unreadable=_SKIP_UNREADABLE.value,
        )
    start = _start_weights(dataset)
    if start is None:
        space = tuning.default_space(dataset.image_shape[0])
        plan = functools.partial(
            plans.recipe_of,
            dataset,
            networks.get_network(f"resnet{max(space.depth)}"),
        )
    else:
        if start.preprocessing is not None:
            dataset = dataset.with_preprocessing(
                preprocessing=start.preprocessing_for(dataset.preprocessing)
            )
        with command_line.usage("model", _MODEL.value):
            space = tuning.fine_tuning_space(
                _MODEL.value, start.arguments, dataset.has_photos
            )
        plan = functools.partial(
            plans.fine_tuning_recipe,
            dataset,
            _MODEL.value,
            keeps_size=start.preprocessing is not None,
        )
    with command_line.usage("recipe", _RECIPE.value):
        recipe = recipes.get_recipe(_RECIPE.value) if _RECIPE.value else plan()
    if not _RECIPE.value and recipe.name in ("folder", "fine_tune"):
        command_line.show(dataset.summary, recipe.source)
    if _BATCH_SIZE.value is not None:
        recipe = dataclasses.replace(recipe, batch_size=_BATCH_SIZE.value)
    given = command_line.settings(_SET.value, "space", "recipe")
    for field, text in given["recipe"]:
        if hasattr(space, field):
            raise command_line.UsageError(
                "set",
                f"recipe.{field}={text}",
                f"it is searched: set space.{field}",
            )
    fixed = space
    space = command_line.with_fields(space, "space", given["space"])
    for field in ("depth", "unit", "shortcut", "width"):
        value = getattr(space, field)
        if start is not None and value != getattr(fixed, field):
            raise command_line.UsageError(
                "set",
                f"space.{field}={','.join(map(str, value))}",
                "the weights decide it: leave it out",
            )
    recipe = command_line.with_fields(recipe, "recipe", given["recipe"])
    with command_line.usage("dtype", _DTYPE.value):
        config = configs.Config(
            f"resnet{space.depth[0]}",
            _DATASET.value,
            recipe,
            dtype=_DTYPE.value,
            seed=_SEED.value,
            data_dir=_DATA_DIR.value,
            skip_unreadable=_SKIP_UNREADABLE.value,
            model_arguments=start.arguments if start else {},
            weights=_WEIGHTS.value,
            weights_sha256=start and start.sha256,
        )
    with command_line.usage("set", " --set=".join(_SET.value)):
        return tuning.Search(
            config, space, _ALGORITHM.value, _TRIALS.value, _STEPS.value
        )


def _start_weights(dataset):
    """Returns the start weights of --weights and --model, or None."""
    from keras_resnet import networks
    from keras_resnet.training import start_weights

    if not _WEIGHTS.value:
        if _MODEL.value:
            raise command_line.UsageError(
                "model",
                _MODEL.value,
                "it needs --weights; without weights the network is searched: "
                "--set=space.depth=20,32",
            )
        return None
    if not _MODEL.value:
        raise command_line.UsageError(
            "weights", _WEIGHTS.value, "give --model, the network that has them"
        )
    with command_line.usage("model", _MODEL.value):
        network = networks.get_network(_MODEL.value)
    with command_line.usage("weights", _WEIGHTS.value):
        return start_weights.read(
            _WEIGHTS.value, network, {}, dataset.preprocessing.channels
        )


def main(argv):
    """Searches according to the flags."""
    from keras_resnet.analysis import complexity
    from keras_resnet.training import checkpoints
    from keras_resnet.training import tuning
    from keras_resnet.training import workdirs

    search = _search()
    name = command_line.short_name(_DATASET.value)
    workdir = _WORKDIR.value or f"runs/tune_{name}"
    command_line.show(f"at most {_TRIALS.value} trials, in {workdir}")
    try:
        trials = tuning.tune(search, workdir, _WORKERS.value, command_line.show)
    except (workdirs.WorkdirError, checkpoints.StateError) as error:
        raise command_line.UsageError("workdir", workdir, error) from error
    rows = [["trial", "validation error", *trials[0].values()]]
    for trial in trials:
        score = trial.validation_error
        cells = ["none" if score is None else f"{score:.2f}%"]
        rows.append([trial.name, *cells, *map(str, trial.values().values())])
    command_line.show(*complexity.columns(rows).splitlines())
    command_line.show(f"all trials: tensorboard --logdir={workdir}/trials")
    command_line.show("the best, at the full length of its recipe:")
    flags_of_best = tuning.train_flags(trials[0].config, f"{workdir}/best")
    command_line.show(command_line.command("train", *flags_of_best))


def cli():
    """The console script."""
    command_line.run(main)


if __name__ == "__main__":
    cli()
