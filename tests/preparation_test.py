"""Images of any size, prepared as the weights were trained on."""

import json
import os
import tempfile
from unittest import mock

import keras
import numpy as np
import PIL.Image
import tensorflow as tf
from absl.testing import absltest
from absl.testing import parameterized

import keras_resnet
from keras_resnet.preprocessing import ImagePreparation
from keras_resnet.weights import cards
from keras_resnet.weights import downloads
from keras_resnet.weights import labels
from keras_resnet.weights import published
from keras_resnet.weights import shipped

PLAIN = {"mean": (0.0,) * 3, "deviation": (1.0,) * 3}


def photo(height, width, seed=0):
    """Edges, a slope and noise, as a photo has them."""
    rng = np.random.default_rng(seed)
    x = np.linspace(0, 255, width)[None, :, None] * np.ones((height, 1, 3))
    x[height // 3 : height // 2] = 255
    x[:, width // 2 : width // 2 + 5] = 0
    return np.clip(x + rng.normal(0, 20, x.shape), 0, 255).astype("uint8")


def as_torchvision(image, shorter_side, size, method):
    """The view of torchvision and timm: Pillow's resize, the centre."""
    picture = PIL.Image.fromarray(image)
    width, height = picture.size
    if width <= height:
        sides = shorter_side, int(shorter_side * height / width)
    else:
        sides = int(shorter_side * width / height), shorter_side
    resized = np.asarray(picture.resize(sides, method))
    top = round((sides[1] - size) / 2.0)
    left = round((sides[0] - size) / 2.0)
    return resized[top : top + size, left : left + size]


class ImagesTest(parameterized.TestCase):
    @parameterized.product(
        interpolation=("bilinear", "bicubic"),
        shape=((375, 500), (500, 333), (256, 256), (91, 120)),
        shorter_side=(232, 256, 224),
    )
    def test_views_are_those_of_torchvision_to_a_rounding(
        self, interpolation, shape, shorter_side
    ):
        preparation = published.Preparation(
            224, shorter_side, interpolation, **PLAIN
        )
        image = photo(*shape)
        view = ImagePreparation(preparation, 224, 224)(image)
        method = getattr(PIL.Image.Resampling, interpolation.upper())
        expected = as_torchvision(image, shorter_side, 224, method)
        difference = np.abs(np.array(view) * 255 - expected)
        # Each axis is rounded to levels of 0 to 255, so two can add up.
        self.assertLess(np.mean(difference > 1.001), 1e-3)
        self.assertLess(difference.max(), 2.001)

    @parameterized.parameters((20, 400), (401, 20), (20, 161), (20, 160))
    def test_a_long_image_has_its_centre_as_view(self, height, width):
        preparation = published.Preparation(32, 36, **PLAIN)
        layer = ImagePreparation(preparation, 32, 32)
        image = photo(height, width)
        expected = as_torchvision(image, 36, 32, PIL.Image.Resampling.BILINEAR)
        for call in (layer, tf.function(layer.__call__, autograph=False)):
            view = np.array(call(tf.constant(image))) * 255
            # An end of odd length moves the view by half a pixel.
            self.assertLess(np.mean(np.abs(view - expected)), 4)
        spec = tf.TensorSpec((None, None, 3), tf.uint8)
        graph = tf.function(
            layer.__call__, input_signature=[spec], autograph=False
        )
        np.testing.assert_allclose(
            graph(tf.constant(image)), layer(image), atol=1e-6
        )

    def test_a_very_long_image_needs_little_memory(self):
        layer = ImagePreparation(published.Preparation(224, 256), 224, 224)
        for shape in ((1, 100_000, 3), (100_000, 1, 3)):
            view = layer(np.zeros(shape, "uint8"))
            self.assertEqual(view.shape, (224, 224, 3))

    def test_the_same_view_in_a_batch_a_graph_and_a_model(self):
        preparation = published.Preparation(224, 256)
        layer = ImagePreparation(preparation, 64, 64)
        image = photo(100, 120)
        expected = np.array(layer(image))
        self.assertEqual(expected.shape, (64, 64, 3))
        np.testing.assert_array_equal(layer(image[None])[0], expected)
        spec = tf.TensorSpec((None, None, 3), tf.uint8)
        data = tf.data.Dataset.from_generator(
            lambda: iter([image]), output_signature=spec
        ).map(layer)
        (view,) = data
        self.assertEqual(view.shape, expected.shape)
        np.testing.assert_allclose(view, expected, atol=1e-6)
        x = keras.Input((None, None, 3), dtype="uint8")
        model = keras.Model(x, layer(x))
        np.testing.assert_allclose(model(image[None])[0], expected, atol=1e-6)
        again = ImagePreparation.from_config(
            json.loads(json.dumps(layer.get_config()))
        )
        np.testing.assert_array_equal(again(image), expected)

    def test_channels_are_those_of_the_network(self):
        preparation = published.Preparation(32, None, **PLAIN)
        image = photo(32, 32)
        colour = ImagePreparation(preparation, 32, 32)
        grey = ImagePreparation(preparation, 32, 32, 1)
        alpha = np.concatenate([image, image[..., :1]], -1)
        np.testing.assert_array_equal(colour(alpha), colour(image))
        one = colour(image[..., :1])
        np.testing.assert_array_equal(one[..., 0], one[..., 2])
        expected = np.asarray(PIL.Image.fromarray(image).convert("L"))
        np.testing.assert_allclose(
            grey(image)[..., 0] * 255, expected, atol=1.001
        )

    @parameterized.parameters(
        ((9, 9), r"received \(9, 9\): give grey images as images\[..., None\]"),
        ((2, 50, 60), r"received \(2, 50, 60\): give grey"),
        ((9, 9, 5), "1 to 4 channels, received"),
        ((1, 9, 9, 5), r"1 to 4 channels, received \(1, 9, 9, 5\)"),
        ((9, 9, 0), r"1 to 4 channels, received \(9, 9, 0\)"),
        ((1, 0, 9, 3), "at least one pixel"),
        ((0, 9, 3), "at least one pixel"),
        ((9,), "the shape"),
        ((), "the shape"),
        ((1, 1, 9, 9, 3), "the shape"),
    )
    def test_another_shape_is_one_line(self, shape, message):
        layer = ImagePreparation(published.Preparation(32, None), 32, 32)
        images = np.full(shape, 9, "uint8")
        known = [images, tf.constant(images)]
        if shape:
            known.append(images.tolist())
        if len(shape) > 2:
            known.append(keras.KerasTensor(shape))
        for given in known:
            with self.assertRaisesRegex(ValueError, message) as caught:
                layer(given)
            self.assertNotIn("\n", str(caught.exception))

    @parameterized.parameters(
        (np.array(["a"]), "pixels of 0 to 255, received values of str"),
        (tf.constant(["a"]), "pixels of 0 to 255, received values of string"),
        (np.zeros((9, 9, 3), "bool"), "received values of bool"),
        (np.zeros((9, 9, 3), "complex64"), "received values of complex64"),
        (np.full((9, 9, 3), None), "received values of object"),
        (np.full((9, 9, 3), np.nan), "received values of nan to nan"),
        (np.full((9, 9, 3), np.inf), "received values of inf to inf"),
        (np.linspace(-123, 151, 243).reshape(9, 9, 3), "as they were decoded"),
        ([np.zeros((9, 9, 3)), np.zeros((9, 8, 3))], "must have one size"),
        ([tf.zeros((9, 9, 3)), tf.zeros((9, 8, 3))], "must have one size"),
        (tf.ragged.constant([[1], [1, 2]]), "received RaggedTensor"),
        (None, "received NoneType"),
        ("photo.jpg", "received str"),
        ({"images": 1}, "received dict"),
    )
    def test_what_is_no_image_is_one_line(self, images, message):
        layer = ImagePreparation(published.Preparation(32, None), 32, 32)
        with self.assertRaisesRegex(ValueError, message) as caught:
            layer(images)
        self.assertNotIn("\n", str(caught.exception))

    def test_a_tensor_of_unknown_axes_is_one_line(self):
        layer = ImagePreparation(published.Preparation(32, None), 32, 32)
        for shape, message in (
            (None, "expand_animations=False"),
            ((None, None, None), "1 to 4 channels"),
        ):
            spec = tf.TensorSpec(shape, tf.uint8)
            function = tf.function(
                layer.__call__, input_signature=[spec], autograph=False
            )
            with self.assertRaisesRegex(ValueError, message) as caught:
                function.get_concrete_function()
            self.assertNotIn("\n", str(caught.exception))

    def test_a_batch_may_be_empty_or_a_list(self):
        layer = ImagePreparation(published.Preparation(32, None), 32, 32)
        empty = layer(np.zeros((0, 9, 9, 3), "uint8"))
        self.assertEqual(empty.shape, (0, 32, 32, 3))
        image = photo(40, 60)
        turned = PIL.Image.fromarray(image).transpose(
            PIL.Image.Transpose.ROTATE_90
        )
        turned.getexif()[0x0112] = 6
        for images in ([image] * 2, [tf.constant(image)] * 2, [turned, image]):
            views = np.array(layer(images))
            np.testing.assert_array_equal(views[0], layer(image))
            np.testing.assert_array_equal(views[1], views[0])

    def test_blue_comes_first_for_the_authors_weights(self):
        layer = ImagePreparation(published.CAFFE, 224, 224)
        image = photo(224, 224)
        plain = published.Preparation(224, None, **PLAIN)
        view = ImagePreparation(plain, 224, 224)(image) * 255
        layer.preparation = published.dataclasses.replace(
            published.CAFFE, shorter_side=None
        )
        np.testing.assert_allclose(
            layer(image),
            keras_resnet.preprocess_input(np.array(view), "caffe"),
            atol=1e-3,
        )


class NetworksTest(parameterized.TestCase):
    def test_a_network_with_its_preparation_is_one_model(self):
        network = keras_resnet.ResNet20(weights="cifar10")
        model = keras.Sequential([keras_resnet.preprocess(network), network])
        path = os.path.join(os.path.dirname(__file__), "cat.png")
        image = np.array(keras.utils.load_img(path))
        p = model(image[None])
        ((best,),) = keras_resnet.decode_predictions(p, top=1, model=model)
        self.assertEqual(best[:2], ("cat", "cat"))
        folder = self.enter_context(tempfile.TemporaryDirectory())
        model.save(f"{folder}/model.keras")
        again = keras.models.load_model(f"{folder}/model.keras")
        np.testing.assert_allclose(again(image[None]), p, atol=1e-6)
        self.assertEqual(cards.card(again), cards.card(network))

    def test_pixels_of_cifar_are_those_of_preprocess_input(self):
        network = keras_resnet.ResNet20(weights="cifar10")
        images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3))
        images = images.astype("uint8")
        np.testing.assert_allclose(
            keras_resnet.preprocess(network)(images),
            keras_resnet.preprocess_input(images, "cifar10"),
            atol=1e-6,
        )

    def test_labels_of_another_classifier_are_not_those_of_the_weights(self):
        network = keras_resnet.ResNet20(weights="cifar10")
        x = network.get_layer("pool").output
        model = keras.Model(network.input, keras.layers.Dense(10)(x))
        with self.assertRaisesRegex(ValueError, "classifier of its weights"):
            keras_resnet.decode_predictions(np.ones((1, 10)), model=model)

    @parameterized.parameters("prepare", "rescaling", "normalization")
    def test_a_model_that_prepares_images_is_not_prepared_twice(self, kind):
        network = keras_resnet.ResNet20(weights="cifar10")
        layer = {
            "prepare": keras_resnet.preprocess(network),
            "rescaling": keras.layers.Rescaling(1 / 255),
            "normalization": keras.layers.Normalization(
                mean=[120.0] * 3, variance=[3600.0] * 3
            ),
        }[kind]
        model = keras.Sequential([keras.Input((32, 32, 3)), layer, network])
        with self.assertRaisesRegex(ValueError, "give the network inside"):
            keras_resnet.preprocess(model)

    @parameterized.parameters(
        (np.linspace(0, 1, 3072), "0 to 1: give the pixels"),
        (np.linspace(-1, 1, 3072), "-1 to 1: give the pixels"),
        (np.linspace(-2.1, 2.6, 3072), "-2.1 to 2.6: give the pixels"),
        (np.linspace(0, 65535, 3072).astype("uint16"), "divide .* by 257"),
    )
    def test_values_that_are_no_pixels_are_refused(self, values, message):
        prepare = keras_resnet.preprocess(
            keras_resnet.ResNet20(weights="cifar10")
        )
        for kind in (np.asarray, tf.constant):
            with self.assertRaisesRegex(ValueError, message):
                prepare(kind(values.reshape(32, 32, 3)))
        for image in (np.zeros((32, 32, 3), "float32"), photo(32, 32) * 1.0):
            prepare(image)

    def test_an_image_of_pillow_is_turned_as_it_says(self):
        prepare = keras_resnet.preprocess(
            keras_resnet.ResNet20(weights="cifar10")
        )
        image = PIL.Image.fromarray(photo(40, 60))
        np.testing.assert_array_equal(prepare(image), prepare(photo(40, 60)))
        turned = image.transpose(PIL.Image.Transpose.ROTATE_90)
        turned.getexif()[0x0112] = 6
        np.testing.assert_array_equal(prepare(turned), prepare(image))
        grey = np.array(prepare(image.convert("L")))
        self.assertEqual(grey.shape, (32, 32, 3))

    def test_without_known_weights_the_error_says_what_to_use(self):
        with self.assertRaisesRegex(ValueError, "preprocess_input"):
            keras_resnet.preprocess(keras_resnet.ResNet20())
        network = keras_resnet.ResNet20()
        with self.assertRaisesRegex(ValueError, "one label for each column"):
            keras_resnet.decode_predictions(np.ones((1, 10)), model=network)

    @parameterized.parameters("resnet20", None)
    def test_what_is_no_model_is_an_error_that_says_so(self, model):
        message = f"model must be a Keras model, received {model!r}"
        for function in (keras_resnet.preprocess, cards.card):
            with self.assertRaisesRegex(ValueError, message):
                function(model)

    @parameterized.parameters(
        (np.full((1, 10), np.nan), 5, "p must be probabilities, received NaN"),
        (np.zeros((1, 10)), 0, "top must be an integer of at least 1"),
        (np.zeros((1, 10)), 1.5, "top must be an integer of at least 1"),
    )
    def test_predictions_without_a_best_class_are_an_error(
        self, p, top, message
    ):
        network = keras_resnet.ResNet20(weights="cifar10")
        for model in (network, None):
            with self.assertRaisesRegex(ValueError, message):
                keras_resnet.decode_predictions(p, top, model)

    def test_the_network_decides_the_size_and_the_channels(self):
        for shape, expected in (
            ((None, None, 3), (32, 32, 3)),
            ((48, 40, 3), (48, 40, 3)),
            ((32, 32, 1), (32, 32, 1)),
        ):
            network = keras_resnet.ResNet20(
                include_top=False, input_shape=shape
            )
            card = published.find("resnet20", "cifar10")
            cards.attach(network, card)
            view = keras_resnet.preprocess(network)(photo(50, 60))
            self.assertEqual(view.shape, expected)

    def test_labels_of_imagenet_are_those_of_the_class_index(self):
        folder = self.enter_context(tempfile.TemporaryDirectory())
        index = {str(i): [f"n{i}", f"label{i}"] for i in range(1000)}
        path = os.path.join(folder, "index.json")
        with open(path, "w") as file:
            json.dump(index, file)
        card = published.find("resnet18", "imagenet")
        with mock.patch.object(downloads, "get", return_value=path):
            self.assertEqual(labels.of_card(card)[999], "label999")
        card = published.Card("x", "resnet20", "y", labels=("a", "b"))
        self.assertEqual(labels.of_card(card), ["a", "b"])
        card = published.Card("x", "resnet20", "y")
        self.assertIsNone(labels.of_card(card))
        self.assertEqual(
            labels.of_card(published.find("resnet20", "cifar10")),
            shipped.card("resnet20")["labels"],
        )


if __name__ == "__main__":
    absltest.main()
