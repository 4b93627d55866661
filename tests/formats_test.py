"""Files for other runtimes predict the same as the Keras model."""

import os
import tempfile
import unittest
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
from keras_resnet.serving import model_card
from keras_resnet.serving import verification


def digits(count=40):
    """Digits as a network for small colour images sees them."""
    return datasets.load("digits").sample(count)[0].repeat(3, -1)


PREPROCESSING = views.Preprocessing(
    8, 3, None, [0.3, 0.4, 0.5], [0.2, 0.2, 0.3]
)


def network(**arguments):
    spec = keras_resnet.Spec(
        "small", (2, 2), (8, 16), stem="cifar", classes=4, image_size=8
    )
    model = keras_resnet.resnet(spec, **arguments)
    # The answers of random weights are nearly equal; these are not.
    kernel = model.get_layer("predictions").kernel
    rng = np.random.default_rng(0)
    kernel.assign(rng.normal(size=kernel.shape, scale=3.0))
    return model


class FormatsTest(parameterized.TestCase):
    def exported(self, model, **arguments):
        folder = self.enter_context(tempfile.TemporaryDirectory())
        images = verification.Images(digits(), calibration=digits(100))
        return export_lib.export(
            model,
            PREPROCESSING,
            list("abcd"),
            folder,
            images=images,
            **arguments,
        )

    @parameterized.product(
        name=["litert", "onnx"],
        arguments=[
            {},
            {"unit": "pre_activation", "shortcut": "A"},
            {"shortcut": "exclusive_gating"},
            {"looped": True},
        ],
    )
    @pytest.mark.slow
    def test_file_answers_as_the_model_does(self, name, arguments):
        model = network(**arguments)
        path = self.exported(model, formats=["saved_model", name])
        ask = getattr(formats, name)(formats.path(path, name))
        for count in (1, 7):
            images = digits(count)
            np.testing.assert_allclose(
                ask(images), model(PREPROCESSING(images)), atol=1e-5
            )
        check = model_card.read(path)["checks"][name]
        self.assertEqual((check["images"], check["same_class"]), (40, 40))

    def test_int8_for_phones_is_near_the_model(self):
        model = network()
        path = self.exported(model, formats=["litert"], precision="int8")
        images = digits(200)
        expected = model(PREPROCESSING(images)).numpy()
        file = formats.path(path, "litert")
        found = formats.litert(file)(images)
        self.assertGreater(
            np.mean(found.argmax(-1) == expected.argmax(-1)), 0.95
        )
        self.assertGreater(np.abs(found - expected).max(), 1e-5)

    def test_int8_for_phones_wants_images_to_be_made_for(self):
        with self.assertRaisesRegex(ValueError, "real images"):
            export_lib.export(
                network(),
                PREPROCESSING,
                list("abcd"),
                "nowhere",
                precision="int8",
                formats=["litert"],
            )
        self.assertFalse(os.path.exists("nowhere"))

    @parameterized.parameters(
        ("tflite", "float32", "saved_model, litert, onnx, received 'tflite'"),
        ("litert", "bfloat16", "litert must be written in float32 or int8"),
        ("onnx", "int8", "onnx must be written in float32, received .* int8"),
    )
    def test_what_cannot_be_written_is_said(self, name, precision, message):
        with self.assertRaisesRegex(ValueError, message):
            formats.check_formats(("saved_model", name), precision)

    def test_onnx_says_how_its_packages_are_installed(self):
        with (
            mock.patch.dict("sys.modules", {"tf2onnx": None}),
            self.assertRaisesRegex(
                ValueError, "pip install onnxruntime tf2onnx"
            ),
        ):
            formats.check_formats(("onnx",), "float32")


class Cifar10Test(parameterized.TestCase):
    """A public ResNet-20 on 100 test images of CIFAR-10."""

    @parameterized.parameters(("float32", 100), ("int8", 98))
    def test_phones_and_onnx_class_real_images_as_the_model(
        self, precision, at_least
    ):
        folder = os.environ.get("KERAS_RESNET_DATA", "")
        weights = os.path.join(folder, "weights", "resnet20-12fca82f.th")
        if not folder or not os.path.exists(weights):
            raise unittest.SkipTest("KERAS_RESNET_DATA has no such weights")
        model = keras_resnet.ResNet20(
            weights=weights, shortcut=keras_resnet.layers.OptionA(zeros="both")
        )
        preprocessing = views.Preprocessing(
            32, 3, None, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
        )
        cifar10 = datasets.load(
            "cifar10",
            os.path.join(folder, "tfds"),
            preprocessing=preprocessing,
        )
        images, _ = cifar10.test_images(100)
        calibration, _ = cifar10.sample(200, training=True)
        expected = model(preprocessing(images)).numpy().argmax(-1)
        spec = tf.TensorSpec([None, 32, 32, 3], tf.uint8, "images")
        folded = folding.fold(model)

        def answer(images):
            return folded(preprocessing(images))

        path = os.path.join(
            self.enter_context(tempfile.TemporaryDirectory()), "model"
        )
        is_int8 = precision == "int8"
        formats.write_litert(
            path, answer, spec, calibration if is_int8 else None
        )
        found = {"litert": formats.litert(path)(images)}
        if not is_int8:
            formats.write_onnx(path, answer, spec)
            found["onnx"] = formats.onnx(path)(images)
        for name, probabilities in found.items():
            same = int(np.sum(probabilities.argmax(-1) == expected))
            print(f"{name} {precision}: {same} of 100 classes are the model's")
            self.assertGreaterEqual(same, at_least, name)


if __name__ == "__main__":
    absltest.main()
