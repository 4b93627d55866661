"""A step: the papers' formula, several in one graph, the moving average."""

import dataclasses

import keras
import numpy as np
import tensorflow as tf
from absl.testing import absltest
from absl.testing import parameterized

from keras_resnet.data import datasets
from keras_resnet.training import tensorflow_trainer
from tests import tiny_runs

NOTHING = tf.zeros([2])  # that a worker could tell the others


class StepTest(tiny_runs.TestCase):
    @parameterized.parameters(0.0, 0.1)
    def test_step_is_the_formula_of_the_paper(self, smoothing):
        """v = momentum v - rate (g + decay w); w += v, twice."""
        recipe = dataclasses.replace(
            tiny_runs.RECIPE,
            weight_decay=0.01,
            label_smoothing=smoothing,
            decay_norms=False,
        )
        dataset = datasets.load("digits")
        run = tensorflow_trainer.TensorFlowTrainer(
            tiny_runs.config(recipe), dataset, tf.distribute.get_strategy()
        )
        batches = list(dataset.train_batches(16, seed=0).take(2))
        model = keras.models.clone_model(run.model)
        model.set_weights(run.model.get_weights())
        velocity = [0.0] * len(model.trainable_weights)
        loss = keras.losses.CategoricalCrossentropy(
            from_logits=True, label_smoothing=smoothing
        )
        for images, labels in batches:
            with tf.GradientTape() as tape:
                logits = model(images, training=True)
                value = loss(tf.one_hot(labels, 10), logits)
                value += (
                    0.01
                    / 2
                    * sum(
                        tf.reduce_sum(w**2)
                        for w in model.trainable_weights
                        if w.name == "kernel"
                    )
                )
            gradients = tape.gradient(value, model.trainable_weights)
            for i, (w, g) in enumerate(
                zip(model.trainable_weights, gradients, strict=True)
            ):
                velocity[i] = 0.9 * velocity[i] - 0.1 * g
                w.assign_add(velocity[i])
        for batch in batches:
            run.advance(iter(tf.data.Dataset.from_tensors(batch)), 1, NOTHING)
        for a, b in zip(run.model.weights, model.weights, strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5)

    def test_moving_average_follows_the_parameters(self):
        """a += (w - a) (1 - min(momentum, (1 + t) / (10 + t)))."""
        recipe = dataclasses.replace(tiny_runs.RECIPE, average_momentum=0.25)
        dataset = datasets.load("digits")
        run = tensorflow_trainer.TensorFlowTrainer(
            tiny_runs.config(recipe), dataset, tf.distribute.get_strategy()
        )
        batches = iter(dataset.train_batches(16, seed=0))
        expected = [np.array(v) for v in run.model.trainable_variables]
        for step in (1, 2, 3, 4):
            run.advance(batches, tf.constant(1), NOTHING)
            momentum = min(0.25, (1 + step) / (10 + step))
            expected = [
                a + (np.array(w) - a) * (1 - momentum)
                for a, w in zip(
                    expected, run.model.trainable_variables, strict=True
                )
            ]
        for got, value in zip(run.averages, expected, strict=True):
            np.testing.assert_allclose(got, value, rtol=1e-5, atol=1e-6)

    def test_several_steps_in_one_graph_are_as_many_single_ones(self):
        dataset = datasets.load("digits")
        sums = []
        for chunks in ((4,), (1, 1, 1, 1), (3, 1)):
            run = tensorflow_trainer.TensorFlowTrainer(
                tiny_runs.config(), dataset, tf.distribute.get_strategy()
            )
            batches = iter(dataset.train_batches(16, seed=0))
            for chunk in chunks:
                run.advance(batches, tf.constant(chunk), NOTHING)
            self.assertEqual(run.completed_steps, 4)
            sums.append(run.sums.numpy())
            self.assertEqual(sums[-1][3], 4 * 16)
        np.testing.assert_array_equal(sums[0], sums[1])
        np.testing.assert_array_equal(sums[0], sums[2])


if __name__ == "__main__":
    absltest.main()
