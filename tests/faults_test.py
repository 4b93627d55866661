"""Faults of a run: each ends in one line, and the next start works."""

import contextlib
import dataclasses
import json
import resource
import socket
import tempfile
import time
import urllib.error
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from absl.testing import absltest
from absl.testing import parameterized

import keras_resnet
from keras_resnet.training import checkpoints
from keras_resnet.training import configs
from keras_resnet.training import loop
from keras_resnet.training import recipes
from keras_resnet.training import rendezvous
from keras_resnet.training import trained_networks
from keras_resnet.training import workdirs
from tests import programs
from tests import records
from tests import runs

RECIPE = dataclasses.replace(
    recipes.RECIPES["digits"].with_steps(8), batch_size=16
)
CONFIG = {"model": "tiny", "dataset": "digits", "deterministic": True}
FLAGS = ("--model=tiny", "--batch_size=16", "--steps=8", "--deterministic")


@contextlib.contextmanager
def files_of_at_most(size):
    """No file of this process can grow beyond a size, in bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def damage_index(directory):
    path = directory / "ckpt-8.index"
    path.write_bytes(path.read_bytes()[:100])


def damage_data(directory):
    (path,) = directory.glob("ckpt-8.data-*")
    path.write_bytes(path.read_bytes()[:-100])


def flip_a_bit(directory):
    (path,) = directory.glob("ckpt-8.data-*")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def delete_data(directory):
    (path,) = directory.glob("ckpt-8.data-*")
    path.unlink()


def damage_all(directory):
    for path in directory.glob("ckpt-*"):
        path.write_bytes(path.read_bytes()[:50])


class FaultTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        tiny = mock.patch.dict(keras_resnet.MODELS, {"tiny": runs.TINY})
        self.enter_context(tiny)
        self.root = Path(self.enter_context(tempfile.TemporaryDirectory()))
        self.lines = []

    def train(self, name="run", recipe=RECIPE, **arguments):
        arguments = {"checkpoint_seconds": 0.0, "log_every": 4, **arguments}
        return loop.train_and_evaluate(
            configs.Config(recipe=recipe, **CONFIG),
            self.root / name,
            report=self.lines.append,
            **arguments,
        )

    def assert_same(self, name, expected):
        """A run has the values and the rows that another one had."""
        got = self.final(name)
        self.assertEqual(got.keys(), expected.keys())
        for key, value in expected.items():
            np.testing.assert_array_equal(got[key], value, err_msg=key)

    def final(self, name="run"):
        workdir = self.root / name
        rows = (workdir / "metrics.csv").read_text()
        return {**runs.values(workdir), "metrics.csv": rows}

    @parameterized.parameters(
        (damage_index, 7),
        (damage_data, 7),
        (flip_a_bit, 7),
        (delete_data, 7),
    )
    @pytest.mark.slow
    def test_damaged_checkpoint_is_passed_over(self, damage, step):
        self.train()
        expected = self.final()
        directory = self.root / "run" / "checkpoints"
        self.assertEqual(checkpoints.steps(directory), [6, 7, 8])
        damage(directory)
        self.lines.clear()
        trained = trained_networks.load_workdir(
            self.root / "run", report=self.lines.append
        )
        self.assertEqual(trained.step, step)
        self.assertIn("ckpt-8 is damaged", self.lines[0])
        self.lines.clear()
        self.train()
        said = "\n".join(self.lines)
        self.assertRegex(said, "ckpt-8 is damaged .*resuming from the prev")
        self.assertIn(f"resuming at step {step}", said)
        self.assert_same("run", expected)
        self.assertNotEmpty(list(directory.glob("damaged-ckpt-8.*")))

    def test_run_without_a_readable_checkpoint_does_not_start_again(self):
        self.train()
        workdir = self.root / "run"
        for path in workdir.glob("checkpoints/ckpt-*"):
            path.write_bytes(path.read_bytes()[:50])
        before = {p: p.read_bytes() for p in workdir.glob("*/ckpt-*")}
        message = "no checkpoint in .* can be read: .*another work directory"
        with self.assertRaisesRegex(checkpoints.StateError, message):
            self.train()
        with self.assertRaisesRegex(checkpoints.StateError, message):
            trained_networks.load_workdir(workdir, report=self.lines.append)
        after = {p: p.read_bytes() for p in workdir.glob("*/ckpt-*")}
        self.assertEqual(after, before)
        outcome = programs.run("train", f"--workdir={workdir}", *FLAGS)
        self.assertEqual(outcome.code, 2)
        self.assertLen(outcome.err, 1)

    def test_deleted_checkpoint_is_made_again(self):
        self.train()
        expected = self.final()
        for path in (self.root / "run" / "checkpoints").glob("ckpt-8.*"):
            path.unlink()
        (self.root / "run" / "checkpoints" / "checkpoint").write_text("?")
        self.train()
        self.assertIn("resuming at step 7 of 8", self.lines)
        self.assert_same("run", expected)

    @pytest.mark.slow
    def test_disk_that_is_full_keeps_the_checkpoints_that_are_there(self):
        self.train("whole")
        save = checkpoints.save

        def full_at_five(checkpoint, directory, step, keep):
            size = 1000 if step == 5 else 2**40
            with files_of_at_most(size):
                save(checkpoint, directory, step, keep)

        with (
            mock.patch.object(checkpoints, "save", full_at_five),
            self.assertRaisesRegex(
                checkpoints.CheckpointError,
                "checkpoint of step 5 cannot be written.*to resume from step 4",
            ),
        ):
            self.train()
        directory = self.root / "run" / "checkpoints"
        self.assertEqual(checkpoints.steps(directory), [2, 3, 4])
        left = {p.name.partition(".")[0] for p in directory.iterdir()}
        self.assertEqual(left, {"checkpoint", "ckpt-2", "ckpt-3", "ckpt-4"})
        self.train()
        self.assertIn("resuming at step 4 of 8", self.lines)
        self.assert_same("run", self.final("whole"))

    def test_directory_that_cannot_be_written(self):
        # Root may write anywhere but there.
        outcome = programs.run("train", "--workdir=/proc/run", *FLAGS)
        self.assertEqual(outcome.code, 1)
        self.assertLen(outcome.err, 1)
        self.assertRegex(
            outcome.err[0],
            "work directory /proc/run cannot be written .*another by --workdir",
        )

    def test_directory_that_is_a_file(self):
        path = self.root / "run"
        path.write_text("mine")
        outcome = programs.run("train", f"--workdir={path}", *FLAGS)
        self.assertEqual(outcome.code, 1)
        self.assertLen(outcome.err, 1)
        self.assertIn("cannot be written", outcome.err[0])
        self.assertEqual(path.read_text(), "mine")

    def test_loss_that_is_no_number_leaves_the_checkpoints_before(self):
        recipe = dataclasses.replace(
            RECIPE,
            warmup_steps=4,
            warmup_learning_rate=0.1,
            learning_rate=1e38,
        )
        for _ in range(2):  # the next start ends the same way
            with self.assertRaisesRegex(
                loop.TrainingDivergedError,
                r"at step \d: the run diverged.*lower recipe.learning_rate",
            ):
                self.train(recipe=recipe)
        trained = trained_networks.load_workdir(self.root / "run")
        self.assertGreaterEqual(trained.step, 4)
        for weight in trained.model.weights:
            self.assertTrue(np.all(np.isfinite(weight)))

    @parameterized.parameters(((8, 8, 1),), ((None, None, 3),))
    def test_damaged_file_of_records(self, shape):
        directory = records.tfds_set(self, shape, train=40, test=9)
        path = max(
            Path(directory).rglob("*train.tfrecord*"),
            key=lambda path: path.stat().st_size,
        )
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 255
        path.write_bytes(content)
        outcome = programs.run(
            "train",
            *FLAGS,
            "--dataset=tiny",
            f"--data_dir={directory}",
            "--set=recipe.image_size=32",
            f"--workdir={self.root}/run",
        )
        self.assertNotEqual(outcome.code, 0)
        self.assertLen(outcome.err, 1)
        self.assertRegex(
            outcome.err[0],
            "the file of record .* of tiny/train is damaged .*prepare it again",
        )

    def test_machine_without_the_data_set(self):
        offline = urllib.error.URLError(socket.gaierror("no such host"))
        with mock.patch("urllib.request.urlopen", side_effect=offline):
            outcome = programs.run(
                "train",
                *FLAGS,
                "--dataset=cifar10",
                f"--data_dir={self.root}/none",
                f"--workdir={self.root}/run",
            )
        self.assertEqual(outcome.code, 1)
        self.assertLen(outcome.err, 1)
        self.assertRegex(
            outcome.err[0],
            "cifar10 is not in .*could not be downloaded.*tfds build cifar10",
        )
        self.assertFalse((self.root / "run").exists())

    def test_directory_of_another_version_says_so(self):
        self.train()
        path = self.root / "run" / "config.json"
        path.write_text(path.read_text().replace("label_smoothing", "smooth"))
        with self.assertRaisesRegex(
            workdirs.WorkdirError, "written by another version of keras_resnet"
        ):
            self.train()


class WorkersTest(absltest.TestCase):
    def setUp(self):
        super().setUp()
        self.root = Path(self.enter_context(tempfile.TemporaryDirectory()))

    def start(self, name, *arguments):
        flags = [
            f"--workdir={self.root}/{name}",
            "--model=tiny",
            "--batch_size=16",
            "--log_every=50",
            "--eval_every=100000",
            "--checkpoint_seconds=0.1",
            *arguments,
        ]
        started = runs.workers(self.root, 2, *flags)
        metrics = self.root / name / "metrics.csv"
        for run in started:
            run.wait_for(
                lambda: metrics.exists() and "\n50," in metrics.read_text()
            )
        return started

    @pytest.mark.slow
    def test_worker_that_is_killed_ends_the_others_with_one_line(self):
        for killed in (0, 1):
            started = self.start(f"run{killed}", "--steps=100000")
            started[killed].kill()
            other = started[1 - killed]
            self.assertEqual(other.wait(), 1, other.err)
            self.assertLen(other.err, 1, other.err)
            self.assertIn("another worker stopped responding", other.err[0])

    def test_worker_that_never_comes(self):
        address = runs.free_ports(1)[0]
        workers = [f"127.0.0.1:{address}", "127.0.0.1:1"]
        task = {"type": "worker", "index": 0}
        config = {"cluster": {"worker": workers}, "task": task}
        run = runs.train(
            self.root,
            f"--workdir={self.root}/run",
            "--connect_timeout=1",
            environment={"TF_CONFIG": json.dumps(config)},
        )
        self.assertEqual(run.wait(), 1)
        self.assertLen(run.err, 1, run.err)
        self.assertRegex(
            run.err[0],
            r"did not connect within 1 seconds.*number 1 \(127.0.0.1:1",
        )
        self.assertFalse((self.root / "run").exists())

    @pytest.mark.slow
    def test_link_that_is_cut_before_tensorflow_connects(self):
        """The first worker here leaves when both have met."""
        first, second = (f"127.0.0.1:{p}" for p in runs.free_ports(2))
        task = {"type": "worker", "index": 1}
        config = {"cluster": {"worker": [first, second]}, "task": task}
        run = runs.train(
            self.root,
            f"--workdir={self.root}/run",
            "--connect_timeout=3",
            environment={"TF_CONFIG": json.dumps(config)},
        )
        rendezvous.wait_for_workers([first, second], 0, 60)
        self.assertEqual(run.wait(), 1)
        for _ in range(200):  # a process of its own writes the line
            if run.err:
                break
            time.sleep(0.05)
        self.assertLen(run.err, 1, run.err)
        self.assertRegex(
            run.err[0],
            "^train: another worker stopped responding; start all workers "
            r".* \(TensorFlow waited 3 seconds\)$",
        )
        self.assertFalse((self.root / "run").exists())

    @pytest.mark.slow
    def test_worker_that_ends_before_the_first_step(self):
        """Its machine lacks the data, or has other flags."""
        first, second = runs.workers(
            self.root,
            2,
            f"--workdir={self.root}/run",
            "--model=tiny",
            each=[(), (f"--dataset=folder:{self.root}/none",)],
        )
        self.assertEqual([second.wait(), first.wait()], [1, 1])
        self.assertIn(f"{self.root}/none", second.err[-1])
        self.assertLen(first.err, 1, first.err)
        self.assertIn("another worker stopped responding", first.err[0])

    @pytest.mark.slow
    def test_worker_that_is_asked_to_stop_stops_all(self):
        started = self.start("run", "--steps=100000")
        started[1].send(15)
        self.assertEqual([run.wait() for run in started], [143, 143])
        (step,) = {run.err[-1].split("step ")[1][:5] for run in started}
        self.assertLen(started[0].err, 1)
        self.assertIn("the state is saved", started[0].err[0])
        newest = checkpoints.steps(self.root / "run" / "checkpoints")[-1]
        self.assertEqual(str(newest), step.partition(";")[0])

    @pytest.mark.slow
    def test_workers_with_directories_of_their_own(self):
        """A directory that is not shared would lose the run."""
        first = runs.train(
            self.root,
            f"--workdir={self.root}/0",
            "--model=tiny",
            "--batch_size=16",
            "--steps=8",
            "--checkpoint_seconds=0",
        )
        self.assertEqual(first.wait(), 0, first.err)
        both = runs.workers(
            self.root,
            2,
            "--model=tiny",
            "--batch_size=16",
            "--steps=8",
            each=[(f"--workdir={self.root}/{i}",) for i in range(2)],
        )
        self.assertEqual([run.wait() for run in both], [2, 2])
        for run in both:
            self.assertIn("must be the same for all workers", run.err[-1])


if __name__ == "__main__":
    absltest.main()
