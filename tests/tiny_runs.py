"""Runs of a tiny network on the bundled digits, in the process of a test."""

import dataclasses
import tempfile
from pathlib import Path
from unittest import mock

import numpy as np
from absl.testing import parameterized

import keras_resnet
from keras_resnet.training import configs
from keras_resnet.training import loop
from keras_resnet.training import recipes
from tests import runs

RECIPE = recipes.RECIPES["digits"].with_steps(8)
RECIPE = dataclasses.replace(RECIPE, batch_size=16)


def config(recipe=RECIPE, **fields):
    return configs.Config("tiny", "digits", recipe, **fields)


def quiet(line):
    """Takes a line that is meant for people."""


class TestCase(parameterized.TestCase):
    """Knows the tiny network, and where its run is kept."""

    def setUp(self):
        super().setUp()
        self.enter_context(
            mock.patch.dict(keras_resnet.MODELS, {"tiny": runs.TINY})
        )
        root = self.enter_context(tempfile.TemporaryDirectory())
        self.workdir = Path(root) / "run"

    def assert_same_run(self, workdir, expected):
        """The last checkpoints to the bit, and the rows."""
        values, others = runs.values(workdir), runs.values(expected)
        self.assertEqual(values.keys(), others.keys())
        for name, value in values.items():
            np.testing.assert_array_equal(value, others[name], err_msg=name)
        self.assertEqual(
            (workdir / "metrics.csv").read_bytes(),
            (expected / "metrics.csv").read_bytes(),
        )

    def train(self, config, workdir=None, **arguments):
        arguments = {"report": quiet, "log_every": 2, **arguments}
        return loop.train_and_evaluate(
            config, workdir or self.workdir, **arguments
        )
