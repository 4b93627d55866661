"""Trains on two logical processors and compares the results.

It needs a process of its own: devices can only be made before TensorFlow runs.
"""

import functools

import keras
import numpy as np
import tensorflow as tf

import keras_resnet
from keras_resnet import layers

STEPS = 3


def train(make, start=None, devices=2, offset=0.0):
    """The weights of a model after some steps on several devices.

    Args:
        make: Gives the model, from float images [batch, 6, 6, 3] to [batch, 2].
        start: Is given the model before the first step.
        devices: Number of devices.
        offset: Of all images.
    """
    strategy = tf.distribute.MirroredStrategy(
        [f"CPU:{i}" for i in range(devices)],
        # Several strategies in one process disturb each other's collectives.
        cross_device_ops=tf.distribute.ReductionToOneDevice(),
    )
    with strategy.scope():
        keras.utils.set_random_seed(0)
        model = make()
        if start is not None:
            start(model)
        optimizer = keras.optimizers.SGD(0.01, momentum=0.9)
        optimizer.build(model.trainable_variables)
    images = np.random.default_rng(0).normal(offset, size=(16, 6, 6, 3))
    batches = tf.data.Dataset.from_tensors(images.astype("float32"))
    batches = batches.unbatch().batch(16).repeat(STEPS)

    @tf.function
    def step(images):
        def replica(images):
            with tf.GradientTape() as tape:
                loss = tf.reduce_sum(model(images, training=True) ** 2) / 32
            variables = model.trainable_variables
            optimizer.apply(tape.gradient(loss, variables), variables)

        strategy.run(replica, (images,))

    for batch in strategy.experimental_distribute_dataset(batches):
        step(batch)
    return model


def difference(a, b):
    """The largest difference of two models' weights."""
    pairs = zip(a.get_weights(), b.get_weights(), strict=True)
    return float(max(np.abs(x - y).max() for x, y in pairs))


def statistics(a, b):
    """The largest difference of two models' moving variances, relative."""
    pairs = [
        (x.numpy(), y.numpy())
        for x, y in zip(a.weights, b.weights, strict=True)
        if x.name == "moving_variance"
    ]
    return float(max(np.abs(x / y - 1).max() for x, y in pairs))


def with_norm(norm):
    def make():
        return keras.Sequential(
            [
                keras.Input((6, 6, 3)),
                keras.layers.Conv2D(4, 3),
                norm(),
                keras.layers.Flatten(),
                keras.layers.Dense(2),
            ]
        )

    return make


def network(**arguments):
    spec = keras_resnet.Spec(
        "tiny", (3,), (4,), stem="cifar", shortcut="A", classes=2
    )
    return keras_resnet.resnet(spec, input_shape=(6, 6, 3), **arguments)


def differences():
    """The largest differences of weights or statistics, by what is compared."""
    processor = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(
        processor, [tf.config.LogicalDeviceConfiguration()] * 2
    )
    first = network(looped=False)

    def start(model):
        keras_resnet.weights.copy(first, model)

    unrolled = train(functools.partial(network, looped=False), start)
    found = {
        "norm": difference(
            train(with_norm(layers.BatchNormalization)),
            train(with_norm(keras.layers.BatchNormalization)),
        ),
        "moved": difference(unrolled, first),
    }
    norm = functools.partial(layers.BatchNormalization, synchronized=True)
    keras_norm = functools.partial(
        keras.layers.BatchNormalization, synchronized=True
    )
    whole = train(with_norm(layers.BatchNormalization), devices=1)
    synchronized = train(with_norm(norm))
    found["synchronized norm"] = difference(synchronized, whole)
    found["that of Keras"] = difference(
        synchronized, train(with_norm(keras_norm))
    )
    far = 1000.0  # a mean of which the variance is the millionth part
    whole = train(with_norm(layers.BatchNormalization), devices=1, offset=far)
    found["far"] = statistics(train(with_norm(norm), offset=far), whole)
    for remat in (False, True):
        arguments = {"looped": True, "remat": remat}
        looped = train(functools.partial(network, **arguments), start)
        copied = network(looped=False)
        keras_resnet.weights.copy(looped, copied)
        name = "recomputed stack" if remat else "stack"
        found[name] = difference(copied, unrolled)
    return found
