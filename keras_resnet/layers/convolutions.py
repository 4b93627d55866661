"""The convolution of both papers: no bias, padded alike on both sides.

It is apart from the units because shortcuts and stems convolve too.
"""

import functools
import pathlib

import keras
from keras import ops

PADDINGS = ("symmetric", "same")


def papers_initializer() -> keras.initializers.Initializer:
    """A normal distribution of variance 2 / (k * k * filters), not truncated.

    [1, Sec. 3.4] initializes as He et al. 2015, whose n the authors' code
    takes as fan out. Each call gives an initializer with a seed of its own.
    """
    return keras.initializers.VarianceScaling(
        2.0, "fan_out", "untruncated_normal"
    )


@keras.saving.register_keras_serializable(package="keras_resnet")
class Convolution(keras.layers.Layer):
    """`y[i, j] = sum over u, v of x[s i + u - p, s j + v - p] . w[u, v]`.

    A two-dimensional convolution (channels last) with kernel size k, stride
    s and p = (k - 1) / 2 zeros on each side, as in the authors' code; no
    bias, since batch normalization follows.

    Args:
        filters: Number of channels of the output.
        kernel_size: Side k of the square kernel; odd.
        stride: Stride s of the window, in pixels.
        padding: `"symmetric"`, p zeros on each side, or `"same"`, TensorFlow's
            rule, which at stride 2 pads after the image only (for weights
            that were trained so). The two differ only where s > 1 and k > 1.

    Call arguments:
        x: Tensor of shape `[batch, height, width, channels]`.
        training: Whether a gradient is taken, which on some processors makes
            another kernel the faster one. The function is the same.

    Returns:
        A tensor of shape `[batch, ceil(height / s), ceil(width / s), filters]`.

    Raises:
        ValueError: If the kernel size is even or the padding unknown.

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
            # Not by the paddings that TensorFlow's convolution itself takes:
            # their gradients have no oneDNN kernel. Forward and backward, the
            # stem of ResNet-50 is 2.1 times as fast so, a 3x3 in bfloat16, on
            # a processor that multiplies it, 10 to 26 times.
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
        """A 1x1 convolution as a product of matrices."""
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
    """`x[:, ::stride, ::stride]`, of `[batch, height, width, channels]`.

    A strided 1x1 convolution is this and a convolution of stride 1. TensorFlow
    2.21 aborts in the gradient of the strided one, on a processor with AMX, if
    it has 8 input channels and the batch is odd.

    >>> subsampled(ops.ones((1, 7, 8, 3)), 2).shape
    TensorShape([1, 4, 4, 3])
    """
    if stride == 1:
        return x
    # The average of one pixel is that pixel: on TensorFlow a slice with
    # strides takes 4 to 9 times as long, forward and backward.
    return ops.average_pool(x, 1, stride, "valid", data_format="channels_last")


def _is_fast_as_product(x) -> bool:
    """Whether x times a matrix trains faster than a 1x1 convolution of x.

    In bfloat16, on a processor with tiles (Intel's AMX): the products take as
    long forward and for the gradient of x, and for that of the kernel a third,
    all layers of ResNet-50 together. In float32 and without tiles they gain
    nothing.
    """
    return (
        keras.backend.backend() == "tensorflow"
        and keras.backend.standardize_dtype(x.dtype) == "bfloat16"
        and _multiplies_tiles()
    )


@functools.cache
def _multiplies_tiles() -> bool:
    """Whether TensorFlow runs on a processor with AMX for bfloat16."""
    import tensorflow as tf

    if any(d.device_type != "CPU" for d in tf.config.get_visible_devices()):
        return False
    features = pathlib.Path("/proc/cpuinfo")  # Linux
    return features.exists() and "amx_bf16" in features.read_text()


def strided(size: int | None, stride: int) -> int | None:
    """`ceil(size / stride)`, or None where the size is not known yet.

    >>> strided(7, 2)
    4
    """
    return None if size is None else -(-size // stride)
