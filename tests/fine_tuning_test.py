"""The four steps of docs/fine_tuning.md, from weights that others trained."""

import os
import tempfile
import unittest

import keras
import numpy as np
import pytest
from absl.testing import absltest
from absl.testing import parameterized

import keras_resnet
from keras_resnet.data import datasets


def values(model):
    return {v.path: keras.ops.convert_to_numpy(v) for v in model.weights}


def features(**kwargs):
    return keras_resnet.ResNet20(
        include_top=False, pooling="avg", input_shape=(8, 8, 3), **kwargs
    )


def changed_by_training(base):
    """The paths of the weights of `base` that a step of `fit` changes."""
    image = keras.Input((8, 8, 3))
    model = keras.Model(image, keras.layers.Dense(10)(base(image)))
    model.compile(
        keras.optimizers.SGD(0.1),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    before = values(base)
    images = np.random.default_rng(0).normal(size=(8, 8, 8, 3)) + 1
    model.fit(images, np.arange(8), verbose=0)
    return {
        path for path, v in values(base).items() if np.any(v != before[path])
    }


def kernels(base, but):
    return {
        path
        for path in values(base)
        if path.startswith(but) and path.endswith("kernel")
    }


class FineTuningTest(parameterized.TestCase):
    @parameterized.parameters(
        ({}, ("stage3",)),
        ({"unit": "pre_activation"}, ("stage2", "stage3", "final")),
        ({"looped": True, "shortcut": "B"}, ("stage2", "stage3")),
        ({"looped": True, "remat": True}, ("stage3",)),
    )
    def test_what_is_frozen_stays_as_it_is(self, kwargs, but):
        base = features(**kwargs)
        keras_resnet.freeze(base, but)
        images = np.random.default_rng(0).normal(size=(8, 8, 8, 3)) + 1
        expected = np.array(base(images, training=False))
        np.testing.assert_allclose(
            base(images, training=True), expected, atol=1e-5
        )
        self.assertEqual(changed_by_training(base), kernels(base, but))

    @parameterized.parameters(
        (False, "sequential"), (True, "functional"), (True, "both")
    )
    @pytest.mark.slow
    def test_networks_inside_of_others_are_frozen(self, looped, around):
        spec = keras_resnet.Spec("tiny", (3, 2), (4, 8), stem="cifar")
        base = keras_resnet.resnet(
            spec,
            include_top=False,
            pooling="avg",
            input_shape=(8, 8, 3),
            looped=looped,
        )
        model = base
        for kind in ("functional", "sequential"):
            if around in (kind, "both"):
                image = keras.Input((8, 8, 3))
                if kind == "functional":
                    model = keras.Model(image, model(image), name="outer")
                else:
                    model = keras.Sequential([image, model], name="outer")
        name = model.layers[-1].name
        everything = kernels(base, ("st",))
        for before in ("released", "frozen", "partly"):
            model.trainable = before != "frozen"
            if before == "partly":
                keras_resnet.freeze(base, but=("stage2",))
                base.trainable = False
                base.layers[-2].trainable = True
            keras_resnet.freeze(model, but=(name,))
            trained = {v.path for v in model.trainable_weights}
            self.assertEqual(trained, everything, before)
        self.assertEqual(changed_by_training(model), everything)
        folder = self.enter_context(tempfile.TemporaryDirectory())
        model.save(f"{folder}/model.keras")
        again = keras.models.load_model(f"{folder}/model.keras")
        self.assertEqual(changed_by_training(again), everything)
        again = keras.models.clone_model(model)
        trained = {v.path for v in again.trainable_weights}
        self.assertEqual(trained, everything)

    @parameterized.parameters(False, True)
    def test_layers_are_frozen_before_they_are_built(self, is_stack):
        layer = keras_resnet.layers.OriginalUnit(4, shortcut="C")
        if is_stack:
            layer = keras_resnet.layers.UnitStack(layer, 2)
        model = keras.Sequential(
            [layer, keras.layers.BatchNormalization(name="norm")]
        )
        keras_resnet.freeze(model, but=(layer.name,))
        model.build((None, 8, 8, 4))
        self.assertLen(model.trainable_weights, 3)  # kernels
        self.assertTrue(
            all("kernel" in v.path for v in model.trainable_weights)
        )

    @parameterized.parameters({}, {"looped": True})
    @pytest.mark.slow
    def test_layers_may_be_released_one_after_the_other(self, **kwargs):
        base = features(**kwargs)
        for but in ((), ("stage2", "stage3"), ("stage3",)):
            keras_resnet.freeze(base, but)
            expected = kernels(base, but)
            self.assertEqual(changed_by_training(base), expected)
        base.trainable = False
        base.trainable = True
        self.assertIn(
            "stage2_unit1/norm1/moving_mean", changed_by_training(base)
        )

    @parameterized.parameters(
        ({"shortcut": "C"}, (), "file"),
        ({"shortcut": "C"}, ("stage2", "stage3"), "file"),
        ({"looped": True, "shortcut": "C"}, (), "clone"),
        ({"looped": True, "shortcut": "C"}, ("stage2", "stage3"), "file"),
    )
    @pytest.mark.slow
    def test_a_copy_is_frozen_as_the_network_is(self, kwargs, but, copy):
        base = features(**kwargs)
        keras_resnet.freeze(base, but)
        if copy == "file":
            folder = self.enter_context(tempfile.TemporaryDirectory())
            base.save(f"{folder}/base.keras")
            again = keras.models.load_model(f"{folder}/base.keras")
        else:
            again = keras.models.clone_model(base)
        expected = kernels(base, but)
        self.assertEqual({v.path for v in again.trainable_weights}, expected)
        self.assertEqual(changed_by_training(again), expected)
        again.trainable = False
        again.trainable = True
        self.assertLen(
            again.trainable_weights, len(features(**kwargs).trainable_weights)
        )

    def test_a_name_that_is_none_is_refused(self):
        with self.assertRaisesRegex(ValueError, "'stage4'"):
            keras_resnet.freeze(keras_resnet.ResNet20(), but=("stage4",))
        with self.assertRaisesRegex(ValueError, r"but=\('stage3',\)"):
            keras_resnet.freeze(keras_resnet.ResNet20(), but="stage3")

    def test_weights_of_cifar_10_learn_the_digits(self):
        folder = os.environ.get("KERAS_RESNET_DATA", "")
        path = os.path.join(folder, "weights", "resnet20-12fca82f.th")
        if not folder or not os.path.exists(path):
            raise unittest.SkipTest("KERAS_RESNET_DATA has no such weights")
        keras.utils.set_random_seed(0)
        digits = datasets.load("digits")
        base = keras_resnet.ResNet20(
            include_top=False,
            pooling="avg",
            weights=path,
            shortcut=keras_resnet.layers.OptionA(zeros="both"),
            input_shape=(32, 32, 3),
        )
        keras_resnet.freeze(base)
        image = keras.Input((8, 8, 1))
        x = keras.layers.UpSampling2D(4, interpolation="bilinear")(image)
        x = keras.layers.Concatenate()([x, x, x])
        # As the weights saw them: a deviation of about one.
        x = keras.layers.Rescaling(3.0)(x)
        x = base(x)
        model = keras.Model(
            image, keras.layers.Dense(10, activation="softmax")(x)
        )
        errors = []
        for rate, epochs in ((1e-2, 10), (1e-3, 10)):
            model.compile(
                keras.optimizers.Adam(rate),
                "sparse_categorical_crossentropy",
                metrics=["accuracy"],
            )
            batches = digits.train_batches(64, seed=0, augmentation="pad_crop")
            model.fit(
                batches, steps_per_epoch=22 * epochs, shuffle=False, verbose=0
            )
            wrong = 0.0
            for images, labels in digits.test_batches(71):
                p = model.predict_on_batch(images)
                wrong += np.sum(p.argmax(-1) != labels)
            errors.append(100 * wrong / digits.test_size)
            keras_resnet.freeze(base, but=("stage3",))
        print(
            f"classifier alone {errors[0]:.2f}%, stage 3 too {errors[1]:.2f}%"
        )
        self.assertLess(errors[1], 4.0)
        self.assertLess(errors[1], errors[0])


if __name__ == "__main__":
    absltest.main()
