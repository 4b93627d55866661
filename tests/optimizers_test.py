"""Momentum equals keras.optimizers.SGD."""

import keras
import numpy as np
import tensorflow as tf
from absl.testing import absltest
from absl.testing import parameterized

from keras_resnet.training import optimizers


def trained(optimizer, steps=5):
    """Two variables and the optimizer's state after some steps."""
    rng = np.random.default_rng(0)
    weights = [
        keras.Variable(rng.normal(size=shape)) for shape in ((3, 4), (5,))
    ]
    optimizer.build(weights)

    @tf.function
    def step(*gradients):
        optimizer.apply(gradients, weights)

    for _ in range(steps):
        step(
            *(tf.constant(rng.normal(size=w.shape), "float32") for w in weights)
        )
    return [np.array(v) for v in (*weights, *optimizer.variables)], step


class MomentumTest(parameterized.TestCase):
    @parameterized.parameters(
        {"momentum": 0.9},
        {"momentum": 0.9, "nesterov": True},
        {"momentum": 0.0},
        {"momentum": 0.9, "weight_decay": 0.1},
        {"momentum": 0.9, "clipnorm": 0.1},
        {"momentum": 0.9, "use_ema": True},
    )
    def test_weights_and_state_are_those_of_keras(self, **arguments):
        ours, _ = trained(optimizers.Momentum(0.1, **arguments))
        expected, _ = trained(keras.optimizers.SGD(0.1, **arguments))
        for a, b in zip(ours, expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)

    def test_one_kernel_updates_a_variable(self):
        _, step = trained(optimizers.Momentum(0.1, momentum=0.9))
        shapes = [tf.zeros((3, 4)), tf.zeros((5,))]
        graph = step.get_concrete_function(*shapes).graph
        kinds = [operation.type for operation in graph.get_operations()]
        self.assertEqual(kinds.count("ResourceApplyKerasMomentum"), 2)

    def test_comes_back_from_its_config(self):
        optimizer = optimizers.Momentum(0.1, momentum=0.9)
        again = keras.optimizers.deserialize(
            keras.optimizers.serialize(optimizer)
        )
        self.assertIsInstance(again, optimizers.Momentum)
        self.assertEqual(again.get_config(), optimizer.get_config())


if __name__ == "__main__":
    absltest.main()
