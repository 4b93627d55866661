"""The networks of [1] and [2]: `resnet` builds any of them.

[1] He et al. 2016, "Deep Residual Learning for Image Recognition".
[2] He et al. 2016, "Identity Mappings in Deep Residual Networks".
"""

import inspect
import os
from collections.abc import Callable
from typing import Any
from typing import Concatenate
from typing import ParamSpec

import keras

from keras_resnet import arguments
from keras_resnet.layers import BatchNormalization
from keras_resnet.layers import Shortcut
from keras_resnet.layers import UnitStack
from keras_resnet.layers import identifiers
from keras_resnet.layers import units
from keras_resnet.layers.normalization import MOMENTUM
from keras_resnet.specs import MODELS
from keras_resnet.specs import Spec
from keras_resnet.specs import get_spec
from keras_resnet.weights import pretrained
from keras_resnet.weights.cards import Stem

# Least number of identical units of a stage that run as a loop by default. The
# columns are the seconds to the end of the first step, unrolled and looped, and
# the speed of a later step of the loop relative to the unrolled network
# (TensorFlow 2.21, two cores, float32;
# `python -m benchmarks --groups=depth,memory`):
#
#     network     identical units  batch  to the first step  a later step
#     ResNet-20         2             8      0.9 -> 1.8         0.92 x
#     ResNet-56         8             8      2.6 -> 2.1         0.95 x
#     ResNet-110       17             8      5.3 -> 2.0         0.93 x
#     302 layers       49             8     15.1 -> 2.4         0.87 x
#     ResNet-1202     199             8     79.9 -> 3.9         0.83 x
#     ResNet-1202     199            32     91.0 -> 8.2         0.96 x
#
# Up to ResNet-200 (35) the unrolled graph is better for a long run, and its
# layers can be inspected one by one. Deeper networks take too long to trace.
LOOP_FROM = 40

_POOLS = {
    "avg": keras.layers.GlobalAveragePooling2D,
    "max": keras.layers.GlobalMaxPooling2D,
}


# Every argument is written down here and nowhere else: its name, type and
# default in the signature, its description below. The builders, `--set`, the
# JSON of a configuration and docs/networks.md derive from it (`networks`).
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
    shortcut: str | Shortcut | identifiers.NamedShortcut | None = None,
    unit: str | type[units.Unit] | None = None,
    bottleneck_stride: str | None = None,
    padding: str | None = None,
    first_norm: str | None = None,
    looped: bool | None = None,
    remat: bool = False,
    batch_norm_momentum: float = MOMENTUM,
    batch_norm_epsilon: float | None = None,
    survival_probability: float = 1.0,
) -> keras.Model:
    """Builds the network that a spec describes.

    `x_{l+1} = f(h(x_l) + F(x_l, W_l))` [2, Eqs. 1 and 2] in each unit. The
    network is a stem, the stages of residual units, global average pooling and
    one dense layer. The first unit of each stage after the first has stride 2.

    Args:
        spec: A `Spec`, or the name of one in `MODELS`. `"resnet20x2"` is the
            network with twice as many filters.
        include_top: Whether the network ends in its classifier.
        weights: None is the papers' random initialization. `"imagenet"`,
            `"imagenet1k_v2"`, `"cifar10"` and others are published weights
            (`keras_resnet.weights.list`). `"hf://OWNER/NAME"` is a network of
            timm on the Hugging Face hub. Other text is the path of a file
            (`keras_resnet.weights.load`). The network is built as the weights
            were trained. With `include_top=False`, other classes or other
            channels, the rest of the weights is loaded (docs/pretrained.md).
        input_tensor: A Keras tensor to use as the image, or None.
        input_shape: `(height, width, channels)`. None is the default size with
            the top, and `(None, None, 3)` without. The image, the shape and
            features of rank 4 have the channels first if Keras is configured
            so (`keras.config.set_image_data_format`).
        pooling: Without the top: None (the last features), `"avg"` or `"max"`.
        classes: Number of classes. None is the number of the spec.
        classifier_activation: Activation of the top. None gives logits.
        name: Name of the model. None is the name of the spec.
        shortcut: h(x): `"A"`, `"B"`, `"C"` [1]; `"none"` (plain);
            `"constant_scaling"`, `"exclusive_gating"`,
            `"shortcut_only_gating"`, `"convolution"`, `"dropout"` [2]; or an
            instance, such as `layers.ExclusiveGating(gate_bias=-7.0)`.
        unit: Order of the layers in a unit: `"original"` [1];
            `"pre_activation"`, `"batch_norm_after_addition"`,
            `"relu_before_addition"`, `"relu_only_pre_activation"` [2].
        bottleneck_stride: Convolution of a bottleneck that strides: `"1x1"`,
            the first one, as in [1], or `"3x3"`, as in torchvision. None is as
            the weights were trained, and `"1x1"` without weights.
        padding: `"symmetric"` pads with zeros on both sides, as in the
            authors' code. `"same"` is TensorFlow's padding, for weights that
            were trained with it. None is as the weights were trained, and
            `"symmetric"` without weights.
        first_norm: Where pre-activation networks normalize first: `"stem"`, as
            in [2, Appendix]; `"unit"` (only in the residual of the first unit)
            or `"both"`, for weights that were trained so. None is as the
            weights were trained, and `"stem"` without weights.
        looped: Whether the identical units of a stage run as one loop
            (`layers.UnitStack`), whose graph does not grow with depth. None
            loops stages of 41 units or more (ResNet-1001 and 1202). The
            function is the same. `keras_resnet.weights.copy` moves weights
            between the two.
        remat: Whether training recomputes the activations inside a unit in the
            backward pass instead of keeping them.
        batch_norm_momentum: Momentum of the moving statistics.
        batch_norm_epsilon: Added to the variance. None is as the weights were
            trained (1.001e-5 in keras.applications), and 1e-5 without weights.
        survival_probability: Survival probability of the last unit in training
            (stochastic depth). It falls linearly from 1 at the input.

    Returns:
        A `keras.Model`. It takes float images of shape `[batch, height, width,
        channels]`, preprocessed for its weights. It returns probabilities
        `[batch, classes]`, or logits, or features.

    Raises:
        ValueError: If an argument has a value that is not allowed. The rules
            of keras.applications apply, with its messages.

    >>> resnet("resnet20", shortcut="B").count_params()
    274042
    """
    # --- Arguments: no layer is built before they are checked ----------------
    spec = get_spec(spec)
    classes = spec.classes if classes is None else classes
    unit = spec.unit if unit is None else unit
    given = {
        "unit": unit,
        "shortcut": identifiers.parse(
            spec.shortcut if shortcut is None else shortcut
        ),
        "bottleneck_stride": bottleneck_stride,
        "padding": padding,
        "first_norm": first_norm,
        "batch_norm_epsilon": batch_norm_epsilon,
    }
    arguments.check_weights(spec, weights, include_top, classes)
    origin = pretrained.known(spec, weights, include_top)
    if origin is not None:
        arguments.as_trained(spec, weights, origin, **given)
    arguments.check(spec, **given, survival_probability=survival_probability)
    input_shape = arguments.input_shape(spec, input_shape, weights, include_top)
    arguments.check_pooling(pooling)
    if include_top and weights is not None:
        arguments.check_activation(classifier_activation)

    # --- Weights, which decide the arguments that are None -------------------
    found = None
    if weights is not None:
        found = pretrained.read(spec, weights, include_top)
        origin = found.origin
    settings = arguments.as_trained(spec, weights, origin, **given)
    settings["batch_norm_momentum"] = batch_norm_momentum
    first_norm = settings.pop("first_norm")
    arguments.check(
        spec,
        unit=unit,
        first_norm=first_norm,
        survival_probability=survival_probability,
        **settings,
    )

    # --- Image: the layers have channels last, as Keras may not --------------
    is_channels_first = keras.config.image_data_format() == "channels_first"
    x = image = _image(input_tensor, input_shape)
    if is_channels_first:
        x = keras.layers.Permute((2, 3, 1), name="channels_last")(x)

    # --- Stem, stages, head --------------------------------------------------
    unit_class = units.get(unit)
    norm = {
        "momentum": batch_norm_momentum,
        "epsilon": settings["batch_norm_epsilon"],
    }
    x = _stem(
        x,
        spec,
        settings["padding"],
        norm if first_norm != "unit" else None,
        arguments.untraced(spec, settings, first_norm),
    )
    x = _stages(
        x,
        spec,
        unit_class,
        settings | _width(spec),
        activated_input=first_norm == "stem",
        looped=looped,
        remat=remat,
        survival_probability=survival_probability,
    )
    if issubclass(unit_class, units.PreActivationUnit):
        if unit_class.activates_first:
            x = BatchNormalization(**norm, name="final_norm")(x)
        x = keras.layers.ReLU(name="final_relu")(x)
    if include_top:
        x = _classifier(x, classes, classifier_activation)
    elif pooling is not None:
        x = _POOLS[pooling](data_format="channels_last", name="pool")(x)
    elif is_channels_first:
        x = keras.layers.Permute((3, 1, 2), name="channels_first")(x)

    # --- Model ---------------------------------------------------------------
    sources = keras.utils.get_source_inputs(image)
    inputs = sources[0] if len(sources) == 1 else sources
    model = keras.Model(inputs, x, name=name or spec.name)
    if found is not None:
        notes = pretrained.assign(
            model, found, replaces_classifier=classes != spec.classes
        )
        arguments.warn_of(weights, notes)
    return model


def _image(input_tensor, input_shape):
    if input_tensor is None:
        shape = arguments.as_configured(input_shape)
        return keras.Input(shape=shape, name="image")
    if keras.backend.is_keras_tensor(input_tensor):
        return input_tensor
    return keras.Input(tensor=input_tensor, name="image")


def _stem(x, spec, padding, norm, network):
    """A convolution, normalization and ReLU; pooling for large images.

    7x7 with stride 2 and 3x3 max pooling with stride 2 [1, Table 1], or 3x3
    [1, Sec. 4.2]. Without `norm` the first unit normalizes.
    """
    is_imagenet = spec.stem == "imagenet"
    kernel_size, stride = (7, 2) if is_imagenet else (3, 1)
    stem = Stem(
        spec.filters[0],
        kernel_size,
        stride,
        padding,
        network=network,
        name="stem_conv",
    )
    x = stem(x)
    if norm is not None:
        x = BatchNormalization(**norm, name="stem_norm")(x)
        x = keras.layers.ReLU(name="stem_relu")(x)
    if not is_imagenet:
        return x
    if padding == "symmetric":
        # After a ReLU a zero is as good as the -inf of a pooling layer.
        x = keras.layers.ZeroPadding2D(
            1, data_format="channels_last", name="stem_pad"
        )(x)
    return keras.layers.MaxPooling2D(
        3,
        strides=2,
        padding="valid" if padding == "symmetric" else "same",
        data_format="channels_last",
        name="stem_pool",
    )(x)


def _width(spec) -> dict[str, int]:
    """Wide bottlenecks have the outputs of narrow ones."""
    return {"expansion": units.EXPANSION // spec.width}


def _stages(
    x,
    spec,
    unit_class,
    settings,
    *,
    activated_input,
    looped,
    remat,
    survival_probability,
):
    """The units of all stages; the first unit of stages 2, 3, ... strides.

    Identical units run as a loop if `looped` is True, or if it is None and
    there are at least `LOOP_FROM` of them.
    """
    settings = {"bottleneck": spec.bottleneck, **settings}
    total = sum(spec.units)

    def survives(count):
        """Probability of the count-th unit: it falls linearly with depth."""
        return 1 - count / total * (1 - survival_probability)

    count = 0
    stages = zip(spec.units, spec.filters, strict=True)
    for stage, (n, filters) in enumerate(stages, 1):
        is_looped = n - 1 >= LOOP_FROM if looped is None else looped
        for i in range(1, (1 if is_looped else n) + 1):
            count += 1
            first: dict[str, Any] = {}
            if issubclass(unit_class, units.PreActivationUnit):
                first["activated_input"] = count == 1 and activated_input
            x = unit_class(
                spec.width * filters,
                stride=2 if stage > 1 and i == 1 else 1,
                survival_probability=survives(count),
                remat=remat,
                **settings,
                **first,
                name=f"stage{stage}_unit{i}",
            )(x)
        if is_looped and n > 1:
            x = UnitStack(
                unit_class(spec.width * filters, **settings),
                n - 1,
                [survives(count + j) for j in range(1, n)],
                remat=remat,
                name=f"stage{stage}_stack",
            )(x)
            count += n - 1
    return x


def _classifier(x, classes, activation):
    """Global average pooling and one dense layer [1, Sec. 3.3]."""
    x = _POOLS["avg"](data_format="channels_last", name="pool")(x)
    # Departure: the dense layer starts as Keras starts it (Glorot and Bengio
    # 2010); [1, Sec. 3.4] derives its rule for layers before a ReLU.
    return keras.layers.Dense(
        classes,
        activation=activation,
        dtype=classifier_dtype(),
        name="predictions",
    )(x)


def classifier_dtype() -> str:
    """Returns the dtype of logits: a softmax in half precision loses its tail.

    >>> classifier_dtype()
    'float32'
    """
    policy = keras.config.dtype_policy()
    return keras.backend.result_type(policy.variable_dtype, "float32")


#: The arguments of `resnet` that choose a variant of a network, by name.
ARGUMENTS: dict[str, arguments.Argument] = arguments.of(resnet)

# The arguments whose defaults are those of the row, where `resnet` has None.
_OWN_DEFAULTS = ("classes", "name", "shortcut", "unit")

_Arguments = ParamSpec("_Arguments")


def _builder(
    build: Callable[Concatenate[Spec, _Arguments], keras.Model], title: str
) -> Callable[_Arguments, keras.Model]:
    """Returns `build` for one row of `MODELS`, with the defaults of the row."""
    row = MODELS[title.lower()]

    def builder(*args: _Arguments.args, **kwargs: _Arguments.kwargs):
        return build(row, *args, **kwargs)

    signature = inspect.signature(build)
    _, *parameters = signature.parameters.values()
    own = {name: getattr(row, name) for name in _OWN_DEFAULTS}
    parameters = [
        parameter.replace(default=own.get(parameter.name, parameter.default))
        for parameter in parameters
    ]
    units_text = ", ".join(map(str, row.units))
    size = row.image_size
    _, _, described = (inspect.getdoc(build) or "").partition("include_top:")
    described, _, _ = described.partition("\n>>>")
    builder.__name__ = builder.__qualname__ = title
    builder.__doc__ = (
        f"Builds {title} {row.source}.\n\n"
        f"Its stages have {units_text} units. The default input is "
        f"{size}x{size}x3.\n\nArgs:\n    include_top:{described}"
    )
    builder.__signature__ = (  # type: ignore[attr-defined]
        signature.replace(parameters=parameters)
    )
    return builder


# One line a network, so that a reader and an editor find every name.
ResNet18 = _builder(resnet, "ResNet18")
ResNet34 = _builder(resnet, "ResNet34")
ResNet50 = _builder(resnet, "ResNet50")
ResNet101 = _builder(resnet, "ResNet101")
ResNet152 = _builder(resnet, "ResNet152")
ResNet200 = _builder(resnet, "ResNet200")
ResNet18V2 = _builder(resnet, "ResNet18V2")
ResNet34V2 = _builder(resnet, "ResNet34V2")
ResNet50V2 = _builder(resnet, "ResNet50V2")
ResNet101V2 = _builder(resnet, "ResNet101V2")
ResNet152V2 = _builder(resnet, "ResNet152V2")
ResNet200V2 = _builder(resnet, "ResNet200V2")
ResNet20 = _builder(resnet, "ResNet20")
ResNet32 = _builder(resnet, "ResNet32")
ResNet44 = _builder(resnet, "ResNet44")
ResNet56 = _builder(resnet, "ResNet56")
ResNet110 = _builder(resnet, "ResNet110")
ResNet1202 = _builder(resnet, "ResNet1202")
ResNet20V2 = _builder(resnet, "ResNet20V2")
ResNet32V2 = _builder(resnet, "ResNet32V2")
ResNet44V2 = _builder(resnet, "ResNet44V2")
ResNet56V2 = _builder(resnet, "ResNet56V2")
ResNet110V2 = _builder(resnet, "ResNet110V2")
ResNet1202V2 = _builder(resnet, "ResNet1202V2")
ResNet164 = _builder(resnet, "ResNet164")
ResNet1001 = _builder(resnet, "ResNet1001")
ResNet164V2 = _builder(resnet, "ResNet164V2")
ResNet1001V2 = _builder(resnet, "ResNet1001V2")
WideResNet50_2 = _builder(resnet, "WideResNet50_2")
WideResNet101_2 = _builder(resnet, "WideResNet101_2")
PlainNet18 = _builder(resnet, "PlainNet18")
PlainNet34 = _builder(resnet, "PlainNet34")
PlainNet20 = _builder(resnet, "PlainNet20")
PlainNet32 = _builder(resnet, "PlainNet32")
PlainNet44 = _builder(resnet, "PlainNet44")
PlainNet56 = _builder(resnet, "PlainNet56")
PlainNet110 = _builder(resnet, "PlainNet110")
