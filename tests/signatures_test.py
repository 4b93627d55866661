"""Signatures of an export run as a server runs them.

The truth is the Keras model itself, called on the same pixels.
"""

import hashlib
import json
import os
import subprocess
import sys
import tempfile

import keras
import numpy as np
import pytest
import tensorflow as tf
from absl.testing import absltest
from absl.testing import parameterized

from keras_resnet.data import limits
from keras_resnet.data import views
from keras_resnet.serving import export as export_lib
from keras_resnet.serving import model_card
from keras_resnet.serving import warmup
from tests import colours
from tests import exports
from tests import orientation_test


class SignatureTest(parameterized.TestCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.model = exports.small_network()
        cls.preprocessing = exports.small_preprocessing()
        folder = tempfile.TemporaryDirectory()
        cls.addClassCleanup(folder.cleanup)
        cls.export_dir = os.path.join(folder.name, "new", "exported")
        cls.path = export_lib.export(
            cls.model, cls.preprocessing, exports.LABELS, cls.export_dir
        )
        cls.server = exports.Server(cls.path)
        cls.addClassCleanup(cls.server.session.close)

    def probabilities(self, images):
        return np.asarray(self.model(self.preprocessing(images)))

    def features(self, images):
        return np.asarray(
            exports.pooled(self.model)(self.preprocessing(images))
        )

    def test_first_version_is_1_and_stands_alone(self):
        self.assertEqual(self.path, os.path.join(self.export_dir, "1"))
        self.assertEqual(os.listdir(self.export_dir), ["1"])

    def test_images_get_the_probabilities_of_the_model(self):
        images = exports.images_of_noise()
        answer = self.server.ask("images", images=images)
        self.assertEqual(
            set(answer),
            {"probabilities", "classes", "labels", "scores", "status"},
        )
        np.testing.assert_allclose(
            answer["probabilities"], self.probabilities(images), atol=1e-4
        )

    def test_classes_are_the_most_probable_labels(self):
        images = exports.images_of_noise(50)
        best = self.probabilities(images).argmax(-1)
        self.assertGreater(len(set(best)), 1)
        answer = self.server.ask("images", images=images)
        self.assertEqual(
            [name.decode() for name in answer["classes"]],
            [exports.LABELS[index] for index in best],
        )

    def test_features_are_those_before_the_classifier(self):
        images = exports.images_of_noise()
        answer = self.server.ask("features", images=images)
        self.assertEqual(set(answer), {"features"})
        self.assertEqual(answer["features"].shape, (3, 16))
        np.testing.assert_allclose(
            answer["features"], self.features(images), rtol=1e-4
        )

    @parameterized.named_parameters(
        (k, v) for k, v in exports.encoded_squares().items()
    )
    def test_encoded_image_gets_the_answer_of_its_pixels(self, image_bytes):
        answer = self.server.ask_encoded([image_bytes, image_bytes])
        expected = self.probabilities(exports.SQUARES[None])
        upside_down = self.probabilities(exports.SQUARES[None, ::-1])
        self.assertGreater(np.abs(expected - upside_down).max(), 0.02)
        np.testing.assert_allclose(
            answer["probabilities"], np.repeat(expected, 2, 0), atol=2e-3
        )

    def test_examples_get_every_label_with_its_score(self):
        images = exports.images_of_noise()
        answer = self.server.ask("classify", inputs=exports.serialized(images))
        self.assertEqual(
            [[c.decode() for c in row] for row in answer["classes"]],
            [exports.LABELS] * 3,
        )
        np.testing.assert_allclose(
            answer["scores"], self.probabilities(images), atol=1e-4
        )

    def test_signatures_have_the_method_names_that_a_server_asks_for(self):
        names = {
            name: signature.method_name
            for name, signature in self.server.signatures.items()
            if not name.startswith("__")
        }
        self.assertEqual(
            names,
            {
                "serving_default": "tensorflow/serving/predict",
                "images": "tensorflow/serving/predict",
                "features": "tensorflow/serving/predict",
                "classify": "tensorflow/serving/classify",
            },
        )

    def test_card_says_what_the_network_is_and_how_it_was_checked(self):
        card = model_card.read(self.path)
        self.assertEqual(card["network"]["name"], "small")
        self.assertEqual(
            card["network"]["parameters"],
            sum(np.prod(w.shape) for w in self.model.trainable_weights),
        )
        self.assertEqual(
            card["checked_on"], "64 stand-in images (bundled digits)"
        )
        check = card["checks"]["saved_model"]
        self.assertEqual((check["images"], check["same_class"]), (64, 64))
        self.assertEqual(card["max_pixels"], limits.MAX_PIXELS)
        self.assertEqual(card["precision"], "float32")
        self.assertEqual(
            views.Preprocessing.from_json(
                json.dumps(card["preprocessing"])
            ).mean.tolist(),
            self.preprocessing.mean.tolist(),
        )
        with open(os.path.join(self.path, model_card.FILE)) as file:
            self.assertRegex(file.read(), r'"mean": \[.*\],\n')  # on one line
        for name, digest in card["sha256"].items():
            with open(os.path.join(self.path, name), "rb") as file:
                content = file.read()
            self.assertEqual(hashlib.sha256(content).hexdigest(), digest)
        self.assertContainsSubset(
            {"saved_model.pb", "assets/labels.txt", warmup.PATH}, card["sha256"]
        )

    def test_images_of_several_formats_go_into_one_batch(self):
        batch = list(exports.encoded_squares().values())
        answer = self.server.ask_encoded(batch)
        self.assertEqual(answer["probabilities"].shape, (len(batch), 5))

    @parameterized.parameters(
        (b"", "not an image: an image must be a JPEG, PNG, GIF, BMP or WebP"),
        (b"no image", "not an image: .*"),
        (
            b"\0\0\0\x18ftypheic" + b"\0" * 40,
            "format not supported: HEIC and AVIF must be converted to JPEG.*",
        ),
        (b"\0\0\0\x18ftypisom" + b"\0" * 40, "format not supported: an .*"),
        (b"II*\0" + b"\0" * 40, "format not supported: .*"),
        (exports.bmp(exports.SQUARES)[:200], "truncated: .*"),
        (exports.encoded_squares()["png"][:60], "truncated: .*"),
        (exports.encoded_squares()["jpeg"][:-40], "truncated: .*"),
        (exports.encoded_squares()["jpeg"][:20], "truncated: .*"),
        (exports.encoded_squares()["webp"][:-9], "truncated: .*"),
        (exports.encoded_squares()["gif"][:60], "truncated: .*"),
        (
            exports.encoded_squares()["png"].replace(b"IDAT", b"IDAX"),
            "damaged: the image cannot be decoded",
        ),
    )
    def test_rejected_image_has_a_status_and_no_other_image_changes(
        self, image_bytes, status
    ):
        good = exports.encoded_squares()["png"]
        alone = self.server.ask_encoded([good])
        answer = self.server.ask_encoded([good, image_bytes, good])
        self.assertEqual(answer["status"].tolist()[::2], [b"", b""])
        self.assertRegex(answer["status"][1].decode(), f"^{status}$")
        for name in ("probabilities", "scores"):
            self.assertFalse(answer[name][1].any())
            for row in answer[name][::2]:
                np.testing.assert_allclose(row, alone[name][0], atol=1e-6)
        self.assertEqual(answer["classes"][1], b"")
        self.assertEqual(answer["labels"][1].tolist(), [b""] * 5)
        self.assertEqual(
            answer["classes"][::2].tolist(), [alone["classes"]] * 2
        )
        for row in answer["labels"][::2]:
            self.assertEqual(row.tolist(), alone["labels"][0].tolist())

    def test_rejected_example_has_scores_of_zero(self):
        good = exports.serialized(exports.images_of_noise(1))[0]
        empty = tf.train.Example().SerializeToString()
        inputs = np.array([good, b"no example", empty, good], object)
        answer = self.server.ask("classify", inputs=inputs)
        self.assertFalse(answer["scores"][1:3].any())
        np.testing.assert_allclose(answer["scores"][[0, 3]].sum(-1), 1.0, 1e-5)

    def test_labels_and_scores_are_the_best_of_all_classes(self):
        images = exports.images_of_noise(20)
        answer = self.server.ask("images", images=images)
        order = np.argsort(-answer["probabilities"], -1, "stable")
        np.testing.assert_array_equal(
            answer["scores"],
            np.take_along_axis(answer["probabilities"], order, -1),
        )
        self.assertEqual(
            [[name.decode() for name in row] for row in answer["labels"]],
            [[exports.LABELS[i] for i in row] for row in order],
        )
        self.assertEqual(answer["status"].tolist(), [b""] * 20)

    def test_inputs_and_outputs_have_the_promised_types(self):
        def described(tensors):
            return {
                key: (
                    tf.as_dtype(value.dtype).name,
                    [d.size for d in value.tensor_shape.dim],
                )
                for key, value in tensors.items()
            }

        signatures = {
            name: (described(s.inputs), described(s.outputs))
            for name, s in self.server.signatures.items()
            if not name.startswith("__")
        }
        images = {"images": ("uint8", [-1, 16, 16, 3])}
        answer = {
            "probabilities": ("float32", [-1, 5]),
            "classes": ("string", [-1]),
            "labels": ("string", [-1, 5]),
            "scores": ("float32", [-1, 5]),
            "status": ("string", [-1]),
        }
        self.assertEqual(
            signatures,
            {
                "serving_default": (
                    {"image_bytes": ("string", [-1])},
                    answer,
                ),
                "images": (images, answer),
                "features": (images, {"features": ("float32", [-1, 16])}),
                "classify": (
                    {"inputs": ("string", [-1])},
                    {
                        "classes": ("string", [-1, 5]),
                        "scores": ("float32", [-1, 5]),
                    },
                ),
            },
        )

    def test_labels_are_an_asset(self):
        path = os.path.join(self.path, "assets", "labels.txt")
        with open(path, encoding="utf-8") as file:
            self.assertEqual(file.read(), "red kite\nGämse\n3\nlion\nyak\n")

    def test_another_user_can_read_it(self):
        umask = os.umask(0)
        os.umask(umask)
        mode = os.stat(self.path).st_mode & 0o777
        self.assertEqual(mode, 0o777 & ~umask)

    @pytest.mark.slow
    def test_saved_model_cli_without_keras_gets_the_answers_of_the_model(self):
        folder = exports.scratch(self)
        images = exports.images_of_noise()
        encoded = [tf.io.encode_png(image).numpy() for image in images]
        np.save(os.path.join(folder, "images.npy"), images)
        np.save(os.path.join(folder, "image_bytes.npy"), np.array(encoded))
        # An array of bytes loses the zeros at the end of its elements.
        examples = np.array(exports.serialized(images).tolist())
        self.assertEqual(examples.tolist(), exports.serialized(images).tolist())
        np.save(os.path.join(folder, "inputs.npy"), examples)
        script = """
import sys
sys.modules["keras"] = sys.modules["keras_resnet"] = None  # not importable
from tensorflow.python.tools import saved_model_cli
directory = sys.argv.pop()
for signature, name in (
    ("serving_default", "image_bytes"), ("images", "images"),
    ("features", "images"), ("classify", "inputs"),
):
    sys.argv[1:] = [
        "run", f"--dir={directory}", "--tag_set=serve",
        f"--signature_def={signature}", f"--inputs={name}={name}.npy",
        f"--outdir={signature}"]
    try:
        saved_model_cli.main()
    except SystemExit as end:
        assert not end.code, end.code
"""
        subprocess.run(
            [sys.executable, "-c", script, self.path],
            cwd=folder,
            check=True,
            capture_output=True,
        )
        for signature, output, expected in (
            ("serving_default", "probabilities", self.probabilities),
            ("images", "probabilities", self.probabilities),
            ("features", "features", self.features),
            ("classify", "scores", self.probabilities),
        ):
            np.testing.assert_allclose(
                np.load(os.path.join(folder, signature, output + ".npy")),
                expected(images),
                atol=1e-4,
            )

    def test_next_export_is_the_next_version(self):
        export_dir = exports.scratch(self)
        for version in ("7", "notes"):
            os.mkdir(os.path.join(export_dir, version))
        path = colours.export(export_dir)
        self.assertEqual(path, os.path.join(export_dir, "8"))

    def test_version_that_stands_is_not_replaced(self):
        with self.assertRaisesRegex(FileExistsError, "next free one is 2"):
            export_lib.export(
                self.model,
                self.preprocessing,
                exports.LABELS,
                self.export_dir,
                1,
            )
        self.assertEqual(os.listdir(self.export_dir), ["1"])


class VariantTest(parameterized.TestCase):
    @pytest.mark.slow
    def test_grey_network_takes_grey_and_coloured_images(self):
        model, preprocessing = (
            exports.small_network(1),
            exports.small_preprocessing(1),
        )
        path = export_lib.export(
            model, preprocessing, exports.LABELS, exports.scratch(self)
        )
        server = exports.served(self, path)
        images = exports.images_of_noise(2, channels=1)
        expected = np.asarray(model(preprocessing(images)))
        for signature, inputs in {
            "images": {"images": images},
            "serving_default": {
                "image_bytes": np.array(
                    [
                        tf.io.encode_png(images[0]).numpy(),
                        # The grey of three equal colours is that colour.
                        exports.bmp(np.repeat(images[1], 3, -1)),
                    ],
                    object,
                )
            },
        }.items():
            answer = server.ask(signature, **inputs)
            np.testing.assert_allclose(
                answer["probabilities"], expected, atol=2e-3
            )

    @parameterized.parameters("mixed_bfloat16", "float16")
    @pytest.mark.slow
    def test_network_of_another_policy_is_exported_in_float32(self, policy):
        model = exports.small_network(dtype=policy)
        reference = exports.small_network()
        reference.set_weights(model.get_weights())
        path = export_lib.export(
            model,
            exports.small_preprocessing(),
            exports.LABELS,
            exports.scratch(self),
        )
        images = exports.images_of_noise()
        answer = exports.served(self, path).ask("images", images=images)
        np.testing.assert_allclose(
            answer["probabilities"],
            np.asarray(reference(exports.small_preprocessing()(images))),
            atol=1e-4,
        )

    @pytest.mark.slow
    def test_images_above_the_pixel_limit_are_refused(self):
        path = colours.export(exports.scratch(self), max_pixels=256)
        images = [exports.SQUARES, np.zeros([1, 257, 3], np.uint8)]
        fits, large = (tf.io.encode_png(image).numpy() for image in images)
        server = exports.served(self, path)
        self.assertEqual(
            server.ask_encoded([fits, large])["status"].tolist(),
            [
                b"",
                b"too many pixels: an image may have at most 256 pixels, "
                b"received 257",
            ],
        )

    @parameterized.parameters((1, 1), (3, 3), (99, 4))
    @pytest.mark.slow
    def test_number_of_labels_is_an_option(self, top, expected):
        path = colours.export(exports.scratch(self), top=top)
        answer = exports.served(self, path).ask_encoded([colours.image("blue")])
        self.assertEqual(answer["labels"].shape, (1, expected))
        self.assertEqual(answer["scores"].shape, (1, expected))
        self.assertEqual(answer["labels"][0, 0], b"blue")
        self.assertEqual(model_card.read(path)["top"], expected)

    def test_number_of_labels_below_1_is_rejected(self):
        with self.assertRaisesRegex(ValueError, "top must be 1 or more"):
            colours.export(exports.scratch(self), top=0)

    @parameterized.parameters(True, False)
    @pytest.mark.slow
    def test_encoded_images_are_turned_as_their_exif_data_state(self, exif):
        files = [
            orientation_test.encoded(
                kind, orientation_test.exif(number), exports.SQUARES
            )
            for number, kind in zip(
                orientation_test.TURNS, ["PNG", "WEBP"] * 4, strict=True
            )
        ]
        path = export_lib.export(
            exports.small_network(),
            exports.small_preprocessing(),
            exports.LABELS,
            exports.scratch(self),
            exif=exif,
        )
        server = exports.served(self, path)
        expected = np.stack(
            [
                turn(exports.SQUARES) if exif else exports.SQUARES
                for turn in orientation_test.TURNS.values()
            ]
        )
        np.testing.assert_allclose(
            server.ask_encoded(files)["probabilities"],
            server.ask("images", images=expected)["probabilities"],
            atol=1e-6,
        )
        self.assertEqual(
            model_card.read(path)["input"]["exif_orientation"],
            "applied" if exif else "ignored",
        )

    @parameterized.parameters(True, False)
    @pytest.mark.slow
    def test_network_on_another_one_is_exported(self, is_nested):
        """As docs/fine_tuning.md builds it, and on Keras' own pooling."""
        base = keras.Model(
            (whole := exports.small_network()).input,
            whole.get_layer("pool" if is_nested else "stage3_unit1").output,
        )
        x = image = keras.Input((8, 8, 1))
        x = keras.layers.RandomFlip()(x * 2.0 - 1.0)
        x = keras.layers.UpSampling2D(2, interpolation="bilinear")(x)
        x = keras.layers.Concatenate()([x, x, x])
        features = base(x)
        if not is_nested:
            features = keras.layers.GlobalAveragePooling2D()(features)
        classify = keras.layers.Dense(5, "softmax")
        model = keras.Model(image, classify(features))
        preprocessing = views.Preprocessing(8, 1, None, [0.5], [0.2])
        path = export_lib.export(
            model, preprocessing, exports.LABELS, exports.scratch(self)
        )
        images = exports.images_of_noise(3, channels=1)[:, :8, :8]
        server = exports.served(self, path)
        inputs = preprocessing(images)
        np.testing.assert_allclose(
            server.ask("images", images=images)["probabilities"],
            model(inputs, training=False),
            atol=1e-4,
        )
        expected = np.asarray(
            keras.Model(image, features)(inputs, training=False)
        )
        np.testing.assert_allclose(
            server.ask("features", images=images)["features"],
            expected,
            atol=1e-4 * np.abs(expected).max(),
        )

    @pytest.mark.slow
    def test_pixels_and_several_ways_to_hold_them_are_exported(self):
        """Integers, and dicts of one image and one output."""
        base = exports.small_network()
        image = keras.Input((16, 16, 3), dtype="uint8", name="pixels")
        x = keras.ops.cast(keras.ops.cast(image, "int32") // 3, "float32")
        x = base(keras.layers.Rescaling(1 / 30)(x))
        model = keras.Model({"pixels": image}, {"p": x})
        preprocessing = views.Preprocessing(
            16, 3, None, [0.0] * 3, [1 / 255] * 3
        )
        path = export_lib.export(
            model, preprocessing, exports.LABELS, exports.scratch(self)
        )
        images = exports.images_of_noise()
        np.testing.assert_allclose(
            exports.served(self, path).ask("images", images=images)[
                "probabilities"
            ],
            model({"pixels": images})["p"],
            atol=1e-4,
        )

    def test_pixels_that_need_no_preprocessing_are_not_rounded(self):
        preprocessing = views.Preprocessing(
            16, 3, None, [0.0] * 3, [1 / 255] * 3
        )
        pixels = np.arange(768).reshape([1, 16, 16, 3]) % 256
        np.testing.assert_array_equal(preprocessing(pixels), pixels)


if __name__ == "__main__":
    absltest.main()
