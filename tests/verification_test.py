"""Models and predictions that an export rejects."""

import os

import keras
import numpy as np
import tensorflow as tf
from absl.testing import absltest
from absl.testing import parameterized

from keras_resnet.data import views
from keras_resnet.serving import export as export_lib
from keras_resnet.serving import folding
from keras_resnet.serving import verification
from tests import exports


class RefusalTest(parameterized.TestCase):
    """A rejected model leaves the directory of versions empty."""

    def assert_refused(self, error, message, model=None, **changes):
        export_dir = exports.scratch(self)
        arguments = {
            "preprocessing": exports.small_preprocessing(),
            "labels": exports.LABELS,
            **changes,
        }
        with self.assertRaisesRegex(error, message):
            export_lib.export(
                model or exports.small_network(),
                export_dir=export_dir,
                **arguments,
            )
        self.assertEmpty(os.listdir(export_dir))

    def test_logits_are_no_probabilities(self):
        self.assert_refused(
            ValueError, "softmax", exports.small_network(activation=None)
        )

    def test_network_that_answers_nan(self):
        model = exports.small_network()
        model.get_layer("predictions").bias.assign(np.full([5], np.nan))
        self.assert_refused(ValueError, "received outputs from nan", model)

    def test_labels_of_another_data_set(self):
        self.assert_refused(
            ValueError, r"classes \(5\), received 4", labels=exports.LABELS[:4]
        )

    @parameterized.parameters("two\nlines", "two\rlines", "", "end\n")
    def test_label_that_is_not_one_line(self, label):
        self.assert_refused(
            ValueError, "one line", labels=exports.LABELS[:4] + [label]
        )

    def test_preprocessing_of_another_network(self):
        self.assert_refused(
            ValueError,
            r"\(16, 16, 1\)",
            preprocessing=exports.small_preprocessing(1),
        )

    def test_network_without_pool(self):
        x = keras.Input((16, 16, 3))
        y = keras.layers.Dense(5, activation="softmax")(
            keras.layers.Flatten()(x)
        )
        self.assert_refused(ValueError, '"pool"', keras.Model(x, y))

    def test_precision_that_is_not_known(self):
        self.assert_refused(ValueError, "'float8'", precision="float8")

    @parameterized.named_parameters(
        ("flat", {"shape": (768,)}, "must take images of the shape"),
        ("rank_3", {"shape": (16, 48)}, "must take images of the shape"),
        ("not_square", {"shape": (8, 32, 3)}, "square images"),
        ("four_channels", {"shape": (16, 16, 4)}, "channels must be 1 or 3"),
        ("open_channels", {"shape": (16, 16, None)}, "channels must be 1 or"),
        (
            "channels_first",
            {"shape": (3, 16, 16)},
            "square images|channels must be 1 or 3",
        ),
        ("fixed_batch", {"batch_shape": (4, 16, 16, 3)}, "of any size"),
    )
    def test_input_that_is_no_square_image(self, arguments, message):
        image = keras.Input(**arguments)
        x = keras.layers.Flatten()(image)
        x = x[:, :1] * keras.ops.ones((5,))
        model = keras.Model(image, keras.ops.softmax(x))
        self.assert_refused(folding.ModelError, message, model)

    @parameterized.named_parameters(
        ("two", lambda p: [p, 1.0 * p], "one with 1 and 2"),
        ("dict", lambda p: {"p": p, "q": 1.0 * p}, "one with 1 and 2"),
        ("sigmoid", lambda p: keras.ops.sigmoid(p[:, :1]), "one output for"),
        ("vector", lambda p: p[:, 0], "one output for each class"),
        ("map", lambda p: p[:, None, None], "one output for each class"),
        ("logits", lambda p: keras.ops.log(p), "must be probabilities"),
        ("labels", lambda p: keras.ops.sigmoid(p), "must be probabilities"),
    )
    def test_output_that_is_no_distribution(self, make, message):
        model = exports.small_network()
        model = keras.Model(model.input, make(model.output))
        self.assert_refused(folding.ModelError, message, model)

    def test_two_inputs(self):
        model = exports.small_network()
        other = keras.Input((16, 16, 3))
        model = keras.Model([model.input, other], model(other) / 1.0)
        self.assert_refused(folding.ModelError, "one with 2 and 1", model)

    def test_network_that_is_random(self):
        class Noise(keras.layers.Layer):
            def call(self, x):
                return x + tf.random.normal(tf.shape(x))

        model = exports.small_network()
        image = keras.Input((16, 16, 3))
        model = keras.Model(image, model(Noise()(image)))
        self.assert_refused(
            verification.DisagreementError, "random at inference", model
        )

    def test_variable_that_no_layer_has(self):
        scale = tf.Variable(2.0)
        model = exports.small_network()
        image = keras.Input((16, 16, 3))
        x = keras.layers.Lambda(lambda x: x * scale)(image)
        self.assert_refused(
            folding.ModelError,
            "weights of its layers",
            keras.Model(image, model(x)),
        )

    def test_integers_that_are_no_pixels(self):
        model = exports.small_network()
        image = keras.Input((16, 16, 3), dtype="uint8")
        model = keras.Model(image, model(keras.layers.Rescaling(0.01)(image)))
        self.assert_refused(ValueError, "leave the pixels as they are", model)

    def test_error_that_contradicts_the_training(self):
        model, views = exports.small_network(), exports.images_of_noise(200)
        best = np.argmax(model(exports.small_preprocessing()(views)), -1)
        labels = np.where(np.arange(200) < 40, (best + 1) % 5, best)
        for error, count in (
            (10.0, 200),  # of the same images: it must be 20%
            (24.0, 200),
            (5.0, 10_000),  # of a sample: 20 +- 2.8%
            (35.0, 10_000),
            (80.0, 201),
        ):
            recorded = verification.Recorded(error, count, "metrics.csv")
            self.assert_refused(
                verification.DisagreementError,
                f"received 20.00%, but metrics.csv has {error:.2f}%",
                model,
                images=verification.Images(views, labels, recorded=recorded),
            )
        for error, count in ((20.0, 200), (20.5, 200), (14.0, 10_000)):
            recorded = verification.Recorded(error, count, "metrics.csv")
            probabilities = np.asarray(
                model(exports.small_preprocessing()(views))
            )
            verification.check_recorded(
                probabilities,
                verification.Images(views, labels, recorded=recorded),
            )

    @parameterized.parameters(
        ("gs://bucket/m", "local directory.*received gs://bucket/m"),
        (__file__, "must be a directory, received the file"),
    )
    def test_place_that_is_no_local_directory(self, place, message):
        with self.assertRaisesRegex(ValueError, message):
            export_lib.export(
                exports.small_network(),
                exports.small_preprocessing(),
                exports.LABELS,
                place,
            )
        self.assertFalse(os.path.exists("gs:"))

    def test_graph_that_answers_otherwise_than_the_model(self):
        class Drifting(views.Preprocessing):
            def __call__(self, images):
                images = super().__call__(images)
                return images if tf.executing_eagerly() else images + 1.0

        preprocessing = Drifting(**vars(exports.small_preprocessing()))
        self.assert_refused(
            verification.DisagreementError,
            # In one line of numbers that help.
            "^the exported signature serving_default must predict as the model "
            "does, received probabilities up to 0[.][0-9]+ apart .{,200}$",
            preprocessing=preprocessing,
        )


if __name__ == "__main__":
    absltest.main()
