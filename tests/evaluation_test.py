"""Errors are counted once for every image, with any protocol."""

import json
import os
import tempfile
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from absl.testing import absltest
from absl.testing import parameterized

import keras_resnet
from keras_resnet.data import datasets
from keras_resnet.data import views
from keras_resnet.training import evaluation
from keras_resnet.training import step
from tests import records
from tests import runs


def batches(logits, labels, size):
    """Batches of (logits, labels); the last may be smaller."""
    for start in range(0, len(labels), size):
        part = slice(start, start + size)
        yield tf.constant(logits[part]), tf.constant(labels[part], "int32")


class EvaluationTest(parameterized.TestCase):
    @parameterized.parameters(1, 7, 64, 100, 1000)
    def test_errors_are_those_of_numpy_for_every_batch_size(self, size):
        rng = np.random.default_rng(0)
        logits = rng.normal(size=(100, 10)).astype("float32")
        labels = rng.integers(0, 10, 100)
        result = evaluation.evaluate(lambda x: x, batches(logits, labels, size))
        order = np.argsort(-logits, axis=1)
        self.assertEqual(result.images, 100)
        self.assertEqual(result.top1_errors, np.sum(order[:, 0] != labels))
        in_top5 = (order[:, :5] == labels[:, None]).any(1)
        self.assertEqual(result.top5_errors, np.sum(~in_top5))
        log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        loss = -log_p[np.arange(100), labels].mean()
        np.testing.assert_allclose(result.loss, loss, rtol=1e-5)
        self.assertEqual(result.top1_error, float(result.top1_errors))

    def test_few_classes_have_no_top5_errors(self):
        logits = np.eye(3, dtype="float32")
        result = evaluation.evaluate(
            lambda x: x, batches(logits, np.array([1, 1, 1]), 2)
        )
        self.assertEqual((result.top1_errors, result.top5_errors), (2, 0))

    def test_equal_scores_are_those_of_the_first_class(self):
        """A network that tells no classes apart is right as often as chance."""
        logits = np.zeros((10, 10), "float32")
        result = evaluation.evaluate(
            lambda x: x, batches(logits, np.arange(10), 4)
        )
        self.assertEqual((result.top1_errors, result.top5_errors), (9, 5))

    def test_a_class_that_cannot_be_makes_no_error_of_a_right_one(self):
        with np.errstate(divide="ignore"):
            logits = np.log(np.array([[1, 0, 0], [0.2, 0.8, 0]], "float32"))
        result = evaluation.evaluate(
            lambda x: x, batches(logits, np.array([0, 1]), 2)
        )
        self.assertEqual(result.top1_errors, 0)

    def test_filler_does_not_count_whatever_it_holds(self):
        rng = np.random.default_rng(0)
        logits = rng.normal(size=(5, 3)).astype("float32")
        labels = np.array([0, 1, 2, 0, 1], "int32")
        counted = np.ones(5, "float32")
        expected = step.count_errors(logits, labels, counted)
        found = step.count_errors(
            np.concatenate([logits, np.full((2, 3), np.nan, "float32")]),
            np.r_[labels, 0, 0].astype("int32"),
            np.r_[counted, 0, 0].astype("float32"),
        )
        np.testing.assert_allclose(found, expected, rtol=1e-6)

    def test_no_images_are_refused(self):
        with self.assertRaisesRegex(ValueError, "at least one test image"):
            evaluation.evaluate(lambda x: x, [])


def dataset_of(kind, test):
    """Test images of 8 x 8, or photos for a network of 32 x 32."""
    if kind == "small":
        return datasets.load("digits").with_validation()  # fewer of them
    directory = records.tfds_set(test, (None, None, 3), train=8, test=11)
    return datasets.load("tiny", directory, image_size=32)


class ProtocolTest(parameterized.TestCase):
    @parameterized.parameters("small", "photos")
    def test_ten_crops_are_corners_and_centre_and_their_mirror_images(
        self, kind
    ):
        dataset = dataset_of(kind, self)
        views, _ = next(iter(dataset.test_batches(3, protocol="ten_crop")))
        size = dataset.image_shape[0]
        self.assertEqual(views.shape, (3, 10, *dataset.image_shape))
        if kind == "small":
            images, _ = next(iter(dataset.test_batches(3)))
            margin = size // 8
            pad = [(0, 0), (margin, margin), (margin, margin), (0, 0)]
            whole = np.pad(images, pad)
        else:
            split = dataset._test
            image, _ = next(split.decoded())
            height, width = image.shape[:2]
            shorter = round(size * 256 / 224)
            sides = [
                shorter * height // min(height, width),
                shorter * width // min(height, width),
            ]
            resized = tf.image.resize(image, sides, antialias=True)
            pixels = tf.cast(tf.round(resized), "uint8")
            whole = dataset.preprocessing(pixels).numpy()[None]
        high, wide = (side - size for side in whole.shape[1:3])
        places = [
            (0, 0),
            (0, wide),
            (high, 0),
            (high, wide),
            (high // 2, wide // 2),
        ]
        for i, (top, left) in enumerate(places):
            crop = whole[:, top : top + size, left : left + size]
            count = len(crop)
            np.testing.assert_allclose(views[:count, i], crop, atol=1e-6)
            np.testing.assert_allclose(
                views[:count, i + 5], crop[:, :, ::-1], atol=1e-6
            )

    @parameterized.parameters("small", "photos")
    def test_scales_are_those_of_the_paper(self, kind):
        """The shorter side at 224, 256, 384, 480, 640 of 224."""
        dataset = dataset_of(kind, self)
        views, labels = next(
            iter(dataset.test_batches(3, protocol="multi_scale"))
        )
        size = dataset.image_shape[0]
        self.assertLen(labels, 3 if kind == "small" else 1)
        expected = [
            round(size * scale / 224) for scale in (224, 256, 384, 480, 640)
        ]
        self.assertEqual([min(view.shape[1:3]) for view in views], expected)

    @parameterized.product(kind=["small", "photos"], protocol=views.PROTOCOLS)
    @pytest.mark.slow
    def test_scores_are_averaged_and_every_image_counts_once(
        self, kind, protocol
    ):
        """Against softmax in NumPy, image by image."""
        dataset = dataset_of(kind, self)
        keras.utils.set_random_seed(0)
        model = keras_resnet.resnet(
            runs.TINY,
            input_shape=dataset.image_shape,
            classes=dataset.classes,
            classifier_activation=None,
        )
        model = evaluation.any_size(model)
        confusion = np.zeros([dataset.classes] * 2, int)
        loss = 0.0
        for seen, labels in dataset.test_batches(1, protocol):
            seen = seen if isinstance(seen, tuple) else (seen,)
            scores = []
            for view in seen:
                view = np.reshape(view, (-1, *view.shape[-3:]))
                logits = np.array(model(view, training=False), "float64")
                e = np.exp(logits - logits.max(1, keepdims=True))
                scores.append((e / e.sum(1, keepdims=True)).mean(0))
            score = np.mean(scores, 0)
            confusion[int(labels[0]), score.argmax()] += 1
            loss -= np.log(score[int(labels[0])])
        errors = confusion.sum() - confusion.trace()
        evaluator = evaluation.Evaluator(
            lambda images: model(images, training=False)
        )
        for batch_size in (1, 3, 10**15):
            self.assertEqual(dataset.test_size % 3, 2)  # the last is not full
            result = evaluator(
                dataset, batch_size, protocol, counts_classes=True
            )
            self.assertEqual(result.images, dataset.test_size)
            np.testing.assert_array_equal(result.confusion, confusion)
            answers = result.answers
            self.assertLen(answers.labels, dataset.test_size)
            again = np.zeros_like(confusion)
            np.add.at(again, (answers.labels, answers.predictions), 1)
            np.testing.assert_array_equal(again, confusion)
            self.assertEqual(result.top1_errors, errors)
            np.testing.assert_allclose(
                result.loss, loss / dataset.test_size, rtol=1e-4
            )
            of_classes = result.per_class(dataset.labels)
            self.assertEqual(
                sum(row["top1_errors"] for row in of_classes.values()), errors
            )
            lines = result.confusion_csv(dataset.labels).splitlines()
            self.assertEqual(lines[0], ",".join(["label", *dataset.labels]))
            self.assertLen(lines, dataset.classes + 1)

    def test_unknown_protocol_is_refused(self):
        with self.assertRaisesRegex(ValueError, "'ten'.* ten_crop"):
            datasets.load("digits").test_batches(1, protocol="ten")


class KerasTest(parameterized.TestCase):
    """`evaluate`, `predict` and `fit` of Keras count every image once."""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        keras.utils.set_random_seed(0)
        cls.dataset = datasets.load("digits").with_validation()
        cls.model = keras_resnet.resnet(
            runs.TINY, input_shape=cls.dataset.image_shape, classes=10
        )
        cls.model.compile(
            keras.optimizers.SGD(0.0),
            "sparse_categorical_crossentropy",
            metrics=[
                "accuracy",
                keras.metrics.SparseTopKCategoricalAccuracy(5, "top5"),
            ],
        )
        views, labels = cls.dataset.test_images(cls.dataset.test_size)
        images = cls.dataset.preprocessing(views).numpy()
        cls.predicted = cls.model.predict(images, verbose=0)
        order = np.argsort(-cls.predicted, axis=1)
        of_labels = cls.predicted[np.arange(len(labels)), labels]
        cls.expected = {
            "accuracy": np.mean(order[:, 0] == labels),
            "top5": np.mean((order[:, :5] == labels[:, None]).any(1)),
            "loss": -np.log(of_labels).mean(),
        }

    @parameterized.parameters(1, 3, 64, 140, 10**12)
    def test_metrics_are_those_of_numpy(self, batch_size):
        batches = self.dataset.test_batches(batch_size)
        self.assertLen(batches, -(-140 // batch_size))
        found = self.model.evaluate(batches, verbose=0, return_dict=True)
        for name, value in self.expected.items():
            np.testing.assert_allclose(found[name], value, rtol=1e-5)
        predicted = self.model.predict(batches, verbose=0)
        np.testing.assert_allclose(predicted, self.predicted, atol=1e-6)

    def test_validation_data_of_fit(self):
        # Frozen except the classifier, whose rate is 0: nothing changes.
        keras_resnet.freeze(self.model, but=("predictions",))
        history = self.model.fit(
            self.dataset.train_batches(8, seed=0),
            steps_per_epoch=1,
            shuffle=False,
            verbose=0,
            class_weight=dict.fromkeys(range(10), 2.0),
            validation_data=self.dataset.test_batches(64),
        ).history
        for name, value in self.expected.items():
            np.testing.assert_allclose(
                history[f"val_{name}"][0], value, rtol=1e-5
            )


class DevicesTest(parameterized.TestCase):
    def evaluate(self, *arguments):
        root = self.enter_context(tempfile.TemporaryDirectory())
        run = runs.Process(
            root,
            "evaluate",
            arguments,
            {"DECODED": os.environ.get("DECODED", "")},
        )
        self.assertEqual(run.wait(), 0, run.err)
        return json.loads(run.out[-1])

    @pytest.mark.slow
    def test_three_devices_count_as_one(self):
        root = Path(self.enter_context(tempfile.TemporaryDirectory()))
        model = keras_resnet.resnet(
            runs.TINY, input_shape=(8, 8, 1), classes=10
        )
        path = f"{root}/tiny.weights.h5"
        model.save_weights(path)
        flags = ("--model=tiny", f"--weights={path}", "--dataset=digits")
        found = [
            self.evaluate(*flags, f"--batch_size={size}", *devices)
            for size, devices in (
                (100, ()),
                (7, ("--num_devices=3",)),
                (1000, ("--num_devices=3", "--per_class")),
            )
        ]
        for result in found:
            self.assertEqual(result["images"], 355)
            self.assertEqual(result["top1_errors"], found[0]["top1_errors"])
            self.assertEqual(result["top5_errors"], found[0]["top5_errors"])
        self.assertLen(found[-1]["classes"], 10)

    @pytest.mark.large
    @absltest.skipUnless(os.path.isdir(runs.CIFAR10), "needs CIFAR-10")
    def test_published_network_has_its_published_error(self):
        """8.27% (pytorch_resnet_cifar10), for any batch and any devices."""
        decoded = self.enter_context(tempfile.TemporaryDirectory())
        os.environ["DECODED"] = decoded
        self.addCleanup(os.environ.pop, "DECODED")
        weights = Path(runs.CIFAR10).parent / "weights/resnet20-12fca82f.th"
        for devices in (1, 3):
            for size in (1, 7, 128, 1000):
                result = self.evaluate(
                    "--model=resnet20",
                    f"--weights={weights}",
                    "--dataset=cifar10",
                    f"--data_dir={runs.CIFAR10}",
                    "--mean=.485,.456,.406",
                    "--standard_deviation=.229,.224,.225",
                    '--set=model.shortcut=A(zeros="both")',
                    f"--batch_size={size}",
                    f"--num_devices={devices}",
                )
                print(devices, size, result)
                self.assertEqual(result["images"], 10_000)
                self.assertEqual(result["top1_errors"], 827)


if __name__ == "__main__":
    absltest.main()
