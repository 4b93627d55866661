"""Batches of a data service: a dispatcher and two workers on this machine."""

import contextlib
import pathlib
import socket
from concurrent import futures

import grpc
import numpy as np
import pytest
import tensorflow as tf
from absl.testing import absltest
from absl.testing import parameterized

from keras_resnet.data import augmentation
from keras_resnet.data import data_service
from keras_resnet.data import datasets
from tests import images as images_lib
from tests import programs
from tests import records


def free_ports(count):
    """Ports that no server has, all different."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


class Service:
    """A dispatcher that knows two workers, of which some are started.

    Args:
        started: Which workers are started, in this order.
        is_listed: Whether the dispatcher is given their addresses.
    """

    def __init__(self, started=(0, 1), is_listed=True):
        service = tf.data.experimental.service
        port, *ports = free_ports(3)
        addresses = [f"127.0.0.1:{port}" for port in ports]
        self.dispatcher = service.DispatchServer(
            service.DispatcherConfig(
                port=port, worker_addresses=addresses if is_listed else None
            )
        )
        self.address = f"127.0.0.1:{port}"
        self.workers = []
        for i in started:
            self.workers.append(
                service.WorkerServer(
                    service.WorkerConfig(
                        dispatcher_address=self.address,
                        port=ports[i],
                        worker_address=addresses[i],
                    )
                )
            )


class ServedSetTest(parameterized.TestCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.service = Service(started=(1, 0))
        cls.folder = images_lib.photos(cls)
        data_dir = records.tfds_set(cls, (None, None, 3), train=13, test=3)
        cls.sets = {
            "folder": datasets.load(cls.folder, image_size=16),
            "records": datasets.load("tiny", data_dir, image_size=16),
        }

    def served(self, name="folder"):
        return data_service.ServedSet(self.sets[name], self.service.address)

    def test_mixed_batches_of_files_are_those_without_the_service(self):
        fields = {"name": "scale_jitter", "mixup_alpha": 0.2}
        self.assert_same_batches("folder", {**fields, "cutmix_alpha": 1.0})

    @parameterized.parameters(
        ("records", {"name": "scale_aspect"}),
        ("records", {"name": "scale_aspect", "repeats": 3}),
        ("folder", {"policy": "rand_augment_7"}),
    )
    @pytest.mark.slow
    def test_batches_are_those_without_the_service(self, name, fields):
        self.assert_same_batches(name, fields)

    def assert_same_batches(self, name, fields):
        """To the bit, from any step on, of workers in any order."""
        arguments = {
            "seed": 3,
            "first_step": 5,
            "augmentation": augmentation.Augmentation(**fields),
        }
        expected = self.sets[name].train_batches(4, **arguments)
        batches = self.served(name).train_batches(4, **arguments)
        for a, b in zip(expected.take(7), batches.take(7), strict=True):
            tf.nest.map_structure(np.testing.assert_array_equal, a, b)

    @pytest.mark.slow
    def test_each_of_several_readers_has_its_share(self):
        plain, served = self.sets["folder"], self.served()
        for shard in ((0, 2), (1, 2)):
            images_lib.assert_same(
                images_lib.batches(served.train_batches(8, 1, shard=shard), 3),
                images_lib.batches(plain.train_batches(8, 1, shard=shard), 3),
            )

    def test_what_is_not_served_is_that_of_the_data_set(self):
        served, plain = self.served(), self.sets["folder"]
        self.assertEqual(served.record, plain.record)
        self.assertEqual(served.image_shape, plain.image_shape)
        images_lib.assert_same(
            images_lib.batches(served.test_batches(2), 1),
            images_lib.batches(plain.test_batches(2), 1),
        )

    def test_images_in_memory_are_refused(self):
        with self.assertRaisesRegex(ValueError, "digits are held in memory"):
            data_service.ServedSet(
                datasets.load("digits"), self.service.address
            )

    @pytest.mark.slow
    def test_program_trains_with_the_service_as_without(self):
        rows = []
        flags = (
            *("train", "--model=resnet20", f"--dataset={self.folder}"),
            *("--set=recipe.image_size=16", "--steps=3", "--batch_size=8"),
            *("--deterministic", "--log_every=1"),
        )
        for more in ((), (f"--data_service={self.service.address}",)):
            workdir = pathlib.Path(records.scratch(self)) / "run"
            outcome = programs.run(*flags, *more, f"--workdir={workdir}")
            self.assertEqual(outcome.code, 0, outcome.err)
            rows.append((workdir / "metrics.csv").read_text())
        self.assertEqual(rows[0], rows[1])


class FailuresTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.dataset = datasets.load(images_lib.photos(self), image_size=16)

    @parameterized.parameters("", "here", "here:", ":80", "here:http")
    def test_address_without_a_port_is_refused(self, address):
        with self.assertRaisesRegex(ValueError, "must be HOST:PORT"):
            data_service.ServedSet(self.dataset, address)

    def test_dispatcher_that_does_not_respond_is_named(self):
        (port,) = free_ports(1)
        with self.assertRaisesRegex(ValueError, "no dispatcher responds"):
            data_service.worker_count(f"127.0.0.1:{port}", timeout=0.3)

    def test_another_server_is_no_dispatcher(self):
        with futures.ThreadPoolExecutor(1) as pool:
            server = grpc.server(pool)
            port = server.add_insecure_port("127.0.0.1:0")
            server.start()
            self.addCleanup(server.stop, None)
            with self.assertRaisesRegex(
                ValueError, "address of another server"
            ):
                data_service.worker_count(f"127.0.0.1:{port}")

    def test_dispatcher_without_workers_is_refused(self):
        service = Service(started=())
        with self.assertRaisesRegex(ValueError, "has no workers"):
            data_service.ServedSet(self.dataset, service.address)

    @parameterized.parameters(
        ({"is_listed": False}, "must know all workers"),
        ({"started": (1,)}, "batch of another step"),
    )
    def test_service_that_cannot_keep_the_order_ends_the_run(
        self, state, message
    ):
        service = Service(**state)
        served = data_service.ServedSet(self.dataset, service.address)
        with self.assertRaises(datasets.UNREADABLE) as caught:
            list(served.train_batches(4, seed=0).take(2))
        with self.assertRaisesRegex(data_service.ServiceError, message):
            served.check(caught.exception)

    def test_program_names_the_flag(self):
        outcome = programs.run("train", "--steps=1", "--data_service=here:1")
        self.assertEqual(outcome.code, 2)
        (line,) = outcome.err
        self.assertIn("--data_service=here:1: needs images", line)


if __name__ == "__main__":
    absltest.main()
