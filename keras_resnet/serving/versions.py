"""A directory of numbered versions, each published atomically.

    EXPORT_DIR/1/  EXPORT_DIR/2/  ...

TensorFlow Serving watches such a directory. It loads a version as soon as it
sees the number, and ignores all other names. So a version is written under
another name, flushed to the disk, and then renamed.
"""

import contextlib
import errno
import fcntl
import os
import shutil
import uuid
from collections.abc import Callable
from collections.abc import Iterator

_UNFINISHED = ".unfinished-"


def numbered(export_dir: str | os.PathLike) -> dict[int, str]:
    """Returns the versions in a directory.

    Args:
        export_dir: A directory, which may not exist.

    Returns:
        version -> path, in ascending order.

    >>> numbered("there/is/no/such/directory")
    {}
    """
    names = os.listdir(export_dir) if os.path.isdir(export_dir) else []
    return {
        int(name): os.path.join(export_dir, name)
        for name in sorted((n for n in names if _is_number(n)), key=int)
    }


def check_export_dir(export_dir: str | os.PathLike) -> None:
    """Checks that a path is, or can become, a local directory.

    Raises:
        ValueError: If it is a URL, or a file.

    >>> check_export_dir("exports/resnet50")
    """
    path = os.fspath(export_dir)
    if "://" in path:
        raise ValueError(
            "it must be a local directory, because a version is published by "
            f"a rename; received {path}: export to a local one and copy it"
        )
    if os.path.lexists(path) and not os.path.isdir(path):
        raise ValueError(f"it must be a directory, received the file {path}")


def find(export_dir: str | os.PathLike, version: str) -> str:
    """Returns the path of one version.

    Raises:
        ValueError: If it does not exist.
    """
    there = numbered(export_dir)
    if not _is_number(version) or int(version) not in there:
        raise ValueError(
            f"it must be one of the versions in {os.fspath(export_dir)}, "
            f"{', '.join(map(str, there)) or 'none'}; received {version}"
        )
    return there[int(version)]


def publish(
    export_dir: str | os.PathLike,
    write: Callable[[str], None],
    version: int | None = None,
) -> str:
    """Publishes EXPORT_DIR/<version> atomically.

    Several exports into one directory may run at the same time. The next
    export that runs alone removes the remains of a killed one.

    Args:
        export_dir: A local directory; created if it does not exist.
        write: Takes the path of an empty directory, and fills it.
        version: None for one more than the highest existing version.

    Returns:
        The path of the new version.

    Raises:
        FileExistsError: If `version` exists.
        ValueError: If `export_dir` is not a local directory.
    """
    check_export_dir(export_dir)
    if version is not None:
        _check_is_free(export_dir, version)
    os.makedirs(export_dir, exist_ok=True)
    with _lock(export_dir):
        unfinished = os.path.join(export_dir, _UNFINISHED + uuid.uuid4().hex)
        os.mkdir(unfinished)  # mkdtemp would hide it from the server's user
        try:
            write(unfinished)
            _flush_all(unfinished)
            path = _rename(unfinished, export_dir, version)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
        _flush(export_dir)
    return path


def _is_number(name: str) -> bool:
    return name.isascii() and name.isdigit()


def _check_is_free(export_dir, version: int) -> None:
    if version < 0:
        raise ValueError(f"a version must be 0 or greater, received {version}")
    taken = numbered(export_dir)
    if version in taken:
        raise FileExistsError(
            f"version {version} exists in {export_dir}; the next free one is "
            f"{max(taken) + 1}"
        )


@contextlib.contextmanager
def _lock(export_dir) -> Iterator[None]:
    """Locks a directory for exports; removes remains if no other one runs.

    The system releases a lock when its process ends for any reason. On a file
    system without locks, nothing is removed.
    """
    descriptor = os.open(export_dir, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _remove_unfinished(export_dir)
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_SH)
        yield
    finally:
        os.close(descriptor)


def _remove_unfinished(export_dir) -> None:
    for name in os.listdir(export_dir):
        if name.startswith(_UNFINISHED):
            shutil.rmtree(os.path.join(export_dir, name), ignore_errors=True)


def _flush_all(directory: str) -> None:
    for folder, _, files in os.walk(directory):
        for name in files:
            _flush(os.path.join(folder, name))
        _flush(folder)


def _flush(path: str | os.PathLike) -> None:
    """Writes a file, or the names in a directory, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _rename(unfinished: str, export_dir, version: int | None) -> str:
    while True:
        number = version
        if number is None:
            number = max(numbered(export_dir), default=0) + 1
        path = os.path.join(export_dir, str(number))
        try:
            os.rename(unfinished, path)
            return path
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
            # Another export took the number first: take the next one.
            if version is not None:
                _check_is_free(export_dir, version)
