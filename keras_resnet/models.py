"""The networks of [1] and [2], each one row of a table.

[1] He et al. 2016, "Deep Residual Learning for Image Recognition".
[2] He et al. 2016, "Identity Mappings in Deep Residual Networks".
"""

import dataclasses
import math
import numbers
import operator
import os
import re
import warnings
from collections.abc import Iterable
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from keras_resnet import graphs
from keras_resnet import names
from keras_resnet.layers import BatchNormalization
from keras_resnet.layers import Convolution
from keras_resnet.layers import UnitStack
from keras_resnet.layers import normalization
from keras_resnet.layers import shortcuts as shortcuts_lib
from keras_resnet.layers import units as units_lib
from keras_resnet.layers.normalization import EPSILON
from keras_resnet.layers.normalization import MOMENTUM
from keras_resnet.weights import loading
from keras_resnet.weights import shipped

# From how many identical units on a stage is a loop by default. Seconds to the
# end of the first step, unrolled and looped, and how many times as fast as the
# unrolled network a later step of the loop is (TensorFlow 2.21, two cores,
# float32; `python -m benchmarks --groups=depth,memory`):
#
#     network     identical units  batch  to the first step  a later step
#     ResNet-20         2             8      0.9 -> 1.8         0.92 x
#     ResNet-56         8             8      2.6 -> 2.1         0.95 x
#     ResNet-110       17             8      5.3 -> 2.0         0.93 x
#     302 layers       49             8     15.1 -> 2.4         0.87 x
#     ResNet-1202     199             8     79.9 -> 3.9         0.83 x
#     ResNet-1202     199            32     91.0 -> 8.2         0.96 x
#
# Up to ResNet-200 (35) the unrolled graph is the better one for a long run, and
# its layers can be looked at one by one; after that its tracing is what hurts.
LOOP_FROM = 40

FIRST_NORMS = ("stem", "unit", "both")
PREPROCESSING_MODES = ("caffe", "tf", "torch", "cifar10")


@dataclasses.dataclass(frozen=True)
class Spec:
    """One network: a stem, stages of residual units, a classifier.

    Attributes:
        name: Lower-case name, the key in `MODELS`.
        units: Number of units in each stage.
        filters: Filters of the 3x3 convolutions in each stage; a bottleneck
            puts out 4 times as many.
        bottleneck: Whether the units are bottlenecks.
        stem: `"imagenet"`, a 7x7 convolution of stride 2 and 3x3 max pooling of
            stride 2, or `"cifar"`, a 3x3 convolution; both followed by batch
            normalization and ReLU, with `filters[0]` filters.
        unit: Default order of the units.
        shortcut: Default shortcut.
        classes: Default number of classes.
        image_size: Default height and width, in pixels.
        source: The paper and section that describe the network.

    >>> MODELS["resnet110"].units
    (18, 18, 18)
    >>> MODELS["resnet110"].depth
    110
    """

    name: str
    units: tuple[int, ...]
    filters: tuple[int, ...]
    bottleneck: bool = False
    stem: str = "imagenet"
    unit: str = "original"
    shortcut: str = "B"
    classes: int = 1000
    image_size: int = 224
    source: str = ""

    def __post_init__(self):
        stages = [
            tuple(entries) if isinstance(entries, Iterable) else ()
            for entries in (self.units, self.filters)
        ]
        if not stages[0] or len(stages[0]) != len(stages[1]):
            raise ValueError(
                "units and filters must have one entry for each stage, "
                f"received units={self.units}, filters={self.filters}"
            )
        if not all(
            isinstance(n, numbers.Integral) and n >= 1
            for n in (*stages[0], *stages[1])
        ):
            raise ValueError(
                "units and filters must be at least 1 in each stage, and "
                f"whole, received units={self.units}, filters={self.filters}"
            )
        for field, entries in zip(("units", "filters"), stages, strict=True):
            object.__setattr__(self, field, tuple(map(int, entries)))
        if self.stem not in ("imagenet", "cifar"):
            raise ValueError(
                f"stem must be 'imagenet' or 'cifar', received {self.stem!r}"
            )

    @property
    def depth(self) -> int:
        """Number of weighted layers, shortcuts not counted [1, Sec. 4.1]."""
        return sum(self.units) * (3 if self.bottleneck else 2) + 2

    def widened(self, width: float) -> "Spec":
        """The network with `width` times as many filters everywhere.

        Zagoruyko and Komodakis 2016, "Wide Residual Networks".

        Raises:
            ValueError: If a number of filters would not be whole.

        >>> MODELS["resnet20"].widened(0.5).filters
        (8, 16, 32)
        """
        filters = tuple(width * count for count in self.filters)
        if min(filters) < 1 or any(count % 1 for count in filters):
            raise ValueError(
                f"width times {self.filters} filters must be whole numbers, "
                f"received width {width:g}"
            )
        return dataclasses.replace(
            self,
            name=f"{self.name}x{width:g}",
            filters=tuple(map(int, filters)),
        )

    @property
    def stride(self) -> int:
        """Product of all strides: the least height and width that make sense.

        Each stage after the first halves the image, and so do both layers of
        the ImageNet stem.
        """
        return 2 ** (len(self.units) - 1) * (
            4 if self.stem == "imagenet" else 1
        )


_IMAGENET = {  # [1, Table 1]; 200: [2, Sec. 5]
    18: ((2, 2, 2, 2), False),
    34: ((3, 4, 6, 3), False),
    50: ((3, 4, 6, 3), True),
    101: ((3, 4, 23, 3), True),
    152: ((3, 8, 36, 3), True),
    200: ((3, 24, 36, 3), True),
}


def cifar_units(depth: int, bottleneck: bool = False) -> tuple[int, int, int]:
    """Units in each of the three stages of a CIFAR network.

    n = (depth - 2) / 6 units of two layers [1, Sec. 4.2], or (depth - 2) / 9
    bottlenecks of three [2, Sec. 5].

    Raises:
        ValueError: If the depth fits no n.

    >>> cifar_units(56)
    (9, 9, 9)
    """
    layers = 9 if bottleneck else 6
    n, rest = divmod(depth - 2, layers)
    if rest or n < 1:
        examples = "164, 1001" if bottleneck else "20, 32, 44"
        raise ValueError(
            f"depth must be {layers}n + 2 ({examples}, ...), received {depth}"
        )
    return (n, n, n)


def _rows():
    imagenet = {"filters": (64, 128, 256, 512)}
    cifar = {
        "filters": (16, 32, 64),
        "stem": "cifar",
        "classes": 10,
        "image_size": 32,
    }
    v2 = {"unit": "pre_activation"}
    for depth, (units, bottleneck) in _IMAGENET.items():
        row = {"units": units, "bottleneck": bottleneck, **imagenet}
        source = "[1, Table 1]" if depth < 200 else "[2, Sec. 5]"
        yield Spec(f"resnet{depth}", **row, source=source)
        yield Spec(f"resnet{depth}v2", **row, **v2, source="[2, Sec. 5]")
    for depth in (20, 32, 44, 56, 110, 1202):
        row = {"units": cifar_units(depth), "shortcut": "A", **cifar}
        yield Spec(f"resnet{depth}", **row, source="[1, Sec. 4.2]")
        yield Spec(f"resnet{depth}v2", **row, **v2, source="[2, Sec. 4]")
    for depth in (164, 1001):
        row = {"units": cifar_units(depth, True), "bottleneck": True, **cifar}
        yield Spec(f"resnet{depth}", **row, source="[2, Table 3]")
        yield Spec(f"resnet{depth}v2", **row, **v2, source="[2, Table 3]")
    plain = {"shortcut": "none", "source": "[1, Sec. 3.3]"}
    for depth in (18, 34):
        units, _ = _IMAGENET[depth]
        yield Spec(f"plainnet{depth}", units=units, **imagenet, **plain)
    for depth in (20, 32, 44, 56, 110):
        row = {"units": cifar_units(depth), **cifar, **plain}
        yield Spec(f"plainnet{depth}", **row)


MODELS: dict[str, Spec] = {spec.name: spec for spec in _rows()}


def get_spec(name: str) -> Spec:
    """The row of `MODELS` with this name, whatever its capitals.

    Args:
        name: A key of `MODELS`; `"resnet20x2"` is ResNet-20 with twice as many
            filters (`Spec.widened`).

    Raises:
        ValueError: If there is none; near names are suggested.

    >>> get_spec("ResNet56").units
    (9, 9, 9)
    >>> get_spec("resnet20x2").filters
    (32, 64, 128)
    """
    spec = MODELS.get(name.lower())
    if spec is not None:
        return spec
    wide = re.fullmatch(r"(\w+)x([0-9]+(?:\.[0-9]+)?)", name.lower())
    if wide and wide[1] in MODELS:
        return MODELS[wide[1]].widened(float(wide[2]))
    raise ValueError(
        f"unknown network {name!r}{names.hint(name.lower(), MODELS, 3)}: "
        f"keras_resnet.MODELS has {', '.join(MODELS)}"
    )


def resnet(
    spec: Spec | str,
    include_top: bool = True,
    weights: str | os.PathLike | None = None,
    input_tensor=None,
    input_shape: tuple | None = None,
    pooling: str | None = None,
    classes: int | None = None,
    classifier_activation="softmax",
    name: str | None = None,
    *,
    shortcut=None,
    unit=None,
    bottleneck_stride: str = "1x1",
    padding: str = "symmetric",
    first_norm: str = "stem",
    looped: bool | None = None,
    remat: bool = False,
    batch_norm_momentum: float = MOMENTUM,
    batch_norm_epsilon: float = EPSILON,
    survival_probability: float = 1.0,
) -> keras.Model:
    """Builds the network that a spec describes.

    `x_{l+1} = f(h(x_l) + F(x_l, W_l))` [2, Eqs. 1 and 2], unit after unit: a
    stem, the stages of residual units, global average pooling and one dense
    layer. The first unit of every stage but the first has stride 2.

    Args:
        spec: A `Spec`, or the name of one in `MODELS` (`"resnet20x2"`: with
            twice as many filters).
        include_top: Whether the network ends in its classifier.
        weights: None for the papers' random initialization, `"imagenet"` for
            the published weights of keras.applications (ResNet-50, 101 and
            152), `"cifar10"` for those that ship with this package (see
            `keras_resnet.weights.shipped.card`), or the path of a file (see
            `keras_resnet.weights.load`).
        input_tensor: A Keras tensor to use as the image, or None.
        input_shape: `(height, width, channels)`; None for the default size with
            the top and `(None, None, 3)` without. The image, the shape and
            features of rank 4 have the channels first where Keras is
            configured to (`keras.config.set_image_data_format`).
        pooling: Without the top: None (the last features), `"avg"` or `"max"`.
        classes: Number of classes; None for the spec's.
        classifier_activation: Activation of the top; None gives logits.
        name: Name of the model; None for the spec's.
        shortcut: h(x): a key of `layers.shortcuts.SHORTCUTS`, or a configured
            instance such as `layers.ExclusiveGating(gate_bias=-7.0)`; None for
            the spec's.
        unit: Order of the units: a key of `layers.units.UNITS`; None for the
            spec's.
        bottleneck_stride: `"1x1"` as in [1], or `"3x3"` (torchvision's v1.5).
        padding: `"symmetric"` as in the authors' code, or `"same"` for weights
            that TensorFlow's padding was trained with.
        first_norm: Where pre-activation networks normalize first: `"stem"`,
            before the two paths of the first unit part [2, Appendix]; for
            weights that were trained otherwise `"unit"`, in the residual of
            that unit alone, or `"both"`.
        looped: Whether the units of a stage after its first one, which are
            alike, run as one loop (`layers.UnitStack`); None for a loop where
            there are at least 40 of them (ResNet-1001 and 1202), as measured
            at `LOOP_FROM`. A looped and an unrolled network are the same
            function, and `weights.copy` moves weights between the two.
        remat: Whether training keeps of each unit nothing but its input, and
            computes its activations again in the backward pass.
        batch_norm_momentum: Momentum of the moving statistics.
        batch_norm_epsilon: Added to the variance.
        survival_probability: Probability that the last unit survives in
            training (stochastic depth); it falls linearly from 1 at the input.

    Returns:
        A `keras.Model`. It takes float images of shape `[batch, height, width,
        channels]`, preprocessed as its weights want them, and gives
        `[batch, classes]` probabilities (or logits, or features).

    Raises:
        ValueError: If an argument is none of the allowed ones, with the rules
            and the messages of keras.applications.

    Example:

    >>> resnet("resnet20", shortcut="B").count_params()
    274042
    """
    if isinstance(spec, str):
        spec = get_spec(spec)
    if not isinstance(spec, Spec):
        raise ValueError(
            "spec must be a keras_resnet.Spec or a name in "
            f"keras_resnet.MODELS, received {spec!r}"
        )
    if classes is None:
        classes = spec.classes
    shortcut = spec.shortcut if shortcut is None else shortcut
    unit = spec.unit if unit is None else unit
    unit_class = units_lib.get(unit)
    units_lib.check_survival_probability(survival_probability)
    _check_weights(spec, weights, include_top, classes)
    if weights in _PRETRAINED_CLASSES:
        _check_same_function(
            spec,
            weights,
            unit=unit,
            shortcut=shortcut,
            bottleneck_stride=bottleneck_stride,
            padding=padding,
            first_norm=first_norm,
            batch_norm_epsilon=batch_norm_epsilon,
        )
    input_shape = _input_shape(spec, input_shape, weights, include_top)
    if pooling not in (None, "avg", "max"):
        raise ValueError(
            "The `pooling` argument should be one of None, 'avg' or 'max'. "
            f"Received: pooling={pooling}"
        )
    if include_top and weights is not None:
        _check_activation(classifier_activation)

    # The layers have channels last, whatever Keras is configured to.
    is_channels_first = keras.config.image_data_format() == "channels_first"
    if input_tensor is None:
        image = keras.Input(shape=_as_configured(input_shape), name="image")
    elif keras.backend.is_keras_tensor(input_tensor):
        image = input_tensor
    else:
        image = keras.Input(tensor=input_tensor, name="image")

    activates_first = issubclass(unit_class, units_lib.PreActivationUnit)
    _check_first_norm(first_norm, spec, unit_class)
    norm = {"momentum": batch_norm_momentum, "epsilon": batch_norm_epsilon}
    is_imagenet = spec.stem == "imagenet"
    kernel_size, stride = (7, 2) if is_imagenet else (3, 1)
    x = image
    if is_channels_first:
        x = keras.layers.Permute((2, 3, 1), name="channels_last")(x)
    x = Convolution(
        spec.filters[0], kernel_size, stride, padding, name="stem_conv"
    )(x)
    if first_norm != "unit":
        x = BatchNormalization(**norm, name="stem_norm")(x)
        x = keras.layers.ReLU(name="stem_relu")(x)
    if is_imagenet:
        if padding == "symmetric":
            # After a ReLU a zero is as good as the -inf of a pooling layer.
            x = keras.layers.ZeroPadding2D(
                1, data_format="channels_last", name="stem_pad"
            )(x)
        x = keras.layers.MaxPooling2D(
            3,
            strides=2,
            padding="valid" if padding == "symmetric" else "same",
            data_format="channels_last",
            name="stem_pool",
        )(x)

    total = sum(spec.units)

    def survives(count):
        """p of the count-th unit: linear decay over depth."""
        return 1 - count / total * (1 - survival_probability)

    count = 0
    stages = zip(spec.units, spec.filters, strict=True)
    for stage, (n, filters) in enumerate(stages, 1):
        arguments: dict[str, Any] = {
            "bottleneck": spec.bottleneck,
            "shortcut": shortcut,
            "bottleneck_stride": bottleneck_stride,
            "padding": padding,
            "batch_norm_momentum": batch_norm_momentum,
            "batch_norm_epsilon": batch_norm_epsilon,
        }
        for i in range(1, n + 1):
            if i == 2 and (n - 1 >= LOOP_FROM if looped is None else looped):
                x = UnitStack(
                    unit_class(filters, **arguments),
                    n - 1,
                    [survives(count + j) for j in range(1, n)],
                    remat=remat,
                    name=f"stage{stage}_stack",
                )(x)
                count += n - 1
                break
            count += 1
            first: dict[str, Any] = {}
            if activates_first:
                first["activated_input"] = count == 1 and first_norm == "stem"
            x = unit_class(
                filters,
                stride=2 if stage > 1 and i == 1 else 1,
                survival_probability=survives(count),
                remat=remat,
                **arguments,
                **first,
                name=f"stage{stage}_unit{i}",
            )(x)
    if activates_first:
        if unit_class.activates_first:
            x = BatchNormalization(**norm, name="final_norm")(x)
        x = keras.layers.ReLU(name="final_relu")(x)

    pools = {
        "avg": keras.layers.GlobalAveragePooling2D,
        "max": keras.layers.GlobalMaxPooling2D,
    }
    if include_top:
        x = pools["avg"](data_format="channels_last", name="pool")(x)
        # Departure: the dense layer starts as Keras starts it (Glorot and
        # Bengio 2010); [1, Sec. 3.4] derives its rule for layers before a ReLU.
        x = keras.layers.Dense(
            classes,
            activation=classifier_activation,
            dtype=classifier_dtype(),
            name="predictions",
        )(x)
    elif pooling is not None:
        x = pools[pooling](data_format="channels_last", name="pool")(x)
    elif is_channels_first:
        x = keras.layers.Permute((3, 1, 2), name="channels_first")(x)

    if input_tensor is not None:
        sources = keras.utils.get_source_inputs(image)
        image = sources[0] if len(sources) == 1 else sources
    model = keras.Model(image, x, name=name or spec.name)
    if weights == "imagenet":
        weights = loading.imagenet_file(spec.name, include_top)
    elif weights == "cifar10":
        weights = shipped.weights_file(spec.name)
    if weights is not None:
        loading.load(model, weights)
    return model


_IMAGENET_WEIGHTS = ("resnet50", "resnet101", "resnet152")
_PRETRAINED_CLASSES = {"imagenet": 1000, "cifar10": 10}


def _check_weights(spec, weights, include_top, classes):
    if weights is None:
        return
    is_named = isinstance(weights, str | os.PathLike)
    if is_named and weights in _PRETRAINED_CLASSES:
        if weights == "cifar10":
            shipped.card(spec.name)  # says so if there is none
        elif spec.name not in _IMAGENET_WEIGHTS:
            raise ValueError(
                "`weights='imagenet'` exist for "
                f"{', '.join(_IMAGENET_WEIGHTS)}. Received: {spec.name}"
            )
        of_file = _PRETRAINED_CLASSES[weights]
        if include_top and classes != of_file:
            raise ValueError(
                f"If using `weights={weights!r}` with `include_top=True`, "
                f"`classes` should be {of_file}.  Received classes={classes}"
            )
    elif not is_named or not os.path.exists(weights):
        raise ValueError(
            "The `weights` argument should be either `None` (random "
            "initialization), 'imagenet' (pre-training on ImageNet), "
            "'cifar10' (weights that ship with this package), or the path to "
            "the weights file to be loaded.  Received: "
            f"weights={weights}"
        )


def _check_same_function(spec, weights, **arguments):
    """Refuses arguments by which trained weights would compute otherwise."""
    row = get_spec(spec.name)
    same = {
        "unit": lambda a, b: units_lib.get(a) is units_lib.get(b),
        "shortcut": shortcuts_lib.is_same,
        # keras.applications adds 1.001e-5.
        "batch_norm_epsilon": lambda a, b: math.isclose(a, b, rel_tol=2e-3),
    }
    trained_with = {
        **{"unit": row.unit, "shortcut": row.shortcut},
        **{"padding": "symmetric", "first_norm": "stem"},
        "batch_norm_epsilon": EPSILON,
    }
    if row.bottleneck:
        trained_with["bottleneck_stride"] = "1x1"
    for name, trained in trained_with.items():
        value = arguments[name]
        if not same.get(name, operator.eq)(value, trained):
            raise ValueError(
                f"`weights={weights!r}` were trained with {name}={trained!r}. "
                f"Received: {name}={value!r}"
            )


def _as_configured(shape):
    """`(height, width, channels)` in the order that Keras is configured to."""
    if keras.config.image_data_format() == "channels_first":
        return (shape[2], *shape[:2])
    return tuple(shape)


def _input_shape(spec, input_shape, weights, include_top):
    """`(height, width, channels)` by the rules of keras.applications."""
    if not input_shape:
        size = spec.image_size if include_top else None
        return (size, size, 3)
    if len(input_shape) != 3:
        raise ValueError("`input_shape` must be a tuple of three integers.")
    height, width, channels = input_shape
    if keras.config.image_data_format() == "channels_first":
        channels, height, width = input_shape
    if weights in _PRETRAINED_CLASSES:
        default_shape = _as_configured((spec.image_size, spec.image_size, 3))
        if include_top and tuple(input_shape) != default_shape:
            raise ValueError(
                f"When setting `include_top=True` and loading `{weights}` "
                f"weights, `input_shape` should be {default_shape}.  "
                f"Received: input_shape={input_shape}"
            )
        if channels != 3:
            raise ValueError(
                "The input must have 3 channels; Received "
                f"`input_shape={input_shape}`"
            )
    elif channels not in (1, 3):
        warnings.warn(
            "This model usually expects 1 or 3 input channels. However, it "
            f"was passed an input_shape with {channels} input channels.",
            stacklevel=4,
        )
    least = spec.stride
    if any(size is not None and size < least for size in (height, width)):
        raise ValueError(
            f"Input size must be at least {least}x{least}; Received: "
            f"input_shape={input_shape}"
        )
    if include_top and None in input_shape:
        raise ValueError(
            "If `include_top` is True, you should specify a static "
            f"`input_shape`. Received: input_shape={input_shape}"
        )
    return (height, width, channels)


def _check_first_norm(first_norm, spec, unit_class):
    if first_norm not in FIRST_NORMS:
        raise ValueError(
            f"first_norm must be one of {FIRST_NORMS}, received {first_norm!r}"
        )
    if first_norm != "stem" and not unit_class.activates_first:
        raise ValueError(
            f"first_norm={first_norm!r} is for unit='pre_activation', whose "
            f"units normalize first, received {unit_class.__name__}"
        )
    if first_norm == "unit" and spec.stem == "imagenet":
        raise ValueError(
            "first_norm='unit' is for the stem 'cifar', received 'imagenet': "
            "its pooling wants a signal that is activated"
        )


def _check_activation(classifier_activation):
    allowed = [keras.activations.get(a) for a in ("softmax", None)]
    classifier_activation = keras.activations.get(classifier_activation)
    if classifier_activation not in allowed:
        raise ValueError(
            "Only `None` and `softmax` activations are allowed for the "
            "`classifier_activation` argument when using pretrained weights, "
            "with `include_top=True`; Received: "
            f"classifier_activation={classifier_activation}"
        )


def _builder(title: str):
    """The builder of one network, with the defaults of its row."""
    spec = MODELS[title.lower()]

    def build(
        include_top=True,
        weights=None,
        input_tensor=None,
        input_shape=None,
        pooling=None,
        classes=spec.classes,
        classifier_activation="softmax",
        name=spec.name,
        *,
        shortcut=spec.shortcut,
        unit=spec.unit,
        bottleneck_stride="1x1",
        padding="symmetric",
        first_norm="stem",
        looped=None,
        remat=False,
        batch_norm_momentum=MOMENTUM,
        batch_norm_epsilon=EPSILON,
        survival_probability=1.0,
    ) -> keras.Model:
        return resnet(
            spec,
            include_top,
            weights,
            input_tensor,
            input_shape,
            pooling,
            classes,
            classifier_activation,
            name,
            shortcut=shortcut,
            unit=unit,
            bottleneck_stride=bottleneck_stride,
            padding=padding,
            first_norm=first_norm,
            looped=looped,
            remat=remat,
            batch_norm_momentum=batch_norm_momentum,
            batch_norm_epsilon=batch_norm_epsilon,
            survival_probability=survival_probability,
        )

    build.__name__ = build.__qualname__ = title
    shape = f"{spec.image_size}x{spec.image_size}x3"
    build.__doc__ = f"""{title}, {spec.source}: {spec.units} units.

    Default input {shape}, {spec.classes} classes, shortcut {spec.shortcut!r},
    unit {spec.unit!r}. The arguments are those of `keras_resnet.resnet`, which
    describes them.
    """
    return build


# One line a network, so that a reader and an editor find every name.
ResNet18 = _builder("ResNet18")
ResNet34 = _builder("ResNet34")
ResNet50 = _builder("ResNet50")
ResNet101 = _builder("ResNet101")
ResNet152 = _builder("ResNet152")
ResNet200 = _builder("ResNet200")
ResNet18V2 = _builder("ResNet18V2")
ResNet34V2 = _builder("ResNet34V2")
ResNet50V2 = _builder("ResNet50V2")
ResNet101V2 = _builder("ResNet101V2")
ResNet152V2 = _builder("ResNet152V2")
ResNet200V2 = _builder("ResNet200V2")
ResNet20 = _builder("ResNet20")
ResNet32 = _builder("ResNet32")
ResNet44 = _builder("ResNet44")
ResNet56 = _builder("ResNet56")
ResNet110 = _builder("ResNet110")
ResNet1202 = _builder("ResNet1202")
ResNet20V2 = _builder("ResNet20V2")
ResNet32V2 = _builder("ResNet32V2")
ResNet44V2 = _builder("ResNet44V2")
ResNet56V2 = _builder("ResNet56V2")
ResNet110V2 = _builder("ResNet110V2")
ResNet1202V2 = _builder("ResNet1202V2")
ResNet164 = _builder("ResNet164")
ResNet1001 = _builder("ResNet1001")
ResNet164V2 = _builder("ResNet164V2")
ResNet1001V2 = _builder("ResNet1001V2")
PlainNet18 = _builder("PlainNet18")
PlainNet34 = _builder("PlainNet34")
PlainNet20 = _builder("PlainNet20")
PlainNet32 = _builder("PlainNet32")
PlainNet44 = _builder("PlainNet44")
PlainNet56 = _builder("PlainNet56")
PlainNet110 = _builder("PlainNet110")


# The layers that end a stage: its last unit, or the loop of its last units.
_STAGE_LAYER = re.compile(r"(stage\d+)_(?:unit(\d+)|stack)")


def feature_extractor(model: keras.Model) -> keras.Model:
    """A model that gives the output of each stage: `stage1`, `stage2`, ...

    The weights are shared with `model`. The last stage of a pre-activation
    network is taken after its final normalization and ReLU. The features are
    those of the images that `model` takes, whatever stands before the network
    and wherever else its layers are called.

    Args:
        model: A network of this package, or a functional or sequential model
            that calls one network of this package once.

    Returns:
        A `keras.Model` from the same input to a dict of tensors
        `[batch, height, width, channels]`.

    Raises:
        ValueError: If the model calls no network of this package, or calls
            several, or calls one several times.

    >>> features = feature_extractor(ResNet20()).output
    >>> {name: feature.shape[1:] for name, feature in features.items()}
    {'stage1': (32, 32, 16), 'stage2': (16, 16, 32), 'stage3': (8, 8, 64)}
    """
    nodes = graphs.nodes(model)
    stages = _last_layers(nodes)
    inner = [node for node in nodes if _has_stages(node.operation)]
    if not stages and not inner:
        raise ValueError(
            "model must be a network of keras_resnet, with layers named "
            f"stage1_unit1 and so on, received {model.name!r}"
        )
    if bool(stages) + len(inner) > 1:
        names = [model.name] * bool(stages)
        names += [node.operation.name for node in inner]
        raise ValueError(
            "model must call one network of keras_resnet, and call it once, "
            f"received {model.name!r}, which calls {', '.join(names)}; give "
            f"one network, such as model.get_layer({names[-1]!r})"
        )
    if inner:
        call = inner[0].arguments
        extractor = feature_extractor(inner[0].operation)
        outputs = extractor(*call.args, **call.kwargs)
    else:
        outputs = {
            stage: _only_output(nodes, layer, model)
            for stage, layer in stages.items()
        }
        *_, (stage, last) = stages.items()
        unit = last.pattern() if isinstance(last, UnitStack) else last
        final = [
            node.operation
            for node in nodes
            if node.operation.name == "final_relu"
        ]
        if final and isinstance(unit, units_lib.PreActivationUnit):
            outputs[stage] = _only_output(nodes, final[0], model)
    return keras.Model(
        graphs.graph(model).input, outputs, name=f"{model.name}_features"
    )


def _last_layers(nodes) -> dict[str, keras.Layer]:
    """The last layer of each stage that is called."""
    found: dict[str, tuple[float, keras.Layer]] = {}
    for node in nodes:
        match = _STAGE_LAYER.fullmatch(node.operation.name)
        if match:
            number = int(match[2]) if match[2] else math.inf
            if number >= found.get(match[1], (0, None))[0]:
                found[match[1]] = number, node.operation
    return {stage: layer for stage, (_, layer) in found.items()}


def _has_stages(operation) -> bool:
    """Whether an operation is a model with a network of this package inside."""
    if not graphs.has_graph(operation):
        return False
    nodes = graphs.nodes(operation)
    return bool(_last_layers(nodes)) or any(
        _has_stages(node.operation) for node in nodes
    )


def _only_output(nodes, layer, model):
    """What a layer gives that a model calls once."""
    calls = [node for node in nodes if node.operation is layer]
    if len(calls) > 1:
        raise ValueError(
            "model must call each layer of a network once, received "
            f"{model.name!r}, which calls {layer.name} {len(calls)} times"
        )
    return calls[0].outputs[0]


def freeze(model: keras.Model, but: Sequence[str] = ()) -> None:
    """Freezes a network but for some of its layers, to fine-tune those.

    Batch normalization is in inference mode in all of it, also in what is
    trained: it normalizes by the moving statistics, which stay as they are.
    (Keras' `base(x, training=False)` does not: in Keras 3.15 `fit` overrides
    it in what is not frozen.) Compile the model that is trained afterwards. A
    copy of the model, or a `.keras` file, is frozen as the model is.

    Args:
        model: A network of this package.
        but: What is trained: the first letters of names of layers, such as
            `("stage4", "predictions")`.

    Raises:
        ValueError: If no layer has such a name.

    >>> model = ResNet20()
    >>> freeze(model, but=("stage3_unit3", "predictions"))
    >>> [weight.path for weight in model.trainable_weights]
    ['stage3_unit3/conv1/kernel', 'stage3_unit3/conv2/kernel', \
'predictions/kernel', 'predictions/bias']
    """
    layer_names = [layer.name for layer in model.layers]
    if isinstance(but, str):
        raise ValueError(
            "but must be a tuple of first letters of names of layers, "
            f"received {but!r}: write but=({but!r},)"
        )
    for prefix in but:
        if not any(name.startswith(prefix) for name in layer_names):
            raise ValueError(
                f"but must have first letters of names of {model.name!r}'s "
                f"layers ({', '.join(layer_names)}), received {prefix!r}"
            )
    _set_trainable(model, True)
    for layer in model.layers:
        if not layer.name.startswith(tuple(but)):
            _set_trainable(layer, False)
    for layer in model.layers:  # what it shares with a frozen one, too
        if layer.name.startswith(tuple(but)):
            _set_trainable(layer, True)
    normalization.freeze(model)


def _set_trainable(layer, value):
    # Keras stops at a layer that has the value, whatever its parts have.
    for part in layer._flatten_layers():
        part.trainable = value


def classifier_dtype() -> str:
    """That of logits: a softmax in half precision loses its tail."""
    policy = keras.config.dtype_policy()
    return keras.backend.result_type(policy.variable_dtype, "float32")


def preprocess_input(x, mode: str = "caffe", data_format=None):
    """Preprocesses images as keras.applications does, without changing `x`.

    The result depends only on the values of the pixels: an array, a tensor and
    a symbolic input of any dtype give the same numbers. The result is float32,
    or float64 if `x` or `keras.config.floatx()` is.

    Args:
        x: Images with values in 0 to 255, `[..., height, width, 3]`: an array,
            a list, a tensor, an element of a `tf.data.Dataset` or a
            `keras.Input`.
        mode: `"caffe"` (BGR minus the ImageNet mean: what weights="imagenet"
            want), `"tf"` (-1 to 1), `"torch"` (standardized) or `"cifar10"`
            (0 to 1 minus the mean of each pixel [1, Sec. 4.2]: what
            weights="cifar10" want; images of 32x32 pixels).
        data_format: As in keras.applications. `"channels_first"` images have
            the shape `[..., 3, height, width]`.

    Returns:
        The preprocessed images, a new array or tensor.

    Raises:
        ValueError: If the mode or the data format is unknown, or the images
            have a shape that the mode does not take.

    >>> import numpy as np
    >>> preprocess_input(np.full((1, 1, 3), 255, "uint8"), "tf").tolist()
    [[[1.0, 1.0, 1.0]]]
    """
    if mode not in PREPROCESSING_MODES:
        *first, last = (f"`{mode}`" for mode in PREPROCESSING_MODES)
        raise ValueError(
            f"Expected mode to be one of {', '.join(first)} or {last}. "
            f"Received: mode={mode}"
        )
    if data_format is None:
        data_format = keras.config.image_data_format()
    if data_format not in ("channels_first", "channels_last"):
        raise ValueError(
            "Expected data_format to be one of `channels_first` or "
            f"`channels_last`. Received: data_format={data_format}"
        )
    x, flip = _floating(x)
    dtype = keras.backend.standardize_dtype(x.dtype)
    is_first = data_format == "channels_first"

    def by_channel(values):
        values = np.asarray(values, dtype)
        return np.moveaxis(values, -1, 0) if is_first else values

    sizes: list[int | None] = [None] * 3
    if mode == "cifar10":
        mean = by_channel(shipped.mean())
        sizes = list(mean.shape)
    elif mode != "tf":  # which treats all channels as one
        sizes[0 if is_first else 2] = 3
    _check_images(x, sizes, mode)
    if mode == "tf":
        return x / 127.5 - 1.0
    if mode == "cifar10":
        return x / 255.0 - mean
    if mode == "torch":
        x = x / 255.0 - by_channel([[[0.485, 0.456, 0.406]]])
        return x / by_channel([[[0.229, 0.224, 0.225]]])
    bgr = flip(x, -3 if is_first else -1)
    return bgr - by_channel([[[103.939, 116.779, 123.68]]])


def _floating(x):
    """Images in floating point, and the `flip(x, axis)` of what holds them."""
    if isinstance(x, keras.Variable):
        x = keras.ops.convert_to_tensor(x)
    if isinstance(x, list | tuple) and any(map(_is_tensor, x)):
        x = keras.ops.stack(x)
    if type(x).__module__.startswith("tensorflow."):
        # Whatever backend Keras has: an element of a tf.data.Dataset, say.
        import tensorflow as tf

        cast, flip = tf.cast, tf.experimental.numpy.flip
    elif _is_tensor(x):
        cast, flip = keras.ops.cast, keras.ops.flip
    else:
        x = np.asarray(x)
        cast, flip = np.ndarray.astype, np.flip
    try:
        given = keras.backend.standardize_dtype(x.dtype)
        dtype = keras.backend.result_type(
            given, keras.config.floatx(), "float32"
        )
    except ValueError:  # objects, texts
        given = dtype = str(x.dtype)
    if not dtype.startswith("float"):
        raise ValueError(f"Expected images of real numbers. Received: {given}")
    return x if given == dtype else cast(x, dtype), flip


def _is_tensor(x) -> bool:
    return isinstance(x, keras.KerasTensor) or keras.ops.is_tensor(x)


def _check_images(x, sizes, mode):
    """Raises ValueError unless the last three sizes are these (None: any)."""
    if getattr(x.shape, "rank", 3) is None:
        return  # tf.io.decode_image tells no shape
    found = tuple(x.shape[-3:])  # None where it is not known yet
    if len(found) < 3 or any(
        None not in (size, expected) and size != expected
        for size, expected in zip(found, sizes, strict=True)
    ):
        expected = ", ".join(str(size or "size") for size in sizes)
        raise ValueError(
            f"Expected images of shape [..., {expected}] in mode `{mode}`. "
            f"Received: shape={tuple(x.shape)}"
        )


def decode_predictions(p, top: int = 5) -> list:
    """Returns the best `top` ImageNet classes of each row of probabilities.

    Args:
        p: Array, list or tensor `[batch, 1000]`.
        top: How many classes of each row, at least 1.

    Returns:
        A list for each row of tuples `(synset, label, probability)`.

    Raises:
        ValueError: If `p` has another shape or `top` is less than 1.
    """
    if top < 1:
        raise ValueError(f"top must be at least 1, received {top}")
    p = keras.ops.convert_to_numpy(p).astype("float32")
    return keras.applications.imagenet_utils.decode_predictions(p, top=top)
