"""Units as pure functions, and their activations computed again.

Training keeps the activations of every layer for the backward pass. A
recomputed unit keeps its input only and runs forward once more when its
gradient is asked for (Chen et al. 2016, "Training Deep Nets with Sublinear
Memory Cost"); the moving statistics are updated once all the same, and random
layers draw the same numbers twice.
"""

import functools
import weakref

import keras
from keras import ops


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

    return custom_gradient(recomputed_run, unit)


_GRADIENT = "KerasResnetCustomGradient"


def custom_gradient(function, layer):
    """Returns what `tf.custom_gradient` does, without its hold on the layer.

    TensorFlow keeps the gradient of every call in a graph until the process
    ends. That gradient would keep the graph, the layer and its kernels. Here
    the graph holds the gradient, and neither holds the layer.

    Args:
        function: Takes the layer and tensors. Returns a tuple of tensors and a
            function from the layer and their gradients to those of the
            arguments. It must read no variable.
        layer: The layer whose gradient this is.

    Returns:
        A function from the tensors to the tuple.
    """
    import tensorflow as tf

    @tf.custom_gradient
    def call_eagerly(*inputs):
        outputs, gradient = function(layer, *inputs)
        return outputs, lambda *dy: gradient(layer, *_dense(dy))

    def call_in_graph(*inputs):
        _register_gradient()
        outputs, gradient = function(layer, *inputs)
        tensors = [*outputs, *inputs]
        graph = tf.compat.v1.get_default_graph()
        with graph.gradient_override_map({"IdentityN": _GRADIENT}):
            copies = tf.identity_n(tensors)
        count, reference = len(outputs), weakref.ref(layer)

        def gradient_of_copies(dy):
            layer = reference()
            if layer is None:
                raise RuntimeError(
                    "the network must exist for as long as gradients of a "
                    "function that calls it are taken, received a network "
                    "that was deleted: keep a reference to it"
                )
            found = gradient(layer, *_dense(dy[:count]))
            return [*(None,) * count, *found]

        graph.add_to_collection(_collection(copies[0].op), gradient_of_copies)
        # A tape does not see the map of the graph.
        tf.__internal__.record_gradient(_GRADIENT, tensors, (), copies)
        return copies[:count]

    return call_eagerly if tf.executing_eagerly() else call_in_graph


def _dense(gradients):
    """Tensors for gradients, those of `tf.gather` included."""
    import tensorflow as tf

    return [
        gradient if gradient is None else tf.convert_to_tensor(gradient)
        for gradient in gradients
    ]


@functools.cache
def _register_gradient():
    import tensorflow as tf

    @tf.RegisterGradient(_GRADIENT)
    def gradient(op, *dy):
        if op is None:
            raise NotImplementedError(
                "a SavedModel cannot hold the gradient of looped or recomputed "
                "units in training: save it with tf.saved_model.SaveOptions("
                "experimental_custom_gradients=False)"
            )
        op = op.outputs[0].op  # a tape gives a stand-in for the operation
        found = op.graph.get_collection(_collection(op))
        if not found:
            raise NotImplementedError(
                "forward-mode derivatives in a tf.function need a network of "
                "looped=False and remat=False: build it so, or take them "
                "eagerly"
            )
        # A graph inside another one starts with the collections of that one.
        return found[-1](dy)


def _collection(op):
    return f"{_GRADIENT}/{op.name}"
