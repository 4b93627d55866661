"""Units as pure functions, and their activations computed again.

Training keeps the activations of every layer for the backward pass. A
recomputed unit keeps its input only and runs forward once more when its
gradient is asked for (Chen et al. 2016, "Training Deep Nets with Sublinear
Memory Cost"); the moving statistics are updated once all the same, and random
layers draw the same numbers twice.
"""

import functools

import keras
from keras import ops

from keras_resnet.layers import gradients


def apply(unit, values, x, training, survival_probability=None):
    """A unit as a function of its variables.

    Args:
        unit: A built `Unit`; none of its variables is read or written.
        values: A tensor in place of each of `unit.variables`.
        x: The unit's input, `[batch, height, width, channels]`.
        training: Whether to normalize by the batch and drop at random.
        survival_probability: A scalar tensor, or None for the unit's own.

    Returns:
        The unit's output and the list of the new values of its variables.
    """
    mapping = list(zip(unit.variables, values, strict=True))
    with keras.StatelessScope(state_mapping=mapping) as scope:
        y = unit.forward(x, training, survival_probability)
    return y, [scope.get_current_value(v) for v in unit.variables]


def recomputed(unit, x):
    """The unit's output in training, its activations not kept.

    Args:
        unit: A built `Unit`.
        x: Its input, `[batch, height, width, channels]`.

    Returns:
        The output; the unit's moving statistics and seeds are updated, once.
    """
    variables = unit.variables
    values = [ops.copy(v.value) for v in variables]
    updated = []

    def run(unit, x, *parameters):
        every = _merge(unit.variables, parameters, values)
        y, new = apply(unit, every, x, training=True)
        updated[:] = [i for i, v in enumerate(new) if v is not every[i]]
        return (y, *(new[i] for i in updated))

    # `keras.remat` over the layer itself would update the statistics twice; a
    # pure function has nothing that could happen twice. On TensorFlow it
    # cannot differentiate past the integers of a seed.
    tensorflow = keras.backend.backend() == "tensorflow"
    remat = _recompute_in_tensorflow if tensorflow else _recompute_in_keras
    y, *new = remat(run, unit)(
        x, *(a for v, a in zip(variables, values, strict=True) if v.trainable)
    )
    for i, value in zip(updated, new, strict=True):
        variables[i].assign(value)
    return y


def _merge(variables, parameters, values):
    """`values`, with `parameters` for those of the trainable variables."""
    given = iter(parameters)
    return [
        next(given) if variable.trainable else value
        for variable, value in zip(variables, values, strict=True)
    ]


def _recompute_in_keras(run, unit):
    return keras.remat(functools.partial(run, unit))


def _recompute_in_tensorflow(run, unit):
    import tensorflow as tf

    def recomputed_run(unit, *inputs):
        def gradient(unit, dy, *_):
            # Without this, the optimizer of the graph would find that the
            # second run computes what the first did, and keep its results.
            with tf.control_dependencies([dy]):
                again = [tf.identity(tensor) for tensor in inputs]
            with tf.GradientTape() as tape:
                tape.watch(again)
                y, *_ = run(unit, *again)
            return tape.gradient(y, again, dy, unconnected_gradients="zero")

        return run(unit, *inputs), gradient

    return gradients.custom_gradient(recomputed_run, unit)
