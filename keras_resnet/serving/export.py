"""A trained network as a SavedModel that TensorFlow Serving loads.

EXPORT_DIR/<version>/ has four signatures, the preprocessing inside:

    serving_default  image_bytes: string [batch], encoded images
                     -> probabilities: float32 [batch, classes]
                        classes: string [batch], the most probable label
    images           images: uint8 [batch, height, width, channels]
                     -> the same
    features         images -> features: float32 [batch, channels], the
                     average over all positions that the classifier sees
    classify         inputs: string [batch], tf.train.Example with the feature
                     image/encoded -> classes: string [batch, classes], all
                     labels; scores: float32 [batch, classes]

and `assets/labels.txt`, one label a line in the order of `probabilities`;
`assets.extra/tf_serving_warmup_requests` (`serving.warmup`); on request
`model.tflite` and `model.onnx` (`serving.formats`); `model_card.json`.
The network is folded (`serving.folding`) and has no variables.
"""

import contextlib
import hashlib
import importlib.metadata
import json
import os
import platform
import tempfile
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
from typing import Any
from typing import NamedTuple

import keras
import numpy as np
import tensorflow as tf

import keras_resnet
from keras_resnet import training
from keras_resnet.analysis import complexity
from keras_resnet.data import datasets
from keras_resnet.data import limits
from keras_resnet.data import views
from keras_resnet.serving import folding
from keras_resnet.serving import formats as formats_lib
from keras_resnet.serving import versions
from keras_resnet.serving import warmup
from keras_resnet.weights import shipped

training.require_backend(__name__, "tensorflow")

CARD = "model_card.json"


class DisagreementError(ArithmeticError):
    """The exported files differ from the model.

    Or the model's error differs from the one that its training recorded.
    """


class Tolerance(NamedTuple):
    """How far the answers of a precision may be from the model's.

    Attributes:
        features: the largest difference, as a share of the largest feature.
        probabilities: likewise. What rounding does to the features, a
            classifier may magnify: 1.0 shows what is no number at all.
        tie: a class is the model's too if the model gives it as much as its
            best one but for this.
        share: of the images whose class must be the model's.
    """

    features: float
    probabilities: float
    tie: float
    share: float


TOLERANCES = {
    "float32": Tolerance(1e-4, 1e-4, 1e-4, 1.0),
    "bfloat16": Tolerance(0.1, 1.0, 0.05, 0.97),
    "int8": Tolerance(0.25, 1.0, 0.05, 0.95),
}

_BATCH_SIZE = 32


class Recorded(NamedTuple):
    """The test error that the training has recorded of the same weights.

    Attributes:
        top1_error: in percent.
        images: the number of test images that it was measured on.
        source: where it is recorded, in words.
    """

    top1_error: float
    images: int
    source: str


class Images(NamedTuple):
    """Images that an export is checked with.

    Attributes:
        views: as the network would see them, but uint8; [count, height, width,
            channels].
        labels: the number of the class of each, or None where they are not of
            the network's classes: its accuracy is not checked then.
        calibration: other views, whose activations int8 is made for, or None.
        source: what they are, in words.
        recorded: the error that the training has found on all test images, of
            which these are a random sample, or None.
    """

    views: np.ndarray
    labels: np.ndarray | None = None
    calibration: np.ndarray | None = None
    source: str = "given"
    recorded: Recorded | None = None


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
    images: Images | None = None,
    warmup_batch_sizes: Sequence[int] = (1,),
    about: dict[str, Any] | None = None,
) -> str:
    """EXPORT_DIR/<version>, which appears at once, whole and checked.

    Before it appears, its signatures are asked through the loader that reads
    only what a server reads, other formats through their own runtimes, and
    must answer images as the model itself does (`TOLERANCES`). Images with
    labels show the model's error too, which must be the recorded one.

    Args:
        model: a network of `keras_resnet.resnet`, whole, or a functional or
            sequential model that has one inside (`folding.fold`): one input,
            preprocessed images; a global pooling, whose answer are the
            features; one output, probabilities. Layers that are folded compute
            in `precision`, whatever their dtype policy is.
        preprocessing: what stands between an image and the model.
        labels: one line of text for each class.
        export_dir: where the versions are; made where there is none.
        version: None: one more than the highest that stands there.
        precision: `"float32"`; `"bfloat16"` for kernels and activations up to
            the pool: half the size, and faster on processors whose matrix or
            vector units have it (AMX; AVX512_BF16 of AMD), slower on others;
            `"int8"` for kernels, a quarter of the size, of which TensorFlow
            makes float32 when it loads them, and LiteRT computes in int8.
        formats: `"litert"` and `"onnx"` beside the SavedModel, which is always
            written; see `formats.PRECISIONS`.
        max_pixels: encoded images with more are refused before decoding.
        images: None: the bundled digits, which stand in for images of the
            network's kind. For int8 in LiteRT they must have a `calibration`.
        warmup_batch_sizes: of the requests that a server warms up with.
        about: what the model card says beside what is found here, such as the
            recipe.

    Returns:
        The path of the new version.

    Raises:
        FileExistsError: `version` stands there already.
        folding.ModelError: the model is not of the kind above.
        ValueError: `export_dir` is no local directory, the labels, the
            preprocessing and the model do not belong together, or the
            precision or a format is unknown.
        DisagreementError: what was written answers otherwise than the model,
            or the model's error on `images` contradicts the recorded one.
    """
    formats_lib.check(tuple(formats), precision)
    warmup.check(warmup_batch_sizes)
    versions.check(export_dir)
    check_model(model)
    labels = _checked_labels(labels, model)
    _check_input(model, preprocessing)
    network = _with_features(model)
    folded = folding.fold(network, precision)
    prepare = _prepared(model, preprocessing)
    images = images or bundled_images(preprocessing)
    if "litert" in formats and precision == "int8":
        _check_calibration(images)
    expected = _answers(network, prepare, images.views)
    _check_is_the_model(model, prepare, images.views, expected)
    is_exact = model.outputs[0].dtype in ("float32", "float64")
    _check_probabilities(expected["probabilities"], 1e-3 if is_exact else 0.02)
    _check_recorded(expected["probabilities"], images)
    tolerance = _tolerance(model, precision)

    def write(directory: str) -> None:
        _write(directory, folded, preprocessing, prepare, labels, max_pixels)
        examples = _examples(
            images.views, expected, network, preprocessing, prepare
        )
        checks = {
            "saved_model": _check_saved_model(
                directory, examples, expected, images, labels, tolerance
            )
        }
        for name in [n for n in formats if n in formats_lib.FILES]:
            ask = _write_format(
                name,
                directory,
                model,
                prepare,
                _images_spec(preprocessing),
                images.calibration if precision == "int8" else None,
            )
            found = _in_batches(ask, images.views)
            checks[name] = _check_classes(
                name,
                expected["probabilities"],
                found,
                images.labels,
                tolerance,
            )
        warmup.write(
            directory,
            os.path.basename(os.path.abspath(export_dir)),
            images.views[0],
            warmup_batch_sizes,
        )
        card = {
            **_card(model, preprocessing, labels, about or {}),
            **_recorded_on_card(images),
            "precision": precision,
            "max_pixels": max_pixels,
            "checked_on": images.source,
            "checks": checks,
            "sha256": _sha256(directory),
        }
        with open(os.path.join(directory, CARD), "w", encoding="utf-8") as file:
            file.write(shipped.card_text(card))

    return versions.publish(export_dir, write, version)


def read_card(directory: str | os.PathLike) -> dict[str, Any]:
    """The model card of a version."""
    with open(os.path.join(directory, CARD), encoding="utf-8") as file:
        return json.load(file)


def bundled_images(
    preprocessing: views.Preprocessing, count: int = 64
) -> Images:
    """The first bundled test digits, as a network of any size sees them.

    They stand in for images of the network's own kind.
    """
    digits, _ = datasets.load("digits").test_images(count)
    views = np.stack([preprocessing.view(digit).numpy() for digit in digits])
    return Images(views, source=f"{count} stand-in images (bundled digits)")


def check_model(model: keras.Model) -> None:
    """Says what kind of model can be exported.

    Raises:
        folding.ModelError: it is of another kind.
    """
    graph = folding.graph(model)
    counts = len(graph.inputs), len(graph.outputs)
    if counts != (1, 1):
        raise folding.ModelError(
            "the model must have one input, images, and one output, "
            f"probabilities; received one with {counts[0]} and {counts[1]}"
        )
    (image,), (output,) = graph.inputs, graph.outputs
    if len(image.shape) != 4:
        raise folding.ModelError(
            "the model must take images of the shape [batch, height, width, "
            f"channels], received {image.shape}: put a keras.layers.Reshape in "
            "front of it in a model that does"
        )
    batch, height, width, channels = image.shape
    if batch is not None:
        raise folding.ModelError(
            f"the model must take batches of any size, received {image.shape}: "
            "build it again without a batch size"
        )
    if None not in (height, width) and height != width:
        raise folding.ModelError(
            "the model must take square images, received a height of "
            f"{height} and a width of {width}"
        )
    if channels not in (1, 3):
        raise folding.ModelError(
            "the model's channels must be 1 or 3 (the last axis of its input), "
            f"received {image.shape}"
        )
    if len(output.shape) != 2 or (output.shape[-1] or 0) < 2:
        raise folding.ModelError(
            "the model must have one output for each class, [batch, classes] "
            f"with 2 classes or more, received {output.shape}; of a single "
            "probability p, Concatenate()([1.0 - p, p]) makes two"
        )


def _checked_labels(labels: Sequence[str], model: keras.Model) -> list[str]:
    classes = model.outputs[0].shape[-1]
    if len(labels) != classes:
        raise ValueError(
            f"labels must be as many as the model's classes ({classes}), "
            f"received {len(labels)}"
        )
    for label in labels:
        if label.splitlines() != [label]:
            raise ValueError(f"a label must be one line, received {label!r}")
    return list(labels)


def _check_input(model, preprocessing) -> None:
    wanted, given = model.inputs[0].shape[1:], preprocessing.image_shape
    if any(w not in (None, g) for w, g in zip(wanted, given, strict=True)):
        raise ValueError(
            f"the preprocessing must give the images that the model takes, "
            f"{wanted}, received one that gives {given}"
        )
    dtype = model.inputs[0].dtype
    if not _is_float(dtype) and not preprocessing.is_identity:
        raise ValueError(
            f"the model takes images of {dtype}, so the preprocessing must "
            "leave the pixels as they are, 0 to 255; received one that does not"
        )


def _prepared(model, preprocessing) -> Callable[[Any], tf.Tensor]:
    """What makes the model's input of views."""
    dtype = model.inputs[0].dtype
    if _is_float(dtype):
        return preprocessing
    return lambda views: tf.cast(tf.round(preprocessing(views)), dtype)


def _is_float(dtype: str) -> bool:
    return tf.as_dtype(dtype).is_floating


def _tolerance(model, precision: str) -> Tolerance:
    """That of the precision, or of the model's own, whichever is greater."""
    found = {precision}
    for layer in model._flatten_layers():
        if layer.compute_dtype in ("bfloat16", "float16"):
            found.add("bfloat16")
        if getattr(layer, "quantization_mode", None):
            found.add("int8")
    return next(
        tolerance
        for name, tolerance in reversed(TOLERANCES.items())
        if name in found
    )


class _Example(NamedTuple):
    """What a signature is asked and what it must answer."""

    signature: str
    inputs: dict[str, np.ndarray]
    output: str
    expected: np.ndarray


def _answers(network, prepare, views) -> dict[str, np.ndarray]:
    """What the model itself says of views."""
    found = [
        network(prepare(batch), training=False) for batch in _batches(views)
    ]
    features, probabilities = (
        np.concatenate(parts).astype("float32")
        for parts in zip(*found, strict=True)
    )
    return {"features": features, "probabilities": probabilities}


def _check_is_the_model(model, prepare, views, expected) -> None:
    """Compares the network that is folded with the model that was given."""
    (batch, *_) = _batches(views)
    inputs = folding.packed(model, prepare(batch))
    (answer,) = keras.tree.flatten(model(inputs, training=False))
    found = np.asarray(answer, "float32")
    if not np.allclose(
        found, expected["probabilities"][: len(found)], 1e-4, equal_nan=True
    ):
        raise DisagreementError(
            "the model must give the same images the same probabilities every "
            "time, received others; nothing was exported. Take layers that "
            "are random at inference out of it"
        )


def _batches(views: np.ndarray) -> list[np.ndarray]:
    return np.split(views, range(_BATCH_SIZE, len(views), _BATCH_SIZE))


def _in_batches(ask: formats_lib.Function, views: np.ndarray) -> np.ndarray:
    return np.concatenate([ask(batch) for batch in _batches(views)])


def _examples(
    views, expected, network, preprocessing, prepare
) -> list[_Example]:
    """A few views for every signature."""
    views = views[:4]
    encoded = [tf.io.encode_png(view).numpy() for view in views]
    decoded = np.stack(
        [preprocessing.decode(tf.constant(image)) for image in encoded]
    )
    of_decoded = _answers(network, prepare, decoded)["probabilities"]
    serialized = [
        tf.train.Example(
            features=tf.train.Features(
                feature={
                    "image/encoded": tf.train.Feature(
                        bytes_list=tf.train.BytesList(value=[image])
                    )
                }
            )
        ).SerializeToString()
        for image in encoded
    ]
    return [
        _Example(
            "serving_default",
            {"image_bytes": np.array(encoded, object)},
            "probabilities",
            of_decoded,
        ),
        _Example(
            "classify",
            {"inputs": np.array(serialized, object)},
            "scores",
            of_decoded,
        ),
        _Example(
            "images",
            {"images": views},
            "probabilities",
            expected["probabilities"][: len(views)],
        ),
        _Example(
            "features",
            {"images": views},
            "features",
            expected["features"][: len(views)],
        ),
    ]


def _check_probabilities(outputs: np.ndarray, tolerance: float) -> None:
    sums = outputs.sum(-1)
    if not (np.all(outputs >= 0) and np.allclose(sums, 1.0, atol=tolerance)):
        raise folding.ModelError(
            "the model's outputs must be probabilities (none negative, their "
            'sum 1), as classifier_activation="softmax" gives; received '
            f"outputs from {outputs.min():.4g} to {outputs.max():.4g} with "
            f"sum {sums[0]:.4g}"
        )


def _check_recorded(probabilities: np.ndarray, images: Images) -> None:
    """Raises if the model's errors contradict those that training recorded.

    A sample without replacement has a number of errors that is distributed
    hypergeometrically; 4 standard deviations are allowed, and 1% of the
    sample, since training may have computed in another precision.
    """
    if images.labels is None or images.recorded is None:
        return
    recorded, count = images.recorded, len(images.labels)
    errors = int(np.sum(probabilities.argmax(-1) != images.labels))
    share = recorded.top1_error / 100.0
    left_out = max(recorded.images - count, 0) / max(recorded.images - 1, 1)
    deviation = np.sqrt(count * share * (1.0 - share) * left_out)
    if abs(errors - count * share) > 4.0 * deviation + max(0.01 * count, 2.0):
        raise DisagreementError(
            f"the network's error on {images.source} must be that of its "
            f"training, received {100.0 * errors / count:.2f}%, where "
            f"{recorded.source} has {recorded.top1_error:.2f}% of "
            f"{recorded.images:,} images; nothing was exported. The weights, "
            "the test images or the preprocessing are others than in training: "
            "measure its error with the evaluate program"
        )


def _recorded_on_card(images: Images) -> dict[str, Any]:
    if images.labels is None or images.recorded is None:
        return {}
    return {"recorded": images.recorded._asdict()}


def _with_features(model: keras.Model) -> keras.Model:
    """Images -> (features, probabilities)."""
    for candidate in (model, _without_nesting(model)):
        pooled = [
            node.outputs[0]
            for node in folding.nodes(candidate)
            if _is_global_pooling(node.operation)
            and len(node.outputs[0].shape) == 2
        ]
        if pooled:
            (image,), (output,) = candidate.inputs, candidate.outputs
            return keras.Model(image, [pooled[0], output])
    names = [layer.name for layer in model.layers[-3:]]
    raise folding.ModelError(
        "the model must have a global pooling before its classifier, whose "
        'answer are the features: the layer "pool" of a network of '
        "keras_resnet, or of one inside that was built with pooling="
        '"avg", or a keras.layers.GlobalAveragePooling2D; received one '
        f"whose last layers are {names}"
    )


def _without_nesting(model: keras.Model) -> keras.Model:
    """The same layers, with those of models inside as its own."""

    def called(operation):
        if not isinstance(operation, keras.Model):
            return operation
        try:
            graph = folding.graph(operation)
        except folding.ModelError:  # of a class of its own
            return operation
        return lambda inputs, **_: run(graph, inputs)

    def run(graph, inputs):
        inputs = [
            x if x.dtype == like.dtype else keras.ops.cast(x, like.dtype)
            for x, like in zip(
                keras.tree.flatten(inputs), graph.inputs, strict=True
            )
        ]
        return graph._run_through_graph(inputs, called)

    (image,) = model.inputs
    image = keras.Input(image.shape[1:], dtype=image.dtype)
    return keras.Model(image, run(folding.graph(model), image))


def _is_global_pooling(operation) -> bool:
    """Whether an operation is one, or a model that ends with one."""
    if isinstance(operation, keras.Model):
        try:
            (output, *_) = folding.graph(operation).outputs
        except folding.ModelError:  # of a class of its own
            return False
        return _is_global_pooling(output._keras_history.operation)
    return isinstance(
        operation,
        (
            keras.layers.GlobalAveragePooling2D,
            keras.layers.GlobalMaxPooling2D,
        ),
    )


def _check_calibration(images: Images) -> None:
    if images.calibration is None or not len(images.calibration):
        raise ValueError(
            "int8 in LiteRT is made for the activations of real images: give "
            "images of the kind that the network was trained on"
        )


def _write(
    directory, folded, preprocessing, prepare, labels, max_pixels
) -> None:
    view = tf.TensorSpec(preprocessing.image_shape, tf.uint8)
    encoded = tf.TensorSpec([None], tf.string, name="image_bytes")
    serialized = tf.TensorSpec([None], tf.string, name="inputs")
    decoded = _images_spec(preprocessing)

    # One graph of the network, which all signatures call.
    @tf.function(input_signature=[decoded], autograph=False)
    def answer(images):
        return folded(prepare(images))

    _check_is_constant(answer)

    def features(images):
        return {"features": answer(images)[0]}

    def images(images):
        _, probabilities = answer(images)
        best = table.lookup(tf.argmax(probabilities, axis=-1))
        return {"probabilities": probabilities, "classes": best}

    @tf.function(autograph=False)
    def decode(image_bytes):
        return limits.map_images(
            preprocessing.decode, image_bytes, view, max_pixels
        )

    def serving_default(image_bytes):
        return images(decode(image_bytes))

    def classify(inputs):
        feature = tf.io.FixedLenFeature([], tf.string)
        parsed = tf.io.parse_example(inputs, {"image/encoded": feature})
        _, scores = answer(decode(parsed["image/encoded"]))
        all_labels = table.lookup(tf.range(len(labels), dtype=tf.int64))
        classes = tf.tile(all_labels[None], [tf.shape(scores)[0], 1])
        return {"classes": classes, "scores": scores}

    with tempfile.TemporaryDirectory() as scratch:
        table = _label_table(os.path.join(scratch, "labels.txt"), labels)
        module = tf.Module()
        module.table = table  # a module saves what it has
        signatures = {
            serving_default: encoded,
            images: decoded,
            features: decoded,
            classify: serialized,
        }
        # What is left of the Keras model are constants: TensorFlow Serving's
        # loader would not find its variables.
        tf.saved_model.save(
            module,
            directory,
            {
                f.__name__: tf.function(f, [spec], autograph=False)
                for f, spec in signatures.items()
            },
        )
    # TensorFlow calls every signature "predict"; Classify wants its own name.
    with formats_lib.without_notes():
        v1 = tf.compat.v1.saved_model
        updater = v1.signature_def_utils.MethodNameUpdater(directory)
        updater.replace_method_name(
            "classify", v1.signature_constants.CLASSIFY_METHOD_NAME
        )
        updater.save()


def _images_spec(preprocessing) -> tf.TensorSpec:
    shape = [None, *preprocessing.image_shape]
    return tf.TensorSpec(shape, tf.uint8, name="images")


def _check_is_constant(answer) -> None:
    """Raises if a graph reads state, which the loader of a server misses."""
    captured = answer.get_concrete_function().captured_inputs
    if any(tensor.dtype in (tf.resource, tf.variant) for tensor in captured):
        raise folding.ModelError(
            "the model must read only the weights of its layers, received "
            "one that reads other variables or tables, such as a tf.Variable "
            "in a Lambda, or a vocabulary"
        )


def _write_format(
    name, directory, model, prepare, spec, calibration
) -> formats_lib.Function:
    """Writes one more format; returns what asks the file."""
    # LiteRT makes its own int8 of float32.
    folded = folding.fold(model)
    path = formats_lib.path(directory, name)

    def answer(images):
        (probabilities,) = keras.tree.flatten(folded(prepare(images)))
        return probabilities

    try:
        if name == "onnx":
            formats_lib.write_onnx(path, answer, spec)
            return formats_lib.onnx(path)
        formats_lib.write_litert(path, answer, spec, calibration)
        return formats_lib.litert(path)
    except Exception as error:  # the converters have a dozen kinds
        (line, *_) = str(error).splitlines() or [type(error).__name__]
        raise folding.ModelError(
            f"{name} must support every operation of the model, received "
            f"{line}: leave {name} out of the formats"
        ) from error


def _label_table(path: str, labels: list[str]) -> tf.lookup.StaticHashTable:
    """The label of each class; its file becomes an asset of the SavedModel."""
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        file.writelines(f"{label}\n" for label in labels)
    return tf.lookup.StaticHashTable(
        tf.lookup.TextFileInitializer(
            path,
            key_dtype=tf.int64,
            key_index=tf.lookup.TextFileIndex.LINE_NUMBER,
            value_dtype=tf.string,
            value_index=tf.lookup.TextFileIndex.WHOLE_LINE,
        ),
        default_value="",
    )


def _check_saved_model(
    directory, examples, expected, images, labels, tolerance
) -> dict[str, Any]:
    with _loaded(directory) as ask:
        for signature, inputs, output, wanted in examples:
            answers = ask(signature, inputs)
            allowed = (
                tolerance.features
                if output == "features"
                else tolerance.probabilities
            )
            error = np.max(np.abs(answers[output] - wanted))
            is_right = error <= allowed * np.max(np.abs(wanted))
            if is_right and signature in ("serving_default", "images"):
                best = [labels[i] for i in answers[output].argmax(-1)]
                is_right = [c.decode() for c in answers["classes"]] == best
            if is_right and signature == "classify":
                is_right = all(
                    [label.decode() for label in row] == labels
                    for row in answers["classes"]
                )
            if not is_right:
                raise DisagreementError(
                    f"the exported signature {signature} must answer as the "
                    f"model does, received {output} up to {error:.2g} apart "
                    f"(of {len(wanted)} images); nothing was exported. A layer "
                    "that is random, that rounds to whole numbers, or that is "
                    "another in a graph than in Python, does so: take it out "
                    "of the model"
                )
        found = _in_batches(
            lambda views: ask("images", {"images": views})["probabilities"],
            images.views,
        )
    return _check_classes(
        "saved_model",
        expected["probabilities"],
        found,
        images.labels,
        tolerance,
    )


def _check_classes(name, expected, found, labels, tolerance) -> dict[str, Any]:
    """How the classes that a format finds agree with the model's.

    Raises:
        DisagreementError: less than the tolerance allows.
    """
    best = found.argmax(-1)
    same = best == expected.argmax(-1)
    given = expected[range(len(best)), best]
    share = np.mean(same | (given >= expected.max(-1) - tolerance.tie))
    difference = float(np.max(np.abs(found - expected)))
    is_close = difference <= tolerance.probabilities  # not so of nan
    if not (is_close and share >= tolerance.share):
        raise DisagreementError(
            f"{name} must answer as the model does for "
            f"{tolerance.share:.0%} of {len(best)} images, received "
            f"{share:.1%}, probabilities up to {difference:.2g} apart; nothing "
            "was exported"
        )
    result = {
        "images": len(best),
        "same_class": int(np.sum(same)),
        "largest_difference": difference,
    }
    if labels is not None:
        errors = int(np.sum(best != labels))
        result["top1_errors"] = errors
        result["top1_error"] = 100.0 * errors / len(best)
        result["chance_error"] = _chance_error(labels, found.shape[-1])
    return result


def _chance_error(labels: np.ndarray, classes: int) -> float:
    """The error of always predicting the most frequent class, in percent."""
    counts = np.bincount(labels, minlength=classes)
    return 100.0 * (1.0 - float(counts.max()) / len(labels))


def is_near_chance(check: dict[str, Any]) -> bool:
    """Whether the errors of a check on the card may be those of chance.

    They are at least the mean less 3 standard deviations of the errors of
    always predicting the most frequent class.
    """
    chance = check["chance_error"] / 100.0
    deviation = np.sqrt(check["images"] * chance * (1.0 - chance))
    return bool(
        check["top1_errors"] >= check["images"] * chance - 3.0 * deviation
    )


def _card(model, preprocessing, labels, about) -> dict[str, Any]:
    """What can be said of a network before it is written."""
    try:
        counts = complexity.complexity(model, preprocessing.image_shape)
    except ValueError:  # of a layer whose operations are not known
        counts = {
            "parameters": sum(
                int(np.prod(weight.shape)) for weight in model.trainable_weights
            ),
            "multiply_adds": None,
        }
    return {
        **about,
        "network": {
            "name": model.name,
            **about.get("network", {}),
            "parameters": counts["parameters"],
            "multiply_adds": counts["multiply_adds"],
        },
        "classes": len(labels),
        "preprocessing": json.loads(preprocessing.to_json()),
        "input": {
            "formats": ["JPEG", "PNG", "GIF", "BMP", "WebP"],
            "exif_orientation": "ignored",
        },
        "versions": _versions(),
    }


def _versions() -> dict[str, str]:
    packages = ("keras", "numpy", "tensorflow")
    return {
        "python": platform.python_version(),
        "keras_resnet": keras_resnet.__version__,
        **{name: importlib.metadata.version(name) for name in packages},
    }


def _sha256(directory: str) -> dict[str, str]:
    """Of every file of a version, by its path in there."""
    found = {}
    for folder, _, names in sorted(os.walk(directory)):
        for name in sorted(names):
            path = os.path.join(folder, name)
            with open(path, "rb") as file:
                content = file.read()
            key = os.path.relpath(path, directory)
            found[key] = hashlib.sha256(content).hexdigest()
    return found


@contextlib.contextmanager
def _loaded(directory: str) -> Iterator[Any]:
    """A function (signature, inputs) -> outputs of a SavedModel.

    It runs the saved graph in a session, as TensorFlow Serving does;
    `tf.saved_model.load` builds Python objects and forgives more.
    """
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        with formats_lib.without_notes():
            signatures = tf.compat.v1.saved_model.loader.load(
                session, ["serve"], directory
            ).signature_def

        def ask(signature: str, inputs: dict[str, np.ndarray]):
            names = signatures[signature]
            return session.run(
                {key: value.name for key, value in names.outputs.items()},
                {names.inputs[key].name: inputs[key] for key in inputs},
            )

        yield ask
