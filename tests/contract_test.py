"""Keras' own contract of a layer, held by every public layer on any backend.

Configuration and serialization, shapes and dtypes of symbolic calls, weights
counted after `build`, a compiled training step, mixed precision.
"""

import pytest
from absl.testing import absltest
from absl.testing import parameterized
from keras.src import testing

from keras_resnet import layers

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


if __name__ == "__main__":
    absltest.main()
