"""Encoded images by name: files, folders, URLs, the standard input."""

import os
import sys
import urllib.parse
import urllib.request
from collections.abc import Sequence

ENDINGS = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".webp")

_SHOWN_CHARACTERS = 60  # of a data URL, which holds the whole image


def expand(names: Sequence[str]) -> list[str]:
    """The names, each folder replaced by the images below it, in order.

    Raises:
        ValueError: a folder has no image.

    >>> expand(["a.png", "-", "data:image/png;base64,iVBORw0="])
    ['a.png', '-', 'data:image/png;base64,iVBORw0=']
    """
    found = []
    for name in names:
        if not os.path.isdir(name):
            found.append(name)
            continue
        images = [
            os.path.join(folder, file)
            for folder, _, files in os.walk(name)
            for file in files
            if file.lower().endswith(ENDINGS)
        ]
        if not images:
            raise ValueError(
                f"the folder {name} has no image: no file that ends with "
                + ", ".join(ENDINGS)
            )
        found += sorted(images)
    return found


def read(name: str) -> bytes:
    """An encoded image.

    Args:
        name: a path; `file:` or `data:`, a URL; `-`, the standard input.

    Raises:
        OSError: it cannot be read.
        ValueError: it is a URL of another kind, or a damaged one.
    """
    if name == "-":
        return sys.stdin.buffer.read()
    scheme = urllib.parse.urlsplit(name).scheme.lower() if ":" in name else ""
    if scheme in ("data", "file") and not os.path.exists(name):
        with urllib.request.urlopen(name) as response:
            return response.read()
    if "://" in name and not os.path.exists(name):
        raise ValueError("of URLs, only file: and data: are read")
    with open(name, "rb") as file:
        return file.read()


def shown(name: str) -> str:
    """The name as it is printed: a data URL is cut, and in UTF-8.

    >>> shown("data:image/png;base64," + "A" * 1000)
    'data:image/png;base64,AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA...'
    """
    if name.startswith("data:") and len(name) > _SHOWN_CHARACTERS:
        return name[:_SHOWN_CHARACTERS] + "..."
    return os.fsencode(name).decode("utf-8", "replace")
