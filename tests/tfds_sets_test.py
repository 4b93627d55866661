import json
import os
import pathlib
import shutil
import socket
import struct
import sys
import urllib.error
from unittest import mock

import numpy as np
import pytest
import tensorflow as tf
from absl.testing import absltest
from absl.testing import parameterized

from keras_resnet.data import datasets
from keras_resnet.data import views
from tests import images as images_lib
from tests import records


class TfdsTest(parameterized.TestCase):
    def test_of_small_grey_images_is_held_in_memory(self):
        directory = records.tfds_set(self, (12, 12, 1), train=30, test=9)
        dataset = datasets.load("tiny", directory)
        self.assertEqual(dataset.labels, ["a", "b", "c"])
        self.assertEqual(dataset.image_shape, (12, 12, 1))
        ((images, labels),) = images_lib.batches(
            dataset.train_batches(30, 0), 1
        )
        numbers = (images[:, 0, 0, 0] + 14.5 / 255) * 255
        np.testing.assert_allclose(sorted(numbers), range(30), atol=1e-4)
        np.testing.assert_array_equal(labels, numbers.round() % 3)

    @parameterized.parameters("set [v2]", "a*b", "what?", "{a,b}", "[ab]")
    @pytest.mark.slow
    def test_data_dir_may_have_the_characters_of_patterns(self, name):
        prepared = records.tfds_set(self, (None, None, 3), train=20, test=3)
        directory = os.path.join(records.scratch(self), name)
        shutil.copytree(prepared, directory)
        dataset = datasets.load("tiny", directory, image_size=8)
        images_lib.batches(dataset.train_batches(4, 0), 6)  # beyond an epoch
        self.assertEqual((dataset.train_size, dataset.test_size), (20, 3))
        self.assertEqual(dataset.with_validation().test_size, 2)
        dataset.check()

    @parameterized.parameters(((8, 8, 3),), ((None, None, 3),))
    def test_record_that_promises_too_many_pixels_is_named(self, shape):
        """It is rejected before its 3,600,000,000 pixels are unpacked."""

        def promising(image):
            content = bytearray(tf.io.encode_png(image).numpy())
            content[16:24] = struct.pack(">II", 60_000, 60_000)
            return bytes(content)

        directory = records.tfds_set(
            self, shape, (), 5, promising, train=9, test=3
        )
        with self.assertRaisesRegex(
            ValueError,
            r"record \d of tiny/train does not decode; .*64,000,000 pixels "
            r"\(too many pixels: an image may have at most 64000000 pixels, "
            r"received 3600000000\)$",
        ):
            datasets.load("tiny", directory, image_size=8).check()

    def test_of_photos_is_read_as_it_is_needed(self):
        directory = records.tfds_set(self, (None, None, 3), train=9, test=4)
        dataset = datasets.load("tiny", directory)
        self.assertEqual(dataset.image_shape, (224, 224, 3))
        self.assertEqual((dataset.train_size, dataset.test_size), (9, 4))

    def test_without_test_keeps_the_last_fifth(self):
        directory = records.tfds_set(self, (8, 8, 1), train=50)
        dataset = datasets.load("tiny", directory)
        self.assertEqual((dataset.train_size, dataset.test_size), (40, 10))
        ((images, _),) = images_lib.batches(dataset.train_batches(40, 0), 1)
        numbers = (images + dataset.preprocessing.mean)[:, 0, 0, 0] * 255
        tests = dataset.test_images(10)[0][:, 0, 0, 0]
        self.assertEqual(
            sorted([*numbers.round().astype(int), *tests]), list(range(50))
        )

    def test_is_tested_on_validation_where_test_has_no_labels(self):
        directory = records.tfds_set(
            self, (8, 8, 1), ("test",), train=9, validation=5, test=7
        )
        self.assertEqual(datasets.load("tiny", directory).test_size, 5)

    @parameterized.parameters(((8, 8, 1),), ((None, None, 3),))
    def test_with_a_record_that_does_not_decode(self, shape):
        directory = records.tfds_set(self, shape, (), 3, train=9, test=3)
        with self.assertRaisesRegex(
            ValueError, r"record \d of tiny/train does not decode"
        ):
            datasets.load("tiny", directory).check()

    def test_to_be_tested_on_does_not_read_its_training_images(self):
        directory = records.tfds_set(self, (8, 8, 1), (), 8, train=9, test=3)
        preprocessing = views.Preprocessing(8, 1, None, [0.5])
        dataset = datasets.load("tiny", directory, preprocessing=preprocessing)
        images, _ = dataset.test_images(3)  # the training images are broken
        self.assertLen(images, 3)

    def test_record_has_the_version_and_the_sizes(self):
        directory = records.tfds_set(self, (8, 8, 1), train=9, test=7)
        self.assertEqual(
            datasets.load("tiny", directory).record,
            {"version": "1.0.0", "config": None, "train": 9, "test": 7},
        )

    @parameterized.parameters(
        "huggingface:mnist",
        "kaggle:mnist",
        "tiny/data_dir=/tmp",
        "tiny/a=1,b=2",
        "../tiny",
        "tiny/../tiny",
        "/tiny",
        "os.path",
        "tiny:latest",
        "",
        "tiny ",
        "tiny\n",
        "\ud800",
        "gs://tiny",
    )
    def test_has_a_plain_name(self, name):
        with (
            mock.patch("tensorflow_datasets.builder") as builder,
            self.assertRaisesRegex(ValueError, "name of a data set must be"),
        ):
            datasets.load(name)
        builder.assert_not_called()

    def test_without_train(self):
        directory = records.tfds_set(self, (8, 8, 1), test=7)
        with self.assertRaisesRegex(ValueError, "train; tiny has test"):
            datasets.load("tiny", directory)

    @parameterized.parameters(
        ("cifar10", (32, 32, 3), 10),
        ("mnist", (28, 28, 1), 10),
        ("imagenet2012", (224, 224, 3), 1000),
    )
    def test_has_the_sizes_of_its_features(self, name, shape, classes):
        import tensorflow_datasets as tfds

        with tfds.testing.mock_data(num_examples=6):
            dataset = datasets.load(name)
            self.assertEqual(dataset.image_shape, shape)
            self.assertEqual(dataset.classes, classes)
            ((images, labels),) = images_lib.batches(
                dataset.train_batches(8, 0), 1
            )
        self.assertEqual(images.shape, (8, *shape))
        self.assertTrue(np.all(labels < classes))

    def test_that_is_unknown_is_an_error_with_near_names(self):
        with self.assertRaisesRegex(ValueError, "'cifar11'.* cifar10"):
            datasets.load("cifar11")
        with self.assertRaisesRegex(ValueError, "'digit'.* digits"):
            datasets.load("digit")

    def test_that_is_no_image_classification_set(self):
        with self.assertRaisesRegex(ValueError, "image of 8 bits and a label"):
            datasets.load("imdb_reviews", records.scratch(self))

    def test_that_cannot_be_downloaded_leaves_nothing_behind(self):
        directory = records.scratch(self)
        offline = urllib.error.URLError(socket.gaierror("no such host"))
        with (
            mock.patch("urllib.request.urlopen", side_effect=offline),
            self.assertRaisesRegex(
                FileNotFoundError,
                "cifar100 is not in .*no such host.*tfds build cifar100",
            ),
        ):
            datasets.load("cifar100", directory)
        self.assertEqual(os.listdir(directory), [])

    def test_that_has_to_be_fetched_by_hand_says_how(self):
        with (
            mock.patch("urllib.request.urlopen"),
            self.assertRaisesRegex(FileNotFoundError, "image-net.org"),
        ):
            datasets.load("imagenet2012", records.scratch(self))

    def test_cifar10_is_the_published_one(self):
        root = pathlib.Path(os.environ.get("KERAS_RESNET_DATA", "")) / "tfds"
        if not (root / "cifar10").is_dir():
            self.skipTest("KERAS_RESNET_DATA has no tfds/cifar10")
        dataset = datasets.load("cifar10", root)
        self.assertEqual(
            (dataset.train_size, dataset.test_size), (50_000, 10_000)
        )
        self.assertEqual(dataset.labels[0], "airplane")
        # The means of the channels that everybody uses.
        np.testing.assert_allclose(
            dataset.preprocessing.mean.mean((0, 1)),
            [0.4914, 0.4822, 0.4465],
            atol=5e-5,
        )
        labels = np.concatenate(
            [labels for _, labels in dataset.test_batches(1000)]
        )
        self.assertEqual(np.bincount(labels).tolist(), [1000] * 10)


FEATURES, INFO = "features.json", "dataset_info.json"
FEATURES_DICT = "tensorflow_datasets.core.features.features_dict.FeaturesDict"


def label_of(fields, value):
    fields["featuresDict"]["features"]["label"] = value


class StrangersTfdsTest(parameterized.TestCase):
    """A directory of TFDS that somebody else wrote runs no code of theirs."""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        directory = records.tfds_set(cls, (8, 8, 1), train=9, test=4)
        cls.prepared = pathlib.Path(directory) / "tiny/1.0.0"

    def setUp(self):
        super().setUp()
        self.root = pathlib.Path(records.scratch(self))
        self.directory = self.root / "data/tiny/1.0.0"
        shutil.copytree(self.prepared, self.directory)

    def change(self, name, function):
        path = self.directory / name
        fields = json.loads(path.read_text())
        path.write_text(json.dumps(function(fields) or fields))

    def assert_is_one_line(self, message="cannot read the data set tiny"):
        with self.assertRaisesRegex(ValueError, message) as raised:
            datasets.load("tiny", self.root / "data")
        self.assertNotIn("\n", str(raised.exception))

    @parameterized.named_parameters(
        ("whole", FEATURES, lambda fields: {"pythonClassName": "stranger.A"}),
        (
            "nested",
            FEATURES,
            lambda fields: label_of(fields, {"pythonClassName": "stranger.A"}),
        ),
        (
            "other_spelling",
            FEATURES,
            lambda fields: label_of(
                fields, {"python_class_name": "stranger.A"}
            ),
        ),
        (
            "old_form",
            FEATURES,
            lambda fields: {"type": "stranger.A", "content": {}},
        ),
        (
            "old_form_in_text",
            FEATURES,
            lambda fields: label_of(
                fields,
                {
                    "pythonClassName": FEATURES_DICT,
                    "jsonFeature": {
                        "json": json.dumps(
                            {"a": {"type": "stranger.A", "content": {}}}
                        )
                    },
                },
            ),
        ),
        (
            "in_the_description",
            INFO,
            lambda fields: fields.update(
                features={
                    "pythonClassName": "stranger.A",
                    "jsonFeature": {"json": "{}"},
                }
            ),
        ),
    )
    def test_class_of_another_package_is_not_imported(self, name, function):
        trace = self.root / "trace"
        (self.root / "stranger.py").write_text(
            f"open({str(trace)!r}, 'w').close()"
        )
        self.enter_context(
            mock.patch.object(sys, "path", [str(self.root), *sys.path])
        )
        self.change(name, function)
        self.assert_is_one_line("'stranger.A', which is not imported")
        self.assertFalse(trace.exists())
        self.assertNotIn("stranger", sys.modules)

    @parameterized.product(
        name=[FEATURES, INFO],
        text=["", "[]", "5", "null", "{}", "[" * 100_000, '{"a": {', b"\xff"],
    )
    def test_file_that_is_malformed(self, name, text):
        if isinstance(text, str):
            text = text.encode()
        (self.directory / name).write_bytes(text)
        self.assert_is_one_line()

    @parameterized.parameters(
        ("name", 5),
        ("version", "x"),
        ("splits", 5),
        ("splits", []),
        ("splits", [{"name": "train"}]),
        ("splits", [{"name": "train", "shardLengths": ["-5"]}]),
        ("fileFormat", "stranger"),
        ("supervisedKeys", 5),
    )
    def test_description_with_a_wrong_field(self, field, value):
        self.change(INFO, lambda fields: fields.update({field: value}))
        self.assert_is_one_line()

    @parameterized.parameters("999999999999", "0", "2", "4", None)
    def test_number_of_classes_is_that_of_the_labels(self, count):
        def change(fields):
            features = fields["featuresDict"]["features"]
            features["label"]["classLabel"]["numClasses"] = count

        self.change(FEATURES, change)
        self.assert_is_one_line("data set tiny must have")

    @parameterized.parameters("a\na\na\n", "a\nb\n", "a\nb\nc\nd\n")
    def test_labels_have_different_names(self, text):
        (self.directory / "label.labels.txt").write_text(text)
        self.assert_is_one_line("must have 3 different names")

    def test_number_of_images_is_that_of_the_files(self):
        def change(fields):
            fields["splits"][0]["shardLengths"] = ["3", "3", "4"]

        self.change(INFO, change)
        self.assert_is_one_line()

    @parameterized.parameters(FEATURES, INFO, "label.labels.txt", "tfrecord")
    def test_files_are_regular_ones(self, name):
        path = next(self.directory.glob(f"*{name}*"))
        path.unlink()
        os.mkfifo(path)
        self.assert_is_one_line(f"{path.name} must be a regular file.* a pipe")
        path.unlink()
        if name != "tfrecord":
            with open(path, "wb") as file:
                file.truncate(10**11)
            self.assert_is_one_line(f"{path.name} must have at most")


if __name__ == "__main__":
    absltest.main()
