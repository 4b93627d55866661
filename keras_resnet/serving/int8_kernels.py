"""Tensors of 8 bits, and TensorFlow's oneDNN kernels that compute with them.

An integer q of 8 bits stands for the real number r = scale * q. This is the
scheme of Jacob et al. (2018, Eq. 1) with the zero point 0:

    unsigned  q = 0, ..., 255     scale = largest / 255
    signed    q = -127, ..., 127  scale = largest / 127

Activations have one scale for each tensor. Kernels are signed, with a scale for
each output channel. A convolution adds the products of integers in 32 bits and
returns to 8 bits once, after the bias, the sum and the ReLU (Sec. 2.4):

    y = relu(s_x s_w sum(q_x q_w) + bias + s_h q_h),   q_y = round(y / s_y)

limited to the integers of q_y. The kernels are part of TensorFlow for x86. They
exist in graphs only, and their weights must be constants. They need processors
with VNNI or AMX to be fast and exact: others add pairs of products in 16 bits,
which limits the largest pairs.

TensorFlow also has a kernel with a signed summand, which this module avoids. It
stores unsigned results as signed ones, and so limits them to 127 of 255.
"""

import functools
import platform
from collections.abc import Sequence
from typing import Any
from typing import NamedTuple

import numpy as np
import tensorflow as tf

#: Where a graph with these kernels runs, for model cards.
REQUIREMENTS = {
    "runs_on": (
        "TensorFlow and TensorFlow Serving for x86-64 with oneDNN, on the CPU, "
        "without TF_ENABLE_ONEDNN_OPTS=0"
    ),
    "fast_and_exact_with": ["AVX512_VNNI", "AVX_VNNI", "AMX_INT8"],
}

_UNSIGNED_LIMIT = 255
_SIGNED_LIMIT = 127


class UnsupportedError(ValueError):
    """TensorFlow has no int8 kernels on this machine."""


class Int8Tensor(NamedTuple):
    """A tensor of integers of 8 bits.

    Attributes:
        values: Tensor of dtype quint8 or qint8.
        largest: Real number that the largest integer stands for.
    """

    values: tf.Tensor
    largest: float

    @property
    def is_signed(self) -> bool:
        """Whether the integers can be negative."""
        return self.values.dtype == tf.qint8

    @property
    def range(self) -> tuple[float, float]:
        """The smallest and the largest real number."""
        return _range(self.largest, self.is_signed)


def limit(is_signed: bool) -> int:
    """Returns the largest integer.

    >>> limit(is_signed=False)
    255
    """
    return _SIGNED_LIMIT if is_signed else _UNSIGNED_LIMIT


def _range(largest: float, is_signed: bool) -> tuple[float, float]:
    return (-largest if is_signed else 0.0), largest


def quantize(x: tf.Tensor, largest: float, is_signed: bool) -> Int8Tensor:
    """Returns the nearest integers of real numbers.

    Args:
        x: float32 tensor. Numbers outside the range get its ends.
        largest: Real number that the largest integer stands for.
        is_signed: Whether the integers can be negative.
    """
    dtype = tf.qint8 if is_signed else tf.quint8
    low, high = _range(largest, is_signed)
    values = tf.raw_ops.QuantizeV2(
        input=x, min_range=low, max_range=high, T=dtype, mode="SCALED"
    ).output
    return Int8Tensor(values, largest)


def dequantize(x: Int8Tensor) -> tf.Tensor:
    """Returns the real numbers of integers, in float32."""
    low, high = x.range
    return tf.raw_ops.Dequantize(
        input=x.values, min_range=low, max_range=high, mode="SCALED"
    )


def convolution(
    x: Int8Tensor,
    kernel: np.ndarray,
    bias: np.ndarray,
    stride: int,
    padding: str | Sequence[int],
    largest: float,
    *,
    is_signed: bool = False,
    summand: Int8Tensor | None = None,
) -> Int8Tensor:
    """Returns a convolution, as the formula of this module defines it.

    The kernel with a summand writes its result into the summand. TensorFlow
    ends the process if another operation still holds the summand, so that all
    other readers of the summand must precede the convolution.

    Args:
        x: Images, `[batch, height, width, channels]`; unsigned with a summand.
        kernel: Real numbers, `[size, size, channels, filters]`.
        bias: Real numbers, `[filters]`.
        stride: Stride in pixels.
        padding: `"SAME"`, `"VALID"`, or the zeros before and after each axis,
            in a list of 8.
        largest: Real number that the largest integer of the result stands for.
        is_signed: Whether the result can be negative. Otherwise a ReLU follows.
        summand: Unsigned tensor of the shape of the result, which is added
            before the ReLU; or None.
    """
    weights, largest_weights = quantized_kernel(kernel)
    low, high = _range(largest, is_signed)
    arguments: dict[str, Any] = {}
    if summand is not None:
        operation = tf.raw_ops.QuantizedConv2DWithBiasSumAndReluAndRequantize
        arguments["summand"] = summand.values
        arguments["min_summand"], arguments["max_summand"] = summand.range
    elif is_signed:
        operation = tf.raw_ops.QuantizedConv2DWithBiasAndRequantize
    else:
        operation = tf.raw_ops.QuantizedConv2DWithBiasAndReluAndRequantize
    values = operation(
        input=x.values,
        filter=_constant(weights),
        bias=tf.constant(bias, tf.float32),
        min_input=x.range[0],
        max_input=x.range[1],
        min_filter=tf.constant(-largest_weights),
        max_filter=tf.constant(largest_weights),
        min_freezed_output=low,
        max_freezed_output=high,
        strides=[1, stride, stride, 1],
        padding=padding if isinstance(padding, str) else "VALID",
        padding_list=[] if isinstance(padding, str) else padding,
        out_type=tf.qint8 if is_signed else tf.quint8,
        **arguments,
    ).output
    return Int8Tensor(values, largest)


def quantized_kernel(kernel: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the integers of a kernel, and the largest weight of each filter.

    Args:
        kernel: Real numbers, `[height, width, channels, filters]`.

    >>> quantized_kernel(np.array([[[[0.5, 3.0], [-1.0, 0.0]]]]))[0]
    array([[[[  64,  127],
             [-127,    0]]]], dtype=int8)
    """
    largest = np.abs(kernel).max((0, 1, 2)).astype("float32")
    # A scale of zero or of a denormal number is not defined.
    largest = largest.clip(np.finfo("float32").tiny * 2**16)
    return np.rint(kernel / largest * _SIGNED_LIMIT).astype("int8"), largest


def _constant(integers: np.ndarray) -> tf.Tensor:
    return tf.constant(integers.view(tf.qint8.as_numpy_dtype), tf.qint8)


def pad(x: Int8Tensor, paddings: Sequence[Sequence[int]]) -> Int8Tensor:
    """Returns a tensor with zeros around it, as `tf.pad` does."""
    kind = tf.int8 if x.is_signed else tf.uint8
    padded = tf.pad(tf.bitcast(x.values, kind), paddings)
    return x._replace(values=tf.bitcast(padded, x.values.dtype))


def max_pool(x: Int8Tensor, size: int, stride: int, padding: str) -> Int8Tensor:
    """Returns the largest integers of windows of unsigned images."""
    low, high = x.range
    values = tf.raw_ops.QuantizedMaxPool(
        input=x.values,
        min_input=low,
        max_input=high,
        ksize=[1, size, size, 1],
        strides=[1, stride, stride, 1],
        padding=padding,
    ).output
    return x._replace(values=values)


@functools.cache  # of a success
def check() -> None:
    """Runs two convolutions, the second with the first one as its summand.

    Raises:
        UnsupportedError: If TensorFlow cannot run them on this machine, or if
            an integer differs by more than 1 from the formula of this module.
    """
    pixels = np.arange(64, dtype="uint8").reshape(1, 4, 4, 4) * 2
    kernel = np.linspace(-1.0, 1.0, 32, dtype="float32").reshape(1, 1, 4, 8)
    bias = np.linspace(-0.5, 0.5, 8, dtype="float32")

    @tf.function(autograph=False)
    def twice(pixels):
        x = Int8Tensor(tf.bitcast(pixels, tf.quint8), 1.0)
        summand = convolution(x, kernel, bias, 1, "SAME", 3.0)
        y = convolution(x, kernel, -bias, 1, "SAME", 5.0, summand=summand)
        return tf.bitcast(y.values, tf.uint8)

    try:
        found = twice(tf.constant(pixels)).numpy()
    except tf.errors.OpError as error:
        raise _unsupported("no such kernels") from error
    weights, largest = quantized_kernel(kernel)
    sums = pixels.astype("int64") @ weights[0, 0].astype("int64")
    products = sums * (largest / (255.0 * 127.0))
    summand = np.rint(np.clip((products + bias) / 3.0, 0.0, 1.0) * 255.0)
    total = products - bias + summand * (3.0 / 255.0)
    expected = np.rint(np.clip(total / 5.0, 0.0, 1.0) * 255.0)
    difference = np.abs(found - expected).max()
    if difference > 1:
        raise _unsupported(f"integers that differ by {difference:.0f}")


def _unsupported(received: str) -> UnsupportedError:
    return UnsupportedError(
        "int8 must run on TensorFlow for x86 with its oneDNN kernels, without "
        f"TF_ENABLE_ONEDNN_OPTS=0, received {received} in TensorFlow "
        f"{tf.__version__} on {platform.machine()}: export in float32, "
        "bfloat16 or int8_weights"
    )
