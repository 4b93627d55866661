"""Training on JAX: the state of a run, and one accelerator.

Use it for an accelerator that TensorFlow does not support. The training images
stay in its memory, and several steps are one program. A batch and its
augmentation are a function of (seed, step), as on TensorFlow, and have the same
distribution. NumPy draws them, so the two backends train differently with the
same seed.
"""

import dataclasses
import itertools

import numpy as np
import tensorflow as tf
from keras import ops

from keras_resnet import training
from keras_resnet.data import datasets
from keras_resnet.training import checkpoints
from keras_resnet.training import configs
from keras_resnet.training import evaluation
from keras_resnet.training import optimizers
from keras_resnet.training import step


def _program_steps() -> int:
    """Returns the number of steps in a program; a second program has one step.

    On an H100 a step of ResNet-20 is hundreds of kernels in 2 ms, which XLA
    starts faster than Python. On a processor a convolution in a loop of XLA
    takes many times as long as one outside.
    """
    import jax

    return 1 if jax.default_backend() == "cpu" else 20


class UnsupportedError(ValueError):
    """A configuration that only TensorFlow can train.

    Args:
        name: The field of the configuration, or `recipe.FIELD`.
        received: Its value.
        allowed: The values that JAX can train, in words.
    """

    def __init__(self, name: str, received, allowed: str):
        super().__init__(
            f"on JAX {name} must be {allowed}, received {received!r}; set "
            "KERAS_BACKEND=tensorflow for other values"
        )
        self.name = name
        self.received = received


def check(config: configs.Config, dataset: datasets.DataSet) -> None:
    """Raises if a configuration needs what training on JAX cannot do yet.

    The table is that of docs/training.md.

    Raises:
        UnsupportedError: Names the first field.
    """
    recipe = config.recipe
    for name, received, is_allowed, allowed in (
        (
            "dtype",
            config.dtype,
            config.dtype in ("float32", "mixed_bfloat16"),
            "float32 or mixed_bfloat16",
        ),
        (
            "deterministic",
            config.deterministic,
            not config.deterministic,
            "False",
        ),
        (
            "sync_batch_norm",
            config.sync_batch_norm,
            not config.sync_batch_norm,
            "False",
        ),
        ("weights", config.weights, config.weights is None, "random weights"),
        (
            "recipe.average_momentum",
            recipe.average_momentum,
            not recipe.average_momentum,
            "0.0",
        ),
        (
            "dataset",
            config.dataset,
            not dataset.has_photos,
            "a data set of small images of one size",
        ),
        (
            "recipe.augmentation",
            recipe.augmentation.name,
            recipe.augmentation.crop.window is None,
            "an augmentation that only pads and mirrors",
        ),
        (
            "recipe.progressive_sizes",
            recipe.progressive_sizes,
            not recipe.progressive_sizes,
            "()",
        ),
        *_augmentation_fields(recipe.augmentation),
    ):
        if not is_allowed:
            raise UnsupportedError(name, received, allowed)


def _augmentation_fields(augmentation):
    """Yields the rows of `check` for the fields without code on JAX."""
    for field in dataclasses.fields(augmentation):
        if field.name != "name":
            value = getattr(augmentation, field.name)
            is_default = value == field.default
            default = repr(field.default)
            yield f"recipe.{field.name}", value, is_default, default


class JaxTrainer:
    """The state of a run on the accelerator, and the programs that advance it.

    Args:
        config: The configuration of the run.
        dataset: Its data set, which must fit in the accelerator's memory.
    """

    def __init__(self, config, dataset):
        training.require_backend(__name__, "jax")
        import jax

        check(config, dataset)
        recipe = config.recipe
        self.config = config
        self.rates = recipe.learning_rates()
        self.crop = recipe.augmentation.crop
        self.model = configs.build_model(
            config, dataset.image_shape, dataset.classes
        )
        self.optimizer = optimizers.of_recipe(
            recipe, self.model.trainable_variables
        )
        self.step = step.Step(
            config, self.model, self.optimizer, _differentiate
        )
        self.variables = (
            self.model.trainable_variables,
            self.model.non_trainable_variables,
            self.optimizer.variables,
        )
        # Copies: a program may overwrite the state that it receives.
        self.state = tuple(
            [ops.copy(variable.value) for variable in variables]
            for variables in self.variables
        )
        self.completed_steps = 0
        self.rows = ""  # of metrics.csv, up to the last checkpoint
        self.sums = ops.zeros(4)
        self.preprocessing = dataset.preprocessing
        self.train_size = dataset.train_size
        images, labels = dataset.sample(self.train_size, training=True)
        self.train_images = ops.array(images), ops.array(labels)
        self.test_images = dataset.test_images(dataset.test_size)
        self.orders = {}
        self.programs = {}
        self.take_steps = jax.jit(self._take_steps, donate_argnums=0)
        self.count_errors = jax.jit(self._count_errors)

    @property
    def images_since_row(self) -> int:
        return int(self.read_sums()[3])

    def read_sums(self) -> list[float]:
        """Returns the sums of `count_errors` since the last row."""
        return np.asarray(self.sums).tolist()

    def last_gradient_norm(self) -> None:
        """Returns None: a program of several steps does not return norms."""

    def clear_sums(self):
        """Sets the sums to zero, for the next row."""
        self.sums = ops.zeros(4)

    def restore(self, directory, report):
        """Reads the newest checkpoint that is not damaged.

        Returns:
            Its step, or None without a checkpoint.
        """
        return checkpoints.restore(self.read, directory, report)

    def synchronize(self):
        """Returns at once: a JAX run has one worker."""

    def is_finite(self) -> bool:
        """Returns whether every weight is a finite number."""
        weights = [v for values in self.state[:2] for v in values]
        return all(np.all(np.isfinite(np.asarray(v))) for v in weights)

    def take(self, steps, stop_requested, seconds):
        """Takes the next steps, as `TensorFlowTrainer.take` on one device."""
        if not self.programs:
            self._compile()
        end = self.completed_steps + (1 if stop_requested else steps)
        while self.completed_steps < end:
            left = end - self.completed_steps
            count = max(n for n in self.programs if n <= left)
            self.state, self.sums = self.programs[count](*self._inputs(count))
            self.completed_steps += count
        self.sums.block_until_ready()
        return stop_requested, seconds

    def _compile(self):
        """Compiles all programs; the loop does not time the first step."""
        left = self.config.recipe.steps - self.completed_steps
        for count in {1, _program_steps()} if left > _program_steps() else {1}:
            lowered = self.take_steps.lower(*self._inputs(count))
            self.programs[count] = lowered.compile()

    def _inputs(self, count):
        """Returns the arguments of a program of some steps."""
        first = self.completed_steps
        draws = [self.draw(index) for index in range(first, first + count)]
        draws = tuple(map(np.stack, zip(*draws, strict=True)))
        return self.state, self.sums, self.train_images, draws

    def draw(self, index):
        """Returns the batch of a step: indices, crops and mirrorings.

        Epochs follow one another without a gap, each in its own order, as in
        `keras_resnet.data`.

        Args:
            index: The number of completed steps.
        """
        size, count = self.config.recipe.batch_size, self.train_size
        positions = np.arange(index * size, (index + 1) * size)
        epochs = range(positions[0] // count, positions[-1] // count + 1)
        order = np.concatenate([self._order(epoch) for epoch in epochs])
        random = np.random.default_rng([self.config.seed, 1, index])
        height, width, _ = self.preprocessing.image_shape
        return (
            order[positions - epochs[0] * count],
            random.integers(0, 2 * (height // 8) + 1, size, "int32"),
            random.integers(0, 2 * (width // 8) + 1, size, "int32"),
            random.random(size) < 0.5,
        )

    def _order(self, epoch):
        if epoch not in self.orders:
            random = np.random.default_rng([self.config.seed, 0, epoch])
            order = random.permutation(self.train_size).astype("int32")
            before = {epoch - 1: self.orders.get(epoch - 1)}
            self.orders = {**before, epoch: order}
        return self.orders[epoch]

    def _take_steps(self, state, sums, images, draws):
        def body(state, draws):
            indices, *places = draws
            x = self.augmented(images[0][indices], *places)
            return self._step(state, x, images[1][indices])

        if len(draws[0]) == 1:
            state, more = body(state, [draw[0] for draw in draws])
            return state, sums + more
        state, more = ops.scan(body, state, draws)
        return state, sums + ops.sum(more, 0)

    def _normalized(self, images):
        x = ops.cast(images, "float32") / 255.0 - self.preprocessing.mean
        deviation = self.preprocessing.standard_deviation
        return x if deviation is None else x / deviation

    def augmented(self, images, top, left, is_flipped):
        """Returns normalized images, cropped as by `augmentation.pad_crop`."""
        x = self._normalized(images)
        if not self.crop.pads:
            return x
        count, height, width, _ = x.shape
        above, beside = height // 8, width // 8
        x = ops.pad(x, ((0, 0), (above,) * 2, (beside,) * 2, (0, 0)))
        row = top[:, None] + ops.arange(height)
        column = ops.arange(width)
        if self.crop.flips:
            column = ops.where(is_flipped[:, None], width - 1 - column, column)
        column += left[:, None]
        image = ops.arange(count)[:, None, None]
        return x[image, row[:, :, None], column[:, None, :]]

    def _step(self, state, images, labels):
        """Takes one step; returns the new state and `count_errors`."""
        trainable, others, slots = state
        gradients, others, sums = self.step.gradients(
            trainable, others, images, labels
        )
        gradients, _ = self.step.clipped(gradients)
        trainable, slots = self.optimizer.stateless_apply(
            slots, self.step.decayed(gradients, trainable), trainable
        )
        return (trainable, others, slots), sums

    def evaluate(self, batch_size, stop_requested):
        """Returns the errors on all test images, each counted once."""
        images, labels = self.test_images
        sums = ops.zeros(4)
        for first in range(0, len(images), batch_size):
            part = slice(first, first + batch_size)
            missing = batch_size - len(images[part])
            # One size, so that there is one program; padding does not count.
            sums = sums + self.count_errors(
                self.state,
                np.pad(images[part], [(0, missing), *[(0, 0)] * 3]),
                np.pad(labels[part], [(0, missing)]),
                np.repeat([1.0, 0.0], [batch_size - missing, missing]),
            )
        loss, top1_errors, top5_errors, images = np.asarray(sums).tolist()
        return evaluation.Evaluation(
            int(images), int(top1_errors), int(top5_errors), loss / images
        )

    def _count_errors(self, state, images, labels, counted):
        logits, _ = self.model.stateless_call(
            *state[:2], self._normalized(images), training=False
        )
        counted = ops.cast(counted, "float32")
        return step.count_errors(logits, labels, counted)

    def write(self, path, rows):
        """Writes a TensorFlow checkpoint: the weights are in Keras' order."""
        self.rows = rows
        self._checkpoint()[0].write(path)

    def read(self, path):
        """Reads all that `write` wrote; returns its step."""
        checkpoint, state, others = self._checkpoint()
        checkpoints.read(
            checkpoint, path, [*itertools.chain(*state), *others.values()]
        )
        self.state = tuple(
            [ops.array(value.numpy()) for value in values] for values in state
        )
        self.completed_steps = int(others["step"].numpy())
        self.sums = ops.array(others["sums"].numpy())
        self.rows = others["rows"].numpy().decode()
        return self.completed_steps

    def _checkpoint(self):
        """Returns a checkpoint of TensorFlow variables, and the variables."""
        with tf.device("CPU:0"):
            state = [
                [tf.Variable(np.asarray(value)) for value in values]
                for values in self.state
            ]
            others = {
                "step": tf.Variable(self.completed_steps, dtype="int64"),
                "sums": tf.Variable(np.asarray(self.sums)),
                "rows": tf.Variable(self.rows, dtype="string"),
            }
        of_keras = {
            id(variable): value
            for variables, values in zip(self.variables, state, strict=True)
            for variable, value in zip(variables, values, strict=True)
        }
        weights = [of_keras.pop(id(v)) for v in self.model.weights]
        checkpoint = tf.train.Checkpoint(
            weights=weights,
            others=list(of_keras.values()),
            **others,
        )
        return checkpoint, state, others


def _differentiate(function, tensors):
    import jax

    return jax.grad(function, has_aux=True)(tensors)
