"""The networks that [1, Table 6] compares residual networks with.

[1] He et al. 2016, "Deep Residual Learning for Image Recognition". Each row of
`BASELINES` has its own source and the parameters that [1] prints.
"""

import dataclasses
import threading
from collections.abc import Callable
from typing import Any

import keras
from keras import layers
from keras import ops

from keras_resnet import models


def _initializer():
    """He et al. 2015, fan in: a ReLU halves the mean square of a signal."""
    return keras.initializers.VarianceScaling(2.0, "fan_in")


@keras.saving.register_keras_serializable(package="keras_resnet")
class Maxout(keras.layers.Layer):
    """`y[c] = max over j < pieces of x[c * pieces + j]` [Goodfellow 2013].

    Args:
        pieces: How many channels share a maximum.

    Call arguments:
        x: Tensor of shape `[..., channels]`; `pieces` divides the channels.

    Returns:
        A tensor of shape `[..., channels / pieces]`.

    >>> Maxout(2)(ops.array([[1.0, 3.0, 2.0, 0.0]])).numpy().tolist()
    [[3.0, 2.0]]
    """

    def __init__(self, pieces: int, **kwargs):
        super().__init__(**kwargs)
        self.pieces = pieces

    def call(self, x):
        channels = x.shape[-1] // self.pieces
        shape = (-1, *x.shape[1:-1], channels, self.pieces)
        return ops.max(ops.reshape(x, shape), axis=-1)

    def compute_output_shape(self, x_shape):
        return (*x_shape[:-1], x_shape[-1] // self.pieces)

    def get_config(self):
        return {**super().get_config(), "pieces": self.pieces}


@keras.saving.register_keras_serializable(package="keras_resnet")
class Highway(keras.layers.Layer):
    """`y = T(x) H(x) + (1 - T(x)) x` [Srivastava 2015, Eq. 3].

    H is a 3x3 convolution and a ReLU; T, the gate, a 3x3 convolution and a
    sigmoid, which starts closed.

    Args:
        gate_bias: The initial bias of the gate; negative.

    Call arguments:
        x: Tensor of shape `[batch, height, width, channels]`.

    Returns:
        A tensor of the shape of `x`.

    >>> Highway()(ops.ones((1, 8, 8, 4))).shape
    TensorShape([1, 8, 8, 4])
    """

    def __init__(self, gate_bias: float = -2.0, **kwargs):
        super().__init__(**kwargs)
        self.gate_bias = gate_bias

    def build(self, x_shape):
        self.transform = _convolution(
            x_shape[-1], 3, "relu", dtype=self.dtype_policy, name="transform"
        )
        self.gate = _convolution(
            x_shape[-1],
            3,
            "sigmoid",
            bias_initializer=keras.initializers.Constant(self.gate_bias),
            dtype=self.dtype_policy,
            name="gate",
        )
        self.transform.build(x_shape)
        self.gate.build(x_shape)

    def call(self, x):
        gate = self.gate(x)
        return gate * self.transform(x) + (1 - gate) * x

    def compute_output_shape(self, x_shape):
        return x_shape

    def get_config(self):
        return {**super().get_config(), "gate_bias": self.gate_bias}


@keras.saving.register_keras_serializable(package="keras_resnet")
class Companion(keras.layers.Layer):
    """`y = x`, with a classifier of x for training [Lee 2015].

    `loss = loss of the network + weight * loss of the companion`. The training
    step adds the second term from `Baseline.companion_logits`.

    Args:
        classes: Number of classes.
        weight: Of the companion's loss.

    Call arguments:
        x: Tensor of shape `[batch, height, width, channels]`.

    Returns:
        `x` itself.

    >>> Companion(10)(ops.ones((1, 8, 8, 4))).shape
    TensorShape([1, 8, 8, 4])
    """

    def __init__(self, classes: int, weight: float = 0.3, **kwargs):
        super().__init__(**kwargs)
        self.classes = classes
        self.weight = weight
        # tf.distribute traces each device in a thread of its own, and switches
        # between the threads at each all-reduce.
        self.of_thread = threading.local()

    def build(self, x_shape):
        self.classifier = layers.Dense(
            self.classes,
            dtype=keras.backend.result_type(self.variable_dtype, "float32"),
            name="classifier",
        )
        self.classifier.build((None, x_shape[-1]))

    def call(self, x):
        self.of_thread.logits = self.classifier(ops.mean(x, axis=(1, 2)))
        return x

    def compute_output_shape(self, x_shape):
        return x_shape

    def get_config(self):
        return {
            **super().get_config(),
            "classes": self.classes,
            "weight": self.weight,
        }


def _convolution(filters, size, activation="relu", **arguments):
    arguments = {"kernel_initializer": _initializer(), **arguments}
    return layers.Conv2D(
        filters,
        size,
        padding="same",
        activation=activation,
        data_format="channels_last",
        **arguments,
    )


def _pool(size, stride, kind="Max"):
    pool = getattr(layers, f"{kind}Pooling2D")
    return pool(size, stride, "same", data_format="channels_last")


def _global_average(x):
    return layers.GlobalAveragePooling2D(data_format="channels_last")(x)


def _max_norm(norm, axis=0):
    """A bound on the norm of the weights of each output [Goodfellow 2013]."""
    return keras.constraints.MaxNorm(norm, axis)


def _orthogonal(largest_of):
    """Returns orthogonal filters that keep the mean square of a signal.

    The signal is the largest of `largest_of` outputs: of the pieces of a
    maxout, and of the window of a pooling behind it.
    """
    return keras.initializers.Orthogonal(_MEAN_SQUARE[largest_of] ** -0.5)


def _maxout_head(x, pieces, classes):
    x = layers.Dense(
        500 * pieces,
        kernel_initializer=_orthogonal(pieces),
        kernel_constraint=_max_norm(1.9),
    )(x)
    x = layers.Dropout(0.5)(Maxout(pieces)(x))
    return layers.Dense(
        classes,
        kernel_constraint=_max_norm(1.9365),
        dtype=models.classifier_dtype(),
    )(x)


#: Mean square of the largest of n normal numbers of variance 1, by n.
_MEAN_SQUARE = {2: 1.0, 5: 1.8, 8: 2.4, 32: 4.5}


# Each function takes an image and the number of classes, and returns logits.


# The widths of FitNet-19's convolutions in its three stages.
_FITNET19 = ((32, 32, 32, 48, 48), (80,) * 6, (128,) * 6)


def _fitnet19(x, classes):
    # The authors' images have a variance of 1. Pixels of CIFAR-10 in 0..1 are
    # about 1/4 from their mean, and the 17 layers keep the scale.
    x = layers.Rescaling(4.0)(x)
    for stage, widths in enumerate(_FITNET19):
        if stage:
            x = _pool(2, 2)(x)
        for width in widths:
            # Orthogonal, as Mishkin and Matas 2016, Sec. 4.1, who train FitNet
            # without hints, and without bounds.
            x = _convolution(
                2 * width, 3, None, kernel_initializer=_orthogonal(2)
            )(x)
            x = Maxout(2)(x)
    x = layers.GlobalMaxPooling2D(data_format="channels_last")(x)
    # With 2 pieces, as the convolutions: the 5 of the published configuration
    # give 2.74 million parameters.
    return _maxout_head(x, 2, classes)


def _highway19(x, classes):
    # FitNet-19, each of its layers that keep the width a highway layer.
    for stage, widths in enumerate(_FITNET19):
        if stage:
            x = _pool(2, 2)(x)
        for width in widths:
            if x.shape[-1] == width:
                x = Highway()(x)
            else:
                x = _convolution(width, 3)(x)
    x = layers.GlobalMaxPooling2D(data_format="channels_last")(x)
    x = layers.Dense(500, "relu", kernel_initializer=_initializer())(x)
    return layers.Dense(classes)(x)


def _highway32(x, classes):
    # Three stages, 31 convolutions of 3x3 and one of 1x1. The widths are not
    # printed; these come within 2% of the parameters that are. By gates with a
    # bias of -2 a signal loses nine tenths, and nothing is learned at first.
    for stage, (width, count) in enumerate(((32, 10), (48, 9), (64, 9))):
        if stage:
            x = _pool(2, 2)(x)
        x = _convolution(width, 3)(x)
        for _ in range(count):
            x = Highway(gate_bias=-4.0)(x)
    x = _convolution(classes, 1, None)(x)
    return _global_average(x)


def _network_in_network(x, classes, companions=False):
    for stage, (size, widths) in enumerate(
        ((5, (192, 160, 96)), (5, (192, 192, 192)), (3, (192, 192, classes)))
    ):
        for i, width in enumerate(widths):
            x = _convolution(width, 1 if i else size)(x)
        if stage < 2:
            if companions:
                x = Companion(classes)(x)
            x = _pool(3, 2, "Average" if stage else "Max")(x)
            x = layers.Dropout(0.5)(x)
    return _global_average(x)


def _maxout(x, classes):
    for width, size, pad, pool, norm in (
        (96, 8, 4, 4, 0.9),
        (192, 8, 3, 4, 1.9365),
        (192, 5, 3, 2, 1.9365),
    ):
        x = layers.Dropout(0.5 if width > 96 or size < 8 else 0.2)(x)
        x = layers.ZeroPadding2D(pad, data_format="channels_last")(x)
        x = layers.Conv2D(
            2 * width,
            size,
            kernel_initializer=_orthogonal(2 * pool**2),
            kernel_constraint=_max_norm(norm, [0, 1, 2]),
            data_format="channels_last",
        )(x)
        x = _pool(pool, 2)(Maxout(2)(x))
    x = layers.Dropout(0.5)(layers.Flatten()(x))
    return _maxout_head(x, 5, classes)


def _deeply_supervised(x, classes):
    return _network_in_network(x, classes, companions=True)


# Departure: the networks that [1, Table 6] compares with train by the recipe of
# [1] at a rate of 0.01 (Maxout: 0.002). Their authors' whitening, schedules,
# hints (FitNet) and vanishing companion losses (DSN) are left out.
@dataclasses.dataclass(frozen=True)
class Baseline:
    """A network that [1, Table 6] compares with.

    Attributes:
        name: The key in `BASELINES`.
        depth: Number of weighted layers.
        logits: Gives the logits of an image: `(x, classes) -> logits`.
        printed_parameters: Parameters that [1, Table 6] or the source prints.
        source: The publication that describes the layout.
        recipe: Name of the recipe that trains it on small images. None is the
            recipe of a residual network.
    """

    name: str
    depth: int
    logits: Callable
    printed_parameters: float
    source: str
    recipe: str | None = None

    def build(
        self,
        input_shape: tuple[int, int, int] = (32, 32, 3),
        classes: int = 10,
        classifier_activation="softmax",
    ) -> keras.Model:
        """Builds the network, as `keras_resnet.resnet` builds others."""
        image = keras.Input(input_shape, name="image")
        x = self.logits(image, classes)
        x = layers.Activation(
            classifier_activation,
            dtype=models.classifier_dtype(),
            name="predictions",
        )(x)
        return keras.Model(image, x, name=self.name)

    def companion_logits(self, model: keras.Model) -> list[tuple[float, Any]]:
        """Returns the weight and logits of each companion in the last call.

        A training step calls the model first, in the same trace.

        Args:
            model: The network, as `build` returns it.
        """
        return [
            (layer.weight, layer.of_thread.logits)
            for layer in model.layers
            if isinstance(layer, Companion)
        ]


# Without batch normalization a network diverges at the rate of [1, Sec. 4.2].
_UNNORMALIZED = "cifar10_unnormalized"


BASELINES: dict[str, Baseline] = {
    row.name: row
    for row in (
        Baseline(
            *("highway19", 19, _highway19, 2.3e6),
            source="Srivastava et al. 2015, Training Very Deep Networks, "
            "Table 2: FitNet-19 of highway layers",
            recipe=_UNNORMALIZED,
        ),
        Baseline(
            *("highway32", 32, _highway32, 1.25e6),
            source="Srivastava et al. 2015, Training Very Deep Networks, "
            "Table 2: 32 layers, all of them convolutions",
            recipe=_UNNORMALIZED,
        ),
        Baseline(
            *("fitnet19", 19, _fitnet19, 2.5e6),
            source="Romero et al. 2015, FitNets, FitNet 4",
            recipe=_UNNORMALIZED,
        ),
        Baseline(
            *("nin", 9, _network_in_network, 1.0e6),
            source="Lin et al. 2014, Network in Network, Sec. 4.2",
            recipe=_UNNORMALIZED,
        ),
        Baseline(
            *("dsn", 9, _deeply_supervised, 1.0e6),
            source="Lee et al. 2015, Deeply-Supervised Nets, Sec. 4: NIN with "
            "companions",
            recipe=_UNNORMALIZED,
        ),
        Baseline(
            *("maxout", 5, _maxout, 6.0e6),  # "> 6M"
            source="Goodfellow et al. 2013, Maxout Networks, Sec. 5.2, and its "
            "published configuration",
            recipe="cifar10_maxout",
        ),
    )
}
