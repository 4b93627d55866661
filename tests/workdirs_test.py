"""Work directories: their files, loading them, rejected ones."""

import dataclasses
import json
import os
import re
import shutil
import tempfile
from pathlib import Path
from unittest import mock

import keras
import numpy as np
import pytest
import tensorflow as tf
from absl.testing import absltest
from absl.testing import parameterized

import keras_resnet
from keras_resnet.data import datasets
from keras_resnet.training import checkpoints
from keras_resnet.training import configs
from keras_resnet.training import evaluation
from keras_resnet.training import loop
from keras_resnet.training import metrics
from keras_resnet.training import trained_networks
from keras_resnet.training import workdirs
from tests import runs
from tests import tiny_runs


def _received(text):
    return f"received {re.escape(text)}"


class WorkdirTest(tiny_runs.TestCase):
    def test_moving_average_is_what_is_tested_and_loaded(self):
        recipe = dataclasses.replace(tiny_runs.RECIPE, average_momentum=0.9)
        result = self.train(tiny_runs.config(recipe))
        trained = trained_networks.load_workdir(
            self.workdir, classifier_activation=None
        )
        dataset = datasets.load("digits")
        found = evaluation.evaluate(trained.model, dataset.test_batches(100))
        np.testing.assert_allclose(
            found.top1_error, result["test_top1_error"], rtol=1e-6
        )
        np.testing.assert_allclose(found.loss, result["test_loss"], rtol=1e-4)

    def test_float64_is_loaded_in_float32(self):
        recipe = dataclasses.replace(tiny_runs.RECIPE, average_momentum=0.9)
        result = self.train(tiny_runs.config(recipe, dtype="float64"))
        values = runs.values(self.workdir)
        is_float64 = [v.dtype == "float64" for v in values.values()]
        self.assertGreater(sum(is_float64), len(values) / 2)
        trained = trained_networks.load_workdir(
            self.workdir, classifier_activation=None
        )
        self.assertEqual(
            {weight.dtype for weight in trained.model.weights}, {"float32"}
        )
        found = evaluation.evaluate(
            trained.model, datasets.load("digits").test_batches(100)
        )
        np.testing.assert_allclose(found.loss, result["test_loss"], rtol=1e-4)

    def test_config_json_that_is_not_a_file_is_an_error(self):
        self.workdir.mkdir()
        path = self.workdir / "config.json"
        for make, remove in (
            (lambda: os.mkfifo(path), path.unlink),
            (path.mkdir, path.rmdir),
            (lambda: path.symlink_to("/dev/zero"), path.unlink),
            (lambda: path.symlink_to("nowhere"), path.unlink),
        ):
            make()
            for read in (
                lambda: trained_networks.load_workdir(self.workdir),
                lambda: workdirs.check(tiny_runs.config(), self.workdir),
            ):
                with self.assertRaisesRegex(
                    workdirs.WorkdirError, "config.json cannot be read"
                ):
                    read()
            remove()

    def test_best_checkpoint_is_kept_beside_the_last(self):
        errors = iter([5.0, 3.0, 4.0, 3.0])

        def evaluated(*_, **__):
            wrong = int(next(errors) * 100)
            return evaluation.Evaluation(10_000, wrong, 0, 1.0)

        with mock.patch.object(evaluation.Evaluator, "__call__", evaluated):
            self.train(tiny_runs.config(), eval_every=2)
        best = trained_networks.load_workdir(self.workdir, checkpoint="best")
        self.assertEqual(best.step, 4)
        self.assertEqual(trained_networks.load_workdir(self.workdir).step, 8)
        self.assertEqual(checkpoints.steps(self.workdir / "best"), [4])
        with self.assertRaisesRegex(ValueError, "must be one of last, best"):
            trained_networks.load_workdir(self.workdir, checkpoint="first")

    def test_work_directory_holds_what_the_other_programs_need(self):
        result = self.train(
            tiny_runs.config(data_dir="elsewhere"), eval_every=4
        )
        trained = trained_networks.load_workdir(self.workdir)
        self.assertEqual(trained.step, 8)
        self.assertEqual(trained.config, tiny_runs.config(data_dir="elsewhere"))
        self.assertEqual(trained.labels, [str(i) for i in range(10)])
        dataset = datasets.load("digits", preprocessing=trained.preprocessing)
        errors = images = 0
        for x, y in dataset.test_batches(100):
            p = np.array(trained.model(x))
            np.testing.assert_allclose(p.sum(1), 1, rtol=1e-5)
            errors += np.sum(p.argmax(1) != y.numpy())
            images += len(y)
        self.assertEqual(images, result["test_images"])
        np.testing.assert_allclose(
            100 * errors / images, result["test_top1_error"]
        )
        self.assertLen(list((self.workdir / "events").iterdir()), 1)
        rows = (self.workdir / "metrics.csv").read_text().splitlines()
        self.assertEqual(rows[0], ",".join(metrics.COLUMNS))
        is_tested = [not row.endswith(",,,") for row in rows[1:]]
        self.assertEqual(is_tested, [False, True, False, True])

    @pytest.mark.slow
    def test_other_configuration_is_refused_and_nothing_changed(self):
        self.train(tiny_runs.config())
        before = {p: p.stat().st_mtime_ns for p in self.workdir.rglob("*")}
        recipe = dataclasses.replace(tiny_runs.RECIPE, learning_rate=0.2)
        with self.assertRaisesRegex(
            workdirs.WorkdirError,
            "recipe.learning_rate was 0.1, is 0.2; seed was 0, is 1",
        ):
            self.train(tiny_runs.config(recipe, seed=1))
        after = {p: p.stat().st_mtime_ns for p in self.workdir.rglob("*")}
        self.assertEqual(after, before)
        # The place of the data may change.
        self.train(tiny_runs.config(data_dir="elsewhere"))

    def test_best_checkpoint_of_a_lost_way_is_dropped(self):
        """Where the last checkpoints are lost, so are the best after them."""

        def trained(*errors):
            left = iter(errors)

            def evaluated(*_, **__):
                return evaluation.Evaluation(100, next(left), 0, 1.0)

            with mock.patch.object(evaluation.Evaluator, "__call__", evaluated):
                self.train(
                    tiny_runs.config(),
                    eval_every=2,
                    keep=9,
                    checkpoint_seconds=0.0,
                )
            return trained_networks.load_workdir(
                self.workdir, checkpoint="best"
            ).step

        self.assertEqual(trained(9, 8, 7, 6), 8)
        for path in self.workdir.glob("checkpoints/ckpt-[5-8].index"):
            path.unlink()
        self.assertEqual(trained(5, 6), 6)

    @pytest.mark.slow
    def test_other_data_of_the_same_name_is_refused(self):
        self.train(tiny_runs.config())
        path = self.workdir / "dataset.json"
        about = json.loads(path.read_text())
        # The rounding of another machine is accepted.
        about["preprocessing"]["mean"][3][3][0] *= 1 + 1e-7
        path.write_text(json.dumps(about))
        self.train(tiny_runs.config())
        about["labels"][3] = "drei"
        about["preprocessing"]["mean"][3][3][0] += 0.1
        path.write_text(json.dumps(about))
        before = path.stat().st_mtime_ns
        with self.assertRaisesRegex(
            workdirs.WorkdirError,
            "trained on other data: labels was .*'drei'.*; mean has other val",
        ):
            self.train(tiny_runs.config())
        self.assertEqual(path.stat().st_mtime_ns, before)

    def test_better_network_replaces_the_best_once_a_checkpoint_has_it(self):
        """A run that is killed in between has one of them."""
        errors = iter([5, 3, 4, 2, 3])

        def evaluated(*_, **__):
            return evaluation.Evaluation(100, next(errors), 0, 1.0)

        add = metrics.MetricsFile.add

        def killed(metrics, row, events=None):
            if row["step"] == 4:
                raise KeyboardInterrupt
            add(metrics, row, events)

        arguments = {"eval_every": 2, "checkpoint_seconds": 0.0}
        with (
            mock.patch.object(evaluation.Evaluator, "__call__", evaluated),
            mock.patch.object(metrics.MetricsFile, "add", killed),
            self.assertRaises(KeyboardInterrupt),
        ):
            self.train(tiny_runs.config(), **arguments)
        best = self.workdir / "best"
        self.assertEqual(checkpoints.steps(best), [2, 4])
        (best / "ckpt-9_temp").mkdir()
        (self.workdir / ".keras_resnet-1-config.json").touch()
        add, kept = metrics.MetricsFile.__init__, []

        def noted(metrics, *arguments):
            kept.append(checkpoints.steps(best))
            add(metrics, *arguments)

        with (
            mock.patch.object(evaluation.Evaluator, "__call__", evaluated),
            mock.patch.object(metrics.MetricsFile, "__init__", noted),
        ):
            self.train(tiny_runs.config(), **arguments)
        self.assertEqual(kept, [[2]])
        self.assertEqual(checkpoints.steps(best), [6])
        self.assertEqual(
            sorted(os.listdir(self.workdir)),
            sorted(
                [".lock", "best", "checkpoints", "events"]
                + ["config.json", "dataset.json", "metrics.csv"]
            ),
        )
        self.assertFalse((best / "ckpt-9_temp").exists())

    def test_directory_that_is_removed_ends_the_run(self):
        add = metrics.MetricsFile.add

        def removing(metrics, row, events=None):
            add(metrics, row, events)
            if row["step"] == 4:
                shutil.rmtree(self.workdir)

        with (
            mock.patch.object(metrics.MetricsFile, "add", removing),
            self.assertRaisesRegex(OSError, "removed or replaced"),
        ):
            self.train(tiny_runs.config())
        self.assertFalse(self.workdir.exists())

    @parameterized.parameters("gs://b/run", "s3://b", "file:///run", "a+b://c")
    def test_url_is_refused(self, url):
        with self.assertRaisesRegex(workdirs.WorkdirError, _received(url)):
            self.train(tiny_runs.config(), workdir=url)
        with self.assertRaisesRegex(workdirs.WorkdirError, _received(url)):
            trained_networks.load_workdir(url)
        self.assertFalse(os.path.exists(url.partition("/")[0]))

    def test_directory_of_something_else_is_refused(self):
        self.workdir.mkdir()
        (self.workdir / "thesis.txt").write_text("mine")
        with self.assertRaisesRegex(
            workdirs.WorkdirError, "must be empty or a work"
        ):
            self.train(tiny_runs.config())
        self.assertEqual(os.listdir(self.workdir), ["thesis.txt"])
        with self.assertRaisesRegex(
            workdirs.WorkdirError, "must be a work directory"
        ):
            trained_networks.load_workdir(self.workdir)

    def test_directory_without_a_checkpoint_says_so(self):
        with (
            mock.patch.object(loop._Loop, "run", side_effect=OSError("full")),
            self.assertRaises(OSError),
        ):
            self.train(tiny_runs.config())
        with self.assertRaisesRegex(workdirs.WorkdirError, "no checkpoint yet"):
            trained_networks.load_workdir(self.workdir)


class ChangedFilesTest(parameterized.TestCase):
    """Files of a work directory that somebody changed by hand."""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        root = tempfile.TemporaryDirectory()
        cls.addClassCleanup(root.cleanup)
        cls.run_directory = Path(root.name) / "run"
        with mock.patch.dict(keras_resnet.MODELS, {"tiny": runs.TINY}):
            loop.train_and_evaluate(
                tiny_runs.config(),
                cls.run_directory,
                report=tiny_runs.quiet,
                log_every=2,
            )

    def setUp(self):
        super().setUp()
        tiny = mock.patch.dict(keras_resnet.MODELS, {"tiny": runs.TINY})
        self.enter_context(tiny)
        root = self.enter_context(tempfile.TemporaryDirectory())
        self.workdir = Path(root) / "run"
        shutil.copytree(self.run_directory, self.workdir)

    def assert_refused(self, name, *messages):
        """One line names the file, in training and in the other programs."""
        message = f"{self.workdir}/{name}.*{'.*'.join(messages)}"
        with self.assertRaisesRegex(workdirs.WorkdirError, message) as caught:
            trained_networks.load_workdir(self.workdir)
        self.assertLess(len(str(caught.exception)), 700)

    @parameterized.product(
        name=("config.json", "dataset.json"),
        content=(
            b"",
            b"{",
            b"[1]",
            b"null",
            b'"text"',
            b"{}",
            b"\xff\xfe",
            b"\xef\xbb\xbf{}",
            b'{"a": NaN}',
            b'{"a": 1e999}',
            b'{"a": -Infinity}',
            b'{"a": 1, "a": 2}',
            b"[" * 100_000,
            b'{"a":' * 100_000,
            b'{"a": ' + b"9" * 5000 + b"}",
            b"\0" * 100,
        ),
    )
    def test_file_that_is_no_object(self, name, content):
        (self.workdir / name).write_bytes(content)
        is_object = content == b"{}"
        expected = "" if is_object else "cannot be read"
        if (name, content) != ("dataset.json", b"{}"):
            self.assert_refused(name, expected)
        else:
            self.assert_refused(name, "labels must be")

    @parameterized.product(
        name=("config.json", "dataset.json"),
        kind=("folder", "pipe", "loop", "large"),
    )
    def test_file_that_is_no_file(self, name, kind):
        path = self.workdir / name
        path.unlink()
        if kind == "folder":
            path.mkdir()
        elif kind == "pipe":
            os.mkfifo(path)
        elif kind == "loop":
            path.symlink_to(name)
        else:
            path.touch()
            os.truncate(path, 2**40)
        with self.assertRaisesRegex(workdirs.WorkdirError, name):
            trained_networks.load_workdir(self.workdir)

    @parameterized.parameters(
        ("config.json", "model", 5),
        ("config.json", "model", "resnet21"),
        ("config.json", "model", ["tiny"]),
        ("config.json", "seed", "0"),
        ("config.json", "seed", True),
        ("config.json", "seed", 10**400),
        ("config.json", "seed", 0.5),
        ("config.json", "dtype", None),
        ("config.json", "deterministic", 1),
        ("config.json", "backend", "torch"),
        ("config.json", "data_dir", 3),
        ("config.json", "recipe", None),
        ("config.json", "recipe", [1]),
        ("config.json", "recipe", {}),
        ("config.json", "model_arguments", []),
        ("config.json", "model_arguments", {"shortcuts": "A"}),
        ("config.json", "model_arguments", {"shortcut": ["A"]}),
        ("config.json", "model_arguments", {"shortcut": {"class_name": "A"}}),
        ("config.json", "model_arguments", {"survival_probability": "x"}),
        ("config.json", "model_arguments", {"survival_probability": {}}),
        ("config.json", "model_arguments", {"batch_norm_epsilon": "x"}),
        ("config.json", "model_arguments", {"batch_norm_momentum": None}),
        ("config.json", "model_arguments", {"looped": "yes"}),
        ("config.json", "model_arguments", {"unit": 1}),
        ("config.json", "model_arguments", {"bottleneck_stride": 1e300}),
        ("config.json", "stranger", 1),
        ("config.json", "steps", None),
        ("dataset.json", "labels", None),
        ("dataset.json", "labels", []),
        ("dataset.json", "labels", [1, 2]),
        ("dataset.json", "labels", "cat"),
        ("dataset.json", "labels", {"cat": 1}),
        ("dataset.json", "image_shape", [8, 8, 3]),
        ("dataset.json", "image_shape", None),
        ("dataset.json", "image_shape", [10**400, 8, 1]),
        ("dataset.json", "preprocessing", None),
        ("dataset.json", "preprocessing", []),
        ("dataset.json", "preprocessing", {}),
        ("dataset.json", "preprocessing", "x"),
    )
    def test_value_of_another_type(self, name, field, value):
        path = self.workdir / name
        fields = json.loads(path.read_text())
        path.write_text(json.dumps({**fields, field: value}))
        self.assert_refused(name)

    @parameterized.parameters(
        ("steps", "8"),
        ("steps", 0),
        ("steps", None),
        ("decay_at_steps", 5),
        ("decay_at_steps", [1.5]),
        ("learning_rate", "0.1"),
        ("learning_rate", True),
        ("expected_errors", [1]),
        ("augmentation", 1),
        ("augmentation", "blur"),
        ("optimizer", []),
        ("stranger", 1),
    )
    def test_field_of_the_recipe_of_another_type(self, field, value):
        path = self.workdir / "config.json"
        fields = json.loads(path.read_text())
        fields["recipe"][field] = value
        path.write_text(json.dumps(fields))
        self.assert_refused("config.json", field)

    @parameterized.parameters(
        ("image_size", "8"),
        ("image_size", 1.0),
        ("image_size", 10**9),
        ("image_size", None),
        ("channels", 2),
        ("channels", True),
        ("mean", "x"),
        ("mean", {"a": 1}),
        ("mean", [[1, 2], [3]]),
        ("mean", [10**400]),
        ("standard_deviation", [0]),
        ("stranger", 1),
    )
    def test_field_of_the_preprocessing_of_another_type(self, field, value):
        path = self.workdir / "dataset.json"
        about = json.loads(path.read_text())
        about["preprocessing"][field] = value
        path.write_text(json.dumps(about))
        self.assert_refused("dataset.json")

    @parameterized.product(
        field=("mean", "image_size", "shorter_side", "standard_deviation"),
        value=("x", {"a": 1}, ["x"], [[1], [1, 2]]),
    )
    def test_error_names_the_field_of_the_preprocessing(self, field, value):
        path = self.workdir / "dataset.json"
        about = json.loads(path.read_text())
        about["preprocessing"][field] = value
        path.write_text(json.dumps(about))
        self.assert_refused("dataset.json", f"{field} must be .*, received")

    def test_network_larger_than_the_checkpoints_is_not_built(self):
        large = dataclasses.replace(runs.TINY, filters=(2**14, 2**14))
        built = []
        count = keras.Variable.__init__

        def init(variable, initializer, shape=None, *args, **kwargs):
            built.append(shape)
            count(variable, initializer, shape, *args, **kwargs)

        with (
            mock.patch.dict(keras_resnet.MODELS, {"tiny": large}),
            mock.patch.object(keras.Variable, "__init__", init),
        ):
            self.assert_refused(
                "config.json must not describe more weights than the checkp"
            )
        self.assertLess(max(map(np.prod, built)), 2**22)

    @parameterized.parameters(
        (None,),
        (b"",),
        (b"step\n",),
        (b"\xef\xbb\xbf%s",),
        (b"\xff%s",),
        (b"x%s",),
        (b"2,0.1,1,1,1,,,\n",),
        (b"\0" * 9999,),
        ("folder",),
        ("pipe",),
        ("loop",),
    )
    def test_rows_come_back_from_the_checkpoint(self, content):
        path = self.workdir / "metrics.csv"
        rows = path.read_bytes()
        path.unlink()
        if content == "folder":
            path.mkdir()
        elif content == "pipe":
            os.mkfifo(path)
        elif content == "loop":
            path.symlink_to(path.name)
        elif content is not None:
            path.write_bytes(content.replace(b"%s", rows))
        lines = []
        metrics.MetricsFile(
            self.workdir, rows.decode(), True, lines.append
        ).close()
        self.assertEqual(path.read_bytes(), rows)
        (line,) = lines
        self.assertIn(
            "metrics.csv was changed since the run wrote it: its 4 row", line
        )
        is_aside = (self.workdir / "changed-metrics.csv").is_symlink() or (
            self.workdir / "changed-metrics.csv"
        ).exists()
        self.assertEqual(is_aside, content is not None)

    def test_changed_rows_never_overwrite_a_file(self):
        path = self.workdir / "metrics.csv"
        rows = path.read_text()
        (self.workdir / "changed-metrics.csv").write_text("mine")
        for content in ("once", "twice"):
            path.write_text(content)
            metrics.MetricsFile(
                self.workdir, rows, True, tiny_runs.quiet
            ).close()
        found = self.workdir.glob("changed-*.csv")
        self.assertCountEqual(
            [path.read_text() for path in found], ["mine", "once", "twice"]
        )

    def test_row_is_not_written_through_a_link(self):
        mine = self.workdir / "mine"
        mine.write_text("mine")
        path = self.workdir / "metrics.csv"
        file = metrics.MetricsFile(self.workdir, "", True, tiny_runs.quiet)
        path.unlink()
        file.add({"step": 1})
        self.assertEqual(path.read_text(), file.text())
        path.unlink()
        path.symlink_to(mine)
        with self.assertRaises(OSError):
            file.add({"step": 2})
        file.close()
        self.assertEqual(mine.read_text(), "mine")

    def test_rows_of_a_run_come_back_from_its_checkpoint(self):
        path = self.workdir / "metrics.csv"
        rows = path.read_bytes()
        path.write_bytes(rows[:100])
        loop.train_and_evaluate(
            tiny_runs.config(), self.workdir, report=tiny_runs.quiet
        )
        self.assertEqual(path.read_bytes(), rows)

    def test_rows_after_the_checkpoint_are_counted(self):
        path = self.workdir / "metrics.csv"
        lines = path.read_text().splitlines(keepends=True)
        file = metrics.MetricsFile(
            self.workdir, "".join(lines[:3]), True, self.fail
        )
        file.close()
        self.assertEqual(file.logged, 8)
        self.assertEqual(path.read_text(), "".join(lines[:3]))

    def test_checkpoint_of_another_network_is_an_error(self):
        other = dataclasses.replace(runs.TINY, filters=(4, 16))
        with (
            mock.patch.dict(keras_resnet.MODELS, {"tiny": other}),
            self.assertRaisesRegex(checkpoints.StateError, "another network"),
        ):
            trained_networks.load_workdir(self.workdir)

    def test_checkpoint_without_a_weight_is_an_error(self):
        for path in self.workdir.glob("checkpoints/ckpt-8.*"):
            path.unlink()
        model = configs.build_model(tiny_runs.config(), (8, 8, 1), 10)
        step = tf.Variable(8, dtype="int64")
        layers = {layer.name: layer for layer in model.layers[:-1]}
        saved = tf.train.Checkpoint(
            model=tf.train.Checkpoint(**layers), step=step
        )
        saved.write(str(self.workdir / "checkpoints" / "ckpt-8"))
        with self.assertRaisesRegex(
            checkpoints.StateError, "ckpt-8 lacks .*train again"
        ):
            trained_networks.load_workdir(self.workdir)


if __name__ == "__main__":
    absltest.main()
