"""Tests for every Keras backend: training by `fit`, loops, errors.

`make test-jax` runs this file and those of layers, networks, counts and
weights with KERAS_BACKEND=jax.
"""

import importlib
import sys
from unittest import mock

import keras
import numpy as np
import pytest
from absl.testing import absltest
from absl.testing import parameterized

import keras_resnet
from keras_resnet import training
from keras_resnet import weights
from tests import programs

BACKEND = keras.backend.backend()
SPEC = keras_resnet.Spec(
    "small", (1, 4), (4, 8), stem="cifar", classes=3, image_size=8
)


def batch(images=8):
    x = np.random.default_rng(0).normal(size=(images, 8, 8, 3))
    return x.astype("float32"), np.arange(images) % 3


def values(model):
    return {v.path: keras.ops.convert_to_numpy(v) for v in model.weights}


def step(model, **kwargs):
    """Takes one step of `fit`, and returns its loss."""
    model.compile(
        keras.optimizers.SGD(0.1), "sparse_categorical_crossentropy", **kwargs
    )
    history = model.fit(*batch(), batch_size=8, verbose=0)
    return history.history["loss"][0]


class TrainingStepTest(parameterized.TestCase):
    @parameterized.product(
        unit=("original", "pre_activation"), shortcut=("A", "exclusive_gating")
    )
    @pytest.mark.slow
    def test_a_step_of_a_loop_is_that_of_its_units(self, unit, shortcut):
        """Compares outputs, gradients and statistics, also with remat."""
        kwargs = {"unit": unit, "shortcut": shortcut}
        first = keras_resnet.resnet(SPEC, **kwargs)
        start, expected = values(first), None
        for looped in (False, True):
            for remat in (False, True):
                model = keras_resnet.resnet(
                    SPEC, looped=looped, remat=remat, **kwargs
                )
                weights.copy(first, model)
                loss = step(model)
                trained = keras_resnet.resnet(SPEC, **kwargs)
                weights.copy(model, trained)
                if expected is None:
                    expected = loss, values(trained)
                self.assertAlmostEqual(loss, expected[0], 4)
                for path, value in values(trained).items():
                    moved = expected[1][path] - start[path]
                    self.assertGreater(np.abs(moved).max(), 0, path)
                    np.testing.assert_allclose(
                        value - start[path],
                        moved,
                        atol=1e-3 * np.abs(moved).max() + 1e-6,
                        err_msg=path,
                    )

    @parameterized.product(looped=(False, True), remat=(False, True))
    @pytest.mark.slow
    def test_what_draws_numbers_trains(self, looped, remat):
        model = keras_resnet.resnet(
            SPEC,
            shortcut="dropout",
            survival_probability=0.5,
            looped=looped,
            remat=remat,
        )
        seeds = [v for v in model.variables if "seed" in v.path]
        self.assertNotEmpty(seeds)
        changing = [*seeds, *model.trainable_variables]
        start = [keras.ops.convert_to_numpy(v) for v in changing]
        self.assertTrue(np.isfinite(step(model)))
        for variable, before in zip(changing, start, strict=True):
            after = keras.ops.convert_to_numpy(variable)
            self.assertTrue(np.any(after != before), variable.path)

    def test_mixed_precision_trains(self):
        self.addCleanup(
            keras.config.set_dtype_policy, keras.config.dtype_policy()
        )
        keras.config.set_dtype_policy("mixed_bfloat16")
        for looped in (False, True):
            model = keras_resnet.resnet(SPEC, looped=looped)
            self.assertTrue(np.isfinite(step(model)))


class JaxTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        if BACKEND != "jax":
            self.skipTest("KERAS_BACKEND is not jax")

    @parameterized.parameters(False, True)
    def test_a_stack_is_one_scan_whatever_its_depth(self, remat):
        import jax

        lines = set()
        for depth in (10, 90):
            unit = keras_resnet.layers.OriginalUnit(4, shortcut="A")
            stack = keras_resnet.layers.UnitStack(unit, depth, remat=remat)
            x = np.ones((2, 8, 8, 4), "float32")
            stack.build(x.shape)

            def loss(trainable, others, stack=stack, x=x):
                y, _ = stack.stateless_call(trainable, others, x, training=True)
                return y.sum()

            jaxpr = jax.make_jaxpr(jax.grad(loss))(
                [v.value for v in stack.trainable_variables],
                [v.value for v in stack.non_trainable_variables],
            )
            text = str(jaxpr)
            self.assertEqual(text.count("= scan["), 2)  # forward, backward
            lines.add(text.count("\n"))
        self.assertLen(lines, 1)


class TensorFlowOnlyTest(parameterized.TestCase):
    def test_what_needs_tensorflow_says_so(self):
        with (
            mock.patch.object(keras.backend, "backend", lambda: "jax"),
            self.assertRaisesRegex(
                ImportError,
                "this needs Keras on TensorFlow: set KERAS_BACKEND=tensorflow "
                ".*, received 'jax'",
            ),
        ):
            training.require_backend("this", "tensorflow")

    @parameterized.parameters(
        "keras_resnet.training.tensorflow_trainer",
        "keras_resnet.serving.export",
    )
    def test_modules_that_need_it_are_not_imported_without(self, name):
        if BACKEND == "tensorflow":
            self.skipTest("KERAS_BACKEND is tensorflow")
        sys.modules.pop(name, None)
        with self.assertRaisesRegex(ImportError, "needs Keras on TensorFlow"):
            importlib.import_module(name)

    def test_programs_fail_with_one_line(self):
        if BACKEND == "tensorflow":
            self.skipTest("KERAS_BACKEND is tensorflow")
        outcome = programs.run("export", "--model=resnet20")
        self.assertEqual(outcome.code, 1)
        (line,) = outcome.err
        self.assertIn("this program needs Keras on TensorFlow", line)


if __name__ == "__main__":
    absltest.main()
