"""Exports in each precision, and their model cards."""

import os
import subprocess
import sys
import tempfile
from unittest import mock

import keras
import numpy as np
import pytest
import tensorflow as tf
from absl.testing import absltest
from absl.testing import parameterized
from tensorflow.core.protobuf import saved_model_pb2

import keras_resnet
from keras_resnet.serving import export as export_lib
from keras_resnet.serving import folding
from keras_resnet.serving import int8_kernels
from keras_resnet.serving import model_card
from keras_resnet.serving import verification
from tests import colours
from tests import exports


class PrecisionTest(parameterized.TestCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        folder = tempfile.TemporaryDirectory()
        cls.addClassCleanup(folder.cleanup)
        cls.folder = folder.name
        cls.model = exports.small_network()
        cls.paths = {}
        # 7 of 70 labels are wrong.
        cls.views = exports.images_of_noise(70)
        best = np.argmax(
            cls.model(exports.small_preprocessing()(cls.views)), -1
        )
        cls.labels = np.where(np.arange(70) < 7, (best + 1) % 5, best)

    def exported(self, precision):
        """A version of the network, one of each precision."""
        if precision not in self.paths:
            digits = verification.bundled_images(exports.small_preprocessing())
            calibration = np.concatenate([self.views, digits.views])
            arguments = {"images": digits._replace(calibration=calibration)}
            if precision == "float32":
                arguments = {
                    "images": verification.Images(
                        self.views, self.labels, source="70 of noise"
                    ),
                    "about": {
                        "recipe": {"steps": 3},
                        "network": {"shortcut": "A"},
                    },
                }
            self.paths[precision] = export_lib.export(
                self.model,
                exports.small_preprocessing(),
                exports.LABELS,
                self.folder,
                precision=precision,
                **arguments,
            )
        return self.paths[precision]

    def test_signatures_in_bfloat16_answer_nearly_as_the_model(self):
        server = exports.served(self, self.exported("bfloat16"))
        images = exports.images_of_noise(20)
        inputs = exports.small_preprocessing()(images)
        probabilities = np.asarray(self.model(inputs))
        features = np.asarray(exports.pooled(self.model)(inputs))
        encoded = [tf.io.encode_png(image).numpy() for image in images]
        for answer in (
            server.ask("images", images=images),
            server.ask_encoded(encoded),
        ):
            error = np.abs(answer["probabilities"] - probabilities)
            self.assertBetween(error.max(), 1e-5, 0.2)
            self.assertEqual(
                [name.decode() for name in answer["classes"]],
                [exports.LABELS[i] for i in answer["probabilities"].argmax(-1)],
            )
        error = server.ask("features", images=images)["features"] - features
        self.assertBetween(np.abs(error).max() / features.max(), 1e-5, 0.05)

    @parameterized.parameters("float32", "bfloat16")
    def test_graph_has_neither_variables_nor_normalizations(self, precision):
        path = self.exported(precision)
        with open(os.path.join(path, "saved_model.pb"), "rb") as file:
            saved = saved_model_pb2.SavedModel.FromString(file.read())
        graph = saved.meta_graphs[0].graph_def
        nodes = list(graph.node)
        for function in graph.library.function:
            nodes.extend(function.node_def)
        used = {node.op for node in nodes}
        self.assertContainsSubset({"Conv2D", "BiasAdd"}, used)
        self.assertNotIn("FusedBatchNormV3", used)
        variables = {
            tf.as_dtype(node.attr["dtype"].type)
            for node in nodes
            if node.op == "VarHandleOp"
        }
        # TensorFlow itself keeps the name of a file in one.
        self.assertContainsSubset(variables, {tf.string})
        kernels = [
            tf.as_dtype(node.attr["dtype"].type).name
            for node in nodes
            if node.op == "Const"
            and len(node.attr["value"].tensor.tensor_shape.dim) == 4
        ]
        self.assertEqual(kernels, [precision] * 7)

    @parameterized.parameters("int8_weights", "int8")
    @pytest.mark.slow
    def test_features_in_8_bits_are_near_those_of_the_model(self, precision):
        path = self.exported(precision)
        images = exports.images_of_noise(20)
        inputs = exports.small_preprocessing()(images)
        features = np.asarray(exports.pooled(self.model)(inputs))
        error = exports.served(self, path).ask("features", images=images)[
            "features"
        ]
        error = np.abs(error - features).max() / features.max()
        self.assertBetween(error, 1e-5, 0.05)
        with open(os.path.join(path, "saved_model.pb"), "rb") as file:
            saved = saved_model_pb2.SavedModel.FromString(file.read())
        nodes = [
            node
            for function in saved.meta_graphs[0].graph_def.library.function
            for node in function.node_def
        ]
        kernels = [
            tf.as_dtype(node.attr["dtype"].type).name
            for node in nodes
            if node.op == "Const"
            and len(node.attr["value"].tensor.tensor_shape.dim) == 4
        ]
        is_int8 = precision == "int8"
        self.assertEqual(kernels, ["qint8" if is_int8 else "int8"] * 7)
        self.assertEqual(is_int8, all(node.op != "Conv2D" for node in nodes))

    @pytest.mark.slow
    def test_int8_answers_the_same_in_another_process(self):
        path = self.exported("int8")
        images = exports.images_of_noise(20)
        script = """
import sys
sys.modules["keras"] = sys.modules["keras_resnet"] = None  # not importable
import numpy as np, tensorflow as tf
path, images, answers = sys.argv[1:]
loaded = tf.saved_model.load(path)
outputs = loaded.signatures["images"](images=tf.constant(np.load(images)))
np.save(answers, outputs["probabilities"])
"""
        folder = exports.scratch(self)
        files = [os.path.join(folder, name) for name in ("in.npy", "out.npy")]
        np.save(files[0], images)
        subprocess.run(
            [sys.executable, "-c", script, path, *files],
            check=True,
            capture_output=True,
        )
        expected = exports.served(self, path).ask("images", images=images)
        np.testing.assert_allclose(
            np.load(files[1]), expected["probabilities"], atol=1e-6
        )

    @pytest.mark.slow
    def test_card_says_where_int8_runs(self):
        card = model_card.read(self.exported("int8"))
        self.assertEqual(card["precision"], "int8")
        self.assertEqual(card["int8"]["calibration_images"], 134)
        self.assertIn("x86-64 with oneDNN", card["int8"]["runs_on"])
        self.assertIn("AVX512_VNNI", card["int8"]["fast_and_exact_with"])
        self.assertNotIn("int8", model_card.read(self.exported("bfloat16")))

    def test_int8_needs_the_kernels_and_images_before_anything_is_written(self):
        export_dir = exports.scratch(self)
        unsupported = int8_kernels.UnsupportedError("int8 must run on x86")
        for error, images, kernels in (
            ("x86", verification.Images(self.views, None, self.views), False),
            ("calibrated on real images", None, True),
        ):
            with (
                mock.patch.object(
                    int8_kernels,
                    "check",
                    side_effect=None if kernels else unsupported,
                ),
                self.assertRaisesRegex(ValueError, error),
            ):
                export_lib.export(
                    self.model,
                    exports.small_preprocessing(),
                    exports.LABELS,
                    export_dir,
                    precision="int8",
                    images=images,
                )
            self.assertEmpty(os.listdir(export_dir))

    @pytest.mark.slow
    def test_errors_on_images_with_labels_are_on_the_card(self):
        card = model_card.read(self.exported("float32"))
        check = card["checks"]["saved_model"]
        self.assertEqual((check["top1_errors"], check["images"]), (7, 70))
        self.assertAlmostEqual(check["top1_error"], 10.0)
        self.assertEqual(card["checked_on"], "70 of noise")
        self.assertEqual(card["recipe"], {"steps": 3})
        self.assertEqual(card["network"]["shortcut"], "A")

    @pytest.mark.slow
    def test_export_of_another_class_is_not_published(self):
        def of_the_next_class(model, precision="float32"):
            copy = keras.models.clone_model(model)
            copy.set_weights(model.get_weights())
            for weight in copy.get_layer("predictions").weights:
                weight.assign(np.roll(weight.numpy(), 1, -1))
            return fold(copy, precision)

        fold = folding.fold
        export_dir = exports.scratch(self)
        with (
            mock.patch.object(folding, "fold", of_the_next_class),
            self.assertRaisesRegex(
                verification.DisagreementError, "nothing was exported"
            ),
        ):
            colours.export(export_dir, precision="bfloat16")
        self.assertEmpty(os.listdir(export_dir))

    @parameterized.parameters(*verification.TOLERANCES.items())
    def test_each_precision_has_a_share_of_classes(self, _, tolerance):
        """Classes may differ for ties, and for the share that is left."""
        expected = np.tile([[0.7, 0.2, 0.1]], [100, 1])
        views = np.zeros([100, 4, 4, 3], np.uint8)
        reference = verification.Reference(
            views, expected, expected, None, tolerance
        )
        allowed = round(100 * (1.0 - tolerance.share))
        for others, is_right in ((allowed, True), (allowed + 1, False)):
            found = expected.copy()
            found[:others] = expected[:others, ::-1]
            if is_right:
                entry = verification.check_classes("file", found, reference)
                self.assertEqual(entry["same_class"], 100 - others)
            elif not is_right:
                with self.assertRaisesRegex(
                    verification.DisagreementError, "nothing was exported"
                ):
                    verification.check_classes("file", found, reference)
        found = expected.copy()
        found[0, 0] = np.nan
        with self.assertRaises(verification.DisagreementError):
            verification.check_classes("file", found, reference)

    @pytest.mark.slow
    def test_looped_network_is_exported(self):
        spec = keras_resnet.Spec(
            name="looped",
            units=(2, 3),
            filters=(4, 8),
            stem="cifar",
            classes=len(exports.LABELS),
            image_size=16,
        )
        model = keras_resnet.resnet(spec, looped=True)
        path = export_lib.export(
            model,
            exports.small_preprocessing(),
            exports.LABELS,
            exports.scratch(self),
        )
        images = exports.images_of_noise()
        np.testing.assert_allclose(
            exports.served(self, path).ask("images", images=images)[
                "probabilities"
            ],
            model(exports.small_preprocessing()(images)),
            atol=1e-4,
        )


if __name__ == "__main__":
    absltest.main()
