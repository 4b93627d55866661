"""The four steps of docs/fine_tuning.md, from weights that others trained."""

import os
import unittest

import keras
import numpy as np
from absl.testing import absltest
from absl.testing import parameterized

import keras_resnet
from keras_resnet.training import data


def values(model):
    return {v.path: keras.ops.convert_to_numpy(v) for v in model.weights}


class FineTuningTest(parameterized.TestCase):
    @parameterized.parameters(
        ({}, ("stage3",)),
        ({"unit": "pre_activation"}, ("stage2", "stage3", "final")),
        ({"looped": True, "shortcut": "B"}, ("stage2", "stage3")),
        ({"looped": True, "remat": True}, ("stage3",)),
    )
    def test_what_is_frozen_stays_as_it_is(self, kwargs, but):
        base = keras_resnet.ResNet20(
            include_top=False, pooling="avg", input_shape=(8, 8, 3), **kwargs
        )
        keras_resnet.freeze(base, but)
        image = keras.Input((8, 8, 3))
        model = keras.Model(image, keras.layers.Dense(10)(base(image)))
        images = np.random.default_rng(0).normal(size=(8, 8, 8, 3)) + 1
        expected = np.array(model(images, training=False))
        np.testing.assert_allclose(
            model(images, training=True), expected, atol=1e-5
        )
        before = values(base)
        model.compile(
            keras.optimizers.SGD(0.1),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        )
        model.fit(images, np.arange(8), verbose=0)
        changed = {
            path
            for path, value in values(base).items()
            if np.any(value != before[path])
        }
        kernels = {
            path
            for path in before
            if path.startswith(but) and path.endswith("kernel")
        }
        self.assertEqual(changed, kernels)

    def test_a_name_that_is_none_is_refused(self):
        with self.assertRaisesRegex(ValueError, "'stage4'"):
            keras_resnet.freeze(keras_resnet.ResNet20(), but=("stage4",))

    def test_weights_of_cifar_10_learn_the_digits(self):
        folder = os.environ.get("KERAS_RESNET_DATA", "")
        path = os.path.join(folder, "weights", "resnet20-12fca82f.th")
        if not folder or not os.path.exists(path):
            raise unittest.SkipTest("KERAS_RESNET_DATA has no such weights")
        keras.utils.set_random_seed(0)
        digits = data.load("digits")
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
            for images, labels, counted in digits.test_batches(71):
                p = model.predict_on_batch(images)
                wrong += np.sum((p.argmax(-1) != labels) * counted)
            errors.append(100 * wrong / digits.test_size)
            keras_resnet.freeze(base, but=("stage3",))
        print(
            f"classifier alone {errors[0]:.2f}%, stage 3 too {errors[1]:.2f}%"
        )
        self.assertLess(errors[1], 4.0)
        self.assertLess(errors[1], errors[0])


if __name__ == "__main__":
    absltest.main()
