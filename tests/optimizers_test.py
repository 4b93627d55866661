"""Momentum equals keras.optimizers.SGD; LAMB and LARS are their papers'."""

import keras
import numpy as np
import tensorflow as tf
from absl.testing import absltest
from absl.testing import parameterized

from keras_resnet.training import optimizers
from keras_resnet.training.recipe import Recipe


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


def numpy_lamb(weights, gradients, rate, decay, is_decayed):
    """You et al. 2020, Algorithm 2, with the bias corrections of Adam."""
    m, v = np.zeros_like(weights), np.zeros_like(weights)
    for t, g in enumerate(gradients, 1):
        m = 0.9 * m + 0.1 * g
        v = 0.999 * v + 0.001 * g**2
        u = m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.999**t)) + 1e-6)
        ratio = 1.0
        if is_decayed:
            u = u + decay * weights
            ratio = np.linalg.norm(weights) / np.linalg.norm(u)
        weights = weights - rate * ratio * u
    return weights


def numpy_lars(weights, gradients, rate, decay, is_decayed):
    """You et al. 2017, Algorithm 1."""
    v = np.zeros_like(weights)
    for g in gradients:
        ratio = 1.0
        if is_decayed:
            size, slope = np.linalg.norm(weights), np.linalg.norm(g)
            ratio = 0.001 * size / (slope + decay * size)
            g = g + decay * weights
        v = 0.9 * v - rate * ratio * g
        weights = weights + v
    return weights


def numpy_adamw(weights, gradients, rate, decay, is_decayed):
    """Loshchilov and Hutter 2019, Algorithm 2, in PyTorch's scale of decay."""
    m, v = np.zeros_like(weights), np.zeros_like(weights)
    for t, g in enumerate(gradients, 1):
        if is_decayed:
            weights = weights - rate * decay * weights
        m = 0.9 * m + 0.1 * g
        v = 0.999 * v + 0.001 * g**2
        square = np.sqrt(v / (1 - 0.999**t)) + 1e-7
        weights = weights - rate * m / (1 - 0.9**t) / square
    return weights


class DecoupledTest(parameterized.TestCase):
    @parameterized.product(
        [
            {"name": "lamb", "expected": numpy_lamb, "most": 1e-10},
            {"name": "lars", "expected": numpy_lars, "most": 1e-10},
            # Keras rounds the constants of AdamW to 32 bits.
            {"name": "adamw", "expected": numpy_adamw, "most": 1e-4},
        ],
        decay_norms=[False, True],
    )
    def test_updates_are_those_of_the_paper(
        self, name, expected, most, decay_norms
    ):
        """In float64; norms and biases are not decayed."""
        recipe = Recipe(
            "test",
            "test",
            batch_size=8,
            steps=100,
            learning_rate=2.0**-4,  # the same number in 32 bits
            optimizer=name,
            weight_decay=0.02,
            decay_norms=decay_norms,
        )
        rng = np.random.default_rng(1)
        starts = [rng.normal(size=shape) for shape in ((4, 3), (3,), (3,))]
        variables = [
            keras.Variable(start, dtype="float64", name=name)
            for start, name in zip(
                starts, ("kernel", "bias", "gamma"), strict=True
            )
        ]
        optimizer = optimizers.of_recipe(recipe, variables)
        gradients = [
            [rng.normal(size=start.shape) for start in starts] for _ in range(6)
        ]
        apply = tf.function(lambda *g: optimizer.apply(g, variables))
        for step in gradients:
            apply(*map(tf.constant, step))
        for i, start in enumerate(starts):
            is_decayed = decay_norms or i == 0
            wanted = expected(
                start, [g[i] for g in gradients], 2.0**-4, 0.02, is_decayed
            )
            np.testing.assert_allclose(variables[i], wanted, most, most)

    def test_a_variable_of_zeros_starts_to_move(self):
        for name in ("lamb", "lars"):
            recipe = Recipe("test", "test", 8, 100, 0.5, optimizer=name)
            variable = keras.Variable([0.0, 0.0], name="kernel")
            optimizer = optimizers.of_recipe(recipe, [variable])
            optimizer.apply([tf.constant([1.0, -1.0])], [variable])
            np.testing.assert_allclose(variable, [-0.5, 0.5], rtol=1e-4)

    @parameterized.parameters(optimizers.Lamb, optimizers.Lars)
    def test_comes_back_from_its_config(self, kind):
        optimizer = kind(0.1, weight_decay=0.02)
        again = keras.optimizers.deserialize(
            keras.optimizers.serialize(optimizer)
        )
        self.assertIsInstance(again, kind)
        self.assertEqual(again.get_config(), optimizer.get_config())


if __name__ == "__main__":
    absltest.main()
