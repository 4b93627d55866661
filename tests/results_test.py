"""Reports of work directories, and the page of results in docs/."""

import dataclasses
import html.parser
import json
import os
import pathlib
import re
import tempfile
from unittest import mock

import keras
import numpy as np
import pytest
from absl.testing import absltest
from absl.testing import parameterized

import keras_resnet
from keras_resnet.analysis import propagation
from keras_resnet.layers import shortcuts
from keras_resnet.papers import experiments
from keras_resnet.papers import figures
from keras_resnet.papers import pictures
from keras_resnet.papers import runs
from keras_resnet.papers import tables
from keras_resnet.training import configs
from keras_resnet.training import recipes
from tests import paper_runs
from tests import programs

ROOT = pathlib.Path(__file__).parent.parent


class ExperimentOfRunTest(parameterized.TestCase):
    @parameterized.parameters(*experiments.EXPERIMENTS)
    def test_every_row_is_known_again(self, name):
        row = experiments.EXPERIMENTS[name]
        recipe = recipes.get_recipe(row.recipe).with_steps(1_600)
        config = configs.Config(
            row.model, row.dataset, recipe, row.arguments, experiment=name
        )
        self.assertTrue(row.is_trained_by(config))
        directory = self.enter_context(tempfile.TemporaryDirectory())
        run = runs.load(paper_runs.save(runs.Run(name, config, ()), directory))
        self.assertEqual(run.experiment, row)

    @parameterized.parameters(
        {"recipe": dataclasses.replace(paper_runs.RECIPE, learning_rate=0.05)},
        {"recipe": dataclasses.replace(paper_runs.RECIPE, batch_size=64)},
        {
            "recipe": dataclasses.replace(
                paper_runs.RECIPE, decay_at_steps=(500,)
            )
        },
        {"dataset": "cifar100"},
        {"model_arguments": {"survival_probability": 0.5}},
        {"model_arguments": {"shortcut": "exclusive_gating(gate_bias=-5.5)"}},
    )
    def test_other_trainings_are_no_row(self, **fields):
        fields = {"recipe": paper_runs.RECIPE, "dataset": "cifar10", **fields}
        config = configs.Config("resnet20", **fields)
        for row in experiments.EXPERIMENTS.values():
            self.assertFalse(row.is_trained_by(config), row.name)
        self.assertIsNone(runs.Run("a", config, ()).experiment)

    def test_every_kept_run_trains_the_row_that_it_names(self):
        found, damaged = runs.find([ROOT / "docs/results/runs"])
        self.assertEmpty(damaged)
        for run in found:
            self.assertTrue(run.experiment.is_trained_by(run.config), run.name)
            text = (
                ROOT / "docs/results/runs" / run.name / "config.json"
            ).read_text()
            self.assertEqual(run.config.to_json(), json.loads(text))


class CurvesTest(parameterized.TestCase):
    def test_more_experiments_than_curves_can_show_are_dots(self):
        rows = experiments.EXPERIMENTS.values()
        many = [
            paper_runs.a_run(row.name, 9.0 + i, shortcut=row.shortcut)
            for i, row in enumerate(
                row
                for row in rows
                if "[2, Table 1] at 20 layers" in row.printed
                and row.model == "resnet20"
            )
        ]
        for some, lines in ((many, len(many)), (many[:3], 0)):
            unfinished = paper_runs.a_run(
                "unfinished", 1.0, model="plainnet20", step=900
            )
            (picture,) = [
                picture
                for picture in pictures.curves([*some, unfinished])
                if picture.section == "[2, Table 1] at 20 layers"
            ]
            (axes,) = picture.figure.axes
            dots = [points.get_offsets() for points in axes.collections]
            self.assertLen(dots, 2 if lines else 0)
            if not lines:
                continue
            names = [text.get_text() for text in axes.get_yticklabels()]
            self.assertEqual(names, [run.label for run in some])
            expected = [(run.test_error, y) for y, run in enumerate(some)]
            np.testing.assert_allclose(dots[1], expected)


class InterruptedTest(parameterized.TestCase):
    """Tests that a run that was stopped is not a result."""

    def setUp(self):
        super().setUp()
        self.root = self.enter_context(tempfile.TemporaryDirectory())

    def results(self, text):
        """Returns the results of a finished run with another metrics.csv."""
        workdir = paper_runs.save(paper_runs.a_run("run", 12.34), self.root)
        whole = (workdir / "metrics.csv").read_text()
        (workdir / "metrics.csv").write_text(text(whole))
        run = runs.load(workdir)
        return run, tables.results([run], "resnet20")

    def test_a_whole_file_is_a_result(self):
        run, (result,) = self.results(lambda text: text)
        self.assertTrue(run.is_finished)
        self.assertEqual(result.errors, (12.34,))

    @parameterized.named_parameters(
        ("nothing", lambda text: ""),
        ("header", lambda text: text.splitlines(True)[0]),
        (
            "rows that end early",
            lambda text: text[: text.index("1000,")],
        ),
        ("a last row cut after the error", lambda text: text.rstrip()),
        ("a last row cut in the error", lambda text: text[: text.rindex("34")]),
        ("a last row without a test", lambda text: text.replace("12.34", "")),
    )
    def test_a_file_that_ends_early_is_none(self, text):
        run, found = self.results(text)
        self.assertFalse(run.is_finished)
        self.assertEmpty(found)
        (row,) = tables.run_table([run]).rows
        self.assertIn("of 1,000", row[3])

    def test_longer_than_its_recipe_is_none(self):
        self.assertEmpty(
            tables.results([paper_runs.a_run("r", 9.0, step=1_100)], "resnet20")
        )


class _Page(html.parser.HTMLParser):
    """Checks that elements are closed in order, and records their links."""

    VOID = ("meta", "path", "use", "rect", "wbr")

    def __init__(self, text):
        super().__init__()
        self.open, self.references, self.ids = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        if tag not in self.VOID:
            self.open.append(tag)
        for name, value in attributes:
            if name in ("src", "href", "xlink:href", "action"):
                self.references.append(value)
            if name == "id":
                self.ids.append(value)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag, tag


def signals():
    """The signals of one network, for every shortcut of the page."""
    keras.utils.set_random_seed(0)
    spec = keras_resnet.Spec("small", (2, 2), (4, 8), stem="cifar")
    model = keras_resnet.resnet(
        spec, input_shape=(8, 8, 1), unit="pre_activation", shortcut="A"
    )
    images = np.random.default_rng(0).random((2, 8, 8, 1))
    report = propagation.propagation(model, images, [0, 1])
    return dict.fromkeys(shortcuts.TABLE_1, report)


class PageTest(parameterized.TestCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        directory = tempfile.TemporaryDirectory()
        cls.addClassCleanup(directory.cleanup)
        cls.root = pathlib.Path(directory.name)
        patch = mock.patch.object(pictures, "_propagations", signals)
        patch.start()
        cls.addClassCleanup(patch.stop)
        for run in (
            paper_runs.a_run("resnet20_0", 9.0),
            paper_runs.a_run("resnet20_1", 9.5, seed=1),
            paper_runs.a_run("plain", 11.0, model="plainnet20"),
            paper_runs.a_run("ours <own>", 5.0, model="resnet18"),
        ):
            paper_runs.save(run, cls.root / "runs")
        cls.outcome = cls.report("runs")

    @classmethod
    def report(cls, *names, output="report", flags=()):
        workdirs = ",".join(f"{cls.root}/{name}" for name in names)
        return programs.run(
            "report",
            f"--workdirs={workdirs}",
            f"--output={cls.root}/{output}",
            *flags,
        )

    def test_report_is_written_to_a_local_path(self):
        outcome = self.report("runs", flags=["--output=gs://bucket/x"])
        self.assertEqual(outcome.code, 2)
        (line,) = outcome.err
        self.assertRegex(line, "--output=gs://bucket/x: .*a local path")

    def test_html_is_whole_and_needs_nothing_else(self):
        self.assertEqual(self.outcome.code, 0, self.outcome.err)
        self.assertEqual(self.outcome.out[0], "4 runs, 4 of them finished")
        text = (self.root / "report/results.html").read_text()
        page = _Page(text)
        self.assertEqual(page.open, [])
        for address in page.references:
            self.assertRegex(address, "^(#|data:)")
        self.assertNotRegex(text, r"url\((?!#)|@import|<script|<link")
        self.assertIn("ours &lt;own&gt;", text)
        self.assertIn("<svg", text)
        # Pictures have the colours of the page, light or dark.
        self.assertIn("var(--ink)", text)
        self.assertNotIn(f"fill: {figures.INK}", text)

    def test_markdown_shows_the_pictures_that_were_written(self):
        text = (self.root / "report/results.md").read_text()
        shown = re.findall(r"\]\((.*\.png)\)", text)
        self.assertNotEmpty(shown)
        written = {path.name for path in (self.root / "report").iterdir()}
        self.assertEqual(written, {*shown, "results.md", "results.html"})
        for name in shown:
            content = (self.root / "report" / name).read_bytes()
            self.assertEqual(content[:8], b"\x89PNG\r\n\x1a\n")
        self.assertIn("| resnet20 | 8.75 | 9.25 ± 0.35 | 2 | 1,000 |", text)

    def test_the_same_runs_give_the_same_bytes(self):
        self.report("runs", output="again")
        for path in (self.root / "report").iterdir():
            again = self.root / "again" / path.name
            self.assertEqual(path.read_bytes(), again.read_bytes(), path.name)

    def test_every_shortcut_of_the_paper_is_in_the_picture(self):
        page = (self.root / "report/results.html").read_text()
        for name in shortcuts.TABLE_1:
            self.assertIn(f">{name}<", page)

    def test_a_page_of_own_runs_has_these_and_nothing_else(self):
        for name, error in (
            ("mine", 7.0),
            ("my <b> $x$ | run", 9.0),
            ("_my", 8.0),
        ):
            paper_runs.save(
                paper_runs.a_run(name, error, dataset="digits"),
                self.root / "own",
            )
        outcome = self.report("own", output="own_report")
        self.assertEqual(outcome.code, 0, outcome.err)
        text = (self.root / "own_report/results.md").read_text()
        self.assertEqual(re.findall("^## .*", text, re.MULTILINE), ["## Runs"])
        self.assertNotIn("[1", text)
        self.assertLen(re.findall(r"^\| _?m[yi]", text, re.MULTILINE), 3)
        self.assertIn("(runs1_errors.png)", text)
        self.assertNotIn("<b>", text)

    def test_a_page_starts_with_the_runs(self):
        text = (self.root / "report/results.md").read_text()
        headings = re.findall("^## (.*)", text, re.MULTILINE)
        self.assertEqual(headings[:2], ["Runs", "Beside the papers"])
        # The shipped weights do not come from these runs.
        self.assertNotIn("confusion", text)
        self.assertNotIn("not run", text)

    def test_confusions_are_of_weights_whose_run_is_given(self):
        run = runs.load(ROOT / "docs/results/runs/resnet20_64000_bfloat16_0")
        self.assertLen(pictures.confusions([run]), 1)
        other = dataclasses.replace(
            run, config=dataclasses.replace(run.config, seed=1)
        )
        self.assertEmpty(pictures.confusions([other]))

    @pytest.mark.slow
    def test_a_damaged_run_is_named_and_the_others_are_reported(self):
        directory = self.root / "some_damaged"
        workdir = paper_runs.save(
            paper_runs.a_run("a_good_one", 9.0), directory
        )
        config = json.loads((workdir / "config.json").read_text())
        metrics = (workdir / "metrics.csv").read_text()
        damaged = {
            "metrics.csv": (
                metrics.partition("\n")[2],  # without its first line
                metrics.replace("9.0", "nine"),
                metrics.replace("9.0", "nan"),
                metrics.replace("9.0", "-9"),
                metrics.replace("1000,", "inf,"),
                metrics.replace("1000,", ","),
                metrics + "1,2,3,4,5,6,7,8,9\n",
                metrics + '"\n',
                metrics + "\0\n",
                "\udcff",
            ),
            "config.json": (
                "",
                "{",
                "[]",
                "[" * 100_000,
                json.dumps({**config, "model": "nonsense"}),
                json.dumps({**config, "model": 7}),
                json.dumps({**config, "recipe": "x"}),
                json.dumps({**config, "model_arguments": [1]}),
                json.dumps({**config, "backend": 5}),
                json.dumps({**config, "experiment": "resnet21"}),
                json.dumps({**config, "experiment": 5}),
                json.dumps(
                    {**config, "recipe": {**config["recipe"], "steps": "x"}}
                ),
            ),
        }
        names = []
        for file, contents in damaged.items():
            for number, content in enumerate(contents):
                bad = paper_runs.save(
                    paper_runs.a_run(f"{file}_{number}", 9.0), directory
                )
                (bad / file).write_bytes(
                    content.encode("utf-8", "surrogateescape")
                )
                names.append((bad, file))
        pipe = paper_runs.save(paper_runs.a_run("pipe", 9.0), directory)
        (pipe / "metrics.csv").unlink()
        os.mkfifo(pipe / "metrics.csv")
        names.append((pipe, "metrics.csv"))
        outcome = self.report("some_damaged", output="damaged_report")
        self.assertEqual(outcome.code, 0, outcome.err)
        lines = [line for line in outcome.out if "left out" in line]
        self.assertLen(lines, len(names))
        for bad, file in names:
            (line,) = (line for line in lines if f"{bad} " in line)
            self.assertIn(f"{file}: ", line)
        self.assertIn("1 runs, 1 of them finished", outcome.out)
        text = (self.root / "damaged_report/results.md").read_text()
        self.assertLen(
            re.findall("^Left out: ", text, re.MULTILINE), len(names)
        )

    def test_a_mark_of_byte_order_is_no_damage(self):
        workdir = paper_runs.save(
            paper_runs.a_run("marked", 9.0), self.root / "marked"
        )
        for name in ("config.json", "metrics.csv"):
            path = workdir / name
            path.write_text(path.read_text(), "utf-8-sig")
        self.assertEqual(runs.load(workdir).test_error, 9.0)

    def test_a_work_directory_and_a_directory_of_them_will_do(self):
        outcome = self.report("runs/plain", "runs", output="both")
        self.assertEqual(outcome.out[0], "5 runs, 5 of them finished")

    @parameterized.parameters(
        ("nowhere", "must be a work directory or contain one"),
        ("broken", "must hold config.json and metrics.csv"),
    )
    def test_what_is_no_run_is_refused(self, name, message):
        (self.root / "broken").mkdir(exist_ok=True)
        (self.root / "broken/config.json").write_text("{")
        outcome = self.report(name, output="refused")
        self.assertEqual(outcome.code, 2)
        self.assertLen(outcome.err, 1)
        self.assertIn(message, outcome.err[0])
        self.assertFalse((self.root / "refused").exists())

    @parameterized.parameters("--workdirs=a", "--output=b")
    def test_both_flags_are_asked_for(self, given):
        outcome = programs.run("report", given)
        self.assertEqual(outcome.code, 2)
        self.assertIn("must name a directory", outcome.err[0])


class SignalsTest(absltest.TestCase):
    @pytest.mark.slow
    def test_each_shortcut_of_the_paper_is_measured(self):
        found = pictures._propagations()
        counts = {name: len(found[name]["units"]) for name in found}
        self.assertEqual(counts, dict.fromkeys(shortcuts.TABLE_1, 15))


class KeptResultsTest(absltest.TestCase):
    """Tests of docs/results/results.md and the runs beside it."""

    @pytest.mark.slow
    def test_the_page_is_what_the_kept_runs_give(self):
        flags = [f"--workdirs={ROOT}/docs/results/runs"]
        with (
            tempfile.TemporaryDirectory() as output,
            mock.patch.object(figures, "png", lambda figure: b""),
            mock.patch.object(figures, "svg", lambda figure: ""),
            mock.patch.object(pictures, "_propagations", dict),
        ):
            outcome = programs.run("report", f"--output={output}", *flags)
            self.assertEqual(outcome.code, 0, outcome.err)
            made = (pathlib.Path(output) / "results.md").read_text()
        self.assertEqual(made, (ROOT / "docs/results/results.md").read_text())

    def test_no_kept_run_says_where_its_data_was(self):
        for path in sorted((ROOT / "docs/results/runs").glob("*/config.json")):
            self.assertIsNone(json.loads(path.read_text())["data_dir"])


if __name__ == "__main__":
    absltest.main()
