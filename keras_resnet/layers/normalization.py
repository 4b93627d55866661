"""Batch normalization on TensorFlow's fused kernels.

Both papers normalize after every convolution, with epsilon 1e-5 and a moving
average of 0.9 ([1, Sec. 3.4]; the numbers are those of the authors' code).
"""

import contextlib
import threading

import keras
from keras import ops

_STATE = threading.local()

MOMENTUM = 0.9
EPSILON = 1e-5


@keras.saving.register_keras_serializable(package="keras_resnet")
class BatchNormalization(keras.layers.BatchNormalization):
    """`y = gamma * (x - mean) / sqrt(variance + epsilon) + beta`.

    This is `keras.layers.BatchNormalization` (the same arguments, weights,
    config and saved files) computed by one kernel forward and one backward
    where TensorFlow has them: channels last, rank 4, float32, bfloat16 or
    float16 (with float32 statistics), neither mask nor synchronized
    statistics. Everything else, and every other backend, takes Keras' own
    path. The two agree in outputs, gradients and moving statistics.

    Synchronized, the statistics are those of the images of all devices. Keras
    takes the variance as `mean(x^2) - mean(x)^2`, which loses the digits that
    the two have in common: all of them where the variance is small beside the
    mean. Here it is `mean((x - mean)^2)`, as on one device.

    Args:
        axis, momentum, epsilon, ...: As in `keras.layers.BatchNormalization`.

    Call arguments:
        inputs: Tensor of any rank; the statistics are taken over all axes
            but `axis`, the moving ones as
            `moving = momentum * moving + (1 - momentum) * batch`.
        training: Whether to use, and record, the statistics of the batch.
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
        outputs, mean, variance, *_ = tf.raw_ops.FusedBatchNormV3(
            x=inputs,
            scale=ops.convert_to_tensor(gamma),
            offset=ops.convert_to_tensor(beta),
            mean=tf.zeros([0]),
            variance=tf.zeros([0]),
            epsilon=self.epsilon,
            is_training=True,
        )
        # The kernel returns the sum of squares over n - 1; Keras keeps the
        # one over n, which is what normalizes the batch.
        n = inputs.shape.num_elements()
        if n is not None:
            n = n // channels
            variance *= max(n - 1, 1) / max(n, 1)
        else:
            n = tf.cast(tf.size(inputs) // channels, "float32")
            variance *= tf.maximum(n - 1.0, 1.0) / n
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
        # One message for the sum and the count, one for the squares. The
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
        """Whether the statistics are those of several devices."""
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
            and len(inputs.shape) == 4
            and self.axis in (-1, 3)
            and self.variable_dtype == "float32"
            and keras.backend.standardize_dtype(inputs.dtype)
            in ("float32", "bfloat16", "float16")
        )


@contextlib.contextmanager
def unfused():
    """Has `BatchNormalization` take Keras' own path."""
    before = getattr(_STATE, "is_unfused", False)
    _STATE.is_unfused = True
    try:
        yield
    finally:
        _STATE.is_unfused = before


def norms(layer: keras.layers.Layer) -> list[keras.layers.BatchNormalization]:
    """The batch normalizations of a layer, itself and those inside of it.

    >>> len(norms(keras.Sequential([BatchNormalization()])))
    1
    """
    return [
        inner
        for inner in layer._flatten_layers()
        if isinstance(inner, keras.layers.BatchNormalization)
    ]


def freeze(layer: keras.layers.Layer) -> None:
    """Has a layer normalize by the moving statistics, in training too.

    They stay as they are, and gamma and beta are not trained.
    """
    for inner in layer._flatten_layers():
        if isinstance(inner, keras.layers.BatchNormalization):
            inner.trainable = False
        elif hasattr(inner, "freeze_norms"):  # Keras does not find all norms
            inner.freeze_norms()
