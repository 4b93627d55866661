"""Custom gradients on TensorFlow that end with the graph they belong to."""

import functools
import weakref

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
                "a SavedModel cannot hold the gradients of a network in "
                "training: save it with tf.saved_model.SaveOptions("
                "experimental_custom_gradients=False)"
            )
        op = op.outputs[0].op  # a tape gives a stand-in for the operation
        found = op.graph.get_collection(_collection(op))
        if not found:
            raise NotImplementedError(
                "forward-mode derivatives of a network in training are not "
                "available in a tf.function: take them eagerly"
            )
        # A graph inside another one starts with the collections of that one.
        return found[-1](dy)


def _collection(op):
    return f"{_GRADIENT}/{op.name}"
