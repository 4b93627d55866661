"""The mathematics of one training step, for every backend of Keras.

A step of [1, Sec. 3.4] with momentum m and rate r is

    loss = mean over the batch of the cross entropy
    g = d loss / d w + weight_decay * w
    v = m v - r g;  w = w + v

All functions here are pure: they take tensors and return tensors. A backend
differentiates them, exchanges sums between devices and stores the results: see
`tensorflow_trainer` and `jax_trainer`.
"""

from collections.abc import Callable
from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from keras_resnet import networks
from keras_resnet.training.configs import Config
from keras_resnet.training.recipe import Recipe
from keras_resnet.training.recipe_rules import DECOUPLED


class Step:
    """Loss, gradients, weight decay and metrics of a configuration's step.

    Args:
        config: The configuration of the run.
        model: The network of the configuration; it returns logits.
        optimizer: The optimizer, for its loss scale.
        differentiate: `differentiate(function, tensors)` returns the gradients
            of the first result of `function(tensors)`, and the second result.
        after: `after(tensor, others)` returns `tensor`, which is computed
            after `others`. None if the backend computes in the order of the
            program.
        network: The network for the size of the training images, with the
            layers of `model`; None if the size is that of the test images.
    """

    # Keras' optimizers have three related features:
    # `scale_loss` is used. It is the identity without a loss scale.
    # `gradient_accumulation_steps` is not used. It fails inside `strategy.run`
    # ("merge_call"), and it would need one batch of data per micro-batch.
    # `use_ema` is not used. Its momentum is constant, and the average here
    # follows `(1 + step) / (10 + step)` at first. Its only way to use the
    # averages, `finalize_variable_values`, overwrites the parameters.

    def __init__(
        self,
        config: Config,
        model: keras.Model,
        optimizer: keras.optimizers.Optimizer,
        differentiate: Callable,
        after: Callable | None = None,
        network: keras.Model | None = None,
    ):
        self.recipe = config.recipe
        self.companion_logits = networks.get_network(
            config.model
        ).companion_logits
        self.is_synchronized = config.sync_batch_norm
        self.model = model
        self.network = network or model
        self.optimizer = optimizer
        self.differentiate = differentiate
        self.after = after or (lambda tensor, others: tensor)
        self.states = model.non_trainable_variables
        self.are_decayed = [
            self.recipe.optimizer not in DECOUPLED
            and self.recipe.decays(variable)
            for variable in model.trainable_variables
        ]

    def gradients(self, trainable: Sequence, states: Sequence, images, labels):
        """Returns gradients of the mean loss of the global batch.

        The images may be a share of the batch: the gradients of all shares
        add up to the gradient of the mean loss.

        Args:
            trainable: Values of `model.trainable_variables`.
            states: Values of `model.non_trainable_variables`: the moving
                statistics, and the seeds of random layers.
            images: float32 `[n, height, width, channels]`.
            labels: int32 `[n]`, or the labels of mixed images as
                `data.augmentation.mix` returns them.

        Returns:
            The gradients, the new states, and the sums of `count_errors`.
        """
        if self.recipe.micro_batches == 1:
            return self._gradients(trainable, states, images, labels)
        return self._accumulated(trainable, states, images, labels)

    def _gradients(self, trainable, states, images, labels):
        def loss_of(trainable):
            mapping = [
                *zip(self.model.trainable_variables, trainable, strict=True),
                *zip(self.states, states, strict=True),
            ]
            with keras.StatelessScope(mapping) as scope:
                logits = self.network(images, training=True)
            losses = self.losses(labels, logits)
            loss = ops.sum(losses) / float(self.recipe.batch_size)
            after = [scope.get_current_value(v) for v in self.states]
            return self.optimizer.scale_loss(loss), (logits, after)

        gradients, (logits, after) = self.differentiate(loss_of, trainable)
        labels = main_labels(labels)
        counted = ops.ones_like(labels, dtype="float32")
        return gradients, after, count_errors(logits, labels, counted)

    def losses(self, labels, logits):
        """Returns the loss of each image: of the network and its companions.

        `loss = -sum_c q_c log softmax(logits)_c`, or the mean over the classes
        c of `-q_c log p_c - (1 - q_c) log (1 - p_c)` with `p =
        sigmoid(logits)`. The targets q are those of `targets`. The L2 penalty
        is not included.

        Args:
            labels: int32 `[n]`, or those of mixed images.
            logits: `[n, classes]`, from the last call of the network, in the
                same trace.

        Returns:
            A tensor of shape `[n]`, in float32 at least.
        """
        losses = _losses(self.recipe, labels, logits)
        for weight, companion in self.companion_logits(self.model):
            losses += weight * _losses(self.recipe, labels, companion)
        return losses

    def _accumulated(self, trainable, states, images, labels):
        """Adds up the gradients of the micro-batches, one after the other."""
        count = self.recipe.micro_batches
        images, labels = keras.tree.map_structure(self._parts, (images, labels))
        are_seeds = [is_seed(v) for v in self.states]

        def body(i, gradients, totals, sums):
            # Each starts with the statistics from before, as devices do.
            before = [
                total if is_one else value
                for total, value, is_one in zip(
                    totals, states, are_seeds, strict=True
                )
            ]
            part = self.after(images[i], gradients)
            more, after, counted = self._gradients(
                trainable,
                before,
                part,
                keras.tree.map_structure(lambda each: each[i], labels),
            )
            totals = [
                new if is_one else total + new / count
                for total, new, is_one in zip(
                    totals, after, are_seeds, strict=True
                )
            ]
            gradients = [a + b for a, b in zip(gradients, more, strict=True)]
            return i + 1, gradients, totals, sums + counted

        loop = (
            0,
            [ops.zeros(v.shape, v.dtype) for v in trainable],
            [
                value if is_one else ops.zeros_like(value)
                for value, is_one in zip(states, are_seeds, strict=True)
            ],
            ops.zeros(4),
        )
        if self.is_synchronized:
            # TensorFlow cannot exchange sums of devices inside of a loop.
            for _ in range(count):
                loop = body(*loop)
        else:
            loop = ops.while_loop(
                lambda i, *_: i < count, body, loop, maximum_iterations=count
            )
        return tuple(loop[1:])

    def _parts(self, tensor):
        """Returns the micro-batches of a device's share, `[count, n, ...]`.

        With synchronized normalization a micro-batch is every `count`-th
        image, so that it has the same images on any number of devices.
        """
        count = self.recipe.micro_batches
        if self.is_synchronized:
            return ops.stack([tensor[i::count] for i in range(count)])
        return ops.reshape(tensor, [count, -1, *tensor.shape[1:]])

    def clipped(self, gradients: Sequence) -> tuple[list, Any]:
        """Returns the gradients, clipped, and their norm before.

        `g min(1, clip_norm / |g|)`, where |g| is the norm of all gradients
        together, without the decay (Pascanu et al. 2013).

        Args:
            gradients: Those of all shares together.
        """
        squares = sum(
            ops.sum(ops.square(ops.cast(g, _at_least_32(g)))) for g in gradients
        )
        norm = ops.sqrt(squares)
        if self.recipe.clip_norm is not None:
            most = self.optimizer.scale_loss(self.recipe.clip_norm)
            factor = most / ops.maximum(norm, most)
            gradients = [g * ops.cast(factor, g.dtype) for g in gradients]
        return list(gradients), norm / self.optimizer.scale_loss(1.0)

    def decayed(self, gradients: Sequence, trainable: Sequence) -> list:
        """Returns `g + weight_decay * w` for each decayed parameter.

        The gradients are those of all shares together. The penalty is not
        part of the reported loss.
        """
        scale = self.optimizer.scale_loss(self.recipe.weight_decay)
        decayed = [
            gradient + scale * value if is_decayed else gradient
            for gradient, value, is_decayed in zip(
                gradients, trainable, self.are_decayed, strict=True
            )
        ]
        if self.recipe.head_learning_rate is None:
            return decayed
        # With momentum, a gradient times k is a rate times k.
        k = self.recipe.head_learning_rate / self.recipe.learning_rate
        are_head = [
            "predictions" in variable.path.split("/")
            for variable in self.model.trainable_variables
        ]
        return [
            gradient * k if is_head else gradient
            for gradient, is_head in zip(decayed, are_head, strict=True)
        ]

    def average(self, average, value, step):
        """Returns the moving average of a parameter after a step.

        `average + (value - average) (1 - m)`, where
        `m = min(average_momentum, (1 + step) / (10 + step))`.

        Args:
            average: The average before the step.
            value: The parameter after the step.
            step: float32, the number of completed steps.
        """
        momentum = ops.minimum(
            self.recipe.average_momentum, (1.0 + step) / (10.0 + step)
        )
        share = ops.cast(1.0 - momentum, average.dtype)
        return average + (value - average) * share


def is_seed(variable: keras.Variable) -> bool:
    """Returns whether a state is the seed of a random layer."""
    return not variable.dtype.startswith("float")


def main_labels(labels):
    """Returns the label with the larger share of each image, int32 `[n]`."""
    if not isinstance(labels, tuple):
        return labels
    first, second, shares = labels
    return ops.where(shares >= 0.5, first, second)


def targets(recipe: Recipe, labels, classes: int, dtype: str = "float32"):
    """Returns the target of each class, `[batch, classes]`.

    The target is 1 for the label and 0 for the others; in a mixed image, it
    is the share of each label, or 1 for a share above `target_threshold`. With
    label smoothing e over C classes, q becomes `(1 - e) q + e / C` (Szegedy et
    al. 2016, Sec. 7).

    Args:
        recipe: The recipe.
        labels: int32 `[batch]`, or those of mixed images.
        classes: Number of classes.
        dtype: Of the result.

    >>> from keras_resnet.training.recipes import RECIPES
    >>> targets(RECIPES["imagenet_modern"], ops.array([1]), 2).numpy()
    array([[0.05, 0.95]], dtype=float32)
    """
    if isinstance(labels, tuple):
        first, second, shares = labels
        shares = ops.cast(shares, dtype)[:, None]
        q = shares * ops.one_hot(first, classes, dtype=dtype)
        q += (1.0 - shares) * ops.one_hot(second, classes, dtype=dtype)
    else:
        q = ops.one_hot(labels, classes, dtype=dtype)
    if recipe.target_threshold is not None:
        q = ops.cast(q > recipe.target_threshold, dtype)
    smoothing = recipe.label_smoothing
    return (1.0 - smoothing) * q + smoothing / classes


def _losses(recipe, labels, logits):
    # In float32 at least: a softmax in half precision loses its tail.
    dtype = _at_least_32(logits)
    logits = ops.cast(logits, dtype)
    is_binary = recipe.loss == "binary_cross_entropy"
    is_plain = not isinstance(labels, tuple) and not recipe.label_smoothing
    if is_plain and not is_binary:
        return ops.sparse_categorical_crossentropy(
            labels, logits, from_logits=True
        )
    q = targets(recipe, labels, logits.shape[-1], dtype)
    if is_binary:
        return ops.mean(ops.softplus(logits) - q * logits, axis=-1)
    # TensorFlow's kernel is wrong for targets that do not add up to 1.
    return -ops.sum(q * ops.log_softmax(logits, axis=-1), axis=-1)


def _at_least_32(tensor):
    """Returns the dtype of a sum: float64 for float64, else float32."""
    dtype = keras.backend.standardize_dtype(tensor.dtype)
    return dtype if dtype == "float64" else "float32"


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
