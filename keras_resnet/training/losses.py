"""The training loss and the counted errors, on every backend of Keras."""

import keras
from keras import ops

from keras_resnet import baselines
from keras_resnet.training.recipes import Recipe


def of_network(recipe: Recipe, model: keras.Model, labels, logits):
    """Returns the loss of each image: of the network and of its companions.

    `loss = -sum_c q_c log softmax(logits)_c`; q is 1 for the label, or, with
    label smoothing e over C classes, `1 - e + e / C` for the label and `e / C`
    for the others (Szegedy et al. 2016, Sec. 7). The L2 penalty is not
    included.

    Args:
        recipe: The recipe, with its `label_smoothing`.
        model: The network. It was called just before, in the same trace.
        labels: int32 `[batch]`.
        logits: `[batch, classes]`.

    Returns:
        A tensor of shape `[batch]`, in float32 at least.
    """
    losses = _cross_entropies(recipe, labels, logits)
    for weight, companion in baselines.companion_logits(model):
        losses += weight * _cross_entropies(recipe, labels, companion)
    return losses


def _cross_entropies(recipe, labels, logits):
    # In float32 at least: a softmax in half precision loses its tail.
    if keras.backend.standardize_dtype(logits.dtype) != "float64":
        logits = ops.cast(logits, "float32")
    smoothing = recipe.label_smoothing
    if not smoothing:
        return ops.sparse_categorical_crossentropy(
            labels, logits, from_logits=True
        )
    classes = logits.shape[-1]
    targets = ops.where(
        ops.one_hot(labels, classes, dtype="bool"),
        1.0 - smoothing + smoothing / classes,
        smoothing / classes,
    )
    targets = ops.cast(targets, logits.dtype)
    return ops.categorical_crossentropy(targets, logits, from_logits=True)


def are_decayed(recipe: Recipe, model: keras.Model) -> list[bool]:
    """Returns which trainable variables have an L2 penalty [1, Sec. 3.4]."""
    return [
        recipe.decay_norms or variable.name.endswith("kernel")
        for variable in model.trainable_variables
    ]


def count_errors(logits, labels, counted):
    """Returns sums over a batch: loss, top-1 errors, top-5 errors, images.

    Args:
        logits: `[batch, classes]`.
        labels: `[batch]`, int32.
        counted: `[batch]`, float32: 1 for an image, 0 for padding.

    Returns:
        A float32 tensor of shape `[4]`.

    >>> logits = ops.convert_to_tensor([[0.0, 100.0], [0.0, 0.0]])
    >>> count_errors(logits, ops.array([0, 0]), ops.array([1.0, 0.0])).numpy()
    array([100.,   1.,   0.,   1.], dtype=float32)
    """
    logits = ops.cast(logits, "float32")
    losses = ops.sparse_categorical_crossentropy(
        labels, logits, from_logits=True
    )
    # Of equal scores the first class counts, as in argmax. `in_top_k` counts
    # every class as right if all scores are equal.
    _, best = ops.top_k(logits, min(5, logits.shape[-1]))
    label = ops.cast(labels, "int32")[:, None]
    is_label = ops.cast(ops.cast(best, "int32") == label, "float32")
    correct1, correct5 = is_label[:, 0], ops.max(is_label, axis=1)
    # Padding may hold anything, NaN too: 0 * NaN must not reach the sum.
    losses = ops.where(counted > 0, losses, 0.0)
    return ops.stack(
        [
            ops.sum(losses),
            ops.sum(counted * (1.0 - correct1)),
            ops.sum(counted * (1.0 - correct5)),
            ops.sum(counted),
        ]
    )
