"""The program apps.export."""

import os
import shutil
import signal
import tempfile
from unittest import mock

import pytest
from absl.testing import absltest
from absl.testing import parameterized

import keras_resnet
from keras_resnet.data import datasets
from keras_resnet.serving import client
from keras_resnet.serving import export
from keras_resnet.serving import model_card
from keras_resnet.serving import warmup
from tests import exports
from tests import programs


class ProgramTest(parameterized.TestCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        folder = tempfile.TemporaryDirectory()
        cls.addClassCleanup(folder.cleanup)
        cls.folder = folder.name
        cls.workdir = os.path.join(cls.folder, "run")
        spec = keras_resnet.Spec(
            "small", (1,), (8,), stem="cifar", classes=10, image_size=8
        )
        cls.spec = mock.patch.dict(keras_resnet.MODELS, {"small": spec})
        cls.spec.start()
        cls.addClassCleanup(cls.spec.stop)
        outcome = programs.run(
            "train",
            "--model=small",
            f"--workdir={cls.workdir}",
            "--steps=30",
        )
        assert outcome.code == 0, outcome.err
        model = keras_resnet.resnet("small", input_shape=(8, 8, 1))
        model.save(os.path.join(cls.folder, "network.keras"))
        model.save_weights(os.path.join(cls.folder, "some.weights.h5"))
        keras_resnet.resnet("small").save(
            os.path.join(cls.folder, "colour.keras")
        )

    def export(self, *arguments, source=None):
        """The outcome, and the directory of versions."""
        export_dir = os.path.join(exports.scratch(self), "exported")
        source = source or [f"--workdir={self.workdir}"]
        source = [argument.format(self.folder) for argument in source]
        outcome = programs.run(
            "export", f"--export_dir={export_dir}", *source, *arguments
        )
        return outcome, export_dir

    @parameterized.parameters("float32", "bfloat16", "int8", "int8_weights")
    @pytest.mark.slow
    def test_program_exports_a_work_directory_that_is_checked(self, precision):
        outcome, export_dir = self.export(f"--precision={precision}")
        self.assertEqual((outcome.code, outcome.err), (0, []))
        self.assertIn("small after 30 steps, 10 labels", outcome.out[0])
        self.assertRegex(
            outcome.out[1],
            "saved_model: predicts the network's class for 3[45]. of 355 of "
            "the test images of digits",
        )
        self.assertRegex(
            outcome.out[2],
            "error on 355 of the test images of digits: [0-9.]+%, by chance "
            "89[.][0-9]+%, in training [0-9.]+%",
        )
        self.assertEqual(outcome.out[-2], f"exported {export_dir}/1")
        self.assertIn(f"--saved_model={export_dir}", outcome.out[-1])
        server = exports.served(self, os.path.join(export_dir, "1"))
        images = datasets.load("digits").test_images(2)[0]
        self.assertLen(server.ask("images", images=images)["classes"], 2)
        card = model_card.read(os.path.join(export_dir, "1"))
        self.assertEqual(card["data"], "digits")
        self.assertEqual(card["recipe"]["steps_done"], 30)
        self.assertEqual(card["precision"], precision)
        self.assertEqual(card["checks"]["saved_model"]["images"], 355)

    @pytest.mark.slow
    def test_int8_is_calibrated_on_images_of_the_user(self):
        outcome, export_dir = self.export(
            "--precision=int8",
            f"--calibration_images={exports.CAT},{exports.CAT}",
            source=["--model=small"],
        )
        self.assertEqual((outcome.code, outcome.err), (0, []))
        card = model_card.read(os.path.join(export_dir, "1"))
        self.assertEqual(card["int8"]["calibration_images"], 2)
        self.assertEqual(card["checked_on"], "2 calibration images")

    @parameterized.parameters(
        (
            [
                "--model={}/network.keras",
                "--dataset=digits",
                "--preprocessing=dataset",
            ],
            "network.keras, preprocessing dataset, 10 labels",
        ),
        (
            ["--model={}/colour.keras", "--preprocessing=none"],
            "colour.keras, preprocessing none, 10 labels",
        ),
        (["--model=small"], "small with random weights"),
        (
            [
                "--model=small",
                "--weights={}/some.weights.h5",
                "--dataset=digits",
                "--mean=0.5",
            ],
            "small with .*some.weights.h5",
        ),
        (
            ["--model=small", "--set=model.shortcut=C", "--labels={}/labels"],
            "3 labels, views of 8x8",
        ),
    )
    @pytest.mark.slow
    def test_program_exports_files_and_names(self, source, title):
        with open(os.path.join(self.folder, "labels"), "w") as file:
            file.write("one\ntwo\nthree\n")
        outcome, export_dir = self.export("--check_images=40", source=source)
        self.assertEqual((outcome.code, outcome.err), (0, []))
        self.assertRegex(outcome.out[0], title)
        card = model_card.read(os.path.join(export_dir, "1"))
        has_digits = "--dataset=digits" in source
        self.assertEqual(
            card["checked_on"],
            "40 of the test images of digits"
            if has_digits
            else "64 stand-in images (bundled digits)",
        )
        text = "\n".join(outcome.out)
        if has_digits:  # of a network that was never trained
            self.assertIn("is not below chance", text)
        else:
            self.assertIn("accuracy was not checked", text)
        if "--mean=0.5" in source:
            self.assertEqual(card["preprocessing"]["mean"], [0.5])

    def test_error_that_is_not_that_of_the_training_is_refused(self):
        workdir = os.path.join(exports.scratch(self), "run")
        shutil.copytree(self.workdir, workdir)
        path = os.path.join(workdir, "metrics.csv")
        with open(path) as file:
            *rows, last = file.read().splitlines()
        values = last.split(",")
        place = rows[0].split(",").index("test_top1_error")
        values[place] = str(float(values[place]) / 2.0)
        with open(path, "w") as file:
            file.write("\n".join([*rows, ",".join(values)]) + "\n")
        outcome, export_dir = self.export(source=[f"--workdir={workdir}"])
        self.assertEqual(outcome.code, 1)
        self.assertLen(outcome.err, 1)
        self.assertRegex(outcome.err[0], "metrics.csv has .* nothing was expor")
        self.assertFalse(os.path.exists(export_dir))

    def test_program_that_is_stopped_leaves_nothing_half_written(self):
        def stop(*_):
            self.assertLen(os.listdir(export_dir), 1)  # in progress
            os.kill(os.getpid(), signal.SIGTERM)

        export_dir = os.path.join(exports.scratch(self), "exported")
        with mock.patch.object(warmup, "write", stop):
            outcome = programs.run(
                "export",
                f"--workdir={self.workdir}",
                f"--export_dir={export_dir}",
            )
        self.assertEqual(outcome.code, 143)
        self.assertEmpty(os.listdir(export_dir))

    def test_preprocessing_is_never_guessed(self):
        labels = os.path.join(exports.scratch(self), "labels")
        with open(labels, "w") as file:
            file.write("\n".join("abcdefghij") + "\n")
        network = "--model={}/network.keras"
        weights = ["--model=small", "--weights={}/some.weights.h5"]
        for source in (
            [network, f"--labels={labels}"],
            [network, "--dataset=digits"],
            [*weights, "--dataset=digits"],
        ):
            outcome, export_dir = self.export(source=source)
            self.assertEqual(outcome.code, 2, source)
            self.assertLen(outcome.err, 1)
            self.assertIn("--preprocessing", outcome.err[0])
            for way in ("caffe, tf or torch", "none", "--mean"):
                self.assertIn(way, outcome.err[0])
            self.assertFalse(os.path.exists(export_dir))

    @pytest.mark.slow
    def test_an_assumed_preprocessing_is_a_warning(self):
        """Without labels and images the export claims nothing of classes."""
        outcome, _ = self.export(source=["--model={}/colour.keras"])
        self.assertEqual(outcome.code, 0, outcome.err)
        (warning,) = [line for line in outcome.out if "WARNING" in line]
        self.assertIn("does not contain the preprocessing", warning)

    @pytest.mark.slow
    def test_weights_that_ship_are_exported_by_their_name(self):
        outcome, export_dir = self.export(
            *("--top=3", "--noexif", "--scaled_jpeg"),
            source=["--model=resnet20", "--weights=cifar10"],
        )
        self.assertEqual((outcome.code, outcome.err), (0, []))
        card = model_card.read(os.path.join(export_dir, "1"))
        self.assertEqual(card["top"], 3)
        self.assertEqual(card["input"]["exif_orientation"], "ignored")
        self.assertTrue(card["input"]["scaled_jpeg"])
        network = client.Client(client.SavedModel(export_dir))
        with open(exports.CAT, "rb") as file:
            (answer,) = network.predict([file.read()])
        self.assertEqual(answer.best[0][0], "cat")

    @parameterized.parameters(
        (["--export_dir=x"], "--workdir"),
        *(
            (
                ["--workdir=x", "--export_dir=x", flag],
                f"{flag}: cannot be combined",
            )
            for flag in (
                "--weights=cifar10",
                "--set=model.shortcut=C",
                "--dataset=digits",
                "--labels=x",
                "--preprocessing=none",
                "--mean=0.5,0.4,0.3",
                "--standard_deviation=0.2",
            )
        ),
        *(
            (
                ["--model=a.keras", "--export_dir=x", flag],
                f"{flag}: cannot be combined",
            )
            for flag in ("--weights=cifar10", "--set=model.shortcut=C")
        ),
        *(
            (["--model=small", "--export_dir=x", flag], f"{flag}: {reason}")
            for flag, reason in (
                ("--mean=abc", "must be numbers separated by commas"),
                ("--mean=0.5", "mean must have the shape"),
                ("--preprocessing=dataset", "no data set is named"),
                ("--preprocessing=timm", "value should be one of"),
                ("--preprocessing=cifar10", "mean must have the shape"),
                ("--standard_deviation=0,0,0", "standard_deviation must be 3"),
                ("--dataset=nosuch", "unknown data set"),
                ("--weights=/nowhere.h5", "The `weights` argument"),
                ("--labels=/nowhere", "No such file"),
                ("--labels=/dev/zero", "must be a regular file"),
                ("--labels=/", "must be a regular file"),
                (
                    "--warmup_batch_sizes=a",
                    "must be numbers separated by commas",
                ),
                (
                    "--warmup_batch_sizes=1.5",
                    "must be numbers separated by commas",
                ),
            )
        ),
        (
            ["--model=/nowhere.keras", "--export_dir=x"],
            "--model=/nowhere.keras: there is no such file",
        ),
        (
            ["--workdir=x", "--export_dir=gs://bucket/m"],
            "--export_dir=gs://bucket/m: ",
        ),
        (
            ["--workdir=x", f"--export_dir={__file__}"],
            f"--export_dir={__file__}: it must be a directory",
        ),
        (["--workdir=x", "--model=x", "--export_dir=x"], "--workdir=x"),
        (["--workdir=x", "--export_dir=x", "--precision=int4"], "int4"),
        (["--workdir=x", "--export_dir=x", "--formats=tflite"], "litert"),
        (
            [
                "--workdir=x",
                "--export_dir=x",
                "--formats=onnx",
                "--precision=bfloat16",
            ],
            "--formats=onnx: onnx must be written in float32",
        ),
        (
            ["--workdir=x", "--export_dir=x", "--warmup_batch_sizes=1,0"],
            "--warmup_batch_sizes=1,0: a batch size must be 1 or more",
        ),
        (["--workdir=nowhere"], "--export_dir"),
        (["--workdir=nowhere", "--export_dir=x"], "--workdir=nowhere"),
        (["--model=resnet21", "--export_dir=x"], "--model=resnet21"),
        (["--workdir=nowhere", "--export_dir=x", "more"], "more"),
        (["--work_dir=x"], "did you mean --workdir"),
        (
            ["--model=resnet20", "--export_dir=x", "--precision=int8"],
            "--precision=int8: needs training images",
        ),
        (
            [
                "--model=resnet20",
                "--export_dir=x",
                "--precision=int8",
                "--calibration_images=nowhere",
            ],
            "--calibration_images=nowhere: nowhere: No such file",
        ),
        (
            [
                "--model=resnet20",
                "--export_dir=x",
                "--calibration_images=nowhere",
            ],
            "cannot be combined with --precision=float32",
        ),
    )
    def test_usage_error_is_one_line_and_exit_code_2(self, arguments, message):
        code, _, err = programs.run("export", *arguments)
        self.assertEqual(code, 2)
        self.assertLen(err, 1)
        self.assertIn(message, err[0])
        self.assertFalse(os.path.exists("x"))

    @parameterized.parameters(
        (b"\xef\xbb\xbfa\nb\r\nc", ["a", "b", "c"]),
        ("a\u2028b\nc\x0cd\n".encode(), ["a\u2028b", "c\x0cd"]),
        (b"a\n\nb\n\n", ["a", "", "b", ""]),
    )
    def test_labels_are_the_lines_of_a_file(self, content, expected):
        """A byte order mark is no letter, and no line is lost or divided."""
        path = os.path.join(exports.scratch(self), "labels")
        with open(path, "wb") as file:
            file.write(content)
        stop = mock.patch.object(export, "export", side_effect=ValueError("-"))
        with stop as called:
            programs.run(
                *("export", "--model=resnet20", "--export_dir=none"),
                *(f"--labels={path}", "--preprocessing=torch"),
            )
        _, _, labels, *_ = called.call_args.args
        self.assertEqual(labels, expected)


if __name__ == "__main__":
    absltest.main()
