"""A step: the papers' formula, several in one graph, the moving average."""

import dataclasses

import keras
import numpy as np
import tensorflow as tf
from absl.testing import absltest
from absl.testing import parameterized

from keras_resnet.data import datasets
from keras_resnet.training import configs
from keras_resnet.training import optimizers
from keras_resnet.training import recipe_rules
from keras_resnet.training import step
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
        for count in (1, 2, 3, 4):
            run.advance(batches, tf.constant(1), NOTHING)
            momentum = min(0.25, (1 + count) / (10 + count))
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


def numpy_targets(recipe, labels, others, shares, classes):
    q = np.zeros((len(labels), classes))
    shares = shares.astype("float64")
    for row, a, b, share in zip(q, labels, others, shares, strict=True):
        row[a] += share
        row[b] += 1 - share
    if recipe.target_threshold is not None:
        q = (q > recipe.target_threshold).astype(float)
    e = recipe.label_smoothing
    return (1 - e) * q + e / classes


def mixed_labels(count, classes, seed=0):
    rng = np.random.default_rng(seed)
    labels, others = rng.integers(0, classes, (2, count))
    shares = rng.random(count).astype("float32")
    return labels.astype("int32"), others.astype("int32"), shares


class LossTest(tiny_runs.TestCase):
    @parameterized.product(
        loss=["cross_entropy", "binary_cross_entropy"],
        smoothing=[0.0, 0.125],
        threshold=[None, 0.25],
        micro_batches=[1, 2],
    )
    def test_gradient_of_mixed_targets_is_that_of_numpy(
        self, loss, smoothing, threshold, micro_batches
    ):
        """A linear model in float64, to 1e-10."""
        recipe = dataclasses.replace(
            tiny_runs.RECIPE,
            loss=loss,
            label_smoothing=smoothing,
            target_threshold=threshold,
            micro_batches=micro_batches,
        )
        model = keras.Sequential(
            [
                keras.Input((7,), dtype="float64"),
                keras.layers.Dense(5, dtype="float64"),
            ]
        )
        taken = step.Step(
            tiny_runs.config(recipe, dtype="float64"),
            model,
            optimizers.of_recipe(recipe),
            tensorflow_trainer._differentiate,
        )
        images = np.random.default_rng(1).normal(size=(16, 7))
        marks = mixed_labels(16, 5)
        kernel, bias = (v.numpy() for v in model.trainable_variables)
        gradients, _, sums = taken.gradients(
            [v.value for v in model.trainable_variables],
            [],
            tf.constant(images),
            tuple(map(tf.constant, marks)),
        )
        logits = images @ kernel + bias
        q = numpy_targets(recipe, *marks, 5)
        if loss == "cross_entropy":
            exp = np.exp(logits - logits.max(1, keepdims=True))
            p = exp / exp.sum(1, keepdims=True)
            slope = p * q.sum(1, keepdims=True) - q
        else:
            slope = (1 / (1 + np.exp(-logits)) - q) / 5
        slope /= 16
        np.testing.assert_allclose(
            gradients[0], images.T @ slope, rtol=1e-10, atol=1e-12
        )
        np.testing.assert_allclose(
            gradients[1], slope.sum(0), rtol=1e-10, atol=1e-12
        )
        main = np.where(marks[2] >= 0.5, marks[0], marks[1])
        wrong = np.sum(logits.argmax(1) != main)
        self.assertEqual(float(sums[1]), wrong)

    @parameterized.parameters("cross_entropy", "binary_cross_entropy")
    def test_gradient_of_a_network_is_that_of_differences(self, loss):
        """In float64, in a random direction."""
        recipe = dataclasses.replace(
            tiny_runs.RECIPE, loss=loss, label_smoothing=0.1
        )
        config = tiny_runs.config(recipe, dtype="float64")
        model = configs.build_model(config, (8, 8, 1), 10)
        taken = step.Step(
            config,
            model,
            optimizers.of_recipe(recipe),
            tensorflow_trainer._differentiate,
        )
        rng = np.random.default_rng(2)
        images = tf.constant(rng.normal(size=(16, 8, 8, 1)))
        marks = tuple(map(tf.constant, mixed_labels(16, 10)))
        trainable = [v.value for v in model.trainable_variables]
        states = [tf.constant(v.numpy()) for v in taken.states]
        gradients, _, _ = taken.gradients(trainable, states, images, marks)
        direction = [rng.normal(size=v.shape) for v in trainable]

        def loss_at(size):
            values = [
                v + size * d for v, d in zip(trainable, direction, strict=True)
            ]
            mapping = zip(model.trainable_variables, values, strict=True)
            with keras.StatelessScope(mapping):
                logits = model(images, training=True)
            losses = taken.losses(marks, logits)
            return float(tf.reduce_mean(losses))

        slope = sum(
            np.sum(g * d) for g, d in zip(gradients, direction, strict=True)
        )
        size = 1e-8  # small, so that no ReLU changes its side
        difference = (loss_at(size) - loss_at(-size)) / (2 * size)
        np.testing.assert_allclose(difference, slope, rtol=1e-5)

    def test_unmixed_labels_are_mixed_ones_with_a_share_of_one(self):
        labels, others, _ = map(tf.constant, mixed_labels(6, 10))
        for loss in recipe_rules.LOSSES:
            recipe = dataclasses.replace(tiny_runs.RECIPE, loss=loss)
            logits = tf.random.stateless_normal([6, 10], [1, 2])
            taken = step.Step(
                tiny_runs.config(recipe),
                keras.Sequential(),
                optimizers.of_recipe(recipe),
                None,
            )
            plain, mixed = (
                taken.losses(each, logits)
                for each in (labels, (labels, others, tf.ones([6])))
            )
            np.testing.assert_allclose(plain, mixed, rtol=1e-6)

    @parameterized.parameters((None, 1.0), (100.0, 1.0), (0.5, 0.1))
    def test_gradients_are_clipped_by_their_norm_together(self, most, factor):
        recipe = dataclasses.replace(tiny_runs.RECIPE, clip_norm=most)
        taken = step.Step(
            tiny_runs.config(recipe),
            keras.Sequential(),
            optimizers.of_recipe(recipe),
            None,
        )
        gradients = [tf.constant([3.0, 0.0]), tf.constant([[4.0]])]
        clipped, norm = taken.clipped(gradients)
        self.assertAlmostEqual(float(norm), 5.0, places=5)
        for got, gradient in zip(clipped, gradients, strict=True):
            np.testing.assert_allclose(got, factor * gradient, rtol=1e-6)

    def test_average_is_the_formula_in_float64(self):
        recipe = dataclasses.replace(tiny_runs.RECIPE, average_momentum=0.875)
        taken = step.Step(
            tiny_runs.config(recipe), keras.Sequential(), None, None
        )
        average = expected = np.zeros(3)
        for count in range(1, 40):
            value = np.random.default_rng(count).normal(size=3)
            average = taken.average(
                tf.constant(average),
                tf.constant(value),
                tf.constant(count, "float64"),
            )
            momentum = min(0.875, (1 + count) / (10 + count))
            expected = momentum * expected + (1 - momentum) * value
        np.testing.assert_allclose(average, expected, rtol=1e-10)


if __name__ == "__main__":
    absltest.main()
