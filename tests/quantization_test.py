"""Networks in int8 kernels predict nearly the same as the networks.

Truth is the folded network in float32, whose errors `folding_test` bounds.
"""

import collections
import os
import unittest
from typing import ClassVar

import keras
import numpy as np
import pytest
import tensorflow as tf
from absl.testing import absltest
from absl.testing import parameterized

import keras_resnet
from keras_resnet import layers
from keras_resnet.serving import calibration
from keras_resnet.serving import exportable
from keras_resnet.serving import folding
from keras_resnet.serving import model_sources
from keras_resnet.serving import quantization
from tests import folding_test

SUM = "QuantizedConv2DWithBiasSumAndReluAndRequantize"


def images(size=12, count=32):
    """Images of different colours and contrasts."""
    rng = np.random.default_rng(4)
    noise = rng.normal(size=(count, size, size, 3))
    contrast = rng.uniform(0.2, 2.0, (count, 1, 1, 1))
    colour = rng.normal(size=(count, 1, 1, 3))
    return (contrast * noise + colour).astype("float32")


def quantized(model, size=12):
    """The concrete function of a network that these images calibrate."""
    function = quantization.quantize(model, images(size))
    shape = [None, size, size, model.input_shape[-1]]
    return tf.function(
        function, [tf.TensorSpec(shape, tf.float32)], autograph=False
    ).get_concrete_function()


def used(function):
    return collections.Counter(
        operation.type for operation in function.graph.get_operations()
    )


def relative_error(found, expected):
    """The error of each output, of its deviation over the images."""
    error = np.sqrt(np.mean(np.square(found - expected), 0))
    return np.median(error / np.std(expected, 0))


def readers(definition):
    """The nodes that read each node's memory, without bitcasts."""
    found = collections.defaultdict(set)
    for node in definition.node:
        for name in node.input:
            found[name.partition(":")[0]].add(node.name)
    nodes = {node.name: node for node in definition.node}

    def behind(name):
        for reader in found[name]:
            if nodes[reader].op == "Bitcast":
                yield from behind(reader)
            else:
                yield reader

    return lambda name: set(behind(name))


def check_summands(test, definition):
    """No summand has a reader that may run after the sum overwrote it."""
    nodes = {node.name: node for node in definition.node}
    inputs = {
        name: [i.removeprefix("^").partition(":")[0] for i in node.input]
        for name, node in nodes.items()
    }
    of = readers(definition)
    sums = [node for node in definition.node if node.op == SUM]
    memories = []
    for node in sums:
        memory = inputs[node.name][9]
        while nodes[memory].op == "Bitcast":
            memory = inputs[memory][0]
        before, waiting = set(), [node.name]
        while waiting:
            for name in inputs[waiting.pop()]:
                if name not in before:
                    before.add(name)
                    waiting.append(name)
        test.assertContainsSubset(of(memory), before | {node.name})
        memories.append(memory)
    test.assertLen(set(memories), len(sums))
    return len(sums)


class FamilyTest(parameterized.TestCase):
    """Every unit with every shortcut."""

    def check(self, model, size=12, shortcut=""):
        function = quantized(model, size)
        x = images(size)
        expected = folding.fold(model)(x).numpy()
        error = relative_error(function(tf.constant(x)).numpy(), expected)
        # Random plain networks lose the differences between images, and the
        # noise remains.
        self.assertBetween(error, 1e-4, 0.6 if shortcut == "none" else 0.2)
        check_summands(self, function.graph.as_graph_def())
        counts = used(function)
        # Gates are in float32.
        self.assertEqual(counts["Conv2D"], 3 if "gating" in shortcut else 0)
        self.assertEmpty(function.captured_inputs)
        return counts

    @parameterized.named_parameters(
        (key, *value) for key, value in folding_test.ORDERS.items()
    )
    @pytest.mark.slow
    def test_cifar_network(self, unit, shortcut):
        model = folding_test.network(unit=unit, shortcut=shortcut)
        self.check(model, shortcut=shortcut)

    @parameterized.named_parameters(
        (key, *value) for key, value in folding_test.ORDERS.items()
    )
    @pytest.mark.slow
    def test_imagenet_network_of_bottlenecks(self, unit, shortcut):
        model = folding_test.network(
            folding_test.IMAGENET, 20, unit=unit, shortcut=shortcut
        )
        self.check(model, 20, shortcut)

    @parameterized.parameters("A", "B", "C", "none")
    def test_original_units_stay_in_8_bits(self, shortcut):
        model = folding_test.network(shortcut=shortcut)
        counts = self.check(model, shortcut=shortcut)
        # The image, and the features for the classifier.
        self.assertEqual((counts["QuantizeV2"], counts["Dequantize"]), (1, 1))
        self.assertEqual(counts[SUM], 0 if shortcut == "none" else 3)

    @parameterized.parameters("pre_activation", "relu_before_addition")
    def test_sums_without_relu_are_in_float32(self, unit):
        counts = self.check(folding_test.network(unit=unit))
        self.assertEqual(counts[SUM], 0)

    def test_network_of_other_layouts(self):
        for arguments in (
            {"bottleneck_stride": "3x3"},
            {"padding": "same"},
            {"shortcut": layers.OptionA(zeros="both")},
        ):
            with self.subTest(str(arguments)):
                model = folding_test.network(
                    folding_test.IMAGENET, 20, **arguments
                )
                self.assertEqual(self.check(model, 20)[SUM], 3)

    def test_looped_network(self):
        model = folding_test.network(
            keras_resnet.Spec("small", (3, 2), (4, 8), stem="cifar"),
            looped=True,
        )
        self.assertEqual(self.check(model)[SUM], 5)

    def test_network_that_was_changed_and_nested(self):
        """Keras computes what this package does not know, in float32."""
        image = keras.Input((12, 12, 3))
        base = folding_test.network(include_top=False)
        x = keras.layers.Conv2D(6, 3, groups=3, activation="relu")(image)
        x = keras.layers.Conv2D(3, 5, padding="same", activation="relu")(x)
        x = keras.layers.ZeroPadding2D(1)(x)
        x = keras.layers.GlobalAveragePooling2D()(base(x))
        model = keras.Model(image, keras.layers.Dense(4)(x))
        function = quantized(folding_test.weighted(model))
        x = images()
        error = relative_error(
            function(tf.constant(x)).numpy(), folding.fold(model)(x).numpy()
        )
        self.assertLess(error, 0.2)
        self.assertEqual(used(function)[SUM], 3)

    def test_network_without_convolutions_is_rejected(self):
        image = keras.Input((4, 4, 3))
        x = keras.layers.GlobalAveragePooling2D()(image)
        model = keras.Model(image, keras.layers.Dense(2)(x), name="plain")
        with self.assertRaisesRegex(folding.ModelError, "'plain', which has"):
            quantization.quantize(model, images(4))

    def test_activations_that_are_not_finite_are_rejected(self):
        model = folding_test.network()
        kernel = model.get_layer("stem_conv").kernel
        kernel.assign(np.full(kernel.shape, 1e38))
        with self.assertRaisesRegex(folding.ModelError, "must be finite"):
            quantization.quantize(model, images())


class NoiseTest(parameterized.TestCase):
    """The error of a unit is the noise of its roundings."""

    @parameterized.product(
        bottleneck=(False, True), shortcut=("A", "B", "C"), stride=(1, 2)
    )
    def test_error_is_that_of_independent_roundings(
        self, bottleneck, shortcut, stride
    ):
        """A step s gives the variance s^2 / 12; a convolution adds them up.

        The sketch of these kernels lost 9% in units with a projection, where
        the rounding explains 1%.
        """
        unit = layers.OriginalUnit(
            16, stride, bottleneck, shortcut=shortcut, name="unit"
        )
        image = keras.Input((12, 12, 64 if bottleneck else 16))
        y = unit(keras.layers.ReLU()(image))
        model = folding_test.weighted(keras.Model(image, y))
        rng = np.random.default_rng(5)
        x = rng.normal(size=(64, *image.shape[1:])).astype("float32")
        function = quantization.quantize(model, x)
        found = tf.function(function, autograph=False)(x).numpy()
        expected = folding.fold(model)(x).numpy()
        error = np.sqrt(np.mean(np.square(found - expected)))
        predicted = self.predicted(unit, x, expected, shortcut)
        self.assertBetween(error / predicted, 0.5, 1.5)
        self.assertLess(np.abs(np.mean(found - expected)), 0.3 * predicted)

    def predicted(self, unit, x, y, shortcut):
        """Root of the variances of the roundings, carried to the output."""
        x = np.maximum(x, 0.0)
        steps = self.step(x) ** 2 / 12.0
        noise, signal = steps, x
        for convolution, norm in unit.pairs():
            noise, signal = self.convolved(convolution, norm, noise, signal)
            if norm is not unit.pairs()[-1][1]:
                # About half of the numbers pass a ReLU.
                signal = np.maximum(signal, 0.0)
                noise = noise / 2.0 + self.step(signal) ** 2 / 12.0
        if getattr(unit.shortcut, "projection", None) is not None:
            of_shortcut, h = self.convolved(
                unit.shortcut.projection, unit.shortcut.norm, steps, x
            )
            # It is stored with its largest number added.
            noise += of_shortcut + (2.0 * self.step(h)) ** 2 / 12.0
        elif shortcut == "A":
            noise += steps
        passing = np.mean(y > 0.0)
        return np.sqrt(passing * (noise + self.step(y) ** 2 / 12.0))

    @staticmethod
    def step(x):
        """The step of the range that the calibration chooses."""
        largest = np.abs(x).max()
        counts, _ = np.histogram(np.abs(x), 2048, (0.0, largest))
        return calibration.least_error(counts, largest, 255) / 255.0

    @staticmethod
    def convolved(convolution, norm, noise, signal):
        """Variance of the noise, and the signal, after a convolution."""
        gain = norm.gamma / np.sqrt(norm.moving_variance + norm.epsilon)
        kernel = convolution.kernel.numpy() * np.asarray(gain)
        steps = np.abs(kernel).max((0, 1, 2)) / 127.0
        size = np.prod(kernel.shape[:3])
        noise = noise * np.mean(np.sum(kernel**2, (0, 1, 2)))
        noise += np.mean(signal**2) * size * np.mean(steps**2) / 12.0
        signal = norm(convolution(signal), training=False)
        return noise, np.asarray(signal)


class SummandTest(parameterized.TestCase):
    """A sum overwrites its summand, so nothing else may read it later."""

    def outputs(self):
        """Networks whose sums cannot all overwrite their summands."""
        model = folding_test.network(
            keras_resnet.Spec("small", (3, 2), (4, 8), stem="cifar"),
            looped=False,
        )
        units = [
            model.get_layer(f"stage{i}_unit{j}").output
            for i, j in ((1, 1), (1, 2), (1, 3), (2, 1))
        ]
        stem = model.get_layer("stem_relu").output
        pool = keras.layers.GlobalAveragePooling2D()
        image = model.input
        once = folding_test.network(include_top=False)
        twice = [once(image), once(image)]
        return {
            "output": (image, [*units, model.output], 2),
            "late": (image, [model.output * pool(units[0])[:, :1]], 4),
            "stem": (image, [keras.layers.Flatten()(stem), model.output], 4),
            "twice": (image, [pool(twice[0]) + 2.0 * pool(twice[1])], 3),
            "branches": (image, [self.branches(image)], 0),
        }

    @staticmethod
    def branches(image):
        """Two equal projections, which TensorFlow makes one."""
        x = keras.layers.ReLU()(image)
        make = lambda seed: layers.Convolution(3, 3, name=f"conv_{seed}")  # noqa: E731
        equal, others = make("equal"), (make(1), make(2))
        sums = [
            keras.layers.ReLU()(keras.layers.Add()([other(x), equal(x)]))
            for other in others
        ]
        return keras.layers.Concatenate()(sums)

    @parameterized.parameters("output", "late", "stem", "twice", "branches")
    def test_summand_that_others_read_is_not_overwritten(self, name):
        image, outputs, sums = self.outputs()[name]
        model = folding_test.weighted(keras.Model(image, outputs))
        function = quantized(model)
        self.assertEqual(
            check_summands(self, function.graph.as_graph_def()), sums
        )
        x = images()
        expected = [np.asarray(y) for y in keras.tree.flatten(model(x))]
        with tf.Graph().as_default(), tf.compat.v1.Session() as session:
            inputs = tf.compat.v1.placeholder(tf.float32, [None, 12, 12, 3])
            answers = keras.tree.flatten(function(inputs))
            # The process would end if the order of two readers could vary.
            for _ in range(20):
                found = session.run(answers, {inputs: x})
        for one, other in zip(found, expected, strict=True):
            one, other = (y.reshape(len(x), -1) for y in (one, other))
            self.assertLess(
                np.sqrt(np.mean(np.square(one - other))),
                0.1 * np.std(other) + 1e-6,
            )


class CalibrationTest(parameterized.TestCase):
    @parameterized.parameters(127, 255)
    def test_range_has_the_least_error(self, limit):
        """Against a search over ranges on the numbers themselves."""
        rng = np.random.default_rng(0)
        x = np.abs(np.append(rng.normal(size=200_000), 12.0))
        counts, _ = np.histogram(x, 2048, (0.0, x.max()))
        found = calibration.least_error(counts, x.max(), limit)

        def error(largest):
            step = largest / limit
            rounded = np.minimum(np.rint(x / step), limit) * step
            return np.sum(np.square(x - rounded))

        best = min(map(error, np.linspace(0.05, 1.0, 400) * x.max()))
        self.assertLess(found, 0.9 * x.max())
        self.assertLess(error(found), 1.05 * best)
        self.assertLess(error(found), 0.9 * error(x.max()))

    def test_images_of_several_batches_count(self):
        images = np.zeros([70, 2, 2, 1], "float32")
        images[69] = -3.0
        images[:, 0] = 1.0
        (found, zeros) = calibration.ranges(
            lambda x: [x, 0.0 * x],
            tf.TensorSpec([None, 2, 2, 1], tf.float32),
            images,
        )
        self.assertTrue(found.is_signed)
        self.assertAlmostEqual(found.largest, 3.0, delta=0.1)
        self.assertEqual(zeros, calibration.Range(1.0, False))


class Cifar10Test(parameterized.TestCase):
    """Trained ResNet-20s on all 10,000 test images of CIFAR-10."""

    SHIPPED: ClassVar = {"weights": "cifar10"}
    PUBLIC: ClassVar = {
        "weights": "resnet20-12fca82f.th",
        "arguments": {"shortcut": layers.OptionA(zeros="both")},
        "mean": [0.485, 0.456, 0.406],
        "standard_deviation": [0.229, 0.224, 0.225],
    }

    @parameterized.named_parameters(
        ("shipped", SHIPPED, 795), ("public", PUBLIC, 827)
    )
    @pytest.mark.slow
    def test_accuracy_is_that_of_float32(self, source, errors):
        folder = os.environ.get("KERAS_RESNET_DATA", "")
        if not folder:
            raise unittest.SkipTest("KERAS_RESNET_DATA is not set")
        source = dict(source)
        path = os.path.join(folder, "weights", source["weights"])
        if os.path.exists(path):
            source["weights"] = path
        found = model_sources.from_model(
            "resnet20",
            dataset="cifar10",
            data_dir=os.path.join(folder, "tfds"),
            **source,
        )
        images = found.images(10_000, with_calibration=True)
        prepare = exportable.input_function(found.model, found.preprocessing)
        functions = {
            "float32": folding.fold(found.model),
            "int8": quantization.quantize(
                found.model, np.asarray(prepare(images.calibration))
            ),
        }
        classes = {}
        for name, function in functions.items():
            ask = tf.function(
                lambda views, function=function: function(prepare(views)),
                autograph=False,
            )
            batches = np.split(images.views, 20)
            classes[name] = np.concatenate(
                [ask(batch).numpy().argmax(-1) for batch in batches]
            )
        wrong = {
            name: int(np.sum(best != images.labels))
            for name, best in classes.items()
        }
        same = np.mean(classes["int8"] == classes["float32"])
        print(f"{found.title}: errors {wrong}, same class {same:.2%}")
        self.assertEqual(wrong["float32"], errors)
        self.assertLess(abs(wrong["int8"] - errors), 30)
        self.assertGreaterEqual(same, 0.99)


if __name__ == "__main__":
    absltest.main()
