"""The networks: counts, arguments, layers, and the laws of [2]."""

import inspect
import pickle
import pydoc
import re
import tempfile
import warnings
from unittest import mock

import keras
import numpy as np
import pytest
import tensorflow as tf
from absl.testing import absltest
from absl.testing import parameterized

import keras_resnet
from keras_resnet import layers
from keras_resnet import models
from keras_resnet import specs
from keras_resnet.weights import shipped
from tests import reference


def count(weights):
    return sum(int(np.prod(weight.shape)) for weight in weights)


def images(n=2, size=32, channels=3):
    rng = np.random.default_rng(0)
    return rng.normal(size=(n, size, size, channels)).astype("float32")


class CountsTest(parameterized.TestCase):
    def test_the_table_has_every_network_of_the_papers(self):
        self.assertCountEqual(keras_resnet.MODELS, reference.NAMES)
        for name in reference.NAMES:
            spec, layout = keras_resnet.MODELS[name], reference.layout(name)
            self.assertEqual(spec.units, layout.units)
            self.assertEqual(spec.filters, layout.filters)
            self.assertEqual(spec.bottleneck, layout.bottleneck)
            self.assertEqual(spec.width, layout.width)
            self.assertEqual(spec.shortcut, layout.shortcut)
            self.assertEqual(spec.classes, layout.classes)
            self.assertEqual(spec.image_size, layout.image_size)

    # complexity_test has all counts, with options A, B and C of each.
    @parameterized.parameters("resnet50", "resnet20v2", "resnet164v2")
    def test_parameters_equal_those_of_the_layout(self, name):
        model = keras_resnet.resnet(name)
        expected = reference.counts(reference.layout(name))
        self.assertEqual(count(model.trainable_weights), expected.parameters)
        self.assertEqual(
            count(model.non_trainable_weights), expected.moving_statistics
        )

    @pytest.mark.slow
    def test_resnet1202_builds_unrolled_with_the_parameters_of_the_paper(self):
        model = keras_resnet.ResNet1202(looped=False)
        self.assertEqual(count(model.trainable_weights), 19_421_274)
        self.assertLen(
            [layer for layer in model.layers if isinstance(layer, layers.Unit)],
            600,
        )

    @parameterized.parameters(
        ("wideresnet50_2", 68_883_240), ("wideresnet101_2", 126_886_696)
    )
    def test_wide_bottlenecks_have_the_published_count(self, name, parameters):
        layout = reference.layout(name)
        self.assertEqual(reference.counts(layout).parameters, parameters)

    def test_convolutions_on_every_shortcut_have_the_published_count(self):
        model = keras_resnet.ResNet110(shortcut="convolution")
        self.assertEqual(count(model.trainable_weights), 1_822_170)


class LawsTest(parameterized.TestCase):
    def test_signal_is_the_sum_of_all_residuals(self):
        """x_L = x_l + sum of F(x_i), [2, Eq. 4]."""
        model = keras_resnet.ResNet56V2()
        units = [model.get_layer(f"stage2_unit{i}") for i in range(2, 10)]
        probe = keras.Model(model.input, [units[0].input, units[-1].output])
        x_first, x_last = (np.array(t) for t in probe(images()))
        total, x = x_first, x_first
        for unit in units:
            residual = np.array(unit(x)) - np.array(x)
            total, x = total + residual, unit(x)
        np.testing.assert_allclose(x_last, total, rtol=1e-4, atol=1e-4)

    @parameterized.parameters("resnet20", "resnet18")
    def test_down_sampling_keeps_even_pixels_centred(self, name):
        """The image and its mirror image give mirrored features.

        Symmetric padding and x[::2, ::2] do so for sizes of 4n + 1 (8n + 1,
        ...), TensorFlow's "same" does not.
        """
        size = 33
        extractor = keras_resnet.feature_extractor(
            keras_resnet.resnet(name, False, input_shape=(size, size, 3))
        )
        for layer in extractor.layers:
            for weight in layer.weights:
                if weight.name == "kernel":  # mirrored kernels
                    kernel = np.array(weight)
                    weight.assign(kernel + kernel[:, ::-1])
        x = images(1, size)
        once = extractor(x)
        mirrored = extractor(x[:, :, ::-1])
        for name, feature in once.items():
            a = np.array(feature)
            b = np.array(mirrored[name])[:, :, ::-1]
            np.testing.assert_allclose(a, b, atol=1e-3 * np.abs(a).max())

    def test_survival_probability_falls_linearly(self):
        model = keras_resnet.ResNet20(survival_probability=0.1)
        got = [
            layer.survival_probability
            for layer in model.layers
            if layer.name.startswith("stage")
        ]
        np.testing.assert_allclose(got, 1 - 0.1 * np.arange(1, 10))

    def test_very_first_pre_activation_unit_gets_the_activated_stem(self):
        model = keras_resnet.ResNet20V2()
        first = model.get_layer("stage1_unit1")
        self.assertTrue(first.activated_input)
        self.assertFalse(model.get_layer("stage1_unit2").activated_input)
        names = [layer.name for layer in model.layers]
        self.assertEqual(names[-4:-2], ["final_norm", "final_relu"])

    def test_the_first_norm_may_be_that_of_the_residual_alone(self):
        """As in pytorchcv, where x_2 = x_1 + conv(BN-ReLU(...BN-ReLU(x_1)))."""
        model = keras_resnet.ResNet20V2(first_norm="unit")
        first = model.get_layer("stage1_unit1")
        self.assertIs(first.input, model.get_layer("stem_conv").output)
        first.conv2.kernel.assign(np.zeros(first.conv2.kernel.shape))
        x = images(channels=16)
        np.testing.assert_array_equal(first(x), x)
        both = keras_resnet.ResNet20V2(first_norm="both")
        self.assertEqual(count(both.trainable_weights), 269_722 + 2 * 16)

    def test_configured_shortcut_is_in_every_unit(self):
        model = keras_resnet.ResNet20(
            shortcut=layers.ExclusiveGating(gate_bias=-7.0)
        )
        shortcuts = [
            layer.shortcut
            for layer in model.layers
            if layer.name.startswith("stage")
        ]
        self.assertLen(set(map(id, shortcuts)), 9)
        self.assertEqual({s.gate_bias for s in shortcuts}, {-7.0})

    @parameterized.parameters("mixed_bfloat16", "mixed_float16")
    def test_probabilities_are_float32_in_mixed_precision(self, policy):
        self.addCleanup(
            keras.config.set_dtype_policy, keras.config.dtype_policy()
        )
        keras.config.set_dtype_policy(policy)
        model = keras_resnet.ResNet20()
        self.assertEqual(
            model.get_layer("stage3_unit3").compute_dtype,
            policy.removeprefix("mixed_"),
        )
        p = model(images())
        self.assertEqual(p.dtype, "float32")
        np.testing.assert_allclose(np.sum(p, -1), 1, rtol=1e-5)


class ArgumentsTest(parameterized.TestCase):
    def test_every_builder_has_one_signature(self):
        builders = [
            getattr(keras_resnet, name)
            for name in keras_resnet.__all__
            if name.lower() in keras_resnet.MODELS
        ]
        self.assertLen(builders, len(keras_resnet.MODELS))
        names = {tuple(inspect.signature(b).parameters) for b in builders}
        self.assertLen(names, 1)
        defaults = inspect.signature(keras_resnet.ResNet50V2).parameters
        self.assertEqual(defaults["unit"].default, "pre_activation")
        self.assertEqual(defaults["name"].default, "resnet50v2")
        self.assertEqual(defaults["classes"].default, 1000)

    def test_the_signature_is_the_published_one(self):
        parameters = inspect.signature(keras_resnet.ResNet50).parameters
        kinds = {p.name: p.kind for p in parameters.values()}
        by_position = {
            "include_top": True,
            "weights": None,
            "input_tensor": None,
            "input_shape": None,
            "pooling": None,
            "classes": 1000,
            "classifier_activation": "softmax",
            "name": "resnet50",
        }
        by_name = {
            "shortcut": "B",
            "unit": "original",
            "bottleneck_stride": None,
            "padding": None,
            "first_norm": None,
            "looped": None,
            "remat": False,
            "batch_norm_momentum": 0.9,
            "batch_norm_epsilon": None,
            "survival_probability": 1.0,
        }
        self.assertEqual(
            [(p.name, p.default) for p in parameters.values()],
            [*by_position.items(), *by_name.items()],
        )
        for name, kind in kinds.items():
            expected = inspect.Parameter.POSITIONAL_OR_KEYWORD
            if name in by_name:
                expected = inspect.Parameter.KEYWORD_ONLY
            self.assertEqual(kind, expected, name)
        # `resnet` has the same, where None is the network's own default.
        general = inspect.signature(keras_resnet.resnet).parameters
        self.assertEqual(list(general), ["spec", *parameters])

    def test_an_argument_is_written_down_once(self):
        """`--set`, JSON and the documentation derive from the signature."""
        parameters = inspect.signature(keras_resnet.resnet).parameters
        by_name = {
            parameter.name: parameter.default
            for parameter in parameters.values()
            if parameter.kind is parameter.KEYWORD_ONLY
        }
        found = {a.name: a.default for a in models.ARGUMENTS.values()}
        self.assertEqual(found, by_name)
        for argument in models.ARGUMENTS.values():
            self.assertRegex(argument.description, r"^[\w`].*\.$")
            self.assertNotIn("  ", argument.description)

    @parameterized.parameters("ResNet50", "ResNet1001V2", "PlainNet20")
    def test_help_of_a_builder_describes_each_argument_once(self, title):
        builder = getattr(keras_resnet, title)
        text = pydoc.render_doc(builder, renderer=pydoc.plaintext)
        self.assertStartsWith(builder.__doc__, f"Builds {title} [")
        for name in inspect.signature(builder).parameters:
            described = re.findall(rf"(?m)^ +{name}: \S", text)
            self.assertLen(described, 1, name)
        self.assertNotIn("spec:", text)
        self.assertIs(pickle.loads(pickle.dumps(builder)), builder)

    @parameterized.parameters(
        ({"weights": "foo"}, "Received: weights=foo"),
        ({"weights": ["foo"]}, r"Received: weights=\['foo'\]"),
        ({"weights": 3}, "Received: weights=3"),
        ({"survival_probability": 1.5}, r"in \(0, 1\], received 1\.5"),
        ({"survival_probability": 0.0}, r"in \(0, 1\], received 0\.0"),
        (
            {"weights": "imagenet", "unit": "pre_activation"},
            "'imagenet'` were trained with unit='original'",
        ),
        (
            {"weights": "imagenet", "shortcut": "C"},
            "trained with shortcut='B'. Received: shortcut='C'",
        ),
        (
            {"weights": "imagenet", "bottleneck_stride": "3x3"},
            "trained with bottleneck_stride='1x1'",
        ),
        (
            {"weights": "imagenet", "padding": "same"},
            "trained with padding='symmetric'",
        ),
        (
            {"weights": "imagenet", "first_norm": "unit"},
            "trained with first_norm='stem'",
        ),
        (
            {"weights": "imagenet", "batch_norm_epsilon": 1e-3},
            r"trained with batch_norm_epsilon=1\.001e-05",
        ),
        (
            {"weights": "imagenet", "classes": 10},
            "`classes` should be 1000.  Received classes=10",
        ),
        (
            {"weights": "imagenet", "input_shape": (64, 64, 3)},
            "`input_shape` should be .224, 224, 3..",
        ),
        ({"input_shape": (16, 16, 3)}, "Input size must be at least 32x32"),
        ({"input_shape": (224, 224)}, "must be a tuple of three integers"),
        (
            {
                "weights": "imagenet",
                "include_top": False,
                "input_shape": (64, 64, 1),
            },
            "must have 3 channels",
        ),
        ({"input_shape": (None, None, 3)}, "static `input_shape`"),
        ({"include_top": False, "pooling": "foo"}, "pooling=foo"),
        ({"unit": "orginal"}, "did you mean 'original'"),
        ({"shortcut": "D"}, "shortcut must be one of"),
        ({"bottleneck_stride": "2x2"}, "bottleneck_stride"),
        ({"padding": "valid"}, "padding must be one of"),
        ({"first_norm": "top"}, "first_norm must be one of"),
        ({"first_norm": "both"}, "received OriginalUnit"),
        (
            {"first_norm": "unit", "unit": "pre_activation"},
            "for the stem 'cifar'",
        ),
    )
    def test_refuses_what_keras_applications_refuses(self, arguments, message):
        with self.assertRaisesRegex(ValueError, message):
            keras_resnet.ResNet50(**arguments)

    def test_pretrained_weights_want_softmax_or_logits(self):
        directory = self.enter_context(tempfile.TemporaryDirectory())
        with self.assertRaisesRegex(ValueError, "Only `None` and `softmax"):
            keras_resnet.ResNet20(
                weights=directory, classifier_activation="sigmoid"
            )

    def test_imagenet_weights_of_other_networks_do_not_exist(self):
        with self.assertRaisesRegex(
            ValueError, "'imagenet'` exist for resnet50, .*: resnet200"
        ):
            keras_resnet.ResNet200(weights="imagenet")

    def test_four_channels_warn_and_work(self):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model = keras_resnet.ResNet20(input_shape=(32, 32, 4))
        self.assertIn("4 input channels", str(caught[0].message))
        self.assertEqual(caught[0].filename, __file__)
        self.assertEqual(model(images(channels=4)).shape, (2, 10))

    @parameterized.parameters(
        (None, (None, None, None, 2048)),
        ("avg", (None, 2048)),
        ("max", (None, 2048)),
    )
    def test_without_the_top_any_size_will_do(self, pooling, shape):
        model = keras_resnet.ResNet50(include_top=False, pooling=pooling)
        self.assertEqual(model.input_shape, (None, None, None, 3))
        self.assertEqual(model.output_shape, shape)

    def test_input_tensor_may_be_the_output_of_a_layer(self):
        image = keras.Input((32, 32, 3), name="picture")
        scaled = keras.layers.Rescaling(1 / 255)(image)
        model = keras_resnet.ResNet20(input_tensor=scaled)
        self.assertEqual(model.input.name, "picture")
        self.assertEqual(model(images()).shape, (2, 10))

    def test_channels_come_first_where_keras_is_configured_to(self):
        x = images(size=64)
        for kwargs in ({"classes": 7}, {"include_top": False}):
            last = keras_resnet.ResNet18(input_shape=(64, 64, 3), **kwargs)
            keras.config.set_image_data_format("channels_first")
            try:
                first = keras_resnet.ResNet18(input_shape=(3, 64, 64), **kwargs)
                theirs = keras.applications.ResNet50(
                    weights=None, include_top=False
                ).input_shape
                ours = keras_resnet.ResNet50(include_top=False).input_shape
                self.assertEqual(ours, theirs)
                with self.assertRaisesRegex(ValueError, "at least 32x32"):
                    keras_resnet.ResNet18(input_shape=(3, 64, 3))
            finally:
                keras.config.set_image_data_format("channels_last")
            first.set_weights(last.get_weights())
            y = np.array(first(np.moveaxis(x, -1, 1)))
            expected = np.array(last(x))
            if y.ndim == 4:
                y = np.moveaxis(y, 1, -1)
            np.testing.assert_allclose(y, expected, atol=1e-5)

    @parameterized.parameters(
        {"weights": "imagenet", "classes": 10},
        {"weights": "imagenet", "input_shape": (64, 64, 3)},
        {"input_shape": (16, 16, 3)},
        {"input_shape": (224, 224)},
        {
            "weights": "imagenet",
            "include_top": False,
            "input_shape": (64, 64, 1),
        },
        {"input_shape": (None, None, 3)},
        {"include_top": False, "input_shape": (None, 31, 3)},
        {"weights": __file__, "classifier_activation": "sigmoid"},
    )
    def test_messages_are_those_of_keras_applications(self, **arguments):
        messages = []
        for builder in (
            lambda **kw: keras.applications.ResNet50(**{"weights": None, **kw}),
            keras_resnet.ResNet50,
        ):
            with self.assertRaises(ValueError) as context:
                builder(**arguments)
            messages.append(str(context.exception))
        self.assertEqual(messages[1], messages[0])

    def test_own_spec_builds(self):
        spec = keras_resnet.Spec("wide", (1, 2), (8, 24), stem="cifar")
        model = keras_resnet.resnet(spec, classes=5, input_shape=(16, 16, 3))
        self.assertEqual(model.name, "wide")
        self.assertEqual(model.output_shape, (None, 5))
        with self.assertRaisesRegex(ValueError, "one entry for each stage"):
            keras_resnet.Spec("odd", (1, 2), (8,))
        with self.assertRaisesRegex(ValueError, "stem"):
            keras_resnet.Spec("odd", (1,), (8,), stem="mnist")
        for width, bottleneck in ((2, False), (3, True)):
            with self.assertRaisesRegex(ValueError, "width must be 1, or 2"):
                keras_resnet.Spec(
                    *("odd", (1,), (8,)), bottleneck=bottleneck, width=width
                )

    def test_a_spec_of_lists_is_one_of_tuples(self):
        spec = keras_resnet.Spec("lists", [1, 2], np.array([4, 8]))
        expected = keras_resnet.Spec("lists", (1, 2), (4, 8))
        self.assertEqual(spec, expected)
        self.assertEqual(hash(spec), hash(expected))

    @parameterized.parameters(
        (2, (4, 8), "one entry for each stage"),
        ((), (), "one entry for each stage"),
        ((1, 0), (4, 8), "at least 1 in each stage, and whole"),
        ((1, 2.5), (4, 8), "at least 1 in each stage, and whole"),
        ("12", (4, 8), "at least 1 in each stage, and whole"),
    )
    def test_stages_are_counted_in_whole_numbers(self, units, filters, message):
        with self.assertRaisesRegex(ValueError, message):
            keras_resnet.Spec("odd", units, filters)

    def test_unknown_networks_are_refused_with_near_ones(self):
        with self.assertRaisesRegex(ValueError, "did you mean .*resnet50"):
            keras_resnet.resnet("resnet5O")
        for name in ("resnet20x.", "resnet20x1.2.3", "resnet20x"):
            with self.assertRaisesRegex(ValueError, "unknown network"):
                keras_resnet.resnet(name)
        with self.assertRaisesRegex(ValueError, "Spec or a name.*received 20"):
            keras_resnet.resnet(20)

    def test_depth_that_fits_no_rule_is_refused(self):
        with self.assertRaisesRegex(ValueError, r"6n \+ 2 .* received 21"):
            specs.cifar_units(21)
        with self.assertRaisesRegex(ValueError, r"9n \+ 2 .* received 165"):
            specs.cifar_units(165, bottleneck=True)


class PreprocessingTest(parameterized.TestCase):
    """One function of values, whatever holds them."""

    @parameterized.product(
        mode=("caffe", "tf", "torch", "cifar10"),
        is_first=(False, True),
        shape=((32, 32, 3), (2, 32, 32, 3)),
    )
    def test_equal_images_give_equal_numbers(self, mode, is_first, shape):
        pixels = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
        expected = reference.preprocessed(pixels, mode, shipped.mean())
        data_format = "channels_first" if is_first else "channels_last"
        if is_first:
            pixels, expected = (
                np.moveaxis(a, -1, -3) for a in (pixels, expected)
            )

        def preprocess(x):
            return keras_resnet.preprocess_input(x, mode, data_format)

        held = {
            "a list": pixels.tolist(),
            "a list of arrays": list(pixels),
            "a list of tensors": list(map(keras.ops.convert_to_tensor, pixels)),
            "a variable": keras.Variable(pixels, dtype="float32"),
        }
        for dtype in ("uint8", "int32", "int64", "float16", "float32"):
            array = pixels.astype(dtype)
            held[f"array of {dtype}"] = array
            held[f"TensorFlow's of {dtype}"] = tf.constant(array)
            if dtype != "int64":  # JAX has none
                held[f"tensor of {dtype}"] = keras.ops.convert_to_tensor(array)
        results = {name: preprocess(x) for name, x in held.items()}
        for dtype in ("uint8", "float32"):
            image = keras.Input(batch_shape=pixels.shape, dtype=dtype)
            model = keras.Model(image, preprocess(image))
            results[f"input of {dtype}"] = model(pixels.astype(dtype))
        dataset = tf.data.Dataset.from_tensors(pixels).map(preprocess)
        results["tf.data"] = next(iter(dataset))
        unknown = tf.data.Dataset.from_tensors(pixels).map(
            lambda x: preprocess(tf.py_function(lambda x: x, [x], tf.uint8))
        )
        results["unknown shape"] = next(iter(unknown))
        for name, result in results.items():
            with self.subTest(name):
                self.assertEqual(
                    keras.backend.standardize_dtype(result.dtype), "float32"
                )
                np.testing.assert_allclose(result, expected, atol=1e-4)

    def test_half_precision_is_only_that_of_the_pixels(self):
        x = tf.cast(np.full((1, 1, 3), 201), "bfloat16")
        result = keras_resnet.preprocess_input(x, "torch")
        expected = reference.preprocessed(np.full((1, 1, 3), 201), "torch")
        np.testing.assert_allclose(result, expected, rtol=1e-6)

    def test_numbers_are_those_of_keras(self):
        x = images()
        before = x.copy()
        for mode in ("caffe", "tf", "torch"):
            y = keras_resnet.preprocess_input(x, mode)
            np.testing.assert_array_equal(x, before)
            expected = keras.applications.imagenet_utils.preprocess_input(
                before.copy(), mode=mode
            )
            np.testing.assert_array_equal(y, expected)

    def test_unknown_mode_is_refused(self):
        with self.assertRaisesRegex(
            ValueError, "`torch` or `cifar10`. Received: mode=cifar"
        ):
            keras_resnet.preprocess_input(images(), "cifar")

    @parameterized.product(shape=((4, 4, 1), (4, 4, 4), (4, 3), ()))
    def test_images_of_other_channels_are_refused(self, shape):
        for x in (np.zeros(shape), keras.Input(batch_shape=shape)):
            with self.assertRaisesRegex(
                ValueError, r"size, size, 3\] in mode `caffe`. Received: shape="
            ):
                keras_resnet.preprocess_input(x)

    @parameterized.parameters("cat.png", None, 1j)
    def test_what_has_no_pixels_is_refused(self, x):
        with self.assertRaisesRegex(ValueError, "images of real numbers"):
            keras_resnet.preprocess_input(x)

    @parameterized.parameters("float32", "float16", "bfloat16")
    def test_predictions_are_decoded_from_what_holds_them(self, dtype):
        utilities = keras.applications.imagenet_utils
        labels = {str(i): [f"n{i}", f"label{i}"] for i in range(1000)}
        p = np.zeros((1, 1000))
        p[0, 7], p[0, 3] = 0.75, 0.25
        with mock.patch.dict(
            utilities.decode_predictions.__globals__, CLASS_INDEX=labels
        ):
            for given in (p, p.tolist(), keras.ops.cast(p, dtype)):
                self.assertEqual(
                    keras_resnet.decode_predictions(given, top=2),
                    [[("n7", "label7", 0.75), ("n3", "label3", 0.25)]],
                )
        with self.assertRaisesRegex(ValueError, "top must be .* received 0"):
            keras_resnet.decode_predictions(p, top=0)


class FilesTest(parameterized.TestCase):
    @parameterized.parameters("resnet20", "resnet20v2", "plainnet20")
    def test_networks_round_trip_without_custom_objects(self, name):
        directory = self.enter_context(tempfile.TemporaryDirectory())
        model = keras_resnet.resnet(name)
        x = images()
        model.save(f"{directory}/model.keras")
        again = keras.models.load_model(f"{directory}/model.keras")
        np.testing.assert_array_equal(again(x), model(x))
        model.save_weights(f"{directory}/model.weights.h5")
        path = f"{directory}/model.weights.h5"
        again = keras_resnet.resnet(name, weights=path)
        np.testing.assert_array_equal(again(x), model(x))

    def test_features_of_a_stage_are_those_of_its_last_unit(self):
        model = keras_resnet.ResNet20V2()
        x = images()
        features = keras_resnet.feature_extractor(model)(x)
        self.assertEqual(list(features), ["stage1", "stage2", "stage3"])
        pooled = np.mean(features["stage3"], (1, 2))
        top = model.get_layer("predictions")
        np.testing.assert_allclose(top(pooled), model(x), atol=1e-5)
        with self.assertRaisesRegex(ValueError, "network of keras_resnet"):
            keras_resnet.feature_extractor(
                keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
            )


if __name__ == "__main__":
    absltest.main()
