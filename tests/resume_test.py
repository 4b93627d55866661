"""A run that was killed anywhere ends with the bits of one that was not."""

import os
import random
import shutil
import signal
import tempfile
import time
from pathlib import Path

import pytest
from absl.testing import absltest
from absl.testing import parameterized

from keras_resnet.training import checkpoints
from tests import runs

STEPS = 24
RUN = (
    "--model=tiny",
    "--batch_size=16",
    f"--steps={STEPS}",
    "--log_every=6",
    "--eval_every=12",
    "--deterministic",
    "--checkpoint_seconds=0",
    # Random layers, whose seeds must resume too.
    "--set=model.shortcut=dropout",
    "--set=model.survival_probability=0.8",
)


class RunsTest(parameterized.TestCase):
    """Starts runs, kills them, compares what they leave."""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        folder = tempfile.TemporaryDirectory()
        cls.addClassCleanup(folder.cleanup)
        cls.folder = Path(folder.name)
        cls.wholes = {}  # what runs left that nothing stopped

    def setUp(self):
        super().setUp()
        self.root = Path(self.enter_context(tempfile.TemporaryDirectory()))
        self.arguments = list(RUN)
        self.environment = {}
        self.count = 1

    def start(self, name="run"):
        """The processes of a run, one for each worker."""
        arguments = [f"--workdir={self.root}/{name}", *self.arguments]
        if self.count > 1:
            return runs.workers(
                self.root,
                self.count,
                *arguments,
                environment=self.environment,
            )
        return [runs.train(self.root, *arguments, environment=self.environment)]

    def finish(self, name="run"):
        started = self.start(name)
        codes = [run.wait() for run in started]
        self.assertEqual(codes, [0] * self.count, [r.err for r in started])
        return started[0]

    def finish_whole(self):
        """A run that nothing stops; of each kind there is one."""
        kind = (self.count, *self.arguments)
        if kind not in self.wholes:
            self.finish("whole")
            kept = self.folder / str(len(self.wholes))
            self.wholes[kind] = shutil.copytree(self.root / "whole", kept)
        else:
            shutil.copytree(self.wholes[kind], self.root / "whole")

    def final(self, name="run"):
        """The bytes of what a run leaves, by name."""
        workdir = self.root / name
        steps = checkpoints.steps(workdir / "checkpoints")
        self.assertEqual(steps[-1], STEPS)
        paths = [
            *workdir.glob(f"checkpoints/ckpt-{STEPS}.*"),
            *workdir.glob("best/ckpt-*"),
            *workdir.glob("*.csv"),
            *workdir.glob("*.json"),
        ]
        files = {str(p.relative_to(workdir)): p.read_bytes() for p in paths}
        self.assertLen(files, 2 + 2 + 1 + 2)
        return files

    def differences(self):
        got, expected = self.final(), self.final("whole")
        return [
            name
            for name in sorted(got.keys() | expected.keys())
            if got.get(name) != expected.get(name)
        ]

    def kill_at_random(self, seed, trials):
        """Kills, starts again to the end, compares; how many were equal."""
        self.finish_whole()
        rng = random.Random(seed)
        equal, killed_at, torn = 0, [], 0
        for trial in range(trials):
            shutil.rmtree(self.root / "run", ignore_errors=True)
            directory = self.root / "run" / "checkpoints"
            started = self.start()
            # A tenth of them before anything is saved; else after a random
            # step, every other time as soon as there is a part of the next
            # checkpoint.
            step = rng.randrange(-STEPS // 10, STEPS - 1)
            if step > 0:
                started[0].wait_for(
                    lambda d=directory, s=step: checkpoints.steps(d)[-1:] >= [s]
                )
            if trial % 2:
                started[0].wait_for(lambda d=directory: parts(d), pause=0)
            else:
                time.sleep(rng.uniform(0, 0.05 if step > 0 else 3))
            for run in started:
                run.kill()
            steps = checkpoints.steps(directory)
            killed_at.append(steps[-1] if steps else 0)
            torn += bool(parts(directory))
            self.finish()
            equal += not self.differences()
        print(
            f"{equal} of {trials} equal; killed after steps {killed_at}, "
            f"{torn} of them inside a save"
        )
        return equal


class ResumeTest(RunsTest):
    trials = 2

    @parameterized.parameters(
        (),
        ("--num_devices=2",),
        ("--set=model.looped=true", "--set=model.remat=true"),
    )
    @pytest.mark.slow
    def test_killed_run_ends_with_the_same_bytes(self, *flags):
        """Law 5 of the design."""
        self.arguments += flags
        equal = self.kill_at_random(seed=0, trials=self.trials)
        self.assertEqual(equal, self.trials)

    @parameterized.parameters(signal.SIGTERM, signal.SIGINT)
    @pytest.mark.slow
    def test_signal_saves_and_the_run_resumes(self, number):
        self.finish_whole()
        (run,) = self.start()
        metrics = self.root / "run" / "metrics.csv"
        run.wait_for(lambda: metrics.exists() and "\n6," in metrics.read_text())
        run.send(number)
        self.assertEqual(run.wait(), 128 + number)
        self.assertLen(run.err, 1)
        self.assertRegex(
            run.err[0], r"stopped at step \d+; the state is saved; run the same"
        )
        again = self.finish()
        self.assertRegex(
            "\n".join(again.out), rf"resuming at step \d+ of {STEPS}"
        )
        self.assertEqual(self.differences(), [])


@pytest.mark.large
@absltest.skipUnless(os.path.isdir(runs.CIFAR10), "needs CIFAR-10")
class KillTest(RunsTest):
    """The same of runs on CIFAR-10, more often, and of two workers."""

    def setUp(self):
        super().setUp()
        self.arguments += ["--dataset=cifar10", f"--data_dir={runs.CIFAR10}"]
        self.environment = {
            "DECODED": self.enter_context(tempfile.TemporaryDirectory())
        }

    @parameterized.parameters(
        ((), 1, 20), (("--num_devices=2",), 1, 20), ((), 2, 5)
    )
    def test_killed_run_ends_with_the_same_bytes(self, flags, count, trials):
        self.arguments += flags
        self.count = count
        self.assertEqual(self.kill_at_random(1, trials), trials)

    def test_killed_export_is_made_again(self):
        self.finish("whole")
        flags = [f"--workdir={self.root}/whole", "--export_dir"]
        expected = self.export(*flags, f"{self.root}/expected")
        rng = random.Random(2)
        torn = 0
        for trial in range(5):
            place = self.root / f"export{trial}"
            run = runs.Process(self.root, "export", [*flags, str(place)])
            if trial:
                run.wait_for(place.exists)
            time.sleep(rng.uniform(0, 1 if trial else 5))
            run.kill()
            torn += any(not p.name.isdigit() for p in place.glob("*"))
            whole = [p for p in place.glob("*") if p.name.isdigit()]
            for version in whole:
                self.assertEqual(names(version), expected)
            self.assertEqual(self.export(*flags, str(place)), expected)
        print(f"5 of 5 exports made again, {torn} killed while they were made")

    def export(self, *flags):
        """The names of the files of a new version."""
        run = runs.Process(self.root, "export", flags)
        self.assertEqual(run.wait(), 0, run.err)
        versions = [p for p in Path(flags[-1]).iterdir() if p.name.isdigit()]
        return names(max(versions, key=lambda path: int(path.name)))


def parts(directory):
    """The files of checkpoints that are not whole."""
    whole = {f"ckpt-{step}" for step in checkpoints.steps(directory)}
    return [
        path.name
        for path in directory.glob("ckpt-*")
        if path.name.partition(".")[0] not in whole
    ]


def names(directory):
    return sorted(
        str(path.relative_to(directory)) for path in directory.rglob("*")
    )


if __name__ == "__main__":
    absltest.main()
