"""Files of weights, read into named arrays; nothing in them is ever run.

HDF5 as Keras writes it, torch checkpoints and safetensors. A torch checkpoint
is a pickle, which is a program: here a little machine interprets it that knows
literals, containers and tensors, and has no way to call anything.
"""

import io
import json
import math
import os
import pickletools
import zipfile
from collections.abc import Callable
from typing import Any
from typing import BinaryIO
from typing import NamedTuple
from typing import cast

import numpy as np

Arrays = dict[str, np.ndarray]

# A compressed file may hold so many times its own size and no more: arrays of
# trained weights hardly compress, and what does is no file of weights.
_EXPANSION = 16


def read(path: str | os.PathLike) -> Arrays:
    """Every array of a file of weights, by the name that it has there.

    Args:
        path: A `.weights.h5`, `.keras` or `.h5` file of Keras, a torch
            checkpoint or a `.safetensors` file. Its first bytes show which.

    Returns:
        A dict of arrays; those of bfloat16 as float32, others as they are.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged, of no known format, or refused.
    """
    size = os.path.getsize(path)
    try:
        with open(path, "rb") as file:
            head = file.read(9)
            file.seek(0)
            if head.startswith(b"\x89HDF\r\n\x1a\n"):
                return _read_hdf5(file, size)
            if head.startswith(b"PK"):
                return _read_zip(file, size)
            if head[8:] == b"{":
                return _read_safetensors(file, size)
            if head.startswith(b"\x80"):
                return _read_torch_legacy(file, size)
    except (
        *(ValueError, OSError, EOFError, RuntimeError, OverflowError),
        *(LookupError, TypeError, AttributeError, zipfile.BadZipFile),
    ) as error:
        raise ValueError(
            f"{os.fspath(path)} cannot be read as weights: {error}"
        ) from error
    raise ValueError(
        f"{os.fspath(path)} is no file of weights that this package knows: "
        ".weights.h5, .keras, .h5, .pth, .pt, .th or .safetensors"
    )


def _read_hdf5(file: BinaryIO, size: int) -> Arrays:
    """Keras 3's layout (`layers/...`) or the older one, a group a layer."""
    import h5py

    arrays: Arrays = {}
    total = 0
    with h5py.File(file, "r") as root:
        found: list = []
        # Neither soft nor external links are visited.
        root.visititems(lambda name, item: found.append((name, item)))
        labels = {
            name.removesuffix("/vars"): item.attrs.get("name")
            for name, item in found
            if name.endswith("/vars")
        }
        for name, item in found:
            if not isinstance(item, h5py.Dataset):
                continue
            is_keras_3 = name.startswith("layers/")
            if not is_keras_3 and "layers" in root:
                continue  # the state of an optimizer
            if name.startswith("optimizer_weights/"):
                continue
            if item.external or item.is_virtual:
                raise ValueError(f"{name} refers to another file")
            total += item.nbytes
            if total > _EXPANSION * size:
                raise ValueError("it claims to hold far more than its size")
            if is_keras_3:
                name = _labelled(name, labels)
            else:
                name = _legacy_name(name.removeprefix("model_weights/"))
            if "seed_generator" not in name:
                arrays[name.removesuffix(":0")] = _read_dataset(item)
    return arrays


def _read_dataset(item) -> np.ndarray:
    if item.attrs.get("dtype") == "bfloat16":
        return _decode(item[()].tobytes(), "bfloat16").reshape(item.shape)
    if item.dtype.kind not in "fiu":
        raise ValueError(f"{item.name} holds {item.dtype} and no numbers")
    return item[()]


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


def _read_zip(file: BinaryIO, size: int) -> Arrays:
    """A `.keras` archive, or what torch saves since version 1.6."""
    with zipfile.ZipFile(file) as archive:
        total = sum(info.file_size for info in archive.infolist())
        if total > _EXPANSION * size:
            raise ValueError("it claims to hold far more than its size")
        names = archive.namelist()
        if "model.weights.h5" in names:
            contents = io.BytesIO(archive.read("model.weights.h5"))
            return _read_hdf5(contents, contents.getbuffer().nbytes)
        pickles = [name for name in names if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise ValueError(
                "the archive holds neither model.weights.h5 nor one data.pkl"
            )
        folder = pickles[0].removesuffix("data.pkl")
        order = f"{folder}byteorder"
        if order in names and archive.read(order) != b"little":
            raise ValueError("its numbers are big-endian")

        checkpoint = _unpickle(io.BytesIO(archive.read(pickles[0])), {})
        tensors = _state(checkpoint)
        keys = {tensor.storage.key for tensor in tensors.values()}
        data = {key: archive.read(f"{folder}data/{key}") for key in keys}
    return _tensor_arrays(tensors, data, size)


_MAGIC = 0x1950A86A20F9469CFC6C


def _read_torch_legacy(file: BinaryIO, size: int) -> Arrays:
    """What torch saved before 1.6: five pickles, then the storages."""
    file = io.BytesIO(file.read())  # no length in it can ask for more memory
    if _unpickle(file, {}) != _MAGIC:
        raise ValueError("it is a pickle, but none that torch has written")
    version, system = _unpickle(file, {}), _unpickle(file, {})
    if version != 1001 or not system["little_endian"]:
        raise ValueError("its version is not 1001, or its numbers big-endian")
    storages: dict[str, _Storage] = {}
    tensors = _state(_unpickle(file, storages))
    data = {}
    for key in _unpickle(file, {}):
        count = int.from_bytes(file.read(8), "little")
        data[key] = file.read(count * storages[key].itemsize)
    return _tensor_arrays(tensors, data, size)


_SAFETENSORS = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "BF16": "bfloat16",
    "I64": "<i8",
}


def _read_safetensors(file: BinaryIO, size: int) -> Arrays:
    """8 bytes of length, a JSON header of that length, the arrays."""
    length = int.from_bytes(file.read(8), "little")
    if length > min(size - 8, 100_000_000):
        raise ValueError(f"a header of {length} bytes is too long for it")
    header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    data = file.read()
    end = 0
    arrays = {}
    for name, entry in sorted(
        header.items(), key=lambda item: item[1]["data_offsets"]
    ):
        if entry["dtype"] not in _SAFETENSORS:
            raise ValueError(f"{name} has the unknown dtype {entry['dtype']}")
        start, stop = entry["data_offsets"]
        array = _decode(data[start:stop], _SAFETENSORS[entry["dtype"]])
        if not start == end <= stop <= len(data):
            raise ValueError(f"{name} is not where the file has room for it")
        if math.prod(entry["shape"]) != array.size:
            raise ValueError(f"{name} has another shape than {entry['shape']}")
        arrays[name] = array.reshape(entry["shape"])
        end = stop
    if end != len(data):
        raise ValueError(f"it has {len(data) - end} bytes after its end")
    return arrays


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
    def itemsize(self) -> int:
        return 2 if self.dtype == "bfloat16" else np.dtype(self.dtype).itemsize


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

    def pop_to_mark() -> list:
        mark = marks.pop()
        items = stack[mark:]
        del stack[mark:]
        return items

    for opcode, operand, _ in pickletools.genops(file):
        name, argument = opcode.name, cast(Any, operand)
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
                asked = argument.replace(" ", ".")
                raise ValueError(
                    f"refused: its pickle asks for {asked}, which is no part "
                    "of a tensor; nothing was run (a checkpoint must hold a "
                    "state_dict, not a whole module)"
                )
            stack.append(_Global(argument))
        elif name == "REDUCE":
            arguments = _check_type(stack.pop(), tuple)
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
        pairs = arguments[0] if arguments else ()
        return {_check_type(key, str): value for key, value in pairs}
    if function.name == "torch._utils _rebuild_parameter":
        return _check_type(arguments[0], _Tensor)
    if not function.name.startswith("torch._utils _rebuild_tensor"):
        raise ValueError(f"refused: the pickle calls {function.name}")
    storage, offset, shape, strides = arguments[:4]
    return _Tensor(_check_type(storage, _Storage), offset, shape, strides)


def _storage(kind, storage_type, key, location, length, view=None) -> _Storage:
    dtype = _STORAGES.get(_check_type(storage_type, _Global).name)
    if kind != "storage" or dtype is None or view is not None:
        raise ValueError("its pickle refers to something else than a storage")
    return _Storage(_check_type(key, str), dtype, _check_type(length, int))


def _tensor_arrays(
    tensors: dict[str, _Tensor], data: dict[str, bytes], size: int
) -> Arrays:
    total = sum(
        math.prod([*tensor.shape]) * tensor.storage.itemsize
        for tensor in tensors.values()
    )
    if total > _EXPANSION * size:
        raise ValueError("it claims to hold far more than its size")
    return {
        name: _tensor_array(tensor, data[tensor.storage.key])
        for name, tensor in tensors.items()
    }


def _tensor_array(tensor: _Tensor, data: bytes) -> np.ndarray:
    """The array that a tensor is a view of, after a check of its bounds."""
    storage, offset, shape, strides = tensor
    if len(data) != storage.length * storage.itemsize:
        raise ValueError(
            f"storage {storage.key} has {len(data)} bytes and not "
            f"{storage.length * storage.itemsize}: the file is truncated"
        )
    numbers = (offset, *shape, *strides)
    if any(type(n) is not int or n < 0 for n in numbers) or len(shape) > 8:
        raise ValueError("a tensor has a shape that makes no sense")
    steps = zip(shape, strides, strict=True)
    last = offset + sum((n - 1) * step for n, step in steps)
    size = math.prod([*shape])
    if size > storage.length or (size and last >= storage.length):
        raise ValueError("a tensor reaches beyond its storage")
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
