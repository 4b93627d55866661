"""Files of a network for OpenVINO: `model.xml`, and `model.bin` beside it.

OpenVINO reads the folded network of `onnx_files`. The file has `labels` and
`preprocessing` as JSON under the key `keras_resnet` of its run-time
information. On processors with bfloat16 units, OpenVINO computes in bfloat16
unless INFERENCE_PRECISION_HINT says f32.
"""

import contextlib
import importlib.util
import io
import os
import tempfile
from collections.abc import Callable

import numpy as np
import tensorflow as tf

from keras_resnet.serving import onnx_files
from keras_resnet.serving.metadata import Metadata


def check_packages(precision: str) -> None:
    """Raises ValueError if a package of the converter is not installed."""
    needed = ["openvino", "tf2onnx"]
    if precision == "int8":
        needed.append("nncf")
    for name in needed:
        if importlib.util.find_spec(name) is None:
            raise ValueError(
                f"openvino in {precision} needs the package {name}: "
                f"pip install {' '.join(needed)}"
            )


def write(
    path: str,
    probabilities: Callable[[tf.Tensor], tf.Tensor],
    images: tf.TensorSpec,
    metadata: Metadata,
    calibration: np.ndarray | None = None,
) -> None:
    """Writes a network for OpenVINO; see `litert_files.write` for arguments."""
    import openvino

    with tempfile.TemporaryDirectory() as scratch:
        source = os.path.join(scratch, "model.onnx")
        onnx_files.write(source, probabilities, images, metadata)
        model = openvino.convert_model(source)
    if calibration is not None:
        model = quantized(model, calibration)
    for name, text in metadata.texts().items():
        model.set_rt_info(text, ["keras_resnet", name])
    openvino.save_model(model, path, compress_to_fp16=False)


def quantized(model, calibration: np.ndarray):
    """Returns an `openvino.Model` in int8, by NNCF's post-training.

    Args:
        model: `openvino.Model` in float32.
        calibration: Views, uint8 `[count, height, width, channels]`.
    """
    import nncf

    views = nncf.Dataset([view[None] for view in calibration])
    with contextlib.redirect_stdout(io.StringIO()):  # progress bars
        return nncf.quantize(
            model,
            views,
            preset=nncf.QuantizationPreset.MIXED,
            subset_size=len(calibration),
        )


def load(path: str) -> Callable[[np.ndarray], np.ndarray]:
    """Returns the function of a file of `write`, in this process."""
    import openvino

    network = openvino.Core().compile_model(
        path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
    )
    return lambda images: network(images)["probabilities"]
