"""Files of weights, read into named arrays; nothing in them is ever run.

HDF5 as Keras writes it, torch checkpoints and safetensors. A torch checkpoint
is a pickle, which is a program: here a little machine interprets it that knows
literals, containers and tensors, and has no way to call anything.
"""

import io
import math
import mmap
import os
import pickletools
import stat
from collections.abc import Callable
from collections.abc import Iterator
from typing import Any
from typing import BinaryIO
from typing import NamedTuple
from typing import cast

import numpy as np

from keras_resnet.weights import archives

Arrays = dict[str, np.ndarray]

# ResNet-1202 with option C, unrolled, has 12,600 arrays in a torch checkpoint,
# and 19,800 members of HDF5 in a file of Keras. An optimizer adds 9,000 more.
MOST_ARRAYS = 20_000
_MOST_MEMBERS = 50_000
_HDF5 = b"\x89HDF\r\n\x1a\n"
_MOST_HEAP_OBJECTS = 10 * _MOST_MEMBERS
_MOST_DEPTH = 32
_MOST_DIMENSIONS = 8
_MOST_LETTERS = 256
_MOST_REASON = 400

# The float32 weights of ResNet-200 are 0.26e9 bytes.
MOST_BYTES = 2**31

# A tensor takes 40 instructions of a pickle, and an optimizer has two more
# tensors for each weight. The header of safetensors takes 200 bytes an array.
_MOST_PICKLE_BYTES = 2**24
_MOST_INSTRUCTIONS = 3 * 40 * MOST_ARRAYS
_MOST_HEADER_BYTES = 2**23


def read(path: str | os.PathLike, most_bytes: int = MOST_BYTES) -> Arrays:
    """Returns every array of a file of weights, by its name in the file.

    All sizes that the file declares are checked before an array is read.

    Args:
        path: A `.weights.h5`, `.keras` or `.h5` file of Keras, a torch
            checkpoint or a `.safetensors` file. Its first bytes show which.
        most_bytes: Number of bytes that all arrays together may have.

    Returns:
        A dict of arrays; those of bfloat16 as float32, others as they are.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged, has an unknown format, or exceeds
            the bounds of this module.
    """
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait
        raise ValueError(f"{os.fspath(path)} must be a regular file")
    size = status.st_size
    try:
        with open(path, "rb") as file:
            head = file.read(9)
            file.seek(0)
            if head.startswith(_HDF5):
                if size > 4 * most_bytes:
                    raise ValueError(
                        f"it must be at most {4 * most_bytes:,} bytes, "
                        f"received {size:,}"
                    )
                with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as m:
                    _check_heaps(m)
                return _read_hdf5(file, size, most_bytes)
            if head.startswith(b"PK"):
                return _read_zip(file, size, most_bytes)
            if head[8:] == b"{":
                return _read_safetensors(file, size, most_bytes)
            if head.startswith(b"\x80"):
                return _read_torch_legacy(file, size, most_bytes)
    except Exception as error:  # h5py and zipfile raise nearly everything
        reason = str(error)[:_MOST_REASON] or type(error).__name__
        raise ValueError(
            f"{os.fspath(path)} cannot be read as weights: {reason}"
        ) from error
    raise ValueError(
        f"{os.fspath(path)} is no file of weights that this package knows: "
        ".weights.h5, .keras, .h5, .pth, .pt, .th or .safetensors"
    )


# --- Bounds ------------------------------------------------------------------


class _Budget:
    """The arrays and bytes that a file may still have.

    Args:
        size: Number of bytes of the file.
        most_bytes: Number of bytes that all arrays together may have.
        most_arrays: Number of arrays.
    """

    def __init__(
        self, size: int, most_bytes: int, most_arrays: int = MOST_ARRAYS
    ):
        self._size, self._most_bytes = size, most_bytes
        self._most_arrays = most_arrays
        self._arrays = self._bytes = 0

    def spend(self, name: str, shape: Any, itemsize: int) -> int:
        """Counts an array before it is read.

        Returns:
            The number of elements of the array.

        Raises:
            ValueError: If the shape is invalid, the name too long, or the
                arrays are too many or too large.
        """
        if not 0 < len(name) <= _MOST_LETTERS:
            raise ValueError(
                f"the name of an array must have 1 to {_MOST_LETTERS} letters, "
                f"received {archives.short(name)}"
            )
        _check_numbers("a shape", shape, 1)
        count = math.prod(shape)
        self._arrays += 1
        self._bytes += count * itemsize
        if self._arrays > self._most_arrays:
            raise ValueError(
                f"it must have at most {self._most_arrays:,} arrays"
            )
        self.check_bytes(self._bytes)
        return count

    def check_bytes(self, number: int) -> None:
        """Raises ValueError if the file may not hold so many bytes."""
        if number > archives.EXPANSION * self._size:
            raise ValueError("it claims to hold far more than its size")
        if number > self._most_bytes:
            raise ValueError(
                f"its arrays must have at most {self._most_bytes:,} bytes"
            )


def _check_numbers(what: str, numbers: Any, least: int) -> None:
    """Raises ValueError unless `numbers` are a few integers in 64 bits."""
    if (
        not isinstance(numbers, list | tuple)
        or len(numbers) > _MOST_DIMENSIONS
        or any(type(n) is not int or not least <= n < 2**63 for n in numbers)
    ):
        raise ValueError(
            f"{what} makes no sense: it must be at most {_MOST_DIMENSIONS} "
            f"integers, each at least {least}, received "
            f"{archives.short(numbers)}"
        )


# --- HDF5 --------------------------------------------------------------------


def _read_hdf5(file: BinaryIO, size: int, most_bytes: int) -> Arrays:
    """Keras 3's layout (`layers/...`) or the older one, a group a layer."""
    import h5py

    arrays: Arrays = {}
    labels: dict[str, str | None] = {}
    budget = _Budget(size, most_bytes)
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


def hdf5_bytes(contents: bytes) -> int:
    """Returns the bytes of all arrays in a file that Keras is to read itself.

    Args:
        contents: The file, as Keras writes it.

    Raises:
        ValueError: If the file has a link, or exceeds the bounds of this
            module.
    """
    import h5py

    _check_heaps(contents)
    budget = _Budget(len(contents), len(contents), _MOST_MEMBERS)
    total = 0
    with h5py.File(io.BytesIO(contents), "r") as root:
        for path, item in _walk(root.id):
            if item is None:
                raise ValueError(
                    f"{archives.short(path)} refers to another place"
                )
            if isinstance(item, h5py.h5d.DatasetID):
                total += _check_dataset(path, item, budget)
    return total


def _check_heaps(data: bytes | mmap.mmap) -> None:
    """Raises ValueError if a heap of texts in HDF5 would never end.

    HDF5 1.14 does not return from a heap with an object of no length.
    """
    if data[:8] != _HDF5:
        raise ValueError("its weights are not HDF5")
    lengths = data[13:15] if data[8] < 2 else data[9:11]
    if lengths != b"\x08\x08":
        raise ValueError("its addresses and lengths must have 8 bytes")
    left = _MOST_HEAP_OBJECTS
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

    def walk(group: Any, path: str, depth: int) -> Iterator[tuple[str, Any]]:
        nonlocal visited
        links: list[tuple[bytes, int]] = []

        def add(name: bytes, info: Any) -> bool:
            links.append((name, info.type))
            return visited + len(links) > _MOST_MEMBERS  # ends the iteration

        group.links.iterate(add, info=True)
        visited += len(links)
        if visited > _MOST_MEMBERS:
            raise ValueError(f"it must have at most {_MOST_MEMBERS:,} members")
        for name, kind in links:
            inside = path + name.decode("utf-8", "replace")
            if depth > _MOST_DEPTH or len(inside) > 4 * _MOST_LETTERS:
                raise ValueError(
                    f"its groups must be at most {_MOST_DEPTH} deep, with "
                    f"short names, received {archives.short(inside)}"
                )
            if kind != h5py.h5l.TYPE_HARD:
                yield inside, None
                continue
            item = h5py.h5o.open(group, name)
            yield inside, item
            if isinstance(item, h5py.h5g.GroupID):
                yield from walk(item, f"{inside}/", depth + 1)

    yield from walk(root, "", 1)


def _check_dataset(path: str, item: Any, budget: _Budget) -> int:
    """Checks a dataset before it is read, and returns its bytes."""
    import h5py

    name = archives.short(path)
    plan = item.get_create_plist()
    layout = plan.get_layout()
    if plan.get_external_count() or layout == h5py.h5d.VIRTUAL:
        raise ValueError(f"{name} refers to another file")
    dtype = item.dtype
    is_bfloat16 = dtype.itemsize == 2 and dtype.kind == "V"
    if (dtype.kind not in "fiub" and not is_bfloat16) or dtype.itemsize > 8:
        raise ValueError(f"{name} holds {archives.short(dtype)} and no numbers")
    size = budget.spend(path, item.shape, dtype.itemsize) * dtype.itemsize
    if layout not in (h5py.h5d.CONTIGUOUS, h5py.h5d.COMPACT):
        raise ValueError(
            f"{name} is in chunks, which may be compressed: "
            "`h5repack -l CONTI -f NONE FILE NEW_FILE` makes it contiguous"
        )
    if item.get_storage_size() != size:
        raise ValueError(f"{name} was never written")
    return size


def _read_dataset(path: str, item: Any) -> np.ndarray:
    import h5py

    array = h5py.Dataset(item)[()]
    if _text(item, "dtype") == "bfloat16":
        return _decode(array.tobytes(), "bfloat16").reshape(item.shape)
    if array.dtype.kind not in "fiu":
        raise ValueError(
            f"{archives.short(path)} holds {array.dtype} and no numbers"
        )
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def _text(item: Any, name: str) -> str | None:
    """A short text in an attribute; None where there is none."""
    import h5py

    if not h5py.h5a.exists(item, name.encode()):
        return None
    attribute = h5py.h5a.open(item, name.encode())
    # The text of variable length lies elsewhere, with a reference here.
    if attribute.shape != () or attribute.get_storage_size() > _MOST_LETTERS:
        raise ValueError(f"the attribute {name} must be a short text")
    is_group = isinstance(item, h5py.h5g.GroupID)
    owner = h5py.Group(item) if is_group else h5py.Dataset(item)
    value = owner.attrs[name]
    if not isinstance(value, str) or len(value) > _MOST_LETTERS:
        raise ValueError(f"the attribute {name} must be a short text")
    return value


def _legacy_name(name: str) -> str:
    """A dataset's name in the older layout by the names of the layers.

    The group of a layer holds names that start with it; that of a network
    inside a model holds the names of the network, without its own.

    >>> _legacy_name("conv1/conv1/kernel:0"), _legacy_name("left/conv1/kernel")
    ('conv1/kernel:0', 'left/conv1/kernel')
    """
    group, _, inside = name.partition("/")
    _, found, rest = f"/{inside}".partition(f"/{group}/")
    return f"{group}/{rest if found else inside}"


def _labelled(name: str, labels: dict) -> str:
    """A dataset's name in Keras 3's layout by the names of the layers.

    Keras counts the layers of each class and notes their names beside.
    """
    layer, _, index = name.rpartition("/vars/")
    parts = layer.split("/")
    owners = ["/".join(parts[:end]) for end in range(2, len(parts) + 1)]
    path = [labels[owner] for owner in owners if owner in labels]
    if not path or None in path:
        raise ValueError(
            "it has no names of layers, as files of early versions of Keras 3: "
            "load it in Keras and save it again"
        )
    return "/".join([*path, index])


# --- Archives, and what torch wrote before ------------------------------------


def _read_zip(file: BinaryIO, size: int, most_bytes: int) -> Arrays:
    """A `.keras` archive, or what torch saves since version 1.6."""
    with archives.opened(file, size) as archive:
        names = archive.namelist()
        if "model.weights.h5" in names:
            contents = archives.read(
                archive, "model.weights.h5", 4 * most_bytes
            )
            _check_heaps(contents)
            return _read_hdf5(io.BytesIO(contents), len(contents), most_bytes)
        pickles = [name for name in names if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise ValueError(
                "the archive holds neither model.weights.h5 nor one data.pkl"
            )
        folder = pickles[0].removesuffix("data.pkl")
        order = f"{folder}byteorder"
        if order in names and archives.read(archive, order, 10) != b"little":
            raise ValueError("its numbers are big-endian")

        pickle = archives.read(archive, pickles[0], _MOST_PICKLE_BYTES)
        tensors = _state(_unpickle(io.BytesIO(pickle), {}))
        storages = _check_tensors(tensors, _Budget(size, most_bytes))
        data = {
            key: archives.read(archive, f"{folder}data/{key}", storage.nbytes)
            for key, storage in storages.items()
        }
    return _tensor_arrays(tensors, data)


_MAGIC = 0x1950A86A20F9469CFC6C


def _read_torch_legacy(file: BinaryIO, size: int, most_bytes: int) -> Arrays:
    """What torch saved before 1.6: five pickles, then the storages."""
    # From a copy, no length in the pickles can ask for more memory.
    pickles = io.BytesIO(file.read(5 * _MOST_PICKLE_BYTES))
    if _unpickle(pickles, {}) != _MAGIC:
        raise ValueError("it is a pickle, but none that torch has written")
    version, system = _unpickle(pickles, {}), _unpickle(pickles, {})
    if version != 1001 or not _check_type(system, dict)["little_endian"]:
        raise ValueError("its version is not 1001, or its numbers big-endian")
    known: dict[str, _Storage] = {}
    tensors = _state(_unpickle(pickles, known))
    storages = _check_tensors(tensors, _Budget(size, most_bytes))
    data = {}
    keys = _check_type(_unpickle(pickles, {}), list)
    file.seek(pickles.tell())
    for key in keys:
        storage = known.get(_check_type(key, str))
        if storage is None:
            raise ValueError(f"no tensor uses storage {archives.short(key)}")
        count = int.from_bytes(file.read(8), "little")
        if count != storage.length:
            raise ValueError(
                f"storage {archives.short(key)} has {count} elements and not "
                f"{storage.length}"
            )
        if key in storages:
            data[key] = file.read(storages[key].nbytes)
        else:  # of an optimizer
            file.seek(storage.nbytes, os.SEEK_CUR)
    for key in storages:
        if key not in data:
            raise ValueError(f"storage {archives.short(key)} is missing")
    return _tensor_arrays(tensors, data)


_SAFETENSORS = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "BF16": "bfloat16",
    "I64": "<i8",
}


def _read_safetensors(file: BinaryIO, size: int, most_bytes: int) -> Arrays:
    """8 bytes of length, a JSON header of that length, the arrays."""
    length = int.from_bytes(file.read(8), "little")
    if length > min(size - 8, _MOST_HEADER_BYTES):
        raise ValueError(f"a header of {length} bytes is too long for it")
    header = archives.parse_json(file.read(length))
    header.pop("__metadata__", None)
    for name, entry in header.items():
        _check_entry(archives.short(name), entry)
    entries = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
    budget = _Budget(size, most_bytes)
    end = 0
    data_size = size - 8 - length
    for name, entry in entries:
        start, stop = entry["data_offsets"]
        if not start == end <= stop <= data_size:
            raise ValueError(
                f"{archives.short(name)} is not where the file has room for it"
            )
        itemsize = _itemsize(_SAFETENSORS[entry["dtype"]])
        count = budget.spend(name, entry["shape"], itemsize)
        if count * itemsize != stop - start:
            raise ValueError(
                f"{archives.short(name)} has another shape than "
                f"{archives.short(entry['shape'])}"
            )
        end = stop
    if end != data_size:
        raise ValueError(f"it has {data_size - end} bytes after its end")
    arrays = {}
    for name, entry in entries:
        start, stop = entry["data_offsets"]
        array = _decode(file.read(stop - start), _SAFETENSORS[entry["dtype"]])
        arrays[name] = array.reshape(entry["shape"])
    return arrays


def _check_entry(name: str, entry: Any) -> None:
    """Checks the types of what a header says of an array."""
    keys = {"dtype", "shape", "data_offsets"}
    if not isinstance(entry, dict) or set(entry) != keys:
        raise ValueError(
            f"{name} must have dtype, shape and data_offsets, received "
            f"{archives.short(entry)}"
        )
    dtype, offsets = entry["dtype"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _SAFETENSORS:
        raise ValueError(
            f"{name} has the unknown dtype {archives.short(dtype)}"
        )
    _check_numbers("a pair of offsets", offsets, 0)
    if len(offsets) != 2:
        raise ValueError(f"{name} must have two offsets")


def _itemsize(dtype: str) -> int:
    return 2 if dtype == "bfloat16" else np.dtype(dtype).itemsize


def _decode(data: bytes, dtype: str) -> np.ndarray:
    """The numbers in `data`, of a little-endian dtype or "bfloat16"."""
    if dtype == "bfloat16":  # the upper half of a float32
        numbers = np.frombuffer(data, "<u2").astype("<u4")
        return (numbers << 16).view("<f4")
    return np.frombuffer(data, dtype)


# --- Torch's pickles ---------------------------------------------------------


class _Global(NamedTuple):
    """A name of the pickle that is never looked up, only compared."""

    name: str


class _Storage(NamedTuple):
    """A run of numbers elsewhere in the file."""

    key: str
    dtype: str
    length: int

    @property
    def nbytes(self) -> int:
        return self.length * _itemsize(self.dtype)


class _Tensor(NamedTuple):
    """A view of a storage."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


_STORAGES = {
    "torch DoubleStorage": "<f8",
    "torch FloatStorage": "<f4",
    "torch HalfStorage": "<f2",
    "torch BFloat16Storage": "bfloat16",
    "torch LongStorage": "<i8",
    "torch IntStorage": "<i4",
    "torch ShortStorage": "<i2",
    "torch CharStorage": "i1",
    "torch ByteStorage": "u1",
    "torch BoolStorage": "?",
}
_FUNCTIONS = (
    "collections OrderedDict",
    "torch._utils _rebuild_parameter",
    "torch._utils _rebuild_tensor",
    "torch._utils _rebuild_tensor_v2",
)
_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
}
_LITERALS = (
    *("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"),
    *("BINUNICODE", "SHORT_BINUNICODE", "BINSTRING", "SHORT_BINSTRING"),
)


def _unpickle(file: BinaryIO, storages: dict[str, _Storage]) -> Any:
    """What the pickle at the file's position says, without running any of it.

    A pickle is a program; this machine has its instructions for literals,
    containers and the few functions by which torch describes a tensor. Every
    other instruction and every other name is an error. The storages that it
    refers to are added to `storages`.
    """
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}

    left = _MOST_INSTRUCTIONS

    def pop_to_mark() -> list:
        mark = marks.pop()
        items = stack[mark:]
        del stack[mark:]
        return items

    for opcode, operand, _ in pickletools.genops(file):
        name, argument = opcode.name, cast(Any, operand)
        left -= 1
        if left < 0:
            raise ValueError(
                f"its pickle must have at most {_MOST_INSTRUCTIONS:,} "
                "instructions"
            )
        if name in ("PROTO", "FRAME"):
            continue
        if name in _CONSTANTS:
            stack.append(_CONSTANTS[name]())
        elif name in _LITERALS:
            stack.append(argument)
        elif name == "MARK":
            marks.append(len(stack))
        elif name == "TUPLE":
            stack.append(tuple(pop_to_mark()))
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            count = int(name[-1])
            stack[-count:] = [tuple(stack[-count:])]
        elif name in ("APPEND", "APPENDS"):
            items = pop_to_mark() if name == "APPENDS" else [stack.pop()]
            _check_type(stack[-1], list).extend(items)
        elif name in ("SETITEM", "SETITEMS"):
            if name == "SETITEM":
                marks.append(len(stack) - 2)
            items = pop_to_mark()
            target = _check_type(stack[-1], dict)
            for key, value in zip(items[::2], items[1::2], strict=True):
                target[_check_type(key, (str, int))] = value
        elif name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name in ("GLOBAL", "STACK_GLOBAL"):
            if name == "STACK_GLOBAL":
                argument = " ".join(_check_type(s, str) for s in stack[-2:])
                del stack[-2:]
            if argument not in _FUNCTIONS and argument not in _STORAGES:
                asked = archives.short(argument.replace(" ", "."))[1:-1]
                raise ValueError(
                    f"refused: its pickle asks for {asked}, which is no part "
                    "of a tensor; nothing was run (a checkpoint must hold a "
                    "state_dict, not a whole module)"
                )
            stack.append(_Global(argument))
        elif name == "REDUCE":
            arguments = _check_type(stack.pop(), tuple)
            # A list may be copied once for each instruction.
            left -= sum(len(a) for a in arguments if isinstance(a, list))
            stack.append(_call(_check_type(stack.pop(), _Global), arguments))
        elif name == "BINPERSID":
            storage = _storage(*_check_type(stack.pop(), tuple))
            storages[storage.key] = storage
            stack.append(storage)
        elif name == "BUILD":
            stack.pop()  # attributes, such as the versions of a state_dict
        elif name == "STOP":
            return stack.pop()
        else:
            raise ValueError(
                f"refused: no tensor needs the instruction {name} of its "
                "pickle; nothing was run"
            )
    raise ValueError("its pickle does not end")


def _check_type(value: Any, types: Any) -> Any:
    if not isinstance(value, types):
        raise ValueError("its pickle makes no sense")
    return value


def _call(function: _Global, arguments: tuple) -> Any:
    """What torch's functions would describe, as far as it is tensors."""
    if function.name == "collections OrderedDict":
        pairs = _check_type(arguments[0], list) if arguments else ()
        return {_check_type(key, str): value for key, value in pairs}
    if function.name == "torch._utils _rebuild_parameter":
        return _check_type(arguments[0], _Tensor)
    if not function.name.startswith("torch._utils _rebuild_tensor"):
        raise ValueError(f"refused: the pickle calls {function.name}")
    storage, offset, shape, strides = arguments[:4]
    _check_numbers("a shape", shape, 0)
    _check_numbers("a tuple of strides", strides, 0)
    _check_numbers("an offset", (offset,), 0)
    return _Tensor(_check_type(storage, _Storage), offset, shape, strides)


def _storage(kind, storage_type, key, location, length, view=None) -> _Storage:
    dtype = _STORAGES.get(_check_type(storage_type, _Global).name)
    if kind != "storage" or dtype is None or view is not None:
        raise ValueError("its pickle refers to something else than a storage")
    _check_numbers("the length of a storage", (length,), 0)
    return _Storage(_check_type(key, str), dtype, length)


def _check_tensors(
    tensors: dict[str, _Tensor], budget: _Budget
) -> dict[str, _Storage]:
    """Checks the tensors, and returns the storages that hold them."""
    storages: dict[str, _Storage] = {}
    for name, (storage, offset, shape, strides) in tensors.items():
        count = budget.spend(name, shape, _itemsize(storage.dtype))
        # `zip` raises ValueError where one is longer than the other.
        steps = zip(shape, strides, strict=True)
        last = offset + sum((n - 1) * step for n, step in steps)
        if count > storage.length or last >= storage.length:
            raise ValueError("a tensor reaches beyond its storage")
        if storages.setdefault(storage.key, storage) != storage:
            raise ValueError(
                f"storage {archives.short(storage.key)} has two lengths"
            )
    budget.check_bytes(sum(storage.nbytes for storage in storages.values()))
    return storages


def _tensor_arrays(
    tensors: dict[str, _Tensor], data: dict[str, bytes]
) -> Arrays:
    return {
        name: _tensor_array(tensor, data[tensor.storage.key])
        for name, tensor in tensors.items()
    }


def _tensor_array(tensor: _Tensor, data: bytes) -> np.ndarray:
    """The array that a tensor is a view of; its bounds were checked."""
    storage, offset, shape, strides = tensor
    if len(data) != storage.nbytes:
        raise ValueError(
            f"storage {archives.short(storage.key)} has {len(data)} bytes and "
            f"not {storage.nbytes}: the file is truncated"
        )
    array = _decode(data, storage.dtype)[offset:]
    strides = tuple(step * array.itemsize for step in strides)
    return np.lib.stride_tricks.as_strided(array, shape, strides).copy()


def _state(contents: Any) -> dict[str, _Tensor]:
    """The tensors of a state_dict, or of the one in a checkpoint's dict."""
    names = ("state_dict", "model_state_dict", "model", "net")
    candidates = [contents]
    if isinstance(contents, dict):
        # Beside a state_dict a checkpoint may have tensors of its own.
        inside = [contents[name] for name in names if name in contents]
        candidates = [*inside, contents]
    for candidate in candidates:
        if isinstance(candidate, dict):
            tensors = {
                name: value
                for name, value in candidate.items()
                if isinstance(name, str) and isinstance(value, _Tensor)
            }
            if tensors:
                return tensors
    raise ValueError(
        "it holds no state_dict (a dict of tensors, alone or under "
        f"{', '.join(names)})"
    )
