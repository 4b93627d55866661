"""The README and docs/ agree with the code: examples, commands, tables.

An example in Python runs. An example that needs a network is marked
`python no-run`, and only its names and arguments are checked. The programs
parse the command lines of `sh` examples and of `code`, but do not run them.
"""

import ast
import configparser
import contextlib
import dataclasses
import importlib.util
import inspect
import os
import pathlib
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from unittest import mock

import pytest
import tensorflow as tf
from absl.testing import absltest
from absl.testing import parameterized

import keras_resnet
from apps import command_line
from keras_resnet import arguments
from keras_resnet import models
from keras_resnet.data import datasets
from keras_resnet.data import limits
from keras_resnet.layers.shortcuts import SHORTCUTS
from keras_resnet.layers.units import UNITS
from keras_resnet.training import configs
from keras_resnet.training import loop
from keras_resnet.training import memory
from keras_resnet.training import metrics
from keras_resnet.training import recipes
from keras_resnet.training import start_weights
from keras_resnet.training import strategies
from keras_resnet.training import tuning
from keras_resnet.training.recipe import Recipe
from keras_resnet.weights import published
from tests import programs
from tests import reference

ROOT = pathlib.Path(__file__).parent.parent
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text()
    for folder in (ROOT, ROOT / "docs", ROOT / "savedmodels")
    for path in sorted(folder.glob("*.md"))
}
README = PAGES["README.md"]

# Commands of other packages that may start a command line.
OTHER_COMMANDS = (
    *("curl", "docker", "git", "pip", "printf", "python3"),
    *("saved_model_cli", "tensorboard"),
)

# Runtimes that only some examples need. Without its runtime, an example is left
# out.
OPTIONAL = ("ai_edge_litert", "onnxruntime", "openvino")

SYNTHETIC = datasets.load("synthetic")


def examples(page: str, language: str) -> list[str]:
    """Returns the fenced examples of a page in a language ("python no-run")."""
    pattern = rf"(?ms)^```{re.escape(language)}\n(.*?)^```$"
    return re.findall(pattern, PAGES[page])


def is_runnable(example: str) -> bool:
    """Returns whether the optional packages of an example are installed."""
    imported = set(re.findall(r"(?m)^(?:from|import) (\w+)", example))
    return all(map(importlib.util.find_spec, imported.intersection(OPTIONAL)))


def command_lines() -> Iterator[str]:
    """Yields every command line of every page."""
    for page, text in PAGES.items():
        for example in examples(page, "sh"):
            yield from example.replace("\\\n", " ").splitlines()
        yield from re.findall(r"`((?:python -m apps\.|make )[^`]*)`", text)


def table(page: str, title: str) -> list[list[str]]:
    """Returns the rows of the table whose first column has this title."""
    pattern = rf"(?m)^\| {title} \|.*\n\|[-| ]+\|\n((?:\|.*\n)+)"
    (rows,) = re.findall(pattern, PAGES[page])
    return [
        [cell.strip() for cell in row.strip("|").split("|")]
        for row in rows.splitlines()
    ]


def plain(text: str) -> str:
    """Returns the text on one line."""
    return " ".join(text.split())


class ExamplesTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        directory = self.enter_context(tempfile.TemporaryDirectory())
        # contextlib.chdir needs Python 3.11.
        self.addCleanup(os.chdir, os.getcwd())
        os.chdir(directory)

    @parameterized.parameters(
        *((page,) for page in PAGES if examples(page, "python"))
    )
    @pytest.mark.slow
    def test_examples_of_a_page_run_one_after_the_other(self, page):
        names: dict = {}
        for example in filter(is_runnable, examples(page, "python")):
            exec(compile(example, page, "exec"), names)

    @parameterized.parameters(
        *((e,) for page in PAGES for e in examples(page, "python no-run"))
    )
    def test_an_example_that_is_not_run_has_names_and_arguments_that_exist(
        self, example
    ):
        calls = [
            node
            for node in ast.walk(ast.parse(example))
            if isinstance(node, ast.Call)
            and ast.unparse(node.func).startswith("keras_resnet.")
        ]
        self.assertNotEmpty(calls)
        for call in calls:
            function = eval(ast.unparse(call.func))
            keywords = [keyword.arg for keyword in call.keywords]
            inspect.signature(function).bind(
                *call.args, **dict.fromkeys(keywords)
            )

    def test_the_output_that_the_readme_shows_is_what_the_command_prints(self):
        ((command, output),) = re.findall(
            r"(?ms)^```sh\n([^`]*)\n```\n\n```text\n(.*?)^```$", README
        )
        _, _, program, *arguments = shlex.split(command)
        os.chdir(ROOT)
        outcome = programs.run(program.removeprefix("apps."), *arguments)
        self.assertEqual(outcome.out, output.splitlines())

    @parameterized.parameters(*PAGES)
    def test_no_example_is_of_a_kind_that_is_not_looked_at(self, page):
        kinds = re.findall(r"(?m)^```(.+)$", PAGES[page])
        self.assertContainsSubset(
            kinds, ["python", "python no-run", "sh", "text"]
        )


class CommandsTest(parameterized.TestCase):
    @parameterized.parameters(*sorted(set(command_lines())))
    def test_a_command_line_is_understood(self, line):
        words = shlex.split(line, comments=True)
        while re.match(r"[A-Z_]+=", words[0]):  # an environment variable
            words = words[1:]
        command, *arguments = words
        if command == "make":
            makefile = (ROOT / "Makefile").read_text()
            targets = [word for word in arguments if "=" not in word]
            self.assertNotEmpty(targets)
            for target in targets:
                self.assertRegex(makefile, rf"(?m)^{target}:")
        elif command == "python":
            self.assertEqual(arguments[0], "-m")
            self.parse(arguments[1].removeprefix("apps."), arguments[2:])
        elif command.startswith("keras-resnet-"):
            self.parse(command.removeprefix("keras-resnet-"), arguments)
        else:
            self.assertIn(command, OTHER_COMMANDS)

    def parse(self, name, arguments):
        if "--help" in arguments:
            return
        with contextlib.ExitStack() as stack:
            if name == "train":  # up to its training
                trainer = mock.patch.object(
                    loop, "train_and_evaluate", return_value=programs.TRAINED
                )
                loader = mock.patch.object(
                    datasets, "load", return_value=SYNTHETIC
                )
                size = mock.patch.object(datasets.DataSet, "train_size", 2**20)
                stack.enter_context(size)
                one = tf.distribute.get_strategy()
                devices = mock.patch.object(
                    strategies, "get_strategy", return_value=one
                )
                stack.enter_context(trainer)
                start = start_weights.StartWeights({}, "0", None, None, "")
                for module, function, value in (
                    (start_weights, "read", start),
                    (memory, "planned_batch", 256),
                    (configs, "build_model", None),
                    (configs, "served", SYNTHETIC),
                ):
                    stack.enter_context(
                        mock.patch.object(module, function, return_value=value)
                    )
                stack.enter_context(loader)
                stack.enter_context(devices)
            else:
                runner = mock.patch.object(
                    command_line, "_outcome", return_value=0
                )
                stack.enter_context(runner)
            outcome = programs.run(name, *arguments)
        self.assertEqual(outcome.code, 0, outcome.err)

    def test_a_flag_that_does_not_exist_is_noticed(self):
        for line in ("train --modle=resnet20", "evaluate --protocol=two"):
            name, *arguments = line.split()
            with self.assertRaises(AssertionError):
                self.parse(name, arguments)

    def test_the_command_of_the_pods_is_understood(self):
        manifest = (ROOT / "deploy/kubernetes.yaml").read_text()
        (line,) = re.findall(
            r"exec python -m apps.train ((?:.*\\\n)*.*)", manifest
        )
        arguments = shlex.split(line.replace("\\\n", " "))
        self.assertIn("--strategy=multi_worker", arguments)
        self.parse("train", arguments)

    @parameterized.parameters("make train", "make test")
    def test_the_readme_says_the_two_commands(self, command):
        self.assertIn(command, README)


class TablesTest(parameterized.TestCase):
    def test_residual_networks_have_the_counts_of_the_papers(self):
        expected = []
        for depth in (*reference.IMAGENET_UNITS, *reference.CIFAR_DEPTHS):
            net = reference.layout(f"resnet{depth}")
            counts = reference.counts(net)
            v2 = reference.counts(reference.layout(f"resnet{depth}v2"))
            self.assertEqual(v2.multiply_adds, counts.multiply_adds)
            kernels = "1x1, 3x3, 1x1" if net.bottleneck else "3x3, 3x3"
            expected.append(
                [
                    f"`ResNet{depth}`, `ResNet{depth}V2`",
                    ", ".join(map(str, net.units)),
                    kernels,
                    net.shortcut,
                    f"{counts.parameters:,}",
                    f"{v2.parameters:,}",
                    f"{counts.multiply_adds:,}",
                ]
            )
        self.assertEqual(table("docs/networks.md", "network"), expected)

    def test_plain_networks_have_the_counts_of_the_papers(self):
        expected = []
        for depth in reference.PLAIN_DEPTHS:
            counts = reference.counts(reference.layout(f"plainnet{depth}"))
            expected.append(
                [
                    f"`PlainNet{depth}`",
                    f"{counts.parameters:,}",
                    f"{counts.multiply_adds:,}",
                ]
            )
        self.assertEqual(table("docs/networks.md", "plain network"), expected)

    def test_wide_networks_have_the_counts_of_their_layout(self):
        expected = []
        for depth in reference.WIDE_DEPTHS:
            net = reference.layout(f"wideresnet{depth}_2")
            counts = reference.counts(net)
            expected.append(
                [
                    f"`WideResNet{depth}_2`",
                    ", ".join(map(str, net.units)),
                    f"{counts.parameters:,}",
                    f"{counts.multiply_adds:,}",
                ]
            )
        self.assertEqual(table("docs/networks.md", "wide network"), expected)

    def test_published_weights_are_those_of_the_registry(self):
        titles, *expected = published.table()
        rows = table("docs/pretrained.md", titles[0])
        self.assertEqual(rows, [[c.strip() for c in r] for r in expected])

    def test_the_index_lists_every_page_and_program(self):
        index = PAGES["docs/index.md"]
        linked = set(re.findall(r"\]\((\w+\.md)\)", index))
        pages = [p for p in PAGES if p.startswith("docs/")]
        self.assertCountEqual(
            [f"docs/{page}" for page in linked] + ["docs/index.md"], pages
        )
        config = configparser.ConfigParser()
        config.read(ROOT / "setup.cfg")
        scripts = config["options.entry_points"]["console_scripts"]
        self.assertCountEqual(
            [row[1].strip("`") for row in table("docs/index.md", "program")],
            [line.split()[0] for line in scripts.strip().splitlines()],
        )

    def test_the_reference_of_the_flags_is_that_of_the_programs(self):
        outcome = subprocess.run(
            [sys.executable, ROOT / "docs" / "flags.py"],
            capture_output=True,
            text=True,
        )
        self.assertEqual(outcome.returncode, 0, outcome.stderr)
        message = "docs/flags.md is old: make docs"
        self.assertEqual(PAGES["docs/flags.md"], outcome.stdout, message)

    def test_every_network_is_in_a_table(self):
        cells = [row[0] for row in table("docs/networks.md", "network")]
        for kind in ("plain network", "wide network"):
            cells += [row[0] for row in table("docs/networks.md", kind)]
        names = re.findall(r"`(\w+)`", " ".join(cells))
        self.assertCountEqual(map(str.lower, names), keras_resnet.MODELS)

    def test_every_argument_is_described_with_its_default(self):
        expected = [
            argument_row(argument) for argument in models.ARGUMENTS.values()
        ]
        self.assertEqual(table("docs/networks.md", "argument"), expected)

    @parameterized.parameters(*SHORTCUTS, *UNITS)
    def test_every_shortcut_and_unit_is_named(self, name):
        self.assertIn(f'`"{name}"`', PAGES["docs/networks.md"])

    def test_recipes_are_those_of_the_code(self):
        expected = [recipe_row(recipe) for recipe in recipes.RECIPES.values()]
        for columns, heading in (
            ((0, 2, 3, 4), "recipe"),
            ((0, 1, 5), "name of the recipe"),
        ):
            self.assertEqual(
                table("docs/training.md", heading),
                [[row[i] for i in columns] for row in expected],
            )

    def test_columns_of_the_metrics_are_those_of_the_code(self):
        rows = table("docs/training.md", "column")
        self.assertEqual(
            [row[0].strip("`") for row in rows], list(metrics.COLUMNS)
        )

    def test_the_space_of_a_search_is_that_of_the_code(self):
        space = dataclasses.asdict(tuning.Space())
        expected = [
            [
                f"`{name}`",
                " to ".join(map(str, values))
                if name in ("learning_rate", "weight_decay")
                else ", ".join(map(str, values)),
            ]
            for name, values in space.items()
        ]
        rows = table("docs/tuning.md", "field of the space")
        self.assertEqual([row[:2] for row in rows], expected)

    def test_the_pixel_limit_is_that_of_the_code(self):
        self.assertIn(
            f"more than {limits.MAX_PIXELS:,} pixels", PAGES["docs/serving.md"]
        )


def argument_row(argument: arguments.Argument) -> list[str]:
    """The row of docs/networks.md about an argument of `resnet`."""
    default = str(argument.default)
    if argument.name in ("shortcut", "unit"):
        default = "of the network"
    elif isinstance(argument.default, str):
        default = f'`"{default}"`'
    return [f"`{argument.name}`", default, argument.description]


def recipe_row(recipe: Recipe) -> list[str]:
    """Returns the entries of a recipe in the tables of docs/training.md."""
    rate = f"{recipe.learning_rate:g}"
    if recipe.schedule == "cosine":
        rate += ", a cosine to 0"
    elif recipe.schedule == "one_cycle":
        rate += ", a line to 0"
    else:
        points = " and ".join(f"{step:,}" for step in recipe.decay_at_steps)
        rate += f", divided by 10 at {points}"
    if recipe.warmup_learning_rate:
        rate += f"; {recipe.warmup_learning_rate:g} for the first "
        rate += f"{recipe.warmup_steps:,}"
    elif recipe.warmup_steps:
        rate += f"; linear over the first {recipe.warmup_steps:,}"
    errors = [f"{name} {e:g}" for name, e in recipe.expected_errors.items()]
    return [
        f"`{recipe.name}`",
        recipe.source,
        f"{recipe.steps:,} of {recipe.batch_size:,}",
        rate,
        recipe.augmentation.name,
        ", ".join(errors) or "not measured",
    ]


def departures() -> Iterator[str]:
    """Yields every `# Departure:` of the code, as docs/departures.md has it."""
    for folder in ("keras_resnet", "apps"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for comment in re.findall(
                r"(?m)^ *# Departure: (.*\n(?: *# .*\n)*)", path.read_text()
            ):
                text = re.sub(r"(?m)^ *# ", "", comment)
                link = path.relative_to(ROOT).as_posix()
                yield plain(f"[{path.name}](../{link}): {text}")


class DeparturesTest(absltest.TestCase):
    def test_every_departure_of_the_code_is_listed_and_no_other(self):
        _, *listed = re.split(r"(?m)^- ", PAGES["docs/departures.md"])
        self.assertCountEqual(map(plain, listed), departures())

    def test_every_mark_is_found(self):
        """This includes marks that are not at the start of a comment."""
        marks = sum(
            path.read_text().count("Departure:")
            for folder in ("keras_resnet", "apps")
            for path in (ROOT / folder).rglob("*.py")
        )
        self.assertLen(list(departures()), marks)
        self.assertGreater(marks, 0)


class LinksTest(parameterized.TestCase):
    @parameterized.parameters(*PAGES)
    def test_relative_links_lead_somewhere(self, page):
        for link in re.findall(r"\]\(([^)]*)\)", PAGES[page]):
            if link.startswith("https://"):
                continue
            file, _, heading = link.partition("#")
            path = (ROOT / page).parent / file if file else ROOT / page
            self.assertTrue(path.is_file(), link)
            if heading:
                slugs = [
                    line.lstrip("# ").lower().replace(" ", "-")
                    for line in path.read_text().splitlines()
                    if line.startswith("#")
                ]
                self.assertIn(heading, slugs, link)


if __name__ == "__main__":
    absltest.main()
