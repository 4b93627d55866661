"""Signals and gradients in a network, measured on a batch.

With identity shortcuts and pre-activation units, `x_L = x_l + sum of F(x_i)`
[2, Eq. 4] and `dE/dx_l = dE/dx_L (1 + d/dx_l sum of F)` [2, Eq. 5]. If the
shortcuts scale, the product of the scales replaces the 1 [2, Eq. 8]. It
vanishes with depth. This module measures every term of these equations.
[2] is He et al. 2016, "Identity Mappings in Deep Residual Networks".
"""

import contextlib
import math
import os
from collections.abc import Iterator
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_resnet import graphs
from keras_resnet.analysis.complexity import called_as
from keras_resnet.analysis.complexity import columns
from keras_resnet.layers import Unit
from keras_resnet.layers import UnitStack
from keras_resnet.layers import remat
from keras_resnet.weights.model_paths import unit_names


def propagation(
    model: keras.Model, images: Any, labels: Any, training: bool = True
) -> dict[str, Any]:
    """Measures the signal, the residual and the gradient at each unit.

    The model and its moving statistics do not change.

    Args:
        model: A network of this package with its classifier, looped or not,
            or a model that is one chain of layers with such a network inside.
        images: Preprocessed images, `[batch, height, width, channels]`.
        labels: Integers, `[batch]`. E is the mean cross entropy.
        training: Whether to normalize by the batch and drop at random.

    Returns:
        A dict with the `name` of the model and these entries.

        - `units`: A list of dicts, one for each unit:

          - `name`: Name of the unit.

          - `signal`, `residual`: Norms of the input x and of F(x) for an image
            (the root of the mean square over the batch).

          - `scale`: |h(x)| / |x|, or None if the unit changes the dimension.

          - `gradient`: |dE/dx| at the input x of the unit.

          - `shortcut_gradient`: Part of the gradient that passes through no
            residual after x. It is dE/dx_L times the product of the derivatives
            of h. Gates count as factors. In original units, the product
            includes the derivatives of the ReLUs.

        - `last_gradient`: |dE/dx_L| at the output of the last unit.

        - `scale_product`: Product of all scales [2, Eq. 8].

        - `shortcut_decay`, `gradient_decay`: Both gradients at the first unit,
          divided by `last_gradient`.

        - `identity_error`: |x_L - x_l - sum of F| / |x_L| [2, Eq. 4] from the
          second unit of a stage to its end, for the worst stage.

    Raises:
        ValueError: If the model is not a chain that calls each unit once and
            ends in logits or their softmax.

    Example:

    >>> import keras_resnet
    >>> images = np.random.default_rng(0).normal(size=(4, 32, 32, 3))
    >>> model = keras_resnet.ResNet20V2()
    >>> report = propagation(model, images, [0, 1, 2, 3])
    >>> report["scale_product"], report["identity_error"] < 1e-5
    (1.0, True)
    """
    steps = _steps(model)
    images = ops.convert_to_tensor(images, "float32")
    labels = ops.convert_to_tensor(labels, "int32")
    # Zeros are added to the input of each unit and to the output of the last
    # one. The gradient of the zeros is the gradient of the signal.
    probes = [
        ops.zeros_like(x)
        for x in _forward(steps, images, None, labels, training)[1]["signals"]
    ]
    gradients, record = _gradients(
        lambda *probes: _forward(steps, images, probes, labels, training),
        probes,
    )
    shortcut_gradients, _ = _gradients(
        lambda *probes: _forward(steps, images, probes, labels, training, True),
        probes,
    )
    names = [name for name, _ in steps if name is not None]
    count = len(images)
    found = _measured(names, record, gradients, shortcut_gradients, count)
    return {"name": model.name, **found}


def _measured(names, record, gradients, shortcut_gradients, count):
    """Returns the entries of `propagation` from the signals and gradients."""
    units: list[dict[str, Any]] = [
        {
            "name": name,
            "signal": _norm(record["signals"][i]) / math.sqrt(count),
            "residual": _norm(record["residuals"][i]) / math.sqrt(count),
            "scale": _scale(record["signals"][i], record["shortcuts"][i]),
            "gradient": _norm(gradients[i]),
            "shortcut_gradient": _norm(shortcut_gradients[i]),
        }
        for i, name in enumerate(names)
    ]
    last = _norm(gradients[-1])
    scales = [unit["scale"] for unit in units if unit["scale"] is not None]
    return {
        "units": units,
        "last_gradient": last,
        "scale_product": math.prod(scales),
        "shortcut_decay": units[0]["shortcut_gradient"] / last,
        "gradient_decay": units[0]["gradient"] / last,
        "identity_error": _identity_error(names, record),
    }


def table(report: dict[str, Any]) -> str:
    """Formats a report of `propagation`, with one line for each unit.

    Args:
        report: Result of `propagation`.

    Returns:
        Lines with aligned columns. Gradients are divided by the last gradient.
    """
    last = report["last_gradient"]
    rows = [
        [report["name"], "signal", "residual", "scale", "gradient"]
        + ["through shortcuts"]
    ]
    for unit in report["units"]:
        scale = unit["scale"]
        rows.append(
            [
                unit["name"],
                f"{unit['signal']:.3g}",
                f"{unit['residual']:.3g}",
                "" if scale is None else f"{scale:.3f}",
                f"{unit['gradient'] / last:.3g}",
                f"{unit['shortcut_gradient'] / last:.3g}",
            ]
        )
    return columns(rows)


def comparison(reports: dict[str, dict[str, Any]]) -> str:
    """Formats reports of several networks, with one line for each network.

    Args:
        reports: Results of `propagation` by label.

    Returns:
        Lines with aligned columns: the product of the scales, the share of the
        last gradient that reaches the first unit through shortcuts alone and in
        total, and the error of `x_L = x_l + sum of F`.
    """
    rows = [["network", "scales", "through shortcuts", "gradient", "Eq. 4"]]
    for name, report in reports.items():
        rows.append(
            [name]
            + [
                f"{report[key]:.2g}"
                for key in (
                    "scale_product",
                    "shortcut_decay",
                    "gradient_decay",
                    "identity_error",
                )
            ]
        )
    return columns(rows)


def draw(reports: dict[str, dict[str, Any]]) -> Any:
    """Draws signals and gradients by unit, with one line for each network.

    The function needs matplotlib (`pip install matplotlib`).

    Args:
        reports: Results of `propagation` by label.

    Returns:
        A `matplotlib.figure.Figure` with the norms of the inputs of the units,
        and the gradients there, divided by the last gradient, through shortcuts
        alone and in total.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.0, 9.0), layout="constrained")
    rows = figure.subplots(3, sharex=True)
    labels = ("signal", "gradient, shortcuts alone", "gradient, in all")
    keys = ("signal", "shortcut_gradient", "gradient")
    for axes, key, label in zip(rows, keys, labels, strict=True):
        for i, (name, report) in enumerate(reports.items()):
            values = [unit[key] for unit in report["units"]]
            if key != "signal":
                values = [value / report["last_gradient"] for value in values]
            axes.plot(
                range(1, len(values) + 1),
                # A logarithmic axis cannot show 0.
                [value or math.nan for value in values],
                label=name,
                linestyle=("-", "--", ":")[i * 3 // max(len(reports), 1)],
            )
        axes.set_yscale("log")
        axes.set_ylabel(label)
    rows[-1].set_xlabel("unit")
    figure.legend(
        *rows[0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=2,
        fontsize="small",
        frameon=False,
    )
    return figure


def plot(reports: dict[str, dict[str, Any]], path: str | os.PathLike) -> None:
    """Writes the picture of `draw` to a file.

    Args:
        reports: Results of `propagation` by label.
        path: Path of the file. Its ending (`.svg`, `.png`) is the format.
    """
    draw(reports).savefig(path)


Step = tuple[str | None, Any]


def _steps(model: keras.Model) -> list[Step]:
    """Returns the calls of a chain: (name, unit) or (None, another call).

    Each call is a function `(x, training) -> y`.

    Raises:
        ValueError: If the model is not a chain of units with a classifier.
    """
    steps = list(_chain(model))
    names = [name for name, _ in steps if name is not None]
    if not names or len(graphs.graph(model).outputs[0].shape) != 2:
        raise _no_chain(model)
    if len(set(names)) < len(names):
        raise ValueError(
            "model must call each unit once, received "
            f"{model.name!r}, which calls units of the same name"
        )
    classifier = steps[-1][1]
    activation = getattr(
        getattr(classifier, "operation", None), "activation", None
    )
    if activation not in (keras.activations.softmax, keras.activations.linear):
        raise ValueError(
            "model must end in a layer that gives logits or their softmax, "
            f"received {model.name!r}, which ends in "
            f"{graphs.nodes(model)[-1].operation.name}"
        )
    return steps


def _chain(model: keras.Model) -> Iterator[Step]:
    """Yields the calls of a model and of its inner models, in order."""
    graph = graphs.graph(model)
    if len(graph.inputs) != 1 or len(graph.outputs) != 1:
        raise _no_chain(model)
    (x,) = graph.inputs
    for node in graphs.nodes(model):
        layer, read = node.operation, node.input_tensors
        if len(read) != 1 or read[0] is not x or len(node.outputs) != 1:
            raise _no_chain(model)
        (x,) = node.outputs
        if graphs.has_graph(layer):
            yield from _chain(layer)
        elif isinstance(layer, Unit):
            yield layer.name, _One(layer, None)
        elif isinstance(layer, UnitStack):
            values = [weight.value for weight in layer.stacked]
            for i, name in enumerate(unit_names(layer)):
                one = [value[i] for value in values]
                yield name, _One(layer.pattern(), one)
        else:
            yield None, _Call(node)
    if x is not graph.outputs[0]:
        raise _no_chain(model)


def _no_chain(model) -> ValueError:
    return ValueError(
        "model must be a network of keras_resnet, a chain of its units "
        f"that ends in a classifier, received {model.name!r}"
    )


class _Call:
    """Call of another operation, with the arguments from the graph."""

    def __init__(self, node):
        self.operation = node.operation
        self.arguments = node.arguments
        self.read = node.input_tensors[0]

    def __call__(self, x, training):
        args, kwargs = self.arguments.fill_in({id(self.read): x})
        if getattr(self.operation, "_call_has_training_arg", False):
            kwargs = {**kwargs, "training": training}
        return self.operation(*args, **kwargs)


class _One:
    """Unit with its own values, or with the values of a unit in a stack."""

    def __init__(self, unit: Unit, values: Sequence | None):
        self.unit = unit
        self.values = values

    def __call__(self, x, training):
        if self.values is None:
            return self.unit.forward(x, training)
        y, _ = remat.apply(self.unit, self.values, x, training)
        return y


@contextlib.contextmanager
def _watched(shortcut, record, is_alone) -> Iterator[None]:
    """Records the residual and h(x) of the calls of a shortcut.

    With `is_alone`, the gradients of the residual and of a gate are stopped:
    [2, Sec. 3.1] treats the gate as a constant factor.
    """
    call = shortcut.call

    def watched(x, residual, training=None):
        record["residuals"].append(residual)
        record["shortcuts"].append(
            call(x, ops.zeros_like(residual), training=training)
        )
        if is_alone:
            residual = ops.stop_gradient(residual)
        return call(x, residual, training=training)

    with contextlib.ExitStack() as stack:
        stack.enter_context(called_as(shortcut, watched))
        gate = getattr(shortcut, "gate", None)
        if gate is not None and is_alone:
            open_gate = gate.call
            stack.enter_context(
                called_as(gate, lambda x: ops.stop_gradient(open_gate(x)))
            )
        yield


def _forward(steps, images, probes, labels, training, is_alone=False):
    """Returns E, and the signals, residuals and shortcuts of all units."""
    record: dict[str, list] = {"signals": [], "residuals": [], "shortcuts": []}
    probes = iter(probes or [])

    def probed(x):
        record["signals"].append(x)
        probe = next(probes, None)
        return x if probe is None else x + ops.cast(probe, x.dtype)

    x = images
    after_units = [name for name, _ in steps].index(None, _last_unit(steps))
    with keras.StatelessScope():  # keeps the moving statistics unchanged
        for i, (name, layer) in enumerate(steps):
            if name is not None:
                x = probed(x)
                with _watched(layer.unit.shortcut, record, is_alone):
                    x = layer(x, training)
                continue
            if i == after_units:
                x = probed(x)
            x = layer(x, training)
        loss = keras.losses.SparseCategoricalCrossentropy(
            from_logits=_gives_logits(steps[-1][1].operation)
        )(labels, x)
    return loss, record


def _last_unit(steps) -> int:
    return max(i for i, (name, _) in enumerate(steps) if name is not None)


def _gives_logits(classifier) -> bool:
    return classifier.activation is not keras.activations.softmax


def _gradients(function, inputs):
    """Returns gradients of a function's first output, and its second output."""
    backend = keras.backend.backend()
    if backend == "tensorflow":
        import tensorflow as tf

        with tf.GradientTape() as tape:
            tape.watch(inputs)
            loss, record = function(*inputs)
        return tape.gradient(loss, inputs, unconnected_gradients="zero"), record
    if backend == "jax":
        import jax

        places = tuple(range(len(inputs)))
        return jax.grad(function, places, has_aux=True)(*inputs)
    import torch

    inputs = [x.detach().requires_grad_() for x in inputs]
    loss, record = function(*inputs)
    gradients = torch.autograd.grad(loss, inputs, allow_unused=True)
    return [
        torch.zeros_like(x) if g is None else g
        for g, x in zip(gradients, inputs, strict=True)
    ], record


def _norm(x) -> float:
    # A product of fifty halves is not zero in float32, but its square would be.
    return float(
        np.linalg.norm(ops.convert_to_numpy(ops.cast(x, "float32")).astype("d"))
    )


def _scale(x, h) -> float | None:
    return _norm(h) / _norm(x) if x.shape == h.shape else None


def _identity_error(names, record) -> float:
    """Returns |x_L - x_l - sum of F| / |x_L| of the worst stage."""
    worst = 0.0
    arrays = {
        key: [
            ops.convert_to_numpy(ops.cast(x, "float32")).astype("d")
            for x in record[key]
        ]
        for key in ("signals", "residuals")
    }
    for stage in dict.fromkeys(name.partition("_")[0] for name in names):
        _, *others = [
            i for i, name in enumerate(names) if name.startswith(f"{stage}_")
        ]
        if not others:
            continue
        total = sum(arrays["residuals"][i] for i in others)
        x_last = arrays["signals"][others[-1] + 1]
        error = x_last - arrays["signals"][others[0]] - total
        worst = max(worst, _norm(error) / _norm(x_last))
    return worst
