"""Gradients of the plain networks of [1, Fig. 6] at the start of training.

Plain-56 is far behind plain-20 in our runs of 16,000 steps. Its gradients are
right: they are the differences of the loss, and they grow from layer to layer
as theory says.
"""

import math

import keras
import numpy as np
import pytest
import tensorflow as tf
from absl.testing import absltest

import keras_resnet


def first_batch(name, seed, dtype="float32", batch_size=32):
    """Returns a new network, images of noise and labels."""
    keras.utils.set_random_seed(seed)
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(dtype)
    model = keras_resnet.resnet(name, classifier_activation=None, looped=False)
    keras.config.set_dtype_policy(before)
    rng = np.random.default_rng(seed)
    images = rng.normal(size=(batch_size, 32, 32, 3))
    return model, tf.cast(images, dtype), rng.integers(0, 10, batch_size)


def loss(model, images, labels):
    """Cross entropy of a batch in training."""
    logits = model(images, training=True)
    losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)
    return tf.reduce_mean(losses)


def gradients(model, images, labels):
    """Returns the gradients of the kernels of the convolutions, in order."""
    kernels = [
        variable.value
        for variable in model.trainable_variables
        if len(variable.shape) == 4
    ]

    @tf.function(autograph=False)
    def call():
        with tf.GradientTape() as tape:
            value = loss(model, images, labels)
        return tape.gradient(value, kernels)

    return kernels, call()


class PlainNetworksTest(absltest.TestCase):
    @pytest.mark.slow
    def test_gradient_of_every_layer_is_the_difference_of_the_loss(self):
        """(f(w + d) - f(w - d)) / 2 of a small d, in float64."""
        model, *batch = first_batch("plainnet56", 0, "float64", batch_size=4)
        kernels, found = gradients(model, *batch)
        self.assertLen(kernels, 55)
        value = tf.function(lambda: loss(model, *batch), autograph=False)
        rng = np.random.default_rng(1)
        for kernel, gradient in zip(kernels, found, strict=True):
            # Half along the gradient, so that the loss changes enough, half in
            # a random direction. It is small, so that no ReLU changes its side.
            norm = np.linalg.norm(gradient)
            direction = rng.normal(size=kernel.shape)
            direction /= np.linalg.norm(direction)
            direction = (gradient / norm + direction) * 1e-8 / norm
            start = tf.identity(kernel)
            kernel.assign(start + direction)
            above = value()
            kernel.assign(start - direction)
            difference = (above - value()) / 2
            kernel.assign(start)
            slope = np.vdot(gradient, direction)
            np.testing.assert_allclose(difference, slope, rtol=1e-4)

    @pytest.mark.slow
    def test_gradient_grows_by_the_factor_of_the_theory(self):
        """Each layer of the first stage multiplies it by sqrt(pi / (pi - 1)).

        Yang et al. 2019, "A Mean Field Theory of Batch Normalization": this
        holds for wide layers of ReLUs with normalization. These have 16
        channels.
        """
        growths = []
        for seed in range(3):
            _, found = gradients(*first_batch("plainnet56", seed))
            norms = [np.linalg.norm(gradient) for gradient in found[1:19]]
            growths.append((norms[0] / norms[-1]) ** (1 / 17))
        expected = math.sqrt(math.pi / (math.pi - 1))
        np.testing.assert_allclose(np.mean(growths), expected, rtol=0.03)


if __name__ == "__main__":
    absltest.main()
