"""Experiments: the papers' tables, and that every row of them can be run."""

import json
import tempfile
from unittest import mock

from absl.testing import absltest
from absl.testing import parameterized

from keras_resnet import networks
from keras_resnet.data import datasets
from keras_resnet.layers import identifiers
from keras_resnet.layers import shortcuts
from keras_resnet.papers import experiments
from keras_resnet.training import configs
from keras_resnet.training import loop
from keras_resnet.training import recipes
from tests import programs

FAIL = experiments.FAIL

# Test errors in percent as the papers print them.
PRINTED = {
    "[1, Table 6]": {
        "maxout": 9.38,
        "nin": 8.81,
        "dsn": 8.22,
        "fitnet19": 8.39,
        "highway19": 7.54,
        "highway32": 8.80,
        "resnet20": 8.75,
        "resnet32": 7.51,
        "resnet44": 7.17,
        "resnet56": 6.97,
        "resnet110": 6.43,
        "resnet1202": 7.93,
    },
    "[2, Table 1]": {
        "resnet110": 6.61,
        "plainnet110": FAIL,
        "resnet110_scaling_half_and_one": FAIL,
        "resnet110_scaling_half_and_half": 12.35,
        "resnet110_exclusive_gating_0": FAIL,
        "resnet110_exclusive_gating_5": FAIL,
        "resnet110_exclusive_gating_6": 8.70,
        "resnet110_exclusive_gating_7": 9.81,
        "resnet110_shortcut_only_gating_0": 12.86,
        "resnet110_shortcut_only_gating_6": 6.91,
        "resnet110_convolution": 12.22,
        "resnet110_dropout": FAIL,
    },
    "[2, Table 2]": {
        "resnet110": 6.61,
        "resnet164": 5.93,
        "resnet110_batch_norm_after_addition": 8.17,
        "resnet164_batch_norm_after_addition": 6.50,
        "resnet110_relu_before_addition": 7.84,
        "resnet164_relu_before_addition": 6.14,
        "resnet110_relu_only_pre_activation": 6.71,
        "resnet164_relu_only_pre_activation": 5.91,
        "resnet110v2": 6.37,
        "resnet164v2": 5.46,
    },
    "[2, Table 3]": {
        "resnet110": 6.61,
        "resnet110v2": 6.37,
        "resnet164": 5.93,
        "resnet164v2": 5.46,
        "resnet1001": 7.61,
        "resnet1001v2": 4.92,
        "resnet164_cifar100": 25.16,
        "resnet164v2_cifar100": 24.33,
        "resnet1001_cifar100": 27.82,
        "resnet1001v2_cifar100": 22.71,
    },
    "[1, Table 2]": {
        "plainnet18": 27.94,
        "resnet18_option_a": 27.88,
        "plainnet34": 28.54,
        "resnet34_option_a": 25.03,
    },
    "[1, Table 3]": {
        "resnet34_option_a": 25.03,
        "resnet34": 24.52,
        "resnet34_option_c": 24.19,
        "resnet50": 22.85,
        "resnet101": 21.75,
        "resnet152": 21.43,
    },
    "[2, Table 5]": {"resnet200v2": 20.1},
}


def printed(table: str) -> dict:
    return {
        row.name: row.printed[table]
        for row in experiments.EXPERIMENTS.values()
        if table in row.printed
    }


class ExperimentsTest(parameterized.TestCase):
    @parameterized.parameters(*PRINTED)
    def test_numbers_are_those_of_the_paper(self, table):
        self.assertEqual(printed(table), PRINTED[table])

    @parameterized.parameters(
        ("[2, Table 1] at 20 layers", "[2, Table 1]", 20),
        ("[2, Table 2] at 56 layers", "[2, Table 2]", 56),
    )
    def test_shallow_rows_stand_for_the_deep_ones(self, here, there, depth):
        expected = {
            name.replace("110", str(depth)): error
            for name, error in PRINTED[there].items()
            if "110" in name
        }
        self.assertEqual(printed(here), expected)

    @parameterized.parameters(20, 110)
    def test_every_shortcut_of_the_paper_is_a_row(self, depth):
        shown = {
            row.shortcut or {"plain": "none", "resne": "A"}[row.name[:5]]
            for row in experiments.EXPERIMENTS.values()
            if f"[2, Table 1]{' at 20 layers' * (depth == 20)}" in row.printed
        }
        self.assertEqual(shown, set(shortcuts.TABLE_1.values()))

    def test_every_table_has_rows_and_every_row_a_table(self):
        for table in experiments.TABLES:
            self.assertGreaterEqual(len(printed(table)), 1, table)
        for row in experiments.EXPERIMENTS.values():
            self.assertTrue(row.printed, row.name)
            self.assertContainsSubset(row.printed, experiments.TABLES)

    @parameterized.parameters(*experiments.EXPERIMENTS)
    def test_every_row_can_be_trained(self, name):
        row = experiments.EXPERIMENTS[name]
        self.assertEqual(row.name, name)
        configs.Config(
            row.model,
            row.dataset,
            recipes.get_recipe(row.recipe),
            row.arguments,
        )

    def test_no_two_rows_are_the_same_training(self):
        rows = [
            (row.model, row.dataset, row.recipe, *row.arguments.items())
            for row in experiments.EXPERIMENTS.values()
        ]
        self.assertLen(set(rows), len(rows))

    def test_deep_networks_warm_up(self):
        """[1, Sec. 4.2] from 110 layers on."""
        for row in experiments.EXPERIMENTS.values():
            if row.dataset == "cifar10":
                is_deep = networks.get_network(row.model).depth >= 110
                self.assertEqual(row.recipe == "cifar10_warmup", is_deep)

    def test_unknown_name_is_refused_with_near_ones(self):
        with self.assertRaisesRegex(ValueError, "did you mean .*resnet56v2"):
            experiments.get_experiment("resnet56_v2")


class ProgramTest(parameterized.TestCase):
    def train(self, *arguments):
        """The outcome of apps.train and what it would have trained."""
        images = datasets.load("synthetic")
        with (
            mock.patch.object(
                loop, "train_and_evaluate", return_value=programs.TRAINED
            ) as trainer,
            mock.patch.object(datasets, "load", return_value=images),
            mock.patch.object(datasets.DataSet, "train_size", 50_000),
        ):
            outcome = programs.run("train", *arguments)
        return outcome, trainer

    def test_one_flag_trains_a_row(self):
        outcome, trainer = self.train(
            "--experiment=resnet110_exclusive_gating_6",
            "--seed=3",
            "--steps=16000",
        )
        self.assertEqual(outcome.code, 0, outcome.err)
        config, workdir, _ = trainer.call_args.args
        self.assertEqual(config.model, "resnet110")
        self.assertEqual(config.dataset, "cifar10")
        self.assertEqual(config.recipe.name, "cifar10_warmup")
        self.assertEqual(config.recipe.decay_at_steps, (8_000, 12_000))
        self.assertEqual(config.seed, 3)
        self.assertEqual(
            config.model_arguments,
            {
                "shortcut": identifiers.NamedShortcut(
                    "exclusive_gating", (("gate_bias", -6.0),)
                )
            },
        )
        self.assertEqual(config.experiment, "resnet110_exclusive_gating_6")
        self.assertEqual(workdir, "runs/resnet110_exclusive_gating_6_3")
        json.loads(outcome.out[-1])

    @parameterized.parameters(
        ([], "resnet20"),
        (["--steps=1000", "--dtype=mixed_bfloat16"], "resnet20"),
        (["--set=model.looped=true"], "resnet20"),
        (["--set=model.remat=true"], "resnet20"),
        (["--set=recipe.learning_rate=0.1"], "resnet20"),
        (["--set=recipe.learning_rate=0.05"], None),
        (["--batch_size=64"], None),
        (["--set=model.shortcut=B"], None),
        (["--set=model.survival_probability=0.5"], None),
    )
    def test_a_row_is_recorded_unless_a_flag_changes_its_result(
        self, arguments, experiment
    ):
        outcome, trainer = self.train("--experiment=resnet20", *arguments)
        self.assertEqual(outcome.code, 0, outcome.err)
        config, *_ = trainer.call_args.args
        self.assertEqual(config.experiment, experiment)
        self.assertEqual(configs.Config.from_json(config.to_json()), config)

    def test_a_training_without_a_row_records_none(self):
        _, trainer = self.train("--model=resnet20", "--dataset=cifar10")
        config, *_ = trainer.call_args.args
        self.assertIsNone(config.experiment)

    @parameterized.parameters(
        (["--experiment=resnet21"], "--experiment=resnet21: unknown exp"),
        (
            ["--experiment=resnet20", "--model=resnet56"],
            "--experiment=resnet20: it sets --model itself",
        ),
    )
    def test_mistakes_are_named(self, arguments, message):
        directory = self.enter_context(tempfile.TemporaryDirectory())
        outcome, trainer = self.train(f"--workdir={directory}/w", *arguments)
        self.assertEqual(outcome.code, 2)
        self.assertLen(outcome.err, 1)
        self.assertIn(message, outcome.err[0])
        trainer.assert_not_called()


if __name__ == "__main__":
    absltest.main()
