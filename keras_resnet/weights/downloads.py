"""Downloads of published weights: whole and checked, or not at all.

A file is looked for in the folder of `KERAS_RESNET_WEIGHTS_DIR`, then in Keras'
cache. If it is in neither, it is downloaded to Keras' cache, beside its place.
It is renamed after its hash was checked. An interrupted download resumes.
"""

import contextlib
import hashlib
import http.client
import os
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from typing import BinaryIO

from keras_resnet.weights import bounds

#: Environment variable with a folder of weights, for machines without network.
FOLDER_VARIABLE = "KERAS_RESNET_WEIGHTS_DIR"

#: Attempts of one download, and the seconds between them.
ATTEMPTS = 5
PAUSE_SECONDS = 1.0

TIMEOUT_SECONDS = 30.0

_CHUNK = 2**16


class DownloadError(OSError):
    """A file that can be neither found nor downloaded."""


def cache_folder() -> Path:
    """Returns the folder of weights in Keras' cache."""
    home = os.environ.get("KERAS_HOME") or os.path.join("~", ".keras")
    return Path(home).expanduser() / "models"


def digest_of(path: str | os.PathLike, kind: str = "sha256") -> str:
    """Returns the hash of a file in hexadecimal digits.

    Args:
        path: The file.
        kind: `"sha256"` or `"md5"`.
    """
    found = hashlib.new(kind, usedforsecurity=False)
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            found.update(chunk)
    return found.hexdigest()


def find(file_name: str, digest: str) -> Path | None:
    """Returns the path of a file that is on this machine, or None.

    Args:
        file_name: Name of the file.
        digest: As in `get`.

    Raises:
        DownloadError: If the file of `KERAS_RESNET_WEIGHTS_DIR` has another
            hash.
    """
    folder = os.environ.get(FOLDER_VARIABLE)
    if folder and (Path(folder) / file_name).is_file():
        path = Path(folder) / file_name
        if wrong := _wrong(path, digest):
            raise DownloadError(
                f"{path} must have the {wrong}: replace the file"
            )
        return path
    path = cache_folder() / file_name
    return path if path.is_file() and not _wrong(path, digest) else None


def get(url: str, digest: str) -> Path:
    """Returns the path of a file, downloaded once.

    Proxies are those of the environment (`https_proxy`).

    Args:
        url: Address of the file. Its last part is the name of the file.
        digest: `"sha256:"` or `"md5:"`, and the hash in hexadecimal digits or
            its first digits.

    Raises:
        DownloadError: If the file cannot be downloaded, or has another hash.
            The message has the address and the place for the file.
    """
    file_name = url.rpartition("/")[2]
    found = find(file_name, digest)
    if found is not None:
        return found
    path = cache_folder() / file_name
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _part_of(path) as part:
            _download(url, part, digest)
            os.replace(part.name, path)
    except DownloadError as error:
        raise DownloadError(f"{error}. {_by_hand(url, path)}") from error
    except OSError as error:
        raise DownloadError(
            f"{url} cannot be downloaded: {_reason(error)}. "
            f"{_by_hand(url, path)}"
        ) from error
    return path


def _by_hand(url: str, path: Path) -> str:
    return (
        f"To get it by hand, save {url} as {path}, or set {FOLDER_VARIABLE} to "
        "the folder that has it"
    )


def _reason(error: BaseException) -> str:
    inner = getattr(error, "reason", None)
    error = inner if isinstance(inner, BaseException) else error
    return " ".join(str(error).split()) or type(error).__name__


def _wrong(path: str | os.PathLike, digest: str) -> str:
    """Returns "" if a file has its hash, or the two hashes in words."""
    kind, _, digits = digest.partition(":")
    found = digest_of(path, kind)
    if found.startswith(digits):
        return ""
    return f"{kind} {digits}, received {found[: len(digits)]}"


@contextlib.contextmanager
def _part_of(path: Path) -> Iterator[BinaryIO]:
    """Opens the file beside a path that a download is written to.

    An interrupted download leaves this file, and the next one resumes it. If
    another process writes to it now, this process gets a file of its own.
    """
    import fcntl

    name = path.with_name(f"{path.name}.part")
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(open(name, "a+b", buffering=0))
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            name = path.with_name(f"{path.name}.{os.getpid()}.part")
            file = stack.enter_context(open(name, "a+b", buffering=0))
            stack.callback(name.unlink, missing_ok=True)
        yield file


def _download(url: str, part: BinaryIO, digest: str) -> None:
    """Downloads to a file, which may have the first bytes already."""
    for is_resumed in (part.seek(0, os.SEEK_END) > 0, False):
        if not is_resumed:
            part.truncate(0)
        _fetch(url, part)
        part.flush()
        os.fsync(part.fileno())
        wrong = _wrong(part.name, digest)
        if not wrong:
            return
        part.truncate(0)
        if not is_resumed:
            raise DownloadError(
                f"{url} must have the {wrong}: nothing of it was kept"
            )


def _fetch(url: str, part: BinaryIO) -> None:
    """Appends the rest of an address to a file, in a few attempts."""
    for attempt in range(1, ATTEMPTS + 1):
        try:
            _append(url, part)
            return
        except urllib.error.HTTPError as error:
            with error:
                if error.code == 416:  # the server has fewer bytes
                    part.truncate(0)
                elif error.code < 500 and error.code not in (408, 429):
                    raise DownloadError(
                        f"{url} cannot be downloaded: the server responds "
                        f"{error.code} {error.reason}"
                    ) from error
            last: Exception = error
        except DownloadError:  # of its size
            part.truncate(0)
            raise
        except (OSError, http.client.HTTPException) as error:
            if isinstance(getattr(error, "reason", None), socket.gaierror):
                raise  # no network, or no such server
            last = error
        if attempt < ATTEMPTS:
            time.sleep(PAUSE_SECONDS * attempt)
    raise DownloadError(
        f"{url} cannot be downloaded: {_reason(last)} ({ATTEMPTS} attempts; "
        "the next run resumes)"
    ) from last


def _append(url: str, part: BinaryIO) -> None:
    start = part.seek(0, os.SEEK_END)
    headers = {"User-Agent": "keras_resnet", "Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
    request = urllib.request.Request(url, headers=headers)
    with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as response:
        if start and response.status != 206:  # the server starts again
            part.truncate(0)
            start = 0
        length = response.headers.get("Content-Length") or ""
        total = start + int(length) if length.isdecimal() else None
        _check_size(url, total or start)
        with _bar(url, total, start) as bar:
            while chunk := response.read(_CHUNK):
                _check_size(url, part.tell() + len(chunk))
                part.write(chunk)
                bar.update(len(chunk))
    part.flush()
    size = part.seek(0, os.SEEK_END)
    if total is not None and size != total:
        raise ConnectionError(
            f"the connection ended after {size:,} of {total:,} bytes"
        )


def _check_size(url: str, size: int) -> None:
    """Raises DownloadError for more bytes than weights have."""
    if size > bounds.MOST_BYTES:
        raise DownloadError(
            f"{url} must have at most {bounds.MOST_BYTES:,} bytes, the server "
            f"has {size:,} or more"
        )


def _bar(url: str, total: int | None, start: int) -> Any:
    """Returns a progress bar, which is drawn on a terminal only."""
    import tqdm

    return tqdm.tqdm(
        desc=url.rpartition("/")[2],
        total=total,
        initial=start,
        unit="B",
        unit_scale=True,
        unit_divisor=1000,
        disable=None,
    )
