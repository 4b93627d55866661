"""Weights of our own files and models: the same function, or one error."""

from unittest import mock

import keras
import numpy as np
import pytest
from absl.testing import absltest
from absl.testing import parameterized

import keras_resnet
from keras_resnet import weights
from tests.weight_files import WeightsTestCase
from tests.weight_files import keras_application
from tests.weight_files import like_keras_application
from tests.weight_files import randomized
from tests.weight_files import safetensors
from tests.weight_files import small
from tests.weight_files import state_dict
from tests.weight_files import values


class OwnFilesTest(WeightsTestCase):
    @parameterized.product(
        ending=(".weights.h5", ".keras", ".h5"),
        kwargs=(
            {"shortcut": "B"},
            {"shortcut": "exclusive_gating", "bottleneck": False},
            {"shortcut": "dropout", "bottleneck": False},
            {"unit": "pre_activation", "survival_probability": 0.5},
        ),
    )
    def test_what_a_model_saved_is_loaded_into_another(self, ending, kwargs):
        saved, model = small(**kwargs), small(**kwargs)
        randomized(saved, seed=1)
        path = self.path(None, f"model{ending}")
        if ending == ".weights.h5":
            saved.save_weights(path)
        elif ending == ".keras":
            saved.save(path)
        else:
            with mock.patch("absl.logging.warning"):  # "legacy format"
                saved.save(path)
        weights.load(model, path)
        self.assert_weights_equal(model, saved)

    @parameterized.product(
        ending=(".weights.h5", ".keras", ".h5"),
        saved_looped=(True, False),
        shortcut=("A", "C", "shortcut_only_gating"),
    )
    @pytest.mark.slow
    def test_a_looped_network_and_an_unrolled_one_share_their_files(
        self, ending, saved_looped, shortcut
    ):
        kwargs = {"shortcut": shortcut, "bottleneck": False}
        saved = small(looped=saved_looped, **kwargs)
        randomized(saved, seed=1)
        path = self.path(None, f"model{ending}")
        if ending == ".weights.h5":
            saved.save_weights(path)
        else:
            with mock.patch("absl.logging.warning"):  # "legacy format"
                saved.save(path)
        x = np.random.default_rng(2).normal(size=(2, 8, 8, 3))
        for looped in (True, False):
            model = small(looped=looped, **kwargs)
            weights.load(model, path)
            np.testing.assert_allclose(model(x), saved(x), atol=1e-6)

    @parameterized.product(saved_p=(0.5, 1.0), looped=(True, False))
    def test_a_looped_network_is_loaded_without_its_stochastic_depth(
        self, saved_p, looped
    ):
        kwargs = {"bottleneck": False, "looped": True}
        saved = small(survival_probability=saved_p, **kwargs)
        randomized(saved, seed=1)
        path = self.path(None, "model.weights.h5")
        saved.save_weights(path)
        kwargs["looped"] = looped
        model = small(survival_probability=1.5 - saved_p, **kwargs)
        weights.load(model, path)
        x = np.random.default_rng(2).normal(size=(2, 8, 8, 3))
        np.testing.assert_allclose(model(x), saved(x), atol=1e-6)

    def test_weights_are_copied_between_looped_and_unrolled_networks(self):
        looped, unrolled = small(looped=True), small(looped=False)
        randomized(looped, seed=1)
        weights.copy(looped, unrolled)
        kernel = looped.get_layer("stage2_stack").stacked[0]
        np.testing.assert_array_equal(
            unrolled.get_layer("stage2_unit2").conv1.kernel, kernel[0]
        )
        again = small(looped=True)
        weights.copy(unrolled, again)
        self.assert_weights_equal(again, looped)

    def test_weights_of_another_network_are_not_copied(self):
        source, target = keras_resnet.ResNet20(), small()
        with self.assertRaisesRegex(ValueError, "'resnet20' does not fit"):
            weights.copy(source, target)

    def test_the_state_of_an_optimizer_is_left_aside(self):
        saved, model = small(), randomized(small(), seed=1)
        saved.compile("adam", "sparse_categorical_crossentropy")
        saved.optimizer.build(saved.trainable_variables)
        path = self.path(None, "model.keras")
        saved.save(path)
        weights.load(model, path)
        self.assert_weights_equal(model, saved)

    def test_a_builder_loads_a_path(self):
        path = self.path(None, "model.weights.h5")
        saved = randomized(keras_resnet.ResNet20())
        saved.save_weights(path)
        model = keras_resnet.ResNet20(weights=path)
        self.assert_weights_equal(model, saved)

    def test_a_file_with_a_classifier_fits_a_model_without_one(self):
        saved = randomized(small(), seed=1)
        model = small(include_top=False)
        path = self.path(None, "model.weights.h5")
        saved.save_weights(path)
        weights.load(model, path)
        expected = values(saved)
        for name, value in values(model).items():
            np.testing.assert_array_equal(value, expected[name])

    def test_a_file_of_bfloat16_is_read(self):
        policy = keras.config.dtype_policy()
        keras.config.set_dtype_policy("bfloat16")
        try:
            saved = small()
        finally:
            keras.config.set_dtype_policy(policy)
        path = self.path(None, "model.weights.h5")
        saved.save_weights(path)
        model = small()
        weights.load(model, path)
        for name, value in values(model).items():
            expected = values(saved)[name].astype("float32")
            np.testing.assert_array_equal(value, expected)

    def test_a_shortcut_of_ones_own_keeps_its_weights(self):
        class Scales(keras_resnet.layers.Shortcut):
            def build(self, x_shape, residual_shape):
                super().build(x_shape, residual_shape)
                for name in ("a", "b", "c"):
                    self.add_weight(shape=(2,), name=name)

            def call(self, x, residual):
                return self.matched(x, residual) + residual

        saved, model = (small(shortcut=Scales()) for _ in range(2))
        randomized(saved, seed=1)
        path = self.path(None, "model.weights.h5")
        saved.save_weights(path)
        weights.load(model, path)
        self.assert_weights_equal(model, saved)


def nested(*names, looped=False, top="top"):
    """A model with a network of each name, all of them the same but in weights.

    A name with a slash puts the network into one more model.
    """
    image = keras.Input((8, 8, 3))
    features = []
    for seed, name in enumerate(names):
        outer, _, inner = name.rpartition("/")
        network = keras_resnet.resnet(
            keras_resnet.Spec(
                "small", (1, 3), (4, 8), stem="cifar", image_size=8
            ),
            include_top=False,
            pooling="avg",
            input_shape=(8, 8, 3),
            looped=looped,
            name=inner,
        )
        randomized(network, seed=seed)
        if outer:
            network = keras.Sequential(
                [keras.Input((8, 8, 3)), network], name=outer
            )
        features.append(network(image))
    if len(features) > 1:
        features = [keras.layers.Concatenate()(features)]
    return keras.Model(image, keras.layers.Dense(3, name=top)(features[0]))


class NetworksInsideTest(WeightsTestCase):
    """Weights are known by the path in their own network."""

    def save(self, model, ending):
        path = self.path(None, f"model{ending}")
        with mock.patch("absl.logging.warning"):  # "legacy format"
            save = model.save_weights if "weights" in ending else model.save
            save(path)
        return path

    def check(self, model, source):
        x = np.random.default_rng(2).normal(size=(2, 8, 8, 3))
        expected = np.array(source(x))
        np.testing.assert_allclose(model(x), expected, atol=1e-5)

    @parameterized.parameters(
        (("left", "right"), ("left", "right")),
        (("left",), ("right",)),
        (("left",), ("deep/right",)),
        (("a/left", "b/left"), ("a/left", "b/left")),
    )
    def test_each_network_gets_its_own_weights(self, names, others):
        source = randomized(nested(*names), seed=9)
        files = [self.save(source, e) for e in (".weights.h5", ".keras")]
        if "/" not in names[0]:  # such files leave out the names inside
            files.append(self.save(source, ".h5"))
        for looped in (True, False):
            target = nested(*others, looped=looped)
            weights.copy(source, target)
            self.check(target, source)
            back = nested(*names)
            weights.copy(target, back)
            self.check(back, source)
            for path in files:
                randomized(target, seed=5)
                weights.load(target, path)
                self.check(target, source)

    @parameterized.parameters(".weights.h5", ".keras", ".h5")
    def test_what_is_ambiguous_is_refused_with_the_way_out(self, ending):
        two, renamed = nested("left", "right"), nested("a", "b")
        one = two.get_layer("left")
        for source, target, message in (
            (two, renamed, r"received 2 \(left, right\) for 2 \(a, b\)"),
            (two, one, r"copy\(source.get_layer\('left'\), target\)"),
            (one, two, r"\(.*target.get_layer\('left'\)"),
        ):
            with self.assertRaisesRegex(ValueError, message):
                weights.copy(source, target)
            self.assert_refused(target, self.save(source, ending), message)

    def test_the_ways_out_work(self):
        source, target = nested("left", "right"), nested("a", "b")
        weights.copy(source.get_layer("left"), target.get_layer("a"))
        path = self.save(source.get_layer("right"), ".keras")
        weights.load(target.get_layer("b"), path)
        for ours, theirs in (("a", "left"), ("b", "right")):
            self.check(target.get_layer(ours), source.get_layer(theirs))

    def test_classifiers_inside_and_around_a_network_are_two(self):
        def model(name):
            image = keras.Input((8, 8, 3))
            network = small()
            network = keras.Model(network.input, network.output, name=name)
            top = keras.layers.Dense(3, name="predictions")
            return keras.Model(image, top(network(image)))

        source, target = randomized(model("a"), seed=9), model("b")
        weights.copy(source, target)
        self.check(target, source)
        target = model("b")
        weights.load(target, self.save(source, ".keras"))
        self.check(target, source)

    @parameterized.parameters(".weights.h5", ".keras", ".h5")
    def test_a_layer_around_may_have_a_name_that_torch_gives(self, ending):
        def model():
            image = keras.Input((8, 8, 1))
            x = keras.layers.Conv2D(3, 1, name="conv1")(image)
            x = nested("base").get_layer("base")(x)
            return keras.Model(image, keras.layers.Dense(2, name="fc")(x))

        source, target = randomized(model(), seed=9), model()
        weights.load(target, self.save(source, ending))
        x = np.ones((1, 8, 8, 1))
        np.testing.assert_allclose(target(x), source(x), atol=1e-5)

    def test_a_network_of_keras_applications_inside_a_model_is_found(self):
        def model(builder, **kwargs):
            image = keras.Input((32, 32, 3))
            base = builder(
                include_top=False,
                pooling="avg",
                input_shape=(32, 32, 3),
                **kwargs,
            )
            return keras.Model(
                image, keras.layers.Dense(2, name="fc")(base(image))
            )

        theirs = model(keras_application)
        ours = model(like_keras_application, name="ours")
        x = np.random.default_rng(2).normal(size=(1, 32, 32, 3))
        for ending in (".weights.h5", ".h5"):
            weights.load(ours, self.save(theirs, ending))
            np.testing.assert_allclose(ours(x), theirs(x), rtol=1e-3, atol=1e-4)

    def test_torch_names_behind_the_name_of_a_module(self):
        left, right = small(), randomized(small(), seed=1)
        arrays = {
            f"module.{name}.{path}": array
            for name, network in (("query", left), ("key", right))
            for path, array in state_dict(network).items()
        }
        image = keras.Input((8, 8, 3))
        towers = [
            keras.Model(network.input, network.output, name=name)
            for name, network in (
                ("query", randomized(small(), seed=5)),
                ("key", randomized(small(), seed=6)),
            )
        ]
        both = keras.Model(image, [tower(image) for tower in towers])
        path = self.path(safetensors(arrays))
        weights.load(both, path)
        self.check(towers[0], left)
        self.check(towers[1], right)
        self.assert_refused(small(), path, r"2 \(.*\) for 1")
        one = {k: v for k, v in arrays.items() if ".key." in k}
        model = small()
        weights.load(model, self.path(safetensors(one)))
        self.check(model, right)


if __name__ == "__main__":
    absltest.main()
