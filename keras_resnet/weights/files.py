"""Files of weights, read into named arrays; no code in them ever runs.

Each format has a module: `hdf5`, `archives` (zip), `torch_files` and
`safetensors`.
"""

import os
from typing import BinaryIO

from keras_resnet import names
from keras_resnet.weights import archives
from keras_resnet.weights import bounds
from keras_resnet.weights import hdf5
from keras_resnet.weights import safetensors
from keras_resnet.weights import torch_files
from keras_resnet.weights.bounds import Arrays

_MOST_REASON = 400


def read(
    path: str | os.PathLike, most_bytes: int = bounds.MOST_BYTES
) -> Arrays:
    """Returns every array of a file of weights, by its name in the file.

    The sizes that the file declares are checked before an array is read.

    Args:
        path: A `.weights.h5`, `.keras` or `.h5` file of Keras, a torch
            checkpoint or a `.safetensors` file. The first bytes of the file
            determine its format.
        most_bytes: Number of bytes that all arrays together may have.

    Returns:
        A dict of arrays. Arrays of bfloat16 are returned as float32. Control
        characters in a name are escaped (`names.escaped`).

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged, has an unknown format, or exceeds
            the bounds.
    """
    arrays = _read(path, bounds.regular_size(path), most_bytes)
    return {names.escaped(name): array for name, array in arrays.items()}


def _read(path: str | os.PathLike, size: int, most_bytes: int) -> Arrays:
    try:
        with open(path, "rb") as file:
            head = file.read(9)
            file.seek(0)
            if head.startswith(hdf5.SIGNATURE):
                return hdf5.read(file, size, most_bytes)
            if head.startswith(b"PK"):
                return _read_zip(file, size, most_bytes)
            if head[8:] == b"{":
                return safetensors.read(file, size, most_bytes)
            if head.startswith(b"\x80"):
                return torch_files.read_legacy(file, size, most_bytes)
    except Exception as error:  # h5py and zipfile raise nearly everything
        reason = names.escaped(" ".join(str(error)[:_MOST_REASON].split()))
        raise ValueError(
            f"{os.fspath(path)} cannot be read as weights: "
            f"{reason or type(error).__name__}"
        ) from error
    raise ValueError(
        f"{os.fspath(path)} must be a file of weights: .weights.h5, .keras, "
        ".h5, .pth, .pt, .th or .safetensors, received a file that starts with "
        f"{bounds.short(head)}"
    )


def _read_zip(file: BinaryIO, size: int, most_bytes: int) -> Arrays:
    """Reads a `.keras` archive, or a checkpoint of torch 1.6 or later."""
    with archives.opened(file, size) as archive:
        if "model.weights.h5" in archive.namelist():
            contents = archives.read(
                archive, "model.weights.h5", 4 * most_bytes
            )
            return hdf5.read_bytes(contents, most_bytes)
        return torch_files.read_zip(archive, size, most_bytes)
