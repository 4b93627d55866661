"""Zip archives of strangers, whose sizes are checked before they are read.

Keras and torch both write zip archives. The directory of an archive can declare
any number of members of any size, and its data can expand a thousandfold.
"""

import contextlib
import json
import reprlib
import sys
import zipfile
from collections.abc import Iterator
from typing import Any
from typing import BinaryIO
from typing import cast

#: A compressed file may expand so many times and no more. Arrays of trained
#: weights hardly compress.
EXPANSION = 16

# A configuration compresses more than weights do.
_FREE_BYTES = 2**23

# Above this size, an archive may expand to twice its size. The float32 weights
# of ResNet-200 with two slots of an optimizer are 0.8e9 bytes.
_EXPANDED_BYTES = 2**31

# The entries of 60,000 members: the weights of a network of 20,000 arrays and
# two slots of its optimizer, each of them 140 bytes long.
_MOST_DIRECTORY_BYTES = 2**23

_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)

_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = 80
_REPR.maxlevel = 2


def short(value: Any) -> str:
    """Returns the `repr` of a value from a file, cut to 100 characters.

    >>> short("stem_conv")
    "'stem_conv'"
    >>> len(short("stem_conv" * 1000))
    80
    """
    text = _REPR.repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


class _Bounded:
    """A file from which `ZipFile` reads no directory beyond the bound."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self.most = _MOST_DIRECTORY_BYTES

    def read(self, count: int = -1) -> bytes:
        if count > self.most:
            raise ValueError(
                f"the archive's directory must be at most {self.most:,} bytes, "
                f"received {count:,}"
            )
        return self._file.read(count)

    def seek(self, *arguments: int) -> int:
        return self._file.seek(*arguments)

    def tell(self) -> int:
        return self._file.tell()

    def seekable(self) -> bool:
        return True


@contextlib.contextmanager
def opened(file: BinaryIO, size: int) -> Iterator[zipfile.ZipFile]:
    """Opens an archive whose declared sizes are within the bounds.

    Args:
        file: The archive.
        size: Number of its bytes.

    Raises:
        ValueError: If a member has an unusual name or compression, two have
            one name, or all together are too large.
    """
    bounded = _Bounded(file)
    with zipfile.ZipFile(cast(BinaryIO, bounded)) as archive:
        bounded.most = sys.maxsize  # each member is checked instead
        names = set()
        for info in archive.infolist():
            name = info.filename
            parts = name.replace("\\", "/").split("/")
            if name in names or "" in parts[:-1] or ".." in parts:
                raise ValueError(
                    "a member's name must be unique and inside the archive, "
                    f"received {short(name)}"
                )
            names.add(name)
            if info.compress_type not in _METHODS or info.flag_bits & 1:
                raise ValueError(
                    f"{short(name)} must be stored or deflated, received "
                    f"method {info.compress_type}, or encryption"
                )
        total = sum(info.file_size for info in archive.infolist())
        expanded = min(_FREE_BYTES + EXPANSION * size, _EXPANDED_BYTES)
        allowed = max(expanded, 2 * size)
        if total > allowed:
            raise ValueError(
                f"it claims to hold far more than its size: {total:,} bytes in "
                f"{size:,}, where {allowed:,} are allowed"
            )
        yield archive


def read(archive: zipfile.ZipFile, name: str, most: int) -> bytes:
    """Returns the contents of a member.

    Args:
        archive: From `opened`.
        name: Name of the member.
        most: Number of bytes that the member may have.

    Raises:
        ValueError: If the member is missing, longer than `most` or damaged.
    """
    try:
        info = archive.getinfo(name)
    except KeyError:
        raise ValueError(f"the archive has no {short(name)}") from None
    if info.file_size > most:
        raise ValueError(
            f"{short(name)} must be at most {most:,} bytes, received "
            f"{info.file_size:,}"
        )
    with archive.open(info) as member:
        # The count bounds what the deflated data expand to.
        data = member.read(info.file_size)
    if len(data) != info.file_size:
        raise ValueError(f"{short(name)} is truncated")
    return data


def parse_json(data: bytes) -> dict[str, Any]:
    """Returns the object that JSON from a file describes.

    Raises:
        ValueError: If the JSON is damaged, too deep, or not an object.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError("an object has one key twice")
        return found

    try:
        value = json.loads(data, object_pairs_hook=unique)
    except RecursionError:
        raise ValueError("the JSON is too deep") from None
    except ValueError as error:
        raise ValueError(f"the JSON is damaged: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"the JSON must be an object, received {short(value)}")
    return value
