"""What every program prints, whatever text it was given."""

import contextlib
import io
import json

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

    def test_an_error_is_one_short_line_without_control_characters(self):
        outcome = programs.run("evaluate", "--workdir=\x1b[31m\n" + "x" * 9000)
        (line,) = outcome.err
        self.assertTrue(line.isprintable(), line)
        self.assertLess(len(line), 2100)


if __name__ == "__main__":
    absltest.main()
