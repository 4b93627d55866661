"""Paths that TensorFlow can read and write SavedModels at."""

import contextlib
import os
import re
import tempfile
from collections.abc import Iterator


@contextlib.contextmanager
def without_wildcards(directory: str) -> Iterator[str]:
    r"""Yields a path without `*`, `?`, `[`, `\`, or bytes that are not UTF-8.

    TensorFlow finds the files of variables by a glob pattern that contains the
    directory's own path. A path with a wildcard does not match itself, so a
    symbolic link replaces it while the context is open. TensorFlow also rejects
    a path that is not UTF-8.

    >>> with without_wildcards("exports/1") as path:
    ...     path
    'exports/1'
    """
    if not re.search(r"[*?\[\\\ud800-\udfff]", directory):
        yield directory
        return
    with tempfile.TemporaryDirectory() as folder:
        link = os.path.join(folder, "saved_model")
        os.symlink(os.path.abspath(directory), link)
        yield link
