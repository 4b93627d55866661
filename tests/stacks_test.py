"""Loops over units equal the units one after the other."""

import gc
import itertools
import tempfile
import weakref
from unittest import mock

import keras
import numpy as np
import pytest
import tensorflow as tf
from absl.testing import absltest
from absl.testing import parameterized

import keras_resnet
from keras_resnet import layers
from keras_resnet.layers import convolutions
from keras_resnet.layers import shortcuts
from keras_resnet.layers import units
from keras_resnet.training import optimizers

N = 3
PROBABILITIES = (0.9, 0.7, 0.5)
SHAPE = (4, 6, 6, 8)
# Every unit with one shortcut, and one unit with every shortcut.
KINDS = [
    *((unit, "A") for unit in units.UNITS),
    *(("pre_activation", shortcut) for shortcut in shortcuts.SHORTCUTS),
]


def images(shape=SHAPE):
    x = np.random.default_rng(0).normal(size=shape)
    return tf.constant(x, "float32")


def make(unit, shortcut, probabilities=None, remat=False, dtype=None):
    """Returns N units and a stack of N units with the same values."""
    cls, filters = units.UNITS[unit], SHAPE[-1]
    arguments = {"shortcut": shortcut, "dtype": dtype}
    unrolled = [
        cls(filters, survival_probability=p, **arguments)
        for p in probabilities or [1.0] * N
    ]
    stack = layers.UnitStack(
        cls(filters, **arguments), N, probabilities, remat, dtype=dtype
    )
    stack.build(SHAPE)
    rng = np.random.default_rng(1)
    for one in unrolled:
        one.build(SHAPE)
        for v in one.variables:
            if v.name in ("gamma", "moving_variance"):
                v.assign(rng.uniform(0.5, 1.5, v.shape))
            elif v.name != "seed_generator_state":
                v.assign(rng.normal(0, 0.3, v.shape))
    for weight, *values in zip(
        stack.stacked, *(u.variables for u in unrolled), strict=True
    ):
        weight.assign(np.stack([np.array(v) for v in values]))
    return unrolled, stack


def results(call, x, parameters):
    """Returns the output and the gradients of a training step in a graph."""

    @tf.function
    def step(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = call(x)
            loss = tf.reduce_sum(tf.cast(y, "float32") ** 2)
        return [y, *tape.gradient(loss, [x, *parameters])]

    return [np.array(tf.cast(v, "float32")) for v in step(x)]


def in_stacks(unrolled, values):
    """Returns the values of the units in the form of the stack."""
    count = len(values) // len(unrolled)
    return [np.stack(values[j::count]) for j in range(count)]


@keras.saving.register_keras_serializable(package="stacks_test")
class OwnShortcut(layers.Shortcut):
    """Shortcut `sum = x + kernel * F`, with kernel = 0 at the start."""

    def build(self, x_shape, residual_shape):
        super().build(x_shape, residual_shape)
        self.kernel = self.add_weight(
            name="kernel", shape=residual_shape[-1:], initializer="zeros"
        )

    def call(self, x, residual, training=None):
        return self.matched(x, residual) + self.kernel * residual


@keras.saving.register_keras_serializable(package="stacks_test")
class OwnUnit(layers.OriginalUnit):
    """Unit with a dense layer, which Keras initializes."""

    def build(self, x_shape):
        super().build(x_shape)
        self.excite = keras.layers.Dense(
            self.filters,
            bias_initializer=keras.initializers.Constant(0.25),
            name="excite",
        )
        self.excite.build((None, self.filters))


class UnitStackTest(parameterized.TestCase):
    def assert_same(self, unrolled, stack, x, tolerance=1e-4):
        def one_by_one(x):
            for unit in unrolled:
                x = unit(x, training=True)
            return x

        parameters = [v.value for u in unrolled for v in u.trainable_variables]
        y, dx, *gradients = results(one_by_one, x, parameters)
        expected = [y, dx, *in_stacks(unrolled, gradients)]
        got = results(
            lambda x: stack(x, training=True),
            x,
            [v.value for v in stack.trainable_variables],
        )
        expected += in_stacks(
            unrolled, [np.array(v) for u in unrolled for v in u.variables]
        )
        got += [np.array(v) for v in stack.stacked]
        for a, b in zip(got, expected, strict=True):
            scale = np.abs(b).max() + 1e-6
            np.testing.assert_allclose(a / scale, b / scale, atol=tolerance)

    @parameterized.parameters(*zip(KINDS, itertools.cycle((False, True))))
    def test_outputs_gradients_and_states_equal_the_unrolled_units(
        self, kind, remat
    ):
        """Law 4 of the design; each second kind recomputes activations."""
        self.check(kind, remat)

    @parameterized.parameters(*zip(KINDS, itertools.cycle((True, False))))
    @pytest.mark.slow
    def test_the_other_kinds_with_and_without_recomputed_activations(
        self, kind, remat
    ):
        self.check(kind, remat)

    def check(self, kind, remat):
        """Compares them with a survival probability for each unit."""
        unrolled, stack = make(*kind, PROBABILITIES, remat)
        self.assert_same(unrolled, stack, images())

    @parameterized.parameters(False, True)
    def test_half_precision_equals_the_unrolled_units(self, remat):
        dtype = "mixed_bfloat16"
        unrolled, stack = make("original", "A", None, remat, dtype)
        x = tf.cast(images(), "bfloat16")
        self.assert_same(unrolled, stack, x, tolerance=0.03)

    @parameterized.parameters(itertools.product(units.UNITS, "AC"))
    @pytest.mark.slow
    def test_units_that_are_computed_again_are_the_same(self, unit, shortcut):
        """Tests remat of single units: gradients, and one update."""
        unrolled, _ = make(unit, shortcut, PROBABILITIES)
        again, _ = make(unit, shortcut, PROBABILITIES)
        for a, b in zip(unrolled, again, strict=True):
            for v, w in zip(a.variables, b.variables, strict=True):
                w.assign(v)
            b.remat = True
        x = images()
        both = []
        for chain in (unrolled, again):

            def call(x, chain=chain):
                for one in chain:
                    x = one(x, training=True)
                return x

            parameters = [v.value for u in chain for v in u.trainable_variables]
            values = results(call, x, parameters)
            values += [np.array(v) for u in chain for v in u.variables]
            both.append(values)
        for a, b in zip(*both, strict=True):
            scale = np.abs(a).max() + 1e-6
            np.testing.assert_allclose(a / scale, b / scale, atol=1e-5)

    def test_inference_equals_the_unrolled_units_and_changes_nothing(self):
        unrolled, stack = make("original", "A", PROBABILITIES)
        x = images()
        before = [np.array(w) for w in stack.stacked]
        expected = x
        for unit in unrolled:
            expected = unit(expected)
        np.testing.assert_allclose(stack(x), expected, rtol=1e-5, atol=1e-5)
        for a, b in zip(before, stack.stacked, strict=True):
            np.testing.assert_array_equal(a, b)

    def test_frozen_stack_normalizes_by_its_moving_statistics(self):
        unrolled, stack = make("original", "A")
        stack.trainable = False
        x = images()
        expected = x
        for unit in unrolled:
            expected = unit(expected, training=False)
        np.testing.assert_allclose(
            stack(x, training=True), expected, rtol=1e-5, atol=1e-5
        )
        self.assertEmpty(stack.trainable_variables)
        stack.trainable = True
        difference = np.abs(stack(x, training=True) - expected)
        self.assertGreater(difference.max(), 0.01)

    def test_kernels_have_the_variance_of_one_unit(self):
        stack = layers.UnitStack(layers.OriginalUnit(64, shortcut="A"), 20)
        stack.build((None, 8, 8, 64))
        kernel = np.array(stack.weights[0])
        self.assertEqual(kernel.shape, (20, 3, 3, 64, 64))
        np.testing.assert_allclose(kernel.var(), 2 / (9 * 64), rtol=0.02)
        self.assertGreater(np.abs(kernel[0] - kernel[1]).max(), 0.1)

    def test_layers_of_ones_own_start_as_they_say(self):
        """Compares the loop with separate units."""
        keras.utils.set_random_seed(0)
        stack = layers.UnitStack(OwnUnit(8, shortcut=OwnShortcut()), 40)
        stack.build(SHAPE)
        got = {w.name: np.array(w) for w in stack.weights}
        np.testing.assert_array_equal(got["shortcut_kernel"], 0)
        np.testing.assert_array_equal(got["excite_bias"], 0.25)
        # Glorot and Bengio 2010: uniform within sqrt(6 / (8 + 8)).
        excite, limit = got["excite_kernel"], (6 / 16) ** 0.5
        self.assertEqual(excite.shape, (40, 8, 8))
        self.assertBetween(np.abs(excite).max(), 0.98 * limit, limit)
        np.testing.assert_allclose(excite.var(), limit**2 / 3, rtol=0.1)
        np.testing.assert_allclose(got["conv1_kernel"].var(), 2 / 72, rtol=0.1)
        for kernel in (excite, got["conv1_kernel"]):
            self.assertGreater(np.abs(kernel[0] - kernel[1]).max(), 0.1)

    def test_gates_start_as_those_of_single_units(self):
        shortcut = layers.ExclusiveGating(gate_bias=-7.0)
        stack = layers.UnitStack(layers.OriginalUnit(32, shortcut=shortcut), 20)
        stack.build((None, 8, 8, 32))
        got = {w.name: np.array(w) for w in stack.weights}
        np.testing.assert_array_equal(got["shortcut_gate_bias"], -7.0)
        np.testing.assert_allclose(
            got["shortcut_gate_kernel"].var(), 2 / 32, rtol=0.05
        )

    def test_stack_refuses_units_that_change_the_shape(self):
        with self.assertRaisesRegex(ValueError, "keep the shape.*stride 2"):
            layers.UnitStack(layers.OriginalUnit(8, 2), 3).build(SHAPE)
        with self.assertRaisesRegex(ValueError, "16 filters"):
            layers.UnitStack(layers.OriginalUnit(16), 3).build(SHAPE)
        with self.assertRaisesRegex(ValueError, "count=3 and 2 prob"):
            layers.UnitStack(layers.OriginalUnit(8), 3, [0.5, 0.5])
        for p in (0.0, 2.0):
            with self.assertRaisesRegex(ValueError, rf"\(0, 1\].*received {p}"):
                layers.UnitStack(layers.OriginalUnit(8), 2, [1.0, p])

    @parameterized.parameters("original", "relu_only_pre_activation")
    def test_stack_comes_back_from_its_config_and_its_file(self, unit):
        _, stack = make(unit, "dropout", PROBABILITIES, True)
        model = keras.Sequential([keras.Input(SHAPE[1:]), stack])
        directory = self.enter_context(tempfile.TemporaryDirectory())
        model.save(f"{directory}/model.keras")
        again = keras.models.load_model(f"{directory}/model.keras")
        self.assertEqual(again.layers[0].get_config(), stack.get_config())
        x = images()
        np.testing.assert_array_equal(again(x), model(x))
        for a, b in zip(
            again.layers[0].stacked,
            stack.stacked,
            strict=True,
        ):
            np.testing.assert_array_equal(a, b)
        model.save_weights(f"{directory}/model.weights.h5")
        model.layers[0].set_weights([w * 0 for w in stack.get_weights()])
        model.load_weights(f"{directory}/model.weights.h5")
        np.testing.assert_array_equal(again(x), model(x))


class RecomputationTest(absltest.TestCase):
    def test_takes_the_kernels_of_training(self):
        """Runs 1x1 convolutions as products, both times."""
        unit = layers.OriginalUnit(8, bottleneck=True, remat=True)
        x = tf.ones((2, 4, 4, 32))
        unit.build(x.shape)
        with (
            mock.patch.object(
                convolutions, "_is_fast_as_product", return_value=True
            ),
            mock.patch.object(
                layers.Convolution,
                "_product",
                autospec=True,
                side_effect=layers.Convolution._product,
            ) as product,
        ):
            with tf.GradientTape() as tape:
                y = unit(x, training=True)
            forward = product.call_count
            tape.gradient(y, unit.trainable_variables)
        self.assertEqual(forward, 2)
        self.assertEqual(product.call_count, 4)


def gradients(call, x, order):
    """Returns the gradient of an order of a scalar, by nested tapes."""
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = call(x) if order == 1 else gradients(call, x, order - 1)
        some = tf.cos(tf.range(y.shape.num_elements(), dtype="float32"))
        y = tf.reduce_sum(y * tf.reshape(some, tf.shape(y)))
    return tape.gradient(y, x)


def second_derivatives(call, x):
    return gradients(call, x, 2)


def third_derivatives(call, x):
    return gradients(call, x, 3)


def hessian(call, x):
    with tf.GradientTape() as tape:
        tape.watch(x)
        row = gradients(call, x, 1)[0, 0]
    return tape.jacobian(row, x)


def gradients_twice(call, x):
    """Returns the gradients of a persistent tape, also of gathered rows."""
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(x)
        y = tf.gather(call(x), [1, 0, 1]) ** 2
    return tf.stack([tape.gradient(y, x) for _ in range(2)])


def tangents(call, x):
    with tf.autodiff.ForwardAccumulator(x, tf.reverse(x, [0, 1])) as forward:
        y = call(x)
    return forward.jvp(y)


class DerivativesTest(parameterized.TestCase):
    """Tests that looped and recomputed units have the plain derivatives."""

    def assert_same(self, derivative, kind, training=True, function="none"):
        """`function`: whether the inner or the outer call is a tf.function."""
        plain, stack = make("original", "A", remat="remat" in kind)
        again, _ = make("original", "A")
        for unit in again:
            unit.remat = True

        def chain(units):
            def call(x):
                for unit in units:
                    x = unit(x, training=training)
                return x

            return call

        def loop(x):
            return stack(x, training=training)

        def found(call):
            if function == "inner":
                call = tf.function(call, autograph=False)

            def outer(x):
                return derivative(lambda x: tf.tanh(call(x) / 10), x)

            if function == "outer":
                outer = tf.function(outer, autograph=False)
            return np.array(outer(images((2, 3, 3, SHAPE[-1]))))

        expected = found(chain(plain))
        got = found(loop if "loop" in kind else chain(again))
        limit = 2e-3 * np.abs(expected).max()
        self.assertGreater(limit, 0)
        np.testing.assert_allclose(got, expected, atol=limit)

    @parameterized.parameters(
        ("loop", True, "inner"),
        ("loop, remat", True, "none"),
        ("remat", True, "inner"),
    )
    @pytest.mark.slow
    def test_second_derivatives(self, kind, training, function):
        self.assert_same(second_derivatives, kind, training, function)

    @parameterized.parameters(
        (second_derivatives, "loop", False, "inner"),
        (second_derivatives, "loop, remat", True, "inner"),
        (second_derivatives, "loop, remat", True, "outer"),
        (third_derivatives, "loop", True, "outer"),
        (hessian, "loop, remat", True, "none"),
    )
    @pytest.mark.large
    def test_derivatives_that_take_long(self, *arguments):
        self.assert_same(*arguments)

    @parameterized.parameters(
        (gradients_twice, "loop, remat"),
        (gradients_twice, "remat"),
        (tangents, "loop, remat"),
    )
    def test_without_a_function(self, derivative, kind):
        self.assert_same(derivative, kind)

    def test_forward_mode_of_inference(self):
        self.assert_same(tangents, "loop", False, "outer")

    @parameterized.parameters("loop", "loop, remat", "remat")
    def test_forward_mode_in_a_function_is_an_error(self, kind):
        with self.assertRaisesRegex(NotImplementedError, "take them eagerly"):
            self.assert_same(tangents, kind, True, "outer")


SPEC = keras_resnet.Spec(
    "tiny", (2,), (4,), stem="cifar", classes=2, image_size=4
)


def fit(model, x, labels):
    model.compile("sgd", "sparse_categorical_crossentropy")
    model.fit(x, labels, verbose=0)


def take_step(model, x, labels):
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(model(x, training=True)[:, 0])
    return tape.gradient(loss, model.trainable_variables)


def take_step_in_a_function(model, x, labels):
    tf.function(take_step)(model, x, labels)


class MemoryTest(parameterized.TestCase):
    @parameterized.product(
        settings=({"remat": True}, {"remat": True, "looped": True}),
        use=(fit, take_step, take_step_in_a_function),
    )
    @pytest.mark.slow
    def test_a_network_that_nobody_holds_is_freed(self, settings, use):
        model = keras_resnet.resnet(SPEC, **settings)
        use(model, tf.zeros((2, 4, 4, 3)), tf.constant([0, 1]))
        held = [weakref.ref(v) for v in (model, *model.weights)]
        del model
        keras.backend.clear_session()
        gc.collect()
        self.assertEmpty([r() for r in held if r() is not None])


def nodes(model, batch=2):
    """Returns the operations of a training step, also inside functions."""
    x = tf.zeros((batch, *model.input_shape[1:]))

    @tf.function
    def step(x):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(model(x, training=True))
        return tape.gradient(loss, model.trainable_variables)

    graph = step.get_concrete_function(x).graph.as_graph_def()
    functions = graph.library.function
    return len(graph.node) + sum(len(f.node_def) for f in functions)


class LoopedNetworkTest(parameterized.TestCase):
    @parameterized.parameters(False, True)
    @pytest.mark.slow
    def test_graph_does_not_grow_with_depth(self, remat):
        counts = set()
        for n in (300, 600, 900):
            spec = keras_resnet.Spec(
                f"deep{n}", (n, n, n), (4, 8, 8), stem="cifar", shortcut="A"
            )
            model = keras_resnet.resnet(
                spec,
                classes=10,
                input_shape=(8, 8, 3),
                looped=True,
                remat=remat,
            )
            counts.add(nodes(model))
        self.assertLen(counts, 1)
        # There are fewer operations than convolutions in the deepest network.
        self.assertLess(counts.pop(), 3 * 900 * 2)

    @pytest.mark.large
    def test_network_of_10_002_layers_trains_and_is_saved(self):
        spec = keras_resnet.Spec(
            "resnet10002",
            (1667, 1667, 1666),
            (16, 32, 64),
            stem="cifar",
            shortcut="A",
            classes=10,
            image_size=32,
        )
        self.assertEqual(spec.depth, 10_002)
        model = keras_resnet.resnet(spec)
        model.compile(
            optimizers.Momentum(0.01, momentum=0.9),
            "sparse_categorical_crossentropy",
        )
        x = np.random.default_rng(0).normal(size=(2, 32, 32, 3))
        loss = model.train_on_batch(x, np.array([0, 1]))
        self.assertTrue(np.isfinite(loss))
        with tempfile.TemporaryDirectory() as directory:
            model.save(f"{directory}/deep.keras")
            again = keras.models.load_model(f"{directory}/deep.keras")
        for a, b in zip(model.weights, again.weights, strict=True):
            np.testing.assert_array_equal(a, b)

    def test_deep_stages_are_loops_by_default(self):
        names = [layer.name for layer in keras_resnet.ResNet1202().layers]
        self.assertIn("stage3_stack", names)
        self.assertLess(len(names), 20)
        names = [layer.name for layer in keras_resnet.ResNet20().layers]
        self.assertNotIn("stage3_stack", names)

    def test_looped_network_counts_the_same_parameters(self):
        count = keras_resnet.ResNet56(looped=True).count_params()
        self.assertEqual(count, keras_resnet.ResNet56().count_params())

    def test_looped_network_trains_in_fit(self):
        model = keras_resnet.ResNet20(
            input_shape=(8, 8, 3), looped=True, remat=True
        )
        model.compile("sgd", "sparse_categorical_crossentropy")
        x = np.random.default_rng(0).normal(size=(16, 8, 8, 3))
        before = [np.array(w) for w in model.weights]
        history = model.fit(x, np.arange(16) % 10, epochs=2, verbose=0)
        self.assertTrue(np.isfinite(history.history["loss"]).all())
        for a, b in zip(before, model.weights, strict=True):
            self.assertGreater(np.abs(a - b).max(), 0, b.path)


if __name__ == "__main__":
    absltest.main()
