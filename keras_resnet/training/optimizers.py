"""The optimizer of a recipe; momentum as one kernel a variable."""

import keras
import tensorflow as tf

from keras_resnet.training.recipes import Recipe


@keras.saving.register_keras_serializable(package="keras_resnet")
class Momentum(keras.optimizers.SGD):
    """`v = momentum * v - learning_rate * g; w += v`.

    `keras.optimizers.SGD` with the same arguments, state and numbers; where a
    variable is on one device, the two lines are one kernel of TensorFlow and
    not four operations that each pass over the weights. What SGD does besides
    (Nesterov's momentum, no momentum, other backends) is left to it.

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
    """A new optimizer as a recipe has it, with its learning rates.

    The weight decay is not its business: it is a part of the gradient.

    Args:
        recipe: Whose `optimizer`, `momentum` and rates.
        adds_replicas: Whether `apply` adds up the gradients of the replicas of
            a `tf.distribute` strategy, as Keras' optimizers do; False where
            they have been added.

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
        # Keras has no switch for it: this is where it would add them.
        optimizer._all_reduce_sum_gradients = list
    return optimizer


def averages(recipe: Recipe, model: keras.Model) -> list[tf.Variable]:
    """Variables for the moving average of the parameters; none without."""
    if not recipe.average_momentum:
        return []
    return [
        tf.Variable(v.value, trainable=False) for v in model.trainable_variables
    ]
