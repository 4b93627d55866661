"""Training: exact resume, rows, checkpoints, signals."""

import contextlib
import dataclasses
import os
import signal
from unittest import mock

import keras
import numpy as np
import pytest
from absl.testing import absltest
from absl.testing import parameterized

from keras_resnet.training import checkpoints
from keras_resnet.training import configs
from keras_resnet.training import interrupts
from keras_resnet.training import loop
from keras_resnet.training import metrics
from keras_resnet.training import tensorflow_trainer
from keras_resnet.training import trained_networks
from tests import runs
from tests import tiny_runs


class TrainingTest(tiny_runs.TestCase):
    def test_stopped_run_ends_with_the_bits_of_one_that_was_not(self):
        """Law 5 of the design, with random layers in a loop."""
        self.check_stops("dropout", looped=True, remat=True)

    @parameterized.parameters(
        ("A", False), ("A", True), ("dropout", False), ("dropout", True)
    )
    @pytest.mark.slow
    def test_stopped_runs_of_other_networks_end_with_the_same_bits(
        self, shortcut, looped
    ):
        self.check_stops(shortcut, looped=looped)

    def check_stops(self, shortcut, **others):
        arguments = {
            "shortcut": shortcut,
            "survival_probability": 0.8,
            **others,
        }
        described = tiny_runs.config(
            model_arguments=arguments, deterministic=True
        )
        whole = self.workdir.with_name("whole")
        self.train(described, whole)
        for stop_at in (3, 6):
            with (
                self.assertRaises(interrupts.Interrupted) as caught,
                stop_after(stop_at),
            ):
                self.train(described)
            self.assertEqual(caught.exception.step, stop_at)
            self.assertEqual(caught.exception.signal_number, signal.SIGTERM)
        self.train(described)
        self.assert_same_run(self.workdir, whole)
        loaded, others = (
            trained_networks.load_workdir(directory).model.get_weights()
            for directory in (self.workdir, whole)
        )
        for weight, other in zip(loaded, others, strict=True):
            np.testing.assert_array_equal(weight, other)
        is_saved = {str(value.shape) for value in runs.values(whole).values()}
        self.assertContainsSubset({str(w.shape) for w in loaded}, is_saved)

    @parameterized.parameters(signal.SIGTERM, signal.SIGINT)
    def test_only_the_first_signal_counts(self, number):
        """The others arrive while the state is saved."""
        save = checkpoints.save

        def interrupted(*arguments, **options):
            for again in (signal.SIGINT, signal.SIGTERM, signal.SIGINT):
                os.kill(os.getpid(), again)
            save(*arguments, **options)

        with (
            mock.patch.object(checkpoints, "save", interrupted),
            self.assertRaises(interrupts.Interrupted) as caught,
            stop_after(3, number),
        ):
            self.train(tiny_runs.config(), eval_every=8, checkpoint_seconds=1e9)
        self.assertEqual(caught.exception.signal_number, number)
        self.assertEqual(checkpoints.steps(self.workdir / "checkpoints"), [3])

    @parameterized.parameters((0.001, 10.0), (1.0, 50.0), (100.0, 1800.0))
    def test_time_between_saves_follows_from_their_cost(
        self, seconds, expected
    ):
        """Saving takes at most 2% of the time, within bounds."""
        taken = loop._Loop(*[mock.MagicMock()] * 6)
        taken.is_saved = False
        clock = iter([0.0, seconds, seconds])
        with (
            mock.patch.object(checkpoints, "save"),
            mock.patch.object(checkpoints, "prune"),
            mock.patch.object(loop.time, "monotonic", lambda: next(clock)),
        ):
            taken.save(5)
        self.assertEqual(taken.pause, expected)

    def test_work_that_a_kill_costs_is_reported(self):
        lines = []
        with (
            mock.patch.object(
                metrics.MetricsFile, "best", side_effect=KeyboardInterrupt
            ),
            self.assertRaises(KeyboardInterrupt),
        ):
            self.train(tiny_runs.config())
        path = self.workdir / "metrics.csv"
        path.write_text(path.read_text() + "2,0.1,1,1,1,,,\n4,0.1,1,1,1,,,\n6")
        self.train(tiny_runs.config(), report=lines.append)
        self.assertIn("repeating 4 steps of metrics.csv", lines[0])
        self.assertRegex(lines[1], "a kill loses .*--checkpoint_seconds")

    def test_finished_run_is_not_trained_again(self):
        first = self.train(tiny_runs.config())
        before = (self.workdir / "metrics.csv").read_bytes()
        lines = []
        again = self.train(tiny_runs.config(), report=lines.append)
        self.assertIn("has all its 8 steps already", lines[-1])
        self.assertEqual(first["test_top1_error"], again["test_top1_error"])
        self.assertEqual((self.workdir / "metrics.csv").read_bytes(), before)

    def test_rows_after_the_checkpoint_are_made_again(self):
        with self.assertRaises(interrupts.Interrupted), stop_after(4):
            self.train(tiny_runs.config())
        path = self.workdir / "metrics.csv"
        rows = path.read_text().splitlines()
        path.write_text("\n".join([*rows, "6,0.1,1,1,1,,,", "8,0.1"]))
        self.train(tiny_runs.config())
        steps = [row.split(",")[0] for row in path.read_text().splitlines()]
        self.assertEqual(steps, ["step", "2", "4", "6", "8"])

    def test_only_the_last_checkpoints_are_kept(self):
        self.train(tiny_runs.config(), keep=2, checkpoint_seconds=0.0)
        kept = sorted((self.workdir / "checkpoints").glob("*.index"))
        self.assertEqual(
            [p.name for p in kept], ["ckpt-7.index", "ckpt-8.index"]
        )

    def test_evaluations_need_no_row_of_their_own(self):
        self.train(tiny_runs.config(), log_every=4, eval_every=3)
        text = (self.workdir / "metrics.csv").read_text()
        rows = [row.split(",") for row in text.splitlines()[1:]]
        self.assertEqual(
            [(row[0], row[-1] != "") for row in rows],
            [("3", True), ("4", False), ("6", True), ("8", True)],
        )

    def test_signal_before_the_first_step_ends_the_run(self):
        """Not after it: the first step of a deep network takes minutes."""
        build = tensorflow_trainer.TensorFlowTrainer

        def interrupted(*arguments):
            os.kill(os.getpid(), signal.SIGTERM)
            return build(*arguments)

        with (
            mock.patch.object(
                tensorflow_trainer, "TensorFlowTrainer", interrupted
            ),
            self.assertRaises(interrupts.Interrupted) as caught,
        ):
            self.train(tiny_runs.config())
        self.assertEqual(caught.exception.step, 0)

    @parameterized.parameters("mixed_bfloat16", "mixed_float16")
    @pytest.mark.slow
    def test_mixed_precision_learns(self, dtype):
        recipe = tiny_runs.RECIPE.with_steps(100)
        result = self.train(tiny_runs.config(recipe, dtype=dtype), log_every=20)
        self.assertLess(result["train_loss"], 1.8)  # chance is ln 10 = 2.3
        model = trained_networks.load_workdir(self.workdir).model
        self.assertEqual(model.get_layer("stem_conv").compute_dtype, "float32")
        self.assertEqual(keras.config.dtype_policy().name, "float32")

    def test_loss_that_is_no_number_ends_the_run_and_is_not_saved(self):
        recipe = dataclasses.replace(tiny_runs.RECIPE, learning_rate=1e30)
        with self.assertRaisesRegex(
            loop.TrainingDivergedError, "lower recipe.learning_rate"
        ):
            self.train(tiny_runs.config(recipe))
        self.assertEqual(list(self.workdir.glob("checkpoints/*.index")), [])

    def test_unknown_data_set_leaves_nothing_behind(self):
        described = configs.Config("resnet20", "digts", tiny_runs.RECIPE)
        with self.assertRaisesRegex(ValueError, "digits"):
            self.train(described)
        self.assertFalse(self.workdir.exists())

    def test_signal_handlers_are_put_back(self):
        before = signal.getsignal(signal.SIGTERM)
        self.train(tiny_runs.config())
        self.assertIs(signal.getsignal(signal.SIGTERM), before)


@contextlib.contextmanager
def stop_after(step, number=signal.SIGTERM):
    """Sends a signal to this process so that its run stops after a step."""
    advance = loop._Loop.advance

    def noticed(taken, *arguments):
        if taken.trainer.completed_steps == step - 1:
            os.kill(os.getpid(), number)
        return advance(taken, *arguments)

    with (
        mock.patch.object(loop._Loop, "advance", noticed),
        mock.patch.object(loop, "_CHUNK_SECONDS", 1e-9),
    ):
        yield


if __name__ == "__main__":
    absltest.main()
