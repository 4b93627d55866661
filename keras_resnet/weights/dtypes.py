"""Numbers in files of weights: little-endian NumPy dtypes, and bfloat16.

A bfloat16 number is the upper half of a float32 number. It is read as float32,
because NumPy lacks bfloat16.
"""

import numpy as np


def itemsize(dtype: str) -> int:
    """Returns the bytes of a number.

    >>> itemsize("<f4"), itemsize("bfloat16")
    (4, 2)
    """
    return 2 if dtype == "bfloat16" else np.dtype(dtype).itemsize


def decode(data: bytes, dtype: str) -> np.ndarray:
    """Returns the numbers in `data`.

    Args:
        data: The bytes.
        dtype: A little-endian dtype of NumPy, or `"bfloat16"`.

    >>> decode(bytes([0, 63, 64, 192]), "bfloat16").tolist()
    [0.5, -3.0]
    """
    if dtype == "bfloat16":
        numbers = np.frombuffer(data, "<u2").astype("<u4")
        return (numbers << 16).view("<f4")
    return np.frombuffer(data, dtype)
