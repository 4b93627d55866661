"""The optimizer of a recipe, with momentum as one kernel per variable."""

from collections.abc import Sequence

import keras
import tensorflow as tf
from keras import ops

from keras_resnet.training.recipe import Recipe
from keras_resnet.training.recipe_rules import DECOUPLED


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


@keras.saving.register_keras_serializable(package="keras_resnet")
class Lamb(keras.optimizers.Lamb):
    """LAMB with the decay inside of the trust ratio (You et al. 2020).

    With Adam's update u of a variable w, `d = u + weight_decay w` and
    `w -= learning_rate |w| / |d| d`. A variable that is not decayed has
    `w -= learning_rate u`, as in NVIDIA's and timm's LAMB.
    `keras.optimizers.Lamb` decays outside of the ratio.

    Args:
        learning_rate, beta_1, ...: As in `keras.optimizers.Lamb`.
    """

    def update_step(self, gradient, variable, learning_rate):
        rate = ops.cast(learning_rate, variable.dtype)
        gradient = ops.cast(gradient, variable.dtype)
        step = ops.cast(self.iterations + 1, variable.dtype)
        index = self._get_variable_index(variable)
        m, v = self._momentums[index], self._velocities[index]
        self.assign_add(m, (gradient - m) * (1 - self.beta_1))
        self.assign_add(v, (ops.square(gradient) - v) * (1 - self.beta_2))
        mean = m / (1 - self.beta_1**step)
        square = v / (1 - self.beta_2**step)
        update = mean / (ops.sqrt(square) + self.epsilon)
        if self.weight_decay and self._use_weight_decay(variable):
            update = update + self.weight_decay * variable
            update = update * _ratio(_norm(variable), _norm(update))
        self.assign_sub(variable, rate * update)

    def _apply_weight_decay(self, variables):
        """Does nothing: the decay is a part of the update."""


@keras.saving.register_keras_serializable(package="keras_resnet")
class Lars(keras.optimizers.SGD):
    """LARS: momentum with a rate for each variable (You et al. 2017).

    With the gradient g of a variable w, `d = g + weight_decay w`,
    `v = momentum v - learning_rate trust |w| / (|g| + weight_decay |w|) d` and
    `w += v`. A variable that is not decayed has `v = momentum v -
    learning_rate g`.

    Args:
        learning_rate, momentum, ...: As in `keras.optimizers.SGD`; the momentum
            is not 0.
        trust: The paper's coefficient, 0.001.
    """

    def __init__(
        self, learning_rate=0.01, momentum=0.9, trust=0.001, **arguments
    ):
        super().__init__(learning_rate, momentum, **arguments)
        self.trust = trust

    def update_step(self, gradient, variable, learning_rate):
        gradient = ops.cast(gradient, variable.dtype)
        if self.weight_decay and self._use_weight_decay(variable):
            size, slope = _norm(variable), _norm(gradient)
            ratio = _ratio(self.trust * size, slope + self.weight_decay * size)
            gradient = ratio * (gradient + self.weight_decay * variable)
        rate = ops.cast(learning_rate, variable.dtype)
        velocity = self.momentums[self._get_variable_index(variable)]
        self.assign(velocity, self.momentum * velocity - rate * gradient)
        self.assign_add(variable, velocity)

    def _apply_weight_decay(self, variables):
        """Does nothing: the decay is a part of the update."""

    def get_config(self):
        return {**super().get_config(), "trust": self.trust}


def _norm(tensor):
    return ops.sqrt(ops.sum(ops.square(tensor)))


def _ratio(numerator, denominator):
    """Returns the ratio of two norms, 1 if one of them is zero."""
    is_ratio = (numerator > 0) & (denominator > 0)
    return ops.where(
        is_ratio, numerator / ops.where(is_ratio, denominator, 1.0), 1.0
    )


def of_recipe(
    recipe: Recipe, variables: Sequence = (), adds_replicas: bool = True
) -> keras.optimizers.Optimizer:
    """Returns a new optimizer of a recipe, with its learning rates.

    The decay of the optimizers that are not in `DECOUPLED` is a part of the
    gradient.

    Args:
        recipe: The recipe.
        variables: The parameters, for which the optimizer is built.
        adds_replicas: Whether `apply` adds up the gradients of the replicas of
            a `tf.distribute` strategy, as Keras' optimizers do. False if they
            have already been added up.

    Returns:
        A `keras.optimizers.Optimizer`.

    >>> from keras_resnet.training.recipes import RECIPES
    >>> of_recipe(RECIPES["cifar10"]).momentum
    0.9
    """
    rates, momentum = recipe.learning_rates(), recipe.momentum
    decay = recipe.weight_decay or None
    if recipe.optimizer == "adam":
        optimizer = keras.optimizers.Adam(rates, beta_1=momentum)
    elif recipe.optimizer == "adamw":
        optimizer = keras.optimizers.AdamW(
            rates, recipe.weight_decay, beta_1=momentum
        )
    elif recipe.optimizer == "lamb":
        # The epsilon of timm, with which RSB was trained.
        optimizer = Lamb(
            rates, beta_1=momentum, epsilon=1e-6, weight_decay=decay
        )
    elif recipe.optimizer == "lars":
        optimizer = Lars(rates, momentum, weight_decay=decay)
    else:
        optimizer = Momentum(
            rates,
            momentum=momentum,
            nesterov=recipe.optimizer == "nesterov",
        )
    if not adds_replicas:
        # Keras lacks an argument for this; the method adds them up.
        optimizer._all_reduce_sum_gradients = list
    kept = [variable for variable in variables if not recipe.decays(variable)]
    if recipe.optimizer in DECOUPLED and kept:
        optimizer.exclude_from_weight_decay(var_list=kept)
    if variables:
        optimizer.build(variables)
    return optimizer


def averages(recipe: Recipe, model: keras.Model) -> list[tf.Variable]:
    """Returns variables for the moving average of the parameters, if any."""
    if not recipe.average_momentum:
        return []
    return [
        tf.Variable(v.value, trainable=False) for v in model.trainable_variables
    ]
