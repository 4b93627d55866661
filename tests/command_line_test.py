"""What every program prints, whatever text it was given."""

import contextlib
import io
import os
import signal
from unittest import mock

from absl.testing import absltest
from absl.testing import parameterized

from apps import command_line
from tests import programs


class PrintableTest(parameterized.TestCase):
    @parameterized.parameters(
        ("\x1b[2J", r"\x1b[2J"),  # a terminal would clear its screen
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

    def test_show_prints_one_line_for_each_argument(self):
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            command_line.show("a\nb", 3)
        self.assertEqual(out.getvalue(), "a\\nb\n3\n")

    def test_an_error_is_one_short_line_without_control_characters(self):
        outcome = programs.run("evaluate", "--workdir=\x1b[31m\n" + "x" * 9000)
        (line,) = outcome.err
        self.assertTrue(line.isprintable(), line)
        self.assertLess(len(line), 2100)


class SignalTest(parameterized.TestCase):
    """Every program ends with one line and 128 + the signal."""

    def stopped(self, number, in_library=None):
        def stop(*_, **__):
            cleaned = False
            try:
                os.kill(os.getpid(), number)
                self.fail("it must stop at once")
            except BaseException as error:
                os.kill(os.getpid(), number)  # once more, while it cleans up
                cleaned = True
                if in_library is not None:
                    raise in_library from error
                raise
            finally:
                self.assertTrue(cleaned)

        before = signal.getsignal(number)
        with mock.patch("keras_resnet.serving.versions.check", stop):
            outcome = programs.run("export", "--export_dir=x", "--model=x")
        self.assertIs(signal.getsignal(number), before)
        return outcome

    @parameterized.parameters(signal.SIGTERM, signal.SIGINT)
    def test_program_that_is_stopped(self, number):
        # A library may make an error of its own of it.
        for error in (None, ImportError("cut short"), ValueError("cut short")):
            outcome = self.stopped(number, error)
            self.assertEqual(outcome.code, 128 + number)
            self.assertIn(
                "terminated" if number == 15 else "interrupted", outcome.err[-1]
            )
            self.assertLen(outcome.err, 2 if type(error) is ValueError else 1)


if __name__ == "__main__":
    absltest.main()
