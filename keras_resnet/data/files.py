"""Files that can be read to their end."""

import os
import stat

# Largest file of one image.
IMAGE_BYTES = 2**28


def check_file(path: str, most_bytes: int | None = None) -> None:
    """Raises unless a path is a regular file of a limited size.

    Reading from a pipe or a device may never end.

    Args:
        path: Path of the file.
        most_bytes: Largest size; None for any.

    Raises:
        ValueError: If the file is not a regular one, or is larger.
    """
    try:
        status = os.stat(path)
    except OSError as error:  # a link to nothing, among others
        raise ValueError(
            f"{path} must be a regular file, it cannot be opened "
            f"({error.strerror}): remove it"
        ) from error
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(
            f"{path} must be a regular file, received {_kind(status.st_mode)}: "
            "remove it"
        )
    if most_bytes is not None and status.st_size > most_bytes:
        raise ValueError(
            f"{path} must have at most {most_bytes:,} bytes, received "
            f"{status.st_size:,}: remove it"
        )


def _kind(mode):
    kinds = {
        stat.S_ISDIR: "a directory",
        stat.S_ISFIFO: "a pipe",
        stat.S_ISSOCK: "a socket",
        stat.S_ISCHR: "a device",
        stat.S_ISBLK: "a device",
    }
    return next((kind for is_kind, kind in kinds.items() if is_kind(mode)), "?")
