"""Checks the outputs of networks and servers before anything uses them.

A stranger's exported network, or a program other than TensorFlow Serving, can
return anything. Every check raises ValueError with the rule and the value.
"""

import itertools
from collections.abc import Collection
from collections.abc import Mapping
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
        labels: The best labels of each image, the most probable first.
        scores: Their probabilities, float32 `[images, labels]`.
        status: Empty, or the reason why the network rejected the image; one
            for each image. The other outputs of a rejected image have no
            meaning.
        note: Empty, or a sentence about outputs that the network lacks.
    """

    labels: Sequence[Sequence[str]]
    scores: np.ndarray
    status: Sequence[str]
    note: str = ""


def predictions(found: Mapping[str, Any], images: int) -> Predictions:
    """Returns the predictions in a response after checking them.

    Args:
        found: Outputs of the signature `serving_default`: arrays, or nested
            lists of JSON. `labels`, `scores` and `status` may be missing.
        images: Number of images in the request.

    Raises:
        ValueError: If the type, the shape or a value is invalid, or if the
            outputs contradict each other.
    """
    status = [""] * images
    if "status" in found:
        status = texts("status", found["status"], images)
    is_good = np.array([not text for text in status], bool)
    rows = probabilities(found["probabilities"], images, is_good)
    classes = texts("classes", found["classes"], images)
    best = rows.max(-1)
    if "labels" in found and "scores" in found:
        scores = _numbers("scores", found["scores"], images)
        labels = _label_rows(found["labels"], scores.shape)
        _check_best(rows, classes, labels, scores, is_good)
    else:
        labels, scores = [[label] for label in classes], best[:, None]
    return Predictions(labels, scores, status, missing(found))


def missing(found: Collection[str]) -> str:
    """Returns a sentence about the outputs that a network lacks, or nothing.

    >>> missing(["probabilities", "classes", "labels", "scores"])
    'the network was exported without status, so a bad image fails its whole \
batch: export it again'
    """
    effects = {
        "labels": "an image gets only its best label",
        "scores": "an image gets only its best label",
        "status": "a bad image fails its whole batch",
    }
    lacking = [name for name in effects if name not in found]
    if not lacking:
        return ""
    reasons = dict.fromkeys(effects[name] for name in lacking)
    return (
        f"the network was exported without {', '.join(lacking)}, so "
        f"{' and '.join(reasons)}: export it again"
    )


def probabilities(
    values: Any, images: int, is_good: np.ndarray | None = None
) -> np.ndarray:
    """Returns the probabilities of images after checking them.

    Args:
        values: An array, or nested lists of JSON.
        images: Number of images in the request.
        is_good: bool `[images]`, the images that the network accepted, whose
            sum must be 1; None for all.

    Returns:
        float32 `[images, classes]`.

    Raises:
        ValueError: If the type, the shape or a value is invalid.
    """
    name = "probabilities"
    values = _numbers(name, values, images)
    sums = values.sum(-1, dtype=np.float64)
    is_wrong = np.abs(sums - 1) > _SUM_TOLERANCE
    if is_good is not None:
        is_wrong &= is_good
    if is_wrong.any():
        raise _wrong(name, "have the sum 1", f"{sums[is_wrong][0]:.6g}")
    return values


def _numbers(name: str, values: Any, images: int) -> np.ndarray:
    """Returns numbers from 0 to 1, float32 `[images, classes]`."""
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


def _label_rows(values: Any, shape: tuple[int, int]) -> list[list[str]]:
    """Returns the labels of each image; as many as there are scores."""
    images, count = shape
    if isinstance(values, np.ndarray):
        if values.dtype != object:
            raise _wrong("labels", "be text", values.dtype.name)
        values = values.tolist()
    if not isinstance(values, list) or len(values) != images:
        raise _wrong("labels", f"be a list of {images} rows, as images", values)
    return [texts("labels", row, count) for row in values]


def _check_best(
    rows: np.ndarray,
    classes: Sequence[str],
    labels: Sequence[Sequence[str]],
    scores: np.ndarray,
    is_good: np.ndarray,
) -> None:
    """Raises ValueError unless the outputs of accepted images agree."""
    if scores.shape[1] > rows.shape[1]:
        raise _wrong(
            "scores", f"be at most {rows.shape[1]}, as classes", scores.shape[1]
        )
    for row, name, best, numbers in itertools.compress(
        zip(rows, classes, labels, scores, strict=True), is_good
    ):
        if best[0] != name:
            raise _wrong("classes", f"be the first label, {best[0]}", name)
        expected = np.sort(row)[::-1][: len(numbers)]
        is_wrong = np.abs(numbers - expected) > _TIE_TOLERANCE
        if is_wrong.any():
            raise _wrong(
                "scores",
                "be the largest probabilities, "
                + _shown(float(expected[is_wrong][0])),
                float(numbers[is_wrong][0]),
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
