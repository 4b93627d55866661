"""A trained network as a SavedModel that TensorFlow Serving loads.

EXPORT_DIR/<version>/ has three signatures, the preprocessing inside:

    serving_default  image_bytes: string [batch], encoded images
                     -> probabilities: float32 [batch, classes]
                        classes: string [batch], the most probable label
    images           images: uint8 [batch, height, width, channels]
                     -> the same
    features         images -> features: float32 [batch, channels], the
                     average over all positions that the classifier sees

and `assets/labels.txt`, one label a line in the order of `probabilities`.
The network is folded (`serving.folding`) and has no variables.
"""

import contextlib
import logging
import os
import tempfile
from collections.abc import Iterator
from collections.abc import Sequence
from typing import Any
from typing import NamedTuple

import keras
import numpy as np
import tensorflow as tf

from keras_resnet import training
from keras_resnet.serving import folding
from keras_resnet.serving import limits
from keras_resnet.serving import versions
from keras_resnet.training import data

training.require_tensorflow(__name__)

# How far an answer may be from the model's, as a share of the largest one. What
# rounding to bfloat16 does to the features, a classifier may magnify: there it
# shows what is no number at all, and `agreement` the rest.
_TOLERANCE = {
    "float32": {"features": 1e-4, "probabilities": 1e-4},
    "bfloat16": {"features": 0.1, "probabilities": 1.0},
}

_BATCH_SIZE = 32


def export(
    model: keras.Model,
    preprocessing: data.Preprocessing,
    labels: Sequence[str],
    export_dir: str | os.PathLike,
    version: int | None = None,
    *,
    precision: str = "float32",
    max_pixels: int = limits.MAX_PIXELS,
) -> str:
    """EXPORT_DIR/<version>, which appears at once, whole and checked.

    Before it appears, its signatures are asked through the loader that reads
    only what a server reads, and must answer as the model does.

    Args:
        model: a network of `keras_resnet.resnet`, whole: one input,
            preprocessed images; one output, probabilities; a layer named
            "pool". Its dtype policy makes no difference.
        preprocessing: what stands between an image and the model.
        labels: one line of text for each class.
        export_dir: where the versions are; made where there is none.
        version: None: one more than the highest that stands there.
        precision: `"float32"`, or `"bfloat16"` for kernels and activations up
            to the pool: half the size, and faster on processors whose matrix
            or vector units have it (AMX; AVX512_BF16 of AMD), slower on
            others. `agreement` tells what it costs.
        max_pixels: encoded images with more are refused before decoding.

    Returns:
        The path of the new version.

    Raises:
        FileExistsError: `version` stands there already.
        ValueError: the model's outputs are no probabilities, the labels, the
            preprocessing and the model do not belong together, the precision
            is unknown, or the model cannot be folded.
        RuntimeError: the written signatures answer otherwise than the model.
    """
    labels = _checked_labels(labels, model)
    _check_input(model, preprocessing)
    network = _with_features(_in_float32(model))
    folded = folding.fold(network, precision)
    examples = _examples(network, preprocessing)

    def write(directory: str) -> None:
        _write(directory, folded, preprocessing, labels, max_pixels)
        _check_answers(directory, examples, labels, _TOLERANCE[precision])

    return versions.publish(export_dir, write, version)


def agreement(
    directory: str | os.PathLike,
    model: keras.Model,
    preprocessing: data.Preprocessing,
    images: np.ndarray,
) -> float:
    """The share of images that a version and its model class alike.

    Args:
        directory: a version; what `export` returned.
        model: what was exported; computed in float32.
        preprocessing: what was exported with it.
        images: uint8, [count, height, width, channels], at least one.

    Returns:
        How often the most probable class is the same, from 0 to 1.
    """
    network = _in_float32(model)
    starts = range(_BATCH_SIZE, len(images), _BATCH_SIZE)
    batches = np.split(images, starts)
    expected = [network(preprocessing(batch)) for batch in batches]
    with _loaded(os.fspath(directory)) as ask:
        found = [ask("images", {"images": b})["probabilities"] for b in batches]
    return float(np.mean(_classes(found) == _classes(expected)))


def _classes(probabilities) -> np.ndarray:
    return np.concatenate(probabilities).argmax(-1)


def _checked_labels(labels: Sequence[str], model: keras.Model) -> list[str]:
    classes = model.output_shape[-1]
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
    wanted, given = model.input_shape[1:], preprocessing.image_shape
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


def _examples(network, preprocessing) -> list[_Example]:
    """Two images of noise, as the model itself sees them."""
    images = np.random.default_rng(0).integers(
        0, 256, [2, *preprocessing.image_shape], np.uint8
    )
    encoded = [tf.io.encode_png(image) for image in images]
    views = tf.stack([preprocessing.decode(image) for image in encoded])

    def ask(images):
        features, probabilities = network(preprocessing(images), training=False)
        return np.asarray(features), np.asarray(probabilities)

    features, probabilities = ask(images)
    _check_probabilities(probabilities)
    return [
        _Example(
            "serving_default",
            {"image_bytes": np.array([e.numpy() for e in encoded], object)},
            "probabilities",
            ask(views)[1],
        ),
        _Example("images", {"images": images}, "probabilities", probabilities),
        _Example("features", {"images": images}, "features", features),
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
    names = [layer.name for layer in model.layers]
    if "pool" not in names:
        raise ValueError(
            'the model must have a layer "pool", whose output are the '
            f"features; received one whose last layers are {names[-3:]}"
        )
    return keras.Model(
        model.inputs[0], [model.get_layer("pool").output, model.outputs[0]]
    )


def _write(directory, folded, preprocessing, labels, max_pixels) -> None:
    view = tf.TensorSpec(preprocessing.image_shape, tf.uint8)
    encoded = tf.TensorSpec([None], tf.string, name="image_bytes")
    decoded = tf.TensorSpec([None, *view.shape], view.dtype, name="images")

    # One graph of the network, which all signatures call.
    @tf.function(input_signature=[decoded], autograph=False)
    def answer(images):
        return folded(preprocessing(images))

    def features(images):
        return {"features": answer(images)[0]}

    def classify(images):
        _, probabilities = answer(images)
        best = table.lookup(tf.argmax(probabilities, axis=-1))
        return {"probabilities": probabilities, "classes": best}

    def decode(image_bytes):
        return preprocessing.decode(limits.check(image_bytes, max_pixels))

    def decode_and_classify(image_bytes):
        return classify(
            tf.map_fn(decode, image_bytes, fn_output_signature=view)
        )

    with tempfile.TemporaryDirectory() as scratch:
        table = _label_table(os.path.join(scratch, "labels.txt"), labels)
        module = tf.Module()
        module.table = table  # a module saves what it has
        signatures = {
            "serving_default": (decode_and_classify, encoded),
            "images": (classify, decoded),
            "features": (features, decoded),
        }
        # What is left of the Keras model are constants: TensorFlow Serving's
        # loader would not find its variables.
        tf.saved_model.save(
            module,
            directory,
            {
                name: tf.function(f, input_signature=[spec], autograph=False)
                for name, (f, spec) in signatures.items()
            },
        )


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


def _check_answers(directory, examples, labels, tolerance) -> None:
    with _loaded(directory) as ask:
        for signature, inputs, output, expected in examples:
            answers = ask(signature, inputs)
            error = np.max(np.abs(answers[output] - expected))
            is_right = error <= tolerance[output] * np.max(np.abs(expected))
            if is_right and "classes" in answers:
                best = [labels[i] for i in answers[output].argmax(-1)]
                is_right = [c.decode() for c in answers["classes"]] == best
            if not is_right:
                raise RuntimeError(
                    f"the exported signature {signature} must answer as the "
                    f"model does: {output} {expected}; received {answers}"
                )


@contextlib.contextmanager
def _loaded(directory: str) -> Iterator[Any]:
    """A function (signature, inputs) -> outputs of a SavedModel.

    It runs the saved graph in a session, as TensorFlow Serving does;
    `tf.saved_model.load` builds Python objects and forgives more.
    """
    logger = tf.get_logger()
    level = logger.level
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        logger.setLevel(logging.ERROR)  # the loader says it is deprecated
        try:
            signatures = tf.compat.v1.saved_model.loader.load(
                session, ["serve"], directory
            ).signature_def
        finally:
            logger.setLevel(level)

        def ask(signature: str, inputs: dict[str, np.ndarray]):
            names = signatures[signature]
            return session.run(
                {key: value.name for key, value in names.outputs.items()},
                {names.inputs[key].name: inputs[key] for key in inputs},
            )

        yield ask
