"""Signals and gradients against the equations of [2]."""

import math
import tempfile
from pathlib import Path

import keras
import numpy as np
import pytest
from absl.testing import absltest
from absl.testing import parameterized

import keras_resnet
from keras_resnet import weights
from keras_resnet.analysis import propagation
from keras_resnet.layers import shortcuts

SPEC = keras_resnet.Spec(
    "small", (5, 4), (4, 8), stem="cifar", classes=3, image_size=8
)


def batch(images=4, size=8, classes=3):
    x = np.random.default_rng(0).normal(size=(images, size, size, 3))
    return x.astype("float32"), np.arange(images) % classes


def small(**kwargs):
    keras.utils.set_random_seed(0)
    kwargs = {"unit": "pre_activation", "shortcut": "A", **kwargs}
    return keras_resnet.resnet(SPEC, **kwargs)


def report(model, **kwargs):
    return propagation.propagation(model, *batch(), **kwargs)


def units(report, key):
    return {unit["name"]: unit[key] for unit in report["units"]}


class PropagationTest(parameterized.TestCase):
    def test_the_last_signal_is_the_first_and_all_residuals(self):
        """Tests [2, Eq. 4], which fails with another f or h."""
        self.assertLess(report(small())["identity_error"], 1e-5)
        for kwargs in ({"unit": "original"}, {"shortcut": "constant_scaling"}):
            self.assertGreater(report(small(**kwargs))["identity_error"], 0.01)

    def test_an_identity_hands_the_gradient_on_as_it_is(self):
        """Tests the 1 of [2, Eq. 5] within a stage."""
        found = report(small())
        self.assertEqual(found["scale_product"], 1.0)
        through = units(found, "shortcut_gradient")
        for i in (2, 3, 4):
            np.testing.assert_allclose(
                through[f"stage2_unit{i}"], found["last_gradient"], rtol=1e-5
            )
        for i in (1, 2, 3, 4):
            np.testing.assert_allclose(
                through[f"stage1_unit{i}"], through["stage1_unit5"], rtol=1e-5
            )

    @parameterized.parameters(0.5, 0.9, 1.2)
    def test_a_scale_is_handed_on_to_the_power_of_the_depth(self, scale):
        """Tests the product of [2, Eq. 8] within a stage."""
        shortcut = keras_resnet.layers.ConstantScaling(shortcut_scale=scale)
        found = report(small(shortcut=shortcut))
        np.testing.assert_allclose(found["scale_product"], scale**8, rtol=1e-4)
        through = units(found, "shortcut_gradient")
        for i in (1, 2, 3, 4):
            np.testing.assert_allclose(
                through[f"stage1_unit{i}"],
                scale ** (5 - i) * through["stage1_unit5"],
                rtol=1e-4,
            )

    def test_a_gate_scales_by_what_it_leaves(self):
        gate = keras_resnet.layers.ShortcutOnlyGating(gate_bias=-6.0)
        model = small(shortcut=gate)
        for layer in model.layers:
            if isinstance(layer, keras_resnet.layers.Unit):
                kernel = layer.shortcut.gate.kernel
                kernel.assign(np.zeros(kernel.shape))
        left = 1 - 1 / (1 + math.exp(6.0))
        for scale in units(report(model), "scale").values():
            if scale is not None:
                self.assertAlmostEqual(scale, left, 5)

    def test_without_a_shortcut_nothing_passes(self):
        found = report(small(unit="original", shortcut="none"))
        self.assertEqual(found["shortcut_decay"], 0.0)
        self.assertEqual(found["scale_product"], 0.0)
        self.assertGreater(found["gradient_decay"], 0.0)

    @parameterized.parameters(0, 8)
    def test_the_gradient_is_that_of_differences(self, index):
        """Tests inference, in which E is a mean over the images."""
        model = small(classifier_activation=None)
        found = report(model, training=False)
        layers = [layer for layer in model.layers if "stage" in layer.name]
        before = keras.Model(model.input, layers[index].input)
        after = keras.Model(layers[index].input, model.output)
        x, labels = batch()
        signal, step = np.array(before(x)), 1e-2
        directions = np.random.default_rng(1).normal(size=(200, *signal.shape))

        def losses(signals):
            logits = after(signals.reshape(-1, *signal.shape[1:]))
            every = keras.losses.sparse_categorical_crossentropy(
                np.tile(labels, 200), logits, from_logits=True
            )
            return np.reshape(every, (200, 4)).mean(1)

        slopes = losses(signal + step * directions)
        slopes -= losses(signal - step * directions)
        # A random direction of variance 1 measures the norm of the gradient.
        norm = np.sqrt(np.mean(np.square(slopes))) / (2 * step)
        expected = found["units"][index]["gradient"]
        self.assertAlmostEqual(norm / expected, 1, delta=0.2)
        np.testing.assert_allclose(
            found["units"][index]["signal"],
            np.linalg.norm(signal) / 2,  # 4 images
            rtol=1e-5,
        )

    @parameterized.parameters("original", "pre_activation")
    def test_a_looped_network_is_measured_as_its_units(self, unit):
        unrolled = small(unit=unit)
        looped = small(unit=unit, looped=True)
        weights.copy(unrolled, looped)
        expected, found = report(unrolled), report(looped)
        self.assertEqual(units(found, "name"), units(expected, "name"))
        for key in ("signal", "residual", "gradient", "shortcut_gradient"):
            np.testing.assert_allclose(
                list(units(found, key).values()),
                list(units(expected, key).values()),
                rtol=1e-3,
            )

    def test_nothing_of_the_model_is_changed(self):
        model = small(shortcut="dropout", survival_probability=0.5)
        before = [keras.ops.convert_to_numpy(v) for v in model.variables]
        report(model)
        for variable, value in zip(model.variables, before, strict=True):
            np.testing.assert_array_equal(
                keras.ops.convert_to_numpy(variable), value
            )
        self.assertNotIn("call", vars(model.get_layer("stage1_unit1").shortcut))

    def test_what_is_no_chain_of_units_is_refused(self):
        image = keras.Input((8, 8, 3))
        x = keras.layers.GlobalAveragePooling2D()(image)
        other = keras.Model(image, keras.layers.Dense(3)(x))
        for model in (other, small(include_top=False)):
            with self.assertRaisesRegex(ValueError, "ends in a classifier"):
                report(model)


class PagesTest(parameterized.TestCase):
    def test_tables_have_a_line_for_each_unit_and_each_network(self):
        found = report(small())
        lines = propagation.table(found).splitlines()
        self.assertLen(lines, 1 + 9)
        self.assertLen({len(line) for line in lines}, 1)
        self.assertEqual(lines[1].split()[0], "stage1_unit1")
        lines = propagation.comparison({"a": found, "b": found}).splitlines()
        self.assertEqual([line.split()[0] for line in lines[1:]], ["a", "b"])

    def test_a_picture_has_a_line_for_each_network_and_measure(self):
        pytest.importorskip("matplotlib")
        found = report(small())
        figure = propagation.draw({"a": found, "b": found})
        self.assertLen(figure.axes, 3)
        for axes, key in zip(
            figure.axes,
            ("signal", "shortcut_gradient", "gradient"),
            strict=True,
        ):
            self.assertLen(axes.lines, 2)
            share = 1 if key == "signal" else found["last_gradient"]
            np.testing.assert_allclose(
                axes.lines[0].get_ydata(),
                np.array(list(units(found, key).values())) / share,
            )

    @parameterized.parameters("svg", "png")
    def test_a_plot_is_a_picture(self, ending):
        pytest.importorskip("matplotlib")
        folder = self.enter_context(tempfile.TemporaryDirectory())
        path = Path(folder) / f"gradients.{ending}"
        propagation.plot({"identity": report(small())}, path)
        magic = {"svg": b"<?xml", "png": b"\x89PNG"}[ending]
        self.assertTrue(path.read_bytes().startswith(magic))


@pytest.mark.large
class DepthTest(parameterized.TestCase):
    def test_what_vanishes_at_110_layers_is_what_failed_in_the_paper(self):
        """Tests [2, Sec. 3 and Table 1] at the start of training."""
        found = {}
        for name, shortcut in shortcuts.TABLE_1.items():
            keras.utils.set_random_seed(0)
            model = keras_resnet.ResNet110(
                shortcut=shortcut, unit="pre_activation", input_shape=(8, 8, 3)
            )
            found[name] = propagation.propagation(model, *batch(16, 8, 10))
        print(propagation.comparison(found))
        identity = found["identity"]
        self.assertLess(identity["identity_error"], 1e-5)
        self.assertEqual(identity["scale_product"], 1.0)
        self.assertGreater(identity["shortcut_decay"], 0.01)
        for name in found:
            decay = found[name]["shortcut_decay"]
            if "0.5, residual" in name or name.endswith("bias 0"):
                self.assertLess(found[name]["scale_product"], 1e-10, name)
                self.assertLess(decay, 1e-6 * identity["shortcut_decay"], name)
            elif name.endswith("bias -6"):
                # The product is below 0.9975^52 if the signal is large.
                self.assertGreater(found[name]["scale_product"], 0.05, name)
                self.assertGreater(decay, 0.1 * identity["shortcut_decay"])


if __name__ == "__main__":
    absltest.main()
