"""Identical units as one loop, so that the graph does not grow with depth.

A stage of [1] or [2] starts with a unit that may change the dimension. Its
other n - 1 units are identical. If each unit is a layer, the time to build,
trace and optimize the graph grows with n. If the units are a loop over weights
of shape `[n, ...]`, only the time of a step grows.
"""

import contextlib
import random
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_resnet.layers import gradients
from keras_resnet.layers import normalization
from keras_resnet.layers import remat as remat_lib
from keras_resnet.layers.convolutions import papers_initializer
from keras_resnet.layers.units import Unit
from keras_resnet.layers.units import check_survival_probability

# Number of units that TensorFlow may compute at once. The gradients of the
# kernels of one unit overlap with the backward pass of the next.
_PARALLEL_ITERATIONS = 2

# A loop of fewer units is unrolled at inference, which needs no backward pass.
# Programs that convert the graph then find constant kernels.
_UNROLLED_BELOW = 40

_CONSTANTS = (
    keras.initializers.Constant,
    keras.initializers.Ones,
    keras.initializers.Zeros,
)


@keras.saving.register_keras_serializable(package="keras_resnet")
class UnitStack(keras.layers.Layer):
    """Stack of n identical units as one loop.

    `x_{l+1} = f(h(x_l) + F(x_l, W_l))` for l = 1 ... n

    Outputs, gradients and moving statistics equal those of n units one after
    the other. A weight of shape `[...]` of the unit is one weight of shape
    `[n, ...]` here, named after its layer (`conv1_kernel`). The loop is a
    `tf.while_loop` on TensorFlow and a `jax.lax.scan` on JAX. On other backends
    the units run one by one, and `remat` has no effect. At inference,
    TensorFlow also runs fewer than 40 units one by one.

    Args:
        unit: Pattern of all units. It must keep the shape of its input. The
            stack copies its configuration, and does not use its weights.
        count: Number n of units.
        survival_probabilities: Survival probability of each unit in stochastic
            depth, or None for that of `unit`.
        remat: Whether training keeps only the input of each unit, and
            recomputes the activations inside it in the backward pass.

    Call arguments:
        x: Tensor of shape `[batch, height, width, channels]`.
        training: Whether to normalize by the batch and drop at random.

    Returns:
        A tensor of the shape of `x`.

    Raises:
        ValueError: If the unit changes the shape, or the survival probabilities
            are not `count` numbers in (0, 1].
        NotImplementedError: If `tf.autodiff.ForwardAccumulator` differentiates
            training in a `tf.function`.

    Example:

    >>> from keras_resnet.layers import OriginalUnit
    >>> stack = UnitStack(OriginalUnit(16, shortcut="A"), count=5)
    >>> stack(ops.ones((1, 8, 8, 16))).shape
    TensorShape([1, 8, 8, 16])
    >>> tuple(stack.weights[0].shape)
    (5, 3, 3, 16, 16)
    """

    def __init__(
        self,
        unit: Unit,
        count: int,
        survival_probabilities: Sequence[float] | None = None,
        remat: bool = False,
        **kwargs,
    ):
        super().__init__(**kwargs)
        if isinstance(unit, dict):
            unit = keras.saving.deserialize_keras_object(unit)
        if survival_probabilities is None:
            survival_probabilities = [unit.survival_probability] * count
        if count < 1 or len(survival_probabilities) != count:
            raise ValueError(
                "count must be at least 1, with one survival probability for "
                f"each unit; received count={count} and "
                f"{len(survival_probabilities)} probabilities"
            )
        for survival_probability in survival_probabilities:
            check_survival_probability(survival_probability)
        self.count = count
        self.survival_probabilities = [float(p) for p in survival_probabilities]
        self.remat = remat
        pattern = type(unit).from_config(
            {
                **unit.get_config(),
                "name": "unit",
                "trainable": True,
                "dtype": self.dtype_policy,
                "remat": False,
                "survival_probability": min(self.survival_probabilities),
            }
        )
        # The variables of the pattern are placeholders for those of the unit
        # that runs. Keras must not find them among the weights of this layer.
        self._pattern = lambda: pattern

    def pattern(self) -> Unit:
        """Returns a unit like those of the stack. Its values are never used."""
        # It is a method, because Keras saves the layers that properties return.
        return self._pattern()

    def build(self, x_shape):
        unit = self.pattern()
        if tuple(unit.compute_output_shape(x_shape)) != tuple(x_shape):
            raise ValueError(
                "the units of a stack must keep the shape of their input, "
                f"received stride {unit.stride} and {unit.output_filters} "
                f"filters for an input of shape {tuple(x_shape)}"
            )
        unit.build(x_shape)
        norms_train = unit.batch_norm_trainable
        for layer in unit._flatten_layers():
            layer.trainable = True  # frozen units have states too
        self.stacked = []
        self._states = []  # indices of moving statistics and seeds
        initializers = _initializers(unit, x_shape, self.count)
        for i, (variable, initializer) in enumerate(
            zip(unit.variables, initializers, strict=True)
        ):
            path = variable.path.rpartition(f"{unit.name}/")[2]
            if variable.name == "seed_generator_state":
                path = f"seed{i}"  # Keras adds the number of the generator
            name = path.replace("/", "_")
            weight = self.add_weight(
                name=name,
                shape=(self.count, *variable.shape),
                dtype=variable.dtype,
                initializer=initializer,
                trainable=variable.trainable,
                autocast=False,
            )
            self.stacked.append(weight)
            # A checkpoint of TensorFlow finds weights in attributes, but not in
            # lists.
            attribute = f"stacked_{name}"
            if hasattr(self, attribute):
                attribute = f"{attribute}_{i}"
            setattr(self, attribute, weight)
            if not variable.trainable:
                self._states.append(i)
        unit.trainable = self.trainable
        if not norms_train:
            self.built = True
            self.freeze_norms()

    @keras.layers.Layer.trainable.setter
    def trainable(self, value):
        keras.layers.Layer.trainable.fset(self, value)
        # Frozen units normalize by their moving statistics.
        self.pattern().trainable = self.trainable

    def freeze_norms(self) -> None:
        """Freezes the normalizations of the units (`normalization.freeze`)."""
        unit = self.pattern()
        normalization.freeze(unit)
        if not self.built:
            return  # `build` reads the pattern
        for weight, variable in zip(self.stacked, unit.variables, strict=True):
            weight.trainable = variable.trainable

    def call(self, x, training=None):
        training = bool(training)
        values = [ops.copy(weight.value) for weight in self.stacked]
        loops = {"tensorflow": _loop_in_tensorflow, "jax": _loop_in_jax}
        loop = loops.get(keras.backend.backend(), _loop_in_python)
        y, states = loop(self, x, values, training)
        if training:
            for i, state in zip(self._states, states, strict=True):
                self.stacked[i].assign(state)
        return y

    def run(self, x, values, probability, training):
        """Computes one unit: its output and the new values of its states."""
        y, new = remat_lib.apply(
            self.pattern(), values, x, training, probability
        )
        return y, [new[i] for i in self._states]

    def compute_output_shape(self, x_shape):
        return x_shape

    def get_config(self):
        return {
            **super().get_config(),
            "unit": keras.saving.serialize_keras_object(
                type(self.pattern()).from_config(self.pattern().get_config())
            ),
            "count": self.count,
            "survival_probabilities": self.survival_probabilities,
            "remat": self.remat,
        }


def _initializers(unit, x_shape, count):
    """Returns initializers of shape `[n, ...]` for the variables of n units."""
    owners = {  # the innermost layer comes last
        id(variable): layer
        for layer in unit._flatten_layers()
        for variable in layer.variables
    }
    rules = [_initializer(v, owners[id(v)]) for v in unit.variables]
    if None in rules:
        # A layer of the user may start in any way, so n units are built.
        values = []
        for _ in range(count):
            copy = type(unit).from_config(unit.get_config())
            copy.build(x_shape)
            values.append(
                [
                    ops.convert_to_numpy(variable.value)
                    if rule is None
                    else None
                    for rule, variable in zip(
                        rules, copy.variables, strict=True
                    )
                ]
            )
        for i, value in enumerate(zip(*values, strict=True)):
            if rules[i] is None:
                rules[i] = _constant(np.stack(value))
    return rules


def _initializer(variable, owner):
    """Returns an initializer of shape `[n, ...]` for n variables like this one.

    Returns None if only n built units have the values.
    """
    if variable.name == "seed_generator_state":
        return lambda shape, dtype: ops.convert_to_tensor(
            [[random.randint(1, 10**9), 0] for _ in range(shape[0])], dtype
        )
    initializer = getattr(owner, f"{variable.name}_initializer", None)
    if isinstance(initializer, _CONSTANTS):
        return _constant(ops.convert_to_numpy(variable.value))
    if isinstance(initializer, keras.initializers.VarianceScaling):
        papers = papers_initializer()
        if initializer.get_config() == papers.get_config():
            # The variance depends on the shape of one kernel.
            fan_out = np.prod(variable.shape[:-2]) * variable.shape[-1]
            return keras.initializers.RandomNormal(
                0.0, (papers.scale / fan_out) ** 0.5
            )
    return None


def _constant(value):
    return lambda shape, dtype: ops.convert_to_tensor(
        np.broadcast_to(value, shape), dtype
    )


def _loop_in_python(stack, x, values, training):
    states = []
    for i, p in enumerate(stack.survival_probabilities):
        x, new = stack.run(x, [value[i] for value in values], p, training)
        if training:
            states.append(new)
    return x, [ops.stack(s) for s in zip(*states, strict=True)]


def _loop_in_jax(stack, x, values, training):
    import jax

    def body(x, value_and_p):
        *one, p = value_and_p
        return stack.run(x, one, p, training)

    if stack.remat and training:
        body = jax.checkpoint(body)
    probabilities = np.array(stack.survival_probabilities, "float32")
    return jax.lax.scan(body, x, (*values, probabilities))


def _loop_in_tensorflow(stack, x, values, training):
    import tensorflow as tf

    if stack.remat and training:
        return _recompute_in_tensorflow(stack, x, values)
    if not training and stack.count < _UNROLLED_BELOW:
        return _loop_in_python(stack, x, values, training)
    if training and not tf.executing_eagerly():
        x = _without_forward_mode(stack, x)
    y, states, _ = _forward(stack, x, values, training)
    return y, states


def _without_forward_mode(stack, x):
    """Returns x, and raises an error in forward-mode differentiation.

    TensorFlow's forward-mode derivatives of the normalizations in the loop are
    wrong.
    """
    import tensorflow as tf

    def identity(stack, x):
        return (tf.identity(x),), lambda stack, dy: (dy,)

    return gradients.custom_gradient(identity, stack)(x)[0]


def _forward(stack, x, values, training, keeps_inputs=False):
    """Computes the units one after the other.

    Returns:
        The output, the new states in training, and a TensorArray of the input
        of each unit if `keeps_inputs` is set.
    """
    import tensorflow as tf

    n = stack.count
    # The gradient of a read from a TensorArray costs as much as one value. The
    # gradient of a slice would cost as much as the whole stack.
    read = [_array(value).unstack(value) for value in values]
    written = [_array(values[i]) for i in stack._states if training]
    inputs: Any = ()
    if keeps_inputs:
        inputs = tf.TensorArray(
            x.dtype,
            size=n,
            element_shape=x.shape,
            clear_after_read=False,  # a gradient may be taken twice
        )
    probability = _probability(stack)

    def body(i, x, inputs, *written):
        if keeps_inputs:
            inputs = inputs.write(i, x)
        one = [array.read(i) for array in read]
        # No gradient is taken with respect to a state. Without this line, the
        # loop would keep the intermediate results of such a gradient.
        for j in stack._states:
            one[j] = tf.stop_gradient(one[j])
        with _exact_norms(training):
            y, new = stack.run(x, one, probability(i), training)
        y.set_shape(x.shape)
        if training:
            written = [
                array.write(i, tf.stop_gradient(state))
                for array, state in zip(written, new, strict=True)
            ]
        return (i + 1, y, inputs, *written)

    _, y, inputs, *written = tf.while_loop(
        lambda i, *_: i < n,
        body,
        (0, x, inputs, *written),
        maximum_iterations=n,
        parallel_iterations=_PARALLEL_ITERATIONS,
    )
    return y, [array.stack() for array in written], inputs


def _recompute_in_tensorflow(stack, x, values):
    """Keeps the input of each unit, and recomputes it in the backward loop."""
    import tensorflow as tf

    n = stack.count
    eagerly = tf.executing_eagerly()
    is_parameter = [weight.trainable for weight in stack.stacked]

    def merged(parameters):
        given = iter(parameters)
        return [
            next(given) if is_one else value
            for is_one, value in zip(is_parameter, values, strict=True)
        ]

    def run(stack, x, *parameters):
        every = merged(parameters)
        y, states, inputs = _forward(stack, x, every, True, keeps_inputs=True)

        def gradient(stack, dy, *_):
            probability = _probability(stack)
            kept = inputs
            if eagerly and not tf.executing_eagerly():
                # `tf.GradientTape.jacobian` computes the gradient in a graph.
                stacked = inputs.stack()
                kept = _array(stacked).unstack(stacked)

            def body(i, dx, *arrays):
                one = [value[i] for value in every]
                again = [kept.read(i)]
                again += [
                    value
                    for value, is_one in zip(one, is_parameter, strict=True)
                    if is_one
                ]
                with _exact_norms(training=True):
                    with tf.GradientTape() as tape:
                        tape.watch(again)
                        y, _ = stack.run(again[0], one, probability(i), True)
                    dx, *gradients = tape.gradient(
                        y, again, dx, unconnected_gradients="zero"
                    )
                return (
                    i - 1,
                    dx,
                    *(
                        array.write(i, gradient)
                        for array, gradient in zip(
                            arrays, gradients, strict=True
                        )
                    ),
                )

            _, dx, *arrays = tf.while_loop(
                lambda i, *_: i >= 0,
                body,
                (n - 1, dy, *map(_array, parameters)),
                maximum_iterations=n,
                parallel_iterations=_PARALLEL_ITERATIONS,
            )
            return (dx, *(array.stack() for array in arrays))

        return (y, *states), gradient

    parameters = [
        value
        for value, is_one in zip(values, is_parameter, strict=True)
        if is_one
    ]
    y, *states = gradients.custom_gradient(run, stack)(x, *parameters)
    return y, states


def _probability(stack):
    """Returns a function from the index of a unit to its probability."""
    import tensorflow as tf

    if min(stack.survival_probabilities) == 1.0:
        return lambda i: None  # nothing is dropped
    return tf.constant(stack.survival_probabilities).__getitem__


def _array(values):
    """Returns an empty TensorArray for the tensors that `values` stacks."""
    import tensorflow as tf

    return tf.TensorArray(
        values.dtype, size=values.shape[0], element_shape=values.shape[1:]
    )


def _exact_norms(training):
    """Returns a context for exact derivatives of normalizations in a loop.

    Inference runs Keras' layer, because a SavedModel cannot contain the
    gradients that `normalization.exact_gradients` registers.
    """
    import tensorflow as tf

    if tf.executing_eagerly():
        return contextlib.nullcontext()
    if training:
        return normalization.exact_gradients()
    return normalization.unfused()
