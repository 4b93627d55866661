"""Training on JAX: the step, the draws, resume, what it leaves and refuses.

`make test-jax` runs it with KERAS_BACKEND=jax.
"""

import dataclasses
import os
import signal
import tempfile
from pathlib import Path
from unittest import mock

import keras
import numpy as np
from absl.testing import absltest
from absl.testing import parameterized

import keras_resnet
from keras_resnet import baselines
from keras_resnet.training import augmentation
from keras_resnet.training import configs
from keras_resnet.training import data
from keras_resnet.training import interruption
from keras_resnet.training import jax_loop
from keras_resnet.training import losses
from keras_resnet.training import recipes
from keras_resnet.training import workdirs
from tests import programs

TINY = keras_resnet.Spec(
    "tiny", (1, 1), (4, 8), stem="cifar", classes=10, image_size=8
)
RECIPE = dataclasses.replace(
    recipes.RECIPES["digits"].with_steps(8),
    batch_size=16,
    augmentation="pad_crop_flip",
)


def config(recipe=RECIPE, model="tiny", **fields):
    return configs.Config(model, "digits", recipe, **fields)


def quiet(line):
    """Takes a line that is meant for people."""


class TestCase(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        if keras.backend.backend() != "jax":
            self.skipTest("KERAS_BACKEND is not jax")
        self.enter_context(mock.patch.dict(keras_resnet.MODELS, {"tiny": TINY}))
        root = self.enter_context(tempfile.TemporaryDirectory())
        self.workdir = Path(root) / "run"
        self.digits = data.load("digits")

    def train(self, config, workdir=None, **arguments):
        arguments = {"report": quiet, "log_every": 2, **arguments}
        return jax_loop.train_and_evaluate(
            config, workdir or self.workdir, self.digits, **arguments
        )

    def run_of(self, *arguments, **fields):
        return jax_loop._Run(config(*arguments, **fields), self.digits)


class StepTest(TestCase):
    @parameterized.parameters("momentum", "nesterov", "adam")
    def test_steps_without_decay_are_those_of_fit(self, optimizer):
        """Weights, moving statistics and the optimizer's own, of three."""
        recipe = dataclasses.replace(
            RECIPE, weight_decay=0.0, optimizer=optimizer
        )
        run = self.run_of(recipe)
        expected = configs.build_model(config(recipe), (8, 8, 1), 10)
        kept = {
            "momentum": lambda: keras.optimizers.SGD(0.1, momentum=0.9),
            "nesterov": lambda: keras.optimizers.SGD(
                0.1, momentum=0.9, nesterov=True
            ),
            "adam": lambda: keras.optimizers.Adam(0.1, beta_1=0.9),
        }[optimizer]()
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        expected.compile(kept, loss)
        images, labels = self.digits.sample(10**6, training=True)
        for step in range(3):
            indices, *places = run._draw(step)
            x = run._augmented(images[indices], *places)
            result = expected.train_on_batch(np.array(x), labels[indices])
            sums = run.advance(step, step + 1)
            np.testing.assert_allclose(sums[0] / sums[3], result, rtol=1e-4)
        run.save_weights(self.workdir.with_suffix(".weights.h5"))
        for mine, theirs in zip(
            run.model.weights, expected.weights, strict=True
        ):
            np.testing.assert_allclose(
                mine, theirs, rtol=1e-3, atol=1e-4, err_msg=theirs.path
            )

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
            run.advance(0, 1)
            after.append([np.array(w) for w in run.state[0]])
        for variable, w, none, some in zip(
            run.model.trainable_variables, before, *after, strict=True
        ):
            share = 0.5 * 0.1 if variable.name.endswith(suffix) else 0.0
            np.testing.assert_allclose(
                some - none, -share * w, atol=1e-5, err_msg=variable.path
            )

    def test_companions_count(self):
        """Each adds 0.3 log 10 nats at the start, and learns."""
        network = baselines.Baseline("companions", 3, _companions, 0.0, "")
        self.enter_context(
            mock.patch.dict(baselines.BASELINES, {"companions": network})
        )
        run = self.run_of(model="companions")
        images, labels = np.zeros((4, 8, 8, 1), "float32"), np.arange(4)
        logits = run.model(images, training=True)
        alone = keras.ops.sparse_categorical_crossentropy(
            labels, logits, from_logits=True
        )
        total = losses.of_network(RECIPE, run.model, labels, logits)
        np.testing.assert_allclose(total - alone, 0.6 * np.log(10), rtol=1e-2)
        before = [np.array(w) for w in run.state[0]]
        run.advance(0, 1)
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
            order = np.concatenate([run._draw(step)[0] for step in steps])
            np.testing.assert_array_equal(np.sort(order), np.arange(1442))
            orders.append(order)
        self.assertLess(np.mean(orders[0] == orders[1]), 0.01)

    def test_batches_go_on_over_the_end_of_an_epoch(self):
        run = self.run_of(dataclasses.replace(RECIPE, batch_size=1000))
        steps = [run._draw(step)[0] for step in range(3)]
        order = np.concatenate(steps)
        np.testing.assert_array_equal(np.sort(order[:1442]), np.arange(1442))
        np.testing.assert_array_equal(
            np.sort(order[1442:2884]), np.arange(1442)
        )

    def test_crops_and_mirrorings_are_uniform(self):
        run = self.run_of()
        draws = [run._draw(step)[1:] for step in range(500)]
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
        run = self.run_of(dataclasses.replace(RECIPE, augmentation=name))
        images, _ = self.digits.sample(16, training=True)
        _, top, left, is_flipped = run._draw(5)
        expected = self.digits.preprocessing(images)
        if name != "none":
            is_mirrored = is_flipped & (name == "pad_crop_flip")
            expected = augmentation.pad_crop(expected, top, left, is_mirrored)
        got = run._augmented(images, top, left, is_flipped)
        np.testing.assert_allclose(got, expected, atol=1e-6)


class RunTest(TestCase):
    def test_stopped_run_ends_with_the_bits_of_one_that_was_not(self):
        """With random layers, whose seeds are a part of the state."""
        described = config(model_arguments={"shortcut": "dropout"})
        whole = self.workdir.with_name("whole")
        self.train(described, whole)
        with self.assertRaises(interruption.Interrupted) as caught:
            self.train(described, report=_signal)
        self.assertEqual(caught.exception.step, 2)
        lines = []
        self.train(described, report=lines.append)
        self.assertEqual(lines[0], "goes on at step 2 of 8")
        expected, got = (
            np.load(folder / "state.npz") for folder in (whole, self.workdir)
        )
        self.assertEqual(expected.files, got.files)
        for name in expected.files:
            np.testing.assert_array_equal(got[name], expected[name])
        self.assertEqual(
            (self.workdir / "metrics.csv").read_bytes(),
            (whole / "metrics.csv").read_bytes(),
        )

    def test_finished_run_is_not_trained_again(self):
        first = self.train(config())
        again = self.train(config())
        self.assertEqual(first["test_loss"], again["test_loss"])
        self.assertIsNone(again["images_per_second"])

    @parameterized.parameters("float32", "mixed_bfloat16")
    def test_what_it_leaves_has_the_error_that_it_told(self, dtype):
        recipe = RECIPE.with_steps(100).with_field("augmentation", "pad_crop")
        result = self.train(config(recipe, dtype=dtype), log_every=20)
        self.assertEqual(result["test_images"], 355)
        self.assertLess(result["train_loss"], 2.0)  # chance is ln 10 = 2.3
        trained = workdirs.load_workdir(
            self.workdir, classifier_activation=None
        )
        self.assertEqual(trained.step, 100)
        images, labels = self.digits.test_images(355)
        logits = trained.model(np.array(trained.preprocessing(images)))
        wrong = np.mean(np.argmax(logits, -1) != labels)
        atol = 0.0 if dtype == "float32" else 1.5
        self.assertAlmostEqual(
            result["test_top1_error"], 100 * wrong, delta=atol + 1e-4
        )
        loss = keras.ops.sparse_categorical_crossentropy(
            labels, logits, from_logits=True
        )
        self.assertAlmostEqual(
            result["test_loss"], np.mean(loss), delta=0.05 * atol + 1e-4
        )

    def test_damaged_state_is_told(self):
        self.train(config())
        (self.workdir / "state.npz").write_bytes(b"PK")
        with self.assertRaisesRegex(
            workdirs.WorkdirError, "state.npz is damaged.*remove it"
        ):
            self.train(config())

    def test_run_of_another_backend_is_refused(self):
        self.train(config())
        path = self.workdir / "config.json"
        path.write_text(path.read_text().replace('"jax"', '"tensorflow"'))
        with self.assertRaisesRegex(
            workdirs.WorkdirError, "backend was 'tensorflow', is 'jax'"
        ):
            self.train(config())

    def test_loss_that_is_no_number_ends_the_run_and_is_not_saved(self):
        recipe = dataclasses.replace(RECIPE, learning_rate=1e30)
        with self.assertRaisesRegex(
            interruption.TrainingDivergedError, "lower recipe.learning_rate"
        ):
            self.train(config(recipe))
        self.assertFalse((self.workdir / "state.npz").exists())

    @parameterized.parameters(
        ("dtype", {"dtype": "mixed_float16"}, {}),
        ("deterministic", {"deterministic": True}, {}),
        ("sync_batch_norm", {"sync_batch_norm": True}, {}),
        ("micro_batches", {}, {"micro_batches": 2}),
        ("average_momentum", {}, {"average_momentum": 0.9}),
        ("dataset", {}, {"augmentation": "scale_jitter"}),
    )
    def test_what_this_loop_has_not_is_refused(self, name, fields, changes):
        recipe = dataclasses.replace(RECIPE, **changes)
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
        self.assertTrue((self.workdir / "trained.weights.h5").exists())

    def test_flags_of_several_devices_are_refused(self):
        outcome = programs.run("train", "--num_devices=2")
        self.assertEqual(outcome.code, 2)
        (line,) = outcome.err
        self.assertIn("--num_devices=2: on JAX one device trains", line)


def _companions(x, classes):
    for _ in range(2):
        x = keras.layers.Conv2D(4, 3, 2, "same", activation="relu")(x)
        x = baselines.Companion(classes)(x)
    return keras.layers.Dense(classes)(keras.layers.Flatten()(x))


def _signal(line):
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    absltest.main()
