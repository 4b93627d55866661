"""Batch normalization equals Keras' layer."""

import itertools
import tempfile

import keras
import numpy as np
import tensorflow as tf
from absl.testing import absltest
from absl.testing import parameterized

from keras_resnet import layers
from keras_resnet.layers import BatchNormalization
from keras_resnet.layers import normalization


def make_pair(trainable=True, dtype="float32", **arguments):
    """Returns our layer and Keras' with equal weights, not 0 or 1."""
    pair = [
        cls(dtype=dtype, trainable=trainable, **arguments)
        for cls in (BatchNormalization, keras.layers.BatchNormalization)
    ]
    rng = np.random.default_rng(0)
    for layer in pair:
        layer.build((None, 5, 6, 3))
    weights = [rng.uniform(0.5, 2, w.shape) for w in pair[0].weights]
    for layer in pair:
        layer.set_weights(weights)
    return pair


def kinds(function, *inputs):
    """Returns the operations of a traced function and of inner functions."""
    graph = function.get_concrete_function(*inputs).graph.as_graph_def()
    bodies = [graph.node, *(f.node_def for f in graph.library.function)]
    return {node.op for nodes in bodies for node in nodes}


def images(dtype="float32", shape=(4, 5, 6, 3)):
    x = np.random.default_rng(1).normal(2.0, 3.0, shape)
    return tf.cast(x, dtype)


class BatchNormalizationTest(parameterized.TestCase):
    @parameterized.parameters(
        itertools.product(
            ("float32", "mixed_bfloat16", "mixed_float16"),
            (True, False),
            (True, False),
        )
    )
    def test_equals_keras_in_outputs_gradients_and_statistics(
        self, dtype, trainable, training
    ):
        ours, keras_layer = make_pair(trainable, dtype, epsilon=1e-5)
        x = images(ours.compute_dtype)
        weight = images(ours.compute_dtype)[::-1]
        results = []
        for layer in (ours, keras_layer):
            variables = [layer.gamma.value, layer.beta.value]
            with tf.GradientTape() as tape:
                tape.watch([x, *variables])
                y = layer(x, training=training)
                loss = tf.reduce_sum(tf.cast(y * weight, "float32"))
            gradients = tape.gradient(loss, [x, *variables])
            results.append([y, *gradients, *layer.weights])
        # In half precision: one unit in the last place of the largest value.
        tolerance = {"float32": 2e-5, "mixed_bfloat16": 2e-2}.get(dtype, 3e-3)
        for a, b in zip(*results, strict=True):
            a, b = (keras.ops.convert_to_numpy(v) for v in (a, b))
            a, b = a.astype("float32"), b.astype("float32")
            scale = np.abs(b).max()
            np.testing.assert_allclose(a / scale, b / scale, atol=tolerance)

    def test_moving_variance_keeps_the_biased_variance(self):
        ours, _ = make_pair(momentum=0.0)
        x = images(shape=(2, 1, 2, 3))
        ours(x, training=True)
        expected = np.var(x.numpy(), axis=(0, 1, 2))
        np.testing.assert_allclose(ours.moving_variance, expected, rtol=1e-5)

    def test_one_value_a_channel_has_no_variance(self):
        ours, _ = make_pair(momentum=0.0)
        ours(images(shape=(1, 1, 1, 3)), training=True)
        np.testing.assert_array_equal(ours.moving_variance, np.zeros(3))

    @parameterized.parameters(
        {"axis": 1}, {"center": False}, {"scale": False}, {"momentum": 0.5}
    )
    def test_takes_the_arguments_of_keras(self, **arguments):
        x = images()
        layers = [
            cls(**arguments)
            for cls in (BatchNormalization, keras.layers.BatchNormalization)
        ]
        a, b = (layer(x, training=True) for layer in layers)
        np.testing.assert_allclose(a, b, atol=1e-5)
        for a, b in zip(layers[0].weights, layers[1].weights, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
        self.assertEqual(
            layers[0].get_config().keys(), layers[1].get_config().keys()
        )

    def test_ranks_and_masks_take_the_path_of_keras(self):
        x = tf.random.stateless_normal((4, 6, 3), (0, 1))
        mask = tf.constant([[True] * 4 + [False] * 2] * 4)
        layers = (BatchNormalization(), keras.layers.BatchNormalization())
        a, b = (layer(x, training=True, mask=mask) for layer in layers)
        np.testing.assert_array_equal(a, b)

    def test_fused_kernel_is_in_the_graph(self):
        layer = BatchNormalization()
        layer.build((None, 5, 6, 3))

        @tf.function
        def call(x):
            return layer(x, training=True)

        self.assertIn("FusedBatchNormV3", kinds(call, images()))

    def test_without_xla_the_graph_has_the_kernel_alone(self):
        ours, keras_layer = make_pair()

        def call(x):
            with normalization.without_xla():
                return ours(x, training=True)

        found = kinds(tf.function(call), images())
        self.assertIn("FusedBatchNormV3", found)
        self.assertNotIn("DeviceIndex", found)
        np.testing.assert_allclose(
            call(images()), keras_layer(images(), training=True), atol=1e-5
        )
        for a, b in zip(ours.variables, keras_layer.variables, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-6)

    def test_equals_keras_inside_fit(self):
        models = []
        for cls in (BatchNormalization, keras.layers.BatchNormalization):
            model = keras.Sequential(
                [
                    keras.Input((5, 6, 3)),
                    keras.layers.Conv2D(4, 3, kernel_initializer="ones"),
                    cls(name="norm"),
                    keras.layers.Flatten(),
                    keras.layers.Dense(1, kernel_initializer="ones"),
                ]
            )
            model.compile(keras.optimizers.SGD(1e-4), "mse")
            model.fit(images(), np.ones(4), epochs=3, shuffle=False, verbose=0)
            models.append(model)
        for a, b in zip(models[0].weights, models[1].weights, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)

    def test_saved_files_are_interchangeable_with_those_of_keras(self):
        directory = self.enter_context(tempfile.TemporaryDirectory())
        path = f"{directory}/norm.weights.h5"
        x = images()
        models = [
            keras.Sequential([keras.Input((5, 6, 3)), cls(name="norm")])
            for cls in (BatchNormalization, keras.layers.BatchNormalization)
        ]
        models[0](x, training=True)
        models[0].save_weights(path)
        models[1].load_weights(path)
        np.testing.assert_allclose(models[0](x), models[1](x), atol=1e-5)


def results(layer, x, compile_):
    """Returns outputs, gradients and statistics of a call by `compile_`."""

    def call(x):
        variables = [layer.gamma.value, layer.beta.value]
        weight = tf.cast(np.random.default_rng(2).normal(size=x.shape), x.dtype)
        with tf.GradientTape() as tape:
            tape.watch([x, *variables])
            y = layer(x, training=True)
            loss = tf.reduce_sum(tf.cast(y * weight, "float32"))
        return [y, *tape.gradient(loss, [x, *variables])]

    values = [*compile_(call, x), *layer.weights]
    return [np.array(tf.cast(v, "float64")) for v in values]


def jit(call, x):
    return tf.function(call, jit_compile=True)(x)


def jit_of_a_traced_function(call, x):
    """XLA compiles what was traced for the kernels of TensorFlow."""
    traced = tf.function(call).get_concrete_function(x)
    return tf.function(lambda x: traced(x), jit_compile=True)(x)


def jit_of_a_loop(call, x):
    """XLA compiles the body of a loop, which runs once."""

    def loop(x):
        start = [tf.zeros_like(x)] * 2 + [tf.zeros([x.shape[-1]])] * 2
        return tf.while_loop(
            lambda i, *_: i < 1,
            lambda i, *_: (i + 1, *call(x)),
            (0, *start),
            maximum_iterations=1,
        )[1:]

    return tf.function(loop, jit_compile=True)(x)


def jit_within_a_function(call, x):
    inner = tf.function(call, jit_compile=True)
    return tf.function(lambda x: inner(tf.identity(x)))(x)


class XLATest(parameterized.TestCase):
    """XLA compiles TensorFlow's kernel to mean(x^2) - mean(x)^2."""

    def assert_equals_keras(self, compile_, offset, dtype="float32", **kwargs):
        ours, keras_layer = make_pair(dtype=dtype, epsilon=1e-5, **kwargs)
        x = np.random.default_rng(1).normal(size=(4, 5, 6, 3))
        if dtype != "float32":  # half precision lacks the digits
            x *= max(1.0, offset / 50)
        x = tf.cast(x + offset, ours.compute_dtype)
        # The last digit of x, and of the result.
        tolerance = 1e-5 + 1e-6 * offset
        if dtype != "float32":
            tolerance = 1e-2
        expected = results(keras_layer, x, compile_=lambda call, x: call(x))
        for a, b in zip(results(ours, x, compile_), expected, strict=True):
            scale = np.abs(b).max()
            np.testing.assert_allclose(a / scale, b / scale, atol=tolerance)

    @parameterized.product(
        offset=(0.0, 300.0, 1e4),
        dtype=("float32", "mixed_bfloat16", "mixed_float16"),
    )
    def test_equals_keras_at_any_offset(self, offset, dtype):
        self.assert_equals_keras(jit, offset, dtype)

    @parameterized.parameters(
        jit_of_a_traced_function, jit_of_a_loop, jit_within_a_function
    )
    def test_equals_keras_wherever_xla_compiles(self, compile_):
        self.assert_equals_keras(compile_, 3000.0)

    def test_synchronized_statistics_are_those_of_one_device(self):
        ours, keras_layer = make_pair(epsilon=1e-5)
        synchronized = BatchNormalization(epsilon=1e-5, synchronized=True)
        synchronized.build((None, 5, 6, 3))
        synchronized.set_weights(ours.get_weights())
        x = images() + 3000.0
        expected = keras_layer(x, training=True)
        for layer in (ours, synchronized):
            y = jit(lambda x: layer(x, training=True), x)  # noqa: B023
            np.testing.assert_allclose(y, expected, atol=3e-3)

    def test_equals_keras_where_xla_chooses_what_it_compiles(self):
        self.addCleanup(tf.config.optimizer.set_jit, False)
        tf.config.optimizer.set_jit("autoclustering")
        layer = BatchNormalization()
        layer.build((None, 5, 6, 3))
        call = tf.function(lambda x: layer(x, training=True))
        self.assertNotIn("FusedBatchNormV3", kinds(call, images()))

    @parameterized.parameters(
        lambda: layers.PreActivationUnit(4, remat=True),
        lambda: layers.UnitStack(layers.PreActivationUnit(4), 2),
        lambda: layers.UnitStack(layers.PreActivationUnit(4), 2, remat=True),
    )
    def test_units_train_as_without_xla(self, make):
        keras.utils.set_random_seed(0)
        layer = make()
        layer.build((8, 6, 6, 4))
        start = layer.get_weights()
        rng = np.random.default_rng(0)
        x = tf.constant(rng.normal(300.0, 1.0, (8, 6, 6, 4)), "float32")
        weight = tf.constant(rng.normal(size=x.shape), "float32")

        def call(x):
            parameters = [v.value for v in layer.trainable_variables]
            with tf.GradientTape() as tape:
                loss = tf.reduce_sum(layer(x, training=True) * weight)
            return tape.gradient(loss, parameters)

        found = []
        for jit_compile in (False, True):
            layer.set_weights(start)
            gradients = tf.function(call, jit_compile=jit_compile)(x)
            found.append([*map(np.array, gradients), *layer.get_weights()])
        for a, b in zip(*found, strict=True):
            scale = max(np.abs(a).max(), 1.0)
            np.testing.assert_allclose(a / scale, b / scale, atol=2e-3)


if __name__ == "__main__":
    absltest.main()
