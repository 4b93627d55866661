"""The output of all programs, for any text in their input."""

import contextlib
import io
import json
import os
import pathlib
import resource
import shlex
import signal
import subprocess
import sys
import tempfile
from unittest import mock

from absl.testing import absltest
from absl.testing import parameterized

from apps import command_line
from apps import flag_files
from tests import programs


class PrintableTest(parameterized.TestCase):
    @parameterized.parameters(
        ("\x1b[2J", r"\x1b[2J"),  # clears the screen of a terminal
        ("\x9b2J", r"\x9b2J"),  # the same in one character
        ("\u202e", r"\u202e"),  # right to left: "gpj.exe" reads "exe.jpg"
        ("a\nb\r", r"a\nb\r"),
        ("\u2028", r"\u2028"),
        ("\udcff", r"\udcff"),  # a file name that is not UTF-8
        ("\x00\x07\x7f", r"\x00\x07\x7f"),
    )
    def test_control_characters_are_escaped(self, text, expected):
        self.assertEqual(command_line.printable(text), expected)

    @parameterized.parameters(
        "cat", "猫", "می\u200cروم", "👩\u200d🚀", "été", "a\xa0b", "a b"
    )
    def test_the_text_of_any_language_is_unchanged(self, text):
        self.assertEqual(command_line.printable(text), text)

    @parameterized.parameters(
        "\x1b[2J", "\x9b", "\u202e", "\u2028", "\udcff", "\x7f", 'a\nb"', "猫 é"
    )
    def test_json_is_valid_and_without_control_characters(self, text):
        found = command_line.printable_json({text: [text]})
        self.assertTrue(found.isprintable(), found)
        self.assertEqual(json.loads(found), {text: [text]})

    def test_json_keeps_the_text_of_any_language(self):
        for text in ("猫", "می\u200cروم", "👩\u200d🚀"):
            self.assertIn(text, command_line.printable_json([text]))

    def test_show_prints_one_line_for_each_argument(self):
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            command_line.show("a\nb", 3)
        self.assertEqual(out.getvalue(), "a\\nb\n3\n")

    @parameterized.parameters(
        ("train.py", "python -m apps.evaluate '--workdir=a b' IMAGE"),
        (
            "/bin/keras-resnet-train",
            "keras-resnet-evaluate '--workdir=a b' IMAGE",
        ),
    )
    def test_hints_name_the_commands_of_the_installation(self, started, hint):
        with mock.patch.object(sys, "argv", [started]):
            line = command_line.command("evaluate", "--workdir=a b", "IMAGE")
        self.assertEqual(line, hint)

    def test_an_error_is_one_short_line_without_control_characters(self):
        outcome = programs.run("evaluate", "--workdir=\x1b[31m\n" + "x" * 9000)
        (line,) = outcome.err
        self.assertTrue(line.isprintable(), line)
        self.assertLess(len(line), 2100)


class FlagsTest(parameterized.TestCase):
    """Files of flags are bounded, and numbers are finite."""

    def setUp(self):
        super().setUp()
        root = self.enter_context(tempfile.TemporaryDirectory())
        self.root = pathlib.Path(root)

    def test_lines_of_a_file_are_flags_in_its_place(self):
        inner = self.root / "inner"
        inner.write_text("--c=été\n")
        file = self.root / "flags"
        file.write_text(f"# a comment\n\n//\n --a=1 \n--flagfile={inner}\n")
        for words in ([f"--flagfile={file}"], ["-flagfile", str(file)]):
            self.assertEqual(
                flag_files.expand(["x", *words, "--b", "--", *words]),
                ["x", "--a=1", "--c=été", "--b", "--", *words],
            )

    @parameterized.parameters(
        "pipe", "device", "folder", "nothing", "itself", "large", "bytes",
        "many", "",
    )  # fmt: skip
    def test_file_that_cannot_be_read_is_one_line(self, kind):
        path = self.root / "flags"
        if kind == "pipe":
            os.mkfifo(path)
        elif kind == "device":
            path.symlink_to("/dev/zero")
        elif kind == "folder":
            path.mkdir()
        elif kind == "itself":
            path.write_text(f"--flagfile={path}")
        elif kind == "large":
            path.write_text("#" * (2**20 + 1))
        elif kind == "bytes":
            path.write_bytes(b"\xff\xfe-\0")
        elif kind == "many":
            (self.root / "other").write_text("")
            path.write_text(f"--flagfile={self.root}/other\n" * 200)
        words = [f"--flagfile={path}"] if kind else ["--flagfile"]
        outcome = programs.run("evaluate", *words)
        self.assertEqual(outcome.code, 2)
        (line,) = outcome.err
        self.assertRegex(line, "evaluate: --flagfile.*: ")

    @parameterized.product(
        flag=("minutes", "epochs", "checkpoint_seconds", "connect_timeout"),
        value=("nan", "inf", "1e999"),
    )
    def test_numbers_are_finite(self, flag, value):
        """No comparison with NaN is true: the run would never save."""
        outcome = programs.run("train", f"--{flag}={value}")
        self.assertEqual(outcome.code, 2)
        (line,) = outcome.err
        self.assertRegex(
            line,
            f"--{flag}=(nan|inf|1e999): (must be a finite number|inf is not a)",
        )

    def test_numbers_of_a_list_are_finite(self):
        outcome = programs.run(
            *("export", "--model=resnet20", "--export_dir=none"),
            *("--mean=0,nan,0",),
        )
        self.assertEqual(outcome.code, 2)
        self.assertIn("--mean=0,nan,0: must be numbers", outcome.err[0])


class StandardFilesTest(parameterized.TestCase):
    """Tests of a shell that closed a standard file, as in `2>&-`."""

    @parameterized.parameters("2>&-", "1>&-", "0<&-", "0<&- 1>&- 2>&-")
    def test_program_ends_as_with_open_files(self, closed):
        code = _PROGRAM.format(root=ROOT, phase="none", signals=[])
        check = (
            "import os\n"
            "def main(argv):\n"
            "    assert [os.fstat(i) for i in range(3)]\n"
            "    command_line._fail('an error')\n"
            "    command_line.show('shown')\n"
            "    sys.exit(5)\n"
            "command_line.run(main)"
        )
        code = code.replace("command_line.run(main)", check)
        process = subprocess.run(
            f"exec {sys.executable} -c {shlex.quote(code)} {closed}",
            shell=True,
            capture_output=True,
            text=True,
        )
        self.assertEqual(process.returncode, 5, process.stderr)
        self.assertEqual(
            process.stderr,
            "" if "2>" in closed else "program: an error\n",
        )
        self.assertEqual(process.stdout, "" if "1>" in closed else "shown\n")


class SignalsTest(parameterized.TestCase):
    """Tests of any number of signals, in any phase of a program."""

    @parameterized.product(
        signals=(["SIGTERM"], ["SIGINT", "SIGINT"], ["SIGTERM"] * 9),
        phase=("start", "import", "main", "cleaning", "error", "swallowed"),
    )
    def test_signals_end_a_program_with_one_line(self, signals, phase):
        numbers = [int(signal.Signals[name]) for name in signals]
        code = _PROGRAM.format(root=ROOT, phase=phase, signals=numbers)
        process = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True
        )
        code = 128 + numbers[0]
        self.assertEqual(process.returncode, code, process.stderr)
        self.assertEqual(process.stderr, f"program: stopped by {signals[0]}\n")
        is_clean = phase in ("start", "import") or "cleaned" in process.stdout
        self.assertTrue(is_clean)

    def test_outcome_stands_once_there_is_one(self):
        code = _PROGRAM.format(root=ROOT, phase="end", signals=[2, 15])
        process = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True
        )
        self.assertEqual((process.returncode, process.stderr), (0, ""))

    @parameterized.parameters("RLIMIT_AS", "RLIMIT_DATA")
    def test_memory_that_is_too_small_is_one_line(self, kind):
        with mock.patch.object(
            resource,
            "getrlimit",
            lambda k: (2**28 if k == getattr(resource, kind) else -1, -1),
        ):
            outcome = programs.run("evaluate", "--workdir=x")
        self.assertEqual(outcome.code, 1)
        (line,) = outcome.err
        self.assertRegex(line, "memory .* must be at least .*received a limit")

    def test_kernel_of_tensorflow_is_not_named(self):
        error = OSError(
            "{{function_node __wrapped__X_/job:0}} disk full [Op:X]"
        )
        with mock.patch("keras_resnet.training.workdirs.local") as local:
            local.side_effect = error
            outcome = programs.run("evaluate", "--workdir=x")
        self.assertEqual(outcome.err, ["evaluate: disk full"])


ROOT = str(pathlib.Path(__file__).parents[1])

# A program, without the seconds that the import of TensorFlow takes.
_PROGRAM = """
import atexit, os, sys, types
sys.path.insert(0, {root!r})
sys.argv = ["-m"]
sys.orig_argv = ["python", "-m", "apps.program"]
def signals(phase):
    if phase == {phase!r}:
        for number in {signals}:
            os.kill(os.getpid(), number)
from apps import command_line
signals("start")
sys.argv = ["program.py"]
class Loader:
    def find_spec(self, name, *_):
        if name == "tensorflow":
            signals("import")
            sys.exit(7)
class Garbage:
    def __del__(self):
        signals("swallowed")
def main(argv):
    try:
        signals("main")
        if {phase!r} == "error":
            try:
                signals("error")
            finally:
                raise ValueError("in the wake of the signal")
        if {phase!r} == "swallowed":
            print("cleaned", flush=True)
            Garbage()
        if {phase!r} == "import":
            import tensorflow
    finally:
        print("cleaned", flush=True)
        signals("main")  # once more
        signals("cleaning")
class Interrupted(Exception):
    pass
fake = types.SimpleNamespace(
    config=types.SimpleNamespace(list_physical_devices=list),
    errors=types.SimpleNamespace(OpError=OSError),
)
if {phase!r} == "import":
    sys.meta_path.insert(0, Loader())
else:
    sys.modules["tensorflow"] = fake
training = types.ModuleType("keras_resnet.training")
training.require_backend = lambda *_: None
training.interrupts = types.SimpleNamespace(Interrupted=Interrupted)
training.strategies = types.SimpleNamespace(WorkerLostError=OSError)
package = types.ModuleType("keras_resnet")
package.training = training
package.__path__ = training.__path__ = []
sys.modules.update({{
    "keras_resnet": package,
    "keras_resnet.training": training,
    "keras_resnet.training.interrupts": training.interrupts,
    "keras_resnet.training.strategies": training.strategies,
}})
atexit.register(signals, "end")
command_line.run(main)
"""


if __name__ == "__main__":
    absltest.main()
