"""Checks the outputs of networks and servers before anything uses them.

A stranger's exported network, or a program other than TensorFlow Serving, can
return anything. Every check raises ValueError with the rule and the value.
"""

from collections.abc import Sequence
from typing import Any
from typing import NamedTuple

import numpy as np

# Half precision and the decimals of JSON round sums and ties.
_SUM_TOLERANCE = 0.01
_TIE_TOLERANCE = 1e-5
_SHOWN_CHARACTERS = 60


class Predictions(NamedTuple):
    """Predictions of a network for a batch.

    Attributes:
        probabilities: float32 `[images, classes]`.
        labels: One for each class.
    """

    probabilities: np.ndarray
    labels: Sequence[str]


def probabilities(values: Any, images: int) -> np.ndarray:
    """Returns the probabilities of images after checking them.

    Args:
        values: An array, or nested lists of JSON.
        images: Number of images in the request.

    Returns:
        float32 `[images, classes]`.

    Raises:
        ValueError: If the type, the shape or a value is invalid.
    """
    name = "probabilities"
    if isinstance(values, np.ndarray):
        # NumPy lacks a kind for bfloat16, which float32 holds exactly.
        if values.dtype.kind != "f" and values.dtype.name != "bfloat16":
            raise _wrong(name, "be floating-point", values.dtype.name)
        if values.ndim != 2:
            raise _wrong(name, "be [images, classes]", str(values.shape))
    else:
        values = _array(name, values)
    if values.shape[0] != images:
        raise _wrong(name, f"have {images} rows, as images", values.shape[0])
    if values.shape[1] < 1:
        raise _wrong(name, "have 1 class or more", 0)
    with np.errstate(over="ignore"):  # float64 beyond float32 is infinite
        values = values.astype(np.float32)
    for rule, is_wrong in (
        ("be finite", ~np.isfinite(values)),
        ("be from 0 to 1", (values < -1e-6) | (values > 1 + _SUM_TOLERANCE)),
    ):
        if is_wrong.any():
            raise _wrong(name, rule, values[is_wrong][0])
    sums = values.sum(-1, dtype=np.float64)
    is_wrong = np.abs(sums - 1) > _SUM_TOLERANCE
    if is_wrong.any():
        raise _wrong(name, "have the sum 1", f"{sums[is_wrong][0]:.6g}")
    return values


def _array(name: str, rows: Any) -> np.ndarray:
    """Rows of JSON; NumPy would also accept text, null and booleans."""
    if not isinstance(rows, list):
        raise _wrong(name, "be a list of rows", rows)
    for row in rows:
        if not isinstance(row, list):
            raise _wrong(name, "have a list for each image", row)
        for value in row:
            if type(value) not in (float, int):
                raise _wrong(name, "be numbers", value)
        if len(row) != len(rows[0]):
            raise _wrong(
                name, f"have {len(rows[0])} classes in each row", len(row)
            )
    try:
        shape = len(rows), len(rows[0]) if rows else 0
        return np.array(rows, np.float64).reshape(shape)
    except OverflowError as error:
        raise _wrong(name, "be finite", "an integer above 1e308") from error


def texts(name: str, values: Any, count: int) -> list[str]:
    """Returns one text for each image or each class after checking them.

    Args:
        name: Name of the values, for the message.
        values: An array of bytes, or a list of JSON.
        count: Required number of values.

    Raises:
        ValueError: If the type or the number of the values is wrong.
    """
    if isinstance(values, np.ndarray):
        if values.dtype != object:
            raise _wrong(name, "be text", values.dtype.name)
        if values.ndim != 1:
            raise _wrong(name, "have one dimension", str(values.shape))
        values = values.tolist()
    if not isinstance(values, list):
        raise _wrong(name, "be a list", values)
    if len(values) != count:
        raise _wrong(name, f"have {count} values", len(values))
    return [_text(name, value) for value in values]


def _text(name: str, value: Any) -> str:
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError as error:
            raise _wrong(name, "be UTF-8", value) from error
    if not isinstance(value, str):
        raise _wrong(name, "be text", value)
    return value


def check_best(
    rows: np.ndarray, classes: Sequence[str], labels: Sequence[str]
) -> None:
    """Raises ValueError unless each class is a row's most probable label.

    Args:
        rows: Probabilities.
        classes: Label of each row's most probable class.
        labels: One for each class.
    """
    for row, best in zip(rows, classes, strict=True):
        ties = np.flatnonzero(row >= row.max() - _TIE_TOLERANCE).tolist()
        if not any(labels[i] == best for i in ties):
            raise _wrong(
                "classes",
                "be the most probable of the labels, "
                + _shown(labels[int(row.argmax())]),
                best,
            )


def _wrong(name: str, rule: str, received: Any) -> ValueError:
    return ValueError(f"{name} must {rule}, received {_shown(received)}")


def _shown(value: Any) -> str:
    """A value in a few characters; the value may be long or deep."""
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if isinstance(value, dict):
        return f"an object of {len(value)}"
    if value is None:
        return "null"
    if isinstance(value, int) and value.bit_length() > 128:
        return "a huge integer"
    text = value if isinstance(value, str) else str(value)
    cut = text[:_SHOWN_CHARACTERS]
    return cut + "..." if len(text) > len(cut) else cut
