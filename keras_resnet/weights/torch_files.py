"""Torch checkpoints: zip archives, and the older format before torch 1.6."""

import io
import os
import re
import zipfile
from typing import Any
from typing import BinaryIO

import numpy as np

from keras_resnet.weights import archives
from keras_resnet.weights import bounds
from keras_resnet.weights import dtypes
from keras_resnet.weights.bounds import Arrays
from keras_resnet.weights.bounds import short
from keras_resnet.weights.torch_pickles import Other
from keras_resnet.weights.torch_pickles import Storage
from keras_resnet.weights.torch_pickles import Tensor
from keras_resnet.weights.torch_pickles import check_type
from keras_resnet.weights.torch_pickles import unpickle

_MAGIC = 0x1950A86A20F9469CFC6C
_VERSION = 1001

# Where training programs keep the state_dict in the dict of a checkpoint.
_STATE_DICTS = ("state_dict", "model_state_dict", "model", "net")


def read_zip(archive: zipfile.ZipFile, size: int, most_bytes: int) -> Arrays:
    """Returns the arrays of a checkpoint of torch 1.6 or later.

    Args:
        archive: From `archives.opened`.
        size: Number of bytes of the file.
        most_bytes: Number of bytes that all arrays together may have.

    Raises:
        ValueError: If the archive is not a checkpoint, or exceeds the bounds.
    """
    names = archive.namelist()
    pickles = [name for name in names if name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise ValueError(
            "the archive must hold model.weights.h5 (Keras) or one data.pkl "
            f"(torch), received {short(names)}"
        )
    folder = pickles[0].removesuffix("data.pkl")
    order = f"{folder}byteorder"
    if order in names and archives.read(archive, order, 10) != b"little":
        raise ValueError("its numbers must be little-endian")

    pickle = archives.read(archive, pickles[0], bounds.MOST_PICKLE_BYTES)
    tensors = _state_dict(unpickle(io.BytesIO(pickle), {}))
    storages = _check_tensors(tensors, bounds.Budget(size, most_bytes))
    data = {
        key: archives.read(archive, f"{folder}data/{key}", storage.nbytes)
        for key, storage in storages.items()
    }
    return _arrays(tensors, data)


def read_legacy(file: BinaryIO, size: int, most_bytes: int) -> Arrays:
    """Returns the arrays of a checkpoint before torch 1.6.

    The file has five pickles (magic number, version, system, checkpoint, keys
    of the storages), then the storages.

    Args:
        file: The file, at its start.
        size: Number of its bytes.
        most_bytes: Number of bytes that all arrays together may have.

    Raises:
        ValueError: If the file is not a checkpoint, or exceeds the bounds.
    """
    pickles = io.BytesIO(file.read(5 * bounds.MOST_PICKLE_BYTES))
    magic = unpickle(pickles, {})
    if magic != _MAGIC:
        raise ValueError(
            "a pickle must start with torch's magic number, received "
            f"{short(magic)}"
        )
    version, system = unpickle(pickles, {}), unpickle(pickles, {})
    if version != _VERSION:
        raise ValueError(
            f"its version must be {_VERSION}, received {short(version)}"
        )
    if not check_type(system, dict)["little_endian"]:
        raise ValueError("its numbers must be little-endian")
    known: dict[str, Storage] = {}
    tensors = _state_dict(unpickle(pickles, known))
    storages = _check_tensors(tensors, bounds.Budget(size, most_bytes))
    keys = check_type(unpickle(pickles, {}), list)
    file.seek(pickles.tell())
    return _arrays(tensors, _read_storages(file, keys, known, storages))


def _read_storages(
    file: BinaryIO,
    keys: list[Any],
    known: dict[str, Storage],
    needed: dict[str, Storage],
) -> dict[str, bytes]:
    """Reads the needed storages, and skips those of an optimizer."""
    data = {}
    for key in keys:
        storage = known.get(check_type(key, str))
        if storage is None:
            raise ValueError(
                f"a tensor must use each storage, received {short(key)}"
            )
        count = int.from_bytes(file.read(8), "little")
        if count != storage.length:
            raise ValueError(
                f"storage {short(key)} must have {storage.length} elements, "
                f"received {count}"
            )
        if key in needed:
            data[key] = file.read(storage.nbytes)
        else:
            file.seek(storage.nbytes, os.SEEK_CUR)
    for key in needed:
        if key not in data:
            raise ValueError(f"the file must have storage {short(key)}")
    return data


def _state_dict(contents: Any) -> dict[str, Tensor]:
    """Returns the tensors of a state_dict, or of that in a checkpoint."""
    candidates = [contents]
    if isinstance(contents, dict):
        # Beside a state_dict a checkpoint may have tensors of its own.
        inside = [contents[name] for name in _STATE_DICTS if name in contents]
        candidates = [*inside, contents]
    for candidate in candidates:
        if not isinstance(candidate, dict):
            continue
        tensors = {
            name: value
            for name, value in candidate.items()
            if isinstance(value, Tensor)
        }
        if tensors:
            _check_dense(candidate)
            return tensors
    raise ValueError(
        "a checkpoint must hold a state_dict (a dict of tensors, alone or "
        f"under {', '.join(_STATE_DICTS)})"
    )


def _check_dense(state_dict: dict[str, Any]) -> None:
    """Raises ValueError if a state_dict has quantized or sparse tensors."""
    for name, value in state_dict.items():
        if isinstance(value, Other) and re.search(
            "tensor|_rebuild", value.name
        ):
            raise ValueError(
                f"{short(name)} must be a dense tensor of real numbers, "
                f"received {value.name.replace(' ', '.')}"
            )


def _check_tensors(
    tensors: dict[str, Tensor], budget: bounds.Budget
) -> dict[str, Storage]:
    """Checks the tensors, and returns the storages that hold them."""
    storages: dict[str, Storage] = {}
    for name, (storage, offset, shape, strides) in tensors.items():
        count = budget.spend(name, shape, dtypes.itemsize(storage.dtype))
        # `zip` raises ValueError where one is longer than the other.
        steps = zip(shape, strides, strict=True)
        last = offset + sum((n - 1) * step for n, step in steps)
        if count > storage.length or last >= storage.length:
            raise ValueError(
                f"{short(name)} must lie inside its storage of "
                f"{storage.length} elements, received element {last}"
            )
        if storages.setdefault(storage.key, storage) != storage:
            raise ValueError(
                f"storage {short(storage.key)} must have one length and dtype"
            )
    budget.check_bytes(sum(storage.nbytes for storage in storages.values()))
    return storages


def _arrays(tensors: dict[str, Tensor], data: dict[str, bytes]) -> Arrays:
    return {
        name: _array(tensor, data[tensor.storage.key])
        for name, tensor in tensors.items()
    }


def _array(tensor: Tensor, data: bytes) -> np.ndarray:
    """Returns the array that a tensor is a view of, within checked bounds."""
    storage, offset, shape, strides = tensor
    if len(data) != storage.nbytes:
        raise ValueError(
            f"storage {short(storage.key)} must have {storage.nbytes} bytes, "
            f"received {len(data)}: the file is truncated"
        )
    array = dtypes.decode(data, storage.dtype)[offset:]
    strides = tuple(step * array.itemsize for step in strides)
    return np.lib.stride_tricks.as_strided(array, shape, strides).copy()
