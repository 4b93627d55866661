"""Reads encoded images from files, folders, URLs and the standard input."""

import base64
import io
import os
import stat
import sys
import urllib.parse
from collections.abc import Sequence

ENDINGS = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".webp")
# Photos that must be converted. Each gets a line that says so.
_FOREIGN_ENDINGS = (".avif", ".heic", ".heif")
MAX_IMAGE_BYTES = 256_000_000

_SHOWN_CHARACTERS = 60  # of a data URL, which holds the whole image
_CHUNK_BYTES = 2**20
_KINDS = {
    stat.S_IFBLK: "a block device",
    stat.S_IFCHR: "a character device",
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
}


def expand(names: Sequence[str]) -> list[str]:
    """Replaces each folder by the images below it, in order.

    Raises:
        ValueError: If a folder does not have images, or if the standard input
            is named twice.
        OSError: If a folder cannot be read.

    >>> expand(["a.png", "-", "data:image/png;base64,iVBORw0="])
    ['a.png', '-', 'data:image/png;base64,iVBORw0=']
    """
    if names.count("-") > 1:
        raise ValueError("- (the standard input) must be named once")
    found = []
    for name in names:
        if not os.path.isdir(name):
            found.append(name)
            continue
        images = [
            os.path.join(folder, file)
            for folder, _, files in os.walk(name, onerror=_raise)
            for file in files
            if file.lower().endswith(ENDINGS + _FOREIGN_ENDINGS)
        ]
        if not images:
            raise ValueError(
                f"the folder {name} must hold images: files that end with "
                + ", ".join(ENDINGS)
            )
        found += sorted(images)
    return found


def _raise(error: OSError) -> None:
    raise error


def read(name: str, max_bytes: int = MAX_IMAGE_BYTES) -> bytes:
    """Reads an encoded image.

    Args:
        name: A path, a `file:` or `data:` URL, or `-` for the standard input.
        max_bytes: Size of the largest image.

    Raises:
        ValueError: If the image is larger, is not a regular file, or cannot be
            read; or if the URL is damaged or of another kind. The message does
            not repeat the name.

    >>> read("data:image/gif;base64,R0lGODlh")
    b'GIF89a'
    """
    try:
        if name == "-":
            return _standard_input(max_bytes)
        if not os.path.exists(name):
            scheme = name.partition(":")[0].lower()
            if scheme == "data":
                return _data_url(name, max_bytes)
            if scheme == "file":
                return read_file(_path_of_url(name), max_bytes)
            if "://" in name:
                raise ValueError("a URL must start with file: or data:")
        return read_file(name, max_bytes)
    except OSError as error:
        raise ValueError(error.strerror or str(error)) from error


def read_file(path: str | os.PathLike, max_bytes: int) -> bytes:
    """Reads a regular file.

    A FIFO would wait for a writer, and a device can be endless.

    Raises:
        ValueError: If the path is a device, a FIFO, a socket or a directory, or
            if the file has more bytes.
        OSError: If the file cannot be read.
    """
    # Opening a FIFO waits for a writer, and opening a device may act on it.
    _check_regular(os.stat(path), max_bytes)
    # The path may name another file by now, and some files of /proc wait.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
    with open(descriptor, "rb") as file:
        _check_regular(os.fstat(descriptor), max_bytes)
        return _bounded(file, max_bytes)


def _check_regular(status: os.stat_result, max_bytes: int) -> None:
    if not stat.S_ISREG(status.st_mode):
        kind = _KINDS.get(stat.S_IFMT(status.st_mode), "something else")
        raise ValueError(f"must be a regular file, received {kind}")
    if status.st_size > max_bytes:
        raise _too_large(max_bytes, f"{status.st_size:,}")


def _standard_input(max_bytes: int) -> bytes:
    if sys.stdin is None or sys.stdin.closed or not sys.stdin.readable():
        raise ValueError("the standard input is closed")
    content = _bounded(sys.stdin.buffer, max_bytes)
    if not content:
        raise ValueError("the standard input is empty")
    return content


def _bounded(file, max_bytes: int) -> bytes:
    """Reads a file to its end; its reported size may be wrong."""
    content = io.BytesIO()
    while chunk := file.read(_CHUNK_BYTES):
        content.write(chunk)
        if content.tell() > max_bytes:
            raise _too_large(max_bytes, "more")
    return content.getvalue()


def _too_large(max_bytes: int, received: str) -> ValueError:
    return ValueError(
        f"must have at most {max_bytes:,} bytes (max_image_bytes), received "
        f"{received}"
    )


def _path_of_url(url: str) -> str:
    """Without urllib's opener, which may contact a proxy or another host."""
    path = url.partition(":")[2].partition("#")[0]
    if path.startswith("//"):
        host, slash, path = path[2:].partition("/")
        if host.lower() not in ("", "localhost"):
            raise ValueError(
                "a file: URL must name a file of this machine, such as "
                f"file:///{path or 'PATH'}, received the host {host}"
            )
        path = slash + path
    return os.fsdecode(urllib.parse.unquote_to_bytes(path))


def _data_url(url: str, max_bytes: int) -> bytes:
    kind, comma, data = url.partition(":")[2].partition(",")
    if not comma:
        raise ValueError(
            "a data: URL must be data:TYPE;base64,DATA, received no comma"
        )
    is_base64 = kind.rstrip().lower().endswith(";base64")
    # Each byte is at most three characters in either form.
    if len(data) > 3 * max_bytes:
        raise _too_large(max_bytes, "more")
    content = urllib.parse.unquote_to_bytes(data)
    if is_base64:
        try:
            content = base64.b64decode(b"".join(content.split()), validate=True)
        except ValueError as error:
            raise ValueError(
                f"a data: URL must hold valid base64, received {error}"
            ) from error
    if len(content) > max_bytes:
        raise _too_large(max_bytes, f"{len(content):,}")
    return content


def shown(name: str) -> str:
    """Returns the name to print; a data URL, which holds its image, is cut.

    >>> shown("data:image/png;base64," + "A" * 1000)
    'data:image/png;base64,AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA...'
    """
    if name[:5].lower() == "data:" and len(name) > _SHOWN_CHARACTERS:
        return name[:_SHOWN_CHARACTERS] + "..."
    return name
