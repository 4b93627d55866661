"""Keras' own contract of a layer, held by every public layer on any backend.

Configuration and serialization, shapes and dtypes of symbolic calls, weights
counted after `build`, a compiled training step, mixed precision.
"""

import tempfile

import keras
import numpy as np
import pytest
import tensorflow as tf
from absl.testing import absltest
from absl.testing import parameterized
from keras.src import testing

import keras_resnet
from keras_resnet import layers
from keras_resnet import networks

X = (2, 6, 6, 4)
RESIDUAL = (2, 3, 3, 8)

BASES = ("Shortcut", "Unit")
# Arguments, shape of the output, and weights: those that are trained (kernels,
# gamma and beta of each normalization), and the others (its statistics).
LAYERS = {
    "BatchNormalization": ({}, X, 2, 2),
    "Convolution": (
        {"filters": 8, "kernel_size": 3, "stride": 2},
        RESIDUAL,
        1,
        0,
    ),
    "UnitStack": ({"unit": layers.OriginalUnit(4), "count": 3}, X, 6, 4),
}
# The weights of a shortcut that changes the dimension.
SHORTCUTS = {
    "OptionA": (0, 0),
    "OptionB": (3, 2),
    "OptionC": (3, 2),
    "NoShortcut": (0, 0),
    "ConstantScaling": (0, 0),
    "ExclusiveGating": (2, 0),
    "ShortcutOnlyGating": (2, 0),
    "ConvolutionShortcut": (1, 0),
    "DropoutShortcut": (0, 0),
}
# Normalizations of a unit of two convolutions and a projection. In the
# pre-activation units of [2] the projection has none.
UNITS = {
    "OriginalUnit": 3,
    "PreActivationUnit": 2,
    "BatchNormAfterAdditionUnit": 3,
    "ReLUBeforeAdditionUnit": 3,
    "ReLUOnlyPreActivationUnit": 2,
}


# The contract feeds `fit` from a generator, without saying shuffle=False.
@pytest.mark.filterwarnings("ignore:`shuffle=True` was passed")
class LayerContractTest(testing.TestCase):
    def test_every_public_layer_is_here(self):
        self.assertCountEqual(
            layers.__all__, [*BASES, *LAYERS, *SHORTCUTS, *UNITS]
        )

    @parameterized.parameters(*LAYERS)
    def test_layer(self, name):
        arguments, output, trainable, others = LAYERS[name]
        self.run_layer_test(
            getattr(layers, name),
            arguments,
            input_shape=X,
            expected_output_shape=output,
            expected_output_dtype="float32",
            expected_num_trainable_weights=trainable,
            expected_num_non_trainable_weights=others,
            expected_num_losses=0,
        )

    @parameterized.parameters(*SHORTCUTS)
    def test_shortcut(self, name):
        trainable, others = SHORTCUTS[name]
        self.run_layer_test(
            getattr(layers, name),
            {"stride": 2},
            input_shape={"x_shape": X, "residual_shape": RESIDUAL},
            expected_output_shape=RESIDUAL,
            expected_output_dtype="float32",
            expected_num_trainable_weights=trainable,
            expected_num_non_trainable_weights=others,
            expected_num_losses=0,
            # The step of the contract gives one input only; the units below
            # train their shortcuts.
            run_training_check=False,
        )

    @parameterized.product(name=tuple(UNITS), remat=(False, True))
    def test_unit(self, name, remat):
        norms = UNITS[name]
        self.run_layer_test(
            getattr(layers, name),
            {
                "filters": 8,
                "stride": 2,
                "survival_probability": 0.5,
                "remat": remat,
            },
            input_shape=X,
            expected_output_shape=RESIDUAL,
            expected_output_dtype="float32",
            expected_num_trainable_weights=3 + 2 * norms,
            expected_num_non_trainable_weights=2 * norms,
            expected_num_seed_generators=1,
            expected_num_losses=0,
            # In half precision a unit is the same with and without remat.
            run_mixed_precision_check=not remat,
        )


def variables_in(path):
    """Shapes of the variables of a TensorFlow checkpoint, sorted."""
    return sorted(
        tuple(shape)
        for name, shape in tf.train.list_variables(path)
        if name.endswith("VARIABLE_VALUE")
    )


class CheckpointTest(parameterized.TestCase):
    """A checkpoint of TensorFlow holds every variable of a layer, no other."""

    def setUp(self):
        super().setUp()
        if keras.backend.backend() != "tensorflow":
            self.skipTest("KERAS_BACKEND is not tensorflow")

    def assert_holds(self, layer, again):
        rng = np.random.default_rng(0)
        for variable in layer.variables:
            value = rng.uniform(1, 9, variable.shape)
            variable.assign(value.astype(variable.dtype))
        folder = self.enter_context(tempfile.TemporaryDirectory())
        path = tf.train.Checkpoint(model=layer).write(f"{folder}/checkpoint")
        self.assertEqual(
            variables_in(path), sorted(tuple(v.shape) for v in layer.variables)
        )
        checkpoint = tf.train.Checkpoint(model=again)
        checkpoint.read(path).assert_consumed()
        for a, b in zip(layer.variables, again.variables, strict=True):
            np.testing.assert_array_equal(a, b, a.path)

    @parameterized.product(
        kind=(
            *((unit, "OptionB") for unit in UNITS),
            *(("PreActivationUnit", shortcut) for shortcut in SHORTCUTS),
        ),
        looped=(False, True),
    )
    def test_units(self, kind, looped):
        unit, shortcut = kind

        def build():
            layer = getattr(layers, unit)(
                4,
                shortcut=getattr(layers, shortcut),
                survival_probability=0.5,
                trainable=shortcut != "OptionB",
            )
            if looped:
                layer = layers.UnitStack(layer, 2, remat=True)
            layer.build(X)
            return layer

        self.assert_holds(build(), build())

    @parameterized.parameters("Functional", "Sequential")
    def test_networks_inside_of_others(self, kind):
        spec = keras_resnet.Spec("tiny", (1, 3), (4, 8), stem="cifar")

        def build():
            base = keras_resnet.resnet(
                spec, input_shape=(8, 8, 3), looped=True, classes=2
            )
            inner = keras.Sequential([keras.Input((8, 8, 3)), base])
            if kind == "Sequential":
                return keras.Sequential([keras.Input((8, 8, 3)), inner])
            image = keras.Input((8, 8, 3))
            model = keras.Model(image, inner(image))
            keras_resnet.freeze(model)
            return model

        self.assert_holds(build(), build())

    @parameterized.parameters("highway19", "dsn")
    def test_baselines(self, name):
        def build():
            return networks.build(name, input_shape=(32, 32, 1), classes=2)

        one, two = build(), build()
        folder = self.enter_context(tempfile.TemporaryDirectory())
        path = tf.train.Checkpoint(model=one).write(f"{folder}/checkpoint")
        tf.train.Checkpoint(model=two).read(path).assert_consumed()
        for a, b in zip(one.weights, two.weights, strict=True):
            np.testing.assert_array_equal(a, b, a.path)

    def test_names_are_those_of_the_weights(self):
        stack = layers.UnitStack(layers.OriginalUnit(4), 2)
        stack.build(X)
        folder = self.enter_context(tempfile.TemporaryDirectory())
        path = tf.train.Checkpoint(stack=stack).write(f"{folder}/checkpoint")
        names = [name for name, _ in tf.train.list_variables(path)]
        for weight in stack.weights:
            self.assertIn(
                f"stack/stacked_{weight.name}/.ATTRIBUTES/VARIABLE_VALUE", names
            )

    def test_a_stack_that_is_built_later_is_restored(self):
        stack, later = (
            layers.UnitStack(layers.OriginalUnit(4), 2) for _ in range(2)
        )
        stack.build(X)
        folder = self.enter_context(tempfile.TemporaryDirectory())
        path = tf.train.Checkpoint(model=stack).write(f"{folder}/checkpoint")
        status = tf.train.Checkpoint(model=later).read(path)
        later.build(X)
        status.assert_consumed()
        for a, b in zip(stack.weights, later.weights, strict=True):
            np.testing.assert_array_equal(a, b, a.path)


if __name__ == "__main__":
    absltest.main()
