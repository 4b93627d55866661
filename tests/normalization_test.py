"""Our BatchNormalization equals Keras' layer."""

import itertools
import tempfile

import keras
import numpy as np
import tensorflow as tf
from absl.testing import absltest
from absl.testing import parameterized

from keras_resnet.layers import BatchNormalization


def make_pair(trainable=True, dtype="float32", **arguments):
    """Our layer and Keras' with the same weights, none of them 0 or 1."""
    layers = [
        cls(dtype=dtype, trainable=trainable, **arguments)
        for cls in (BatchNormalization, keras.layers.BatchNormalization)
    ]
    rng = np.random.default_rng(0)
    for layer in layers:
        layer.build((None, 5, 6, 3))
    weights = [rng.uniform(0.5, 2, w.shape) for w in layers[0].weights]
    for layer in layers:
        layer.set_weights(weights)
    return layers


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
        # Half precision: one unit in the last place of the largest value.
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

        graph = call.get_concrete_function(images()).graph
        kinds = {operation.type for operation in graph.get_operations()}
        self.assertIn("FusedBatchNormV3", kinds)

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


if __name__ == "__main__":
    absltest.main()
