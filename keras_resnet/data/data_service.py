"""Training batches from TensorFlow's data service, the same as without it.

A dispatcher and its workers decode and augment on other machines (Audibert et
al. 2023, "tf.data service: A Case for Disaggregating ML Input Data
Processing"). Of n workers, each computes the batches of every n-th step. The
reader takes one batch of each worker in turn, and compares its step with the
one that is due. A batch is a function of (seed, step), so a run has the batches
that it would have without the service, or it ends with an error.
"""

import tensorflow as tf

from keras_resnet.data import augmentation as augmentations
from keras_resnet.data import datasets
from keras_resnet.data import pipelines
from keras_resnet.data import splits

_GET_WORKERS = "/tensorflow.data.DispatcherService/GetWorkers"
_OTHER_STEP = "the data service sent the batch of another step"
_NOT_LISTED = "is not in the workers list"  # of TensorFlow's dispatcher


class ServiceError(ValueError):
    """A data service that cannot be used; the message says what to do."""


def worker_count(address: str, timeout: float = 10.0) -> int:
    """Returns the number of workers that a dispatcher knows.

    Args:
        address: `"HOST:PORT"` of the dispatcher.
        timeout: Seconds to wait for its response.

    Raises:
        ServiceError: If no dispatcher responds, or it has no workers.
    """
    import grpc
    from google.protobuf import empty_pb2
    from google.protobuf import unknown_fields

    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise ServiceError("must be HOST:PORT of a dispatcher")
    options = [("grpc.enable_http_proxy", 0)]
    with grpc.insecure_channel(address, options) as channel:
        try:
            response = channel.unary_unary(_GET_WORKERS)(
                b"", timeout=timeout, wait_for_ready=True
            )
        except grpc.RpcError as error:
            if error.code() == grpc.StatusCode.UNIMPLEMENTED:
                raise ServiceError(
                    "is the address of another server: pass that of a "
                    "dispatcher of tf.data service"
                ) from error
            raise ServiceError(
                f"no dispatcher responds within {timeout:g} seconds: start "
                "tf.data.experimental.service.DispatchServer there"
            ) from error
    # The message is `repeated WorkerInfo workers = 1`; TensorFlow has no
    # Python class for it.
    count = len(
        unknown_fields.UnknownFieldSet(empty_pb2.Empty.FromString(response))
    )
    if not count:
        raise ServiceError(
            "the dispatcher has no workers: start "
            "tf.data.experimental.service.WorkerServer on the hosts that decode"
        )
    return count


class ServedSet(datasets.DataSet):
    """A data set whose training batches come from a data service.

    Its test images are decoded here.

    Args:
        dataset: The data set. The workers must find its files under the same
            paths.
        address: `"HOST:PORT"` of the dispatcher, which was started with the
            `worker_addresses` of all workers.

    Raises:
        ServiceError: If no dispatcher with workers responds, or the images are
            held in memory.
    """

    stall_reason = (
        "a worker of the data service may be lost; start it again, and run the "
        "same command again to resume"
    )

    def __init__(self, dataset: datasets.DataSet, address: str):
        super().__init__(
            dataset.name,
            dataset.labels,
            dataset.preprocessing,
            dataset._read,
            dataset._record,
            dataset.notes,
        )
        self.address = address
        if isinstance(self._train, splits.Memory):
            raise ServiceError(
                "needs images that are decoded from files: those of "
                f"{dataset.name} are held in memory, which is faster"
            )
        worker_count(address)

    def train_batches(
        self,
        batch_size: int,
        seed: int,
        first_step: int = 0,
        augmentation: str | augmentations.Augmentation = "none",
        shard: tuple[int, int] = (0, 1),
    ) -> tf.data.Dataset:
        """Returns the batches of `DataSet.train_batches`, from the service.

        Raises:
            ServiceError: If no dispatcher with workers responds.
        """
        if isinstance(augmentation, str):
            augmentation = augmentations.Augmentation(augmentation)
        count = worker_count(self.address)
        share = pipelines.Share.of_shard(batch_size, shard)

        def of_worker(index):
            return self._of_worker(
                share, seed, first_step, augmentation, index, count
            )

        turns = tf.data.Dataset.choose_from_datasets(
            [of_worker(index) for index in range(count)],
            tf.data.Dataset.range(count).repeat(),
        )
        # A worker that ends is an error, not the end of the batches.
        turns = turns.apply(
            tf.data.experimental.assert_cardinality(
                tf.data.experimental.INFINITE_CARDINALITY
            )
        )
        return pipelines.with_options(
            splits.map_in_order(turns.enumerate(first_step), _checked)
        )

    def _of_worker(self, share, seed, first_step, augmentation, index, count):
        """Returns (step, images, labels) of every `count`-th step.

        It is a job of its own, with an own buffer: a job of all workers would
        return the batches of a fast one earlier.
        """
        hint = tf.data.experimental.SHARD_HINT

        def divide(steps, step_of):
            # Each worker puts its own index and their number here. The others
            # end at once.
            mine = steps.shard(hint, hint)
            place = (first_step + index) % count
            return mine.take_while(
                tf.autograph.experimental.do_not_convert(
                    lambda *step: step_of(*step) % count == place
                )
            )

        numbered = pipelines.numbered_batches(
            self._train,
            self.preprocessing,
            augmentation,
            share,
            seed,
            first_step,
            divide,
        )
        service = tf.data.experimental.service
        return pipelines.with_options(numbered).apply(
            service.distribute(
                service.ShardingPolicy.HINT, f"grpc://{self.address}"
            )
        )

    def check(self, error: Exception | None = None) -> None:
        """Explains an error of the service, or calls `DataSet.check`.

        Raises:
            ServiceError: If the error is that of the service.
        """
        text = str(error)
        if _OTHER_STEP in text:
            raise ServiceError(
                f"{_OTHER_STEP}, because a worker was started or lost: start "
                "all workers, and run the same command again to resume"
            ) from error
        if _NOT_LISTED in text:
            raise ServiceError(
                "the dispatcher must know all workers, so that each computes "
                "its own steps: start it with DispatcherConfig(worker_addresses"
                "=[...]), and each worker with its worker_address"
            ) from error
        super().check(error)


@tf.autograph.experimental.do_not_convert
def _checked(due, batch):
    """Returns the batch without its step, which must be the one that is due."""
    step, *rest = batch
    with tf.control_dependencies(
        [tf.debugging.assert_equal(step, due, message=_OTHER_STEP)]
    ):
        return tf.nest.map_structure(tf.identity, tuple(rest))
