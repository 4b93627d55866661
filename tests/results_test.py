"""What apps.report makes of work directories, and the page that is kept."""

import csv
import dataclasses
import html.parser
import json
import pathlib
import re
import statistics
import tempfile

from absl.testing import absltest
from absl.testing import parameterized

from keras_resnet.results import figures
from keras_resnet.results import runs
from keras_resnet.results import tables
from keras_resnet.training import experiments
from keras_resnet.training import loop
from keras_resnet.training import recipes
from tests import programs

ROOT = pathlib.Path(__file__).parent.parent
RECIPE = recipes.RECIPES["cifar10"].with_steps(1_000)


def a_run(name, error, model="resnet20", seed=0, step=1_000, **fields):
    """A run whose test error falls from 90% to `error`."""
    fields = {"recipe": RECIPE, "dataset": "cifar10", **fields}
    rows = [
        {"step": 500.0, "train_top1_error": 80.0, "test_top1_error": 90.0},
        {"step": 600.0, "train_top1_error": 70.0},
        {"step": step, "train_top1_error": 1.0, "test_top1_error": error},
    ]
    config = loop.Config(model, seed=seed, **fields)
    return runs.Run(name, config, tuple(rows))


def save(run, directory):
    """The two files of a run."""
    workdir = pathlib.Path(directory) / run.name
    workdir.mkdir(parents=True)
    (workdir / "config.json").write_text(json.dumps(run.config.to_json()))
    with (workdir / "metrics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, loop.COLUMNS)
        writer.writeheader()
        writer.writerows(run.metrics)
    return workdir


class ExperimentOfConfigTest(parameterized.TestCase):
    @parameterized.parameters(*experiments.EXPERIMENTS)
    def test_every_row_is_known_again(self, name):
        row = experiments.EXPERIMENTS[name]
        recipe = recipes.get_recipe(row.recipe).with_steps(1_600)
        config = loop.Config(
            row.model, row.dataset, recipe, row.arguments, "mixed_bfloat16", 7
        )
        self.assertEqual(experiments.of_config(config), row)

    @parameterized.parameters(
        ("resnet56v2", {"looped": True}, "resnet56v2"),
        ("resnet56", {"unit": "pre_activation"}, "resnet56v2"),
        ("resnet20", {"shortcut": "A", "remat": True}, "resnet20"),
        ("resnet20", {"shortcut": "none"}, "plainnet20"),
        (
            "resnet20",
            {"shortcut": "exclusive_gating"},  # -6 is its own default
            "resnet20_exclusive_gating_6",
        ),
    )
    def test_one_network_has_several_names(self, model, arguments, name):
        config = loop.Config(model, "cifar10", RECIPE, arguments)
        self.assertEqual(experiments.of_config(config).name, name)

    @parameterized.parameters(
        {"recipe": dataclasses.replace(RECIPE, learning_rate=0.05)},
        {"recipe": dataclasses.replace(RECIPE, batch_size=64)},
        {"recipe": dataclasses.replace(RECIPE, decay_at_steps=(500,))},
        {"dataset": "cifar100"},
        {"model_arguments": {"survival_probability": 0.5}},
        {"model_arguments": {"shortcut": "exclusive_gating(gate_bias=-5.5)"}},
    )
    def test_other_trainings_are_no_row(self, **fields):
        fields = {"recipe": RECIPE, "dataset": "cifar10", **fields}
        config = loop.Config("resnet20", **fields)
        self.assertIsNone(experiments.of_config(config))


class TablesTest(parameterized.TestCase):
    def test_seeds_are_averaged_and_counted_once(self):
        errors = (9.0, 9.5, 8.2)
        several = [
            a_run(f"run{seed}", error, seed=seed)
            for seed, error in enumerate(errors)
        ]
        several.append(a_run("the first seed once more", 50.0, seed=0))
        (result,) = tables.results(several, "resnet20")
        self.assertEqual(result.errors, errors)
        mean, deviation = statistics.mean(errors), statistics.stdev(errors)
        self.assertEqual(str(result), f"{mean:.2f} ± {deviation:.2f}")

    def test_what_is_unlike_is_not_mixed(self):
        several = [
            a_run("a", 9.0),
            a_run("b", 8.0, dtype="mixed_bfloat16"),
            a_run("c", 7.0, recipe=RECIPE.with_steps(2_000), step=2_000),
            a_run("other network", 1.0, model="resnet32"),
            a_run("unfinished", 2.0, step=900, seed=1),
            a_run(
                "other rate",
                3.0,
                recipe=dataclasses.replace(RECIPE, learning_rate=0.2),
            ),
        ]
        self.assertEqual(
            [
                (result.steps, result.dtype, str(result))
                for result in tables.results(several, "resnet20")
            ],
            [
                (2_000, "float32", "7.00"),
                (1_000, "mixed_bfloat16", "8.00"),
                (1_000, "float32", "9.00"),
            ],
        )

    def test_the_last_error_counts_and_not_the_best(self):
        run = a_run("run", 95.0)
        (result,) = tables.results([run], "resnet20")
        self.assertEqual(result.errors, (95.0,))

    def test_a_table_has_the_papers_numbers_beside_ours(self):
        several = [
            a_run("a", 9.1),
            a_run("b", 9.2, model="resnet32"),
            a_run("c", 9.0, model="resnet56"),
        ]
        table = tables.paper_tables(several)[
            list(experiments.TABLES).index("[1, Table 6]")
        ]
        self.assertEqual(
            [row[:4] for row in table.rows if "resnet" in row[0]],
            [
                ("resnet20", "8.75", "9.10", "1"),
                ("resnet32", "7.51", "9.20", "1"),
                ("resnet44", "7.17", "not run", "0"),
                ("resnet56", "6.97", "9.00", "1"),
                ("resnet110", "6.43", "not run", "0"),
                ("resnet1202", "7.93", "not run", "0"),
            ],
        )
        self.assertIn("2 of 3 pairs of rows stand in the order", table.notes[0])

    def test_failing_is_worse_than_every_error(self):
        printed = {"a": experiments.FAIL, "b": 12.0, "c": experiments.FAIL}
        ours = {"a": 10.0, "b": 11.0, "c": 30.0}
        self.assertEqual(tables.in_order(printed, ours), (1, 2))

    def test_every_run_is_listed_whatever_came_out(self):
        several = [
            a_run("good", 9.0),
            a_run("bad", 99.0, seed=1),
            a_run("unfinished", 50.0, step=700),
            a_run("own", 5.0, model="resnet18"),
        ]
        cells = [" ".join(row) for row in tables.run_table(several).rows]
        self.assertLen(cells, 4)
        self.assertIn("700 of 1,000", cells[2])
        self.assertIn("(resnet18)", cells[3])


class _Page(html.parser.HTMLParser):
    """Checks that elements are closed in order; keeps what they refer to."""

    VOID = ("meta", "path", "use", "rect")

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


class PageTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        directory = self.enter_context(tempfile.TemporaryDirectory())
        self.root = pathlib.Path(directory)
        for run in (
            a_run("resnet20_0", 9.0),
            a_run("resnet20_1", 9.5, seed=1),
            a_run("plain", 11.0, model="plainnet20"),
            a_run("ours <own>", 5.0, model="resnet18"),
        ):
            save(run, self.root / "runs")

    def report(self, *names, output="report"):
        workdirs = ",".join(f"{self.root}/{name}" for name in names)
        return programs.run(
            "report", f"--workdirs={workdirs}", f"--output={self.root}/{output}"
        )

    def test_html_is_whole_and_needs_nothing_else(self):
        outcome = self.report("runs")
        self.assertEqual(outcome.code, 0, outcome.err)
        self.assertEqual(outcome.out[0], "4 runs, 4 of them finished")
        text = (self.root / "report/results.html").read_text()
        page = _Page(text)
        self.assertEqual(page.open, [])
        for reference in page.references:
            self.assertRegex(reference, "^(#|data:)")
        self.assertNotRegex(text, r"url\((?!#)|@import|<script|<link")
        self.assertIn("ours &lt;own&gt;", text)
        self.assertIn("<svg", text)
        # Pictures take the colours of the page, light or dark.
        self.assertIn("var(--ink)", text)
        self.assertNotIn(f"fill: {figures.INK}", text)

    def test_markdown_shows_the_pictures_that_were_written(self):
        self.report("runs")
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
        self.report("runs", output="first")
        self.report("runs", output="second")
        for path in (self.root / "first").iterdir():
            again = self.root / "second" / path.name
            self.assertEqual(path.read_bytes(), again.read_bytes(), path.name)

    def test_a_work_directory_and_a_directory_of_them_will_do(self):
        outcome = self.report("runs/plain", "runs")
        self.assertEqual(outcome.out[0], "5 runs, 5 of them finished")

    @parameterized.parameters(
        ("nowhere", "is no work directory and holds none"),
        ("broken", "must hold config.json and metrics.csv"),
    )
    def test_what_is_no_run_is_refused(self, name, message):
        (self.root / "broken").mkdir()
        (self.root / "broken/config.json").write_text("{")
        outcome = self.report(name)
        self.assertEqual(outcome.code, 2)
        self.assertLen(outcome.err, 1)
        self.assertIn(message, outcome.err[0])
        self.assertFalse((self.root / "report").exists())

    @parameterized.parameters("--workdirs=a", "--output=b")
    def test_both_flags_are_asked_for(self, given):
        outcome = programs.run("report", given)
        self.assertEqual(outcome.code, 2)
        self.assertIn("name a directory", outcome.err[0])


class KeptResultsTest(absltest.TestCase):
    """docs/results.md and the runs in results/ that it was made from."""

    def test_the_page_is_what_the_kept_runs_give(self):
        with tempfile.TemporaryDirectory() as output:
            outcome = programs.run(
                "report", f"--workdirs={ROOT}/results", f"--output={output}"
            )
            self.assertEqual(outcome.code, 0, outcome.err)
            made = (pathlib.Path(output) / "results.md").read_text()
        self.assertEqual(made, (ROOT / "docs/results.md").read_text())

    def test_no_kept_run_says_where_its_data_was(self):
        for path in sorted((ROOT / "results").glob("*/config.json")):
            self.assertIsNone(json.loads(path.read_text())["data_dir"])


if __name__ == "__main__":
    absltest.main()
