"""Work directories: what is left, what is loaded, what is refused."""

import dataclasses
import json
import os
from unittest import mock

import numpy as np
from absl.testing import absltest

from keras_resnet.training import checkpoints
from keras_resnet.training import data
from keras_resnet.training import evaluation
from keras_resnet.training import loop
from keras_resnet.training import workdirs
from tests import runs
from tests import tiny_runs


class WorkdirTest(tiny_runs.TestCase):
    def test_moving_average_is_what_is_tested_and_loaded(self):
        recipe = dataclasses.replace(tiny_runs.RECIPE, average_momentum=0.9)
        result = self.train(tiny_runs.config(recipe))
        trained = workdirs.load_workdir(
            self.workdir, classifier_activation=None
        )
        dataset = data.load("digits")
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
        trained = workdirs.load_workdir(
            self.workdir, classifier_activation=None
        )
        self.assertEqual(
            {weight.dtype for weight in trained.model.weights}, {"float32"}
        )
        found = evaluation.evaluate(
            trained.model, data.load("digits").test_batches(100)
        )
        np.testing.assert_allclose(found.loss, result["test_loss"], rtol=1e-4)

    def test_best_checkpoint_is_kept_beside_the_last(self):
        errors = iter([5.0, 3.0, 4.0, 3.0])

        def evaluated(*_, **__):
            wrong = int(next(errors) * 100)
            return evaluation.Evaluation(10_000, wrong, 0, 1.0)

        with mock.patch.object(evaluation.Evaluator, "__call__", evaluated):
            self.train(tiny_runs.config(), eval_every=2)
        best = workdirs.load_workdir(self.workdir, checkpoint="best")
        self.assertEqual(best.step, 4)
        self.assertEqual(workdirs.load_workdir(self.workdir).step, 8)
        self.assertEqual(checkpoints.steps(self.workdir / "best"), [4])
        with self.assertRaisesRegex(ValueError, "must be one of last, best"):
            workdirs.load_workdir(self.workdir, checkpoint="first")

    def test_work_directory_holds_what_the_other_programs_need(self):
        result = self.train(
            tiny_runs.config(data_dir="elsewhere"), eval_every=4
        )
        trained = workdirs.load_workdir(self.workdir)
        self.assertEqual(trained.step, 8)
        self.assertEqual(trained.config, tiny_runs.config(data_dir="elsewhere"))
        self.assertEqual(trained.labels, [str(i) for i in range(10)])
        dataset = data.load("digits", preprocessing=trained.preprocessing)
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
        self.assertEqual(rows[0], ",".join(workdirs.COLUMNS))
        is_tested = [not row.endswith(",,,") for row in rows[1:]]
        self.assertEqual(is_tested, [False, True, False, True])

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
        # Where the data lies is no part of the configuration.
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
            return workdirs.load_workdir(self.workdir, checkpoint="best").step

        self.assertEqual(trained(9, 8, 7, 6), 8)
        for path in self.workdir.glob("checkpoints/ckpt-[5-8].index"):
            path.unlink()
        self.assertEqual(trained(5, 6), 6)

    def test_other_data_of_the_same_name_is_refused(self):
        self.train(tiny_runs.config())
        path = self.workdir / "dataset.json"
        about = json.loads(path.read_text())
        # The rounding of another machine is no other data.
        about["preprocessing"]["mean"][3][3][0] *= 1 + 1e-7
        path.write_text(json.dumps(about))
        self.train(tiny_runs.config())
        about["labels"][3] = "drei"
        about["preprocessing"]["mean"][3][3][0] += 0.1
        path.write_text(json.dumps(about))
        before = path.stat().st_mtime_ns
        with self.assertRaisesRegex(
            workdirs.WorkdirError,
            "trained on other data: labels was .*'drei'.*; mean was ",
        ):
            self.train(tiny_runs.config())
        self.assertEqual(path.stat().st_mtime_ns, before)

    def test_directory_of_something_else_is_refused(self):
        self.workdir.mkdir()
        (self.workdir / "thesis.txt").write_text("mine")
        with self.assertRaisesRegex(workdirs.WorkdirError, "neither empty nor"):
            self.train(tiny_runs.config())
        self.assertEqual(os.listdir(self.workdir), ["thesis.txt"])
        with self.assertRaisesRegex(workdirs.WorkdirError, "no work directory"):
            workdirs.load_workdir(self.workdir)

    def test_directory_without_a_checkpoint_says_so(self):
        with (
            mock.patch.object(
                loop._Trainer, "train", side_effect=OSError("full")
            ),
            self.assertRaises(OSError),
        ):
            self.train(tiny_runs.config())
        with self.assertRaisesRegex(workdirs.WorkdirError, "no checkpoint yet"):
            workdirs.load_workdir(self.workdir)
        (self.workdir / "config.json").write_text("{")
        with self.assertRaisesRegex(workdirs.WorkdirError, "cannot be read"):
            workdirs.load_workdir(self.workdir)


if __name__ == "__main__":
    absltest.main()
