"""Runs of the papers' rows, as `apps.report` finds them."""

import csv
import dataclasses
import json
import pathlib

from keras_resnet.papers import experiments
from keras_resnet.papers import runs
from keras_resnet.training import configs
from keras_resnet.training import metrics
from keras_resnet.training import recipes

RECIPE = recipes.RECIPES["cifar10"].with_steps(1_000)


def a_run(name, error, model="resnet20", seed=0, step=1_000, **fields):
    """Returns a run whose test error falls from 90% to `error`."""
    shortcut = fields.pop("shortcut", None)
    arguments = {"shortcut": shortcut} if shortcut else {}
    fields = {
        "recipe": RECIPE,
        "dataset": "cifar10",
        "model_arguments": arguments,
        **fields,
    }
    rows = [
        {"step": 500.0, "train_top1_error": 80.0, "test_top1_error": 90.0},
        {"step": 600.0, "train_top1_error": 70.0},
        {"step": step, "train_top1_error": 1.0, "test_top1_error": error},
    ]
    config = configs.Config(model, seed=seed, **fields)
    for row in experiments.EXPERIMENTS.values():
        if row.is_trained_by(config):
            config = dataclasses.replace(config, experiment=row.name)
    return runs.Run(name, config, tuple(rows))


def save(run, directory):
    """Writes the two files of a run."""
    workdir = pathlib.Path(directory) / run.name
    workdir.mkdir(parents=True)
    (workdir / "config.json").write_text(json.dumps(run.config.to_json()))
    with (workdir / "metrics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, metrics.COLUMNS)
        writer.writeheader()
        writer.writerows(run.metrics)
    return workdir
