"""Files that are there as a whole or not at all, and that nothing overwrites.

A directory of another author may hold links and pipes where a program writes.
No function here writes through them.
"""

import itertools
import os
import re
import stat
from pathlib import Path


def write(path: str | os.PathLike, content: str | bytes) -> None:
    r"""Writes a file beside its place, then renames it.

    Args:
        path: The file. One that is there is replaced, and so is a link to one.
        content: Text, which is written as UTF-8, or bytes.

    Raises:
        OSError: If it cannot be written, or the path is a pipe, a device or a
            directory. The file is as it was before.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write(f"{folder}/errors.csv", "step,error\\n")
    ...     print(os.listdir(folder))
    ['errors.csv']
    """
    path = Path(path)
    if isinstance(content, str):
        content = content.encode()
    if path.exists() and not stat.S_ISREG(path.stat().st_mode):
        raise OSError(f"{path} must be a regular file to be replaced")
    # A name that no user gives, so that what a kill left can be told.
    beside = path.with_name(f".keras_resnet-{os.getpid()}-{path.name[-50:]}")
    try:
        beside.unlink(missing_ok=True)
        # It fails if another one made a link of this name meanwhile.
        with beside.open("xb") as file:
            file.write(content)
        os.replace(beside, path)
    except OSError:
        beside.unlink(missing_ok=True)
        raise


def append(path: str | os.PathLike, text: str) -> None:
    """Appends text to a regular file, and flushes it to the disk.

    Raises:
        OSError: If the file does not exist, or the path is a link or anything
            else that is not a regular file.
    """
    flags = os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK
    descriptor = os.open(path, flags)
    with open(descriptor, "ab") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(f"{os.fspath(path)} must be a regular file")
        file.write(text.encode())
        file.flush()
        os.fsync(descriptor)


def set_aside(path: str | os.PathLike, prefix: str) -> Path:
    """Renames a file to a name that no other file has.

    Args:
        path: The file, link or directory.
        prefix: Start of the new name, `PREFIX-NAME`. If another file has this
            name, it is `PREFIX-2-NAME`, and so on.

    Returns:
        The new path.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     for text in "ab":
    ...         write(f"{folder}/errors.csv", text)
    ...         print(set_aside(f"{folder}/errors.csv", "old").name)
    old-errors.csv
    old-2-errors.csv
    """
    path = Path(path)
    for number in itertools.count(1):
        start = prefix if number == 1 else f"{prefix}-{number}"
        place = path.with_name(f"{start}-{path.name}")
        if not os.path.lexists(place):
            os.rename(path, place)
            return place
    raise AssertionError


def local(path: str | os.PathLike, what: str) -> Path:
    """Returns the path of a local file or directory.

    Args:
        path: The path.
        what: Name of the place for the message.

    Raises:
        ValueError: If the path is the URL of a bucket or a server.

    >>> local("gs://bucket/run", "a work directory")
    Traceback (most recent call last):
    ...
    ValueError: a work directory must be a local path, received \
gs://bucket/run: mount the bucket or the server, and name its local directory
    """
    text = os.fspath(path)
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", text):
        raise ValueError(
            f"{what} must be a local path, received {text}: mount the bucket "
            "or the server, and name its local directory"
        )
    return Path(text)
