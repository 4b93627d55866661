"""Residual units `x_{l+1} = f(y_l)` with `y_l = h(x_l) + F(x_l, W_l)`.

These are [2, Eqs. 1 and 2]. The original unit of [1], the pre-activation unit
of [2] and the other units of [2, Fig. 4] differ only in the order of
convolution, batch normalization (BN) and ReLU.
"""

import keras
from keras import ops

from keras_resnet import names
from keras_resnet.layers import identifiers
from keras_resnet.layers import normalization
from keras_resnet.layers import remat
from keras_resnet.layers.convolutions import Convolution
from keras_resnet.layers.convolutions import strided
from keras_resnet.layers.normalization import EPSILON
from keras_resnet.layers.normalization import MOMENTUM
from keras_resnet.layers.normalization import BatchNormalization

EXPANSION = 4  # factor of a bottleneck's last convolution [1, Sec. 4.1]
STRIDES = ("1x1", "3x3")


def check_survival_probability(survival_probability: float) -> None:
    """Raises ValueError unless the value is in (0, 1].

    Zero is excluded because the residual is divided by the value.
    """
    if not 0.0 < survival_probability <= 1.0:
        raise ValueError(
            "survival_probability must be in (0, 1], received "
            f"{survival_probability}"
        )


class Unit(keras.layers.Layer):
    """Base class of the five units: two 3x3 convolutions, or a bottleneck.

    A bottleneck has 1x1, 3x3 and 1x1 convolutions of `filters`, `filters` and
    `expansion * filters` channels [1, Fig. 5]. Subclasses define the order of
    the layers in `forward`.

    Args:
        filters: Number of filters of the 3x3 convolutions.
        stride: Stride of the unit, in pixels.
        bottleneck: Whether the unit is a bottleneck.
        shortcut: Name, class or configured instance (`identifiers.get`). The
            unit sets its stride and the settings of its normalization.
        bottleneck_stride: Convolution of a bottleneck that strides: `"1x1"`,
            the first one [1], or `"3x3"` (torchvision's v1.5).
        padding: Padding of the convolutions (see `Convolution`).
        remat: Whether training keeps only the input of the unit, and recomputes
            the activations inside it in the backward pass.
        survival_probability: Probability p of stochastic depth (Huang et al.
            2016). Training drops the residual of an image with probability
            1 - p and divides it by p otherwise. Inference does not change it.
        batch_norm_momentum: Momentum of the moving statistics.
        batch_norm_epsilon: Number that is added to the variance.
        batch_norm_trainable: Whether the normalizations train with the unit. If
            False, they use the moving statistics in training also
            (`keras_resnet.freeze`).
        expansion: Channels of a bottleneck's output for each filter: 4 [1], or
            2 in wide bottlenecks (Zagoruyko and Komodakis 2016).

    Call arguments:
        x: Tensor of shape `[batch, height, width, channels]`.
        training: Whether to normalize by the batch and drop at random.

    Returns:
        A tensor of shape `[batch, ceil(height / stride), ceil(width / stride),
        output_filters]`.

    Raises:
        ValueError: If an argument has a value that is not allowed.
    """

    activates_first = False  # whether a normalization precedes its convolution
    normalizes_projection = True

    def __init__(
        self,
        filters: int,
        stride: int = 1,
        bottleneck: bool = False,
        shortcut="B",
        bottleneck_stride: str = "1x1",
        padding: str = "symmetric",
        remat: bool = False,
        survival_probability: float = 1.0,
        batch_norm_momentum: float = MOMENTUM,
        batch_norm_epsilon: float = EPSILON,
        batch_norm_trainable: bool = True,
        expansion: int = EXPANSION,
        **kwargs,
    ):
        super().__init__(**kwargs)
        if bottleneck_stride not in STRIDES:
            raise ValueError(
                f"bottleneck_stride must be one of {STRIDES}, received "
                f"{bottleneck_stride!r}"
            )
        check_survival_probability(survival_probability)
        self.filters = filters
        self.stride = stride
        self.bottleneck = bottleneck
        self.bottleneck_stride = bottleneck_stride
        self.padding = padding
        self.remat = remat
        self.survival_probability = survival_probability
        self.batch_norm_momentum = batch_norm_momentum
        self.batch_norm_epsilon = batch_norm_epsilon
        self._batch_norm_trainable = batch_norm_trainable
        self.expansion = expansion

        self.shortcut = identifiers.get(
            shortcut,
            stride=stride,
            batch_norm=self.normalizes_projection,
            batch_norm_momentum=batch_norm_momentum,
            batch_norm_epsilon=batch_norm_epsilon,
            dtype=self.dtype_policy,
            name="shortcut",
        )
        if survival_probability < 1.0:
            self.seed_generator = keras.random.SeedGenerator()
            if keras.backend.backend() == "tensorflow":
                # TensorFlow's checkpoints do not find the generator's state.
                self.seed = self.seed_generator.state.value

    def layout(self) -> list[tuple[int, int, int]]:
        """Returns kernel size, filters and stride of each convolution."""
        if not self.bottleneck:
            return [(3, self.filters, self.stride), (3, self.filters, 1)]
        first, middle = self.stride, 1
        if self.bottleneck_stride == "3x3":
            first, middle = middle, first
        return [
            (1, self.filters, first),
            (3, self.filters, middle),
            (1, self.output_filters, 1),
        ]

    @property
    def output_filters(self) -> int:
        """Number of output channels: `filters`, or `expansion * filters`."""
        return self.filters * (self.expansion if self.bottleneck else 1)

    def build(self, x_shape):
        shape = x_shape
        for i, (kernel_size, filters, stride) in enumerate(self.layout(), 1):
            convolution = Convolution(
                filters,
                kernel_size,
                stride,
                self.padding,
                dtype=self.dtype_policy,
                name=f"conv{i}",
            )
            norm = BatchNormalization(
                momentum=self.batch_norm_momentum,
                epsilon=self.batch_norm_epsilon,
                dtype=self.dtype_policy,
                name=f"norm{i}",
            )
            setattr(self, f"conv{i}", convolution)
            convolution.build(shape)
            before, shape = shape, convolution.compute_output_shape(shape)
            if self.normalizes(i):
                setattr(self, f"norm{i}", norm)
                norm.build(before if self.activates_first else shape)
        self.shortcut.build(x_shape, shape)
        self.changes_dimension = self.shortcut.changes_dimension(x_shape, shape)
        # Keras restores `trainable` of a saved or cloned unit before the unit
        # has sublayers.
        if not self.trainable:
            for layer in self._flatten_layers(include_self=False):
                layer.trainable = False
        if not self._batch_norm_trainable:
            normalization.freeze(self)

    @property
    def batch_norm_trainable(self) -> bool:
        """Whether the normalizations train with the unit."""
        if not self.built:
            return self._batch_norm_trainable
        norms = normalization.norms(self)
        return not norms or any(norm.trainable for norm in norms)

    def freeze_norms(self) -> None:
        """Freezes the normalizations that `build` creates."""
        self._batch_norm_trainable = False

    def normalizes(self, i: int) -> bool:
        """Returns whether the unit has its i-th normalization."""
        return True

    def pairs(self) -> list[tuple]:
        """Returns each convolution with the normalization of its number."""
        return [
            (getattr(self, f"conv{i}"), getattr(self, f"norm{i}", None))
            for i in range(1, len(self.layout()) + 1)
        ]

    def call(self, x, training=None):
        if self.remat and training:
            return remat.recomputed(self, x)
        return self.forward(x, training)

    def survive(self, residual, training, survival_probability=None):
        """Drops the residual of random images in training (stochastic depth).

        Args:
            residual: F(x), `[batch, height, width, channels]`.
            training: Whether to drop.
            survival_probability: p as a scalar tensor, or None for that of the
                unit.

        Returns:
            A tensor of the shape of `residual`.
        """
        if not training or self.survival_probability == 1.0:
            return residual
        p = survival_probability
        if p is None:
            p = self.survival_probability
        shape = (ops.shape(residual)[0], 1, 1, 1)
        draw = keras.random.uniform(
            shape, dtype="float32", seed=self.seed_generator
        )
        kept = ops.cast(draw < p, "float32") / p
        return residual * ops.cast(kept, residual.dtype)

    def compute_output_shape(self, x_shape):
        batch, height, width, _ = x_shape
        return (
            batch,
            strided(height, self.stride),
            strided(width, self.stride),
            self.output_filters,
        )

    def get_config(self):
        # The copy does not record the shapes of this unit.
        shortcut = identifiers.get(self.shortcut)
        return {
            **super().get_config(),
            "filters": self.filters,
            "stride": self.stride,
            "bottleneck": self.bottleneck,
            "shortcut": keras.saving.serialize_keras_object(shortcut),
            "bottleneck_stride": self.bottleneck_stride,
            "padding": self.padding,
            "remat": self.remat,
            "survival_probability": self.survival_probability,
            "batch_norm_momentum": self.batch_norm_momentum,
            "batch_norm_epsilon": self.batch_norm_epsilon,
            "batch_norm_trainable": self.batch_norm_trainable,
            "expansion": self.expansion,
        }


@keras.saving.register_keras_serializable(package="keras_resnet")
class OriginalUnit(Unit):
    """Original unit of [1, Fig. 2] and [2, Fig. 4 (a)].

    `x_{l+1} = relu(h(x) + F(x))`, F = conv, BN, ReLU, conv, BN

    Args:
        filters, ...: As in `Unit`.

    Example:

    >>> OriginalUnit(32, stride=2)(ops.ones((1, 8, 8, 16))).shape
    TensorShape([1, 4, 4, 32])
    """

    def forward(self, x, training=None, survival_probability=None):
        residual = x
        *first, last = self.pairs()
        for convolution, norm in first:
            residual = convolution(residual, training=training)
            residual = ops.relu(norm(residual, training=training))
        convolution, norm = last
        residual = norm(
            convolution(residual, training=training), training=training
        )
        residual = self.survive(residual, training, survival_probability)
        return ops.relu(self.shortcut(x, residual, training=training))


@keras.saving.register_keras_serializable(package="keras_resnet")
class PreActivationUnit(Unit):
    """Full pre-activation unit of [2, Fig. 4 (e)].

    `x_{l+1} = h(x) + F(x)`, F = BN, ReLU, conv, BN, ReLU, conv

    f is the identity, so that `x_L = x_l + sum of F(x_i)` [2, Eq. 4]. If the
    unit changes the dimension, its shortcut receives the signal after the first
    BN and ReLU. Its projection is not normalized.

    Args:
        filters, ...: As in `Unit`.
        activated_input: Whether x has already passed BN and ReLU. The unit then
            starts with its convolution. This is so in the first unit of a
            network, whose two paths start from the activated signal of the stem
            [2, Appendix].

    Example:

    >>> PreActivationUnit(32, stride=2)(ops.ones((1, 8, 8, 16))).shape
    TensorShape([1, 4, 4, 32])
    """

    activates_first = True
    normalizes_projection = False

    def __init__(self, filters: int, *args, activated_input=False, **kwargs):
        super().__init__(filters, *args, **kwargs)
        self.activated_input = activated_input

    def normalizes(self, i):
        return i > 1 or not self.activated_input

    def forward(self, x, training=None, survival_probability=None):
        signal = x
        (convolution, norm), *others = self.pairs()
        if not self.activated_input:
            signal = ops.relu(norm(x, training=training))
        residual = convolution(signal, training=training)
        for convolution, norm in others:
            residual = ops.relu(norm(residual, training=training))
            residual = convolution(residual, training=training)
        residual = self.survive(residual, training, survival_probability)
        x = signal if self.changes_dimension else x
        return self.shortcut(x, residual, training=training)

    def get_config(self):
        return {
            **super().get_config(),
            "activated_input": self.activated_input,
        }


@keras.saving.register_keras_serializable(package="keras_resnet")
class BatchNormAfterAdditionUnit(Unit):
    """Unit with BN after the addition, of [2, Fig. 4 (b)].

    `x_{l+1} = relu(BN(h(x) + F(x)))`, F = conv, BN, ReLU, conv

    The normalization in f changes the signal of the shortcut.

    Args:
        filters, ...: As in `Unit`.

    Example:

    >>> BatchNormAfterAdditionUnit(16)(ops.ones((1, 8, 8, 16))).shape
    TensorShape([1, 8, 8, 16])
    """

    def forward(self, x, training=None, survival_probability=None):
        residual = x
        *first, (convolution, last_norm) = self.pairs()
        for inner, norm in first:
            residual = inner(residual, training=training)
            residual = ops.relu(norm(residual, training=training))
        residual = convolution(residual, training=training)
        residual = self.survive(residual, training, survival_probability)
        y = self.shortcut(x, residual, training=training)
        return ops.relu(last_norm(y, training=training))


@keras.saving.register_keras_serializable(package="keras_resnet")
class ReLUBeforeAdditionUnit(Unit):
    """Unit with ReLU before the addition, of [2, Fig. 4 (c)].

    `x_{l+1} = h(x) + F(x)`, F = conv, BN, ReLU, conv, BN, ReLU

    The residual is never negative, so the signal can only grow.

    Args:
        filters, ...: As in `Unit`.

    Example:

    >>> ReLUBeforeAdditionUnit(16)(ops.ones((1, 8, 8, 16))).shape
    TensorShape([1, 8, 8, 16])
    """

    def forward(self, x, training=None, survival_probability=None):
        residual = x
        for convolution, norm in self.pairs():
            residual = convolution(residual, training=training)
            residual = ops.relu(norm(residual, training=training))
        residual = self.survive(residual, training, survival_probability)
        return self.shortcut(x, residual, training=training)


@keras.saving.register_keras_serializable(package="keras_resnet")
class ReLUOnlyPreActivationUnit(PreActivationUnit):
    """Unit with only ReLU as pre-activation, of [2, Fig. 4 (d)].

    `x_{l+1} = h(x) + F(x)`, F = ReLU, conv, BN, ReLU, conv, BN

    The ReLU precedes its convolution, and the normalization follows it.

    Args:
        filters, ..., activated_input: As in `PreActivationUnit`.

    Example:

    >>> ReLUOnlyPreActivationUnit(16)(ops.ones((1, 8, 8, 16))).shape
    TensorShape([1, 8, 8, 16])
    """

    activates_first = False

    def normalizes(self, i):
        return True

    def forward(self, x, training=None, survival_probability=None):
        signal = residual = x if self.activated_input else ops.relu(x)
        *first, (convolution, norm) = self.pairs()
        for inner, inner_norm in first:
            residual = inner(residual, training=training)
            residual = ops.relu(inner_norm(residual, training=training))
        residual = norm(
            convolution(residual, training=training), training=training
        )
        residual = self.survive(residual, training, survival_probability)
        x = signal if self.changes_dimension else x
        return self.shortcut(x, residual, training=training)


UNITS: dict[str, type[Unit]] = {
    "original": OriginalUnit,
    "pre_activation": PreActivationUnit,
    "batch_norm_after_addition": BatchNormAfterAdditionUnit,
    "relu_before_addition": ReLUBeforeAdditionUnit,
    "relu_only_pre_activation": ReLUOnlyPreActivationUnit,
}


def get(identifier) -> type[Unit]:
    """Returns the class of a unit from a key of `UNITS` or from the class.

    Raises:
        ValueError: If the identifier is unknown.

    >>> get("original").__name__
    'OriginalUnit'
    """
    if isinstance(identifier, type) and issubclass(identifier, Unit):
        return identifier
    if isinstance(identifier, str) and identifier in UNITS:
        return UNITS[identifier]
    raise ValueError(
        f"unit must be one of {', '.join(UNITS)} or a subclass of "
        f"keras_resnet.layers.Unit, received {identifier!r}"
        + names.hint(str(identifier), UNITS)
    )
