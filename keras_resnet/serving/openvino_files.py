"""Files of a network for OpenVINO: `model.xml`, and `model.bin` beside it.

OpenVINO reads the folded network of `onnx_files`, in float32 or in int8. The
run-time information of the file has `labels` and `preprocessing` as JSON, under
`keras_resnet`. On processors with bfloat16 units, OpenVINO computes in bfloat16
unless INFERENCE_PRECISION_HINT is f32.
"""

import importlib.util
import os
import tempfile
from collections.abc import Callable

import numpy as np
import tensorflow as tf

from keras_resnet.serving import onnx_files
from keras_resnet.serving.metadata import Metadata


def check_packages(precision: str) -> None:
    """Raises ValueError if a package of the converter is not installed."""
    if importlib.util.find_spec("openvino") is None:
        raise ValueError(
            "openvino needs the package openvino: pip install openvino"
        )
    onnx_files.check_packages(precision)


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
        onnx_files.write(source, probabilities, images, metadata, calibration)
        model = openvino.convert_model(source)
    for name, text in metadata.texts().items():
        model.set_rt_info(text, ["keras_resnet", name])
    openvino.save_model(model, path, compress_to_fp16=False)


def load(path: str) -> Callable[[np.ndarray], np.ndarray]:
    """Returns the function of a file of `write`, in this process."""
    import openvino

    network = openvino.Core().compile_model(
        path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
    )
    return lambda images: network(images)["probabilities"]
