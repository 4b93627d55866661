"""Exports a trained network as a SavedModel for TensorFlow Serving.

EXPORT_DIR/<version>/ has four signatures, which include the preprocessing:

    serving_default  image_bytes: string [batch], encoded images
                     -> probabilities: float32 [batch, classes]
                        classes: string [batch], the most probable label
                        labels: string [batch, top], the best labels
                        scores: float32 [batch, top], their probabilities
                        status: string [batch], empty, or the reason why the
                        image was rejected (`serving.isolation`)
    images           images: uint8 [batch, height, width, channels]
                     -> the same outputs
    features         images -> features: float32 [batch, channels], the
                     pooled features before the classifier
    classify         inputs: string [batch], tf.train.Example with the feature
                     image/encoded -> classes: string [batch, classes], all
                     labels; scores: float32 [batch, classes], all zero for a
                     rejected image

The version also has `assets/labels.txt`, with one label a line in the order of
`probabilities`; `assets.extra/tf_serving_warmup_requests` (`serving.warmup`);
files for other runtimes on request (`serving.formats`); and `model_card.json`
(`serving.model_card`). The network is folded into constants
(`serving.folding`), and for int8 also quantized (`serving.quantization`).
"""

import os
from collections.abc import Callable
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from keras_resnet import training
from keras_resnet.data import limits
from keras_resnet.data import views
from keras_resnet.serving import exportable
from keras_resnet.serving import folding
from keras_resnet.serving import formats as formats_lib
from keras_resnet.serving import int8_kernels
from keras_resnet.serving import metadata
from keras_resnet.serving import model_card
from keras_resnet.serving import quantization
from keras_resnet.serving import saved_model_paths
from keras_resnet.serving import signatures
from keras_resnet.serving import verification
from keras_resnet.serving import versions
from keras_resnet.serving import warmup

training.require_backend(__name__, "tensorflow")


def export(
    model: keras.Model,
    preprocessing: views.Preprocessing,
    labels: Sequence[str],
    export_dir: str | os.PathLike,
    version: int | None = None,
    *,
    precision: str = "float32",
    formats: Sequence[str] = ("saved_model",),
    max_pixels: int = limits.MAX_PIXELS,
    top: int = 5,
    exif: bool = True,
    scaled_jpeg: bool = False,
    images: verification.Images | None = None,
    warmup_batch_sizes: Sequence[int] = (1,),
    about: dict[str, Any] | None = None,
) -> str:
    """Writes, verifies and publishes EXPORT_DIR/<version>.

    The version appears atomically. Before it does, its signatures run through
    TensorFlow's C++ loader, and other formats through their own runtimes.
    Their predictions must equal the model's (`verification.TOLERANCES`). If
    the images have labels, the model's error on them must also equal the error
    that the training recorded.

    Args:
        model: A network of `keras_resnet.resnet` with its classifier, or a
            functional or sequential model that contains one. It has one input
            of preprocessed images, a global pooling whose output becomes the
            features, and one output of probabilities. Folded layers compute in
            `precision`, regardless of their dtype policy.
        preprocessing: Preprocessing between an image and the model.
        labels: One line of text for each class.
        export_dir: Directory of the versions; created if it does not exist.
        version: None for one more than the highest existing version.
        precision: `"float32"`; `"bfloat16"` for kernels and activations up to
            the pool: half the size, faster on processors with bfloat16 units
            (AMX; AVX512_BF16 of AMD), slower on others; `"int8"` for kernels,
            activations and sums: a quarter of the size, for TensorFlow on x86
            (`int8_kernels`); or `"int8_weights"` for kernels alone, which
            TensorFlow converts to float32 when it loads them.
        formats: `"litert"`, `"onnx"` and `"openvino"` in addition to the
            SavedModel; see `formats.FORMATS`. Without onnxruntime, the check
            of an ONNX file is left out, and the card states this.
        max_pixels: Encoded images with more pixels are rejected before they
            are decoded.
        top: Number of the best labels in the outputs `labels` and `scores`;
            at most the number of classes is used.
        exif: Whether encoded images are turned as their EXIF data state.
        scaled_jpeg: Whether large JPEG files are decoded at a smaller size,
            which is faster and changes the views slightly.
        images: Images of the verification; None for the bundled digits. For
            int8 they must have a `calibration`.
        warmup_batch_sizes: Batch sizes of the server's warm-up requests.
        about: Further entries of the model card, such as the recipe.

    Returns:
        The path of the new version.

    Raises:
        FileExistsError: If `version` exists.
        folding.ModelError: If the model is of another kind.
        int8_kernels.UnsupportedError: If TensorFlow has no int8 kernels here.
        ValueError: If `export_dir` is not a local directory, if the labels,
            the preprocessing and the model do not match, if the precision or a
            format is unknown, if int8 has no calibration, or if `top` is
            below 1.
        verification.DisagreementError: If the exported predictions differ from
            the model's, or the model's error from the recorded one.
    """
    _check_options(precision, formats, warmup_batch_sizes, top)
    versions.check_export_dir(export_dir)
    exportable.check_model(model)
    exportable.check_labels(model, labels)
    exportable.check_preprocessing(model, preprocessing)
    exportable.check_activations(
        model, preprocessing.image_shape, verification.BATCH_SIZE
    )
    images = images or verification.bundled_images(preprocessing)
    network = exportable.with_features(model)
    prepare = exportable.input_function(model, preprocessing)
    reference = verification.reference(
        model, network, prepare, images, precision
    )
    folded = _folded(network, prepare, precision, images)

    def write(directory: str) -> None:
        signatures.write_saved_model(
            directory,
            folded,
            preprocessing,
            prepare,
            labels,
            max_pixels,
            top,
            exif,
            scaled_jpeg,
        )
        requests = verification.requests(
            network, preprocessing, prepare, reference
        )
        checks = {
            "saved_model": verification.check_saved_model(
                directory, requests, labels, reference
            )
        }
        for name in [n for n in formats if n in formats_lib.FORMATS]:
            checks[name] = _write_format(
                name,
                directory,
                model,
                prepare,
                metadata.Metadata(labels, preprocessing),
                images.calibration if precision == "int8" else None,
                reference,
            )
        name = os.path.basename(os.path.abspath(export_dir))
        warmup.write(directory, name, images.views[0], warmup_batch_sizes)
        card = {
            **model_card.describe(model, preprocessing, labels, about or {}),
            **images.recorded_entry(),
            "precision": precision,
            **_int8_entry(precision, images),
            "input": _input_entry(exif, scaled_jpeg),
            "max_pixels": max_pixels,
            "top": min(top, len(labels)),
            "checked_on": images.source,
            "checks": checks,
        }
        model_card.write(directory, card)

    return versions.publish(export_dir, _without_wildcards(write), version)


def _check_options(
    precision: str,
    formats: Sequence[str],
    warmup_batch_sizes: Sequence[int],
    top: int,
) -> None:
    """Raises a ValueError for options that no model can have."""
    if precision not in verification.TOLERANCES:
        raise ValueError(
            f"precision must be one of {tuple(verification.TOLERANCES)}, "
            f"received {precision!r}"
        )
    formats_lib.check_formats(tuple(formats), precision)
    warmup.check_batch_sizes(warmup_batch_sizes)
    if top < 1:
        raise ValueError(f"top must be 1 or more, received {top}")


def _without_wildcards(write: Callable[[str], None]) -> Callable[[str], None]:
    def write_at_link(directory: str) -> None:
        with saved_model_paths.without_wildcards(directory) as path:
            write(path)

    return write_at_link


def _folded(
    network: keras.Model,
    prepare: signatures.Function,
    precision: str,
    images: verification.Images,
) -> signatures.Function:
    """The inference function of the precision, over constants."""
    if precision != "int8":
        return folding.fold(network, precision)
    if images.calibration is None or not len(images.calibration):
        raise ValueError(
            "int8 is calibrated on real images: images must have a calibration "
            "of the kind that the network was trained on"
        )
    return quantization.quantize(
        network, np.asarray(prepare(images.calibration))
    )


def _input_entry(exif: bool, scaled_jpeg: bool) -> dict[str, Any]:
    """The entry of the model card for encoded images."""
    return {
        "formats": ["JPEG", "PNG", "GIF", "BMP", "WebP"],
        "exif_orientation": "applied" if exif else "ignored",
        "scaled_jpeg": scaled_jpeg,
    }


def _int8_entry(precision: str, images: verification.Images) -> dict[str, Any]:
    """The entry of the model card for int8."""
    if precision != "int8" or images.calibration is None:
        return {}
    return {
        "int8": {
            **int8_kernels.REQUIREMENTS,
            "calibration_images": len(images.calibration),
        }
    }


def _write_format(
    name: str,
    directory: str,
    model: keras.Model,
    prepare: signatures.Function,
    about: metadata.Metadata,
    calibration: np.ndarray | None,
    reference: verification.Reference,
) -> dict[str, Any]:
    """Writes a file of another format; returns its entry on the card."""
    # The converters make their own int8 of float32.
    folded = folding.fold(model)

    def probabilities(images):
        (output,) = keras.tree.flatten(folded(prepare(images)))
        return output

    try:
        formats_lib.write(
            name,
            directory,
            probabilities,
            signatures.images_spec(about.preprocessing),
            about,
            calibration,
        )
        predict = formats_lib.load(name, directory)
    except Exception as error:  # the converters raise a dozen kinds
        (line, *_) = str(error).splitlines() or [type(error).__name__]
        raise folding.ModelError(
            f"{name} must support every operation of the model, received "
            f"{line}: leave {name} out of the formats"
        ) from error
    if predict is None:
        return {"not_checked": f"needs {formats_lib.FORMATS[name].runtime}"}
    found = verification.in_batches(predict, reference.views)
    return verification.check_classes(name, found, reference)
