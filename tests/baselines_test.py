"""The networks of [1, Table 6] that are not residual: counts and laws."""

import dataclasses
import tempfile

import keras
import numpy as np
import pytest
import tensorflow as tf
from absl.testing import absltest
from absl.testing import parameterized

from keras_resnet import baselines
from keras_resnet import networks
from keras_resnet.data import datasets
from keras_resnet.papers import experiments
from keras_resnet.papers import runs
from keras_resnet.training import configs
from keras_resnet.training import loop
from keras_resnet.training import optimizers
from keras_resnet.training import recipes
from keras_resnet.training import tensorflow_trainer
from keras_resnet.training import trained_networks
from tests import programs

NAMES = [(name,) for name in baselines.BASELINES]


def convolution(kernel, inputs, outputs):
    """The parameters of a convolution with biases."""
    return (kernel * kernel * inputs + 1) * outputs


def fitnet_widths():
    """Romero et al. 2015, FitNet 4: (inputs, outputs) of each convolution."""
    widths = [32] * 3 + [48] * 2 + [80] * 6 + [128] * 6
    return list(zip([3, *widths], widths, strict=False))


def expected_parameters(name):
    """Counted from the layouts of the sources."""
    if name == "fitnet19":
        convolutions = sum(convolution(3, i, 2 * o) for i, o in fitnet_widths())
        return convolutions + 129 * 1000 + 501 * 10
    if name == "highway19":
        convolutions = sum(
            convolution(3, i, o) * (2 if i == o else 1)
            for i, o in fitnet_widths()
        )
        return convolutions + 129 * 500 + 501 * 10
    if name == "highway32":
        total, inputs = 0, 3
        for width, count in ((32, 10), (48, 9), (64, 9)):
            total += convolution(3, inputs, width)
            total += count * 2 * convolution(3, width, width)
            inputs = width
        return total + convolution(1, 64, 10)
    if name in ("nin", "dsn"):
        layers = [(5, 3, 192), (1, 192, 160), (1, 160, 96)]
        layers += [(5, 96, 192), (1, 192, 192), (1, 192, 192)]
        layers += [(3, 192, 192), (1, 192, 192), (1, 192, 10)]
        companions = 97 * 10 + 193 * 10 if name == "dsn" else 0
        return sum(convolution(*layer) for layer in layers) + companions
    layers = [(8, 3, 192), (8, 96, 384), (5, 192, 384)]
    convolutions = sum(convolution(*layer) for layer in layers)
    return convolutions + (5 * 5 * 192 + 1) * 2500 + 501 * 10


class BaselinesTest(parameterized.TestCase):
    @parameterized.parameters(*NAMES)
    def test_parameters_are_those_of_the_source(self, name):
        model = networks.build(name)
        count = sum(int(np.prod(w.shape)) for w in model.trainable_weights)
        self.assertEqual(count, expected_parameters(name))
        printed = baselines.BASELINES[name].printed_parameters
        if name == "maxout":  # "> 6M"
            self.assertGreater(count, printed)
        else:
            self.assertLess(abs(count / printed - 1), 0.1)

    @parameterized.parameters(*NAMES)
    @pytest.mark.slow
    def test_an_image_has_probabilities_also_after_saving(self, name):
        model = networks.build(name)
        x = np.random.default_rng(0).normal(size=(2, 32, 32, 3))
        probabilities = model(x)
        self.assertEqual(probabilities.shape, (2, 10))
        np.testing.assert_allclose(np.sum(probabilities, -1), 1.0, rtol=1e-5)
        with tempfile.TemporaryDirectory() as directory:
            model.save(f"{directory}/model.keras")
            again = keras.models.load_model(f"{directory}/model.keras")
        np.testing.assert_allclose(again(x), probabilities, rtol=1e-5)

    @parameterized.parameters(*NAMES)
    def test_depth_is_the_number_of_weighted_layers(self, name):
        counted = [
            layer
            for layer in networks.build(name).layers
            if layer.weights and not isinstance(layer, baselines.Companion)
        ]
        self.assertLen(counted, baselines.BASELINES[name].depth)

    def test_unknown_networks_are_refused(self):
        with self.assertRaisesRegex(ValueError, "unknown network 'highway20'"):
            networks.get_network("highway20")


class TrainingTest(parameterized.TestCase):
    @parameterized.parameters(*NAMES)
    def test_every_weight_learns(self, name):
        model = networks.build(name, classifier_activation=None)
        x = np.random.default_rng(0).normal(size=(4, 32, 32, 3))
        with tf.GradientTape() as tape:
            heads = [(1.0, model(x, training=True))]
            heads += networks.get_network(name).companion_logits(model)
            loss = sum(
                weight
                * keras.ops.sparse_categorical_crossentropy(
                    np.arange(4), logits, from_logits=True
                )
                for weight, logits in heads
            )
        variables = model.trainable_variables
        gradients = tape.gradient(loss, [v.value for v in variables])
        for variable, gradient in zip(variables, gradients, strict=True):
            self.assertIsNotNone(gradient, variable.path)
            self.assertTrue(np.all(np.isfinite(gradient)), variable.path)
            self.assertGreater(np.abs(gradient).max(), 0.0, variable.path)

    def test_the_training_program_takes_them(self):
        directory = self.enter_context(tempfile.TemporaryDirectory())
        outcome = programs.run(
            *("train", "--model=dsn", "--dataset=digits"),
            *("--steps=4", "--batch_size=8", f"--workdir={directory}/run"),
            "--recipe=cifar10_unnormalized",
        )
        self.assertEqual(outcome.code, 0, outcome.err)
        again = trained_networks.load_workdir(f"{directory}/run")
        self.assertEqual((again.step, again.model.name), (4, "dsn"))

    @parameterized.parameters(*NAMES)
    @pytest.mark.large
    def test_a_few_steps_of_its_recipe_lower_the_loss(self, name):
        row = experiments.EXPERIMENTS[name]
        recipe = dataclasses.replace(
            recipes.get_recipe(row.recipe).with_steps(100),
            batch_size=32,
            decay_at_steps=(),
        )
        config = configs.Config(name, "synthetic", recipe)
        dataset = datasets.load("synthetic", image_size=32)
        directory = self.enter_context(tempfile.TemporaryDirectory())
        loop.train_and_evaluate(
            config,
            f"{directory}/run",
            dataset=dataset,
            log_every=10,
            eval_every=100,
        )
        losses = runs.load(f"{directory}/run").column("train_loss")[1]
        # Maxout, behind four dropouts, comes to what chance has and no further.
        share = 0.97 if name == "maxout" else 0.95
        self.assertLess(min(losses), share * losses[0])

    def test_norms_of_weights_are_bounded_as_published(self):
        """Maxout: by pylearn2's scripts/papers/maxout/cifar10.yaml."""
        model = networks.build("maxout")
        kernels = [v for v in model.trainable_variables if v.name == "kernel"]
        for kernel in kernels:
            kernel.assign(10 * kernel)
        recipe = recipes.RECIPES["cifar10_maxout"]
        optimizer = optimizers.of_recipe(recipe)
        optimizer.apply([tf.zeros(k.shape) for k in kernels], kernels)
        norms = [
            np.sqrt(np.square(k.numpy()).reshape(-1, k.shape[-1]).sum(0)).max()
            for k in kernels
        ]
        expected = [0.9, 1.9365, 1.9365, 1.9, 1.9365]
        np.testing.assert_allclose(norms, expected, rtol=1e-4)

    @parameterized.parameters(("maxout",), ("fitnet19",))
    def test_a_signal_neither_explodes_nor_vanishes(self, name):
        """Through the layers of a maxout, at the start, on CIFAR's variance."""
        keras.utils.set_random_seed(0)
        model = networks.build(name)
        x = np.random.default_rng(0).normal(0, 0.25, (2, 32, 32, 3))
        for layer in model.layers[1:-2]:
            x = layer(x)
            if isinstance(layer, baselines.Maxout | keras.layers.MaxPooling2D):
                signal = float(np.sqrt(np.mean(np.square(x))))
        self.assertBetween(signal, 0.05, 4.0)

    def test_companions_are_trained_by_their_own_loss(self):
        config = configs.Config("dsn", "digits", recipes.RECIPES["digits"])
        dataset = datasets.load("digits")
        run = tensorflow_trainer.TensorFlowTrainer(
            config, dataset, tf.distribute.get_strategy()
        )
        images, labels = np.zeros((4, 8, 8, 1), "float32"), np.arange(4)
        logits = run.model(images, training=True)
        alone = keras.ops.sparse_categorical_crossentropy(
            labels, logits, from_logits=True
        )
        total = run.step.losses(labels, logits)
        # Two companions that know nothing yet: 0.3 log 10 nats each.
        np.testing.assert_allclose(total - alone, 0.6 * np.log(10), rtol=1e-2)

    def test_arguments_of_residual_networks_are_refused(self):
        with self.assertRaisesRegex(ValueError, "nin takes no arguments"):
            configs.Config(
                "nin", "digits", recipes.RECIPES["digits"], {"shortcut": "A"}
            )
        with self.assertRaisesRegex(TypeError, "argument 'weights'"):
            networks.build("nin", weights="cifar10")


class LayersTest(parameterized.TestCase):
    def test_maxout_is_the_largest_of_its_program_stepss(self):
        x = np.random.default_rng(0).normal(size=(2, 4, 4, 12))
        expected = np.stack(
            [x[..., 3 * c : 3 * c + 3].max(-1) for c in range(4)], -1
        )
        np.testing.assert_allclose(baselines.Maxout(3)(x), expected, rtol=1e-6)

    @parameterized.parameters((-100.0,), (100.0,))
    def test_highway_carries_or_transforms(self, gate_bias):
        layer = baselines.Highway(gate_bias=gate_bias)
        x = np.random.default_rng(0).normal(size=(2, 8, 8, 4)).astype("float32")
        y = layer(x)
        expected = x if gate_bias < 0 else layer.transform(x)
        np.testing.assert_allclose(y, expected, atol=1e-6)

    def test_companion_changes_nothing_and_sees_the_average(self):
        layer = baselines.Companion(10)
        x = np.random.default_rng(0).normal(size=(2, 8, 8, 4)).astype("float32")
        np.testing.assert_array_equal(layer(x), x)
        kernel, bias = layer.get_weights()
        np.testing.assert_allclose(
            layer.of_thread.logits, x.mean((1, 2)) @ kernel + bias, atol=1e-5
        )


if __name__ == "__main__":
    absltest.main()
