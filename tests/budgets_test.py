"""The length of a run from the speed of its first steps, with a false clock."""

import dataclasses
import os
import signal
import time
from unittest import mock

import numpy as np
import pytest
from absl.testing import absltest
from absl.testing import parameterized

from keras_resnet.training import budgets
from keras_resnet.training import interrupts
from keras_resnet.training import loop
from keras_resnet.training import workdirs
from tests import tiny_runs


class Clock:
    """A clock that only a `Trainer` moves."""

    def __init__(self):
        self.now = 1000.0

    def monotonic(self):
        return self.now


class Trainer:
    """Takes a time for each step, and more for the first."""

    def __init__(self, clock, start, step):
        self.clock, self.start, self.step = clock, start, step

    def take(self, steps, stop_requested, seconds):
        self.clock.now += self.start + steps * self.step
        self.start = 0.0
        return False, self.step


class BudgetTest(tiny_runs.TestCase):
    def length(self, minutes, start, step, test_size=0, eval_every=None):
        clock = Clock()
        with mock.patch.object(budgets, "time", clock):
            config = budgets.with_length(
                tiny_runs.config(),
                self.workdir,
                minutes,
                lambda config: Trainer(clock, start, step),
                test_size,
                eval_every,
            )
        measured = clock.now - 1000.0
        return config.recipe, measured

    @parameterized.parameters((0, None), (4800, None), (4800, 100))
    def test_steps_and_tests_fill_the_time(self, test_size, eval_every):
        recipe, measured = self.length(10, 30.0, 0.1, test_size, eval_every)
        test = test_size / recipe.batch_size * 0.1 / 3
        tests = 20 if eval_every is None else 1 + recipe.steps / eval_every
        whole = measured + 30 + recipe.steps * 0.1 + tests * test
        self.assertBetween(whole, 0.9 * 600, 600)

    def test_each_of_several_sizes_is_measured(self):
        recipe = dataclasses.replace(
            tiny_runs.RECIPE, progressive_sizes=(4, 4, 8)
        )
        clock = Clock()

        def trainer(config):
            (size,) = config.recipe.progressive_sizes
            return Trainer(clock, 5.0, size / 40)

        with mock.patch.object(budgets, "time", clock):
            fitted = budgets.with_length(
                tiny_runs.config(recipe), self.workdir, 10, trainer, 0
            ).recipe
        self.assertEqual(fitted.progressive_sizes, (4, 4, 8))
        measured = clock.now - 1000.0
        mean = (0.1 + 0.1 + 0.2) / 3
        whole = measured + 2 * 5 + fitted.steps * mean
        self.assertBetween(whole, 0.9 * 600, 600)

    def test_shape_of_the_recipe_is_kept(self):
        recipe, _ = self.length(10, 1.0, 0.1)
        self.assertEqual(recipe, tiny_runs.RECIPE.with_steps(recipe.steps))
        self.assertEqual(recipe.decay_at_steps[0], round(recipe.steps / 2))

    def test_time_for_less_than_a_step_is_an_error(self):
        with self.assertRaisesRegex(ValueError, "enough for one step.*0.1"):
            self.length(0.1, 30.0, 0.1)

    @pytest.mark.slow
    def test_a_run_that_exists_keeps_its_length(self):
        self.train(tiny_runs.config())
        recipe, measured = self.length(10, 1.0, 0.1)
        self.assertEqual(recipe.steps, 8)
        self.assertEqual(measured, 0.0)

    @pytest.mark.slow
    def test_run_is_that_of_its_steps_and_resumes(self):
        """The measurement leaves no trace in the bits of the run."""
        config = tiny_runs.config(deterministic=True)
        with mock.patch.object(budgets, "_of_length", lambda c, _: c):
            result = self.train(config, minutes=1.0)
        again = self.train(config, minutes=1.0)
        self.assertEqual(result["step"], again["step"])
        whole = self.workdir.with_name("whole")
        self.train(config, whole)
        self.assert_same_run(self.workdir, whole)

    def test_other_configurations_are_rejected_as_without_a_budget(self):
        self.train(tiny_runs.config())
        recipe = dataclasses.replace(tiny_runs.RECIPE, learning_rate=0.5)
        with self.assertRaisesRegex(workdirs.WorkdirError, "learning_rate"):
            self.train(tiny_runs.config(recipe), minutes=1.0)

    def test_a_signal_ends_the_measurement(self):
        """The measurement of a long run takes a minute."""

        def measure(*_):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5.0)

        with (
            mock.patch.object(budgets, "with_length", measure),
            self.assertRaises(interrupts.Interrupted),
        ):
            self.train(tiny_runs.config(), minutes=1e4)

    def test_several_workers_are_rejected(self):
        with (
            mock.patch.object(loop.strategies, "has_workers", lambda _: True),
            self.assertRaisesRegex(ValueError, "minutes must be used in one"),
        ):
            self.train(tiny_runs.config(), minutes=1.0)
        np.testing.assert_equal(self.workdir.exists(), False)


if __name__ == "__main__":
    absltest.main()
