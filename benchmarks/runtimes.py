"""Predictions of files: our SavedModel in int8; ours and torch's elsewhere.

Our files are those of `apps.export --formats`: they take uint8 images with
channels last and normalize them. The file of torch takes normalized float32
images with channels first. OpenVINO gets the batch size of the work before it
compiles.

In int8, every network is calibrated on the same pictures. The fact `agreement`
is the share of other pictures for which the class is that of the same file in
float32. The weights are random, and the classifier is centred, so that the
pictures have different classes.
"""

import contextlib
import io
import os
import tempfile
from collections.abc import Callable
from typing import Any
from typing import NamedTuple

import numpy as np

from benchmarks import prepared

_CALIBRATION = 32  # pictures
_COMPARED = 64  # pictures, a multiple of each batch size

Predict = Callable[[np.ndarray], np.ndarray]


class _File(NamedTuple):
    """A network as ONNX, and what makes its input of uint8 pictures."""

    model: Any
    prepare: Predict


def infer_onnxruntime(work, is_ours: bool = False):
    """Predicts in ONNX Runtime; int8 is QDQ of its static quantization."""
    import onnxruntime

    from keras_resnet.serving import onnx_files

    def predict(model):
        session = onnxruntime.InferenceSession(
            model.SerializeToString(), providers=["CPUExecutionProvider"]
        )
        return lambda images: session.run(None, {"images": images})[0]

    def quantized(model, images):
        return onnx_files.quantized(model, images)

    return _step(work, _file(work, is_ours), predict, quantized)


def infer_openvino(work, is_ours: bool = False):
    """Predicts in OpenVINO; int8 is QDQ in our file, and NNCF in torch's."""
    import openvino

    from keras_resnet.serving import onnx_files

    precision = "bf16" if work.dtype == "bfloat16" else "f32"

    def predict(model):
        _, *shape = model.input().partial_shape
        fixed = model.clone()
        fixed.reshape([work.batch_size, *shape])
        network = openvino.Core().compile_model(
            fixed, "CPU", {"INFERENCE_PRECISION_HINT": precision}
        )
        return lambda images: network(images)[0]

    def convert(model):
        with tempfile.TemporaryDirectory() as directory:
            path = os.path.join(directory, "network.onnx")
            with open(path, "wb") as content:
                content.write(model.SerializeToString())
            return openvino.convert_model(path)

    def quantized(model, images):
        if is_ours:
            return convert(onnx_files.quantized(file.model, images))
        return _by_nncf(model, images)

    file = _file(work, is_ours)
    converted = file._replace(model=convert(file.model))
    return _step(work, converted, predict, quantized)


def _by_nncf(model, images: np.ndarray):
    """Returns an OpenVINO model in int8, by post-training quantization."""
    import nncf

    with contextlib.redirect_stdout(io.StringIO()):  # progress bars
        return nncf.quantize(
            model,
            nncf.Dataset([image[None] for image in images]),
            preset=nncf.QuantizationPreset.MIXED,
            subset_size=len(images),
        )


def infer_saved_model(work):
    """Predicts in TensorFlow, as the signature `images` of an export does."""
    import tensorflow as tf

    from keras_resnet.serving import folding
    from keras_resnet.serving import quantization

    model, preprocessing = _network(work)

    def predict(network):
        signature = tf.function(
            lambda images: {"probabilities": network(preprocessing(images))},
            input_signature=[_image(preprocessing)],
            autograph=False,
        )
        with tempfile.TemporaryDirectory() as directory:
            tf.saved_model.save(tf.Module(), directory, {"images": signature})
            loaded = tf.saved_model.load(directory)
        run = loaded.signatures["images"]

        def probabilities(images, loaded=loaded):  # `run` has no reference
            return run(images=tf.constant(images))["probabilities"].numpy()

        return probabilities

    def quantized(_, images):
        return quantization.quantize(model, np.asarray(preprocessing(images)))

    file = _File(folding.fold(model), lambda images: images)
    return _step(work, file, predict, quantized)


def infer_litert(work):
    """Predicts in LiteRT with XNNPACK; int8 is LiteRT's post-training."""
    from ai_edge_litert import interpreter

    from keras_resnet.data import views
    from keras_resnet.serving import litert_files
    from keras_resnet.serving import metadata

    probabilities, spec = _folded(work)
    labels = list(map(str, range(work.spec().classes)))
    about = metadata.Metadata(labels, views.photo_preprocessing(spec.shape[1]))

    def predict(calibration):
        with tempfile.TemporaryDirectory() as directory:
            path = os.path.join(directory, "network.tflite")
            litert_files.write(path, probabilities, spec, about, calibration)
            with open(path, "rb") as file:
                content = file.read()
        network = interpreter.Interpreter(
            model_content=content,
            num_threads=len(os.sched_getaffinity(0)),
        )
        (image,), (output,) = (
            network.get_input_details(),
            network.get_output_details(),
        )
        shape = [work.batch_size, *spec.shape[1:]]
        network.resize_tensor_input(image["index"], shape)
        network.allocate_tensors()

        def run(images):
            network.set_tensor(image["index"], images)
            network.invoke()
            return network.get_tensor(output["index"])

        return run

    file = _File(None, lambda images: images)
    return _step(work, file, predict, lambda _, images: images)


def _step(work, file: _File, predict, quantized):
    """Returns the step of a work and its facts.

    Args:
        work: Work to measure.
        file: The network in float32.
        predict: Function from a network to its prediction.
        quantized: Function from a network and images to the int8 network.
    """
    images = file.prepare(prepared.pictures(work, work.batch_size))
    if work.dtype != "int8":
        network = predict(file.model)
        return lambda: network(images), {}
    compared = file.prepare(prepared.pictures(work, _COMPARED, seed=1))
    expected = _classes(work, predict(file.model), compared)
    calibration = file.prepare(prepared.pictures(work, _CALIBRATION, seed=2))
    network = predict(quantized(file.model, calibration))
    found = _classes(work, network, compared)
    agreement = float(np.mean(found == expected))
    return lambda: network(images), {"agreement": agreement}


def _classes(work, predict: Predict, images: np.ndarray) -> np.ndarray:
    starts = range(0, len(images), work.batch_size)
    batches = [images[i : i + work.batch_size] for i in starts]
    return np.concatenate([predict(batch).argmax(-1) for batch in batches])


def _file(work, is_ours: bool) -> _File:
    return _our_file(work) if is_ours else _torch_file(work)


def _our_file(work) -> _File:
    from keras_resnet.serving import onnx_files

    return _File(onnx_files.convert(*_folded(work)), lambda images: images)


def _folded(work):
    """Returns our network with normalization, and the spec of its input."""
    from keras_resnet.serving import folding

    model, preprocessing = _network(work)
    folded = folding.fold(model)
    return lambda images: folded(preprocessing(images)), _image(preprocessing)


def _network(work):
    """Returns our network and its preprocessing."""
    import keras

    import keras_resnet
    from keras_resnet.data import views
    from keras_resnet.serving import folding

    model = prepared.as_trained(keras_resnet.resnet(work.spec()))
    preprocessing = views.photo_preprocessing(work.spec().image_size)
    if work.dtype == "int8":
        layer = model.get_layer("predictions")
        features = keras.Model(model.input, layer.input)
        pictures = preprocessing(prepared.pictures(work, _CALIBRATION))
        logits = folding.fold(features)(pictures) @ layer.kernel.value
        scale = np.std(logits - np.mean(logits, 0))
        layer.kernel.assign(layer.kernel / scale)
        layer.bias.assign(-np.mean(logits, 0) / scale)
    return model, preprocessing


def _image(preprocessing):
    import tensorflow as tf

    shape = [None, *preprocessing.image_shape]
    return tf.TensorSpec(shape, tf.uint8, "images")


def _torch_file(work) -> _File:
    import warnings

    import onnx
    import torch

    from keras_resnet.data import views

    preprocessing = views.photo_preprocessing(work.spec().image_size)

    def prepare(images):
        images = preprocessing(images).numpy()
        return np.ascontiguousarray(np.moveaxis(images, -1, 1))

    model, images, _ = prepared.torch_network(work)
    model.eval()
    if work.dtype == "int8":
        pictures = prepare(prepared.pictures(work, _CALIBRATION))
        with torch.inference_mode():
            logits = model(torch.from_numpy(pictures))
        with torch.no_grad():
            centre = logits.mean(0) - model[-1].bias
            scale = (logits - logits.mean(0)).std()
            model[-1].weight /= scale
            model[-1].bias.copy_(-centre / scale)
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model,
            images.contiguous(),
            file,
            input_names=["images"],
            dynamic_axes={"images": {0: "batch"}},
            dynamo=False,
        )
    return _File(onnx.load_from_string(file.getvalue()), prepare)
