"""Bounds on files of weights, which may come from strangers.

A file may declare arrays, texts and nesting of any size. Each format module of
this package checks what a file declares against these bounds before it
allocates memory.
"""

import json
import math
import os
import reprlib
import stat
from typing import Any

import numpy as np

Arrays = dict[str, np.ndarray]

# --- Arrays ---

# ResNet-1202 with option C, unrolled, has 12,600 arrays in a torch checkpoint.
MOST_ARRAYS = 20_000

# The float32 weights of ResNet-200 are 0.26e9 bytes.
MOST_BYTES = 2**31

MOST_DIMENSIONS = 8
MOST_LETTERS = 256

# Ratio of the bytes of all arrays to the bytes of a compressed file. The ratio
# of trained weights is near 1.
EXPANSION = 16

# --- HDF5 ---

# ResNet-1202 with option C, unrolled, has 19,800 members in a file of Keras. An
# optimizer adds 9,000 more.
MOST_MEMBERS = 50_000
MOST_HEAP_OBJECTS = 10 * MOST_MEMBERS
MOST_DEPTH = 32

# --- Zip archives ---

# A configuration compresses more than weights do.
FREE_BYTES = 2**23

# Above this size, an archive may expand to twice its size. The float32 weights
# of ResNet-200 with two slots of an optimizer are 0.8e9 bytes.
EXPANDED_BYTES = 2**31

# The entries of 60,000 members: the weights of a network of 20,000 arrays and
# two slots of its optimizer, each of them 140 bytes long.
MOST_DIRECTORY_BYTES = 2**23

# --- Torch's pickles and safetensors' headers ---

# A tensor takes 40 instructions of a pickle, and an optimizer has two more
# tensors for each weight. The header of safetensors takes 200 bytes an array.
MOST_PICKLE_BYTES = 2**24
MOST_INSTRUCTIONS = 3 * 40 * MOST_ARRAYS
MOST_HEADER_BYTES = 2**23

# --- Configurations of Keras ---

# ResNet-1202, unrolled, has 0.7 MB of configuration with 606 layers, eleven
# levels deep. A network in a network adds five levels.
MOST_CONFIG_BYTES = 2**23
MOST_LAYERS = 2_000
MOST_OBJECTS = 10 * MOST_LAYERS
MOST_CONFIG_DEPTH = 64

# Weights that a file need not hold, such as the states of random layers.
FREE_ELEMENTS = 2**20


_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = 80
_REPR.maxlevel = 2


def short(value: Any) -> str:
    """Returns the `repr` of a value from a file, cut to 100 characters.

    >>> short("stem_conv")
    "'stem_conv'"
    >>> len(short("stem_conv" * 1000))
    80
    """
    text = _REPR.repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


def regular_size(path: str | os.PathLike) -> int:
    """Returns the number of bytes of a regular file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the path is not a regular file. Opening a pipe would
            wait.
    """
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{os.fspath(path)} must be a regular file")
    return status.st_size


def parse_json(data: bytes) -> dict[str, Any]:
    """Returns the object that JSON from a file describes.

    Raises:
        ValueError: If the JSON is damaged, too deep, or not an object.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError("an object must not have one key twice")
        return found

    try:
        value = json.loads(data, object_pairs_hook=unique)
    except RecursionError:
        raise ValueError("the JSON is nested too deep") from None
    except ValueError as error:
        raise ValueError(f"the JSON is damaged: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"the JSON must be an object, received {short(value)}")
    return value


def check_numbers(what: str, numbers: Any, least: int) -> None:
    """Raises ValueError unless `numbers` are a few integers in 64 bits."""
    if (
        not isinstance(numbers, list | tuple)
        or len(numbers) > MOST_DIMENSIONS
        or any(type(n) is not int or not least <= n < 2**63 for n in numbers)
    ):
        raise ValueError(
            f"{what} must be at most {MOST_DIMENSIONS} integers, each at least "
            f"{least}, received {short(numbers)}"
        )


class Budget:
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
        if not 0 < len(name) <= MOST_LETTERS:
            raise ValueError(
                f"the name of an array must have 1 to {MOST_LETTERS} letters, "
                f"received {short(name)}"
            )
        check_numbers("a shape", shape, 1)
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
        if number > EXPANSION * self._size:
            raise ValueError(
                f"its arrays must have at most {EXPANSION} times the "
                f"{self._size:,} bytes of the file, received {number:,} bytes"
            )
        if number > self._most_bytes:
            raise ValueError(
                f"its arrays must have at most {self._most_bytes:,} bytes, "
                f"received {number:,}"
            )
