"""Verifies that exported files predict as the model does.

The SavedModel runs through TensorFlow's C++ loader, as in TensorFlow Serving.
A `Reference` holds the model's own predictions, which are the truth.
"""

import contextlib
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
from typing import Any
from typing import NamedTuple

import keras
import numpy as np
import tensorflow as tf

from keras_resnet.data import datasets
from keras_resnet.data import views as views_lib
from keras_resnet.serving import examples
from keras_resnet.serving import folding
from keras_resnet.serving import formats

BATCH_SIZE = 32
_REQUEST_IMAGES = 4  # in the request to each signature


class DisagreementError(ArithmeticError):
    """Exported predictions differ from the model's.

    It is also raised if the model's error differs from the recorded error.
    """


class Tolerance(NamedTuple):
    """Largest allowed differences between exported predictions and the model's.

    Attributes:
        features: As a share of the largest feature.
        probabilities: As a share of the largest probability. A classifier may
            magnify the rounding of the features; 1.0 rejects only NaN.
        tie: A class also counts as the model's class if its probability in the
            model is at most this much below the best one.
        share: Share of the images whose class must be the model's.
    """

    features: float
    probabilities: float
    tie: float
    share: float


TOLERANCES = {
    "float32": Tolerance(1e-4, 1e-4, 1e-4, 1.0),
    "bfloat16": Tolerance(0.1, 1.0, 0.05, 0.97),
    "int8_weights": Tolerance(0.25, 1.0, 0.05, 0.95),
    "int8": Tolerance(0.25, 1.0, 0.05, 0.95),
}


class Recorded(NamedTuple):
    """Test error that the training recorded for the same weights.

    Attributes:
        top1_error: In percent.
        images: Number of test images.
        source: Name of the file that has the record.
    """

    top1_error: float
    images: int
    source: str


class Images(NamedTuple):
    """Images that an export is verified with.

    Attributes:
        views: uint8 `[count, height, width, channels]`, cropped and resized
            for the network.
        labels: Class number of each view, or None if the images do not have
            the network's classes. Without labels, accuracy is not checked.
        calibration: Views for the calibration of int8, or None.
        source: Description of the images.
        recorded: Error that the training recorded on all test images, of which
            the views are a random sample; or None.
    """

    views: np.ndarray
    labels: np.ndarray | None = None
    calibration: np.ndarray | None = None
    source: str = "given"
    recorded: Recorded | None = None

    def recorded_entry(self) -> dict[str, Any]:
        """Returns the entry of the model card for the recorded error."""
        if self.labels is None or self.recorded is None:
            return {}
        return {"recorded": self.recorded._asdict()}


class Reference(NamedTuple):
    """Predictions of the model, which exported files must repeat.

    Attributes:
        views: uint8 `[count, height, width, channels]`.
        features: float32 `[count, channels]`.
        probabilities: float32 `[count, classes]`.
        labels: Class number of each view, or None.
        tolerance: Allowed differences.
    """

    views: np.ndarray
    features: np.ndarray
    probabilities: np.ndarray
    labels: np.ndarray | None
    tolerance: Tolerance


class Request(NamedTuple):
    """A request to a signature, and the output that it must return."""

    signature: str
    inputs: dict[str, np.ndarray]
    output: str
    expected: np.ndarray


def bundled_images(
    preprocessing: views_lib.Preprocessing, count: int = 64
) -> Images:
    """Returns bundled test digits as views of any size.

    They replace images of the network's own kind.
    """
    digits, _ = datasets.load("digits").test_images(count)
    views = np.stack([preprocessing.view(digit).numpy() for digit in digits])
    return Images(views, source=f"{count} stand-in images (bundled digits)")


def reference(
    model: keras.Model,
    network: keras.Model,
    prepare: Callable[[Any], Any],
    images: Images,
    precision: str,
) -> Reference:
    """Returns the model's predictions after checking them.

    Args:
        model: The model as it was given.
        network: The same model with two outputs, features and probabilities.
        prepare: Function from uint8 views to the input of the model.
        images: Images to predict.
        precision: A key of `TOLERANCES`.

    Raises:
        DisagreementError: If two predictions differ, or if the error differs
            from the recorded one.
        folding.ModelError: If the outputs are not probabilities.
    """
    features, probabilities = _predict(network, prepare, images.views)
    _check_is_deterministic(model, prepare, images.views, probabilities)
    is_exact = model.outputs[0].dtype in ("float32", "float64")
    _check_probabilities(probabilities, 1e-3 if is_exact else 0.02)
    check_recorded(probabilities, images)
    return Reference(
        images.views,
        features,
        probabilities,
        images.labels,
        _tolerance(model, precision),
    )


def _tolerance(model: keras.Model, precision: str) -> Tolerance:
    """The wider tolerance of the precision and of the model's own dtypes."""
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


def _predict(network, prepare, views) -> tuple[np.ndarray, np.ndarray]:
    """Features and probabilities of the model itself."""
    found = [
        network(prepare(batch), training=False) for batch in _batches(views)
    ]
    features, probabilities = (
        np.concatenate(parts).astype("float32")
        for parts in zip(*found, strict=True)
    )
    return features, probabilities


def _check_is_deterministic(model, prepare, views, expected) -> None:
    """Compares the model that was given with the network that is folded."""
    (batch, *_) = _batches(views)
    inputs = folding.packed(model, prepare(batch))
    (output,) = keras.tree.flatten(model(inputs, training=False))
    found = np.asarray(output, "float32")
    if not np.allclose(found, expected[: len(found)], 1e-4, equal_nan=True):
        raise DisagreementError(
            "the model must predict the same probabilities every time, "
            "received others for the same images; nothing was exported. "
            "Remove layers that are random at inference"
        )


def _check_probabilities(outputs: np.ndarray, tolerance: float) -> None:
    sums = outputs.sum(-1)
    if not (np.all(outputs >= 0) and np.allclose(sums, 1.0, atol=tolerance)):
        raise folding.ModelError(
            "the model's outputs must be probabilities (not negative, with the "
            'sum 1), as classifier_activation="softmax" returns; received '
            f"outputs from {outputs.min():.4g} to {outputs.max():.4g} with "
            f"sum {sums[0]:.4g}"
        )


def check_recorded(probabilities: np.ndarray, images: Images) -> None:
    """Compares the model's errors with the error that training recorded.

    The number of errors in a sample without replacement has a hypergeometric
    distribution. The check allows 4 of its standard deviations and 1% of the
    sample, because training may have computed in another precision.

    Raises:
        DisagreementError: If the difference is larger.
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
            f"training, received {100.0 * errors / count:.2f}%, but "
            f"{recorded.source} has {recorded.top1_error:.2f}% of "
            f"{recorded.images:,} images; nothing was exported. The weights, "
            "the test images or the preprocessing differ from training: "
            "measure its error with the evaluate program"
        )


def requests(
    network: keras.Model,
    preprocessing: views_lib.Preprocessing,
    prepare: Callable[[Any], Any],
    reference: Reference,
) -> list[Request]:
    """Returns a request of a few images to every signature."""
    views = reference.views[:_REQUEST_IMAGES]
    encoded = [tf.io.encode_png(view).numpy() for view in views]
    decoded = np.stack(
        [preprocessing.decode(tf.constant(image)) for image in encoded]
    )
    _, of_decoded = _predict(network, prepare, decoded)
    serialized = [examples.example(image) for image in encoded]
    return [
        Request(
            "serving_default",
            {"image_bytes": np.array(encoded, object)},
            "probabilities",
            of_decoded,
        ),
        Request(
            "classify",
            {"inputs": np.array(serialized, object)},
            "scores",
            of_decoded,
        ),
        Request(
            "images",
            {"images": views},
            "probabilities",
            reference.probabilities[: len(views)],
        ),
        Request(
            "features",
            {"images": views},
            "features",
            reference.features[: len(views)],
        ),
    ]


def check_saved_model(
    directory: str,
    requests: Sequence[Request],
    labels: Sequence[str],
    reference: Reference,
) -> dict[str, Any]:
    """Checks every signature, and the classes of all views.

    Returns:
        The entry of the model card, as `check_classes` does.

    Raises:
        DisagreementError: If a signature predicts otherwise than the model.
    """
    with loaded(directory) as run:
        for request in requests:
            outputs = run(request.signature, request.inputs)
            _check_outputs(request, outputs, list(labels), reference.tolerance)
        found = in_batches(
            lambda views: run("images", {"images": views})["probabilities"],
            reference.views,
        )
    return check_classes("saved_model", found, reference)


def _check_outputs(
    request: Request,
    outputs: dict[str, np.ndarray],
    labels: list[str],
    tolerance: Tolerance,
) -> None:
    found = outputs[request.output]
    allowed = (
        tolerance.features
        if request.output == "features"
        else tolerance.probabilities
    )
    error = np.max(np.abs(found - request.expected))
    is_right = error <= allowed * np.max(np.abs(request.expected))
    if is_right and request.signature in ("serving_default", "images"):
        order = np.argsort(-found, axis=-1, kind="stable")
        best = order[:, : outputs["labels"].shape[-1]]
        is_right = (
            [[label.decode() for label in row] for row in outputs["labels"]]
            == [[labels[i] for i in row] for row in best]
            and np.all(outputs["scores"] == np.take_along_axis(found, best, -1))
            and np.all(outputs["classes"] == outputs["labels"][:, 0])
            and not any(outputs["status"])
        )
    if is_right and request.signature == "classify":
        is_right = all(
            [label.decode() for label in row] == labels
            for row in outputs["classes"]
        )
    if not is_right:
        raise DisagreementError(
            f"the exported signature {request.signature} must predict as the "
            f"model does, received {request.output} up to {error:.2g} apart "
            f"(of {len(found)} images); nothing was exported. Remove layers "
            "that are random, that round to whole numbers, or that differ "
            "between a graph and Python"
        )


def check_classes(
    name: str, found: np.ndarray, reference: Reference
) -> dict[str, Any]:
    """Compares the classes that a format predicts with the model's.

    Args:
        name: Name of the format.
        found: Probabilities of the reference's views.
        reference: Predictions of the model.

    Returns:
        The entry of the model card.

    Raises:
        DisagreementError: If the classes or probabilities differ by more than
            the tolerance.
    """
    expected, tolerance = reference.probabilities, reference.tolerance
    best = found.argmax(-1)
    same = best == expected.argmax(-1)
    given = expected[range(len(best)), best]
    share = np.mean(same | (given >= expected.max(-1) - tolerance.tie))
    difference = float(np.max(np.abs(found - expected)))
    is_close = difference <= tolerance.probabilities  # False for NaN
    if not (is_close and share >= tolerance.share):
        raise DisagreementError(
            f"{name} must predict the model's class for "
            f"{tolerance.share:.0%} of {len(best)} images, received "
            f"{share:.1%}, probabilities up to {difference:.2g} apart; nothing "
            "was exported"
        )
    entry = {
        "images": len(best),
        "same_class": int(np.sum(same)),
        "largest_difference": difference,
    }
    labels = reference.labels
    if labels is not None:
        errors = int(np.sum(best != labels))
        entry["top1_errors"] = errors
        entry["top1_error"] = 100.0 * errors / len(best)
        entry["chance_error"] = _chance_error(labels, found.shape[-1])
    return entry


def _chance_error(labels: np.ndarray, classes: int) -> float:
    """The error of always predicting the most frequent class, in percent."""
    counts = np.bincount(labels, minlength=classes)
    return 100.0 * (1.0 - float(counts.max()) / len(labels))


def in_batches(predict: formats.Function, views: np.ndarray) -> np.ndarray:
    """Returns the predictions of all views, computed batch by batch."""
    return np.concatenate([predict(batch) for batch in _batches(views)])


def _batches(views: np.ndarray) -> list[np.ndarray]:
    return np.split(views, range(BATCH_SIZE, len(views), BATCH_SIZE))


@contextlib.contextmanager
def loaded(directory: str) -> Iterator[Callable[..., dict[str, np.ndarray]]]:
    """Yields the function (signature, inputs) -> outputs of a SavedModel.

    It runs the saved graph in a session, as TensorFlow Serving does;
    `tf.saved_model.load` builds Python objects and accepts more.
    """
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        with formats.without_notes():
            signatures = tf.compat.v1.saved_model.loader.load(
                session, ["serve"], directory
            ).signature_def

        def run(signature: str, inputs: dict[str, np.ndarray]):
            names = signatures[signature]
            return session.run(
                {key: value.name for key, value in names.outputs.items()},
                {names.inputs[key].name: inputs[key] for key in inputs},
            )

        yield run
