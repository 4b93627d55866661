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

STEPS = 40
RUN = (
    "--model=tiny",
    "--batch_size=16",
    f"--steps={STEPS}",
    "--log_every=10",
    "--eval_every=20",
    "--deterministic",
    "--checkpoint_seconds=0",
    # Random layers, whose seeds have to go on too.
    "--set=model.shortcut=dropout",
    "--set=model.survival_probability=0.8",
)


class ResumeTest(parameterized.TestCase):
    trials = 2

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
        for _ in range(trials):
            shutil.rmtree(self.root / "run", ignore_errors=True)
            directory = self.root / "run" / "checkpoints"
            started = self.start()
            # A tenth of them before anything is saved, else in or after the
            # save of a random step.
            step = rng.randrange(-STEPS // 10, STEPS)
            if step > 0:
                started[0].wait_for(
                    lambda d=directory, s=step: checkpoints.steps(d)[-1:] >= [s]
                )
            time.sleep(rng.uniform(0, 0.05 if step > 0 else 3))
            for run in started:
                run.kill()
            steps = checkpoints.steps(directory)
            killed_at.append(steps[-1] if steps else 0)
            whole = {f"ckpt-{step}" for step in steps} | {"checkpoint"}
            torn += any(
                path.name.partition(".")[0] not in whole
                for path in directory.glob("*")
            )
            self.finish()
            equal += not self.differences()
        print(
            f"{equal} of {trials} equal; killed after steps {killed_at}, "
            f"{torn} of them inside a save"
        )
        return equal

    @parameterized.parameters("one", "mirrored")
    def test_killed_run_ends_with_the_same_bytes(self, devices):
        """Law 5 of the design."""
        if devices == "mirrored":
            self.arguments.append("--num_devices=2")
        equal = self.kill_at_random(seed=0, trials=self.trials)
        self.assertEqual(equal, self.trials)

    @parameterized.parameters(signal.SIGTERM, signal.SIGINT)
    def test_signal_saves_and_the_run_goes_on(self, number):
        self.finish_whole()
        (run,) = self.start()
        metrics = self.root / "run" / "metrics.csv"
        run.wait_for(
            lambda: metrics.exists() and "\n10," in metrics.read_text()
        )
        run.send(number)
        self.assertEqual(run.wait(), 128 + number)
        self.assertLen(run.err, 1)
        self.assertRegex(
            run.err[0], r"stopped at step \d+; the state is saved; the same"
        )
        again = self.finish()
        self.assertRegex("\n".join(again.out), r"goes on at step \d+ of 40")
        self.assertEqual(self.differences(), [])


@pytest.mark.large
@absltest.skipUnless(os.path.isdir(runs.CIFAR10), "needs CIFAR-10")
class KillTest(ResumeTest):
    """The same, 20 times each, of runs on CIFAR-10; of two workers 5 times."""

    trials = 20

    def setUp(self):
        super().setUp()
        self.arguments += ["--dataset=cifar10", f"--data_dir={runs.CIFAR10}"]
        self.environment = {
            "DECODED": self.enter_context(tempfile.TemporaryDirectory())
        }

    def test_killed_workers_end_with_the_same_bytes(self):
        self.count = 2
        self.assertEqual(self.kill_at_random(seed=1, trials=5), 5)

    def test_killed_export_is_made_again(self):
        self.finish("whole")
        flags = [f"--workdir={self.root}/whole", "--export_dir"]
        expected = self.export(*flags, f"{self.root}/expected")
        rng = random.Random(2)
        for trial in range(5):
            place = self.root / f"export{trial}"
            run = runs.Run(self.root, "export", [*flags, str(place)])
            if trial:
                run.wait_for(place.exists)
            time.sleep(rng.uniform(0, 1 if trial else 5))
            run.kill()
            whole = [p for p in place.glob("*") if p.name.isdigit()]
            for version in whole:
                self.assertEqual(names(version), expected)
            self.assertEqual(self.export(*flags, str(place)), expected)

    def export(self, *flags):
        """The names of the files of a new version."""
        run = runs.Run(self.root, "export", flags)
        self.assertEqual(run.wait(), 0, run.err)
        versions = [p for p in Path(flags[-1]).iterdir() if p.name.isdigit()]
        return names(max(versions, key=lambda path: int(path.name)))


def names(directory):
    return sorted(
        str(path.relative_to(directory)) for path in directory.rglob("*")
    )


if __name__ == "__main__":
    absltest.main()
