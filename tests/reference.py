"""Laws of the papers in plain integers and NumPy, for the tests.

This module does not import the package, Keras or TensorFlow. The counts come
from the layouts of [1, Table 1 and Sec. 4.2] and [2, Sec. 3 to 5]. The forward
passes are in float64, with a plain loop over the window.
"""

import itertools
import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

# --- Layouts and counts ------------------------------------------------------

IMAGENET_UNITS = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
    200: (3, 24, 36, 3),
}
BOTTLENECK_DEPTHS = (50, 101, 152, 200, 164, 1001)
CIFAR_DEPTHS = (20, 32, 44, 56, 110, 1202, 164, 1001)
PLAIN_DEPTHS = (18, 34, 20, 32, 44, 56, 110)
WIDE_DEPTHS = (50, 101)  # Zagoruyko and Komodakis 2016, as torchvision has them
NAMES = [
    f"resnet{depth}{version}"
    for depth in (*IMAGENET_UNITS, *CIFAR_DEPTHS)
    for version in ("", "v2")
] + [f"plainnet{depth}" for depth in PLAIN_DEPTHS]
NAMES += [f"wideresnet{depth}_2" for depth in WIDE_DEPTHS]


class Layout(NamedTuple):
    """Layout of a network in the papers."""

    units: tuple[int, ...]
    filters: tuple[int, ...]
    bottleneck: bool
    is_imagenet: bool
    pre_activation: bool
    shortcut: str  # the papers' choice for this network
    classes: int
    image_size: int
    width: int = 1  # factor of the filters inside a bottleneck


class Counts(NamedTuple):
    """Counts of a network."""

    parameters: int
    moving_statistics: int
    multiply_adds: int
    activations: int  # output values of layers and additions, one image


class Step(NamedTuple):
    """A layer of a kind: convolution, gate, norm, addition, pool, dense."""

    kind: str
    kernel: int
    inputs: int
    outputs: int
    size: int  # of the square output


def layout(name: str) -> Layout:
    """Returns the layout of a network by name, such as "resnet50v2"."""
    kind, depth_text, version, width = re.fullmatch(
        r"(resnet|plainnet|wideresnet)(\d+)(v2)?(?:_(\d))?", name
    ).groups()
    depth = int(depth_text)
    is_imagenet = depth in IMAGENET_UNITS
    bottleneck = depth in BOTTLENECK_DEPTHS
    if is_imagenet:
        units: tuple[int, ...] = IMAGENET_UNITS[depth]
    else:
        units = ((depth - 2) // (9 if bottleneck else 6),) * 3
    shortcut = "B" if is_imagenet or bottleneck else "A"
    return Layout(
        units,
        (64, 128, 256, 512) if is_imagenet else (16, 32, 64),
        bottleneck,
        is_imagenet,
        version is not None,
        "none" if kind == "plainnet" else shortcut,
        1000 if is_imagenet else 10,
        224 if is_imagenet else 32,
        int(width or 1),
    )


def convolve(kernel, inputs, outputs, size, stride=1) -> Step:
    """Returns `ceil(size / stride)`: k // 2 zeros are on each side."""
    return Step("convolution", kernel, inputs, outputs, -(-size // stride))


def norm(channels, size) -> Step:
    return Step("norm", 0, channels, channels, size)


def steps(
    net: Layout,
    shortcut: str | None = None,
    bottleneck_stride: str = "1x1",
) -> Iterator[Step]:
    """Yields all convolutions, norms, additions, poolings and dense layers."""
    shortcut = shortcut or net.shortcut
    channels = net.filters[0]
    kernel, stride = (7, 2) if net.is_imagenet else (3, 1)
    stem = convolve(kernel, 3, channels, net.image_size, stride)
    size = stem.size
    yield stem
    yield norm(channels, size)
    if net.is_imagenet:
        size //= 2
        yield Step("pool", 3, channels, channels, size)
    is_first = True
    stages = zip(net.units, net.filters, strict=True)
    for stage, (n, filters) in enumerate(stages):
        for unit in range(n):
            stride = 2 if stage and not unit else 1
            if net.bottleneck:
                first, middle = stride, 1
                if bottleneck_stride == "3x3":
                    first, middle = middle, first
                inside = net.width * filters
                branch = [
                    (1, inside, first),
                    (3, inside, middle),
                    (1, 4 * filters, 1),
                ]
            else:
                branch = [(3, filters, stride), (3, filters, 1)]
            c, s = channels, size
            for i, (kernel, outputs, inner_stride) in enumerate(branch):
                # The stem has the BN and ReLU of the first unit.
                if net.pre_activation and not (is_first and i == 0):
                    yield norm(c, s)
                convolution = convolve(kernel, c, outputs, s, inner_stride)
                yield convolution
                c, s = outputs, convolution.size
                if not net.pre_activation:
                    yield norm(c, s)
            changes = stride > 1 or c != channels
            projects = {"B": changes, "C": True, "convolution": True}
            if projects.get(shortcut):
                yield convolve(1, channels, c, size, stride)
                if not net.pre_activation and shortcut != "convolution":
                    yield norm(c, s)
            if shortcut.endswith("gating"):
                yield Step("gate", 1, channels, c, s)
            if shortcut != "none":
                yield Step("addition", 0, c, c, s)
            channels, size, is_first = c, s, False
    if net.pre_activation:
        yield norm(channels, size)
    yield Step("pool", size, channels, channels, 1)
    yield Step("dense", 1, channels, net.classes, 1)


def counts(net: Layout, *args, **kwargs) -> Counts:
    """Returns the totals; the arguments are those of `steps`."""
    parameters = moving_statistics = multiply_adds = activations = 0
    for kind, kernel, inputs, outputs, size in steps(net, *args, **kwargs):
        activations += outputs * size**2
        if kind in ("convolution", "gate", "dense"):
            weights = kernel**2 * inputs * outputs
            bias = 0 if kind == "convolution" else outputs
            parameters += weights + bias
            multiply_adds += weights * size**2
        if kind == "norm":
            parameters += 2 * outputs
            moving_statistics += 2 * outputs
    return Counts(parameters, moving_statistics, multiply_adds, activations)


def vgg(depth: int) -> tuple[int, int, int]:
    """Counts VGG-16 or 19: parameters, multiply-adds without and with dense.

    [1] prints 15.3 x 10^9 for VGG-16, which is without, and 19.6 x 10^9 for
    VGG-19, which is with them.
    """
    n = {16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}[depth]
    parameters = multiply_adds = dense = 0
    inputs, size = 3, 224
    for count, outputs in zip(n, (64, 128, 256, 512, 512), strict=True):
        for _ in range(count):
            parameters += 9 * inputs * outputs + outputs
            multiply_adds += 9 * inputs * outputs * size**2
            inputs = outputs
        size //= 2
    for inputs, outputs in itertools.pairwise((512 * 7**2, 4096, 4096, 1000)):
        parameters += inputs * outputs + outputs
        dense += inputs * outputs
    return parameters, multiply_adds, multiply_adds + dense


# Szegedy et al. 2015, Table 1: image size, input channels, then 1x1; 3x3
# reduce, 3x3; 5x5 reduce, 5x5; pool projection.
INCEPTIONS = (
    (28, 192, 64, 96, 128, 16, 32, 32),
    (28, 256, 128, 128, 192, 32, 96, 64),
    (14, 480, 192, 96, 208, 16, 48, 64),
    (14, 512, 160, 112, 224, 24, 64, 64),
    (14, 512, 128, 128, 256, 24, 64, 64),
    (14, 512, 112, 144, 288, 32, 64, 64),
    (14, 528, 256, 160, 320, 32, 128, 128),
    (7, 832, 256, 160, 320, 32, 128, 128),
    (7, 832, 384, 192, 384, 48, 128, 128),
)


def googlenet() -> tuple[int, int]:
    """Counts GoogLeNet without side branches: parameters, multiply-adds."""
    layers = [(112, 7, 3, 64), (56, 1, 64, 64), (56, 3, 64, 192)]
    for size, inputs, one, reduce3, three, reduce5, five, pool in INCEPTIONS:
        for kernel, c_in, c_out in (
            *((1, inputs, one), (1, inputs, reduce3), (3, reduce3, three)),
            *((1, inputs, reduce5), (5, reduce5, five), (1, inputs, pool)),
        ):
            layers.append((size, kernel, c_in, c_out))
    layers.append((1, 1, 1024, 1000))
    parameters = sum((k * k * c_in + 1) * c_out for _, k, c_in, c_out in layers)
    multiply_adds = sum(
        (size * k) ** 2 * c_in * c_out for size, k, c_in, c_out in layers
    )
    return parameters, multiply_adds


def prelu_net() -> tuple[int, int, int]:
    """Counts layers, parameters and multiply-adds of the widest PReLU-net.

    This is model C of He et al. 2015, Delving Deep into Rectifiers, Table 3.
    Pyramid pooling with 7x7, 3x3, 2x2 and 1x1 bins precedes the dense layers.
    Every rectifier has a slope for each channel.
    """
    layers = [(112, 7, 3, 96)]
    for size, width in ((56, 384), (28, 768), (14, 896)):
        for _ in range(6):
            layers.append((size, 3, layers[-1][-1], width))
    bins = sum(n**2 for n in (7, 3, 2, 1))
    widths = (bins * 896, 4096, 4096, 1000)
    layers += [(1, 1, i, o) for i, o in itertools.pairwise(widths)]
    parameters = sum((k * k * c_in + 1) * c_out for _, k, c_in, c_out in layers)
    slopes = sum(c_out for *_, c_out in layers[:-1])
    multiply_adds = sum(
        (size * k) ** 2 * c_in * c_out for size, k, c_in, c_out in layers
    )
    return len(layers), parameters + slopes, multiply_adds


# --- Forward passes ----------------------------------------------------------


def relu(x):
    return np.maximum(x, 0)


def convolution(x, kernel, stride=1):
    """Convolves x [n, h, w, c] with [k, k, c, f] and k // 2 zeros around."""
    x, kernel = np.asarray(x, np.float64), np.asarray(kernel, np.float64)
    k = len(kernel)
    sides = (k // 2, k // 2)
    x = np.pad(x, ((0, 0), sides, sides, (0, 0)))
    height, width = ((s - k) // stride + 1 for s in x.shape[1:3])
    y = 0.0
    for i, j in itertools.product(range(k), repeat=2):
        rows = slice(i, i + stride * (height - 1) + 1, stride)
        columns = slice(j, j + stride * (width - 1) + 1, stride)
        y = y + x[:, rows, columns] @ kernel[i, j]
    return y


def batch_statistics(x):
    """Returns mean and biased variance of each channel."""
    x = np.asarray(x, np.float64)
    mean = x.mean((0, 1, 2))
    return mean, ((x - mean) ** 2).mean((0, 1, 2))


def batch_normalization(x, gamma, beta, mean, variance, epsilon=1e-5):
    scale = gamma / np.sqrt(np.asarray(variance, np.float64) + epsilon)
    return (x - mean) * scale + beta


def identity(x, stride=1, channels=None, zeros="end"):
    """Returns h(x) of option A: x[::stride, ::stride] and zero channels."""
    x = np.asarray(x, np.float64)[:, ::stride, ::stride]
    missing = (channels or x.shape[-1]) - x.shape[-1]
    before = missing // 2 if zeros == "both" else 0
    return np.pad(x, ((0, 0),) * 3 + ((before, missing - before),))


def gate(x, kernel, bias, stride=1):
    """Returns the gate g(x) = sigmoid(W_g x + b_g) [2, Sec. 3.1]."""
    return 1 / (1 + np.exp(-convolution(x, kernel, stride) - bias))


# Shortcuts as (h, residual) -> sum; h is `identity(...)`, or
# `convolution(x, W_s, stride)` (options B and C), normalized or not.


def addition(h, residual):
    return h + residual


def constant_scaling(h, residual, shortcut_scale, residual_scale):
    return shortcut_scale * h + residual_scale * residual


def exclusive_gating(h, residual, g):
    return (1 - g) * h + g * residual


def shortcut_only_gating(h, residual, g):
    return (1 - g) * h + residual


def dropout(h, residual, kept, rate):
    return kept * h / (1 - rate) + residual


def unit(order, x, convolutions, norms, shortcut=addition, activated=False):
    """Computes a residual unit [2, Fig. 4] of two or three convolutions.

    Args:
        order: Name of the order in the package ("original", ...).
        x: Input of the unit.
        convolutions: Convolutions of F, as functions.
        norms: Normalizations of F, as functions.
        shortcut: Function (input of the shortcut, residual) -> sum.
        activated: Whether the shortcut receives the signal after the first BN
            and ReLU of the unit (units that change the dimension).
    """
    signal = y = x
    layers = list(enumerate(zip(convolutions, norms, strict=True)))
    if order == "pre_activation":
        for i, (convolve_, normalize) in layers:
            y = relu(normalize(y))
            if i == 0 and activated:
                signal = y
            y = convolve_(y)
        return shortcut(signal, y)
    if order == "relu_only_pre_activation":
        y = relu(x)
        if activated:
            signal = y
    last = len(convolutions) - 1
    for i, (convolve_, normalize) in layers:
        y = convolve_(y)
        if i < last:
            y = relu(normalize(y))
    if order == "batch_norm_after_addition":
        return relu(norms[last](shortcut(signal, y)))
    y = norms[last](y)
    if order == "relu_before_addition":
        return shortcut(signal, relu(y))
    if order == "relu_only_pre_activation":
        return shortcut(signal, y)
    assert order == "original", order
    return relu(shortcut(signal, y))


# --- Preprocessing -----------------------------------------------------------


def preprocessed(pixels, mode, mean=None):
    """Preprocesses images of 0..255 for `mode`, channels last."""
    x = np.asarray(pixels, "float64")
    if mode == "caffe":
        return x[..., ::-1] - [103.939, 116.779, 123.68]
    if mode == "tf":
        return x / 127.5 - 1
    if mode == "torch":
        return (x / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    assert mode == "cifar10", mode
    return x / 255 - mean
