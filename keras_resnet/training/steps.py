"""A run's variables and its steps: `strategy.run` under one `tf.function`.

A step is a pure function on each device; its results are added up over all
devices at once, and only then is anything written.
"""

import keras
import tensorflow as tf

from keras_resnet import training
from keras_resnet.training import checkpoints
from keras_resnet.training import configs
from keras_resnet.training import evaluation
from keras_resnet.training import losses
from keras_resnet.training import optimizers
from keras_resnet.training import strategies
from keras_resnet.training import workdirs

training.require_backend(__name__, "tensorflow")


class Run:
    """The variables of a run and the function that advances them."""

    def __init__(self, config, dataset, strategy):
        recipe = config.recipe
        self.config = config
        self.dataset = dataset
        self.strategy = strategy
        self.batches = None
        with strategy.scope():
            self.model = configs.build_model(
                config, dataset.image_shape, dataset.classes
            )
            self.rates = recipe.learning_rates()
            self.optimizer = optimizers.of_recipe(recipe, adds_replicas=False)
            if config.dtype == "mixed_float16":
                self.optimizer = keras.optimizers.LossScaleOptimizer(
                    self.optimizer
                )
            self.optimizer.build(self.model.trainable_variables)
            self.step = tf.Variable(0, dtype="int64")
            self.sums = tf.Variable(tf.zeros([4]))
            self.averages = optimizers.averages(recipe, self.model)
        self.devices = tf.Variable(0, dtype="int64")
        with tf.device("CPU:0"):  # text has no other place
            self.text = tf.Variable("", dtype="string")
        # Moving statistics, and the seeds of random layers.
        self.states = self.model.non_trainable_variables
        self.checkpoint = tf.train.Checkpoint(
            model=self.model,
            optimizer=self.optimizer,
            step=self.step,
            sums=self.sums,
            devices=self.devices,
            rows=self.text,
            averages=self.averages,
            untracked=[v.value for v in checkpoints.untracked(self.model)],
        )
        self.decayed = losses.are_decayed(recipe, self.model)
        self.evaluator = evaluation.Evaluator(self.predict, strategy)
        self.advance = tf.function(self._advance)

    @property
    def completed_steps(self) -> int:
        return int(self.step.numpy())

    @property
    def images_since_row(self) -> int:
        return int(self.read_sums()[3])

    def read_sums(self) -> list[float]:
        """`losses.count_errors` of the steps since the last row."""
        return self.sums.numpy().tolist()

    def clear_sums(self):
        """A row begins."""
        self.sums.assign(tf.zeros([4]))

    @property
    def rows(self) -> str:
        """The rows of `metrics.csv` up to the last checkpoint."""
        return self.text.numpy().decode()

    def write(self, path, rows):
        """Writes the state, as `checkpoints.save` asks for it."""
        self.text.assign(rows)
        self.checkpoint.write(path)

    def read(self, path):
        """Reads what `write` wrote, all of it; returns its step."""
        checkpoints.read(
            self.checkpoint,
            path,
            [
                *self.model.variables,
                *self.optimizer.variables,
                *self.averages,
                *(self.step, self.sums, self.devices, self.text),
            ],
        )
        return self.completed_steps

    def restore(self, directory, report):
        """Reads the newest checkpoint that is not damaged, if there is any."""
        step = checkpoints.restore(self.read, directory, report)
        if self.meet() != self.completed_steps:
            raise workdirs.WorkdirError(
                f"{directory} must be the same for all workers; worker "
                f"{strategies.worker_index(self.strategy)} finds step "
                f"{self.completed_steps} there, another one does not"
            )
        if step is not None:
            report(f"goes on at step {step} of {self.config.recipe.steps}")
            before, now = (
                int(self.devices.numpy()),
                self.strategy.num_replicas_in_sync,
            )
            if before != now:
                report(
                    f"on {now} device{'s' * (now > 1)} now, on {before} before:"
                    " the batches stay the same, the share that a device "
                    "normalizes by does not"
                )
        self.devices.assign(self.strategy.num_replicas_in_sync)

    def meet(self):
        """Waits for all workers; gives the mean of their steps."""
        if not strategies.has_workers(self.strategy):
            return self.completed_steps
        with strategies.lost_workers(self.strategy):
            return float(self._mean_step().numpy())

    @tf.function
    def _mean_step(self):
        each = self.strategy.run(lambda: tf.cast(self.step, "float64"))
        return self.strategy.reduce("MEAN", each, axis=None)

    def is_finite(self) -> bool:
        """Whether every weight is a finite number."""
        return bool(self._are_finite().numpy())

    @tf.function
    def _are_finite(self):
        finite = [
            tf.reduce_all(tf.math.is_finite(tf.convert_to_tensor(v.value)))
            for v in self.model.weights
            if not _is_seed(v)  # a loop's are among its weights
        ]
        return tf.reduce_all(finite)

    def take(self, steps, is_asked, seconds):
        """Takes up to so many steps.

        Args:
            steps: How many, alike on all workers.
            is_asked: Whether this worker was asked to stop.
            seconds: Of a step, as this worker measured them; 0 for unknown.

        Returns:
            Whether a worker was asked to stop, and the mean of `seconds` over
            all workers: both alike on all of them.
        """
        if self.batches is None:
            self.batches = self._batches(self.completed_steps)
        with strategies.lost_workers(self.strategy):
            heard = self.advance(
                self.batches,
                tf.constant(steps),
                tf.constant([float(is_asked), seconds]),
            )
            stops, seconds = heard.numpy().tolist()  # waits for the device
        return stops > 0, seconds / self.strategy.num_replicas_in_sync

    def _batches(self, step):
        """What follows after a step, without end."""
        recipe = self.config.recipe
        return strategies.distributed(
            self.strategy,
            lambda shard: self.dataset.train_batches(
                recipe.batch_size,
                seed=self.config.seed,
                first_step=step,
                augmentation=recipe.augmentation,
                shard=shard,
            ),
        )

    def evaluate(self, batch_size, is_asked):
        """The errors on all test images; None where a worker is asked to stop.

        Args:
            batch_size: Images of all devices together in one batch.
            is_asked: Tells whether this worker was.
        """
        with strategies.lost_workers(self.strategy):
            return self.evaluator(self.dataset, batch_size, is_asked=is_asked)

    def _advance(self, iterator, steps, told):
        """Takes up to `steps` training steps, all of them in one graph.

        All workers must ask for as many steps: TensorFlow matches what they
        add up by its place in the loop.

        Args:
            iterator: Of batches, for all devices.
            steps: How many at most.
            told: What this worker tells the others: whether it was asked to
                stop, 1 or 0, and the seconds that a step takes.

        Returns:
            The sum of `told` over all devices. If one was asked to stop, all
            end after the first step.
        """
        sums = tf.convert_to_tensor(self.sums)
        heard, done = tf.zeros([2]), tf.constant(0)
        while (done < steps) & (heard[0] == 0.0):
            images, labels = next(iterator)
            states, totals = self.strategy.run(
                self.train_step, (images, labels, told)
            )
            for variable, state in zip(self.states, states, strict=True):
                self.strategy.extended.update(
                    variable.value, _assign, (state,), group=False
                )
            totals = self.strategy.experimental_local_results(totals)[0]
            sums, heard = sums + totals[:4], totals[4:]
            done += 1
            self.move_averages(tf.cast(self.step, "float32"), done)
        self.sums.assign(sums)
        self.step.assign_add(tf.cast(done, "int64"))
        return heard

    def move_averages(self, step, done):
        """Lets the moving average follow the parameters after a step."""
        step += tf.cast(done, "float32")
        momentum = tf.minimum(
            self.config.recipe.average_momentum, (1.0 + step) / (10.0 + step)
        )
        for average, variable in zip(
            self.averages, self.model.trainable_variables, strict=False
        ):
            self.strategy.extended.update(
                average, _move, (variable.value, momentum), group=False
            )

    def predict(self, images):
        """The logits of test images, by the moving average if there is one."""
        if not self.averages:
            return self.model(images, training=False)
        mapping = zip(
            self.model.trainable_variables, self.averages, strict=True
        )
        with keras.StatelessScope(mapping):
            return self.model(images, training=False)

    def train_step(self, images, labels, told):
        """One step on one device.

        Returns:
            The new values of `states`, and the sums of `count_errors` with
            of `told`: both alike on all devices.
        """
        context = tf.distribute.get_replica_context()
        replicas = self.strategy.num_replicas_in_sync
        # Each device draws numbers of its own; one device, those of Keras.
        shift = tf.constant([1, 0], "int64") * tf.cast(
            context.replica_id_in_sync_group, "int64"
        )
        shift *= 2**32
        values = [
            v.value + shift if _is_seed(v) else v.value for v in self.states
        ]
        gradients, values, sums = self.accumulated(images, labels, values)
        total = {
            "gradients": gradients,
            "statistics": [
                value / replicas
                for v, value in zip(self.states, values, strict=True)
                if not _is_seed(v)
            ],
            # Of the dtype of the others: workers send them as one.
            "sums": tf.cast(tf.concat([sums, told], 0), gradients[0].dtype),
        }
        if replicas > 1:  # once over the network, for all there is to add
            total = context.all_reduce("SUM", total)
        self.optimizer.apply(
            self.regularized(total["gradients"]), self.model.trainable_variables
        )
        statistics = iter(total["statistics"])
        states = [
            value - shift if _is_seed(v) else next(statistics)
            for v, value in zip(self.states, values, strict=True)
        ]
        return states, tf.cast(total["sums"], "float32")

    def accumulated(self, images, labels, values):
        """`gradients` of the micro-batches, one after the other, added up."""
        count = self.config.recipe.micro_batches
        if count == 1:
            return self.gradients(images, labels, values)
        images, labels = self.parts(images), self.parts(labels)
        is_seed = [_is_seed(v) for v in self.states]

        def body(i, gradients, totals, sums):
            # Each starts with the statistics from before, as devices do.
            before = [
                total if is_one else value
                for total, value, is_one in zip(
                    totals, values, is_seed, strict=True
                )
            ]
            with tf.control_dependencies(gradients):  # one after the other
                part = tf.identity(images[i])
            more, after, counted = self.gradients(part, labels[i], before)
            totals = [
                new if is_one else total + new / count
                for total, new, is_one in zip(
                    totals, after, is_seed, strict=True
                )
            ]
            gradients = [a + b for a, b in zip(gradients, more, strict=True)]
            return i + 1, gradients, totals, sums + counted

        none = [
            tf.zeros(v.shape, v.dtype) for v in self.model.trainable_variables
        ]
        totals = [
            tf.convert_to_tensor(value) if is_one else tf.zeros_like(value)
            for value, is_one in zip(values, is_seed, strict=True)
        ]
        state = (0, none, totals, tf.zeros([4]))
        if self.config.sync_batch_norm:
            for _ in range(count):
                state = body(*state)
        else:
            state = tf.while_loop(
                lambda i, *_: i < count,
                body,
                state,
                parallel_iterations=1,
                maximum_iterations=count,
            )
        return state[1:]

    def parts(self, tensor):
        """The micro-batches of the share of a device, `[count, n, ...]`.

        Synchronized, they are every `count`-th image, so that a micro-batch
        has the same images on however many devices.
        """
        count = self.config.recipe.micro_batches
        if self.config.sync_batch_norm:
            return tf.stack([tensor[i::count] for i in range(count)])
        return tf.reshape(tensor, [count, -1, *tensor.shape[1:]])

    def gradients(self, images, labels, values):
        """Gradients of the mean loss of the global batch, by some images of it.

        Args:
            images: Of one device.
            labels: Of the same.
            values: Of the variables `states`.

        Returns:
            The gradients, the new values of `states`, the sums of
            `count_errors`; no variable is changed.
        """
        variables = self.model.trainable_variables
        mapping = list(zip(self.states, values, strict=True))
        with tf.GradientTape() as tape:
            with keras.StatelessScope(mapping) as scope:
                logits = self.model(images, training=True)
            recipe = self.config.recipe
            loss = losses.of_network(recipe, self.model, labels, logits)
            loss = tf.reduce_sum(loss) / float(recipe.batch_size)
            scaled = loss
            if self.config.dtype == "mixed_float16":
                scaled = self.optimizer.scale_loss(loss)
        gradients = tape.gradient(scaled, [v.value for v in variables])
        values = [scope.get_current_value(v) for v in self.states]
        counted = tf.ones_like(labels, dtype="float32")
        return (
            gradients,
            values,
            losses.count_errors(logits, labels, counted),
        )

    def regularized(self, gradients):
        """With the gradient of the L2 penalty [1, Sec. 3.4].

        It is no part of the loss that is reported.
        """
        scale = self.config.recipe.weight_decay
        if self.config.dtype == "mixed_float16":
            scale = self.optimizer.scale_loss(scale)
        return [
            gradient + scale * variable.value if is_decayed else gradient
            for gradient, variable, is_decayed in zip(
                gradients,
                self.model.trainable_variables,
                self.decayed,
                strict=True,
            )
        ]


def _move(average, value, momentum):
    share = tf.cast(1.0 - momentum, average.dtype)
    average.assign(average + (value - average) * share)


def _assign(variable, value):
    variable.assign(value)


def _is_seed(variable):
    return not variable.dtype.startswith("float")
