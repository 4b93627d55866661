"""Shortcuts h(x) of [1, Sec. 3.3 and 4.1] and [2, Sec. 3].

A shortcut is a layer with the contract `(x, residual) -> sum`. It includes the
addition, because the exclusive gate of [2] also scales the residual.
"""

import keras
from keras import ops

from keras_resnet.layers.convolutions import Convolution
from keras_resnet.layers.convolutions import papers_initializer
from keras_resnet.layers.convolutions import subsampled
from keras_resnet.layers.normalization import EPSILON
from keras_resnet.layers.normalization import MOMENTUM
from keras_resnet.layers.normalization import BatchNormalization


def match(x, channels: int, stride: int, zeros: str = "end"):
    """Returns `x[::stride, ::stride]` with zero channels added (option A).

    Args:
        x: Tensor of shape `[batch, height, width, c]`, c <= `channels`.
        channels: Number of channels of the result.
        stride: Distance of the pixels that are kept.
        zeros: `"end"` appends the zero channels. `"both"` adds half of them
            before and half after, as the usual torch code for CIFAR.

    Returns:
        A tensor of shape `[batch, ceil(height / stride), ..., channels]`.

    >>> match(ops.ones((1, 8, 8, 16)), channels=32, stride=2).shape
    TensorShape([1, 4, 4, 32])
    """
    x = subsampled(x, stride)
    missing = channels - x.shape[-1]
    if missing:
        before = missing // 2 if zeros == "both" else 0
        x = ops.pad(x, ((0, 0),) * 3 + ((before, missing - before),))
    return x


class Shortcut(keras.layers.Layer):
    """Base class of the shortcuts, `sum = h(x) + F`.

    Subclasses create their weights in `build` and compute the sum in `call`. A
    unit creates its shortcut with `identifiers.get`, which sets `stride` and
    the settings of the normalization.

    Args:
        stride: Stride of the unit, in pixels.

    Call arguments:
        x: Input of the unit, `[batch, height, width, channels]`.
        residual: F(x), `[batch, ceil(height / stride), ..., out channels]`.
        training: Whether to normalize by the batch and drop at random.

    Returns:
        The sum, a tensor of the shape of `residual`.

    Raises:
        ValueError: If an identity shortcut would have to drop channels.
    """

    #: Whether the shortcut changes x in every unit. If False, h(x) = x in units
    #: that keep the dimension.
    projects_always = False

    def __init__(self, stride: int = 1, **kwargs):
        super().__init__(**kwargs)
        self.stride = stride

    @classmethod
    def check(cls, **arguments) -> None:
        """Raises ValueError if an argument has a value that is not allowed.

        `identifiers.NamedShortcut` checks its arguments by it without a layer.
        """

    def build(self, x_shape, residual_shape):
        if not self.projects_always and x_shape[-1] > residual_shape[-1]:
            raise ValueError(
                "an identity shortcut can append zero channels but not drop "
                f"any; received {x_shape[-1]} channels for a residual of "
                f"{residual_shape[-1]}: use shortcut='B'"
            )

    def changes_dimension(self, x_shape, residual_shape) -> bool:
        """Returns whether the unit strides or changes the channels."""
        return self.stride > 1 or x_shape[-1] != residual_shape[-1]

    def matched(self, x, residual):
        """Returns x in the dimension of the residual, by option A."""
        return match(x, residual.shape[-1], self.stride)

    def compute_output_shape(self, x_shape, residual_shape):
        return residual_shape

    def get_config(self):
        return {**super().get_config(), "stride": self.stride}


@keras.saving.register_keras_serializable(package="keras_resnet")
class OptionA(Shortcut):
    """Identity shortcut with zero padding of the channels, `sum = x + F`.

    This is option A of [1, Sec. 3.3]. If the unit changes the dimension, x is
    subsampled as `x[::stride, ::stride]`, and zero channels are added. The
    shortcut has no parameters. The CIFAR networks of [1] use it.

    Args:
        stride: Stride of the unit, in pixels.
        zeros: `"end"` appends the zero channels. `"both"` adds half on each
            side, as the usual torch code for CIFAR. A permutation of the
            channels makes the two the same function.

    Raises:
        ValueError: If `zeros` is unknown.

    Example:

    >>> x, residual = ops.ones((1, 8, 8, 16)), ops.zeros((1, 4, 4, 32))
    >>> float(ops.sum(OptionA(stride=2)(x, residual)[0, 0, 0]))
    16.0
    """

    def __init__(self, stride: int = 1, zeros: str = "end", **kwargs):
        super().__init__(stride, **kwargs)
        self.check(zeros=zeros)
        self.zeros = zeros

    @classmethod
    def check(cls, **arguments) -> None:
        zeros = arguments.get("zeros", "end")
        if zeros not in ("end", "both"):
            raise ValueError(
                f"zeros must be 'end' or 'both', received {zeros!r}"
            )

    def call(self, x, residual, training=None):
        return match(x, residual.shape[-1], self.stride, self.zeros) + residual

    def get_config(self):
        return {**super().get_config(), "zeros": self.zeros}


class _Projection(Shortcut):
    """Base class of the shortcuts with a 1x1 convolution."""

    def __init__(
        self,
        stride: int = 1,
        batch_norm: bool = True,
        batch_norm_momentum: float = MOMENTUM,
        batch_norm_epsilon: float = EPSILON,
        **kwargs,
    ):
        super().__init__(stride, **kwargs)
        self.batch_norm = batch_norm
        self.batch_norm_momentum = batch_norm_momentum
        self.batch_norm_epsilon = batch_norm_epsilon

    def build(self, x_shape, residual_shape):
        self.projection = self.norm = None
        if self.projects_always or self.changes_dimension(
            x_shape, residual_shape
        ):
            self.projection = Convolution(
                residual_shape[-1],
                1,
                self.stride,
                dtype=self.dtype_policy,
                name="projection",
            )
            self.projection.build(x_shape)
            if self.batch_norm:
                self.norm = BatchNormalization(
                    momentum=self.batch_norm_momentum,
                    epsilon=self.batch_norm_epsilon,
                    dtype=self.dtype_policy,
                    name="norm",
                )
                self.norm.build(residual_shape)

    def call(self, x, residual, training=None):
        if self.projection is not None:
            x = self.projection(x, training=training)
        if self.norm is not None:
            x = self.norm(x, training=training)
        return x + residual

    def get_config(self):
        return {
            **super().get_config(),
            "batch_norm": self.batch_norm,
            "batch_norm_momentum": self.batch_norm_momentum,
            "batch_norm_epsilon": self.batch_norm_epsilon,
        }


@keras.saving.register_keras_serializable(package="keras_resnet")
class OptionB(_Projection):
    """Projection where the dimension changes, and identity elsewhere.

    `sum = W_s x + F` if the unit changes the dimension, else `sum = x + F`

    This is option B of [1, Eq. 2 and Sec. 3.3]. W_s is a strided 1x1
    convolution. It is normalized, except in pre-activation units. The ImageNet
    networks of [1] use option B.

    Args:
        stride: Stride of the unit, in pixels.
        batch_norm: Whether batch normalization follows the projection.
        batch_norm_momentum: Momentum of the moving statistics.
        batch_norm_epsilon: Number that is added to the variance.

    Example:

    >>> x, residual = ops.ones((1, 8, 8, 16)), ops.zeros((1, 4, 4, 32))
    >>> OptionB(stride=2)(x, residual).shape
    TensorShape([1, 4, 4, 32])
    """


@keras.saving.register_keras_serializable(package="keras_resnet")
class OptionC(_Projection):
    """Projection in every unit, `sum = W_s x + F`.

    This is option C of [1, Sec. 4.1].

    Args:
        stride: Stride of the unit, in pixels.
        batch_norm: Whether batch normalization follows the projection.
        batch_norm_momentum: Momentum of the moving statistics.
        batch_norm_epsilon: Number that is added to the variance.

    Example:

    >>> x = ops.ones((1, 8, 8, 16))
    >>> OptionC()(x, ops.zeros((1, 8, 8, 16))).shape
    TensorShape([1, 8, 8, 16])
    """

    projects_always = True


@keras.saving.register_keras_serializable(package="keras_resnet")
class NoShortcut(Shortcut):
    """Shortcut of the plain networks of [1, Sec. 3.3], `sum = F`.

    Args:
        stride: Stride of the unit, in pixels. It has no effect.

    Example:

    >>> x = ops.ones((1, 1, 1, 1))
    >>> float(NoShortcut()(x, 3 * x)[0, 0, 0, 0])
    3.0
    """

    projects_always = True  # x is not used and may have any channels

    def call(self, x, residual, training=None):
        return residual


@keras.saving.register_keras_serializable(package="keras_resnet")
class ConstantScaling(Shortcut):
    """Sum with constant scales of the shortcut and of the residual.

    `sum = shortcut_scale * x + residual_scale * F` [2, Sec. 3.1]

    If the unit changes the dimension, x is matched by option A. Errors of
    ResNet-110 in [2, Table 1]:

    | shortcut_scale | residual_scale | test error, % |
    |---|---|---|
    | 1 (identity) | 1 | 6.61 |
    | 0.5 | 0.5 | 12.35 |
    | 0.5 | 1 | fail |
    | 0 | 1 | fail |

    Args:
        stride: Stride of the unit, in pixels.
        shortcut_scale: lambda of [2, Eq. 5 ff.].
        residual_scale: 1 - lambda, or 1 for an unscaled residual.

    Example:

    >>> x = ops.ones((1, 1, 1, 1))
    >>> float(ConstantScaling()(x, 2 * x)[0, 0, 0, 0])
    1.5
    """

    def __init__(
        self,
        stride: int = 1,
        shortcut_scale: float = 0.5,
        residual_scale: float = 0.5,
        **kwargs,
    ):
        super().__init__(stride, **kwargs)
        self.shortcut_scale = shortcut_scale
        self.residual_scale = residual_scale

    def call(self, x, residual, training=None):
        return (
            self.shortcut_scale * self.matched(x, residual)
            + self.residual_scale * residual
        )

    def get_config(self):
        return {
            **super().get_config(),
            "shortcut_scale": self.shortcut_scale,
            "residual_scale": self.residual_scale,
        }


class _Gate(keras.layers.Conv2D):
    """Strided 1x1 convolution of a subsampled input (see `subsampled`)."""

    computes_as = keras.layers.Conv2D

    def convolution_op(self, x, kernel):
        x = subsampled(x, self.strides[0])
        return ops.conv(x, kernel, data_format="channels_last")


class _Gating(Shortcut):
    """Base class of shortcuts with a gate `g(x) = sigmoid(W_g x + b_g)`."""

    def __init__(self, stride: int = 1, gate_bias: float = -6.0, **kwargs):
        super().__init__(stride, **kwargs)
        self.gate_bias = gate_bias

    def build(self, x_shape, residual_shape):
        super().build(x_shape, residual_shape)
        self.gate = _Gate(
            residual_shape[-1],
            1,
            strides=self.stride,
            activation="sigmoid",
            kernel_initializer=papers_initializer(),
            bias_initializer=keras.initializers.Constant(self.gate_bias),
            data_format="channels_last",
            dtype=self.dtype_policy,
            name="gate",
        )
        self.gate.build(x_shape)

    def get_config(self):
        return {**super().get_config(), "gate_bias": self.gate_bias}


@keras.saving.register_keras_serializable(package="keras_resnet")
class ExclusiveGating(_Gating):
    """Gate between the shortcut and the residual, as in Highway networks.

    `sum = (1 - g(x)) * x + g(x) * F`, `g(x) = sigmoid(W_g x + b_g)`
    [2, Sec. 3.1]

    W_g is a 1x1 convolution. If the unit changes the dimension, x is matched by
    option A. In [2, Table 1], ResNet-110 failed with b_g from 0 to -5. Its test
    error was 8.70% with -6, and 9.81% with -7. The authors of Highway networks
    replied that better tuned gates match identity shortcuts.

    Args:
        stride: Stride of the unit, in pixels.
        gate_bias: b_g, the initial bias of the gate.

    Example:

    >>> x = ops.zeros((1, 1, 1, 1))
    >>> float(ExclusiveGating(gate_bias=0.0)(x, x + 2)[0, 0, 0, 0])
    1.0
    """

    def call(self, x, residual, training=None):
        gate = self.gate(x)
        return (1 - gate) * self.matched(x, residual) + gate * residual


@keras.saving.register_keras_serializable(package="keras_resnet")
class ShortcutOnlyGating(_Gating):
    """Gate of the shortcut alone.

    `sum = (1 - g(x)) * x + F`, `g(x) = sigmoid(W_g x + b_g)` [2, Sec. 3.1]

    If the unit changes the dimension, x is matched by option A. In [2, Table
    1], the test error of ResNet-110 was 12.86% with b_g = 0, and 6.91% with
    b_g = -6.

    Args:
        stride: Stride of the unit, in pixels.
        gate_bias: b_g, the initial bias of the gate.

    Example:

    >>> x = ops.zeros((1, 1, 1, 1))
    >>> float(ShortcutOnlyGating(gate_bias=0.0)(x, x + 2)[0, 0, 0, 0])
    2.0
    """

    def call(self, x, residual, training=None):
        return (1 - self.gate(x)) * self.matched(x, residual) + residual


@keras.saving.register_keras_serializable(package="keras_resnet")
class ConvolutionShortcut(_Projection):
    """Projection without normalization in every unit, `sum = W_s x + F`.

    This is the 1x1 convolutional shortcut of [2, Sec. 3.2]. In [2, Table 1],
    the test error of ResNet-110 was 12.22%. The network has 1,822,170
    parameters.

    Args:
        stride: Stride of the unit, in pixels.

    Example:

    >>> x = ops.ones((1, 8, 8, 16))
    >>> ConvolutionShortcut()(x, ops.zeros((1, 8, 8, 16))).shape
    TensorShape([1, 8, 8, 16])
    """

    projects_always = True

    def __init__(self, stride: int = 1, **kwargs):
        super().__init__(stride, batch_norm=False, **kwargs)

    def get_config(self):
        config = super().get_config()
        for name in (
            "batch_norm",
            "batch_norm_momentum",
            "batch_norm_epsilon",
        ):
            del config[name]
        return config


@keras.saving.register_keras_serializable(package="keras_resnet")
class DropoutShortcut(Shortcut):
    """Dropout of the shortcut, `sum = dropout(x) + F` [2, Sec. 3.3].

    If the unit changes the dimension, x is matched by option A. In [2, Table
    1], ResNet-110 failed with a rate of 0.5 (a test error of more than 20%),
    because dropout scales every shortcut in expectation.

    Args:
        stride: Stride of the unit, in pixels.
        rate: Share of x that is dropped in training.

    Example:

    >>> x = ops.ones((1, 1, 1, 1))
    >>> float(DropoutShortcut()(x, x)[0, 0, 0, 0])
    2.0
    """

    def __init__(self, stride: int = 1, rate: float = 0.5, **kwargs):
        super().__init__(stride, **kwargs)
        self.check(rate=rate)
        self.rate = rate
        self.dropout = keras.layers.Dropout(
            rate, dtype=self.dtype_policy, name="dropout"
        )
        if rate > 0 and keras.backend.backend() == "tensorflow":
            # A checkpoint of TensorFlow does not find the generator's state.
            self.seed = self.dropout.seed_generator.state.value

    @classmethod
    def check(cls, **arguments) -> None:
        rate = arguments.get("rate", 0.5)
        if not 0 <= rate <= 1:
            raise ValueError(f"rate must be in [0, 1], received {rate}")

    def call(self, x, residual, training=None):
        x = self.dropout(self.matched(x, residual), training=training)
        return x + residual

    def get_config(self):
        return {**super().get_config(), "rate": self.rate}


SHORTCUTS: dict[str, type[Shortcut]] = {
    "A": OptionA,
    "B": OptionB,
    "C": OptionC,
    "none": NoShortcut,
    "constant_scaling": ConstantScaling,
    "exclusive_gating": ExclusiveGating,
    "shortcut_only_gating": ShortcutOnlyGating,
    "convolution": ConvolutionShortcut,
    "dropout": DropoutShortcut,
}

#: Shortcuts of [2, Table 1], as arguments of `get`. The paper's shortcut with a
#: scale of 0 is "no shortcut". Of the failed gates (biases 0 to -5), the table
#: has the first and the last.
TABLE_1: dict[str, str] = {
    "identity": "A",
    "no shortcut": "none",
    "scaling 0.5, residual 1": (
        "constant_scaling(shortcut_scale=0.5, residual_scale=1.0)"
    ),
    "scaling 0.5, residual 0.5": (
        "constant_scaling(shortcut_scale=0.5, residual_scale=0.5)"
    ),
    "exclusive gating, bias 0": "exclusive_gating(gate_bias=0.0)",
    "exclusive gating, bias -5": "exclusive_gating(gate_bias=-5.0)",
    "exclusive gating, bias -6": "exclusive_gating(gate_bias=-6.0)",
    "exclusive gating, bias -7": "exclusive_gating(gate_bias=-7.0)",
    "shortcut-only gating, bias 0": "shortcut_only_gating(gate_bias=0.0)",
    "shortcut-only gating, bias -6": "shortcut_only_gating(gate_bias=-6.0)",
    "1x1 convolution": "convolution",
    "dropout 0.5": "dropout(rate=0.5)",
}
