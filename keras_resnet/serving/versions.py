"""A directory of numbered versions, each of which appears at once and whole.

    EXPORT_DIR/1/  EXPORT_DIR/2/  ...

is what TensorFlow Serving watches: it loads a version as soon as it sees its
number, and passes over every other name. So a version is written under
another name beside its place, brought to the disk, and only then renamed.
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
    """The versions that stand in a directory.

    Args:
        export_dir: a directory; it need not exist.

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


def check(export_dir: str | os.PathLike) -> None:
    """Says what can be no directory of versions.

    Raises:
        ValueError: it is a URL, or something else stands there.

    >>> check("exports/resnet50")
    """
    path = os.fspath(export_dir)
    if "://" in path:
        raise ValueError(
            "a version appears by a rename, which needs a local directory: "
            f"export into one and copy it; received {path}"
        )
    if os.path.lexists(path) and not os.path.isdir(path):
        raise ValueError(f"it must be a directory, received the file {path}")


def find(export_dir: str | os.PathLike, version: str) -> str:
    """The path of one version.

    Raises:
        ValueError: there is none of this number.
    """
    there = numbered(export_dir)
    if not _is_number(version) or int(version) not in there:
        raise ValueError(
            f"the versions in {os.fspath(export_dir)} are "
            f"{', '.join(map(str, there)) or 'none'}, received {version}"
        )
    return there[int(version)]


def publish(
    export_dir: str | os.PathLike,
    write: Callable[[str], None],
    version: int | None = None,
) -> str:
    """EXPORT_DIR/<version>, filled by `write`; all of it or nothing.

    Exports into one directory may run at the same time. What a killed export
    left is removed by the next one that runs alone.

    Args:
        export_dir: a local directory; made where there is none.
        write: called with the path of an empty directory, which it fills.
        version: None: one more than the highest that stands there.

    Returns:
        The path of the new version.

    Raises:
        FileExistsError: `version` stands there already.
        ValueError: `export_dir` is no local directory.
    """
    check(export_dir)
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
            f"version {version} stands in {export_dir} already; the next free "
            f"one is {max(taken) + 1}"
        )


@contextlib.contextmanager
def _lock(export_dir) -> Iterator[None]:
    """Says "an export writes here"; removes left-overs if nobody else does.

    The system gives a lock up with its process, however that ends. On a file
    system without locks nothing is removed.
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
    """Brings a file, or the names in a directory, to the disk."""
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
            # Another export was faster: take the number after its own.
            if version is not None:
                _check_is_free(export_dir, version)
