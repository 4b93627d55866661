"""Convolutions, shortcuts and units against the formulas of the papers."""

import itertools
import pathlib
import tempfile
from unittest import mock

import keras
import numpy as np
import tensorflow as tf
from absl.testing import absltest
from absl.testing import parameterized

from keras_resnet import layers
from keras_resnet.layers import convolutions
from keras_resnet.layers import identifiers
from keras_resnet.layers import shortcuts
from keras_resnet.layers import units
from tests import reference

UNITS = tuple(units.UNITS)
SHORTCUTS = tuple(shortcuts.SHORTCUTS)


def normal(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def randomize(layer, seed=0):
    """Gives every weight a value that changes the result of the formula."""
    rng = np.random.default_rng(seed)
    for weight in layer.weights:
        if weight.name in ("gamma", "moving_variance"):
            weight.assign(rng.uniform(0.5, 1.5, weight.shape))
        elif weight.name != "seed_generator_state":
            weight.assign(rng.normal(0, 0.3, weight.shape))


def as_norm(layer):
    """Returns a normalization layer at inference as a NumPy function."""
    gamma, beta, mean, variance = (np.array(w) for w in layer.weights)
    return lambda x: reference.batch_normalization(
        x, gamma, beta, mean, variance, layer.epsilon
    )


def as_convolution(layer):
    kernel = np.array(layer.kernel)
    return lambda x: reference.convolution(x, kernel, layer.stride)


def as_shortcut(shortcut, out):
    """Returns a shortcut layer as a NumPy function (x, residual) -> sum."""
    stride = shortcut.stride

    def h(x):
        return reference.identity(
            x, stride, out, getattr(shortcut, "zeros", "end")
        )

    def gate(x):
        kernel, bias = (np.array(w) for w in shortcut.gate.weights)
        return reference.gate(x, kernel, bias, stride)

    def project(x):
        if shortcut.projection is None:
            return x
        x = as_convolution(shortcut.projection)(x)
        return x if shortcut.norm is None else as_norm(shortcut.norm)(x)

    formulas = {
        "OptionA": lambda x, f: h(x) + f,
        "OptionB": lambda x, f: project(x) + f,
        "OptionC": lambda x, f: project(x) + f,
        "NoShortcut": lambda x, f: f,
        "ConstantScaling": lambda x, f: reference.constant_scaling(
            h(x), f, shortcut.shortcut_scale, shortcut.residual_scale
        ),
        "ExclusiveGating": lambda x, f: reference.exclusive_gating(
            h(x), f, gate(x)
        ),
        "ShortcutOnlyGating": lambda x, f: reference.shortcut_only_gating(
            h(x), f, gate(x)
        ),
        "ConvolutionShortcut": lambda x, f: project(x) + f,
        "DropoutShortcut": lambda x, f: h(x) + f,
    }
    return formulas[type(shortcut).__name__]


class ConvolutionTest(parameterized.TestCase):
    @parameterized.parameters(
        itertools.product((1, 3, 7), (1, 2), ((8, 8), (7, 10)))
    )
    def test_pads_alike_on_both_sides(self, kernel_size, stride, size):
        layer = layers.Convolution(5, kernel_size, stride)
        x = normal((2, *size, 3))
        y = layer(x)
        expected = reference.convolution(x, np.array(layer.kernel), stride)
        np.testing.assert_allclose(y, expected, atol=1e-4)
        self.assertEqual(layer.compute_output_shape(x.shape), y.shape)

    def test_same_padding_is_that_of_tensorflow(self):
        layer = layers.Convolution(5, 3, 2, padding="same")
        x = normal((2, 8, 8, 3))
        y = layer(x)
        np.testing.assert_allclose(
            y, tf.nn.conv2d(x, layer.kernel, 2, "SAME"), atol=1e-5
        )
        symmetric = reference.convolution(x, np.array(layer.kernel), 2)
        self.assertGreater(np.abs(y - symmetric).max(), 0.1)

    @parameterized.parameters(1, 2)
    def test_as_a_product_of_matrices_it_trains_alike(self, stride):
        """Compares the kernels after a step: gradients of kernel and input."""
        x, trained = normal((4, 7, 8, 3)), []
        target = normal((4, -(-7 // stride), 8 // stride, 5), seed=1)
        start = [normal((3, 3, 3, 6), seed=2), normal((1, 1, 6, 5), seed=3)]
        for is_product in (False, True):
            with mock.patch.object(
                convolutions, "_is_fast_as_product", return_value=is_product
            ):
                model = keras.Sequential(
                    [
                        layers.Convolution(6, 3),
                        layers.Convolution(5, 1, stride),
                    ]
                )
                model.build(x.shape)
                model.set_weights(start)
                model.compile(keras.optimizers.SGD(0.1), "mse")
                model.fit(x, target, batch_size=4, verbose=0)
            trained.append(model.get_weights())
        for i in range(2):
            self.assertGreater(np.abs(trained[0][i] - start[i]).max(), 1e-3)
            np.testing.assert_allclose(*(t[i] for t in trained), atol=1e-5)

    @parameterized.parameters(
        lambda: layers.Convolution(16, 1, 2),
        lambda: layers.Convolution(16, 1, 3, padding="same"),
        lambda: layers.OptionB(2),
        lambda: layers.OptionC(2),
        lambda: layers.ConvolutionShortcut(2),
        lambda: layers.ExclusiveGating(2),
        lambda: layers.ShortcutOnlyGating(2),
        lambda: layers.OriginalUnit(8, 2, bottleneck=True),
        lambda: layers.PreActivationUnit(16, 2, shortcut="C"),
    )
    def test_no_convolution_of_one_pixel_strides(self, make):
        """On some processors TensorFlow aborts in the strided gradient."""
        if keras.backend.backend() != "tensorflow":
            self.skipTest("only TensorFlow aborts")
        layer = make()
        x = tf.zeros((3, 8, 8, 8))
        inputs = [x]
        if isinstance(layer, shortcuts.Shortcut):
            inputs.append(tf.zeros((3, 4, 4, 16)))
        for training in (False, True):
            call = tf.function(lambda *x: layer(*x, training=training))  # noqa: B023
            graph = call.get_concrete_function(*inputs).graph
            found = 0
            for operation in graph.get_operations():
                if operation.type == "Conv2D":
                    kernel, strides = (
                        operation.inputs[1],
                        operation.get_attr("strides"),
                    )
                    if kernel.shape[:2] == (1, 1):
                        found += 1
                        self.assertEqual(strides, [1, 1, 1, 1])
            self.assertGreater(found, 0)

    @mock.patch.object(convolutions, "_is_fast_as_product", return_value=True)
    def test_is_a_product_in_training_only(self, _):
        """An export has convolutions, which can be folded."""
        layer = layers.Convolution(5, 1)
        x = normal((2, 8, 8, 3))
        with mock.patch.object(
            layers.Convolution, "_product", return_value=x
        ) as product:
            layer(x)
            layer(x, training=False)
            product.assert_not_called()
            layer(x, training=True)
            product.assert_called_once()

    def test_a_gpu_convolves(self):
        devices = [mock.Mock(device_type=kind) for kind in ("CPU", "GPU")]
        with (
            mock.patch.object(
                tf.config, "get_visible_devices", return_value=devices
            ),
            mock.patch.object(
                pathlib.Path, "read_text", return_value="amx_bf16"
            ),
        ):
            self.assertFalse(convolutions._multiplies_tiles.__wrapped__())

    def test_kernel_has_variance_two_over_fan_out(self):
        layer = layers.Convolution(256, 3)
        layer.build((None, 8, 8, 64))
        kernel = np.array(layer.kernel)
        np.testing.assert_allclose(kernel.var(), 2 / (3 * 3 * 256), rtol=0.02)
        # A truncated normal ends at 2 / 0.88 standard deviations.
        self.assertGreater(np.abs(kernel).max(), 3.5 * kernel.std())

    def test_refuses_an_even_kernel_and_an_unknown_padding(self):
        with self.assertRaisesRegex(ValueError, "must be odd.*received 2"):
            layers.Convolution(4, 2)
        with self.assertRaisesRegex(ValueError, "padding.*'valid'"):
            layers.Convolution(4, 3, padding="valid")


class ShortcutTest(parameterized.TestCase):
    @parameterized.parameters(
        itertools.product(
            (
                *SHORTCUTS,
                "A(zeros='both')",
                "constant_scaling(shortcut_scale=0.3, residual_scale=1.0)",
                "exclusive_gating(gate_bias=-1)",
            ),
            ((1, 4), (2, 8)),
        )
    )
    def test_sum_is_the_formula_of_the_papers(self, name, stride_and_out):
        stride, out = stride_and_out
        x = normal((2, 6, 6, 4))
        residual = normal((2, 6 // stride, 6 // stride, out), 1)
        layer = identifiers.get(name, stride=stride)
        layer(x, residual)
        if "bias" not in name:
            randomize(layer)
        np.testing.assert_allclose(
            layer(x, residual),
            as_shortcut(layer, out)(x, residual),
            atol=1e-4,
        )

    def test_dropout_drops_at_its_rate_and_keeps_the_mean(self):
        x = np.ones((4, 32, 32, 16), "float32")
        layer = layers.DropoutShortcut(rate=0.25)
        y = np.array(layer(x, np.zeros_like(x), training=True))
        np.testing.assert_allclose(np.mean(y == 0), 0.25, atol=0.01)
        np.testing.assert_allclose(y[y > 0], 1 / 0.75, rtol=1e-6)

    def test_gates_start_at_their_bias(self):
        layer = layers.ExclusiveGating(gate_bias=-7.0)
        layer.build((None, 4, 4, 3), (None, 4, 4, 3))
        np.testing.assert_array_equal(layer.gate.bias, np.full(3, -7.0))

    @parameterized.parameters("A", "dropout", "constant_scaling")
    def test_identity_cannot_drop_channels(self, name):
        with self.assertRaisesRegex(ValueError, "8 channels.*residual of 4"):
            identifiers.get(name)(normal((1, 4, 4, 8)), normal((1, 4, 4, 4)))

    def test_unknown_names_are_refused_with_a_near_one(self):
        with self.assertRaisesRegex(ValueError, "did you mean 'dropout'"):
            identifiers.get("drop_out")
        with self.assertRaisesRegex(ValueError, "takes gate_bias"):
            identifiers.get("exclusive_gating(bias=-7)")
        with self.assertRaisesRegex(ValueError, "shortcut A takes zeros"):
            identifiers.get("A(zeros='left')")

    @parameterized.parameters(
        "exclusive_gating(-7)",
        "exclusive_gating(gate_bias=-7)(3)",
        "exclusive_gating(gate_bias=-7).f()",
        "exclusive_gating()()",
        "exclusive_gating(*[1])",
        "exclusive_gating(**{'gate_bias': -7})",
        "exclusive_gating(gate_bias=-7",
        "exclusive_gating(gate_bias=-7) or f()",
    )
    def test_what_is_not_one_call_with_names_is_refused(self, text):
        with self.assertRaisesRegex(ValueError, "takes gate_bias, as in"):
            identifiers.get(text)

    def test_what_the_unit_sets_is_refused(self):
        for text in ("B(batch_norm=False)", "A(stride=2)"):
            with self.assertRaisesRegex(ValueError, "takes .*received"):
                identifiers.get(text)

    def test_identifiers_of_one_function_are_the_same(self):
        configured = layers.ExclusiveGating(2, gate_bias=-7.0, name="mine")
        self.assertTrue(
            identifiers.is_same(configured, "exclusive_gating(gate_bias=-7)")
        )
        self.assertFalse(identifiers.is_same(configured, "exclusive_gating"))
        self.assertFalse(identifiers.is_same("B", "C"))

    def test_configured_instance_is_copied_with_the_stride_of_the_unit(self):
        given = layers.ExclusiveGating(gate_bias=-7.0)
        got = identifiers.get(given, stride=2)
        self.assertIsNot(got, given)
        self.assertEqual((got.gate_bias, got.stride), (-7.0, 2))
        self.assertEqual(given.stride, 1)


class UnitTest(parameterized.TestCase):
    @parameterized.parameters(
        itertools.product(UNITS, (False, True), ((1, 16), (2, 4)), "AB")
    )
    def test_output_is_the_formula_of_the_papers(
        self, name, bottleneck, stride_and_channels, shortcut
    ):
        stride, channels = stride_and_channels
        unit = units.UNITS[name](
            4 if bottleneck else 16, stride, bottleneck, shortcut
        )
        x = normal((2, 6, 6, channels))
        self.assertEqual(
            unit.compute_output_shape(x.shape), tuple(unit(x).shape)
        )
        randomize(unit)
        convolutions, norms = zip(*unit.pairs(), strict=True)
        expected = reference.unit(
            name,
            x,
            [as_convolution(layer) for layer in convolutions],
            [as_norm(layer) for layer in norms],
            as_shortcut(unit.shortcut, 16),
            activated=stride > 1,
        )
        np.testing.assert_allclose(unit(x), expected, atol=2e-4)

    @parameterized.parameters(itertools.product(UNITS, SHORTCUTS))
    def test_unit_is_its_shortcut_when_the_residual_is_zero(self, name, kind):
        unit = units.UNITS[name](4, shortcut=kind)
        x = normal((2, 6, 6, 4))
        unit(x)
        for convolution, _ in unit.pairs():
            convolution.kernel.assign(np.zeros(convolution.kernel.shape))
        y = as_shortcut(unit.shortcut, 4)(x, np.zeros_like(x))
        if name == "batch_norm_after_addition":
            y = as_norm(unit.pairs()[-1][1])(y)
        if name in ("original", "batch_norm_after_addition"):
            y = reference.relu(y)
        np.testing.assert_allclose(unit(x), y, atol=1e-5)

    @parameterized.parameters("pre_activation", "relu_only_pre_activation")
    def test_first_unit_takes_the_activated_signal_as_it_is(self, name):
        unit = units.UNITS[name](4, activated_input=True, shortcut="A")
        x = normal((2, 6, 6, 4))
        unit(x)
        randomize(unit)
        pairs = unit.pairs()
        if name == "pre_activation":
            self.assertIsNone(pairs[0][1])
            y = as_convolution(pairs[0][0])(x)
            y = reference.relu(as_norm(pairs[1][1])(y))
            expected = x + as_convolution(pairs[1][0])(y)
        else:
            y = as_norm(pairs[0][1])(as_convolution(pairs[0][0])(x))
            y = as_convolution(pairs[1][0])(reference.relu(y))
            expected = x + as_norm(pairs[1][1])(y)
        np.testing.assert_allclose(unit(x), expected, atol=1e-4)

    @parameterized.parameters(("1x1", (2, 1, 1)), ("3x3", (1, 2, 1)))
    def test_bottleneck_strides_where_it_is_told(self, where, strides):
        unit = layers.OriginalUnit(
            4, 2, bottleneck=True, bottleneck_stride=where
        )
        unit.build((None, 8, 8, 16))
        got = [convolution.stride for convolution, _ in unit.pairs()]
        self.assertEqual(tuple(got), strides)

    def test_batch_normalization_trains_on_the_statistics_of_the_batch(self):
        unit = layers.OriginalUnit(4, shortcut="A")
        x = normal((4, 6, 6, 4))
        y = unit(x, training=True)
        pairs = unit.pairs()
        expected = np.array(x)
        for i, (convolution, norm) in enumerate(pairs):
            expected = as_convolution(convolution)(expected)
            mean, variance = reference.batch_statistics(expected)
            np.testing.assert_allclose(norm.moving_mean, 0.1 * mean, atol=1e-5)
            np.testing.assert_allclose(
                norm.moving_variance, 0.9 + 0.1 * variance, atol=1e-5
            )
            expected = reference.batch_normalization(
                expected, 1, 0, mean, variance
            )
            if i == 0:
                expected = reference.relu(expected)
        np.testing.assert_allclose(y, reference.relu(x + expected), atol=1e-4)

    def test_residual_survives_at_its_probability_and_keeps_its_mean(self):
        unit = layers.PreActivationUnit(
            4, shortcut="A", survival_probability=0.75
        )
        x = normal((1, 4, 4, 4)).repeat(4000, axis=0)
        whole = layers.PreActivationUnit(4, shortcut="A")
        whole(x)
        unit(x)
        whole.set_weights(unit.get_weights()[: len(whole.weights)])
        residual = np.array(whole(x, training=True) - x)
        dropped = np.array(unit(x, training=True) - x)
        survives = np.abs(dropped).max((1, 2, 3)) > 1e-4
        np.testing.assert_allclose(survives.mean(), 0.75, atol=0.03)
        np.testing.assert_allclose(
            dropped[survives], residual[survives] / 0.75, atol=1e-4
        )
        # Nothing is dropped at inference.
        self.assertTrue(np.all(np.ptp(np.array(unit(x)), axis=0) < 1e-4))

    @parameterized.parameters(
        ({"bottleneck_stride": "2x2"}, "bottleneck_stride.*'2x2'"),
        ({"survival_probability": 0.0}, "survival_probability.*0.0"),
        ({"shortcut": "D"}, "shortcut must be one of A, B, C.*'D'"),
    )
    def test_refuses_what_is_not_allowed(self, arguments, message):
        with self.assertRaisesRegex(ValueError, message):
            layers.OriginalUnit(4, **arguments)

    def test_unknown_unit_is_refused_with_a_near_one(self):
        with self.assertRaisesRegex(ValueError, "did you mean 'original'"):
            units.get("orginal")


class RoundTripTest(parameterized.TestCase):
    @parameterized.parameters(itertools.product(UNITS, SHORTCUTS))
    def test_unit_comes_back_from_its_config_and_its_file(self, name, kind):
        unit = units.UNITS[name](
            4, 2, True, kind, survival_probability=0.9, name="unit"
        )
        model = keras.Sequential([keras.Input((8, 8, 4)), unit])
        randomize(unit)
        directory = self.enter_context(tempfile.TemporaryDirectory())
        path = f"{directory}/unit.keras"
        model.save(path)
        again = keras.models.load_model(path)
        self.assertEqual(again.layers[0].get_config(), unit.get_config())
        x = normal((2, 8, 8, 4))
        np.testing.assert_array_equal(again(x), model(x))

    def test_weight_paths_are_those_of_the_papers_words(self):
        unit = layers.OriginalUnit(4, 2, shortcut="B", name="stage2_unit1")
        keras.Sequential([keras.Input((8, 8, 2)), unit])
        paths = [w.path.partition("/")[2] for w in unit.trainable_weights]
        self.assertContainsSubset(
            [
                "stage2_unit1/conv1/kernel",
                "stage2_unit1/norm1/gamma",
                "stage2_unit1/shortcut/projection/kernel",
                "stage2_unit1/shortcut/norm/beta",
            ],
            [w.path for w in unit.trainable_weights] + paths,
        )


if __name__ == "__main__":
    absltest.main()
