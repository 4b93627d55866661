"""Batch normalization on TensorFlow's fused kernels.

Both papers normalize after every convolution, with epsilon 1e-5 and a moving
average of 0.9 ([1, Sec. 3.4]; the numbers are those of the authors' code).
"""

import contextlib
import functools
import os
import re
import threading

import keras
from keras import ops

from keras_resnet.layers import gradients

_STATE = threading.local()

MOMENTUM = 0.9
EPSILON = 1e-5


@keras.saving.register_keras_serializable(package="keras_resnet")
class BatchNormalization(keras.layers.BatchNormalization):
    """Batch normalization by TensorFlow's fused kernels.

    `y = gamma * (x - mean) / sqrt(variance + epsilon) + beta`

    The layer has the arguments, weights, config and saved files of
    `keras.layers.BatchNormalization`. On TensorFlow it runs one kernel forward
    and one backward for tensors of rank 4 with channels last, in float32,
    bfloat16 or float16 with float32 statistics. A program that XLA compiles
    (`jit_compile=True`) computes Keras' formula. With a mask, with synchronized
    statistics and in all other cases, Keras' layer runs. Outputs, gradients and
    moving statistics agree.

    Synchronized statistics are those of the images of all devices. Keras
    computes the variance as `mean(x^2) - mean(x)^2`, which loses the digits
    that both terms share. If the variance is small compared with the mean, all
    digits are lost. This layer computes `mean((x - mean)^2)`, as on one device.

    Args:
        axis, momentum, epsilon, ...: As in `keras.layers.BatchNormalization`.

    Call arguments:
        inputs: Tensor of any rank. The statistics cover all axes except
            `axis`. The update of a moving statistic is
            `moving = momentum * moving + (1 - momentum) * batch`.
        training: Whether to use the statistics of the batch and to update the
            moving statistics.
        mask: As in `keras.layers.BatchNormalization`.

    Returns:
        A tensor of the shape of `inputs`, in the layer's compute dtype.

    Example:

    >>> layer = BatchNormalization(epsilon=1e-5)
    >>> layer(keras.ops.ones((2, 4, 4, 3))).shape
    TensorShape([2, 4, 4, 3])
    """

    def call(self, inputs, training=None, mask=None):
        if not self._is_fused(inputs, mask):
            return super().call(inputs, training=training, mask=mask)
        import tensorflow as tf

        channels = self.moving_mean.shape[0]
        gamma = self.gamma if self.scale else tf.ones([channels])
        beta = self.beta if self.center else tf.zeros([channels])
        if not (training and self.trainable):
            return tf.raw_ops.FusedBatchNormV3(
                x=inputs,
                scale=ops.convert_to_tensor(gamma),
                offset=ops.convert_to_tensor(beta),
                mean=ops.convert_to_tensor(self.moving_mean),
                variance=ops.convert_to_tensor(self.moving_variance),
                epsilon=self.epsilon,
                is_training=False,
            ).y
        arguments = inputs, *map(tf.convert_to_tensor, (gamma, beta))
        if getattr(_STATE, "is_without_xla", False):
            outputs, mean, variance, *_ = _kernel(*arguments, self.epsilon)
        else:
            normalized = gradients.custom_gradient(_normalized, self)
            outputs, mean, variance = normalized(*arguments)
        for moving, batch in (
            (self.moving_mean, mean),
            (self.moving_variance, variance),
        ):
            value = ops.convert_to_tensor(moving)
            moving.assign(value + (batch - value) * (1.0 - self.momentum))
        return outputs

    def _moments(self, inputs, mask):
        if mask is not None or not self.synchronized:
            return super()._moments(inputs, mask)
        import tensorflow as tf

        axes = self._reduction_axes
        if not self._is_shared():
            return tf.nn.moments(inputs, axes)
        context = tf.distribute.get_replica_context()
        channels = inputs.shape[self.axis]
        count = tf.cast(tf.size(inputs) // channels, inputs.dtype)
        # One message has the sum and the count, a second one the squares. The
        # gradient of a sum over devices is the sum of their gradients.
        total = context.all_reduce(
            "SUM",
            tf.concat([tf.reduce_sum(inputs, axes), [count]], 0),
        )
        mean, count = total[:-1] / total[-1], total[-1]
        shape = [1] * len(inputs.shape)
        shape[self.axis] = channels
        squares = tf.math.squared_difference(inputs, tf.reshape(mean, shape))
        squares = context.all_reduce("SUM", tf.reduce_sum(squares, axes))
        return mean, squares / count

    def _is_shared(self) -> bool:
        """Returns whether several devices share the statistics."""
        if not self.synchronized:
            return False
        import tensorflow as tf

        context = tf.distribute.get_replica_context()
        return context is not None and context.num_replicas_in_sync > 1

    def _is_fused(self, inputs, mask) -> bool:
        return (
            keras.backend.backend() == "tensorflow"
            and mask is None
            and not getattr(_STATE, "is_unfused", False)
            and not self._is_shared()
            and not getattr(self, "renorm", False)
            and not _xla_clusters()
            and len(inputs.shape) == 4
            and self.axis in (-1, 3)
            and self.variable_dtype == "float32"
            and keras.backend.standardize_dtype(inputs.dtype)
            in ("float32", "bfloat16", "float16")
        )


def _kernel(x, gamma, beta, epsilon):
    """Normalizes a batch by its own statistics, with TensorFlow's kernel.

    Returns:
        The normalized tensor, the mean and the variance of each channel, and
        three tensors for the gradient's kernel.
    """
    import tensorflow as tf

    y, mean, variance, *saved = tf.raw_ops.FusedBatchNormV3(
        x=x,
        scale=gamma,
        offset=beta,
        mean=tf.zeros([0]),
        variance=tf.zeros([0]),
        epsilon=epsilon,
        is_training=True,
    )[:6]
    # The kernel divides the sum of squares by n - 1. Keras divides it by n, and
    # the batch is normalized with the latter.
    n = tf.cast(tf.size(x) // x.shape[-1], "float32")
    variance *= tf.maximum(n - 1.0, 1.0) / tf.maximum(n, 1.0)
    return y, mean, variance, *saved


def _normalized(layer, x, gamma, beta):
    """Normalizes a batch by its own statistics.

    XLA compiles TensorFlow's kernel to `mean(x^2) - mean(x)^2`, which loses the
    digits that both terms share. A program of XLA therefore computes the
    formula of Keras' layer.

    Args:
        layer: The `BatchNormalization`.
        x: Tensor of shape `[batch, height, width, channels]`.
        gamma: Scale of each channel, float32 of shape `[channels]`.
        beta: Offset of each channel, float32 of shape `[channels]`.

    Returns:
        The normalized tensor, in the dtype of `x`, the mean and the variance of
        each channel, float32 of shape `[channels]`, and the gradient, for
        `gradients.custom_gradient`.
    """
    import tensorflow as tf

    epsilon = layer.epsilon
    is_exact = getattr(_STATE, "is_exact", False)

    def formula():
        values = tf.cast(x, "float32")
        mean, variance = tf.nn.moments(values, (0, 1, 2))
        y = tf.nn.batch_normalization(
            values, mean, variance, beta, gamma, epsilon
        )
        saved = mean, variance, tf.zeros([0])
        return tf.cast(y, x.dtype), mean, variance, *saved

    # DeviceIndex returns the index of its device in the names. In a program of
    # XLA it returns the number of names. The result is unknown during tracing,
    # because a function that XLA compiles may call one that was traced before.
    devices = ["CPU", "GPU"]
    index = tf.raw_ops.DeviceIndex(device_names=devices)
    is_xla = tf.equal(index, len(devices))
    y, mean, variance, *saved, scratch = tf.cond(
        is_xla, formula, lambda: _kernel(x, gamma, beta, epsilon)
    )
    # TensorFlow would assume the scratch shape of `formula` for both branches,
    # and a loop could not keep the scratch of `kernel`.
    scratch = tf.raw_ops.PlaceholderWithDefault(
        input=scratch, shape=tf.TensorShape(None)
    )

    def gradient(_, dy, *__):
        with exact_gradients() if is_exact else contextlib.nullcontext():
            return tf.raw_ops.FusedBatchNormGradV3(
                y_backprop=dy,
                x=x,
                scale=gamma,
                reserve_space_1=saved[0],
                reserve_space_2=saved[1],
                reserve_space_3=scratch,
                epsilon=epsilon,
                is_training=True,
            )[:3]

    return (y, mean, variance), gradient


def _xla_clusters() -> bool:
    """Returns whether XLA's autoclustering is on, for any operation."""
    import tensorflow as tf

    flags = os.environ.get("TF_XLA_FLAGS", "")
    return bool(
        tf.config.optimizer.get_jit()
        or re.search(r"--tf_xla_auto_jit=(?!0|-1)", flags)
    )


@contextlib.contextmanager
def _state(name: str):
    before = getattr(_STATE, name, False)
    setattr(_STATE, name, True)
    try:
        yield
    finally:
        setattr(_STATE, name, before)


def unfused():
    """Returns a context in which `BatchNormalization` runs Keras' layer."""
    return _state("is_unfused")


def without_xla():
    """Returns a context for a graph that XLA never compiles.

    The graph then has the kernel alone, not a choice between kernel and
    formula. TensorFlow computes such a normalization and the ReLU behind it in
    one operation.
    """
    return _state("is_without_xla")


@contextlib.contextmanager
def exact_gradients():
    """Differentiates the fused kernel by its formula, in a graph.

    In the body of a `tf.while_loop`, TensorFlow's gradient of the kernel has
    wrong derivatives: second derivatives lack terms, without an error.
    """
    import tensorflow as tf

    _register_gradients()
    graph = tf.compat.v1.get_default_graph()
    names = {"FusedBatchNormV3": _NORM, "FusedBatchNormGradV3": f"{_NORM}Grad"}
    with _state("is_exact"), graph.gradient_override_map(names):
        yield


_NORM = "KerasResnetFusedBatchNorm"


@functools.cache
def _register_gradients():
    import tensorflow as tf

    @tf.RegisterGradient(_NORM)
    def gradient(op, dy, *_):
        x, scale, _, mean, variance = op.inputs
        training = op.get_attr("is_training")
        if training:
            mean, variance = op.outputs[3:5]
        with exact_gradients():
            dx, dscale, doffset, *_ = tf.raw_ops.FusedBatchNormGradV3(
                y_backprop=dy,
                x=x,
                scale=scale,
                reserve_space_1=mean,
                reserve_space_2=variance,
                reserve_space_3=op.outputs[5],
                epsilon=op.get_attr("epsilon"),
                is_training=training,
            )
        return dx, dscale, doffset, None, None

    @tf.RegisterGradient(f"{_NORM}Grad")
    def gradient_of_gradient(op, *ddy):
        inputs = [tf.identity(tensor) for tensor in op.inputs[:3]]
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            dy, x, scale = inputs
            type_of_x = x.dtype
            dy, x = tf.cast(dy, scale.dtype), tf.cast(x, scale.dtype)
            if op.get_attr("is_training"):
                mean, variance = tf.nn.moments(x, (0, 1, 2))
            else:
                mean, variance = op.inputs[3:5]
            inverse = tf.math.rsqrt(variance + op.get_attr("epsilon"))
            normal = (x - mean) * inverse
            dscale = tf.reduce_sum(dy * normal, (0, 1, 2))
            doffset = tf.reduce_sum(dy, (0, 1, 2))
            if op.get_attr("is_training"):
                dy -= tf.reduce_mean(dy, (0, 1, 2))
                dy -= normal * tf.reduce_mean(dy * normal, (0, 1, 2))
            dx = tf.cast(scale * inverse * dy, type_of_x)
        gradients = tape.gradient(
            [dx, dscale, doffset],
            inputs,
            list(ddy[:3]),
            unconnected_gradients="zero",
        )
        return *gradients, None, None, None


def norms(layer: keras.layers.Layer) -> list[keras.layers.BatchNormalization]:
    """Returns the batch normalizations of a layer, including the layer itself.

    >>> len(norms(keras.Sequential([BatchNormalization()])))
    1
    """
    return [
        inner
        for inner in layer._flatten_layers()
        if isinstance(inner, keras.layers.BatchNormalization)
    ]


def freeze(layer: keras.layers.Layer) -> None:
    """Freezes the batch normalizations of a layer.

    They normalize by the moving statistics in training too. Training changes
    neither the moving statistics nor gamma and beta.

    >>> layer = BatchNormalization()
    >>> freeze(layer)
    >>> layer.trainable
    False
    """
    for inner in layer._flatten_layers():
        if isinstance(inner, keras.layers.BatchNormalization):
            inner.trainable = False
        elif hasattr(inner, "freeze_norms"):  # norms that Keras cannot find
            inner.freeze_norms()
