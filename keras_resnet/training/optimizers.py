"""The optimizer of a recipe, with momentum as one kernel per variable."""

import keras
import tensorflow as tf

from keras_resnet.training.recipes import Recipe


@keras.saving.register_keras_serializable(package="keras_resnet")
class Momentum(keras.optimizers.SGD):
    """`v = momentum * v - learning_rate * g; w += v`.

    This is `keras.optimizers.SGD` with the same arguments, state and numbers.
    For a variable on one device, one TensorFlow kernel computes both lines.
    Keras takes four operations, each of which passes over the weights.
    Nesterov's momentum, no momentum and other backends use Keras' code.

    Args:
        learning_rate, momentum, ...: As in `keras.optimizers.SGD`.

    >>> weight = keras.Variable([1.0])
    >>> Momentum(0.1, momentum=0.9).apply([tf.constant([2.0])], [weight])
    >>> weight.numpy()
    array([0.8], dtype=float32)
    """

    def update_step(self, gradient, variable, learning_rate):
        if (
            keras.backend.backend() != "tensorflow"
            or isinstance(variable, tf.distribute.DistributedValues)
            or hasattr(variable, "_distributed_container")
            or not self.momentum
            or self.nesterov
        ):
            super().update_step(gradient, variable, learning_rate)
            return
        velocity = self.momentums[self._get_variable_index(variable)]
        tf.raw_ops.ResourceApplyKerasMomentum(
            var=variable.handle,
            accum=velocity.value.handle,
            lr=tf.cast(learning_rate, variable.dtype),
            grad=tf.cast(gradient, variable.dtype),
            momentum=tf.constant(self.momentum, variable.dtype),
        )


def of_recipe(
    recipe: Recipe, adds_replicas: bool = True
) -> keras.optimizers.Optimizer:
    """Returns a new optimizer of a recipe, with its learning rates.

    Weight decay is a part of the gradient, not of the optimizer.

    Args:
        recipe: The recipe.
        adds_replicas: Whether `apply` adds up the gradients of the replicas of
            a `tf.distribute` strategy, as Keras' optimizers do. False if they
            have already been added up.

    Returns:
        A `keras.optimizers.Optimizer`.

    >>> from keras_resnet.training.recipes import RECIPES
    >>> of_recipe(RECIPES["cifar10"]).momentum
    0.9
    """
    rates = recipe.learning_rates()
    if recipe.optimizer == "adam":
        optimizer = keras.optimizers.Adam(rates, beta_1=recipe.momentum)
    else:
        optimizer = Momentum(
            rates,
            momentum=recipe.momentum,
            nesterov=recipe.optimizer == "nesterov",
        )
    if not adds_replicas:
        # Keras lacks an argument for this; the method adds them up.
        optimizer._all_reduce_sum_gradients = list
    return optimizer


def averages(recipe: Recipe, model: keras.Model) -> list[tf.Variable]:
    """Returns variables for the moving average of the parameters, if any."""
    if not recipe.average_momentum:
        return []
    return [
        tf.Variable(v.value, trainable=False) for v in model.trainable_variables
    ]
