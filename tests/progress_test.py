"""The lines of a run: early, then now and then, and one for each row."""

import dataclasses
import threading
from unittest import mock

from absl.testing import absltest

from keras_resnet.training import progress
from keras_resnet.training import recipes

ROW = {"step": 4, "train_loss": 0.5, "train_top1_error": 25.0}


class StallsTest(absltest.TestCase):
    def test_a_step_that_does_not_end_is_reported_until_it_does(self):
        lines, twice = [], threading.Event()

        def report(line):
            lines.append(line)
            if len(lines) == 2:
                twice.set()

        with progress.stalls(report, "a worker may be lost", seconds=0.01):
            self.assertTrue(twice.wait(60))
        ended = len(lines)
        self.assertEqual(
            lines[0], "no step for 0 seconds: a worker may be lost"
        )
        threading.Event().wait(0.05)
        self.assertLen(lines, ended)

    def test_without_a_reason_no_line_comes(self):
        lines = []
        with progress.stalls(lines.append, "", seconds=0.001):
            threading.Event().wait(0.05)
        self.assertEmpty(lines)


class ProgressTest(absltest.TestCase):
    def setUp(self):
        super().setUp()
        self.now = 0.0
        self.enter_context(
            mock.patch.object(progress.time, "monotonic", lambda: self.now)
        )
        recipe = recipes.RECIPES["digits"].with_steps(100)
        recipe = dataclasses.replace(recipe, batch_size=8)
        self.lines = []
        self.progress = progress.Progress(
            recipe, 80, self.lines.append, is_shown=True
        )

    def step(self, seconds, is_due=False):
        self.now += seconds
        with self.progress.bar(0):
            self.progress.show_step(1, ROW, 16.0, is_due)
        return len(self.lines)

    def test_a_slow_run_has_a_line_early_and_then_now_and_then(self):
        counts = [self.step(seconds) for seconds in (4, 2, 10, 10, 20, 2)]
        self.assertEqual(counts, [0, 1, 1, 1, 2, 2])
        self.assertEqual(
            self.lines[0],
            "step 4 of 100, epoch 0.4 of 10.0, loss 0.500, error 25.00%, 16 "
            "images/s, 0:00:48 left",
        )

    def test_a_row_is_reported_once_and_ends_the_silence(self):
        self.assertEqual(self.step(100, is_due=True), 0)
        self.progress.show_row({**ROW, "test_loss": 1, "test_top1_error": 2}, 9)
        self.assertLen(self.lines, 1)
        self.assertIn("test error 2.00%", self.lines[0])
        self.assertEqual(self.step(20), 1)

    def test_a_terminal_has_a_bar_and_lines_for_tests_only(self):
        with mock.patch.object(progress.sys.stderr, "isatty", lambda: True):
            self.progress = progress.Progress(
                self.progress.recipe, 80, self.lines.append, is_shown=True
            )
        self.assertEqual(self.step(100), 0)
        self.progress.show_row(ROW, 9)
        self.assertEmpty(self.lines)
        self.progress.show_row({**ROW, "test_loss": 1, "test_top1_error": 2}, 9)
        self.assertLen(self.lines, 1)


if __name__ == "__main__":
    absltest.main()
