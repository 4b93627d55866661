"""Units as pure functions, and units that recompute their activations.

Training keeps the activations of every layer for the backward pass. A
recomputed unit keeps only its input, and runs forward again in the backward
pass (Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost"). It
updates its moving statistics once, and its random layers draw the same numbers
both times.
"""

import functools

import keras
from keras import ops

from keras_resnet.layers import gradients


def apply(unit, values, x, training, survival_probability=None):
    """Computes a unit as a pure function of its variables.

    Args:
        unit: A built `Unit`. Its variables are neither read nor written.
        values: Tensors that replace `unit.variables`, in the same order.
        x: Input of the unit, `[batch, height, width, channels]`.
        training: Whether to normalize by the batch and drop at random.
        survival_probability: A scalar tensor, or None for that of the unit.

    Returns:
        The output of the unit, and the list of the new values of its variables.
    """
    mapping = list(zip(unit.variables, values, strict=True))
    with keras.StatelessScope(state_mapping=mapping) as scope:
        y = unit.forward(x, training, survival_probability)
    return y, [scope.get_current_value(v) for v in unit.variables]


def recomputed(unit, x):
    """Computes a unit in training without keeping its activations.

    The moving statistics and the seeds of the unit are updated once.

    Args:
        unit: A built `Unit`.
        x: Input of the unit, `[batch, height, width, channels]`.

    Returns:
        The output of the unit.
    """
    variables = unit.variables
    values = [ops.copy(v.value) for v in variables]
    updated = []

    def run(unit, x, *parameters):
        every = _merge(unit.variables, parameters, values)
        y, new = apply(unit, every, x, training=True)
        updated[:] = [i for i, v in enumerate(new) if v is not every[i]]
        return (y, *(new[i] for i in updated))

    # `keras.remat` of the layer would update the statistics twice. A pure
    # function does not update anything. On TensorFlow, `keras.remat` cannot
    # differentiate past the integers of a seed.
    tensorflow = keras.backend.backend() == "tensorflow"
    remat = _recompute_in_tensorflow if tensorflow else _recompute_in_keras
    y, *new = remat(run, unit)(
        x, *(a for v, a in zip(variables, values, strict=True) if v.trainable)
    )
    for i, value in zip(updated, new, strict=True):
        variables[i].assign(value)
    return y


def _merge(variables, parameters, values):
    """Returns `values`, with `parameters` in the trainable places."""
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
            # Without this dependency, the graph optimizer would merge the
            # second run with the first one, and keep all activations.
            with tf.control_dependencies([dy]):
                again = [tf.identity(tensor) for tensor in inputs]
            with tf.GradientTape() as tape:
                tape.watch(again)
                y, *_ = run(unit, *again)
            return tape.gradient(y, again, dy, unconnected_gradients="zero")

        return run(unit, *inputs), gradient

    return gradients.custom_gradient(recomputed_run, unit)
