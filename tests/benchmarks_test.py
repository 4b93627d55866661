import dataclasses
import io
import json
import subprocess
import sys
from unittest import mock

import numpy as np
import pytest
from absl.testing import absltest
from absl.testing import parameterized

from benchmarks import contenders
from benchmarks import measure
from benchmarks import peers
from benchmarks import report
from benchmarks import worker
from benchmarks import works
from tests import programs
from tests import reference

WORKS = [work for group in works.GROUPS.values() for work in group]
SMALL = works.Work("train", "resnet8", 2, "float32", ("keras_resnet", "keras"))


def parameters(network):
    """Tests that the peers have the layout of the papers."""
    return reference.counts(reference.layout(network)).parameters


def result(contender, **fields):
    numbers = {
        "seconds": 0.5,
        "spread": 0.02,
        "images_per_second": 16.0,
        "ratio": 1.0,
        "goal": None,
        "first_step_seconds": 2.0,
        "peak_bytes": 2**30,
        **fields,
    }
    return measure.Result(contender, **numbers)


class WorksTest(parameterized.TestCase):
    @parameterized.parameters(*WORKS)
    def test_contenders_and_goals_are_known(self, work):
        known = contenders.CONTENDERS[work.kind]
        self.assertContainsSubset(work.contenders, known)
        self.assertContainsSubset(work.goals, work.contenders)
        self.assertNotIn(work.contenders[0], work.goals)

    def test_depth_of_a_network_that_is_no_row(self):
        spec = dataclasses.replace(SMALL, network="resnet302").spec()
        self.assertEqual((spec.depth, spec.units), (302, (50, 50, 50)))


class WorkerTest(absltest.TestCase):
    def test_contender_that_times_itself_takes_its_steps_at_once(self):
        asked = []

        def make(work):
            return lambda: asked.append(work) or 0.25, {"times_itself": True}

        ours = contenders.Contender(("keras_resnet",), make, {})
        self.enter_context(
            mock.patch.dict(contenders.CONTENDERS["train"], ours=ours)
        )
        self.enter_context(mock.patch.object(sys, "stdin", io.StringIO("40\n")))
        said = self.enter_context(
            mock.patch.object(sys, "stdout", io.StringIO())
        )
        worker.main("ours", json.dumps(dataclasses.asdict(SMALL)), "")
        _, turn = map(json.loads, said.getvalue().splitlines())
        self.assertEqual(turn["seconds"], 40 * 0.25)
        self.assertLen(asked, 2)  # the first step, and the turn

    @pytest.mark.slow
    def test_peak_of_memory_is_that_of_the_worker_alone(self):
        script = """
from benchmarks import worker
print(worker._peak_bytes() - worker._bytes())
"""
        held = np.ones(2**30, np.uint8)
        process = subprocess.run(
            [sys.executable, "-c", script],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            check=True,
        )
        self.assertLess(int(process.stdout), len(held) // 2)


class PeersTest(parameterized.TestCase):
    @parameterized.parameters(20, 56)
    def test_network_of_keras_layers_has_the_parameters_of_the_paper(
        self, depth
    ):
        model = peers.cifar_of_keras_layers(((depth - 2) // 6,) * 3)
        trainable = sum(int(np.prod(v.shape)) for v in model.trainable_weights)
        self.assertEqual(trainable, parameters(f"resnet{depth}"))

    @parameterized.parameters("resnet20", "resnet34", "resnet50")
    def test_network_of_torch_has_the_parameters_of_the_paper(self, network):
        pytest.importorskip("torch")
        work = dataclasses.replace(SMALL, network=network)
        module = peers.torch_network(work.spec())
        self.assertEqual(
            sum(p.numel() for p in module.parameters()),
            parameters(network),
        )


class MeasureTest(absltest.TestCase):
    @pytest.mark.slow
    def test_every_contender_takes_its_turns(self):
        ours, theirs = measure.measure(SMALL, rounds=2)
        self.assertEqual(
            (ours.contender, theirs.contender), ("keras_resnet", "keras")
        )
        self.assertEqual(ours.ratio, 1.0)
        for each in (ours, theirs):
            self.assertGreater(each.seconds, 0.0)
            self.assertGreater(each.first_step_seconds, 0.0)
            self.assertGreater(each.peak_bytes, 0)
            self.assertGreater(each.graph_nodes, 100)
            self.assertAlmostEqual(each.images_per_second * each.seconds, 2.0)

    def test_contender_that_fails_says_why_in_one_line(self):
        broken = dataclasses.replace(SMALL, network="resnet21")
        with self.assertRaisesRegex(
            measure.ContenderError, r"keras_resnet failed: .*6n \+ 2"
        ):
            measure.measure(broken, rounds=1)


class ReportTest(absltest.TestCase):
    def test_table_has_a_row_for_each_contender(self):
        text = report.table(
            SMALL,
            [
                result("keras_resnet", graph_nodes=1234),
                result("keras", ratio=1.43, goal=1.35, agreement=0.975),
            ],
        )
        *_, ours, theirs = text.strip().splitlines()
        self.assertIn("| keras_resnet | 16 | 500 | 2% | 1.00 x |", ours)
        self.assertTrue(ours.endswith("| 1.00 GiB | 1,234 |  |"))
        self.assertIn("| 1.43 x | 1.35 x |", theirs)
        self.assertTrue(theirs.endswith("| 97.5% |"))

    def test_plots_are_there_for_what_was_measured(self):
        pytest.importorskip("matplotlib")
        from keras_resnet.papers import figures

        measured = [
            ("depth", work, [result("keras_resnet"), result("torch")])
            for work in works.GROUPS["depth"]
        ]
        found = {plot.name: plot for plot in report.plots(measured)}
        self.assertSameElements(
            found, ["step_by_depth", "first_step_by_depth", "memory_by_depth"]
        )
        for plot in found.values():
            svg = figures.svg(plot.figure)
            self.assertIn("<svg", svg)
            self.assertIn("1,202", svg)


class ContendersTest(absltest.TestCase):
    def test_a_contender_needs_all_of_its_packages(self):
        there = contenders.Contender(("keras", "numpy"), print, {})
        self.assertEqual(there.missing(), [])
        lacks_one = there._replace(packages=("keras", "no_such_package"))
        self.assertEqual(lacks_one.missing(), ["no_such_package"])


class ProgramTest(parameterized.TestCase):
    def test_skipped_contenders_are_named_once_with_their_packages(self):
        row = contenders.Contender(("no_such_package",), print, {})
        rows = {"keras_resnet, saved_model": row, "litert": row}
        with (
            mock.patch.dict(contenders.CONTENDERS["infer"], rows),
            mock.patch.object(measure, "measure", return_value=[]) as measured,
        ):
            outcome = programs.run("benchmarks", "--groups=int8")
        self.assertEqual(outcome.code, 0)
        for name in rows:
            line = f"skipped: {name} needs no_such_package"
            self.assertEqual(outcome.out.count(line), 1)
        measured.assert_not_called()  # ours is missing

    def test_what_draws_is_missed_before_anything_is_measured(self):
        with (
            mock.patch.dict("sys.modules", {"matplotlib": None}),
            mock.patch.object(measure, "measure") as measured,
        ):
            sys.modules.pop("keras_resnet.papers.figures", None)
            outcome = programs.run("benchmarks", "--output=nowhere")
        self.assertEqual(outcome.code, 1)
        self.assertLen(outcome.err, 1)
        self.assertIn("pip install matplotlib", outcome.err[0])
        measured.assert_not_called()

    def test_contender_that_fails_is_one_line(self):
        error = measure.ContenderError("torch failed: no memory")
        with mock.patch.object(measure, "measure", side_effect=error):
            outcome = programs.run("benchmarks", "--groups=depth")
        self.assertEqual(outcome.code, 1)
        self.assertEqual(outcome.err, ["benchmarks: torch failed: no memory"])

    @parameterized.parameters(
        ("--groups=fast", "--groups=fast: must be one of training,"),
        ("--groups=input", "--groups=input: needs --data_dir=DIR"),
    )
    def test_usage_error_is_one_line(self, flag, message):
        outcome = programs.run("benchmarks", flag)
        self.assertEqual(outcome.code, 2)
        self.assertLen(outcome.err, 1)
        self.assertIn(message, outcome.err[0])


if __name__ == "__main__":
    absltest.main()
