"""Strategies: rejected ones; devices only change the speed."""

import json
import os
import shutil
import tempfile
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import tensorflow as tf
from absl.testing import absltest
from absl.testing import parameterized

from keras_resnet.training import strategies
from tests import runs

RUN = (
    "--model=tiny",
    "--batch_size=16",
    "--steps=8",
    "--log_every=4",
    "--deterministic",
)


def tf_config(**fields):
    return json.dumps(
        {
            "cluster": {"worker": ["127.0.0.1:1", "127.0.0.1:2"]},
            "task": {"type": "worker", "index": 0},
            **fields,
        }
    )


def threads_of_a_kernel(cores, before, variables):
    """Returns the threads that two devices on a number of cores have."""
    os.environ.update(variables)
    tf.config.threading.set_intra_op_parallelism_threads(before)
    with mock.patch.object(strategies, "_cores", lambda: cores):
        strategy = strategies.get_strategy("auto", 2)
    assert strategy.num_replicas_in_sync == 2
    return tf.config.threading.get_intra_op_parallelism_threads()


class RefusalTest(parameterized.TestCase):
    def test_link_that_is_cut_after_the_rendezvous_is_a_lost_worker(self):
        lost = tf.errors.InternalError(None, None, "Barrier failed because")
        with (
            mock.patch.dict(os.environ, TF_CONFIG=tf_config()),
            mock.patch.object(strategies.rendezvous, "wait_for_workers"),
            mock.patch.object(
                tf.distribute, "MultiWorkerMirroredStrategy", side_effect=lost
            ),
            self.assertRaisesRegex(
                strategies.WorkerLostError, "another worker stopped responding"
            ),
        ):
            strategies.get_strategy("multi_worker")

    @parameterized.parameters(
        ("best", None, None, "must be one of auto, one_device.*received best"),
        ("mirrored", 0, None, "at least 1, received 0"),
        ("one_device", 2, None, "one_device has one device.*mirrored"),
        ("multi_worker", None, None, "TF_CONFIG.*is not set"),
        ("multi_worker", None, "{", "TF_CONFIG must be JSON like"),
        ("auto", None, "[]", "TF_CONFIG must be JSON like"),
        ("multi_worker", None, tf_config(task={}), "a task that is in"),
        (
            "multi_worker",
            None,
            tf_config(task={"type": "worker", "index": 2}),
            "a task that is in",
        ),
        ("multi_worker", 2, tf_config(), "num_devices of a worker must be"),
        ("tpu", None, None, "tpu needs a TPU"),
        ("tpu", 2, None, "tpu takes all cores"),
    )
    def test_what_the_machine_does_not_have(self, name, count, config, message):
        variables = {"TF_CONFIG": config} if config else {}
        with (
            mock.patch.dict(os.environ, variables),
            self.assertRaisesRegex(ValueError, message),
        ):
            strategies.get_strategy(name, count)

    @parameterized.parameters("auto", "multi_worker")
    def test_tf_config_that_is_malformed_is_one_line(self, name):
        task = {"type": "worker", "index": 0}
        two = ["a:1", "b:2"]
        odd = [
            *("5", "null", '"x"', "NaN", "[[1]]", "{", "[" * 100_000, "\ud800"),
            *({}, {"cluster": {}}, {"task": task}),
            *(
                {"cluster": cluster, "task": task}
                for cluster in (5, [], "a:1", None, {"worker": 5})
            ),
            *(
                {"cluster": {"worker": workers}, "task": task}
                for workers in (
                    *("a:1", {"a:1": "b:2"}, {}, None, [], [5, 6], [None]),
                    *([["a:1"]], ["a", "b"], ["a:1", "a:1"], ["a:x", "b:1"]),
                    *(["a:0", "b:1"], ["a:65536", "b:1"], ["a:-1", "b:1"]),
                    *(["a: 1", "b:1"], [":1", "b:1"], ["a b:1", "b:1"]),
                    *(["http://a:1", "b:1"], ["a:\u0661", "b:1"]),
                )
            ),
            *(
                {"cluster": {"worker": two}, "task": other}
                for other in (
                    *(5, None, [], "worker", {}, {"type": "worker"}),
                    *({"type": kind, "index": 0} for kind in (5, None, [], {})),
                    *({"type": kind, "index": 0} for kind in ("ps", "chief")),
                    *(
                        {"type": "worker", "index": index}
                        for index in (
                            *(None, [], {}, 0.0, 1.5, True, "x", "", "-1"),
                            *(-1, 2, 10**30, float("inf"), float("nan")),
                        )
                    ),
                )
            ),
            {"cluster": {"worker": two, "ps": 5}, "task": task},
            {"cluster": {"worker": two, "chief": two}, "task": task},
            {"cluster": {"worker": two}, "task": task, "rpc_layer": 5},
        ]
        for config in odd:
            if not isinstance(config, str):
                config = json.dumps(config)
            with (
                mock.patch.object(os, "environ", {"TF_CONFIG": config}),
                self.assertRaisesRegex(ValueError, "TF_CONFIG must be") as got,
            ):
                strategies.get_strategy(name)
            self.assertLess(len(str(got.exception)), 600)

    def test_tf_config_may_have_an_index_as_text(self):
        config = tf_config(task={"type": "worker", "index": "1"})
        workers, index = strategies._workers(config)
        self.assertEqual((len(workers), index), (2, 1))

    def test_processor_is_divided_before_tensorflow_runs_only(self):
        tf.zeros([])
        with self.assertRaisesRegex(ValueError, "choose a strategy first"):
            strategies.get_strategy("mirrored", 64)

    @parameterized.parameters(
        (2, 0, {}, 1),
        (3, 0, {}, 0),
        (2, 3, {}, 3),
        (2, 0, {"TF_NUM_INTRAOP_THREADS": "4"}, 0),
    )
    @pytest.mark.slow
    def test_kernels_of_a_device_for_each_core_have_one_thread(
        self, cores, before, variables, threads
    ):
        """Except if the user has set the number of threads of a kernel."""
        found = runs.call(threads_of_a_kernel, cores, before, variables)
        self.assertEqual(found, threads)

    def test_one_device_needs_no_strategy(self):
        for name in ("auto", "one_device"):
            strategy = strategies.get_strategy(name)
            self.assertEqual(strategy.num_replicas_in_sync, 1)
            self.assertTrue(strategies.is_chief(strategy))


class DevicesTest(parameterized.TestCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        folder = tempfile.TemporaryDirectory()
        cls.addClassCleanup(folder.cleanup)
        cls.shared = Path(folder.name)

    def setUp(self):
        super().setUp()
        self.root = Path(self.enter_context(tempfile.TemporaryDirectory()))

    def start(self, name, *arguments):
        return runs.train(
            self.root, f"--workdir={self.root}/{name}", *RUN, *arguments
        )

    def two_devices(self):
        """The run of two devices that several tests compare with."""
        if not (self.shared / "two").exists():
            run = self.start("two", "--num_devices=2")
            self.assertEqual(run.wait(), 0, run.err)
            shutil.copytree(self.root / "two", self.shared / "two")
        else:
            shutil.copytree(self.shared / "two", self.root / "two")

    def assert_close(self, name, other, tolerance=1e-4):
        """Sums in another order; the default is for float32 and 8 steps."""
        expected, got = (runs.values(self.root / n) for n in (other, name))
        self.assertEqual(got.keys(), expected.keys())
        del expected["devices/.ATTRIBUTES/VARIABLE_VALUE"]
        for key, value in expected.items():
            if value.dtype.kind == "S":
                continue  # the rows of metrics.csv, which round
            np.testing.assert_allclose(
                got[key],
                value,
                rtol=10 * tolerance,
                atol=tolerance,
                err_msg=key,
            )

    @pytest.mark.slow
    def test_two_devices_and_two_workers_are_one_device(self):
        """Law 6 of the design, normalization synchronized.

        The runs are in float64: in 50 steps a network with ReLUs makes the
        rounding 100,000 times as large.
        """
        flags = (
            "--sync_batch_norm",
            "--dtype=float64",
            "--steps=50",
            "--set=recipe.learning_rate=0.01",
        )
        run = self.start("one", *flags)
        self.assertEqual(run.wait(), 0, run.err)
        run = self.start("two", "--num_devices=2", *flags)
        self.assertEqual(run.wait(), 0, run.err)
        self.assert_close("two", "one", 1e-9)
        both = runs.workers(
            self.root, 2, f"--workdir={self.root}/workers", *RUN, *flags
        )
        self.assertEqual([run.wait() for run in both], [0, 0], both[0].err)
        self.assert_close("workers", "one", 1e-9)

    @parameterized.parameters(
        # Each device has the loss of its own companion.
        ("--model=companion",),
        ("--set=model.remat=true",),
        ("--set=recipe.micro_batches=4",),
    )
    @pytest.mark.slow
    def test_what_goes_on_between_two_normalizations(self, flag):
        """Where devices add up, TensorFlow goes from one to the other."""
        flags = (flag, "--sync_batch_norm", "--dtype=float64")
        for name, count in (("one", 1), ("two", 2)):
            run = self.start(name, f"--num_devices={count}", *flags)
            self.assertEqual(run.wait(), 0, run.err)
        self.assert_close("two", "one", 1e-9)

    @pytest.mark.slow
    def test_each_device_normalizes_by_its_share(self):
        """As the papers did; then 2 devices are not 1, but 2 workers are."""
        self.two_devices()
        both = runs.workers(
            self.root, 2, f"--workdir={self.root}/workers", *RUN
        )
        self.assertEqual([run.wait() for run in both], [0, 0], both[0].err)
        self.assert_close("workers", "two")
        self.assertEqual(
            both[0].out[-1].split('"images')[0],
            both[1].out[-1].split('"images')[0],
        )
        self.assertNotIn("step 4 of 8", "\n".join(both[1].out))

    @pytest.mark.slow
    def test_micro_batches_are_devices_one_after_the_other(self):
        self.two_devices()
        run = self.start("micro", "--set=recipe.micro_batches=2")
        self.assertEqual(run.wait(), 0, run.err)
        self.assert_close("micro", "two")

    @parameterized.parameters(
        (["--num_devices=3"], "--batch_size=16: .*16 images for 3 devices"),
        (["--num_devices=-1"], "--num_devices=-1: .*at least 1"),
        (["--strategy=fast"], "--strategy=fast: strategy must be one of"),
        (["--strategy=tpu"], "--strategy=tpu: tpu needs a TPU"),
    )
    @pytest.mark.slow
    def test_what_cannot_be_is_a_usage_error(self, arguments, message):
        run = self.start("run", *arguments)
        self.assertEqual(run.wait(), 2)
        self.assertLen(run.err, 1)
        self.assertRegex(run.err[0], message)
        self.assertFalse((self.root / "run").exists())


if __name__ == "__main__":
    absltest.main()
