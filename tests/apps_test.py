"""Programs, each on the files of the program before."""

import json
import os
import tempfile
from pathlib import Path
from unittest import mock

import keras
import numpy as np
import pytest
import tensorflow as tf
from absl.testing import absltest
from absl.testing import parameterized

import keras_resnet
from keras_resnet.data import datasets
from tests import programs

TINY = keras_resnet.Spec("tiny", (1, 1), (8, 16), stem="cifar", shortcut="A")


class ChainTest(parameterized.TestCase):
    """Runs train, evaluate, export and predict, as a newcomer does."""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        patch = mock.patch.dict(keras_resnet.MODELS, {"tiny": TINY})
        patch.start()
        cls.addClassCleanup(patch.stop)
        directory = tempfile.TemporaryDirectory()
        cls.addClassCleanup(directory.cleanup)
        cls.root = Path(directory.name)
        cls.workdir = cls.root / "run"
        cls.trained = programs.run(
            "train",
            "--model=tiny",
            f"--workdir={cls.workdir}",
            "--steps=120",
            "--log_every=40",
        )
        cls.exported = programs.run(
            "export",
            f"--workdir={cls.workdir}",
            f"--export_dir={cls.root}/exports",
        )

    def test_training_reports_and_ends_in_json(self):
        self.assertEqual(self.trained.code, 0, self.trained.err)
        self.assertIn(
            "tiny on digits by the recipe digits", self.trained.out[0]
        )
        result = json.loads(self.trained.out[-1])
        self.assertEqual(result["step"], 120)
        self.assertEqual(result["test_images"], 355)
        self.assertLess(result["test_top1_error"], 30.0)
        self.assertGreater(result["images_per_second"], 0)

    def test_every_evaluation_gives_the_error_of_training(self):
        result = json.loads(self.trained.out[-1])
        for arguments in (
            [f"--workdir={self.workdir}"],
            [f"--saved_model={self.root}/exports", "--dataset=digits"],
        ):
            outcome = programs.run("evaluate", *arguments)
            self.assertEqual(outcome.code, 0, outcome.err)
            evaluated = json.loads(outcome.out[-1])
            self.assertEqual(evaluated["images"], 355)
            np.testing.assert_allclose(
                evaluated["top1_error"], result["test_top1_error"], rtol=1e-6
            )
            np.testing.assert_allclose(
                evaluated["loss"], result["test_loss"], rtol=1e-3
            )

    def test_weights_of_a_file_are_evaluated(self):
        model = keras_resnet.resnet("tiny", input_shape=(8, 8, 1), classes=10)
        path = f"{self.root}/tiny.weights.h5"
        model.save_weights(path)
        flags = ("--model=tiny", f"--weights={path}", "--dataset=digits")
        outcome = programs.run(
            "evaluate", *flags, "--mean=0.5", "--standard_deviation=0.25"
        )
        self.assertEqual(outcome.code, 0, outcome.err)
        dataset = datasets.load("digits")
        images, labels = dataset.test_images(355)
        best = np.argmax(model((images / 255.0 - 0.5) / 0.25), axis=1)
        errors = int(np.sum(best != labels))
        result = json.loads(outcome.out[-1])
        self.assertEqual(result["top1_errors"], errors)
        outcome = programs.run("evaluate", *flags, "--mean=1,2")
        self.assertRegex(outcome.err[0], "--mean=1,2: mean must have the shape")

    @pytest.mark.slow
    def test_weights_of_keras_applications_see_their_own_pixels(self):
        """Compares blue first and Caffe's mean with other preprocessing."""
        keras.utils.set_random_seed(0)
        theirs = keras.applications.ResNet50(
            weights=None, input_shape=(32, 32, 3), classes=10
        )
        path = f"{self.root}/theirs.weights.h5"
        theirs.save_weights(path)
        outcome = programs.run(
            "evaluate",
            "--model=resnet50",
            f"--weights={path}",
            "--dataset=synthetic",
            "--set=model.batch_norm_epsilon=1.001e-5",
        )
        self.assertEqual(outcome.code, 0, outcome.err)
        images, labels = datasets.load("synthetic").test_images(200)
        prepare = keras.applications.resnet.preprocess_input
        errors, others = (
            int(np.sum(np.argmax(theirs(pixels), axis=1) != labels))
            for pixels in (
                prepare(images.astype("float32")),
                images.astype("float32") / 255 - 0.5,
            )
        )
        self.assertNotEqual(errors, others)
        result = json.loads(outcome.out[-1])
        self.assertEqual(result["top1_errors"], errors)

    def test_prediction_answers_as_the_network_does(self):
        paths = datasets.write_examples(
            datasets.load("digits"), self.root / "pictures"
        )
        outcome = programs.run(
            "predict", f"--saved_model={self.root}/exports", "--json", *paths
        )
        self.assertEqual(outcome.code, 0, outcome.err)
        answers = [json.loads(line) for line in outcome.out]
        self.assertLen(answers, 10)
        right = [
            answer["predictions"][0]["label"]
            == Path(answer["image"]).stem.rpartition("_")[2]
            for answer in answers
        ]
        self.assertGreaterEqual(sum(right), 6)

    def test_same_command_trains_nothing_twice(self):
        outcome = programs.run(
            "train",
            "--model=tiny",
            f"--workdir={self.workdir}",
            "--steps=120",
            "--log_every=40",
        )
        self.assertIn("has all its 120 steps already", "\n".join(outcome.out))

    @pytest.mark.slow
    def test_checkpoint_of_another_recipe_is_refused(self):
        outcome = programs.run(
            "train", "--model=tiny", f"--workdir={self.workdir}", "--steps=60"
        )
        self.assertEqual(outcome.code, 2)
        self.assertLen(outcome.err, 1)
        self.assertIn("--workdir=", outcome.err[0])
        self.assertIn("recipe.steps was 120, is 60", outcome.err[0])


DIGITS = ("--model=resnet20", "--weights=no.h5", "--dataset=digits")


class UsageTest(parameterized.TestCase):
    @parameterized.parameters(
        (
            ["--model=resnet2O"],
            2,
            "--model=resnet2O: unknown network.*resnet20",
        ),
        (["--dataset=digts"], 2, "--dataset=digts: unknown.*digits"),
        (["--modle=resnet20"], 2, "unknown flag --modle .did you mean --model"),
        (["--steps=many"], 2, "--steps=many"),
        (["--steps=0"], 2, "--steps=0"),
        (["--recipe=cifar"], 2, "--recipe=cifar: .*cifar10"),
        (["--batch_size=0"], 2, "--batch_size=0: .*at least 1"),
        (["--dtype=float8"], 2, "--dtype=float8: .*mixed_bfloat16"),
        (["--set=learning_rate=1"], 2, "expected recipe.NAME=VALUE or"),
        (["--set=recipe.rate=1"], 2, "--set=recipe.rate=1: .*learning_rate"),
        (
            ["--set=model.shortcut=D"],
            2,
            "--set=model.shortcut=D: shortcut must",
        ),
        (
            ["--set=recipe.augmentation=flip"],
            2,
            "--set=recipe.augmentation=flip: unknown augmentation",
        ),
        (["--set=recipe.momentum=2"], 2, "momentum=2: momentum must be"),
        (["--seed=-1"], 2, "--seed=-1"),
        (["--linear_scaling"], 2, "--linear_scaling=True: .*--batch_size"),
        (["--minutes=1", "--steps=2"], 2, "--minutes=1.0: cannot be combined"),
        (["--profile_steps=3"], 2, "--profile_steps=3: must be two steps A,B"),
        (
            ["--profile_steps=5,3"],
            2,
            "--profile_steps=5,3: must be two steps",
        ),
        (["--strategy=all", "--num_devices=2"], 2, "--strategy=all: .*auto"),
        (["--set=model.unit=plain"], 2, "--set=model.unit=plain: unit must be"),
        (["resnet20"], 2, "unexpected argument resnet20"),
        (["--dataset=folder:nowhere"], 1, "nowhere"),
    )
    def test_mistakes_are_one_line_and_leave_nothing(
        self, arguments, code, message
    ):
        directory = self.enter_context(tempfile.TemporaryDirectory())
        outcome = programs.run(
            "train", f"--workdir={directory}/run", *arguments
        )
        self.assertLen(outcome.err, 1)
        self.assertRegex(outcome.err[0], "^train: .*" + message)
        self.assertEqual(outcome.code, code)
        self.assertEqual(os.listdir(directory), [])

    @parameterized.parameters(
        ([], "give one of"),
        (["--workdir=a", "--model=b"], "give one of"),
        (["--workdir=nowhere"], "--workdir=nowhere: .*without config.json"),
        (
            ["--saved_model=nowhere", "--dataset=digits"],
            "--saved_model=nowhere",
        ),
        (["--model=resnet20", "--weights=no.h5", "--dataset=digits"], "no.h5"),
        (
            ["--model=resnet20", "--weights=cifar10"],
            "--dataset=: name the test images",
        ),
        (["--model=resnet20", "--dataset=digits"], "--weights=: name a file"),
        (["--model=resnet20", "--protocol=double"], "protocol"),
        (["--workdir=a", "--weights=b"], "--weights=b: cannot be combined"),
        ([*DIGITS, "--mean=grey"], "--mean=grey: must be numbers"),
        (
            ["--workdir=a", "--confusion_matrix=s3://b/c.csv"],
            "--confusion_matrix=s3://b/c.csv: .* must be a local path",
        ),
    )
    def test_evaluation_refuses_what_it_cannot_do(self, arguments, message):
        outcome = programs.run("evaluate", *arguments)
        self.assertLen(outcome.err, 1)
        self.assertRegex(outcome.err[0], message)
        self.assertEqual(outcome.code, 2)

    def test_images_of_other_classes_are_refused(self):
        root = self.enter_context(tempfile.TemporaryDirectory())
        for i in range(10):
            path = Path(root, "ab"[i % 2], f"{i}.png")
            path.parent.mkdir(exist_ok=True)
            picture = tf.fill((32, 32, 3), tf.cast(i, "uint8"))
            path.write_bytes(tf.io.encode_png(picture).numpy())
        outcome = programs.run(
            "evaluate",
            "--saved_model=savedmodels/resnet20_cifar10",
            f"--dataset=folder:{root}",
        )
        self.assertEqual(outcome.code, 2)
        (line,) = outcome.err
        self.assertRegex(line, "--dataset=.*10 classes, the images have 2")

    def test_help_is_no_error(self):
        for name in ("train", "evaluate", "export", "predict"):
            outcome = programs.run(name, "--help")
            self.assertEqual((outcome.code, outcome.err), (0, []))
            text = "\n".join(outcome.out)
            self.assertIn(f"python -m apps.{name} ", text)
            self.assertRegex(text, r"\n  --(workdir|saved_model): \w")

    def test_image_that_does_not_decode_is_named(self):
        root = Path(self.enter_context(tempfile.TemporaryDirectory()))
        picture = tf.io.encode_jpeg(tf.zeros((16, 16, 3), "uint8")).numpy()
        for i in range(20):
            path = root / "pictures" / "ab"[i % 2] / f"{i}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(picture if i else b"no picture")
        outcome = programs.run(
            "train",
            f"--dataset=folder:{root}/pictures",
            f"--workdir={root}/run",
            "--steps=2",
            "--batch_size=8",
        )
        self.assertEqual(outcome.code, 2)  # small images are read at the start
        self.assertLen(outcome.err, 1)
        self.assertRegex(outcome.err[0], "--dataset=.*a/0.jpg")

    @parameterized.parameters("train", "test")
    def test_photo_that_does_not_decode_is_named(self, split):
        root = Path(self.enter_context(tempfile.TemporaryDirectory()))
        for i in range(8):
            size = (150 + i, 140, 3)
            picture = tf.io.encode_jpeg(tf.zeros(size, "uint8")).numpy()
            path = root / "photos" / ("train", "test")[i // 4] / "ab"[i % 2]
            path.mkdir(parents=True, exist_ok=True)
            (path / f"{i}.jpg").write_bytes(picture)
        bad = root / "photos" / split / "b" / "bad.jpg"
        bad.write_bytes(picture[:200])
        outcome = programs.run(
            "train",
            f"--dataset=folder:{root}/photos",
            f"--workdir={root}/run",
            "--model=resnet20",
            "--recipe=cifar10",
            "--set=recipe.image_size=32",
            "--steps=1",
            f"--batch_size={5 if split == 'train' else 4}",  # all of them
        )
        self.assertEqual(outcome.code, 2)
        self.assertIn(f"{split}/b/bad.jpg", outcome.err[-1])
        self.assertFalse((root / "run").exists())

    def test_failure_of_tensorflow_is_one_line(self):
        error = tf.errors.ResourceExhaustedError(None, None, "no memory\nleft")
        with mock.patch.object(datasets, "load", side_effect=error):
            outcome = programs.run("train")
        self.assertEqual(outcome.code, 1)
        self.assertEqual(outcome.err, ["train: no memory left"])

    def test_mistake_of_ours_has_its_trace(self):
        with (
            mock.patch.object(datasets, "load", side_effect=TypeError("bug")),
            self.assertRaisesRegex(TypeError, "bug"),
        ):
            programs.run("train")


if __name__ == "__main__":
    absltest.main()
