"""apps.predict with a SavedModel of a network that names colours."""

import base64
import io
import json
import os
import subprocess
import sys
import tempfile
from unittest import mock

import numpy as np
import pytest
import tensorflow as tf
from absl.testing import absltest
from absl.testing import parameterized

from tests import colours
from tests import programs


class ProgramTest(parameterized.TestCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        folder = tempfile.TemporaryDirectory()
        cls.addClassCleanup(folder.cleanup)
        cls.folder = folder.name
        cls.export_dir = os.path.join(folder.name, "exported")
        cls.path = colours.publish(cls.export_dir)
        cls.images = {}
        for name in ("red", "green", "blue"):
            cls.images[name] = colours.image(name)
            cls.write(name + ".png", cls.images[name])
        cls.write("text.png", b"this is no image")

    @classmethod
    def write(cls, name, content):
        with open(os.path.join(cls.folder, name), "wb") as file:
            file.write(content)

    def predict(self, *arguments):
        """The program, asked about images of the folder."""
        return programs.run(
            "predict",
            *(
                os.path.join(self.folder, argument)
                if argument.endswith(".png")
                else argument
                for argument in arguments
            ),
        )

    def test_names_of_files_are_printed_in_columns(self):
        with tempfile.TemporaryDirectory() as folder:
            for name in ("\x1b[2J\n.png", "a.png", "b" * 200 + ".png"):
                with open(os.path.join(folder, name), "wb") as file:
                    file.write(self.images["red"])
            arguments = [f"--saved_model={self.path}", "--top=1", folder]
            code, out, err = self.predict(*arguments)
            self.assertEqual((code, err), (0, []))
            self.assertLen(out, 4)
            for line in out:
                self.assertTrue(line.isprintable(), line)
            self.assertEqual(out[1].index("99.73%"), out[2].index("99.73%"))
            self.assertLess(len(out[1]), 120)
            code, out, err = self.predict("--json", *arguments)
        self.assertEqual((code, err), (0, []))
        for line in out:
            self.assertTrue(line.isprintable(), line)
        self.assertEqual(
            json.loads(out[0])["image"], os.path.join(folder, "\x1b[2J\n.png")
        )

    def test_program_prints_a_table(self):
        code, out, err = self.predict(
            f"--saved_model={self.export_dir}", "--top=2", "red.png", "blue.png"
        )
        self.assertEqual((code, err), (0, []))
        self.assertEqual(out[0].split(), ["image", "probability", "label"])
        self.assertEqual(
            [line.split()[-2:] for line in out[1:]],
            [
                ["99.73%", "red"],
                ["0.25%", "dark"],
                ["99.73%", "blue"],
                ["0.25%", "dark"],
            ],
        )
        self.assertIn("red.png", out[1])

    def test_program_reads_folders_urls_and_the_standard_input(self):
        with tempfile.TemporaryDirectory() as folder:
            for name in ("b/red.png", "a.PNG", "notes.txt"):
                path = os.path.join(folder, name)
                os.makedirs(os.path.dirname(path), exist_ok=True)
                with open(path, "wb") as file:
                    file.write(self.images["red"])
            data = base64.b64encode(self.images["blue"]).decode()
            stdin = io.TextIOWrapper(io.BytesIO(self.images["green"]))
            with mock.patch.object(sys, "stdin", stdin):
                code, out, _ = self.predict(
                    f"--saved_model={self.export_dir}",
                    "--json",
                    folder,
                    f"data:image/png;base64,{data}",
                    "-",
                    f"file://{folder}/b/red.png#",
                    "https://example.com/x.jpg",
                )
            answers = [json.loads(line) for line in out]
        self.assertEqual(code, 1)
        self.assertEqual(
            [answer["image"] for answer in answers[:2]],
            [f"{folder}/a.PNG", f"{folder}/b/red.png"],
        )
        self.assertLess(len(answers[2]["image"]), 70)
        self.assertEqual(
            [answer["predictions"][0]["label"] for answer in answers[:5]],
            ["red", "red", "blue", "green", "red"],
        )
        self.assertIn("start with file: or data:", answers[5]["error"])

    @pytest.mark.slow
    def test_program_asks_the_version_that_is_named(self):
        with tempfile.TemporaryDirectory() as export_dir:
            colours.publish(export_dir)
            colours.publish(export_dir, ["schwarz", "rot", "grün", "blau"])
            for version, label in (("1", "red"), ("2", "rot")):
                code, out, _ = self.predict(
                    f"--saved_model={export_dir}",
                    f"--version={version}",
                    "--top=1",
                    "red.png",
                )
                self.assertEqual((code, out[1].split()[-1]), (0, label))
            for version in ("7", "canary"):
                code, _, err = self.predict(
                    f"--saved_model={export_dir}",
                    f"--version={version}",
                    "red.png",
                )
                self.assertEqual(code, 2)
                self.assertLen(err, 1)
                self.assertIn(
                    f"--version={version}: it must be one of the versions in "
                    f"{export_dir}, 1, 2; received {version}",
                    err[0],
                )

    @pytest.mark.slow
    def test_whatever_an_image_is_and_is_called_the_others_are_answered(self):
        """In a process: its libraries write to stderr below Python."""
        jpeg = tf.io.encode_jpeg(np.zeros([16, 16, 3], np.uint8)).numpy()
        with tempfile.TemporaryDirectory() as folder:
            for name, content in (
                ("1\xe9.png".encode(), self.images["red"]),
                (b"2.jpg", jpeg[:-2] + jpeg[2:]),  # a JPEG inside of one
                (b"\xff.png", self.images["blue"]),  # no UTF-8
            ):
                with open(os.path.join(folder.encode(), name), "wb") as file:
                    file.write(content)
            command = [sys.executable, "-m", "apps.predict", "--top=1"]
            outcome = subprocess.run(
                [*command, f"--saved_model={self.path}", folder],
                capture_output=True,
                env={**os.environ, "PYTHONIOENCODING": "ascii:strict"},
            )
            lines = self.predict(
                f"--saved_model={self.path}", "--top=1", "--json", folder
            ).out
        self.assertEqual(outcome.returncode, 1)
        self.assertEqual(
            outcome.stderr.decode().splitlines(),
            ["predict: 1 of 3 images have no prediction"],
        )
        self.assertIn(rb"1\xe9.png", outcome.stdout)
        for red, error, blue in (
            outcome.stdout.decode().splitlines()[-3:],
            lines,
        ):
            self.assertIn("red", red)
            self.assertIn("error", error)
            self.assertIn(r"\udcff.png", blue)
            self.assertIn("blue", blue)

    def test_folder_without_images_is_an_error(self):
        with tempfile.TemporaryDirectory() as folder:
            code, _, err = self.predict(
                f"--saved_model={self.export_dir}", folder
            )
        self.assertEqual(code, 1)
        self.assertIn("must hold images", err[0])

    def test_program_goes_on_after_a_bad_image_and_exits_with_1(self):
        code, out, err = self.predict(
            f"--saved_model={self.export_dir}",
            "--json",
            *("red.png", "text.png", "missing.png", "green.png"),
        )
        self.assertEqual(code, 1)
        self.assertEqual(err, ["predict: 2 of 4 images have no prediction"])
        red, text, missing, green = map(json.loads, out)
        self.assertEqual(red["predictions"][0]["label"], "red")
        self.assertLen(green["predictions"], 4)
        self.assertIn("must be a JPEG", text["error"])
        self.assertEqual(missing["error"], "No such file or directory")
        self.assertEndsWith(missing["image"], "missing.png")

    @parameterized.parameters(
        ([], "--saved_model=.*name images after"),
        (["--saved_model=nowhere", "x.png"], "--saved_model=nowhere"),
        (["--saved_model=here"], "--saved_model=here"),
        (["--saved_model=a", "--server=b:1", "x.png"], "--saved_model=a"),
        (["--server=b:1", "x.png"], "--model_name"),
        (["--server=b", "--model_name=n", "x.png"], "--server=b: .*HOST:PORT"),
        (["--server=b:1", "--timeout=0", "x.png"], "--timeout=0"),
        (["--saved_model=b", "--timeout=3", "x.png"], "--timeout=3.0: cannot"),
        (
            ["--saved_model=b", "--in_flight=3", "x.png"],
            "--in_flight=3: cannot",
        ),
        (
            ["--saved_model=b", "--model_name=m", "x.png"],
            "--model_name=m: cannot",
        ),
        (["--server=b:1", "--model_name=", "x.png"], "--model_name=: give"),
        (["--server=", "x.png"], "--server=: give a value"),
        (["--saved_model=", "x.png"], "--saved_model=: give a value"),
        (["--saved_model=b", "--version=", "x.png"], "--version=: give a val"),
        (
            ["--server=b:1", "--model_name=m", "--timeout=nan", "x.png"],
            "--timeout=nan: must be a finite number",
        ),
        (["--timeout=inf", "x.png"], "--timeout=inf"),
        (
            ["--server=b:1", "--model_name=m", f"--version={10**19}", "x.png"],
            "--version=10{19}: .*a number below",
        ),
        (
            ["--server=b:1", "--model_name=a\tb", "x.png"],
            "--model_name=a.b: .*printable",
        ),
        (["--max_image_bytes=0", "x.png"], "--max_image_bytes=0"),
        (["--max_image_bytes=9000000000", "x"], "--max_image_bytes=9000000000"),
        (["--top=0", "x.png"], "top"),
        (["--tob=3", "x.png"], "--tob .did you mean --top"),
    )
    def test_usage_error_is_one_line_and_exit_code_2(self, arguments, message):
        code, out, err = self.predict(*arguments)
        self.assertEqual((code, out), (2, []))
        self.assertLen(err, 1)
        self.assertRegex(err[0], message)


if __name__ == "__main__":
    absltest.main()
