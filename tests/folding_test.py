"""Folded networks predict the same as the networks.

Truth is the Keras model, whose normalizations have statistics of their own.
"""

from unittest import mock

import keras
import numpy as np
import pytest
import tensorflow as tf
from absl.testing import absltest
from absl.testing import parameterized

import keras_resnet
from keras_resnet import layers
from keras_resnet.data import datasets
from keras_resnet.layers import shortcuts
from keras_resnet.layers import units
from keras_resnet.serving import folding

CIFAR = keras_resnet.Spec("small", (1, 2), (4, 8), stem="cifar", classes=5)
IMAGENET = keras_resnet.Spec("small", (2, 1), (4, 8), bottleneck=True)

ORDERS = {
    f"{unit}_{shortcut}": (unit, shortcut)
    for unit in units.UNITS
    for shortcut in shortcuts.SHORTCUTS
}


def network(spec=CIFAR, size=12, classes=5, activation=None, **arguments):
    """A network with logits, all of whose weights matter."""
    model = keras_resnet.resnet(
        spec,
        input_shape=(size, size, 3),
        classes=classes,
        classifier_activation=activation,
        **arguments,
    )
    return weighted(model)


def weighted(model):
    rng = np.random.default_rng(0)
    for weight in model.weights:
        if weight.name.endswith("kernel"):
            fan_in = np.prod(weight.shape[-4:-1])
            weight.assign(rng.normal(0.0, fan_in**-0.5, weight.shape))
        elif weight.name.endswith(("gamma", "variance")):
            weight.assign(rng.uniform(0.3, 1.7, weight.shape))
        elif weight.name.endswith(("beta", "mean", "bias")):
            weight.assign(rng.normal(0.0, 0.4, weight.shape))
    return model


def images(size=12, count=3):
    shape = (count, size, size, 3)
    return np.random.default_rng(1).normal(size=shape).astype("float32")


def traced(model, precision="float32"):
    """The nodes and the captured tensors of a folded network's graph."""
    function = tf.function(folding.fold(model, precision), autograph=False)
    graph = function.get_concrete_function(
        tf.TensorSpec(model.input_shape, tf.float32, name="image")
    ).graph
    return graph.as_graph_def(add_shapes=True).node, graph.captures


class AnswerTest(parameterized.TestCase):
    def assert_answers_as(self, model, function=None, size=12):
        expected = np.asarray(model(images(size), training=False))
        found = np.asarray((function or folding.fold(model))(images(size)))
        self.assertGreater(np.std(expected), 1e-3)
        error = np.max(np.abs(found - expected))
        self.assertLess(error, 1e-4 * np.max(np.abs(expected)))

    @parameterized.named_parameters((k, *v) for k, v in ORDERS.items())
    def test_cifar_network(self, unit, shortcut):
        self.assert_answers_as(network(unit=unit, shortcut=shortcut))

    @parameterized.named_parameters((k, *v) for k, v in ORDERS.items())
    def test_imagenet_network_of_bottlenecks(self, unit, shortcut):
        self.assert_answers_as(
            network(IMAGENET, 20, unit=unit, shortcut=shortcut), size=20
        )

    @parameterized.parameters(*units.UNITS)
    def test_looped_network(self, unit):
        self.assert_answers_as(
            network(unit=unit, shortcut="exclusive_gating", looped=True)
        )

    @parameterized.parameters(
        {"bottleneck_stride": "3x3"},
        {"padding": "same"},
        {"batch_norm_epsilon": 0.1},
        {"shortcut": layers.OptionA(zeros="both")},
        {"shortcut": layers.ConstantScaling(residual_scale=0.9)},
        {"activation": "softmax"},
    )
    def test_network_of_other_arguments(self, **arguments):
        self.assert_answers_as(network(IMAGENET, 20, **arguments), size=20)

    @parameterized.product(
        pooling=(None, "avg", "max"), unit=("original", "pre_activation")
    )
    def test_network_without_top(self, pooling, unit):
        self.assert_answers_as(
            network(include_top=False, pooling=pooling, unit=unit)
        )

    def test_images_of_any_size(self):
        model = keras_resnet.resnet(CIFAR, include_top=False)
        self.assert_answers_as(model, size=12)
        self.assert_answers_as(model, size=17)

    def test_network_with_another_head(self):
        base = network(include_top=False)
        x = keras.layers.GlobalAveragePooling2D()(base.output)
        x = keras.layers.Dropout(0.5)(x)
        x = keras.layers.Dense(4, use_bias=False)(x)
        self.assert_answers_as(keras.Model(base.input, x))

    def test_network_as_a_layer_of_another(self):
        base = network(include_top=False)
        x = image = keras.Input((12, 12, 3))
        x = keras.layers.GlobalMaxPooling2D()(base(x))
        x = keras.layers.Dense(4, activation="tanh")(x)
        self.assert_answers_as(keras.Model(image, x))

    def test_operations_before_and_behind_the_network(self):
        image = keras.Input((12, 12, 3))
        base = network(include_top=False, pooling="avg")
        x = base(image * 2.0 - 1.0)
        x = keras.layers.Dense(4)(x * keras.ops.sigmoid(x))
        self.assert_answers_as(keras.Model(image, x))

    def test_image_that_was_made_of_another(self):
        model = network(
            input_tensor=keras.Input((12, 12, 3)) / 0.5 - 1.0, activation=None
        )
        self.assert_answers_as(model)

    def test_grey_image_as_three_channels(self):
        image = keras.Input((6, 6, 1))
        x = keras.layers.UpSampling2D(2, interpolation="bilinear")(image)
        x = keras.layers.Concatenate()([x, x, x])
        x = network(include_top=False, pooling="avg")(x)
        model = keras.Model(image, keras.layers.Dense(4)(x))
        grey = images(6)[..., :1]
        for precision, share in (("float32", 1e-5), ("bfloat16", 0.05)):
            expected = np.asarray(model(grey))
            found = folding.fold(model, precision)(grey)
            error = np.max(np.abs(found - expected))
            self.assertLess(error, share * np.max(np.abs(expected)))

    def test_network_that_is_called_twice(self):
        image = keras.Input((12, 12, 3))
        base = network(include_top=False, pooling="avg")
        self.assert_answers_as(
            keras.Model(image, [base(image) - 2.0 * base(0.5 * image)])
        )

    def test_augmentation_is_switched_off(self):
        model = keras.Sequential(
            [
                keras.Input((12, 12, 3)),
                keras.layers.RandomFlip(seed=0),
                keras.layers.RandomRotation(0.4, seed=0),
                network(include_top=False),
                keras.layers.GlobalAveragePooling2D(),
                keras.layers.Dense(4),
            ]
        )
        self.assert_answers_as(model)
        _, captures = traced(model)
        self.assertEmpty(captures)

    def test_convolution_that_others_read_does_not_carry_the_normalization(
        self,
    ):
        image = keras.Input((12, 12, 3))
        x = layers.Convolution(4, 3)(image)
        normalization = layers.BatchNormalization()
        y = normalization(x)
        self.assert_answers_as(weighted(keras.Model(image, x + y)))
        self.assert_answers_as(
            weighted(keras.Model(image, y + normalization(2.0 * y)))
        )

    def test_several_outputs(self):
        model = network()
        model = keras.Model(
            model.input,
            [model.get_layer("pool").output, model.output],
        )
        expected = model(images())
        found = folding.fold(model)(images())
        self.assertLen(found, 2)
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_allclose(one, other, atol=1e-5)

    @parameterized.parameters("original", "pre_activation")
    def test_normalization_without_scale_and_centre(self, unit):
        x = image = keras.Input((12, 12, 3))
        x = layers.Convolution(4, 3)(x)
        x = layers.BatchNormalization(scale=False, center=False)(x)
        x = layers.units.UNITS[unit](4)(x)
        x = layers.BatchNormalization(center=False)(x)
        model = keras.Model(image, keras.layers.ReLU()(x))
        for weight in model.weights:
            if weight.name == "moving_variance":
                weight.assign(2.0 * keras.ops.ones(weight.shape))
        self.assert_answers_as(model)

    def test_unit_alone(self):
        unit = layers.PreActivationUnit(3)
        unit.build((None, 12, 12, 3))
        self.assert_answers_as(unit, folding.fold_unit(unit))

    def test_weights_are_those_of_the_moment(self):
        model = network()
        expected = np.asarray(model(images()))
        function = folding.fold(model)
        model.set_weights([0.0 * weight for weight in model.get_weights()])
        np.testing.assert_allclose(function(images()), expected, atol=1e-5)


def _quantized(mode):
    def change(model):
        model.get_layer("predictions").quantize(mode)

    return change


def _tuned(model):
    dense = model.get_layer("predictions")
    dense.enable_lora(2)
    dense.lora_kernel_b.assign(np.ones(dense.lora_kernel_b.shape))


def _patched(name):
    def change(model):
        layer = model.get_layer(name)
        before = layer.call
        layer.call = lambda x, **kwargs: 0.5 * before(x, **kwargs)

    return change


def _with_own_convolution(model):
    convolution = model.get_layer("stage2_unit1").conv1
    before = convolution.call
    convolution.call = lambda x, **kwargs: 0.5 * before(x, **kwargs)


def _with_own_forward(model):
    unit = model.get_layer("stage2_unit1")
    before = unit.forward
    unit.forward = lambda *args, **kwargs: 0.5 * before(*args, **kwargs)


def _in_eight_bits(model):
    """The activations as whole numbers."""
    model.get_layer("predictions").activation = lambda x: keras.ops.cast(
        keras.ops.cast(10.0 * x, "int8"), "float32"
    )


class OwnShortcut(layers.OptionA):
    def call(self, x, residual, training=None):
        return super().call(0.3 * x, residual, training)


class OwnUnit(layers.OriginalUnit):
    def forward(self, x, training=None, survival_probability=None):
        return 0.5 * super().forward(x, training, survival_probability)


class OwnNormalization(layers.BatchNormalization):
    def call(self, inputs, training=None, mask=None):
        return 1.0 + super().call(inputs, training, mask)


class OwnModel(keras.Model):
    def call(self, x, training=None):
        return 1.0 + super().call(x, training=training)


class OwnDense(keras.layers.Dense):
    def call(self, inputs, training=None):
        return 1.0 + super().call(inputs)


# One layer around the network, before it or behind it.
BEFORE = {
    "cast_to_integers": lambda x: keras.ops.cast(
        keras.ops.cast(4.0 * x, "int32"), "float32"
    ),
    "resizing_in_uint8": lambda x: keras.layers.Rescaling(0.1)(
        keras.layers.Resizing(12, 12, dtype="uint8")(30.0 * x + 100.0)
    ),
    "half_precision": lambda x: keras.layers.Rescaling(2.0, dtype="float16")(x),
    "lambda": lambda x: keras.layers.Lambda(lambda y: 2.0 * y)(x),
    "dilated_convolution": lambda x: keras.layers.Conv2D(
        3, 3, padding="same", dilation_rate=2
    )(x),
    "grouped_convolution": lambda x: keras.layers.Conv2D(
        3, 3, padding="same", groups=3
    )(x),
    "depthwise_convolution": lambda x: keras.layers.DepthwiseConv2D(
        3, padding="same"
    )(x),
    "normalization_of_keras": lambda x: keras.layers.BatchNormalization()(x),
    "normalization_of_another_axis": lambda x: layers.BatchNormalization(
        axis=1
    )(layers.Convolution(3, 3)(x)),
    "synchronized_normalization": lambda x: layers.BatchNormalization(
        synchronized=True
    )(layers.Convolution(3, 3)(x)),
    "normalization_of_its_own": lambda x: OwnNormalization()(
        layers.Convolution(3, 3)(x)
    ),
    "model_of_its_own": lambda x: (
        lambda image: OwnModel(image, layers.Convolution(3, 3)(image))
    )(keras.Input((12, 12, 3)))(x),
    "model_for_bytes": lambda x: (
        lambda image: keras.Model(image, keras.ops.cast(image, "float32"))
    )(keras.Input((12, 12, 3), dtype="uint8"))(20.0 * x + 100.0),
}
BEHIND = {
    "own_dense": lambda x: OwnDense(4)(x),
    "dense_in_half": lambda x: keras.layers.Dense(4, dtype="float16")(x),
    "layer_as_activation": lambda x: keras.layers.Dense(
        4, activation=keras.layers.PReLU(alpha_initializer="ones")
    )(-x),
    "dense_of_matrix": lambda x: keras.layers.Dense(3)(
        keras.layers.Reshape((2, -1))(x)
    ),
    "weights_shared": lambda x: (lambda dense: dense(dense(x)))(
        keras.layers.Dense(x.shape[-1])
    ),
}
CHANGES = {
    "int8": _quantized("int8"),
    "int4": _quantized("int4"),
    "float8": _quantized("float8"),
    "lora": _tuned,
    "patched_dense": _patched("predictions"),
    "patched_unit": _patched("stage1_unit1"),
    "patched_convolution": _patched("stem_conv"),
    "patched_pool": _patched("pool"),
    "patched_relu": _patched("stem_relu"),
    "own_convolution": _with_own_convolution,
    "own_forward": _with_own_forward,
    "activation_in_integers": _in_eight_bits,
}


class UnknownLayersTest(parameterized.TestCase):
    """Keras computes unknown layers, and no variables remain."""

    def assert_answers_as(self, model, tolerance=1e-3):
        expected = np.asarray(model(images(), training=False), "float32")
        self.assertGreater(np.std(expected), 1e-3)
        found = np.asarray(folding.fold(model)(images()))
        error = np.max(np.abs(found - expected))
        self.assertLess(error, tolerance * np.max(np.abs(expected)))
        _, captures = traced(model)
        self.assertEmpty(captures)

    @parameterized.named_parameters(BEFORE.items())
    def test_layer_before_the_network(self, layer):
        image = keras.Input((12, 12, 3))
        features = network(include_top=False, pooling="avg")(layer(image))
        model = weighted(keras.Model(image, keras.layers.Dense(4)(features)))
        self.assert_answers_as(model, 0.02 if "half" in self.id() else 1e-3)

    @parameterized.named_parameters(BEHIND.items())
    def test_layer_behind_the_network(self, layer):
        image = keras.Input((12, 12, 3))
        features = network(include_top=False, pooling="avg")(image)
        model = weighted(keras.Model(image, layer(features)))
        self.assert_answers_as(model, 0.02 if "half" in self.id() else 1e-3)

    @parameterized.named_parameters(CHANGES.items())
    def test_layer_that_was_changed(self, change):
        model = network()
        before = np.asarray(model(images()))
        change(model)
        # Of whole numbers a rounding may be another.
        is_rounded = self.id().endswith(("int8", "int4", "float8", "integers"))
        self.assert_answers_as(model, 0.05 if is_rounded else 1e-3)
        self.assertGreater(np.max(np.abs(model(images()) - before)), 1e-4)

    @parameterized.parameters(
        {"shortcut": OwnShortcut()},
        {"unit": OwnUnit},
        {"unit": OwnUnit, "looped": True},
    )
    def test_order_that_is_not_known(self, **arguments):
        self.assert_answers_as(network(**arguments))

    def test_class_whose_call_was_replaced(self):
        model = network()
        call = keras.layers.Dense.call
        with mock.patch.object(
            keras.layers.Dense, "call", lambda *args, **_: 3.0 * call(*args)
        ):
            self.assert_answers_as(model)


class GraphTest(parameterized.TestCase):
    @parameterized.product(
        unit=tuple(units.UNITS), precision=folding.PRECISIONS
    )
    def test_no_variable_is_left(self, unit, precision):
        nodes, captures = traced(
            network(unit=unit, shortcut="exclusive_gating"), precision
        )
        self.assertEmpty(captures)
        self.assertNoCommonElements(
            {node.op for node in nodes},
            {"Placeholder/resource", "ReadVariableOp", "VarHandleOp"},
        )

    @parameterized.parameters(
        ("original", 0),
        ("relu_before_addition", 0),
        ("relu_only_pre_activation", 0),
        # Of each unit but the first, whose input is activated; the final one.
        ("pre_activation", 2 + 1),
        ("batch_norm_after_addition", 3),
    )
    def test_only_normalizations_of_a_sum_are_left(self, unit, count):
        nodes, _ = traced(network(unit=unit, shortcut="C"))
        normalizations = [n for n in nodes if n.op.startswith("FusedBatchNorm")]
        self.assertLen(normalizations, count)

    @parameterized.parameters(*shortcuts.SHORTCUTS)
    def test_units_with_every_shortcut_are_folded(self, shortcut):
        nodes, _ = traced(network(shortcut=shortcut))
        self.assertNotIn("FusedBatchNormV3", {node.op for node in nodes})

    def test_every_sum_is_part_of_a_convolution(self):
        """The kernels that TensorFlow runs on processors with oneDNN."""
        function = folding.fold(network(IMAGENET, 20))
        metadata = tf.compat.v1.RunMetadata()
        with tf.Graph().as_default(), tf.compat.v1.Session() as session:
            image = tf.compat.v1.placeholder(tf.float32, [None, 20, 20, 3])
            session.run(
                function(image),
                {image: images(20)},
                tf.compat.v1.RunOptions(output_partition_graphs=True),
                metadata,
            )
        nodes = [n for graph in metadata.partition_graphs for n in graph.node]
        if not any("Mkl" in node.op for node in nodes):
            self.skipTest("oneDNN is not at work on this processor")
        fused = [
            b",".join(node.attr["fused_ops"].list.s).decode()
            for node in nodes
            if node.op.endswith("FusedConv2D")
        ]
        self.assertEqual(fused.count("BiasAdd,Add,Relu"), 3)
        # Each is `relu(h(x) + F(x))`; only the classifier's bias is added yet.
        self.assertEmpty([n for n in nodes if n.op in ("BiasAdd", "Relu")])


class BFloat16Test(parameterized.TestCase):
    @parameterized.parameters(*units.UNITS)
    def test_convolutions_are_in_bfloat16_and_the_classifier_in_float32(
        self, unit
    ):
        model = network(unit=unit, activation="softmax", shortcut="C")
        nodes, _ = traced(model, "bfloat16")

        def dtypes(*ops):
            return {tf.as_dtype(n.attr["T"].type) for n in nodes if n.op in ops}

        self.assertEqual(
            dtypes("Conv2D", "BiasAdd", "Relu", "FusedBatchNormV3"),
            {tf.bfloat16},
        )
        self.assertEqual(dtypes("Mean", "MatMul", "Softmax"), {tf.float32})

    @parameterized.named_parameters((k, *v) for k, v in ORDERS.items())
    def test_answers_are_near(self, unit, shortcut):
        model = network(unit=unit, shortcut=shortcut)
        expected = np.asarray(model(images()))
        found = folding.fold(model, "bfloat16")(images())
        self.assertEqual(found.dtype, tf.float32)
        error = np.max(np.abs(found - expected))
        self.assertLess(error, 0.05 * np.max(np.abs(expected)))

    def test_network_of_another_policy_has_a_float32_classifier(self):
        previous = keras.config.dtype_policy()
        keras.config.set_dtype_policy("mixed_bfloat16")
        try:
            model = network()
        finally:
            keras.config.set_dtype_policy(previous)
        reference = network()
        for precision, tolerance in (("float32", 1e-5), ("bfloat16", 0.05)):
            np.testing.assert_allclose(
                folding.fold(model, precision)(images()),
                reference(images()),
                atol=tolerance,
            )

    @pytest.mark.slow
    def test_trained_network_classes_the_test_digits_alike(self):
        dataset = datasets.load("digits")
        keras.utils.set_random_seed(0)
        model = keras_resnet.resnet(
            "resnet20", input_shape=dataset.image_shape, looped=False
        )
        model.compile(
            keras.optimizers.SGD(0.05, 0.9), "sparse_categorical_crossentropy"
        )
        model.fit(
            dataset.train_batches(64, seed=0),
            steps_per_epoch=140,
            shuffle=False,
            verbose=0,
        )
        answers = {name: [] for name in ("model", "bfloat16", "labels")}
        function = folding.fold(model, "bfloat16")
        for batch, labels in dataset.test_batches(128):
            for name, value in {
                "model": np.argmax(model(batch), -1),
                "bfloat16": np.argmax(function(batch), -1),
                "labels": labels.numpy(),
            }.items():
                answers[name].extend(value)
        answers = {name: np.array(value) for name, value in answers.items()}
        self.assertLen(answers["labels"], 355)
        self.assertGreater(np.mean(answers["model"] == answers["labels"]), 0.8)
        self.assertGreaterEqual(
            np.mean(answers["model"] == answers["bfloat16"]), 0.995
        )


class RefusalTest(parameterized.TestCase):
    def test_unknown_precision(self):
        with self.assertRaisesRegex(ValueError, "bfloat16.*'float8'"):
            folding.fold(network(), "float8")

    def test_order_that_is_not_known(self):
        class OwnUnit(layers.OriginalUnit):
            pass

        unit = OwnUnit(4, name="mine")
        unit.build((None, 8, 8, 4))
        with self.assertRaisesRegex(ValueError, "'mine', a OwnUnit"):
            folding.fold_unit(unit)

    def test_model_whose_call_is_another(self):
        class Doubled(keras.Model):
            def call(self, x, training=None):
                return 2.0 * super().call(x, training=training)

        base = network()
        patched = keras.Model(base.input, base.output)
        patched.call = lambda x, **_: 2.0 * x
        for model in (Doubled(base.input, base.output), patched):
            with self.assertRaisesRegex(folding.ModelError, "Keras' own"):
                folding.fold(model)

    def test_model_of_two_images(self):
        pair = [keras.Input((8, 8, 3)), keras.Input((8, 8, 3))]
        with self.assertRaisesRegex(ValueError, "one input.* which has 2"):
            folding.fold(keras.Model(pair, pair[0] + pair[1]))

    def test_model_without_a_graph(self):
        class OwnModel(keras.Model):
            pass

        with self.assertRaisesRegex(ValueError, "'mine', a OwnModel"):
            folding.fold(OwnModel(name="mine"))


if __name__ == "__main__":
    absltest.main()
