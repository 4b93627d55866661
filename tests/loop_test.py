"""Training: the papers' step, exact resume, work directories."""

import contextlib
import dataclasses
import json
import os
import signal
import tempfile
from pathlib import Path
from unittest import mock

import keras
import numpy as np
import tensorflow as tf
from absl.testing import absltest
from absl.testing import parameterized

import keras_resnet
from keras_resnet import layers
from keras_resnet.training import checkpoints
from keras_resnet.training import data
from keras_resnet.training import evaluation
from keras_resnet.training import loop
from keras_resnet.training import recipes
from tests import runs

RECIPE = recipes.RECIPES["digits"].with_steps(8)
RECIPE = dataclasses.replace(RECIPE, batch_size=16)
NOTHING = tf.zeros([2])  # that a worker could tell the others


def config(recipe=RECIPE, **fields):
    return loop.Config("tiny", "digits", recipe, **fields)


def quiet(line):
    """Takes a line that is meant for people."""


class TrainingTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.enter_context(
            mock.patch.dict(keras_resnet.MODELS, {"tiny": runs.TINY})
        )
        root = self.enter_context(tempfile.TemporaryDirectory())
        self.workdir = Path(root) / "run"

    def train(self, config, workdir=None, **arguments):
        arguments = {"report": quiet, "log_every": 2, **arguments}
        return loop.train_and_evaluate(
            config, workdir or self.workdir, **arguments
        )

    @parameterized.parameters(0.0, 0.1)
    def test_step_is_the_formula_of_the_paper(self, smoothing):
        """v = momentum v - rate (g + decay w); w += v, twice."""
        recipe = dataclasses.replace(
            RECIPE,
            weight_decay=0.01,
            label_smoothing=smoothing,
            decay_norms=False,
        )
        dataset = data.load("digits")
        run = loop._Run(config(recipe), dataset, tf.distribute.get_strategy())
        batches = list(dataset.train_batches(16, seed=0).take(2))
        model = keras.models.clone_model(run.model)
        model.set_weights(run.model.get_weights())
        velocity = [0.0] * len(model.trainable_weights)
        loss = keras.losses.CategoricalCrossentropy(
            from_logits=True, label_smoothing=smoothing
        )
        for images, labels in batches:
            with tf.GradientTape() as tape:
                logits = model(images, training=True)
                value = loss(tf.one_hot(labels, 10), logits)
                value += (
                    0.01
                    / 2
                    * sum(
                        tf.reduce_sum(w**2)
                        for w in model.trainable_weights
                        if w.name == "kernel"
                    )
                )
            gradients = tape.gradient(value, model.trainable_weights)
            for i, (w, g) in enumerate(
                zip(model.trainable_weights, gradients, strict=True)
            ):
                velocity[i] = 0.9 * velocity[i] - 0.1 * g
                w.assign_add(velocity[i])
        for batch in batches:
            run.advance(iter(tf.data.Dataset.from_tensors(batch)), 1, NOTHING)
        for a, b in zip(run.model.weights, model.weights, strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5)

    def test_moving_average_follows_the_parameters(self):
        """a += (w - a) (1 - min(momentum, (1 + t) / (10 + t)))."""
        recipe = dataclasses.replace(RECIPE, average_momentum=0.25)
        dataset = data.load("digits")
        run = loop._Run(config(recipe), dataset, tf.distribute.get_strategy())
        batches = iter(dataset.train_batches(16, seed=0))
        expected = [np.array(v) for v in run.model.trainable_variables]
        for step in (1, 2, 3, 4):
            run.advance(batches, tf.constant(1), NOTHING)
            momentum = min(0.25, (1 + step) / (10 + step))
            expected = [
                a + (np.array(w) - a) * (1 - momentum)
                for a, w in zip(
                    expected, run.model.trainable_variables, strict=True
                )
            ]
        for got, value in zip(run.averages, expected, strict=True):
            np.testing.assert_allclose(got, value, rtol=1e-5, atol=1e-6)

    def test_moving_average_is_what_is_tested_and_loaded(self):
        recipe = dataclasses.replace(RECIPE, average_momentum=0.9)
        result = self.train(config(recipe))
        trained = loop.load_workdir(self.workdir, classifier_activation=None)
        dataset = data.load("digits")
        found = evaluation.evaluate(trained.model, dataset.test_batches(100))
        np.testing.assert_allclose(
            found.top1_error, result["test_top1_error"], rtol=1e-6
        )
        np.testing.assert_allclose(found.loss, result["test_loss"], rtol=1e-4)

    def test_float64_is_loaded_in_float32(self):
        recipe = dataclasses.replace(RECIPE, average_momentum=0.9)
        result = self.train(config(recipe, dtype="float64"))
        values = runs.values(self.workdir)
        is_float64 = [v.dtype == "float64" for v in values.values()]
        self.assertGreater(sum(is_float64), len(values) / 2)
        trained = loop.load_workdir(self.workdir, classifier_activation=None)
        self.assertEqual(
            {weight.dtype for weight in trained.model.weights}, {"float32"}
        )
        found = evaluation.evaluate(
            trained.model, data.load("digits").test_batches(100)
        )
        np.testing.assert_allclose(found.loss, result["test_loss"], rtol=1e-4)

    def test_best_checkpoint_is_kept_beside_the_last(self):
        errors = iter([5.0, 3.0, 4.0, 3.0])

        def evaluated(*_, **__):
            wrong = int(next(errors) * 100)
            return evaluation.Evaluation(10_000, wrong, 0, 1.0)

        with mock.patch.object(evaluation.Evaluator, "__call__", evaluated):
            self.train(config(), eval_every=2)
        best = loop.load_workdir(self.workdir, checkpoint="best")
        self.assertEqual(best.step, 4)
        self.assertEqual(loop.load_workdir(self.workdir).step, 8)
        self.assertEqual(checkpoints.steps(self.workdir / "best"), [4])
        with self.assertRaisesRegex(ValueError, "must be one of last, best"):
            loop.load_workdir(self.workdir, checkpoint="first")

    def test_several_steps_in_one_graph_are_as_many_single_ones(self):
        dataset = data.load("digits")
        sums = []
        for chunks in ((4,), (1, 1, 1, 1), (3, 1)):
            run = loop._Run(config(), dataset, tf.distribute.get_strategy())
            batches = iter(dataset.train_batches(16, seed=0))
            for chunk in chunks:
                run.advance(batches, tf.constant(chunk), NOTHING)
            self.assertEqual(run.completed_steps, 4)
            sums.append(run.sums.numpy())
            self.assertEqual(sums[-1][3], 4 * 16)
        np.testing.assert_array_equal(sums[0], sums[1])
        np.testing.assert_array_equal(sums[0], sums[2])

    @parameterized.parameters("A", "dropout")
    def test_stopped_run_ends_with_the_bits_of_one_that_was_not(self, kind):
        """Law 5 of the design, with random layers too."""
        arguments = {"shortcut": kind, "survival_probability": 0.8}
        described = config(model_arguments=arguments, deterministic=True)
        whole = self.workdir.with_name("whole")
        self.train(described, whole)
        for stop_at in (3, 6):
            with (
                self.assertRaises(loop.Interrupted) as caught,
                stop_after(stop_at),
            ):
                self.train(described)
            self.assertEqual(caught.exception.step, stop_at)
            self.assertEqual(caught.exception.signal_number, signal.SIGTERM)
        self.train(described)
        expected, got = runs.values(whole), runs.values(self.workdir)
        self.assertEqual(got.keys(), expected.keys())
        self.assertTrue(any("seed" in name for name in expected))
        for name, value in expected.items():
            np.testing.assert_array_equal(got[name], value, err_msg=name)
        self.assertEqual(
            (self.workdir / "metrics.csv").read_bytes(),
            (whole / "metrics.csv").read_bytes(),
        )

    def test_finished_run_is_not_trained_again(self):
        first = self.train(config())
        before = (self.workdir / "metrics.csv").read_bytes()
        lines = []
        again = self.train(config(), report=lines.append)
        self.assertIn("has all its 8 steps already", lines[-1])
        self.assertEqual(first["test_top1_error"], again["test_top1_error"])
        self.assertEqual((self.workdir / "metrics.csv").read_bytes(), before)

    def test_rows_after_the_checkpoint_are_made_again(self):
        with self.assertRaises(loop.Interrupted), stop_after(4):
            self.train(config())
        path = self.workdir / "metrics.csv"
        rows = path.read_text().splitlines()
        path.write_text("\n".join([*rows, "6,0.1,1,1,1,,,", "8,0.1"]))
        self.train(config())
        steps = [row.split(",")[0] for row in path.read_text().splitlines()]
        self.assertEqual(steps, ["step", "2", "4", "6", "8"])

    def test_work_directory_holds_what_the_other_programs_need(self):
        result = self.train(config(data_dir="elsewhere"), eval_every=4)
        trained = loop.load_workdir(self.workdir)
        self.assertEqual(trained.step, 8)
        self.assertEqual(trained.config, config(data_dir="elsewhere"))
        self.assertEqual(trained.labels, [str(i) for i in range(10)])
        dataset = data.load("digits", preprocessing=trained.preprocessing)
        errors = images = 0
        for x, y, counted in dataset.test_batches(100):
            p = np.array(trained.model(x))
            np.testing.assert_allclose(p.sum(1), 1, rtol=1e-5)
            errors += np.sum((p.argmax(1) != y.numpy()) * counted.numpy())
            images += counted.numpy().sum()
        self.assertEqual(images, result["test_images"])
        np.testing.assert_allclose(
            100 * errors / images, result["test_top1_error"]
        )
        self.assertLen(list((self.workdir / "events").iterdir()), 1)
        rows = (self.workdir / "metrics.csv").read_text().splitlines()
        self.assertEqual(rows[0], ",".join(loop.COLUMNS))
        is_tested = [not row.endswith(",,,") for row in rows[1:]]
        self.assertEqual(is_tested, [False, True, False, True])

    def test_only_the_last_checkpoints_are_kept(self):
        self.train(config(), keep=2, checkpoint_seconds=0.0)
        kept = sorted((self.workdir / "checkpoints").glob("*.index"))
        self.assertEqual(
            [p.name for p in kept], ["ckpt-7.index", "ckpt-8.index"]
        )

    @parameterized.parameters("mixed_bfloat16", "mixed_float16")
    def test_mixed_precision_learns(self, dtype):
        recipe = RECIPE.with_steps(100)
        result = self.train(config(recipe, dtype=dtype), log_every=20)
        self.assertLess(result["train_loss"], 1.8)  # chance is ln 10 = 2.3
        model = loop.load_workdir(self.workdir).model
        self.assertEqual(model.get_layer("stem_conv").compute_dtype, "float32")
        self.assertEqual(keras.config.dtype_policy().name, "float32")

    def test_other_configuration_is_refused_and_nothing_changed(self):
        self.train(config())
        before = {p: p.stat().st_mtime_ns for p in self.workdir.rglob("*")}
        recipe = dataclasses.replace(RECIPE, learning_rate=0.2)
        with self.assertRaisesRegex(
            loop.WorkdirError,
            "recipe.learning_rate was 0.1, is 0.2; seed was 0, is 1",
        ):
            self.train(config(recipe, seed=1))
        after = {p: p.stat().st_mtime_ns for p in self.workdir.rglob("*")}
        self.assertEqual(after, before)
        # Where the data lies is no part of the configuration.
        self.train(config(data_dir="elsewhere"))

    def test_directory_of_something_else_is_refused(self):
        self.workdir.mkdir()
        (self.workdir / "thesis.txt").write_text("mine")
        with self.assertRaisesRegex(loop.WorkdirError, "neither empty nor"):
            self.train(config())
        self.assertEqual(os.listdir(self.workdir), ["thesis.txt"])
        with self.assertRaisesRegex(loop.WorkdirError, "no work directory"):
            loop.load_workdir(self.workdir)

    def test_directory_without_a_checkpoint_says_so(self):
        with (
            mock.patch.object(
                loop._Trainer, "train", side_effect=OSError("full")
            ),
            self.assertRaises(OSError),
        ):
            self.train(config())
        with self.assertRaisesRegex(loop.WorkdirError, "no checkpoint yet"):
            loop.load_workdir(self.workdir)
        (self.workdir / "config.json").write_text("{")
        with self.assertRaisesRegex(loop.WorkdirError, "cannot be read"):
            loop.load_workdir(self.workdir)

    def test_loss_that_is_no_number_ends_the_run_and_is_not_saved(self):
        recipe = dataclasses.replace(RECIPE, learning_rate=1e30)
        with self.assertRaisesRegex(
            loop.TrainingDivergedError, "lower recipe.learning_rate"
        ):
            self.train(config(recipe))
        self.assertEqual(list(self.workdir.glob("checkpoints/*.index")), [])

    def test_unknown_data_set_leaves_nothing_behind(self):
        described = loop.Config("resnet20", "digts", RECIPE)
        with self.assertRaisesRegex(ValueError, "digits"):
            self.train(described)
        self.assertFalse(self.workdir.exists())

    def test_signal_handlers_are_put_back(self):
        before = signal.getsignal(signal.SIGTERM)
        self.train(config())
        self.assertIs(signal.getsignal(signal.SIGTERM), before)


class ConfigTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.enter_context(
            mock.patch.dict(keras_resnet.MODELS, {"tiny": runs.TINY})
        )

    def test_comes_back_from_json(self):
        described = config(
            model_arguments={"shortcut": "C", "survival_probability": 0.5},
            seed=3,
        )
        text = json.dumps(described.to_json())
        self.assertEqual(loop.Config.from_json(json.loads(text)), described)

    @parameterized.parameters(
        ({"dtype": "int8"}, "dtype must be one of.*'int8'"),
        ({"model": "resnet21"}, "did you mean"),
        ({"model_arguments": {"unit": "orginal"}}, "mean 'original'"),
        ({"model_arguments": {"shortcut": "D"}}, "shortcut must be"),
        ({"model_arguments": {"survival_probability": 2.0}}, "in .0, 1."),
        (
            {"sync_batch_norm": True, "model_arguments": {"looped": True}},
            "sync_batch_norm needs model.looped=false.*received model.looped=t",
        ),
    )
    def test_refuses_what_no_network_can_be(self, fields, message):
        fields = {"model": "resnet20", "recipe": RECIPE, **fields}
        with self.assertRaisesRegex(ValueError, message):
            loop.Config(dataset="digits", **fields)

    def test_synchronized_normalization_needs_single_units(self):
        """41 units in a stage would else be a loop."""
        long = dataclasses.replace(runs.TINY, units=(1, 42), filters=(1, 1))
        with mock.patch.dict(keras_resnet.MODELS, {"tiny": long}):
            for is_synchronized in (False, True):
                described = config(sync_batch_norm=is_synchronized)
                model = loop.build_model(described, (8, 8, 1), 10)
                stacks = [
                    layer
                    for layer in model.layers
                    if isinstance(layer, layers.UnitStack)
                ]
                self.assertLen(stacks, 0 if is_synchronized else 1)

    def test_model_arguments_come_from_text(self):
        parse = loop.parse_model_argument
        self.assertEqual(parse("shortcut", "C"), "C")
        self.assertEqual(parse("batch_norm_momentum", "0.99"), 0.99)
        with self.assertRaisesRegex(ValueError, "did you mean 'shortcut'"):
            parse("shortcuts", "C")
        self.assertIs(parse("remat", "true"), True)
        self.assertIs(parse("looped", "False"), False)
        with self.assertRaisesRegex(ValueError, "true or false.*'maybe'"):
            parse("remat", "maybe")
        with self.assertRaisesRegex(ValueError, "must be a number.*'high'"):
            parse("survival_probability", "high")


@contextlib.contextmanager
def stop_after(step):
    """Sends SIGTERM to this process so that its run stops after a step."""
    advance = loop._Trainer.advance

    def noticed(trainer, *arguments):
        if trainer.run.completed_steps == step - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return advance(trainer, *arguments)

    with (
        mock.patch.object(loop._Trainer, "advance", noticed),
        mock.patch.object(loop, "_CHUNK_SECONDS", 1e-9),
    ):
        yield


if __name__ == "__main__":
    absltest.main()
