"""A step that cannot fit in memory is rejected before it starts."""

import dataclasses
import pathlib
import tempfile
from unittest import mock

import tensorflow as tf
from absl.testing import absltest
from absl.testing import parameterized

import keras_resnet
from keras_resnet.training import configs
from keras_resnet.training import memory
from keras_resnet.training import recipes
from tests import programs
from tests import runs
from tests import tiny_runs

GB = 10**9


def config(batch_size=64, micro_batches=1, **arguments):
    recipe = dataclasses.replace(
        recipes.RECIPES["digits"],
        batch_size=batch_size,
        micro_batches=micro_batches,
    )
    return configs.Config("tiny", "digits", recipe, arguments)


class AvailableTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.root = pathlib.Path(
            self.enter_context(tempfile.TemporaryDirectory())
        )
        for name in ("_PROCESS", "_CGROUPS"):
            self.enter_context(
                mock.patch.object(memory, name, self.root / name)
            )
        self.write(
            "_PROCESS/meminfo",
            "MemTotal: 9 kB\nMemAvailable:  5000000 kB\nSwapFree: 1000 kB\n",
        )

    def write(self, name, text):
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def test_is_that_of_the_machine(self):
        self.assertEqual(memory.available_bytes(), 5_001_000 * 1024)

    def test_is_unknown_without_linux(self):
        (self.root / "_PROCESS/meminfo").unlink()
        self.assertIsNone(memory.available_bytes())

    @parameterized.parameters(
        ("0::/a/b\n", "a", "memory.max", "anon"),
        (
            "3:cpu,memory:/a/b\n1:cpu:/\n",
            "memory/a",
            "memory.limit_in_bytes",
            "total_rss",
        ),
    )
    def test_is_what_control_groups_leave(self, groups, group, limit, used):
        self.write("_PROCESS/self/cgroup", groups)
        folder = f"_CGROUPS/{group}"
        self.write(f"{folder}/b/{limit}", "max\n")
        self.write(f"{folder}/{limit}", f"{3 * GB}\n")
        self.write(f"{folder}/memory.stat", f"{used} {GB}\nfile {GB}\n")
        self.assertEqual(memory.available_bytes(), 2 * GB + 1000 * 1024)

    def test_accelerators_have_their_own(self):
        device = mock.Mock(device_type="GPU")
        with mock.patch.object(
            tf.config, "list_logical_devices", return_value=[device]
        ):
            self.assertIsNone(memory.available_bytes())


class CheckTest(parameterized.TestCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        patch = mock.patch.dict(keras_resnet.MODELS, {"tiny": runs.TINY})
        patch.start()
        cls.addClassCleanup(patch.stop)
        cls.model = configs.build_model(config(), (8, 8, 1), 10)

    def least(self, config, **arguments):
        """The least memory, to one byte, that a check accepts."""
        low, high = 0, 10**15
        while low < high:
            middle = (low + high) // 2
            try:
                memory.check_training(
                    config, self.model, available=middle, **arguments
                )
                high = middle
            except memory.DoesNotFitError:
                low = middle + 1
        return low

    def test_grows_with_the_batch_and_shrinks_with_its_parts(self):
        one, two = self.least(config(64)), self.least(config(128))
        gradients = 4 * sum(
            w.numpy().size for w in self.model.trainable_weights
        )
        self.assertEqual(two - gradients, 2 * (one - gradients))
        self.assertLess(self.least(config(64, micro_batches=4)), one)
        self.assertLess(self.least(config(64, remat=True)), one)
        self.assertEqual(
            self.least(config(64), workers=2), self.least(config(32))
        )

    def test_is_at_most_what_a_step_takes(self):
        """The images and the outputs of the convolutions, at the least."""
        rows = memory._rows(self.model)
        kept = sum(row["activation_bytes"] for row in rows)
        least = self.least(config(64))
        self.assertLess(least, 64 * (kept + 4 * 64) + GB // 1000)
        self.assertGreater(least, 64 * kept // 2)

    def test_says_what_fits(self):
        with self.assertRaises(memory.DoesNotFitError) as raised:
            memory.check_training(config(2**40), self.model, available=GB)
        self.assertEqual(raised.exception.field, "batch_size")
        found = str(raised.exception)
        self.assertIn("GB of memory, 1.0 GB are available", found)
        fitting = int(found.split("--batch_size=")[1].split()[0])
        memory.check_training(config(fitting), self.model, available=GB)
        with self.assertRaises(memory.DoesNotFitError):
            memory.check_training(
                config(fitting + 10), self.model, available=GB
            )

    def test_one_image_that_does_not_fit(self):
        with self.assertRaisesRegex(
            memory.DoesNotFitError, "too few for one image.*image_size"
        ) as raised:
            memory.check_training(config(4), self.model, available=1000)
        self.assertEqual(raised.exception.field, "image_size")

    def test_batch_of_an_evaluation(self):
        memory.check_evaluation((8, 8, 1), 1000, self.model, available=GB)
        for model in (self.model, None):
            with self.assertRaisesRegex(
                memory.DoesNotFitError, "--batch_size=.* or less"
            ):
                memory.check_evaluation((8, 8, 1), 10**9, model, available=GB)


class ProgramTest(tiny_runs.TestCase):
    def assert_refused(self, line, *arguments):
        outcome = programs.run("train", f"--workdir={self.workdir}", *arguments)
        self.assertEqual(outcome.code, 2)
        self.assertLen(outcome.err, 1)
        self.assertRegex(outcome.err[0], line)

    def test_batch_of_more_images_than_there_are(self):
        for size in (1443, 99999999999, 10**40):
            for flag in ("--batch_size", "--set=recipe.batch_size"):
                self.assert_refused(
                    f"{flag}={size}: must be at most 1442, the number of",
                    "--model=tiny",
                    f"{flag}={size}",
                )
        self.assertFalse(self.workdir.exists())

    def test_step_that_does_not_fit(self):
        with mock.patch.object(memory, "available_bytes", return_value=GB):
            self.assert_refused(
                "--batch_size=1024: .* GB of memory, 1.0 GB are available",
                "--model=tiny",
                "--batch_size=1024",
                "--set=recipe.image_size=200",
            )
            self.assert_refused(
                "--set=recipe.image_size=9000: .*too few for one image",
                "--model=tiny",
                "--set=recipe.image_size=9000",
            )
        self.assertFalse(self.workdir.exists())

    def test_sizes_that_no_image_has(self):
        for size in (16385, 10**30):
            self.assert_refused(
                f"recipe.image_size={size}: image_size must be 1 to 16384",
                "--model=tiny",
                f"--set=recipe.image_size={size}",
            )
        self.assert_refused(
            "recipe.image_size=5000: image_size must be at most",
            "--model=tiny",
            "--dataset=synthetic",
            "--set=recipe.image_size=5000",
        )


if __name__ == "__main__":
    absltest.main()
