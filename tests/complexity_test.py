"""Counts of real models against the laws of the papers."""

import itertools
from unittest import mock

import keras
import pytest
from absl.testing import parameterized

import keras_resnet
from keras_resnet import networks
from keras_resnet.analysis import complexity
from keras_resnet.layers import shortcuts
from tests import reference

PLAIN = [name for name in reference.NAMES if name.startswith("plain")]
RESIDUAL = [name for name in reference.NAMES if name not in PLAIN]
DEEP = [name for name in RESIDUAL if "1001" in name or "1202" in name]
OTHERS = [name for name in RESIDUAL if name not in DEEP]

# Counts do not depend on values, and drawing 60 million values is slow.
zeros = mock.patch(
    "keras_resnet.layers.convolutions.papers_initializer", lambda: "zeros"
)


def setUpModule():
    zeros.start()


def tearDownModule():
    zeros.stop()


class ComplexityTest(parameterized.TestCase):
    def check(self, name, shortcut=None, bottleneck_stride="1x1"):
        model = keras_resnet.resnet(
            name, shortcut=shortcut, bottleneck_stride=bottleneck_stride
        )
        report = complexity.complexity(model)
        expected = reference.counts(
            reference.layout(name), shortcut, bottleneck_stride
        )
        self.assertEqual(
            model.count_params(),
            expected.parameters + expected.moving_statistics,
        )
        self.assertEqual(
            [report[count] for count in complexity.COUNTS],
            [*expected[:3], 4 * expected.activations],  # float32
        )
        return report

    @parameterized.parameters(*PLAIN)
    def test_counts_of_plain_nets_equal_those_of_the_papers(self, name):
        self.check(name)

    @parameterized.product(name=OTHERS, shortcut=("A", "B", "C"))
    def test_counts_of_options_a_b_and_c_equal_those_of_the_papers(
        self, name, shortcut
    ):
        self.check(name, shortcut)

    @parameterized.product(name=DEEP, shortcut=("A", "B", "C"))
    @pytest.mark.slow
    def test_counts_of_a_thousand_layers_equal_those_of_the_papers(
        self, name, shortcut
    ):
        self.check(name, shortcut)

    @parameterized.parameters(
        ("resnet110", "convolution"),
        ("resnet20", "exclusive_gating"),
        ("resnet20", "shortcut_only_gating"),
        ("resnet20", "constant_scaling"),
        ("resnet20", "dropout"),
    )
    def test_counts_of_other_shortcuts_follow_from_their_form(
        self, name, shortcut
    ):
        self.check(name, shortcut)

    @parameterized.parameters("resnet50", "resnet152", "resnet164v2")
    def test_a_stride_on_the_3x3_convolution_costs_more(self, name):
        v1, v15 = self.check(name), self.check(name, None, "3x3")
        self.assertEqual(v1["parameters"], v15["parameters"])
        self.assertLess(v1["multiply_adds"], v15["multiply_adds"])

    @parameterized.parameters(
        "batch_norm_after_addition",
        "relu_before_addition",
        "relu_only_pre_activation",
    )
    def test_other_orders_of_a_unit_cost_what_the_original_one_does(self, unit):
        original = self.check("resnet20")
        other = complexity.complexity(keras_resnet.ResNet20(unit=unit))
        for count in complexity.COUNTS:
            self.assertEqual(original[count], other[count])

    def test_a_loop_costs_what_its_units_cost(self):
        looped, unrolled = (
            complexity.complexity(keras_resnet.ResNet32V2(looped=looped))
            for looped in (True, False)
        )
        self.assertEqual(looped, unrolled)

    def test_stages_and_layers_add_up_to_the_totals(self):
        report = complexity.complexity(keras_resnet.ResNet50V2())
        names = [stage["name"] for stage in report["stages"]]
        stages = [f"stage{i}" for i in range(1, 5)]
        self.assertEqual(names, ["stem", *stages, "top"])
        for parts in (report["stages"], report["layers"]):
            for count in complexity.COUNTS:
                total = sum(part[count] for part in parts)
                self.assertEqual(total, report[count])

    def test_a_layer_inside_a_unit_has_its_own_counts(self):
        report = complexity.complexity(keras_resnet.ResNet18())
        layers = {layer["name"]: layer for layer in report["layers"]}
        projection = layers["stage2_unit1/shortcut/projection"]
        self.assertEqual(projection["kind"], "convolution")
        self.assertEqual(projection["output_shape"], (28, 28, 128))
        self.assertEqual(projection["parameters"], 64 * 128)
        self.assertEqual(projection["multiply_adds"], 64 * 128 * 28**2)
        self.assertEqual(projection["activation_bytes"], 4 * 128 * 28**2)

    def test_half_precision_halves_all_activations_but_the_probabilities(self):
        expected = reference.counts(reference.layout("resnet20")).activations
        policy = keras.config.dtype_policy()
        keras.config.set_dtype_policy("mixed_bfloat16")
        try:
            report = complexity.complexity(keras_resnet.ResNet20())
        finally:
            keras.config.set_dtype_policy(policy)
        self.assertEqual(report["activation_bytes"], 2 * (expected - 10) + 40)

    def test_an_open_image_size_is_asked_for_and_then_used(self):
        model = keras_resnet.ResNet18(include_top=False)
        with self.assertRaisesRegex(ValueError, "input_shape="):
            complexity.complexity(model)
        report = complexity.complexity(model, (96, 96, 3))
        layout = reference.layout("resnet18")._replace(image_size=96, classes=0)
        expected = reference.counts(layout)
        self.assertEqual(report["parameters"], expected.parameters)
        self.assertEqual(report["multiply_adds"], expected.multiply_adds)

    def test_models_of_others_are_counted_too(self):
        image = keras.Input((8, 8, 3))
        x = keras.layers.ZeroPadding2D(1)(image)
        x = keras.layers.Conv2D(4, 3, strides=2)(x)  # 4 x 4 x 4
        y = keras.layers.Conv2D(4, 1, groups=2)(x)
        x = keras.layers.ReLU()(keras.layers.Add()([x, y]))
        x = keras.layers.Dense(5)(keras.layers.GlobalMaxPooling2D()(x))
        report = complexity.complexity(keras.Model(image, x))
        self.assertEqual(report["parameters"], 112 + 12 + 25)
        self.assertEqual(report["multiply_adds"], 16 * 108 + 16 * 8 + 20)
        self.assertEqual(report["activation_bytes"], 4 * (3 * 64 + 4 + 5))

    def test_a_model_inside_a_model_is_opened(self):
        base = keras_resnet.ResNet20(classes=7)
        image = keras.Input((32, 32, 3))
        model = keras.Model(image, keras.layers.Dense(2)(base(image)))
        inner, outer = map(complexity.complexity, (base, model))
        self.assertEqual(outer["parameters"], inner["parameters"] + 16)
        self.assertEqual(outer["multiply_adds"], inner["multiply_adds"] + 14)
        self.assertIn(
            "resnet20/stem_conv", [p["name"] for p in outer["layers"]]
        )

    def test_a_model_of_open_size_inside_one_has_the_size_that_it_is_given(
        self,
    ):
        spec = keras_resnet.Spec("small", (1, 1), (4, 8), stem="cifar")
        image = keras.Input((16, 16, 3))
        counts = [
            complexity.complexity(
                keras.Model(
                    image,
                    keras_resnet.resnet(
                        spec, include_top=False, pooling="avg", input_shape=size
                    )(image * 2.0),
                )
            )["multiply_adds"]
            for size in (None, (16, 16, 3))
        ]
        self.assertEqual(*counts)

    def test_weights_of_a_shortcut_of_ones_own_are_counted(self):
        class Scale(keras_resnet.layers.Shortcut):
            def build(self, x_shape, residual_shape):
                super().build(x_shape, residual_shape)
                self.scale = self.add_weight(shape=(), name="scale")

            def call(self, x, residual):
                return self.matched(x, residual) + self.scale * residual

        plain = complexity.complexity(keras_resnet.ResNet20())
        report = complexity.complexity(keras_resnet.ResNet20(shortcut=Scale()))
        self.assertEqual(report["parameters"], plain["parameters"] + 9)
        self.assertEqual(report["multiply_adds"], plain["multiply_adds"])

    def test_a_kernel_that_is_not_understood_is_an_error(self):
        image = keras.Input((8, 8, 3))
        x = keras.layers.DepthwiseConv2D(3, name="depthwise")(image)
        with self.assertRaisesRegex(ValueError, "depthwise, a DepthwiseConv2D"):
            complexity.complexity(keras.Model(image, x))


class SpecTest(parameterized.TestCase):
    """Counts without a model."""

    def test_counts_by_the_spec_equal_those_of_the_papers(self):
        for name, shortcut, stride in itertools.product(
            reference.NAMES, shortcuts.SHORTCUTS, ("1x1", "3x3")
        ):
            layout = reference.layout(name)
            self.assertEqual(
                complexity.spec_multiply_adds(
                    keras_resnet.MODELS[name],
                    layout.image_size,
                    layout.classes,
                    shortcut,
                    stride,
                ),
                reference.counts(layout, shortcut, stride).multiply_adds,
                (name, shortcut, stride),
            )

    @parameterized.parameters("resnet18", "resnet32v2")
    def test_counts_by_the_spec_are_those_of_a_model_of_odd_images(self, name):
        network = networks.get_network(name)
        model = network.build(input_shape=(45, 45, 3), classes=7)
        self.assertEqual(
            network.multiply_adds(45, 7, {}),
            complexity.complexity(model)["multiply_adds"],
        )


class ClaimsTest(parameterized.TestCase):
    """Tests of the statements of [1] about costs."""

    def test_identity_shortcuts_add_neither_parameters_nor_multiply_adds(self):
        residual = complexity.complexity(keras_resnet.ResNet34(shortcut="A"))
        plain = complexity.complexity(keras_resnet.PlainNet34())
        for count in ("parameters", "multiply_adds"):
            self.assertEqual(residual[count], plain[count])

    @pytest.mark.slow
    def test_projections_double_a_bottleneck(self):
        # [1, Sec. 4.1]: "the time complexity and model size are doubled".
        costs = [
            {
                count: sum(
                    layer[count]
                    for layer in complexity.complexity(model)["layers"]
                    if layer["name"].startswith("stage2_unit2/")
                )
                for count in ("parameters", "multiply_adds")
            }
            for model in (
                keras_resnet.ResNet50(shortcut="B"),
                keras_resnet.ResNet50(shortcut="C"),
            )
        ]
        for count, identity in costs[0].items():
            self.assertAlmostEqual(costs[1][count] / identity, 2, delta=0.1)

    def test_152_layers_cost_less_than_vgg_16(self):
        report = complexity.complexity(keras_resnet.ResNet152())
        lines = complexity.comparison([report]).splitlines()
        names = [line.split()[0] for line in lines]
        self.assertEqual(
            names,
            ["network", "googlenet", "resnet152", "vgg16", "vgg19"]
            + ["prelu_net"],
        )

    def test_other_nets_have_the_counts_of_their_layout(self):
        others = {row["name"]: row for row in complexity.OTHERS}
        _, *prelu_net = reference.prelu_net()
        vgg16, convolutions, _ = reference.vgg(16)
        vgg19, _, everything = reference.vgg(19)
        expected = {
            "vgg16": (vgg16, convolutions),
            "vgg19": (vgg19, everything),
            "googlenet": reference.googlenet(),
            "prelu_net": tuple(prelu_net),
        }
        found = {
            name: (row["parameters"], row["multiply_adds"])
            for name, row in others.items()
        }
        self.assertEqual(found, expected)

    def test_counts_of_other_nets_are_near_those_that_are_printed(self):
        for row in complexity.OTHERS:
            ratio = row["multiply_adds"] / row["printed"]
            self.assertAlmostEqual(ratio, 1, delta=0.06, msg=row["name"])


class TableTest(parameterized.TestCase):
    def test_a_table_has_a_line_for_each_part_and_one_for_the_total(self):
        report = complexity.complexity(keras_resnet.ResNet20())
        for by in ("stages", "layers"):
            lines = complexity.table(report, by).splitlines()
            self.assertLen(lines, len(report[by]) + 2)
            self.assertLen({len(line) for line in lines}, 1)
            self.assertEqual(lines[0].split()[0], "resnet20")
            self.assertEqual(
                lines[-1].split(), ["total", "269,722", "40,551,040", "1.85"]
            )

    def test_a_table_by_something_else_is_an_error(self):
        report = complexity.complexity(keras_resnet.ResNet20())
        with self.assertRaisesRegex(ValueError, "received 'units'"):
            complexity.table(report, "units")
