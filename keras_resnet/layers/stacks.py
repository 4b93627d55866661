"""Identical units as one loop: a graph that does not grow with depth.

A stage of [1] or [2] is one unit that may change the dimension and then n - 1
units that are alike. As layers of a graph, their number decides how long it
takes to build, trace and optimize; as a loop over weights of shape [n, ...] it
decides nothing but the time of a step.
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

# Units of a loop that TensorFlow may work on at once: the gradient of one's
# kernels is computed beside the next one's backward pass.
_PARALLEL_ITERATIONS = 2

# A loop of fewer units is unrolled at inference, where there is no backward
# pass to build: then its kernels are constants to whatever converts the graph.
_UNROLLED_BELOW = 40

_CONSTANTS = (
    keras.initializers.Constant,
    keras.initializers.Ones,
    keras.initializers.Zeros,
)


@keras.saving.register_keras_serializable(package="keras_resnet")
class UnitStack(keras.layers.Layer):
    """`x_{l+1} = f(h(x_l) + F(x_l, W_l))` for l = 1 ... n, as one loop.

    The same function as n units one after the other: outputs, gradients and
    moving statistics are equal. Each weight of the unit, of shape `[...]`, is
    one weight of shape `[n, ...]` here, named after its layer
    (`conv1_kernel`). On TensorFlow the loop is a `tf.while_loop`, on JAX a
    `jax.lax.scan`; elsewhere the units run one by one, and keep what they
    compute whatever `remat` says. TensorFlow also runs fewer than 40 units one
    by one at inference.

    Args:
        unit: A unit as the pattern of all of them; it must keep the shape of
            its input. It is copied, so its own weights are not used.
        count: n, the number of units.
        survival_probabilities: p of each unit's stochastic depth; None for
            that of `unit`.
        remat: Whether training keeps nothing but the input of each unit, and
            computes the activations inside again in the backward pass.

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
        # The pattern's variables stand for those of whichever unit runs. They
        # are no weights of this layer, so Keras must not find them.
        self._pattern = lambda: pattern

    def pattern(self) -> Unit:
        """A unit like those of the stack; its own values are never used."""
        # A method: Keras saves the layers that it finds in properties.
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
            layer.trainable = True  # what is a state is one frozen or not
        self.stacked = []
        self._states = []  # the places of moving statistics and seeds
        initializers = _initializers(unit, x_shape, self.count)
        for i, (variable, initializer) in enumerate(
            zip(unit.variables, initializers, strict=True)
        ):
            path = variable.path.rpartition(f"{unit.name}/")[2]
            if variable.name == "seed_generator_state":
                path = f"seed{i}"  # Keras numbers the generators of a session
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
            # Checkpoints of TensorFlow find a weight that is an attribute, and
            # none that is in a list.
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
        """`layers.normalization.freeze` for the units of the stack."""
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
        """One unit: its output and the new values of its states."""
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
    """Initializers of shape [n, ...] for the variables of n such units."""
    owners = {  # the innermost comes last
        id(variable): layer
        for layer in unit._flatten_layers()
        for variable in layer.variables
    }
    rules = [_initializer(v, owners[id(v)]) for v in unit.variables]
    if None in rules:
        # How a layer of one's own starts only units of its own can tell.
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
    """An initializer of shape [n, ...] for n variables like this one.

    None where it takes n units to know.
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
            # The variance depends on the shape of one kernel, not of the stack.
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
    """Returns x, which raises an error in forward-mode differentiation.

    TensorFlow would differentiate the normalizations of the loop wrongly.
    """
    import tensorflow as tf

    def identity(stack, x):
        return (tf.identity(x),), lambda stack, dy: (dy,)

    return gradients.custom_gradient(identity, stack)(x)[0]


def _forward(stack, x, values, training, keeps_inputs=False):
    """The units one after the other.

    Returns:
        The output, the new states if training, and a TensorArray of the input
        of each unit if `keeps_inputs`.
    """
    import tensorflow as tf

    n = stack.count
    # A value is read by its place in a TensorArray: the gradient of that costs
    # as much as one value, that of a slice as much as the whole stack.
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
        # Nothing is differentiated by a state: without this, the loop would
        # keep what that takes for every unit.
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
    """Keeps the input of each unit; its tape runs in the backward loop."""
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
                # `tf.GradientTape.jacobian` takes the gradient in a graph.
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
    """A function from the number of a unit to its survival probability."""
    import tensorflow as tf

    if min(stack.survival_probabilities) == 1.0:
        return lambda i: None  # nothing is dropped, nothing looked up
    return tf.constant(stack.survival_probabilities).__getitem__


def _array(values):
    """An empty TensorArray for tensors like those stacked in `values`."""
    import tensorflow as tf

    return tf.TensorArray(
        values.dtype, size=values.shape[0], element_shape=values.shape[1:]
    )


def _exact_norms(training):
    """Has the normalizations in the loop of a graph differentiated exactly.

    Inference takes Keras' own path, because a SavedModel cannot hold the
    gradients that `normalization.exact_gradients` registers.
    """
    import tensorflow as tf

    if tf.executing_eagerly():
        return contextlib.nullcontext()
    if training:
        return normalization.exact_gradients()
    return normalization.unfused()
