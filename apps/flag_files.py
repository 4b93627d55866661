"""Files of flags: `--flagfile=FILE`, one flag a line.

absl reads such a file without a bound, and waits for the writer of a pipe.
"""

import os
import stat
from collections.abc import Sequence

_MOST_BYTES = 2**20  # of one file
_MOST_FILES = 100  # a file may name further files
_NAMES = ("--flagfile", "-flagfile")


class FlagFileError(ValueError):
    """A file of flags that cannot be read; the message says why."""


def expand(arguments: Sequence[str]) -> list[str]:
    """Returns the arguments, with the flags of each file in its place.

    A line is one flag. Blank lines and comments (`#`, `//`) are left out.

    Args:
        arguments: The words of a command line after the program's name.

    Raises:
        FlagFileError: If a file is not a regular file of text of at most 1 MiB,
            names itself, or there are more than 100 files.

    >>> expand(["--steps=3", "--", "--flagfile=any"])
    ['--steps=3', '--', '--flagfile=any']
    """
    return _expanded(list(arguments), (), [])


def _expanded(arguments, parents, read):
    found: list[str] = []
    while arguments:
        word = arguments.pop(0)
        name, equals, path = word.partition("=")
        if word == "--":
            return [*found, word, *arguments]
        if name not in _NAMES:
            found.append(word)
            continue
        if not equals:
            if not arguments:
                raise FlagFileError("--flagfile: give a file")
            path = arguments.pop(0)
        path = os.path.expanduser(path.strip())
        read.append(path)
        if path in parents or len(read) > _MOST_FILES:
            raise FlagFileError(
                f"--flagfile={path}: files must not name themselves, and must "
                f"be at most {_MOST_FILES}"
            )
        found += _expanded(_lines(path), (*parents, path), read)
    return found


def _lines(path):
    try:
        # Opening a pipe would wait for its writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        with open(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise FlagFileError(
                    f"--flagfile={path}: must be a regular file"
                )
            content = file.read(_MOST_BYTES + 1)
        if len(content) > _MOST_BYTES:
            raise FlagFileError(
                f"--flagfile={path}: must have at most {_MOST_BYTES:,} bytes"
            )
        text = content.decode()
    except OSError as error:
        raise FlagFileError(
            f"--flagfile={path}: {error.strerror or error}"
        ) from error
    except UnicodeDecodeError as error:
        raise FlagFileError(
            f"--flagfile={path}: must be UTF-8 text, one flag a line"
        ) from error
    lines = [line.strip() for line in text.split("\n")]
    return [line for line in lines if line and not line.startswith(("#", "//"))]
