"""Layers and networks that several models call, or one model several times."""

import warnings

import keras
import numpy as np
import pytest
from absl.testing import absltest
from absl.testing import parameterized

import keras_resnet
from keras_resnet import graphs
from keras_resnet import networks
from keras_resnet.analysis import complexity
from keras_resnet.analysis import propagation

SPEC = keras_resnet.Spec(
    "tiny", (3, 3), (4, 8), stem="cifar", classes=3, image_size=8
)


def small(name="tiny", top=False, size=8, **kwargs):
    if not top:
        kwargs = {"include_top": False, "pooling": "avg", **kwargs}
    shape = (size, size, 3)
    return keras_resnet.resnet(SPEC, input_shape=shape, name=name, **kwargs)


def image(size=8):
    return keras.Input((size, size, 3))


def images(size=8):
    x = np.random.default_rng(0).normal(size=(2, size, size, 3))
    return x.astype("float32")


def called_again(network, x, *before):
    """A model of the same layers, called once more, with others in front."""
    y = x
    for layer in (*before, *network.layers[1:]):
        y = layer(y)
    return keras.Model(x, y)


def siamese(network):
    x = image()
    return keras.Model(
        x, keras.layers.Add()([network(x), network(keras.ops.flip(x, 2))])
    )


def stages(network, x):
    """The outputs of the stages, one layer after the other."""
    found = {}
    for layer in network.layers[1:]:
        x = layer(x)
        if layer.name.startswith("stage"):
            found[layer.name.partition("_")[0]] = x
        if layer.name == "final_relu":
            found["stage2"] = x
    return found


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__(name="subclassed")
        self.network = small()

    def call(self, x):
        return self.network(x)


class FeaturesTest(parameterized.TestCase):
    def check(self, model, x, expected):
        found = keras_resnet.feature_extractor(model)(x)
        self.assertEqual(list(found), list(expected))
        for stage, value in expected.items():
            np.testing.assert_allclose(found[stage], value, atol=1e-4)

    @parameterized.product(
        unit=("original", "pre_activation"), looped=(True, False)
    )
    def test_features_are_those_of_the_models_own_input(self, unit, looped):
        network = small(unit=unit, looped=looped)
        x, doubled = images(), keras.layers.Rescaling(2.0)
        expected = stages(network, 2 * x)
        inside = keras.Sequential([image(), doubled, network])
        outer = keras.Model(inside.inputs[0], inside(inside.inputs[0] * 1.0))
        for model in (
            called_again(network, network.input, doubled),
            called_again(network, image(), doubled),
            inside,
            outer,
            keras_resnet.feature_extractor(inside),
        ):
            self.check(model, x, expected)
        self.check(network, x, stages(network, x))

    @pytest.mark.slow
    def test_features_of_a_model_of_two_inputs(self):
        network, x, age = small(), image(), keras.Input((1,))
        y = keras.layers.Concatenate()([network(3.0 * x), age])
        model = keras.Model([x, age], y)
        self.check(
            model, [images(), np.zeros((2, 1))], stages(network, 3 * images())
        )

    def test_a_relu_of_a_classifier_is_not_the_last_stage(self):
        network = small()
        y = keras.layers.Dense(5)(network.output)
        y = keras.layers.ReLU(name="final_relu")(y)
        self.check(
            keras.Model(network.input, y), images(), stages(network, images())
        )

    def test_what_has_several_answers_is_refused(self):
        network, x = small(), image()
        one, two = (
            called_again(network, x, keras.layers.Rescaling(scale))
            for scale in (1.0, 2.0)
        )
        flat = keras.Model(x, keras.layers.Add()([one.output, two.output]))
        towers = keras.Model(
            x, keras.layers.Add()([small("left")(x), small("right")(x)])
        )
        for model, message in (
            (siamese(network), "which calls tiny, tiny"),
            (towers, "which calls left, right"),
            (flat, "calls stage1_unit3 2 times"),
            (Subclassed(), "must be a functional model"),
            (keras.Sequential([keras.layers.Dense(1)]), "that starts with"),
        ):
            with self.assertRaisesRegex(ValueError, message):
                keras_resnet.feature_extractor(model)


class CostsTest(parameterized.TestCase):
    def check(self, model, networks, rest=0, **kwargs):
        """The multiply-adds are those of some networks and the rest."""
        report = complexity.complexity(model, **kwargs)
        costs = [complexity.complexity(n)["multiply_adds"] for n in networks]
        self.assertEqual(report["multiply_adds"], sum(costs) + rest)
        weights = {id(w): w for w in model.trainable_weights}.values()
        self.assertEqual(
            report["parameters"], sum(int(np.prod(w.shape)) for w in weights)
        )

    @parameterized.parameters(True, False)
    def test_a_network_that_is_called_twice_costs_twice(self, looped):
        network = small(looped=looped)
        self.check(siamese(network), [network, network])

    def test_two_sizes_cost_what_each_of_them_costs(self):
        network = keras_resnet.resnet(SPEC, include_top=False, pooling="avg")
        x = image(16)
        half = keras.layers.AveragePooling2D(2)(x)
        model = keras.Model(x, keras.layers.Add()([network(x), network(half)]))
        self.check(model, [small(size=16), small(size=8)])
        # Neither another call nor another model changes the answer.
        network(image(32))
        self.check(model, [small(size=16), small(size=8)])

    def test_layers_at_another_size_cost_what_they_do_there(self):
        network = small(size=8)
        model = called_again(network, image(16))
        self.check(model, [small(size=16)])
        self.check(network, [small(size=8)])
        self.check(network, [small(size=16)], input_shape=(16, 16, 3))

    def test_a_layer_that_is_called_twice_has_its_weights_once(self):
        layer = keras.layers.Conv2D(3, 3, padding="same", use_bias=False)
        x = image()
        self.check(keras.Model(x, layer(layer(x))), [], 2 * 64 * 81)

    def test_a_network_for_each_of_five_images_costs_five_times(self):
        network = small()
        model = keras.Sequential(
            [
                keras.Input((5, 8, 8, 3)),
                keras.layers.TimeDistributed(network),
            ]
        )
        self.check(model, [network] * 5)

    def test_layers_inside_a_layer_are_counted_as_it_calls_them(self):
        class Two(keras.layers.Layer):
            def __init__(self):
                super().__init__()
                self.a, self.b = (
                    keras.layers.Conv2D(4, 3, strides=2) for _ in range(2)
                )

            def call(self, x):
                return self.a(x) + self.b(x)

        class Unknown(Two):
            def call(self, x):
                return self.a(x)

        x = image()
        self.check(keras.Model(x, Two()(x)), [], 2 * 9 * 9 * 3 * 4)
        unknown = Unknown()
        unknown.b.build((None, 8, 8, 3))
        with self.assertRaisesRegex(ValueError, "does not call its layer"):
            complexity.complexity(keras.Model(x, unknown(x)))

    @parameterized.parameters("highway32", "dsn")
    def test_baselines_have_the_parameters_of_their_weights(self, name):
        model = networks.build(name)
        report = complexity.complexity(model)
        self.assertEqual(
            report["parameters"],
            sum(int(np.prod(w.shape)) for w in model.trainable_weights),
        )

    @parameterized.parameters(
        ((8, 8, 1), "the dimensions and the channels"),
        ((8, 8), "the dimensions and the channels"),
    )
    def test_a_size_that_is_none_of_the_models_is_refused(self, size, message):
        with self.assertRaisesRegex(ValueError, message):
            complexity.complexity(small(), size)

    def test_models_that_cannot_be_counted_are_refused(self):
        x = image()
        flat = keras.layers.Dense(2)(keras.layers.Flatten()(x))
        two = keras.Model([x, y := image()], keras.layers.Add()([x, y]))
        for model, size, message in (
            (Subclassed(), None, "must be a functional model"),
            (two, (8, 8, 3), "must be None for a model of several inputs"),
            (keras.Model(x, flat), (16, 16, 3), "expected axis -1"),
        ):
            with self.assertRaisesRegex(ValueError, message):
                complexity.complexity(model, size)


class SignalsTest(parameterized.TestCase):
    def test_signals_are_those_of_the_models_own_input(self):
        network = small(top=True)
        doubled = keras.layers.Rescaling(2.0)
        expected = propagation.propagation(network, 2 * images(), [0, 1])
        x = image()
        for model in (
            called_again(network, network.input, doubled),
            keras.Sequential([image(), doubled, network]),
            keras.Model(x, network(x * 2.0)),
        ):
            found = propagation.propagation(model, images(), [0, 1])
            for key in ("signal", "gradient"):
                np.testing.assert_allclose(
                    [unit[key] for unit in found["units"]],
                    [unit[key] for unit in expected["units"]],
                    rtol=1e-3,
                )

    def test_what_is_no_chain_with_a_classifier_is_refused(self):
        network, x = small(), image()
        sigmoid = keras.layers.Dense(2, activation="sigmoid")
        dropout = keras.layers.Dropout(0.5)
        for y, message in (
            (siamese(network)(x), "a chain of its units"),
            (sigmoid(network(x)), "logits or their softmax"),
            (dropout(network(x)), "logits or their softmax"),
        ):
            with self.assertRaisesRegex(ValueError, message):
                propagation.propagation(keras.Model(x, y), images(), [0, 1])


class NodesTest(parameterized.TestCase):
    def test_nodes_are_those_of_the_model_and_in_its_order(self):
        network = small()
        model = called_again(network, image(), keras.layers.Rescaling(2.0))
        names = [layer.name for layer in network.layers[1:]]
        for one, expected in ((network, names), (model, None)):
            found = [node.operation.name for node in graphs.nodes(one)]
            self.assertEqual(found[-len(names) :], expected or names)


class ConverterTest(parameterized.TestCase):
    @parameterized.parameters(False, True)
    def test_a_looped_network_answers_the_same_in_litert(self, int8):
        import tensorflow as tf

        model = small(top=True, looped=True)
        x = np.repeat(images(), 4, 0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of TensorFlow, of its own parts
            converter = tf.lite.TFLiteConverter.from_keras_model(model)
            if int8:
                converter.optimizations = [tf.lite.Optimize.DEFAULT]
                converter.representative_dataset = lambda: (
                    [one[None]] for one in x
                )
            interpreter = tf.lite.Interpreter(model_content=converter.convert())
        interpreter.allocate_tensors()
        (inputs,) = interpreter.get_input_details()
        (outputs,) = interpreter.get_output_details()
        interpreter.set_tensor(inputs["index"], x[:1])
        interpreter.invoke()
        np.testing.assert_allclose(
            interpreter.get_tensor(outputs["index"]),
            model(x[:1]),
            atol=0.1 if int8 else 1e-5,
        )


if __name__ == "__main__":
    absltest.main()
