"""Prints docs/flags.md, the reference of the flags of all programs.

    make docs

The names, defaults and descriptions of the flags come from the programs. A test
compares the page with the programs.
"""

import importlib
import pathlib
import re
import sys

from absl import flags

ROOT = pathlib.Path(__file__).resolve().parent.parent
PROGRAMS = (
    *("train", "evaluate", "export", "predict", "tune", "experiments"),
    *("report", "load"),
)

TITLE = """\
# Flags of all programs

`python -m apps.train --help` prints the flags of one program. Write a flag as
`--name=value`. A flag of the type *switch* is on as `--name`, and off as
`--noname`. A flag of the type *list* takes values with commas between them. A
*repeatable* flag can be given several times. `make docs` writes this page from
the programs."""

TYPES = {
    "bool": "switch",
    "comma separated list of strings": "list",
    "float": "number",
    "int": "integer",
    "multi string": "text, repeatable",
    "string": "text",
}


def section(program: str) -> str:
    """Returns the heading, the first sentence and the flags of a program."""
    name = f"apps.{program}"
    module = importlib.import_module(name)
    summary, *_ = (module.__doc__ or "").splitlines()
    found = flags.FLAGS.flags_by_module_dict()[name]
    rows = [
        f"| `--{flag.name}` | {type_of(flag)} | {default_of(flag)} | "
        f"{description_of(flag)} |"
        for flag in sorted(found, key=lambda flag: flag.name)
    ]
    for flag in list(found):  # the next program may have a flag of this name
        delattr(flags.FLAGS, flag.name)
    head = ["| flag | type | default | meaning |", "|---|---|---|---|"]
    return "\n".join([f"## {program}", "", summary, "", *head, *rows])


def type_of(flag: flags.Flag) -> str:
    """Returns the type of a flag, or the values that it allows."""
    if values := getattr(flag.parser, "enum_values", None):
        return ", ".join(f"`{value}`" for value in values)
    return TYPES[flag.flag_type()]


def default_of(flag: flags.Flag) -> str:
    """Returns the default as code, or nothing if the flag has no default."""
    if flag.default in (None, []):
        return ""
    return f"`{flag.default_as_str.strip(chr(39))}`"


def description_of(flag: flags.Flag) -> str:
    """Returns the description of a flag, without the text that absl adds."""
    text = " ".join(flag.help.split())
    text = re.sub(r"^<[^>]*>: ", "", text)
    text = text.removesuffix("repeat this option to specify a list of values")
    return text.rstrip("; ").replace("|", "\\|")


def main():
    """Prints the page."""
    sys.path.insert(0, str(ROOT))
    print("\n\n".join([TITLE, *map(section, PROGRAMS)]))


if __name__ == "__main__":
    main()
