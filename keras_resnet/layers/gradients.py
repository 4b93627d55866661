"""Custom gradients on TensorFlow that are deleted with their graph."""

import functools
import weakref

_GRADIENT = "KerasResnetCustomGradient"


def custom_gradient(function, layer):
    """Returns a function with a custom gradient that does not keep the layer.

    `tf.custom_gradient` keeps the gradient of every call in a graph until the
    process ends. Such a gradient would keep the graph, the layer and its
    kernels in memory. Here the graph owns the gradient, and the gradient has
    only a weak reference to the layer.

    Args:
        function: Function of the layer and tensors. It returns a tuple of
            tensors, and a function from the layer and their gradients to the
            gradients of the arguments. It must not read a variable.
        layer: The layer that the function computes.

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
        # A tape does not use the gradient map of the graph.
        tf.__internal__.record_gradient(_GRADIENT, tensors, (), copies)
        return copies[:count]

    return call_eagerly if tf.executing_eagerly() else call_in_graph


def _dense(gradients):
    """Converts gradients to tensors, also the sparse ones of `tf.gather`."""
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
                "a SavedModel cannot hold the gradients of a network in "
                "training: save it with tf.saved_model.SaveOptions("
                "experimental_custom_gradients=False)"
            )
        op = op.outputs[0].op  # a tape passes a copy of the operation
        found = op.graph.get_collection(_collection(op))
        if not found:
            raise NotImplementedError(
                "forward-mode derivatives of a network in training are not "
                "available in a tf.function: take them eagerly"
            )
        # An inner graph starts with the collections of the outer graph.
        return found[-1](dy)


def _collection(op):
    return f"{_GRADIENT}/{op.name}"
