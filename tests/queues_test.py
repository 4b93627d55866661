"""Queues of runs, and the program that trains them."""

import json
import os
import pathlib
import subprocess
import tempfile
import threading
import unittest
from unittest import mock

from absl.testing import absltest
from absl.testing import parameterized

from keras_resnet.papers import experiments
from keras_resnet.papers import queues
from tests import programs
from tests import reference

ROOT = pathlib.Path(__file__).parent.parent
KEPT = ROOT / "docs/results/runs"


class QueueTest(parameterized.TestCase):
    def test_a_row_is_trained_as_often_as_the_papers_did(self):
        found = queues.queue(["resnet110", "resnet20"], None, "runs")
        self.assertEqual(
            [(run.experiment.name, run.seed) for run in found],
            [("resnet110", seed) for seed in range(5)]
            + [("resnet20", seed) for seed in range(3)],
        )
        self.assertEqual({run.steps for run in found}, {64_000})

    def test_the_costs_left_are_those_of_three_passes(self):
        (run,) = queues.queue(["resnet20"], [0], "runs", 1_000)
        counts = reference.counts(reference.layout("resnet20"), "A", "1x1")
        self.assertEqual(
            run.remaining_multiply_adds,
            3 * 1_000 * 128 * counts.multiply_adds,
        )

    def test_what_is_complete_is_skipped_and_the_rest_resumed(self):
        with tempfile.TemporaryDirectory() as folder:
            root = pathlib.Path(folder)
            for name, rows in (
                ("resnet20_64000_0", None),
                ("resnet20_64000_1", 3),
            ):
                copy = root / name
                copy.mkdir()
                source = KEPT / "resnet20_64000_bfloat16_0"
                config = json.loads((source / "config.json").read_text())
                config["seed"] = int(name[-1])
                (copy / "config.json").write_text(json.dumps(config))
                lines = (source / "metrics.csv").read_text().splitlines(True)
                (copy / "metrics.csv").write_text("".join(lines[:rows]))
            complete, begun, new = queues.queue(
                *(["resnet20", "resnet20"], [0, 1, 2, 1], root, 64_000),
                "mixed_bfloat16",
            )
        self.assertTrue(complete.is_complete)
        self.assertEqual(complete.remaining_multiply_adds, 0)
        self.assertFalse(begun.is_complete)
        self.assertEqual(begun.completed_steps, 200)
        self.assertEqual((new.is_complete, new.completed_steps), (False, 0))
        self.assertIn("--seed=2", new.flags())

    def test_the_directory_of_another_run_is_rejected(self):
        with tempfile.TemporaryDirectory() as folder:
            copy = pathlib.Path(folder) / "resnet20_300_5"
            copy.mkdir()
            source = KEPT / "resnet20_300_float32_0"
            for name in ("config.json", "metrics.csv"):
                (copy / name).write_text((source / name).read_text())
            for seed, dtype in ((5, "float32"), (0, "mixed_bfloat16")):
                copy.rename(copy.with_name(f"resnet20_300_{seed}"))
                copy = copy.with_name(f"resnet20_300_{seed}")
                with self.assertRaisesRegex(ValueError, "must contain the run"):
                    queues.queue(["resnet20"], [seed], folder, 300, dtype)

    @parameterized.parameters(
        {row.dataset for row in experiments.EXPERIMENTS.values()}
    )
    def test_every_data_set_of_the_papers_has_its_images(self, dataset):
        self.assertIn(dataset, queues._IMAGES)


class ProgramTest(parameterized.TestCase):
    def test_a_dry_run_prints_the_plan_and_trains_nothing(self):
        with (
            tempfile.TemporaryDirectory() as folder,
            mock.patch.object(subprocess, "Popen") as started,
        ):
            outcome = programs.run(
                "experiments",
                "--experiments=resnet20,plainnet20",
                "--seeds=0,1",
                "--steps=10",
                f"--workdirs={folder}",
                "--dry_run",
            )
        self.assertEqual(outcome.code, 0, outcome.err)
        self.assertLen(outcome.out, 5)
        self.assertIn("step 0 of 10", outcome.out[0])
        self.assertIn("4 of 4 runs are left", outcome.out[-1])
        started.assert_not_called()

    def test_runs_that_fail_are_named_in_one_line(self):
        process = mock.Mock(stdout=["a line"], wait=lambda: 2)
        with (
            tempfile.TemporaryDirectory() as folder,
            mock.patch.object(subprocess, "Popen", return_value=process),
        ):
            outcome = programs.run(
                *("experiments", "--experiments=resnet20", "--seeds=0,1"),
                *("--steps=10", f"--workdirs={folder}"),
            )
        self.assertEqual(outcome.code, 1)
        (line,) = outcome.err
        self.assertIn("2 of 2 runs ended with an error: resnet20_10_0", line)

    @unittest.skipUnless(
        hasattr(os, "sched_getaffinity") and os.cpu_count() > 1,
        "needs Linux and two cores",
    )
    def test_runs_at_the_same_time_share_the_cores(self):
        both, cores = threading.Barrier(2, timeout=60), []

        def start(*arguments, **options):
            cores.append(os.sched_getaffinity(0))
            return mock.Mock(stdout=[], wait=lambda: 0 * both.wait())

        with (
            tempfile.TemporaryDirectory() as folder,
            mock.patch.object(subprocess, "Popen", start),
        ):
            outcome = programs.run(
                *("experiments", "--experiments=resnet20", "--seeds=0,1"),
                *("--steps=10", "--at_once=8", f"--workdirs={folder}"),
            )
        self.assertEqual(outcome.code, 0, outcome.err)
        first, second = cores
        self.assertEmpty(first & second)
        self.assertEqual(first | second, os.sched_getaffinity(0))

    @parameterized.parameters(
        ([], "name one or more rows"),
        (["--experiments=resnet21"], "unknown experiment"),
        (["--experiments=resnet20", "--seeds=a"], "must be numbers"),
        (["--experiments=resnet20", "--seeds="], "--seeds=: must be numbers"),
        (["--experiments=resnet20", "--seeds=0,-1"], "at least 0 and below"),
        (["--experiments=resnet20", "--workdirs=gs://b/c"], "a local path"),
    )
    def test_mistakes_are_one_line(self, arguments, message):
        outcome = programs.run("experiments", *arguments)
        self.assertEqual(outcome.code, 2)
        self.assertLen(outcome.err, 1)
        self.assertIn(message, outcome.err[0])


if __name__ == "__main__":
    absltest.main()
