"""Convolution of both papers: without a bias, with equal padding on both sides.

Units, shortcuts and stems use it.
"""

import functools
import pathlib

import keras
from keras import ops

PADDINGS = ("symmetric", "same")


def papers_initializer() -> keras.initializers.Initializer:
    """Returns a normal initializer of variance `2 / (k * k * filters)`.

    The distribution is not truncated. [1, Sec. 3.4] initializes as He et al.
    2015, and the authors' code takes the fan out as n. Each call returns an
    initializer with its own seed.

    >>> papers_initializer()((3, 3, 16, 32)).shape
    TensorShape([3, 3, 16, 32])
    """
    return keras.initializers.VarianceScaling(
        2.0, "fan_out", "untruncated_normal"
    )


@keras.saving.register_keras_serializable(package="keras_resnet")
class Convolution(keras.layers.Layer):
    """Two-dimensional convolution without a bias, padded on both sides.

    `y[i, j] = sum over u, v of x[s i + u - p, s j + v - p] . w[u, v]`

    k is the kernel size, s the stride, and p = (k - 1) / 2 the number of zeros
    on each side, as in the authors' code. Batch normalization follows, so a
    bias is not needed. Images have channels last.

    Args:
        filters: Number of channels of the output.
        kernel_size: Side k of the square kernel; odd.
        stride: Stride s of the window, in pixels.
        padding: `"symmetric"`, p zeros on each side, or `"same"`, the rule of
            TensorFlow, which at stride 2 pads only after the image. Use it for
            weights that were trained with it. The two differ only if s > 1 and
            k > 1.

    Call arguments:
        x: Tensor of shape `[batch, height, width, channels]`.
        training: Whether a gradient follows. On some processors another
            kernel is then faster. The function is the same.

    Returns:
        A tensor of shape `[batch, ceil(height / s), ceil(width / s), filters]`.

    Raises:
        ValueError: If the kernel size is even or the padding is unknown.

    Example:

    >>> Convolution(16, 3, stride=2)(keras.ops.ones((1, 32, 32, 3))).shape
    TensorShape([1, 16, 16, 16])
    """

    def __init__(
        self,
        filters: int,
        kernel_size: int,
        stride: int = 1,
        padding: str = "symmetric",
        **kwargs,
    ):
        super().__init__(**kwargs)
        if kernel_size % 2 == 0:
            raise ValueError(
                "kernel_size must be odd (1, 3, 7), so that the window has a "
                f"centre, received {kernel_size}"
            )
        if padding not in PADDINGS:
            raise ValueError(
                f"padding must be one of {PADDINGS}, received {padding!r}"
            )
        self.filters = filters
        self.kernel_size = kernel_size
        self.stride = stride
        self.padding = padding
        self.kernel_initializer = papers_initializer()
        self.input_spec = keras.layers.InputSpec(ndim=4)

    def build(self, x_shape):
        self.kernel = self.add_weight(
            name="kernel",
            shape=(self.kernel_size, self.kernel_size, x_shape[-1])
            + (self.filters,),
            initializer=self.kernel_initializer,
        )

    def call(self, x, training=None):
        stride = self.stride
        padding = "same" if self.kernel_size > 1 else "valid"
        if self.kernel_size == 1:
            x, stride = subsampled(x, stride), 1
            if training and _is_fast_as_product(x):
                return self._product(x)
        elif self.padding == "symmetric" and stride > 1:
            # Padding first is faster than the explicit padding of TensorFlow's
            # convolution, whose gradients have no oneDNN kernel. Forward and
            # backward together, the stem of ResNet-50 is 2.1 times as fast. A
            # 3x3 convolution in bfloat16 is 10 to 26 times as fast on a
            # processor that multiplies bfloat16.
            sides = (self.kernel_size // 2,) * 2
            x = ops.pad(x, ((0, 0), sides, sides, (0, 0)))
            padding = "valid"
        return ops.conv(
            x,
            ops.convert_to_tensor(self.kernel),
            stride,
            padding,
            data_format="channels_last",
        )

    def _product(self, x):
        """Computes a 1x1 convolution as a product of matrices."""
        *shape, channels = ops.shape(x)
        y = ops.matmul(
            ops.reshape(x, (-1, channels)),
            ops.convert_to_tensor(self.kernel)[0, 0],
        )
        return ops.reshape(y, (*shape, self.filters))

    def compute_output_shape(self, x_shape):
        batch, height, width, _ = x_shape
        return (
            batch,
            strided(height, self.stride),
            strided(width, self.stride),
            self.filters,
        )

    def get_config(self):
        return {
            **super().get_config(),
            "filters": self.filters,
            "kernel_size": self.kernel_size,
            "stride": self.stride,
            "padding": self.padding,
        }


def subsampled(x, stride: int):
    """Returns `x[:, ::stride, ::stride]` of `[batch, height, width, channels]`.

    A strided 1x1 convolution is computed as `subsampled` and a convolution of
    stride 1. On a processor with AMX, TensorFlow 2.21 aborts in the gradient of
    the strided convolution if it has 8 input channels and the batch is odd.

    >>> subsampled(ops.ones((1, 7, 8, 3)), 2).shape
    TensorShape([1, 4, 4, 3])
    """
    if stride == 1:
        return x
    # The average over one pixel is the pixel. On TensorFlow, a slice with
    # strides takes 4 to 9 times as long, forward and backward.
    return ops.average_pool(x, 1, stride, "valid", data_format="channels_last")


def _is_fast_as_product(x) -> bool:
    """Returns whether a matrix product trains faster than a 1x1 convolution.

    This is so in bfloat16 on a processor with tiles (Intel's AMX). For all
    layers of ResNet-50 together, the products take a third of the time for the
    gradient of the kernel. Forward, and for the gradient of x, they take the
    same time. In float32 and without tiles, products gain nothing.
    """
    return (
        keras.backend.backend() == "tensorflow"
        and keras.backend.standardize_dtype(x.dtype) == "bfloat16"
        and _multiplies_tiles()
    )


@functools.cache
def _multiplies_tiles() -> bool:
    """Returns whether TensorFlow runs on a processor with AMX for bfloat16."""
    import tensorflow as tf

    if any(d.device_type != "CPU" for d in tf.config.get_visible_devices()):
        return False
    features = pathlib.Path("/proc/cpuinfo")  # Linux
    return features.exists() and "amx_bf16" in features.read_text()


def strided(size: int | None, stride: int) -> int | None:
    """Returns `ceil(size / stride)`, or None if the size is unknown.

    >>> strided(7, 2)
    4
    """
    return None if size is None else -(-size // stride)
