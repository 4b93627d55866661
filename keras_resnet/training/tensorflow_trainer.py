"""Training on TensorFlow: the variables of a run, and its devices.

Each device computes `step.Step`, which is pure. The results are added up over
all devices in one exchange, and only then are variables written.
"""

import keras
import tensorflow as tf

from keras_resnet import training
from keras_resnet.layers import normalization
from keras_resnet.training import checkpoints
from keras_resnet.training import configs
from keras_resnet.training import evaluation
from keras_resnet.training import optimizers
from keras_resnet.training import probes
from keras_resnet.training import step
from keras_resnet.training import strategies
from keras_resnet.training import workdirs

training.require_backend(__name__, "tensorflow")


class TensorFlowTrainer:
    """The variables of a run, and the functions that advance them.

    Args:
        config: The configuration of the run.
        dataset: Its data set.
        strategy: The strategy that places variables and shares batches.
    """

    def __init__(self, config, dataset, strategy):
        recipe = config.recipe
        self.config = config
        self.dataset = dataset
        self.strategy = strategy
        self.batches, self.batches_end = None, None
        with strategy.scope():
            self.model = configs.build_model(
                config, dataset.image_shape, dataset.classes
            )
            self.trained = self.model
            if probes.is_cached(config, self.model, dataset):
                features, self.trained = probes.parts(self.model)
                self.dataset = probes.FeatureSet(dataset, features)
            self.rates = recipe.learning_rates()
            variables = self.model.trainable_variables
            self.optimizer = optimizers.of_recipe(
                recipe, variables, adds_replicas=False
            )
            if config.dtype == "mixed_float16":
                self.optimizer = keras.optimizers.LossScaleOptimizer(
                    self.optimizer
                )
                self.optimizer.build(variables)
            self.completed = tf.Variable(0, dtype="int64")
            self.sums = tf.Variable(tf.zeros([4]))
            self.averages = optimizers.averages(recipe, self.model)
        self.devices = tf.Variable(0, dtype="int64")
        with tf.device("CPU:0"):  # an accelerator cannot hold text
            self.text = tf.Variable("", dtype="string")
        # The moving statistics, and the seeds of random layers.
        self.states = self.trained.non_trainable_variables
        self.checkpoint = tf.train.Checkpoint(
            model=self.model,
            optimizer=self.optimizer,
            step=self.completed,
            sums=self.sums,
            devices=self.devices,
            rows=self.text,
            averages=self.averages,
            untracked=[v.value for v in checkpoints.untracked(self.model)],
        )
        self.gradient_norm = tf.Variable(0.0, trainable=False)
        self.step = step.Step(
            config,
            self.trained,
            self.optimizer,
            _differentiate,
            _after,
            _training_network(self.trained, recipe),
        )
        self.evaluator = evaluation.Evaluator(self.predict, strategy)
        self.advance = tf.function(self._advance)

    @property
    def completed_steps(self) -> int:
        return int(self.completed.numpy())

    @property
    def images_since_row(self) -> int:
        return int(self.read_sums()[3])

    def read_sums(self) -> list[float]:
        """Returns the sums of `count_errors` since the last row."""
        return self.sums.numpy().tolist()

    def last_gradient_norm(self) -> float:
        """Returns the norm of the gradient of the last step, not clipped."""
        return float(self.gradient_norm.numpy())

    def clear_sums(self):
        """Sets the sums to zero, for the next row."""
        self.sums.assign(tf.zeros([4]))

    @property
    def rows(self) -> str:
        """Rows of `metrics.csv` up to the last checkpoint."""
        return self.text.numpy().decode()

    def write(self, path, rows):
        """Writes the state to a path, for `checkpoints.save`."""
        self.text.assign(rows)
        self.checkpoint.write(path)

    def read(self, path):
        """Reads all that `write` wrote; returns its step."""
        checkpoints.read(
            self.checkpoint,
            path,
            [
                *self.model.variables,
                *self.optimizer.variables,
                *self.averages,
                *(self.completed, self.sums, self.devices, self.text),
            ],
        )
        return self.completed_steps

    def restore(self, directory, report):
        """Reads the newest checkpoint that is not damaged.

        Returns:
            Its step, or None without a checkpoint.
        """
        found = checkpoints.restore(self.read, directory, report)
        if self.synchronize() != self.completed_steps:
            raise workdirs.WorkdirError(
                f"{directory} must be the same for all workers; worker "
                f"{strategies.worker_index(self.strategy)} finds step "
                f"{self.completed_steps} there, and another worker does not"
            )
        before = int(self.devices.numpy())
        now = self.strategy.num_replicas_in_sync
        if found is not None and before != now:
            report(
                f"on {now} device{'s' * (now > 1)} now, on {before} before: "
                "the batches stay the same, but each device normalizes by "
                f"1/{now} of a batch instead of 1/{before}"
            )
        self.devices.assign(now)
        return found

    def synchronize(self):
        """Waits for all workers; returns the mean of their steps."""
        if not strategies.has_workers(self.strategy):
            return self.completed_steps
        with strategies.lost_workers(self.strategy):
            return float(self._mean_step().numpy())

    @tf.function
    def _mean_step(self):
        each = self.strategy.run(lambda: tf.cast(self.completed, "float64"))
        return self.strategy.reduce("MEAN", each, axis=None)

    def is_finite(self) -> bool:
        """Returns whether every weight is a finite number."""
        return bool(self._are_finite().numpy())

    @tf.function
    def _are_finite(self):
        finite = [
            tf.reduce_all(tf.math.is_finite(tf.convert_to_tensor(v.value)))
            for v in self.model.weights
            if not step.is_seed(v)  # a loop's are among its weights
        ]
        return tf.reduce_all(finite)

    def take(self, steps, stop_requested, seconds):
        """Takes the next steps.

        Args:
            steps: Largest number of steps, the same on all workers. A call
                takes fewer where the size of the training images changes.
            stop_requested: Whether this worker was asked to stop.
            seconds: Time of a step on this worker; 0 if unknown.

        Returns:
            Whether any worker was asked to stop, and the mean of `seconds`
            over all workers. Both are the same on all workers.
        """
        first = self.completed_steps
        if self.batches is None or first == self.batches_end:
            # Batches of another size; `advance` has a graph for each.
            self.batches = self._batches(first)
            self.batches_end = self.config.recipe.same_size_until(first)
        if self.batches_end is not None:
            steps = min(steps, self.batches_end - first)
        with strategies.lost_workers(self.strategy):
            messages = self.advance(
                self.batches,
                tf.constant(steps),
                tf.constant([float(stop_requested), seconds]),
            )
            stops, seconds = messages.numpy().tolist()  # waits for the device
        return stops > 0, seconds / self.strategy.num_replicas_in_sync

    def _batches(self, first_step):
        """Returns an endless iterator over the batches from a step on."""
        recipe = self.config.recipe
        return strategies.distributed(
            self.strategy,
            lambda shard: self.dataset.train_batches(
                recipe.batch_size,
                seed=self.config.seed,
                first_step=first_step,
                augmentation=recipe.augmentation_at(first_step),
                shard=shard,
            ),
        )

    def evaluate(self, batch_size, stop_requested):
        """Returns the errors on all test images.

        The result is None if a worker was asked to stop.

        Args:
            batch_size: Images in a batch of all devices together.
            stop_requested: Function that returns whether this worker was asked
                to stop.
        """
        with strategies.lost_workers(self.strategy):
            return self.evaluator(
                self.dataset, batch_size, stop_requested=stop_requested
            )

    def _advance(self, iterator, steps, message):
        """Takes up to `steps` training steps in one graph.

        The number must be the same on all workers: TensorFlow matches the
        sums of the workers by their place in the loop.

        Args:
            iterator: Iterator over batches for all devices.
            steps: Largest number of steps.
            message: float32 `[2]` for the other workers: 1 if this worker was
                asked to stop, and the seconds of a step.

        Returns:
            The sum of `message` over all devices. If one was asked to stop,
            all stop after the first step.
        """
        sums = tf.convert_to_tensor(self.sums)
        messages, done = tf.zeros([2]), tf.constant(0)
        while (done < steps) & (messages[0] == 0.0):
            images, labels = next(iterator)
            states, totals = self.strategy.run(
                self.train_step, (images, labels, message)
            )
            for variable, state in zip(self.states, states, strict=True):
                self.strategy.extended.update(
                    variable.value, _assign, (state,), group=False
                )
            totals = self.strategy.experimental_local_results(totals)[0]
            sums, messages = sums + totals[:4], totals[4:6]
            self.gradient_norm.assign(totals[6])
            done += 1
            self.move_averages(
                tf.cast(self.completed + tf.cast(done, "int64"), "float32")
            )
        self.sums.assign(sums)
        self.completed.assign_add(tf.cast(done, "int64"))
        return messages

    def move_averages(self, steps):
        """Moves the averages towards the parameters after a step."""

        def move(average, value):
            average.assign(self.step.average(average, value, steps))

        for average, variable in zip(
            self.averages, self.model.trainable_variables, strict=False
        ):
            self.strategy.extended.update(
                average, move, (variable.value,), group=False
            )

    def predict(self, images):
        """Returns the logits of test images.

        The parameters are their moving averages if the recipe has them.
        """
        if not self.averages:
            return self.trained(images, training=False)
        mapping = zip(
            self.model.trainable_variables, self.averages, strict=True
        )
        with keras.StatelessScope(mapping):
            return self.trained(images, training=False)

    def train_step(self, images, labels, message):
        """Takes one step on one device.

        Returns:
            The new values of the states, and the sums of `count_errors` with
            those of `message` and the norm of the gradient. Both are the same
            on all devices.
        """
        context = tf.distribute.get_replica_context()
        replicas = self.strategy.num_replicas_in_sync
        # Each device draws its own numbers; one device, those of Keras.
        shift = tf.constant([1, 0], "int64") * tf.cast(
            context.replica_id_in_sync_group, "int64"
        )
        shift *= 2**32
        are_seeds = [step.is_seed(v) for v in self.states]
        values = [
            v.value + shift if is_one else v.value
            for v, is_one in zip(self.states, are_seeds, strict=True)
        ]
        trainable = [v.value for v in self.model.trainable_variables]
        with normalization.without_xla():
            gradients, values, sums = self.step.gradients(
                trainable, values, images, labels
            )
        total = {
            "gradients": gradients,
            "statistics": [
                value / replicas
                for value, is_one in zip(values, are_seeds, strict=True)
                if not is_one
            ],
            # In the dtype of the gradients: workers send them as one tensor.
            "sums": tf.cast(tf.concat([sums, message], 0), gradients[0].dtype),
        }
        if replicas > 1:  # one exchange for everything there is to add
            total = context.all_reduce("SUM", total)
        gradients, norm = self.step.clipped(total["gradients"])
        self.optimizer.apply(
            self.step.decayed(gradients, trainable),
            self.model.trainable_variables,
        )
        statistics = iter(total["statistics"])
        states = [
            value - shift if is_one else next(statistics)
            for value, is_one in zip(values, are_seeds, strict=True)
        ]
        sums = tf.cast(total["sums"], "float32")
        return states, tf.concat([sums, [tf.cast(norm, "float32")]], 0)


def _training_network(model, recipe):
    """Returns the network for the size of the training images, if another."""
    if recipe.progressive_sizes:
        return evaluation.any_size(model)
    size = recipe.augmentation.train_image_size
    if size in (None, model.input_shape[1]):
        return None
    return evaluation.any_size(model, size)


def _differentiate(function, tensors):
    with tf.GradientTape() as tape:
        value, others = function(tensors)
    return tape.gradient(value, tensors), others


def _after(tensor, others):
    """Returns the tensor; TensorFlow computes it after the others."""
    with tf.control_dependencies(others):
        return tf.identity(tensor)


def _assign(variable, value):
    variable.assign(value)
