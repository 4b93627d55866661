"""Safetensors: 8 bytes of length, a JSON header of that length, the arrays.

This package reads the format itself, for three reasons. The `safetensors`
package (0.8) parses headers of 100 MB before its caller can count their
entries: a file of 30 MB with 400,000 entries took 500 MB of memory. It accepts
a header with one key twice. Into NumPy it cannot read bfloat16, in which many
networks are published.
"""

from typing import Any
from typing import BinaryIO

from keras_resnet.weights import bounds
from keras_resnet.weights import dtypes
from keras_resnet.weights.bounds import Arrays
from keras_resnet.weights.bounds import short

_DTYPES = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "BF16": "bfloat16",
    "I64": "<i8",
}


def read(file: BinaryIO, size: int, most_bytes: int) -> Arrays:
    """Returns every array of a file.

    Args:
        file: The file, at its start.
        size: Number of its bytes.
        most_bytes: Number of bytes that all arrays together may have.

    Raises:
        ValueError: If the header is damaged, or exceeds the bounds.
    """
    length = int.from_bytes(file.read(8), "little")
    most = min(size - 8, bounds.MOST_HEADER_BYTES)
    if length > most:
        raise ValueError(
            f"the header must have at most {most:,} bytes, received {length:,}"
        )
    header = bounds.parse_json(file.read(length))
    header.pop("__metadata__", None)
    for name, entry in header.items():
        _check_entry(short(name), entry)
    entries = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
    _check_places(entries, size - 8 - length, bounds.Budget(size, most_bytes))
    arrays = {}
    for name, entry in entries:
        start, stop = entry["data_offsets"]
        array = dtypes.decode(file.read(stop - start), _DTYPES[entry["dtype"]])
        arrays[name] = array.reshape(entry["shape"])
    return arrays


def _check_places(
    entries: list[tuple[str, Any]], data_size: int, budget: bounds.Budget
) -> None:
    """Raises ValueError unless the arrays fill the data, one after another."""
    end = 0
    for name, entry in entries:
        start, stop = entry["data_offsets"]
        if not start == end <= stop <= data_size:
            raise ValueError(
                f"{short(name)} must start at byte {end} and end at most at "
                f"{data_size}, received {start} to {stop}"
            )
        itemsize = dtypes.itemsize(_DTYPES[entry["dtype"]])
        count = budget.spend(name, entry["shape"], itemsize)
        if count * itemsize != stop - start:
            raise ValueError(
                f"{short(name)} of shape {short(entry['shape'])} must have "
                f"{count * itemsize} bytes, received {stop - start}"
            )
        end = stop
    if end != data_size:
        raise ValueError(
            f"the arrays must end with the file, received {data_size - end} "
            "more bytes"
        )


def _check_entry(name: str, entry: Any) -> None:
    """Checks the types of an array's entry in the header."""
    keys = {"dtype", "shape", "data_offsets"}
    if not isinstance(entry, dict) or set(entry) != keys:
        raise ValueError(
            f"{name} must have dtype, shape and data_offsets, received "
            f"{short(entry)}"
        )
    dtype, offsets = entry["dtype"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise ValueError(
            f"the dtype of {name} must be one of {', '.join(_DTYPES)}, "
            f"received {short(dtype)}"
        )
    bounds.check_numbers("a pair of offsets", offsets, 0)
    if len(offsets) != 2:
        raise ValueError(
            f"{name} must have two offsets, received {short(offsets)}"
        )
