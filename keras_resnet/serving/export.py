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
from collections.abc import Iterator
from collections.abc import Sequence
from typing import Any
from typing import NamedTuple

import keras
import numpy as np
import tensorflow as tf

import keras_resnet
from keras_resnet import pretrained
from keras_resnet import training
from keras_resnet.analysis import complexity
from keras_resnet.serving import folding
from keras_resnet.serving import formats as formats_lib
from keras_resnet.serving import limits
from keras_resnet.serving import versions
from keras_resnet.serving import warmup
from keras_resnet.training import data

training.require_backend(__name__, "tensorflow")

CARD = "model_card.json"


class DisagreementError(ArithmeticError):
    """What was written answers otherwise than the model."""


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


class Images(NamedTuple):
    """Real images that an export is checked with.

    Attributes:
        views: as the network would see them, but uint8; [count, height, width,
            channels].
        labels: the number of the class of each, or None.
        calibration: other views, whose activations int8 is made for, or None.
        source: what they are, in words.
    """

    views: np.ndarray
    labels: np.ndarray | None = None
    calibration: np.ndarray | None = None
    source: str = "given"


def export(
    model: keras.Model,
    preprocessing: data.Preprocessing,
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
    must answer real images as the model does (`TOLERANCES`).

    Args:
        model: a network of `keras_resnet.resnet`, whole, or a functional or
            sequential model that has one inside (`folding.fold`): one input,
            preprocessed images; a global pooling, whose answer are the
            features; one output, probabilities. Its dtype policy makes no
            difference.
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
        images: None: the bundled digits. For int8 in LiteRT they must have a
            `calibration`.
        warmup_batch_sizes: of the requests that a server warms up with.
        about: what the model card says beside what is found here, such as the
            recipe.

    Returns:
        The path of the new version.

    Raises:
        FileExistsError: `version` stands there already.
        ValueError: `export_dir` is no local directory, the model's outputs are
            no probabilities, the labels, the preprocessing and the model do
            not belong together, the precision or a format is unknown, or the
            model cannot be folded.
        DisagreementError: what was written answers otherwise than the model.
    """
    formats_lib.check(tuple(formats), precision)
    warmup.check(warmup_batch_sizes)
    versions.check(export_dir)
    _check_is_one_to_one(model)
    labels = _checked_labels(labels, model)
    _check_input(model, preprocessing)
    model = _in_float32(model)
    network = _with_features(model)
    folded = folding.fold(network, precision)
    images = images or bundled_images(preprocessing)
    if "litert" in formats and precision == "int8":
        _check_calibration(images)
    expected = _answers(network, preprocessing, images.views)
    _check_probabilities(expected["probabilities"])

    def write(directory: str) -> None:
        _write(directory, folded, preprocessing, labels, max_pixels)
        examples = _examples(images.views, expected, network, preprocessing)
        checks = {
            "saved_model": _check_saved_model(
                directory, examples, expected, images, labels, precision
            )
        }
        for name in [n for n in formats if n in formats_lib.FILES]:
            ask = _write_format(
                name, directory, model, preprocessing, precision, images
            )
            found = _in_batches(ask, images.views)
            checks[name] = _check_classes(
                name, expected["probabilities"], found, images.labels, precision
            )
        warmup.write(
            directory,
            os.path.basename(os.path.abspath(export_dir)),
            images.views[0],
            warmup_batch_sizes,
        )
        card = {
            **_card(model, preprocessing, labels, about or {}),
            "precision": precision,
            "max_pixels": max_pixels,
            "checked_on": images.source,
            "checks": checks,
            "sha256": _sha256(directory),
        }
        with open(os.path.join(directory, CARD), "w", encoding="utf-8") as file:
            file.write(pretrained.card_text(card))

    return versions.publish(export_dir, write, version)


def read_card(directory: str | os.PathLike) -> dict[str, Any]:
    """The model card of a version."""
    with open(os.path.join(directory, CARD), encoding="utf-8") as file:
        return json.load(file)


def bundled_images(
    preprocessing: data.Preprocessing, count: int = 64
) -> Images:
    """The first bundled test digits, as a network of any size sees them."""
    digits, _ = data.load("digits").test_images(count)
    views = np.stack([preprocessing.view(digit).numpy() for digit in digits])
    return Images(views, source=f"{count} bundled digits")


def _check_is_one_to_one(model: keras.Model) -> None:
    graph = folding.graph(model)
    counts = len(graph.inputs), len(graph.outputs)
    if counts != (1, 1):
        raise ValueError(
            "the model must have one input, images, and one output, "
            f"probabilities; received one with {counts[0]} and {counts[1]}"
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


def _in_float32(model: keras.Model) -> keras.Model:
    """The model, or one with its weights if its policy is another."""

    def in_float32(config):
        if isinstance(config, (list, tuple)):
            return type(config)(in_float32(item) for item in config)
        if not isinstance(config, dict):
            return config
        if config.get("class_name") == "DTypePolicy":
            return {**config, "config": {"name": "float32"}}
        return {
            key: "float32"
            if key == "dtype" and isinstance(value, str)
            else in_float32(value)
            for key, value in config.items()
        }

    config = model.get_config()
    if in_float32(config) == config:
        return model
    copy = type(model).from_config(in_float32(config))
    copy.set_weights(model.get_weights())
    return copy


class _Example(NamedTuple):
    """What a signature is asked and what it must answer."""

    signature: str
    inputs: dict[str, np.ndarray]
    output: str
    expected: np.ndarray


def _answers(network, preprocessing, views) -> dict[str, np.ndarray]:
    """What the model itself says of views."""
    found = [
        network(preprocessing(batch), training=False)
        for batch in _batches(views)
    ]
    features, probabilities = (
        np.concatenate(parts) for parts in zip(*found, strict=True)
    )
    return {"features": features, "probabilities": probabilities}


def _batches(views: np.ndarray) -> list[np.ndarray]:
    return np.split(views, range(_BATCH_SIZE, len(views), _BATCH_SIZE))


def _in_batches(ask: formats_lib.Function, views: np.ndarray) -> np.ndarray:
    return np.concatenate([ask(batch) for batch in _batches(views)])


def _examples(views, expected, network, preprocessing) -> list[_Example]:
    """A few views for every signature."""
    views = views[:4]
    encoded = [tf.io.encode_png(view).numpy() for view in views]
    decoded = np.stack(
        [preprocessing.decode(tf.constant(image)) for image in encoded]
    )
    of_decoded = _answers(network, preprocessing, decoded)["probabilities"]
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


def _check_probabilities(outputs: np.ndarray) -> None:
    sums = outputs.sum(-1)
    if not (np.all(outputs >= 0) and np.allclose(sums, 1.0, atol=1e-3)):
        raise ValueError(
            "the model's outputs must be probabilities (none negative, their "
            'sum 1), as classifier_activation="softmax" gives; received '
            f"outputs from {outputs.min():.4g} to {outputs.max():.4g} with "
            f"sum {sums[0]:.4g}"
        )


def _with_features(model: keras.Model) -> keras.Model:
    """Images -> (features, probabilities)."""
    pooled = [
        node.outputs[0]
        for node in folding.nodes(model)
        if _is_global_pooling(node.operation)
    ]
    if not pooled:
        names = [layer.name for layer in model.layers[-3:]]
        raise ValueError(
            "the model must have a global pooling before its classifier, whose "
            'answer are the features: the layer "pool" of a network of '
            "keras_resnet, or of one inside that was built with pooling="
            '"avg", or a keras.layers.GlobalAveragePooling2D; received one '
            f"whose last layers are {names}"
        )
    return keras.Model(model.inputs[0], [pooled[0], model.outputs[0]])


def _is_global_pooling(operation) -> bool:
    """Whether an operation is one, or a model that ends with one."""
    if isinstance(operation, keras.Model):
        last = folding.graph(operation).outputs[0]._keras_history.operation
        return _is_global_pooling(last)
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


def _write(directory, folded, preprocessing, labels, max_pixels) -> None:
    view = tf.TensorSpec(preprocessing.image_shape, tf.uint8)
    encoded = tf.TensorSpec([None], tf.string, name="image_bytes")
    serialized = tf.TensorSpec([None], tf.string, name="inputs")
    decoded = _images_spec(preprocessing)

    # One graph of the network, which all signatures call.
    @tf.function(input_signature=[decoded], autograph=False)
    def answer(images):
        return folded(preprocessing(images))

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


def _write_format(
    name, directory, model, preprocessing, precision, images
) -> formats_lib.Function:
    """Writes one more format; returns what asks the file."""
    # LiteRT makes its own int8 of float32.
    folded = folding.fold(model)
    path = formats_lib.path(directory, name)

    def answer(images):
        return folded(preprocessing(images))

    if name == "onnx":
        formats_lib.write_onnx(path, answer, _images_spec(preprocessing))
        return formats_lib.onnx(path)
    calibration = images.calibration if precision == "int8" else None
    formats_lib.write_litert(
        path, answer, _images_spec(preprocessing), calibration
    )
    return formats_lib.litert(path)


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
    directory, examples, expected, images, labels, precision
) -> dict[str, Any]:
    tolerance = TOLERANCES[precision]
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
                    f"(of {len(wanted)} test images, in {precision}); nothing "
                    "was exported. A layer that is random, or another in a "
                    "graph than in Python, does so: take it out of the model"
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
        precision,
    )


def _check_classes(name, expected, found, labels, precision) -> dict[str, Any]:
    """How the classes that a format finds agree with the model's.

    Raises:
        DisagreementError: less than the precision must.
    """
    tolerance = TOLERANCES[precision]
    best = found.argmax(-1)
    same = best == expected.argmax(-1)
    given = expected[range(len(best)), best]
    share = np.mean(same | (given >= expected.max(-1) - tolerance.tie))
    difference = float(np.max(np.abs(found - expected)))
    is_close = difference <= tolerance.probabilities  # not so of nan
    if not (is_close and share >= tolerance.share):
        raise DisagreementError(
            f"{name} in {precision} must answer as the model does for "
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
    return result


def _card(model, preprocessing, labels, about) -> dict[str, Any]:
    """What can be said of a network before it is written."""
    counts = complexity.complexity(model, preprocessing.image_shape)
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
