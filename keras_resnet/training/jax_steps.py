"""A run's state and its steps on JAX: `steps.Run` for one accelerator.

For an accelerator that JAX drives and TensorFlow does not. The images are in
its memory, and several steps are one program there. A batch and its
augmentation are a function of (seed, step) here too, and what is drawn has the
same distribution; but NumPy draws it, so that runs of the two backends with
one seed are two runs.
"""

import itertools

import numpy as np
import tensorflow as tf
from keras import ops

from keras_resnet import training
from keras_resnet.data import augmentation
from keras_resnet.data import datasets
from keras_resnet.training import checkpoints
from keras_resnet.training import configs
from keras_resnet.training import evaluation
from keras_resnet.training import losses
from keras_resnet.training import optimizers


def _piece() -> int:
    """Steps of one program, beside a program of one.

    On an H100 a step of ResNet-20 is hundreds of kernels in 2 ms, which XLA
    starts faster than Python. On a processor a convolution in a loop of XLA
    takes many times as long as one outside.
    """
    import jax

    return 1 if jax.default_backend() == "cpu" else 20


class UnsupportedError(ValueError):
    """What training on JAX has not.

    Args:
        name: The field of the configuration, or `recipe.FIELD`.
        received: Its value.
        allowed: Which there may be.
    """

    def __init__(self, name: str, received, allowed: str):
        super().__init__(
            f"on JAX {name} must be {allowed}, received {received!r}; with "
            "KERAS_BACKEND=tensorflow it may be others"
        )
        self.name = name
        self.received = received


def check(config: configs.Config, dataset: datasets.DataSet) -> None:
    """Refuses what is for TensorFlow only.

    Raises:
        UnsupportedError: Names the first field.
    """
    recipe = config.recipe
    has_window = augmentation.AUGMENTATIONS[recipe.augmentation].window
    rules = (
        ("dtype", config.dtype, ("float32", "mixed_bfloat16")),
        ("deterministic", config.deterministic, (False,)),
        ("sync_batch_norm", config.sync_batch_norm, (False,)),
        ("recipe.micro_batches", recipe.micro_batches, (1,)),
        ("recipe.average_momentum", recipe.average_momentum, (0.0,)),
    )
    for name, received, allowed in rules:
        if received not in allowed:
            raise UnsupportedError(
                name, received, " or ".join(map(str, allowed))
            )
    if dataset.has_photos:
        raise UnsupportedError(
            "dataset", config.dataset, "one of small images of one size"
        )
    if has_window:
        raise UnsupportedError(
            "recipe.augmentation", recipe.augmentation, "one that only pads"
        )


class Run:
    """The state of a run on the accelerator, and the programs that use it."""

    def __init__(self, config, dataset):
        training.require_backend(__name__, "jax")
        import jax

        check(config, dataset)
        recipe = config.recipe
        self.config = config
        self.rates = recipe.learning_rates()
        self.augmentation = augmentation.AUGMENTATIONS[recipe.augmentation]
        self.model = configs.build_model(
            config, dataset.image_shape, dataset.classes
        )
        self.optimizer = optimizers.of_recipe(recipe)
        self.optimizer.build(self.model.trainable_variables)
        self.are_decayed = losses.are_decayed(recipe, self.model)
        self.variables = (
            self.model.trainable_variables,
            self.model.non_trainable_variables,
            self.optimizer.variables,
        )
        # Copies: a program may overwrite what it is given of the state.
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
        """`losses.count_errors` of the steps since the last row."""
        return np.asarray(self.sums).tolist()

    def clear_sums(self):
        """A row begins."""
        self.sums = ops.zeros(4)

    def restore(self, directory, report):
        """Reads the newest checkpoint that is not damaged, if there is any."""
        step = checkpoints.restore(self.read, directory, report)
        if step is not None:
            report(f"goes on at step {step} of {self.config.recipe.steps}")

    def meet(self):
        """There are no other workers."""

    def is_finite(self) -> bool:
        """Whether every weight is a finite number."""
        weights = [v for values in self.state[:2] for v in values]
        return all(np.all(np.isfinite(np.asarray(v))) for v in weights)

    def take(self, steps, is_asked, seconds):
        """Takes the next steps; as `steps.Run.take` where one device trains."""
        if not self.programs:
            self._compile()
        end = self.completed_steps + (1 if is_asked else steps)
        while self.completed_steps < end:
            left = end - self.completed_steps
            count = max(n for n in self.programs if n <= left)
            self.state, self.sums = self.programs[count](*self._inputs(count))
            self.completed_steps += count
        self.sums.block_until_ready()
        return is_asked, seconds

    def _compile(self):
        """All programs at once: the loop does not time the first step."""
        left = self.config.recipe.steps - self.completed_steps
        for count in {1, _piece()} if left > _piece() else {1}:
            lowered = self.take_steps.lower(*self._inputs(count))
            self.programs[count] = lowered.compile()

    def _inputs(self, count):
        """What a program of so many steps is given next."""
        first = self.completed_steps
        draws = [self.draw(step) for step in range(first, first + count)]
        draws = tuple(map(np.stack, zip(*draws, strict=True)))
        return self.state, self.sums, self.train_images, draws

    def draw(self, step):
        """What the batch of a step is: indices, crops and mirrorings.

        As in `training.data`, the images follow one another without end, each
        epoch in an order of its own.
        """
        size, count = self.config.recipe.batch_size, self.train_size
        positions = np.arange(step * size, (step + 1) * size)
        epochs = range(positions[0] // count, positions[-1] // count + 1)
        order = np.concatenate([self._order(epoch) for epoch in epochs])
        random = np.random.default_rng([self.config.seed, 1, step])
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
        """As `augmentation.pad_crop` has it [1, Sec. 4.2]."""
        x = self._normalized(images)
        if not self.augmentation.pads:
            return x
        count, height, width, _ = x.shape
        above, beside = height // 8, width // 8
        x = ops.pad(x, ((0, 0), (above,) * 2, (beside,) * 2, (0, 0)))
        row = top[:, None] + ops.arange(height)
        column = ops.arange(width)
        if self.augmentation.flips:
            column = ops.where(is_flipped[:, None], width - 1 - column, column)
        column += left[:, None]
        image = ops.arange(count)[:, None, None]
        return x[image, row[:, :, None], column[:, None, :]]

    def _step(self, state, images, labels):
        """One step: `g + decay w` to the optimizer [1, Sec. 3.4]."""
        import jax

        trainable, others, slots = state
        recipe = self.config.recipe

        def loss_of(trainable):
            logits, after = self.model.stateless_call(
                trainable, others, images, training=True
            )
            loss = losses.of_network(recipe, self.model, labels, logits)
            return ops.mean(loss), (logits, after)

        gradient = jax.grad(loss_of, has_aux=True)
        gradients, (logits, others) = gradient(trainable)
        gradients = [
            g + recipe.weight_decay * w if is_decayed else g
            for g, w, is_decayed in zip(
                gradients, trainable, self.are_decayed, strict=True
            )
        ]
        trainable, slots = self.optimizer.stateless_apply(
            slots, gradients, trainable
        )
        sums = losses.count_errors(logits, labels, ops.ones(len(labels)))
        return (trainable, others, slots), sums

    def evaluate(self, batch_size, is_asked):
        """The errors on all test images, each counted once."""
        images, labels = self.test_images
        sums = ops.zeros(4)
        for first in range(0, len(images), batch_size):
            part = slice(first, first + batch_size)
            missing = batch_size - len(images[part])
            # One size, so that there is one program; what fills up counts 0.
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
        return losses.count_errors(logits, labels, counted)

    def write(self, path, rows):
        """Writes the state as TensorFlow does: the weights in Keras' order."""
        self.rows = rows
        self._checkpoint()[0].write(path)

    def read(self, path):
        """Reads what `write` wrote, all of it; returns its step."""
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
        """The state as variables of TensorFlow, and a checkpoint of them."""
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
