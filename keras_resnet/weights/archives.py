"""Zip archives of strangers, whose sizes are checked before they are read.

Keras and torch both write zip archives. The directory of an archive can declare
any number of members of any size, and its data can expand a thousandfold.
"""

import contextlib
import sys
import zipfile
from collections.abc import Iterator
from typing import BinaryIO
from typing import cast

from keras_resnet.weights import bounds

_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)


class _Bounded:
    """A file from which `ZipFile` reads no directory beyond the bound."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self.most = bounds.MOST_DIRECTORY_BYTES

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
                    f"received {bounds.short(name)}"
                )
            names.add(name)
            if info.compress_type not in _METHODS or info.flag_bits & 1:
                raise ValueError(
                    f"{bounds.short(name)} must be stored or deflated, "
                    f"received method {info.compress_type}, or encryption"
                )
        total = sum(info.file_size for info in archive.infolist())
        allowed = max(
            2 * size,
            min(
                bounds.FREE_BYTES + bounds.EXPANSION * size,
                bounds.EXPANDED_BYTES,
            ),
        )
        if total > allowed:
            raise ValueError(
                f"the members of an archive of {size:,} bytes must have at "
                f"most {allowed:,} bytes, received {total:,}"
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
        raise ValueError(f"the archive has no {bounds.short(name)}") from None
    if info.file_size > most:
        raise ValueError(
            f"{bounds.short(name)} must be at most {most:,} bytes, received "
            f"{info.file_size:,}"
        )
    with archive.open(info) as member:
        # The count bounds what the deflated data expand to.
        data = member.read(info.file_size)
    if len(data) != info.file_size:
        raise ValueError(
            f"{bounds.short(name)} must have {info.file_size:,} bytes, "
            f"received {len(data):,}: the file is truncated"
        )
    return data
