"""The pickles in torch checkpoints, interpreted without running any of them.

A pickle is a program that can call any function of Python, so a stranger's
checkpoint can run code when `pickle` loads it. This machine knows the
instructions for literals, containers and tensors alone. It imports and calls
nothing, and works without torch: this is why it stays own code.

A pickle may use the names that `torch.load(weights_only=True)` accepts.
Training programs keep counters, sets, devices and other values beside the
tensors. They are read as `Other`.
"""

import pickletools
import re
from collections.abc import Callable
from typing import Any
from typing import BinaryIO
from typing import NamedTuple
from typing import cast

from keras_resnet.weights import bounds
from keras_resnet.weights import dtypes


class Global(NamedTuple):
    """A name in a pickle. It is compared, and never looked up."""

    name: str


class Other(NamedTuple):
    """A value that is not part of a state_dict; only its type is kept."""

    name: str


class Storage(NamedTuple):
    """A run of numbers elsewhere in the file."""

    key: str
    dtype: str
    length: int

    @property
    def nbytes(self) -> int:
        return self.length * dtypes.itemsize(self.dtype)


class Tensor(NamedTuple):
    """A view of a storage."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


# --- Names -------------------------------------------------------------------

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

# Tensors of these may lie beside the weights.
_OTHER_STORAGES = {
    "torch ComplexDoubleStorage": "<c16",
    "torch ComplexFloatStorage": "<c8",
    "torch QInt8Storage": "i1",
    "torch QInt32Storage": "<i4",
    "torch QUInt8Storage": "u1",
    "torch QUInt4x2Storage": "u1",
    "torch QUInt2x4Storage": "u1",
    "torch.storage UntypedStorage": "u1",
}

_DENSE_TENSORS = (
    "torch._utils _rebuild_tensor",
    "torch._utils _rebuild_tensor_v2",
)
_PARAMETERS = (
    "torch._utils _rebuild_parameter",
    "torch._utils _rebuild_parameter_with_state",
    "torch.nn.parameter Parameter",
)
_SUBCLASS = "torch._tensor _rebuild_from_type_v2"

# Functions whose results are read as `Other`.
_OTHER_FUNCTIONS = (
    "_codecs encode",
    "builtins bytearray",
    "builtins bytes",
    "builtins complex",
    "builtins set",
    "collections Counter",
    "torch device",
    "torch.serialization _get_layout",
    "torch._utils _rebuild_device_tensor_from_cpu_tensor",
    "torch._utils _rebuild_device_tensor_from_numpy",
    "torch._utils _rebuild_meta_tensor_no_storage",
    "torch._utils _rebuild_qtensor",
    "torch._utils _rebuild_sparse_tensor",
    "torch._utils _rebuild_tensor_v3",
    "torch._utils _rebuild_wrapper_subclass",
)

# Constants and types that are never called: torch.float32, torch.Tensor,
# torch.per_tensor_affine.
_CONSTANTS = re.compile(
    r"torch (?:bool|bfloat16|(?:float|complex|bits|q?u?int)\d+\w*)"
    r"|torch(?:\.cuda)?(?:\.sparse)? \w*Tensor"
    r"|torch per_(?:tensor|channel)_\w+"
)

_KNOWN = {
    "collections OrderedDict",
    "torch Size",
    _SUBCLASS,
    *_STORAGES,
    *_OTHER_STORAGES,
    *_DENSE_TENSORS,
    *_PARAMETERS,
    *_OTHER_FUNCTIONS,
}


# --- The machine -------------------------------------------------------------


def unpickle(file: BinaryIO, storages: dict[str, Storage]) -> Any:
    """Returns the value of the pickle at the file's position.

    Args:
        file: The pickle. It must be a `BytesIO`, so that no length in the
            pickle can ask for more memory than the file has.
        storages: Gets each storage that the pickle refers to, by its key.

    Returns:
        Literals, lists, tuples, `Tensor`s, `Other`s, and dicts without the keys
        that are not text.

    Raises:
        ValueError: If the pickle has an instruction or a name that a
            state_dict does not need, or exceeds the bounds.
    """
    machine = _Machine(storages)
    for opcode, operand, _ in pickletools.genops(file):
        machine.spend(1)
        if opcode.name == "STOP":
            return machine.pop()
        step = _STEPS.get(opcode.name)
        if step is None:
            raise ValueError(
                "its pickle must use the instructions of a state_dict alone, "
                f"received {opcode.name}; nothing was run"
            )
        step(machine, cast(Any, operand))
    raise ValueError("its pickle must end with STOP")


class _Machine:
    """The stack and the memo of a pickle; a method for each instruction."""

    def __init__(self, storages: dict[str, Storage]):
        self._storages = storages
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}
        self._left = bounds.MOST_INSTRUCTIONS

    def spend(self, instructions: int) -> None:
        self._left -= instructions
        if self._left < 0:
            raise ValueError(
                "its pickle must have at most "
                f"{bounds.MOST_INSTRUCTIONS:,} instructions"
            )

    def pop(self) -> Any:
        return self._stack.pop()

    def push(self, value: Any) -> None:
        self._stack.append(value)

    def skip(self, _: Any) -> None:
        pass

    def push_other(self, _: Any) -> None:
        self.push(Other("bytes or set"))

    def mark(self, _: Any) -> None:
        self._marks.append(len(self._stack))

    def _pop_to_mark(self) -> list:
        mark = self._marks.pop()
        items = self._stack[mark:]
        del self._stack[mark:]
        return items

    def tuple_to_mark(self, _: Any) -> None:
        self.push(tuple(self._pop_to_mark()))

    def tuple_of(self, count: int) -> None:
        self._stack[-count:] = [tuple(self._stack[-count:])]

    def append(self, _: Any) -> None:
        item = self.pop()
        check_type(self._stack[-1], list).append(item)

    def appends(self, _: Any) -> None:
        items = self._pop_to_mark()
        check_type(self._stack[-1], list).extend(items)

    def add_items(self, _: Any) -> None:
        self._pop_to_mark()
        check_type(self._stack[-1], Other)

    def set_item(self, _: Any) -> None:
        self._marks.append(len(self._stack) - 2)
        self.set_items(_)

    def set_items(self, _: Any) -> None:
        items = self._pop_to_mark()
        target = check_type(self._stack[-1], (dict, Other))
        for key, value in zip(items[::2], items[1::2], strict=True):
            # The names of weights are text. Other keys are not kept, since
            # Python would hash them, and a nested tuple takes for ever.
            if isinstance(key, str) and isinstance(target, dict):
                target[key] = value

    def put(self, key: int) -> None:
        self._memo[key] = self._stack[-1]

    def memoize(self, _: Any) -> None:
        self.put(len(self._memo))

    def get(self, key: int) -> None:
        self.push(self._memo[key])

    def stack_global(self, _: Any) -> None:
        module, name = (check_type(s, str) for s in self._stack[-2:])
        del self._stack[-2:]
        self.name(f"{module} {name}")

    def name(self, name: str) -> None:
        # Protocol 2 calls the module of Python's own types by its older name.
        name = re.sub(r"^__builtin__ ", "builtins ", name)
        if name not in _KNOWN and not _CONSTANTS.fullmatch(name):
            received = bounds.short(name.replace(" ", "."))[1:-1]
            raise ValueError(
                f"its pickle must hold a state_dict, received {received}; "
                "nothing was run. Save it in torch with "
                "`torch.save(model.state_dict(), path)`"
            )
        self.push(Global(name))

    def reduce(self, _: Any) -> None:
        arguments = check_type(self.pop(), tuple)
        # A list may be copied once for each instruction.
        self.spend(sum(len(a) for a in arguments if isinstance(a, list)))
        self.push(_call(check_type(self.pop(), Global), arguments))

    def persistent(self, _: Any) -> None:
        storage = _storage(*check_type(self.pop(), tuple))
        self._storages[storage.key] = storage
        self.push(storage)

    def build(self, _: Any) -> None:
        self.pop()  # attributes, such as the versions of a state_dict


_STEPS: dict[str, Callable[[_Machine, Any], None]] = {
    **dict.fromkeys(("PROTO", "FRAME"), _Machine.skip),
    # Literals
    "NONE": lambda machine, _: machine.push(None),
    "NEWTRUE": lambda machine, _: machine.push(True),
    "NEWFALSE": lambda machine, _: machine.push(False),
    **dict.fromkeys(
        ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"), _Machine.push
    ),
    **dict.fromkeys(
        ("BINUNICODE", "SHORT_BINUNICODE", "BINSTRING", "SHORT_BINSTRING"),
        _Machine.push,
    ),
    **dict.fromkeys(
        ("BINBYTES", "SHORT_BINBYTES", "BYTEARRAY8"), _Machine.push_other
    ),
    # Containers
    "EMPTY_DICT": lambda machine, _: machine.push({}),
    "EMPTY_LIST": lambda machine, _: machine.push([]),
    "EMPTY_TUPLE": lambda machine, _: machine.push(()),
    "EMPTY_SET": _Machine.push_other,
    "MARK": _Machine.mark,
    "TUPLE": _Machine.tuple_to_mark,
    "TUPLE1": lambda machine, _: machine.tuple_of(1),
    "TUPLE2": lambda machine, _: machine.tuple_of(2),
    "TUPLE3": lambda machine, _: machine.tuple_of(3),
    "APPEND": _Machine.append,
    "APPENDS": _Machine.appends,
    "ADDITEMS": _Machine.add_items,
    "SETITEM": _Machine.set_item,
    "SETITEMS": _Machine.set_items,
    # Values that occur twice
    "BINPUT": _Machine.put,
    "LONG_BINPUT": _Machine.put,
    "MEMOIZE": _Machine.memoize,
    "BINGET": _Machine.get,
    "LONG_BINGET": _Machine.get,
    # Names and calls
    "GLOBAL": _Machine.name,
    "STACK_GLOBAL": _Machine.stack_global,
    "REDUCE": _Machine.reduce,
    "NEWOBJ": _Machine.reduce,
    "BUILD": _Machine.build,
    "BINPERSID": _Machine.persistent,
}


# --- Calls -------------------------------------------------------------------


def check_type(value: Any, types: Any) -> Any:
    """Returns `value`; raises ValueError unless it is of one of the types."""
    if not isinstance(value, types):
        raise ValueError(
            f"its pickle is damaged, received a {type(value).__name__} out of "
            "place"
        )
    return value


def _call(function: Global, arguments: tuple) -> Any:
    """Returns the value that a call describes, without the call."""
    name = function.name
    if name == "collections OrderedDict":
        pairs = check_type(arguments[0], list) if arguments else ()
        return {k: v for k, v in pairs if isinstance(k, str)}
    if name == "torch Size":
        return tuple(check_type(arguments[0], (list, tuple)))
    if name in _DENSE_TENSORS:
        return _tensor(*arguments[:4])
    if name in _PARAMETERS:
        return check_type(arguments[0], (Tensor, Other))
    if name == _SUBCLASS:
        inner, _, inner_arguments = arguments[:3]
        if check_type(inner, Global).name == _SUBCLASS:
            raise ValueError(f"its pickle must not nest {_SUBCLASS}")
        return _call(inner, check_type(inner_arguments, tuple))
    if name in _OTHER_FUNCTIONS:
        return Other(name)
    raise ValueError(
        "its pickle must call functions of tensors alone, received "
        f"{name.replace(' ', '.')}; nothing was run"
    )


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any) -> Any:
    bounds.check_numbers("a shape", shape, 0)
    bounds.check_numbers("a tuple of strides", strides, 0)
    bounds.check_numbers("an offset", (offset,), 0)
    if check_type(storage, Storage).dtype not in _STORAGES.values():
        return Other(f"tensor of {storage.dtype}")
    return Tensor(storage, offset, shape, strides)


def _storage(
    kind: Any,
    storage_type: Any,
    key: Any,
    location: Any,
    length: Any,
    view: Any = None,
) -> Storage:
    name = check_type(storage_type, Global).name
    dtype = _STORAGES.get(name) or _OTHER_STORAGES.get(name)
    if kind != "storage" or dtype is None or view is not None:
        raise ValueError(
            "its pickle must refer to storages alone, received "
            f"{bounds.short((kind, name, key, view))}"
        )
    bounds.check_numbers("the length of a storage", (length,), 0)
    return Storage(check_type(key, str), dtype, length)
