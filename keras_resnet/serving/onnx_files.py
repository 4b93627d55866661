"""Files of a network for ONNX Runtime and other readers of ONNX.

The graph is folded: a convolution carries its bias, and no batch normalization
remains after a convolution. Inside the network, images have channels first, as
the runtimes want them; one transpose at the input makes them so. Batches may
have any size. The metadata of the file has `labels` and `preprocessing`, as
JSON.

In int8, pairs of QuantizeLinear and DequantizeLinear (QDQ) surround the
operations. Kernels have one scale for each output channel, and activations the
range that calibration images determine.
"""

import importlib.util
import os
import tempfile
from collections.abc import Callable
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow as tf

from keras_resnet.serving.metadata import Metadata

RUNTIME = "onnxruntime"

_OPSET = 17  # of 2022; current runtimes read it
_CALIBRATION_BATCH = 8

# Operations that compute in int8. The softmax at the end stays in float32.
_INT8_OPERATIONS = (
    *("Conv", "Gemm", "MatMul"),
    *("Add", "Mul", "Relu", "Sigmoid"),
    *("MaxPool", "AveragePool", "GlobalAveragePool", "ReduceMean"),
    *("Pad", "Concat", "Reshape", "Flatten", "Squeeze"),
)


def check_packages(precision: str) -> None:
    """Raises ValueError if a package of the converter is not installed."""
    needed = ["tf2onnx"]
    if precision == "int8":
        needed.append(RUNTIME)
    for name in needed:
        if importlib.util.find_spec(name) is None:
            raise ValueError(
                f"the converter to ONNX needs the package {name}: "
                f"pip install {RUNTIME} tf2onnx"
            )


def write(
    path: str,
    probabilities: Callable[[tf.Tensor], tf.Tensor],
    images: tf.TensorSpec,
    metadata: Metadata,
    calibration: np.ndarray | None = None,
) -> None:
    """Writes a network as ONNX; see `litert_files.write` for the arguments."""
    model = convert(probabilities, images)
    if calibration is not None:
        model = quantized(model, calibration)
    for name, text in metadata.texts().items():
        entry = model.metadata_props.add()
        entry.key, entry.value = name, text
    with open(path, "wb") as file:
        file.write(model.SerializeToString())


def load(path: str) -> Callable[[np.ndarray], np.ndarray] | None:
    """Returns the function of a file of `write`, in this process.

    It is None if the package onnxruntime is not installed.
    """
    if importlib.util.find_spec(RUNTIME) is None:
        return None
    import onnxruntime

    session = onnxruntime.InferenceSession(
        path, providers=["CPUExecutionProvider"]
    )
    return lambda images: session.run(["probabilities"], {"images": images})[0]


def convert(
    probabilities: Callable[[tf.Tensor], tf.Tensor], images: tf.TensorSpec
) -> Any:
    """Returns a network as an `onnx.ModelProto` in float32."""
    import tf2onnx

    def of_images(images):
        return {"probabilities": probabilities(images)}

    model, _ = tf2onnx.convert.from_function(
        tf.function(of_images, [images], autograph=False),
        [images],
        opset=_OPSET,
    )
    _stride_convolutions(model.graph)
    _pad_pools(model.graph)
    return model


def quantized(model: Any, calibration: np.ndarray) -> Any:
    """Returns the model in int8, as QDQ.

    Args:
        model: `onnx.ModelProto` in float32, of `convert`.
        calibration: Views, uint8 `[count, height, width, channels]`.
    """
    import onnx
    from onnxruntime import quantization
    from onnxruntime.quantization import shape_inference

    with tempfile.TemporaryDirectory() as scratch:
        source, prepared, path = (
            os.path.join(scratch, name) for name in ("source", "32", "8")
        )
        onnx.save(model, source)
        shape_inference.quant_pre_process(
            source, prepared, skip_symbolic_shape=True
        )
        quantization.quantize_static(
            prepared,
            path,
            _Calibration(calibration),
            op_types_to_quantize=list(_INT8_OPERATIONS),
            per_channel=True,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
        )
        return onnx.load(path)


class _Calibration:
    """Batches of views, as `quantize_static` reads them."""

    def __init__(self, views: np.ndarray):
        self._batches: Iterator[np.ndarray] = iter(
            np.split(
                views,
                range(_CALIBRATION_BATCH, len(views), _CALIBRATION_BATCH),
            )
        )

    def get_next(self) -> dict[str, np.ndarray] | None:
        batch = next(self._batches, None)
        return None if batch is None else {"images": batch}


def _stride_convolutions(graph: Any) -> None:
    """Lets a 1x1 convolution stride, where a pool of one pixel did before it.

    `layers.subsampled` is such a pool, which is fast in TensorFlow.
    """
    readers = _readers(graph)
    for pool in list(graph.node):
        if pool.op_type != "AveragePool":
            continue
        settings = _attributes(pool)
        after = readers.get(pool.output[0], [])
        if (
            settings.get("kernel_shape") == [1, 1]
            and not any(settings.get("pads", []))
            and after
            and all(_is_single(node, pool.output[0]) for node in after)
        ):
            for node in after:
                node.input[0] = pool.input[0]
                _set(node, "strides", settings["strides"])
            graph.node.remove(pool)


def _is_single(node, image: str) -> bool:
    """Whether a node is a 1x1 convolution of the image, of stride 1."""
    if node is None:
        return False
    settings = _attributes(node)
    return (
        node.op_type == "Conv"
        and node.input[0] == image
        and settings.get("kernel_shape") == [1, 1]
        and settings.get("strides", [1, 1]) == [1, 1]
        and not any(settings.get("pads", []))
    )


def _attributes(node) -> dict[str, Any]:
    """Lists of integers and strings of a node, by name."""
    return {a.name: list(a.ints) or a.s for a in node.attribute}


def _set(node, name: str, values: list[int]) -> None:
    import onnx

    for attribute in list(node.attribute):
        if attribute.name in (name, "auto_pad"):
            node.attribute.remove(attribute)
    node.attribute.append(onnx.helper.make_attribute(name, values))


def _pad_pools(graph: Any) -> None:
    """Lets a max pool pad, where zeros are added to a ReLU's output before it.

    The values are not negative, so the zeros never decide the maximum.
    """
    import onnx

    readers = _readers(graph)
    made_by = {name: node for node in graph.node for name in node.output}
    constants = {
        tensor.name: onnx.numpy_helper.to_array(tensor)
        for tensor in graph.initializer
    }
    for pad in list(graph.node):
        if pad.op_type != "Pad" or len(pad.input) < 2:
            continue
        after = readers.get(pad.output[0], [])
        before = made_by.get(pad.input[0])
        sides = constants.get(pad.input[1])
        values = [constants.get(name) for name in pad.input[2:] if name]
        if (
            before is not None
            and before.op_type == "Relu"
            and _attributes(pad).get("mode", b"constant") == b"constant"
            and sides is not None
            and not any(value is None or value.any() for value in values)
            and not sides.reshape(2, -1)[:, :2].any()  # batch and channels
            and after
            and all(_is_unpadded_pool(node, sides.max()) for node in after)
        ):
            for node in after:
                node.input[0] = pad.input[0]
                _set(node, "pads", sides.reshape(2, -1)[:, 2:].ravel().tolist())
            graph.node.remove(pad)
    read = _readers(graph)
    for tensor in list(graph.initializer):  # the sides and the zero
        if tensor.name not in read:
            graph.initializer.remove(tensor)


def _is_unpadded_pool(node, padding: int) -> bool:
    """Whether a node is a max pool that can pad so much, and does not yet."""
    if node is None:
        return False
    settings = _attributes(node)
    return (
        node.op_type == "MaxPool"
        and padding < min(settings["kernel_shape"])
        and not any(settings.get("pads", []))
        and settings.get("auto_pad", b"VALID") in (b"VALID", b"NOTSET")
    )


def _readers(graph) -> dict[str, list]:
    """Nodes that read a value, by its name; an output of the graph has None."""
    readers: dict[str, list] = {value.name: [None] for value in graph.output}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    return readers
