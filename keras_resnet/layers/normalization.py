"""Batch normalization on TensorFlow's fused kernels.

Both papers normalize after every convolution, with epsilon 1e-5 and a moving
average of 0.9 ([1, Sec. 3.4]; the numbers are those of the authors' code).
"""

import os
import re

import keras
from keras import ops

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
    path, and a program that XLA compiles (`jit_compile=True`) Keras' formula.
    All agree in outputs, gradients and moving statistics.

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
        outputs, mean, variance = _normalized(
            inputs,
            tf.convert_to_tensor(gamma),
            tf.convert_to_tensor(beta),
            self.epsilon,
        )
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
            and not self._is_shared()
            and not getattr(self, "renorm", False)
            and not _xla_clusters()
            and len(inputs.shape) == 4
            and self.axis in (-1, 3)
            and self.variable_dtype == "float32"
            and keras.backend.standardize_dtype(inputs.dtype)
            in ("float32", "bfloat16", "float16")
        )


def _normalized(x, gamma, beta, epsilon):
    """Normalizes a batch by its own statistics.

    XLA compiles TensorFlow's kernel to `mean(x^2) - mean(x)^2`, which loses the
    digits that the two have in common. A program of XLA therefore computes the
    formula of Keras' layer.

    Args:
        x: Tensor of shape `[batch, height, width, channels]`.
        gamma: Scale of each channel, float32 of shape `[channels]`.
        beta: Offset of each channel, float32 of shape `[channels]`.
        epsilon: Added to the variance.

    Returns:
        The normalized tensor, in the dtype of `x`, and the mean and the
        variance of each channel, float32 of shape `[channels]`.
    """
    import tensorflow as tf

    def kernel(x, gamma, beta):
        y, mean, variance, *saved = tf.raw_ops.FusedBatchNormV3(
            x=x,
            scale=gamma,
            offset=beta,
            mean=tf.zeros([0]),
            variance=tf.zeros([0]),
            epsilon=epsilon,
            is_training=True,
        )[:6]
        # The kernel returns the sum of squares over n - 1; Keras keeps the
        # one over n, which is what normalizes the batch.
        n = tf.cast(tf.size(x) // x.shape[-1], "float32")
        variance *= tf.maximum(n - 1.0, 1.0) / tf.maximum(n, 1.0)
        return y, mean, variance, *saved

    def formula(x, gamma, beta):
        values = tf.cast(x, "float32")
        mean, variance = tf.nn.moments(values, (0, 1, 2))
        y = tf.nn.batch_normalization(
            values, mean, variance, beta, gamma, epsilon
        )
        saved = mean, variance, tf.zeros([0])
        return tf.cast(y, x.dtype), mean, variance, *saved

    # This kernel returns the place of its device among the names, and in a
    # program of XLA their number. Tracing does not know: XLA also compiles
    # functions that were traced for TensorFlow's kernels.
    devices = ["CPU", "GPU"]
    index = tf.raw_ops.DeviceIndex(device_names=devices)
    is_xla = tf.equal(index, len(devices))

    @tf.custom_gradient
    def run(x, gamma, beta):
        y, mean, variance, *saved = tf.cond(
            is_xla,
            lambda: formula(x, gamma, beta),
            lambda: kernel(x, gamma, beta),
        )

        def gradient(dy, *_):
            return tf.raw_ops.FusedBatchNormGradV3(
                y_backprop=dy,
                x=x,
                scale=gamma,
                reserve_space_1=saved[0],
                reserve_space_2=saved[1],
                reserve_space_3=saved[2],
                epsilon=epsilon,
                is_training=True,
            )[:3]

        return (y, mean, variance), gradient

    return run(x, gamma, beta)


def _xla_clusters() -> bool:
    """Returns whether autoclustering is on: XLA may compile any operation."""
    import tensorflow as tf

    flags = os.environ.get("TF_XLA_FLAGS", "")
    return bool(
        tf.config.optimizer.get_jit()
        or re.search(r"--tf_xla_auto_jit=(?!0|-1)", flags)
    )


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
