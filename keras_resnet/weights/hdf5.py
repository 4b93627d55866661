"""HDF5 as Keras writes it: `.weights.h5`, `.h5`, and inside `.keras` files.

Links to other files are not followed, compressed arrays are rejected, and the
structure of a file is bounded before h5py reads it.
"""

import io
import mmap
from collections.abc import Iterator
from typing import Any
from typing import BinaryIO

import numpy as np

from keras_resnet.weights import bounds
from keras_resnet.weights import dtypes
from keras_resnet.weights.bounds import Arrays
from keras_resnet.weights.bounds import short

SIGNATURE = b"\x89HDF\r\n\x1a\n"


def read(file: BinaryIO, size: int, most_bytes: int) -> Arrays:
    """Returns every array of a file, by the names of the layers around it.

    Keras 3 has its layers under `layers/`. The older layout has a group for
    each layer.

    Args:
        file: The file.
        size: Number of its bytes.
        most_bytes: Number of bytes that all arrays together may have.

    Raises:
        ValueError: If the file is damaged, or exceeds the bounds.
    """
    if size > 4 * most_bytes:
        raise ValueError(
            f"it must be at most {4 * most_bytes:,} bytes, received {size:,}"
        )
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as contents:
        _check_heaps(contents)
    return _read(file, size, most_bytes)


def read_bytes(contents: bytes, most_bytes: int) -> Arrays:
    """Returns every array of the bytes of a file, as `read` does."""
    _check_heaps(contents)
    return _read(io.BytesIO(contents), len(contents), most_bytes)


def _read(file: BinaryIO, size: int, most_bytes: int) -> Arrays:
    import h5py

    arrays: Arrays = {}
    labels: dict[str, str | None] = {}
    budget = bounds.Budget(size, most_bytes)
    with h5py.File(file, "r") as root:
        # Beside Keras 3's layers stands the state of an optimizer.
        is_keras_3 = root.id.links.exists(b"layers")
        for path, item in _walk(root.id):
            top = path.partition("/")[0]
            if top != "layers" if is_keras_3 else top == "optimizer_weights":
                continue
            if isinstance(item, h5py.h5g.GroupID) and path.endswith("/vars"):
                labels[path.removesuffix("/vars")] = _text(item, "name")
            if isinstance(item, h5py.h5d.DatasetID):
                _check_dataset(path, item, budget)
                arrays[path] = _read_dataset(path, item)
    named: Arrays = {}
    for path, array in arrays.items():
        if is_keras_3:
            name = _labelled(path, labels)
        else:
            name = _legacy_name(path.removeprefix("model_weights/"))
        if "seed_generator" not in name:
            named[name.removesuffix(":0")] = array
    return named


def array_bytes(contents: bytes) -> int:
    """Returns the bytes of all arrays in a file that Keras is to read itself.

    Args:
        contents: The file, as Keras writes it.

    Raises:
        ValueError: If the file has a link, or exceeds the bounds.
    """
    import h5py

    _check_heaps(contents)
    budget = bounds.Budget(len(contents), len(contents), bounds.MOST_MEMBERS)
    total = 0
    with h5py.File(io.BytesIO(contents), "r") as root:
        for path, item in _walk(root.id):
            if item is None:
                raise ValueError(f"{short(path)} must not be a link")
            if isinstance(item, h5py.h5d.DatasetID):
                total += _check_dataset(path, item, budget)
    return total


# --- Structure ---------------------------------------------------------------


def _check_heaps(data: bytes | mmap.mmap) -> None:
    """Raises ValueError if a heap of texts in HDF5 would never end.

    HDF5 1.14 does not return from a heap with an object of no length.
    """
    if data[:8] != SIGNATURE:
        raise ValueError("its weights must be HDF5")
    lengths = data[13:15] if data[8] < 2 else data[9:11]
    if lengths != b"\x08\x08":
        raise ValueError("its addresses and lengths must have 8 bytes")
    left = bounds.MOST_HEAP_OBJECTS
    start = data.find(b"GCOL\x01")
    while start >= 0:
        at = start + 16
        end = start + int.from_bytes(data[start + 8 : at], "little")
        while at + 16 <= min(end, len(data)):
            index = int.from_bytes(data[at : at + 2], "little")
            length = int.from_bytes(data[at + 8 : at + 16], "little")
            step = 16 + -(-length // 8) * 8 if index else length
            left -= 1
            if not 16 <= step <= end - at or left < 0:
                raise ValueError("a heap of its texts is damaged")
            at += step
        start = data.find(b"GCOL\x01", start + 1)


def _walk(root: Any) -> Iterator[tuple[str, Any]]:
    """Yields the path and the identifier of each member of a file.

    Soft and external links are not followed: their identifier is None. Hard
    links may form cycles, which the depth bounds.
    """
    import h5py

    visited = 0
    most = bounds.MOST_MEMBERS

    def walk(group: Any, path: str, depth: int) -> Iterator[tuple[str, Any]]:
        nonlocal visited
        links: list[tuple[bytes, int]] = []

        def add(name: bytes, info: Any) -> bool:
            links.append((name, info.type))
            return visited + len(links) > most  # ends the iteration

        group.links.iterate(add, info=True)
        visited += len(links)
        if visited > most:
            raise ValueError(f"it must have at most {most:,} members")
        for name, kind in links:
            inside = path + name.decode("utf-8", "replace")
            if (
                depth > bounds.MOST_DEPTH
                or len(inside) > 4 * bounds.MOST_LETTERS
            ):
                raise ValueError(
                    f"its groups must be at most {bounds.MOST_DEPTH} deep, "
                    f"with short names, received {short(inside)}"
                )
            if kind != h5py.h5l.TYPE_HARD:
                yield inside, None
                continue
            item = h5py.h5o.open(group, name)
            yield inside, item
            if isinstance(item, h5py.h5g.GroupID):
                yield from walk(item, f"{inside}/", depth + 1)

    yield from walk(root, "", 1)


# --- Arrays and texts --------------------------------------------------------


def _check_dataset(path: str, item: Any, budget: bounds.Budget) -> int:
    """Checks a dataset before it is read, and returns its bytes."""
    import h5py

    name = short(path)
    plan = item.get_create_plist()
    layout = plan.get_layout()
    if plan.get_external_count() or layout == h5py.h5d.VIRTUAL:
        raise ValueError(f"{name} must not refer to another file")
    dtype = item.dtype
    is_bfloat16 = dtype.itemsize == 2 and dtype.kind == "V"
    if (dtype.kind not in "fiub" and not is_bfloat16) or dtype.itemsize > 8:
        raise ValueError(f"{name} must hold numbers, received {short(dtype)}")
    size = budget.spend(path, item.shape, dtype.itemsize) * dtype.itemsize
    if layout not in (h5py.h5d.CONTIGUOUS, h5py.h5d.COMPACT):
        raise ValueError(
            f"{name} must be contiguous, received chunks, which may be "
            "compressed: run `h5repack -l CONTI -f NONE FILE NEW_FILE`"
        )
    stored = item.get_storage_size()
    if stored != size:
        raise ValueError(
            f"{name} must have {size:,} bytes in the file, received {stored:,}"
        )
    return size


def _read_dataset(path: str, item: Any) -> np.ndarray:
    import h5py

    array = h5py.Dataset(item)[()]
    if _text(item, "dtype") == "bfloat16":
        return dtypes.decode(array.tobytes(), "bfloat16").reshape(item.shape)
    if array.dtype.kind not in "fiu":
        raise ValueError(
            f"{short(path)} must hold numbers, received {array.dtype}"
        )
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def _text(item: Any, name: str) -> str | None:
    """Returns a short text in an attribute, or None if the item lacks it."""
    import h5py

    if not h5py.h5a.exists(item, name.encode()):
        return None
    attribute = h5py.h5a.open(item, name.encode())
    error = ValueError(
        f"the attribute {name} must be a text of at most "
        f"{bounds.MOST_LETTERS} letters"
    )
    # The text of variable length lies elsewhere, with a reference here.
    size = attribute.get_storage_size()
    if attribute.shape != () or size > bounds.MOST_LETTERS:
        raise error
    is_group = isinstance(item, h5py.h5g.GroupID)
    owner = h5py.Group(item) if is_group else h5py.Dataset(item)
    value = owner.attrs[name]
    if not isinstance(value, str) or len(value) > bounds.MOST_LETTERS:
        raise error
    return value


# --- Names -------------------------------------------------------------------


def _legacy_name(name: str) -> str:
    """Translates a dataset's name in the older layout to names of layers.

    The group of a layer holds names that start with it; that of a network
    inside a model holds the names of the network, without its own.

    >>> _legacy_name("conv1/conv1/kernel:0"), _legacy_name("left/conv1/kernel")
    ('conv1/kernel:0', 'left/conv1/kernel')
    """
    group, _, inside = name.partition("/")
    _, found, rest = f"/{inside}".partition(f"/{group}/")
    return f"{group}/{rest if found else inside}"


def _labelled(name: str, labels: dict[str, str | None]) -> str:
    """Translates a dataset's name in Keras 3's layout to names of layers.

    Keras counts the layers of each class and notes their names beside.
    """
    layer, _, index = name.rpartition("/vars/")
    parts = layer.split("/")
    owners = ["/".join(parts[:end]) for end in range(2, len(parts) + 1)]
    path = [labels[owner] for owner in owners if owner in labels]
    if not path or None in path:
        raise ValueError(
            "its layers must have names, which early versions of Keras 3 did "
            "not write: load it in Keras 3.6 or later and save it again"
        )
    return "/".join([*(part or "" for part in path), index])
