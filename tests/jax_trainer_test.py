"""Training on JAX: the step, the draws, resume, files, rejected settings.

`make test-jax` runs it with KERAS_BACKEND=jax.
"""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from unittest import mock

import keras
import numpy as np
from absl.testing import absltest
from absl.testing import parameterized

from keras_resnet import baselines
from keras_resnet.data import augmentation
from keras_resnet.data import datasets
from keras_resnet.training import configs
from keras_resnet.training import interrupts
from keras_resnet.training import jax_trainer
from keras_resnet.training import workdirs
from tests import programs
from tests import runs
from tests import tiny_runs

RECIPE = tiny_runs.RECIPE.with_field("augmentation", "pad_crop_flip")


def config(recipe=RECIPE, **fields):
    return tiny_runs.config(recipe, **fields)


class TestCase(tiny_runs.TestCase):
    def setUp(self):
        super().setUp()
        if keras.backend.backend() != "jax":
            self.skipTest("KERAS_BACKEND is not jax")
        self.digits = datasets.load("digits")

    def run_of(self, *arguments, **fields):
        return jax_trainer.JaxTrainer(config(*arguments, **fields), self.digits)


class StepTest(TestCase):
    @parameterized.parameters("momentum", "nesterov", "adam")
    def test_steps_without_decay_are_those_of_fit(self, optimizer):
        """Weights and moving statistics, of three steps at three rates."""
        recipe = dataclasses.replace(
            RECIPE,
            weight_decay=0.0,
            optimizer=optimizer,
            decay_at_steps=(1, 2),
        )
        rates = keras.optimizers.schedules.PiecewiseConstantDecay(
            [0, 1], [0.1, 0.01, 0.001]
        )
        run = self.run_of(recipe)
        expected = configs.build_model(config(recipe), (8, 8, 1), 10)
        kept = {
            "momentum": lambda: keras.optimizers.SGD(rates, momentum=0.9),
            "nesterov": lambda: keras.optimizers.SGD(
                rates, momentum=0.9, nesterov=True
            ),
            "adam": lambda: keras.optimizers.Adam(rates, beta_1=0.9),
        }[optimizer]()
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        expected.compile(kept, loss)
        images, labels = self.digits.sample(10**6, training=True)
        for index in range(3):
            indices, *places = run.draw(index)
            x = run.augmented(images[indices], *places)
            result = expected.train_on_batch(np.array(x), labels[indices])
            run.clear_sums()
            run.take(1, False, 0.0)
            total, *_, count = run.read_sums()
            np.testing.assert_allclose(total / count, result, rtol=1e-4)
        for group, theirs in zip(
            run.state[:2],
            (expected.trainable_variables, expected.non_trainable_variables),
            strict=True,
        ):
            for value, variable in zip(group, theirs, strict=True):
                np.testing.assert_allclose(
                    value, variable, rtol=1e-3, atol=1e-4, err_msg=variable.path
                )

    def test_steps_in_one_program_are_those_of_several(self):
        """As an accelerator has them: two programs of 2, and one of 1."""
        one, several = self.run_of(), self.run_of()
        for _ in range(5):
            one.take(1, False, 0.0)
        with mock.patch.object(jax_trainer, "_program_steps", lambda: 2):
            several.take(5, False, 0.0)
        self.assertEqual(set(one.programs), {1})
        self.assertEqual(set(several.programs), {1, 2})
        self.assertEqual(several.completed_steps, 5)
        np.testing.assert_allclose(one.read_sums(), several.read_sums(), 1e-5)
        for group, others in zip(one.state, several.state, strict=True):
            for value, other in zip(group, others, strict=True):
                np.testing.assert_allclose(value, other, rtol=1e-3, atol=1e-5)

    def test_equal_micro_batches_are_one_of_them(self):
        """The mean loss, the gradients and the statistics are the same."""
        one = self.run_of()
        two = self.run_of(
            dataclasses.replace(RECIPE, batch_size=32, micro_batches=2)
        )
        draw = one.draw
        with mock.patch.object(
            two,
            "draw",
            lambda index: [np.concatenate([v, v]) for v in draw(index)],
        ):
            for run in (one, two):
                run.take(3, False, 0.0)
        np.testing.assert_allclose(
            2 * np.array(one.read_sums()), two.read_sums(), 1e-4
        )
        for group, others in zip(one.state, two.state, strict=True):
            for value, other in zip(group, others, strict=True):
                np.testing.assert_allclose(value, other, rtol=1e-3, atol=1e-5)

    @parameterized.parameters((True, ""), (False, "kernel"))
    def test_decay_is_a_part_of_the_gradient(self, decay_norms, suffix):
        """After one step, w differs by rate * decay * w, [1, Sec. 3.4]."""
        after = []
        for weight_decay in (0.0, 0.5):
            recipe = dataclasses.replace(
                RECIPE, weight_decay=weight_decay, decay_norms=decay_norms
            )
            run = self.run_of(recipe)
            before = [np.array(w) for w in run.state[0]]
            run.take(1, False, 0.0)
            after.append([np.array(w) for w in run.state[0]])
        for variable, w, none, some in zip(
            run.model.trainable_variables, before, *after, strict=True
        ):
            share = 0.5 * 0.1 if variable.name.endswith(suffix) else 0.0
            np.testing.assert_allclose(
                some - none, -share * w, atol=1e-5, err_msg=variable.path
            )

    def test_companions_count(self):
        """It adds 0.3 log 10 nats at the start, and learns."""
        self.enter_context(
            mock.patch.dict(baselines.BASELINES, {"companion": runs.COMPANION})
        )
        described = configs.Config("companion", "digits", RECIPE)
        run = jax_trainer.JaxTrainer(described, self.digits)
        images, labels = np.zeros((4, 8, 8, 1), "float32"), np.arange(4)
        logits = run.model(images, training=True)
        alone = keras.ops.sparse_categorical_crossentropy(
            labels, logits, from_logits=True
        )
        total = run.step.losses(labels, logits)
        np.testing.assert_allclose(total - alone, 0.3 * np.log(10), rtol=1e-2)
        before = [np.array(w) for w in run.state[0]]
        run.take(1, False, 0.0)
        for variable, w, moved in zip(
            run.model.trainable_variables, before, run.state[0], strict=True
        ):
            if "classifier" in variable.path:
                self.assertGreater(np.abs(moved - w).max(), 0, variable.path)


class DrawsTest(TestCase):
    def test_an_epoch_has_each_image_once_in_an_order_of_its_own(self):
        run = self.run_of(dataclasses.replace(RECIPE, batch_size=103))
        self.assertEqual(14 * 103, self.digits.train_size)  # 1,442 images
        orders = []
        for epoch in range(2):
            steps = range(14 * epoch, 14 * (epoch + 1))
            order = np.concatenate([run.draw(step)[0] for step in steps])
            np.testing.assert_array_equal(np.sort(order), np.arange(1442))
            orders.append(order)
        self.assertLess(np.mean(orders[0] == orders[1]), 0.01)

    def test_batches_go_on_over_the_end_of_an_epoch(self):
        run = self.run_of(dataclasses.replace(RECIPE, batch_size=1000))
        steps = [run.draw(step)[0] for step in range(3)]
        order = np.concatenate(steps)
        np.testing.assert_array_equal(np.sort(order[:1442]), np.arange(1442))
        np.testing.assert_array_equal(
            np.sort(order[1442:2884]), np.arange(1442)
        )

    def test_crops_and_mirrorings_are_uniform(self):
        run = self.run_of()
        draws = [run.draw(step)[1:] for step in range(500)]
        top, left, is_flipped = map(np.concatenate, zip(*draws, strict=True))
        for crop in (top, left):  # an eighth of 8 pixels on each side
            np.testing.assert_allclose(
                np.bincount(crop) / crop.size, [1 / 3] * 3, atol=0.03
            )
        self.assertBetween(is_flipped.mean(), 0.47, 0.53)
        self.assertLess(abs(np.corrcoef(top, left)[0, 1]), 0.05)

    @parameterized.parameters("pad_crop_flip", "pad_crop", "none")
    def test_images_are_those_of_training_data(self, name):
        """The crops of `training.data` for the same draws."""
        run = self.run_of(RECIPE.with_field("augmentation", name))
        images, _ = self.digits.sample(16, training=True)
        _, top, left, is_flipped = run.draw(5)
        expected = self.digits.preprocessing(images)
        if name != "none":
            is_mirrored = is_flipped & (name == "pad_crop_flip")
            expected = augmentation.pad_crop(expected, top, left, is_mirrored)
        got = run.augmented(images, top, left, is_flipped)
        np.testing.assert_allclose(got, expected, atol=1e-6)


class RunTest(TestCase):
    def test_stopped_run_ends_with_the_bits_of_one_that_was_not(self):
        """With random layers, whose seeds are a part of the state."""
        described = config(model_arguments={"shortcut": "dropout"})
        whole = self.workdir.with_name("whole")
        self.train(described, whole)
        with self.assertRaises(interrupts.Interrupted) as caught:
            self.train(described, report=_signal)
        stopped_at = caught.exception.step
        self.assertBetween(stopped_at, 2, 7)
        lines = []
        self.train(described, report=lines.append)
        self.assertEqual(lines[0], f"resuming at step {stopped_at} of 8")
        self.assert_same_run(self.workdir, whole)

    def test_damaged_checkpoint_is_passed_over(self):
        described = config()
        self.train(described, checkpoint_seconds=0.0)
        before = self.workdir.with_name("before")
        shutil.copytree(self.workdir, before)
        (last,) = self.workdir.glob("checkpoints/ckpt-8.data*")
        last.write_bytes(last.read_bytes()[:-1000])
        lines = []
        self.train(described, report=lines.append)
        self.assertIn("ckpt-8 is damaged", lines[0])
        self.assert_same_run(self.workdir, before)

    @parameterized.parameters("float32", "mixed_bfloat16")
    def test_what_it_leaves_has_the_error_that_it_told(self, dtype):
        """The program that evaluates it, on TensorFlow, agrees."""
        recipe = RECIPE.with_steps(100).with_field("augmentation", "pad_crop")
        result = self.train(config(recipe, dtype=dtype), log_every=20)
        self.assertEqual(result["test_images"], 355)
        self.assertLess(result["train_loss"], 2.0)  # chance is ln 10 = 2.3
        code = (
            "import keras_resnet; from apps import command_line, evaluate; "
            f"keras_resnet.MODELS['tiny'] = keras_resnet.{runs.TINY}; "
            "evaluate.cli()"
        )
        told = subprocess.run(
            [sys.executable, "-c", code, f"--workdir={self.workdir}"],
            check=True,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "KERAS_BACKEND": "tensorflow"},
        ).stdout
        found = json.loads(told.splitlines()[-1])
        is_half = dtype != "float32"
        self.assertAlmostEqual(
            found["top1_error"],
            result["test_top1_error"],
            delta=1.5 * is_half + 1e-4,
        )
        self.assertAlmostEqual(
            found["loss"], result["test_loss"], delta=0.05 * is_half + 1e-4
        )

    def test_images_that_fill_up_a_batch_do_not_count(self):
        run = self.run_of()
        whole, parts = (run.evaluate(size, bool) for size in (355, 100))
        self.assertEqual(parts.images, 355)
        self.assertEqual(parts.top1_errors, whole.top1_errors)
        self.assertAlmostEqual(parts.loss, whole.loss, 5)

    def test_run_of_another_backend_is_refused(self):
        with self.assertRaisesRegex(ImportError, "needs Keras on TensorFlow"):
            self.train(config(backend="tensorflow"))
        self.assertFalse(self.workdir.exists())
        self.train(config())
        path = self.workdir / "config.json"
        path.write_text(path.read_text().replace('"jax"', '"tensorflow"'))
        with self.assertRaisesRegex(
            workdirs.WorkdirError, "backend was 'tensorflow', is 'jax'"
        ):
            self.train(config())

    @parameterized.parameters(
        ("dtype", {"dtype": "mixed_float16"}, {}),
        ("deterministic", {"deterministic": True}, {}),
        ("sync_batch_norm", {"sync_batch_norm": True}, {}),
        ("recipe.average_momentum", {}, {"average_momentum": "0.9"}),
        ("recipe.augmentation", {}, {"augmentation": "scale_jitter"}),
        ("recipe.policy", {}, {"policy": "trivial_augment_wide"}),
        ("recipe.mixup_alpha", {}, {"mixup_alpha": "0.2"}),
        ("recipe.repeats", {}, {"repeats": "2"}),
        ("recipe.train_image_size", {}, {"train_image_size": "4"}),
        ("recipe.progressive_sizes", {}, {"progressive_sizes": "[4, 8]"}),
    )
    def test_what_is_for_tensorflow_is_refused(self, name, fields, changes):
        recipe = RECIPE
        for field, text in changes.items():
            recipe = recipe.with_field(field, text)
        with self.assertRaisesRegex(ValueError, f"on JAX {name} must be"):
            self.train(config(recipe, **fields))
        self.assertFalse(self.workdir.exists())


class ProgramTest(TestCase):
    def test_program_trains_and_says_what_is_next(self):
        outcome = programs.run(
            "train", "--model=tiny", "--steps=2", f"--workdir={self.workdir}"
        )
        self.assertEqual(outcome.code, 0, outcome.err)
        self.assertIn("test error", outcome.out[-4])
        self.assertIn("KERAS_BACKEND=tensorflow python", outcome.out[-3])

    def test_flags_of_several_devices_are_refused(self):
        outcome = programs.run("train", "--num_devices=2")
        self.assertEqual(outcome.code, 2)
        (line,) = outcome.err
        self.assertIn("--num_devices=2: on JAX one device trains", line)

    @parameterized.parameters(
        ("--dtype=float64",) * 2,
        ("--deterministic", "--deterministic=True"),
        ("--set=recipe.average_momentum=0.9",) * 2,
    )
    def test_flags_for_tensorflow_are_named(self, flag, named):
        outcome = programs.run("train", f"--workdir={self.workdir}", flag)
        self.assertEqual(outcome.code, 2)
        (line,) = outcome.err
        self.assertIn(f"{named}: on JAX", line)


def _signal(line):
    if line.startswith("step "):  # a row, and not a line before the first step
        os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    absltest.main()
