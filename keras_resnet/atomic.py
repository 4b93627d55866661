"""Files that are there as a whole or not at all."""

import os
from pathlib import Path


def write(path: str | os.PathLike, content: str | bytes) -> None:
    r"""Writes a file beside its place, then renames it.

    Args:
        path: The file. One that is there is replaced.
        content: Text, which is written as UTF-8, or bytes.

    Raises:
        OSError: If it cannot be written. The file is as it was before.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write(f"{folder}/errors.csv", "step,error\\n")
    ...     print(os.listdir(folder))
    ['errors.csv']
    """
    path = Path(path)
    if isinstance(content, str):
        content = content.encode()
    # A name that no user gives, so that what a kill left can be told.
    beside = path.with_name(f".keras_resnet-{os.getpid()}-{path.name[-50:]}")
    try:
        beside.write_bytes(content)
        os.replace(beside, path)
    except OSError:
        beside.unlink(missing_ok=True)
        raise
