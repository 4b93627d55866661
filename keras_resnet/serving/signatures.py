"""Signatures of an exported network, and the graph behind them."""

import os
import tempfile
from collections.abc import Callable
from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from keras_resnet.data import views
from keras_resnet.serving import folding
from keras_resnet.serving import formats
from keras_resnet.serving import isolation

Function = Callable[[Any], Any]


def images_spec(preprocessing: views.Preprocessing) -> tf.TensorSpec:
    """Returns the input of the signatures that take decoded images."""
    shape = [None, *preprocessing.image_shape]
    return tf.TensorSpec(shape, tf.uint8, name="images")


def write_saved_model(
    directory: str,
    folded: Function,
    preprocessing: views.Preprocessing,
    prepare: Function,
    labels: Sequence[str],
    max_pixels: int,
    top: int,
    exif: bool,
    scaled_jpeg: bool,
) -> None:
    """Writes a SavedModel with the signatures of `serving.export`.

    Args:
        directory: An empty directory.
        folded: Function from prepared images to (features, probabilities),
            over constants.
        preprocessing: Decodes images to views.
        prepare: Function from uint8 views to the input of `folded`.
        labels: One line of text for each class.
        max_pixels: Encoded images with more pixels are rejected.
        top: Number of labels in `labels`, at most the number of classes.
        exif: Whether encoded images are turned as their EXIF data state.
        scaled_jpeg: As in `isolation.decode`.

    Raises:
        folding.ModelError: If `folded` reads variables or tables.
    """

    # One graph of the network, which all signatures call.
    @tf.function(input_signature=[images_spec(preprocessing)], autograph=False)
    def network(images):
        return folded(prepare(images))

    _check_is_constant(network)
    with tempfile.TemporaryDirectory() as scratch:
        module = tf.Module()
        # A module saves its attributes, and so the file of the labels.
        module.table = _label_table(os.path.join(scratch, "labels.txt"), labels)

        @tf.function(autograph=False)
        def decode(image_bytes):
            return isolation.decode(
                image_bytes, preprocessing, max_pixels, exif, scaled_jpeg
            )

        functions = _functions(
            network,
            decode,
            module.table,
            len(labels),
            min(top, len(labels)),
            images_spec(preprocessing),
        )
        # The graph holds the weights as constants: TensorFlow Serving's loader
        # would not find Keras' variables.
        tf.saved_model.save(
            module,
            directory,
            {
                function.__name__: tf.function(
                    function, [spec], autograph=False
                )
                for function, spec in functions.items()
            },
        )
    # TensorFlow names every method "predict"; Classify needs its own name.
    with formats.without_notes():
        v1 = tf.compat.v1.saved_model
        updater = v1.signature_def_utils.MethodNameUpdater(directory)
        updater.replace_method_name(
            "classify", v1.signature_constants.CLASSIFY_METHOD_NAME
        )
        updater.save()


def _functions(
    network: Function,
    decode: Function,
    table: tf.lookup.StaticHashTable,
    classes: int,
    top: int,
    decoded: tf.TensorSpec,
) -> dict[Function, tf.TensorSpec]:
    """The functions of the signatures, named as the signatures."""

    def features(images):
        return {"features": network(images)[0]}

    def answers(images, status):
        _, probabilities = network(images)
        is_good = tf.equal(status, "")[:, None]
        probabilities = tf.where(is_good, probabilities, 0.0)
        scores, best = tf.math.top_k(probabilities, top)
        # The table has no label -1.
        best = tf.where(is_good, tf.cast(best, tf.int64), -1)
        labels = table.lookup(best)
        return {
            "probabilities": probabilities,
            "classes": labels[:, 0],
            "labels": labels,
            "scores": scores,
            "status": status,
        }

    def images(images):
        return answers(images, tf.fill([tf.shape(images)[0]], ""))

    def serving_default(image_bytes):
        return answers(*decode(image_bytes))

    def classify(inputs):
        found = answers(*decode(isolation.images_of_examples(inputs)))
        all_labels = table.lookup(tf.range(classes, dtype=tf.int64))
        count = tf.shape(inputs)[0]
        return {
            "classes": tf.tile(all_labels[None], [count, 1]),
            "scores": found["probabilities"],
        }

    return {
        serving_default: tf.TensorSpec([None], tf.string, name="image_bytes"),
        images: decoded,
        features: decoded,
        classify: tf.TensorSpec([None], tf.string, name="inputs"),
    }


def _check_is_constant(network) -> None:
    """Raises if a graph reads state, which a server's loader does not find."""
    captured = network.get_concrete_function().captured_inputs
    if any(tensor.dtype in (tf.resource, tf.variant) for tensor in captured):
        raise folding.ModelError(
            "the model must read only the weights of its layers, received "
            "one that reads other variables or tables, such as a tf.Variable "
            "in a Lambda, or a vocabulary"
        )


def _label_table(path: str, labels: Sequence[str]) -> tf.lookup.StaticHashTable:
    """Table from class to label; its file becomes an asset."""
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
