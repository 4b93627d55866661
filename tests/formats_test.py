"""Files for other runtimes predict the same as the Keras model."""

import collections
import importlib.util
import json
import os
import tempfile
import unittest
import zipfile
from unittest import mock

import numpy as np
import pytest
import tensorflow as tf
from absl.testing import absltest
from absl.testing import parameterized

import keras_resnet
from keras_resnet.data import datasets
from keras_resnet.data import views
from keras_resnet.serving import export as export_lib
from keras_resnet.serving import folding
from keras_resnet.serving import formats
from keras_resnet.serving import litert_files
from keras_resnet.serving import metadata
from keras_resnet.serving import model_card
from keras_resnet.serving import onnx_files
from keras_resnet.serving import verification


def digits(count=40):
    """Digits as a network for small colour images sees them."""
    return datasets.load("digits").sample(count)[0].repeat(3, -1)


PREPROCESSING = views.Preprocessing(
    8, 3, None, [0.3, 0.4, 0.5], [0.2, 0.2, 0.3]
)
LABELS = ["a cat", "café", '"dog"', "猫"]
ABOUT = metadata.Metadata(LABELS, PREPROCESSING)
SPEC = tf.TensorSpec([None, 8, 8, 3], tf.uint8, "images")


def network(stem="cifar", bottleneck=False, size=8, **arguments):
    spec = keras_resnet.Spec(
        "small",
        (2, 2),
        (8, 16),
        stem=stem,
        bottleneck=bottleneck,
        classes=4,
        image_size=size,
    )
    model = keras_resnet.resnet(spec, **arguments)
    rng = np.random.default_rng(0)
    for variable in model.variables:  # TensorFlow drops a bias of zeros
        if variable.name.endswith(("beta", "moving_mean")):
            variable.assign(rng.normal(size=variable.shape, scale=0.1))
    # The answers of random weights are nearly equal; these are not.
    kernel = model.get_layer("predictions").kernel
    kernel.assign(rng.normal(size=kernel.shape, scale=0.5))
    return model


def answer(model):
    """The function from uint8 views to probabilities that a file has."""
    folded = folding.fold(model)
    return lambda images: folded(PREPROCESSING(images))


def needs(*packages):
    """Skips a test of an optional package."""
    for name in packages:
        if importlib.util.find_spec(name) is None:
            raise unittest.SkipTest(f"{name} is not installed")


PACKAGES = {
    ("litert", "float32"): (),
    ("litert", "int8"): (),
    ("onnx", "float32"): ("tf2onnx", "onnxruntime"),
    ("onnx", "int8"): ("tf2onnx", "onnxruntime"),
    ("openvino", "float32"): ("tf2onnx", "openvino"),
    ("openvino", "int8"): ("tf2onnx", "onnxruntime", "openvino"),
}


class FormatsTest(parameterized.TestCase):
    def exported(self, model, **arguments):
        folder = self.enter_context(tempfile.TemporaryDirectory())
        images = verification.Images(digits(), calibration=digits(100))
        return export_lib.export(
            model, PREPROCESSING, LABELS, folder, images=images, **arguments
        )

    @parameterized.product(
        name=["litert", "onnx", "openvino"],
        arguments=[
            {},
            {"unit": "pre_activation", "shortcut": "A"},
            {"shortcut": "exclusive_gating"},
            {"looped": True},
        ],
    )
    @pytest.mark.slow
    def test_file_answers_as_the_model_does(self, name, arguments):
        needs(*PACKAGES[name, "float32"])
        model = network(**arguments)
        path = self.exported(model, formats=["saved_model", name])
        predict = formats.load(name, path)
        for count in (1, 7):
            images = digits(count)
            np.testing.assert_allclose(
                predict(images), model(PREPROCESSING(images)), atol=1e-5
            )
        check = model_card.read(path)["checks"][name]
        self.assertEqual((check["images"], check["same_class"]), (40, 40))

    @parameterized.parameters("litert", "onnx", "openvino")
    def test_int8_is_near_the_model(self, name):
        needs(*PACKAGES[name, "int8"])
        model = network()
        folder = self.enter_context(tempfile.TemporaryDirectory())
        formats.write(name, folder, answer(model), SPEC, ABOUT, digits(100))
        images = digits(200)
        expected = model(PREPROCESSING(images)).numpy()
        found = formats.load(name, folder)(images)
        self.assertGreater(
            np.mean(found.argmax(-1) == expected.argmax(-1)), 0.95
        )
        self.assertGreater(np.abs(found - expected).max(), 1e-5)

    @parameterized.parameters("litert", "onnx", "openvino")
    def test_int8_wants_real_images_for_its_ranges(self, name):
        needs(*PACKAGES[name, "int8"])
        with self.assertRaisesRegex(ValueError, "real images"):
            export_lib.export(
                network(),
                PREPROCESSING,
                LABELS,
                "nowhere",
                precision="int8",
                formats=[name],
            )
        self.assertFalse(os.path.exists("nowhere"))

    @parameterized.parameters(
        (
            "tflite",
            "float32",
            "saved_model, litert, onnx, openvino, received 'tflite'",
        ),
        ("litert", "bfloat16", "litert must be written in float32 or int8"),
        ("onnx", "bfloat16", "onnx must be written in .* received .* bfloat16"),
    )
    def test_what_cannot_be_written_is_said(self, name, precision, message):
        with self.assertRaisesRegex(ValueError, message):
            formats.check_formats(("saved_model", name), precision)

    @parameterized.parameters(
        ("onnx", "float32", "tf2onnx", "pip install onnxruntime tf2onnx"),
        ("onnx", "int8", "onnxruntime", "pip install onnxruntime tf2onnx"),
        ("openvino", "float32", "openvino", "pip install openvino$"),
        ("openvino", "float32", "tf2onnx", "onnxruntime tf2onnx$"),
        ("openvino", "int8", "onnxruntime", "onnxruntime tf2onnx$"),
    )
    def test_a_missing_package_is_named_with_its_command(
        self, name, precision, missing, message
    ):
        others = set(PACKAGES[name, precision]) - {missing}
        found = dict.fromkeys(others, mock.Mock(__spec__=mock.Mock()))
        with (
            mock.patch.dict("sys.modules", {**found, missing: None}),
            self.assertRaisesRegex(ValueError, message),
        ):
            formats.check_formats((name,), precision)

    @pytest.mark.slow
    def test_without_its_runtime_a_file_is_written_and_not_checked(self):
        needs("tf2onnx")
        model = network()
        with mock.patch.dict("sys.modules", {"onnxruntime": None}):
            path = self.exported(model, formats=["onnx"])
        check = model_card.read(path)["checks"]["onnx"]
        self.assertEqual(check, {"not_checked": "needs onnxruntime"})
        self.assertTrue(os.path.exists(formats.path(path, "onnx")))


class OnnxTest(parameterized.TestCase):
    @parameterized.parameters(
        # The stem, four units of two or three, and the projections.
        ({"shortcut": "B"}, 1 + 4 * 2 + 1),
        ({"stem": "imagenet", "bottleneck": True}, 1 + 4 * 3 + 2),
        (
            {"stem": "imagenet", "padding": "same", "shortcut": "C"},
            1 + 4 * 2 + 4,
        ),
        ({"looped": True, "shortcut": "B"}, 1 + 4 * 2 + 1),
    )
    def test_graph_is_folded_with_one_transpose_at_the_input(
        self, arguments, convolutions
    ):
        needs("tf2onnx")
        model = network(size=32, **arguments)
        spec = tf.TensorSpec([None, 32, 32, 3], tf.uint8, "images")
        graph = onnx_files.convert(answer(model), spec).graph
        count = collections.Counter(node.op_type for node in graph.node)
        allowed = [
            *("Cast", "Sub", "Mul", "Transpose"),  # the input
            *("Conv", "Relu", "Add", "MaxPool"),
            *("GlobalAveragePool", "Squeeze", "MatMul", "Softmax"),
        ]
        self.assertContainsSubset(count, allowed)
        self.assertEqual(count["Transpose"], 1)
        self.assertEqual(count["Conv"], convolutions)
        for node in graph.node:
            if node.op_type == "Conv":
                self.assertLen(node.input, 3)  # image, kernel, bias
        made_by = {name: node for node in graph.node for name in node.output}
        (transpose,) = (n for n in graph.node if n.op_type == "Transpose")
        while transpose.input[0] in made_by:
            transpose = made_by[transpose.input[0]]
            self.assertIn(transpose.op_type, (("Cast", "Sub", "Mul")))
        self.assertEqual(transpose.input[0], "images")

    def test_batches_have_any_size(self):
        needs("tf2onnx")
        graph = onnx_files.convert(answer(network()), SPEC).graph
        for value in (*graph.input, *graph.output):
            batch, *others = value.type.tensor_type.shape.dim
            self.assertFalse(batch.HasField("dim_value"))
            for size in others:
                self.assertGreater(size.dim_value, 0)

    def test_every_convolution_of_int8_reads_quantized_values(self):
        needs("tf2onnx", "onnxruntime")
        model = onnx_files.convert(answer(network()), SPEC)
        graph = onnx_files.quantized(model, digits(20)).graph
        made_by = {name: node for node in graph.node for name in node.output}
        convolutions = [n for n in graph.node if n.op_type == "Conv"]
        self.assertLen(
            convolutions, sum(n.op_type == "Conv" for n in model.graph.node)
        )
        for node in convolutions:
            for name in node.input:
                self.assertEqual(made_by[name].op_type, "DequantizeLinear")


class MetadataTest(absltest.TestCase):
    """Each runtime, or a plain ZIP reader, finds labels and preprocessing."""

    def written(self, name):
        folder = self.enter_context(tempfile.TemporaryDirectory())
        formats.write(name, folder, answer(network()), SPEC, ABOUT)
        return formats.path(folder, name)

    def check(self, labels, preprocessing):
        self.assertEqual(labels, LABELS)
        found = views.Preprocessing.from_json(preprocessing)
        self.assertEqual(found.to_json(), PREPROCESSING.to_json())

    def test_onnx_has_them_as_properties(self):
        needs(*PACKAGES["onnx", "float32"])
        import onnxruntime

        session = onnxruntime.InferenceSession(self.written("onnx"))
        found = session.get_modelmeta().custom_metadata_map
        self.check(json.loads(found["labels"]), found["preprocessing"])

    def test_openvino_has_them_as_run_time_information(self):
        needs(*PACKAGES["openvino", "float32"])
        import openvino

        model = openvino.Core().read_model(self.written("openvino"))
        found = {
            name: model.get_rt_info(["keras_resnet", name]).astype(str)
            for name in ("labels", "preprocessing")
        }
        self.check(json.loads(found["labels"]), found["preprocessing"])

    @pytest.mark.slow
    def test_litert_has_them_as_its_associated_files(self):
        path = self.written("litert")
        with zipfile.ZipFile(path) as archive:
            self.check(
                archive.read("labels.txt").decode().splitlines(),
                archive.read("preprocessing.json").decode(),
            )
            for entry in archive.infolist():  # as the readers on phones demand
                self.assertEqual(entry.compress_type, zipfile.ZIP_STORED)

    def test_litert_names_its_files_in_the_metadata_of_its_schema(self):
        from tensorflow.lite.tools import flatbuffer_utils

        model = flatbuffer_utils.read_model(self.written("litert"))
        (entry,) = (m for m in model.metadata if m.name == b"TFLITE_METADATA")
        content = bytes(model.buffers[entry.buffer].data)
        self.assertEqual(content[4:8], b"M001")
        for text in (b"labels.txt", b"preprocessing.json", b"probabilities"):
            self.assertIn(text, content)

    def test_litert_is_described_once(self):
        with open(self.written("litert"), "rb") as file:
            content = file.read()
        other = metadata.Metadata(list("abcd"), PREPROCESSING)
        again = litert_files.described(content, other)
        self.assertEqual(again.count(b"TFLITE_METADATA"), 1)


class Cifar10Test(parameterized.TestCase):
    """A public ResNet-20 on test images of CIFAR-10."""

    @parameterized.product(
        name=["litert", "onnx", "openvino"], precision=["float32", "int8"]
    )
    @pytest.mark.slow
    def test_file_classes_real_images_as_the_model(self, name, precision):
        needs(*PACKAGES[name, precision])
        folder = os.environ.get("KERAS_RESNET_DATA", "")
        weights = os.path.join(folder, "weights", "resnet20-12fca82f.th")
        if not folder or not os.path.exists(weights):
            raise unittest.SkipTest("KERAS_RESNET_DATA has no such weights")
        model = keras_resnet.ResNet20(weights=weights)
        preprocessing = views.Preprocessing(
            32, 3, None, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
        )
        cifar10 = datasets.load(
            "cifar10",
            os.path.join(folder, "tfds"),
            preprocessing=preprocessing,
        )
        count = int(os.environ.get("KERAS_RESNET_IMAGES", 100))
        images, labels = cifar10.test_images(count)
        calibration = None
        if precision == "int8":
            calibration, _ = cifar10.sample(200, training=True)
        expected = model(preprocessing(images)).numpy().argmax(-1)
        folded = folding.fold(model)
        folder = self.enter_context(tempfile.TemporaryDirectory())
        formats.write(
            name,
            folder,
            lambda images: folded(preprocessing(images)),
            tf.TensorSpec([None, 32, 32, 3], tf.uint8, "images"),
            metadata.Metadata([str(i) for i in range(10)], preprocessing),
            calibration,
        )
        predict = formats.load(name, folder)
        found = verification.in_batches(predict, images).argmax(-1)
        same = int(np.sum(found == expected))
        errors = int(np.sum(found != labels))
        print(
            f"{name} {precision}: {same} of {count} classes are the model's, "
            f"{errors} errors (model {int(np.sum(expected != labels))})"
        )
        share = 1.0 if precision == "float32" else 0.97
        self.assertGreaterEqual(same, share * count)


if __name__ == "__main__":
    absltest.main()
