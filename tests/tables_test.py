"""Tables of runs beside the papers, and what they show of the claims."""

import dataclasses
import itertools
import statistics

import pytest
from absl.testing import absltest
from absl.testing import parameterized

from keras_resnet.papers import claims
from keras_resnet.papers import experiments
from keras_resnet.papers import tables
from keras_resnet.training import recipes
from tests import paper_runs
from tests import reference


class TablesTest(parameterized.TestCase):
    def test_seeds_are_averaged_and_counted_once(self):
        errors = (9.0, 9.5, 8.2)
        several = [
            paper_runs.a_run(f"run{seed}", error, seed=seed)
            for seed, error in enumerate(errors)
        ]
        several.append(
            paper_runs.a_run("the first seed once more", 50.0, seed=0)
        )
        (result,) = tables.results(several, "resnet20")
        self.assertEqual(result.errors, errors)
        # On another backend a seed has other batches.
        jax = paper_runs.a_run(
            "the first seed on JAX", 9.9, seed=0, backend="jax"
        )
        (both,) = tables.results([*several, jax], "resnet20")
        self.assertEqual(both.errors, (*errors, 9.9))
        mean, deviation = statistics.mean(errors), statistics.stdev(errors)
        self.assertEqual(str(result), f"{mean:.2f} ± {deviation:.2f}")

    def test_what_is_unlike_is_not_mixed(self):
        several = [
            paper_runs.a_run("a", 9.0),
            paper_runs.a_run("b", 8.0, dtype="mixed_bfloat16"),
            paper_runs.a_run(
                "c", 7.0, recipe=paper_runs.RECIPE.with_steps(2_000), step=2_000
            ),
            paper_runs.a_run("other network", 1.0, model="resnet32"),
            paper_runs.a_run("unfinished", 2.0, step=900, seed=1),
            paper_runs.a_run(
                "other rate",
                3.0,
                recipe=dataclasses.replace(
                    paper_runs.RECIPE, learning_rate=0.2
                ),
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

    def test_recipes_of_one_length_stand_one_below_the_other(self):
        def a_run(name, error, recipe, steps=1_000, **fields):
            row = recipes.get_recipe(recipe).with_steps(steps)
            changed = dataclasses.replace(row, **fields.pop("changed", {}))
            return paper_runs.a_run(
                name, error, recipe=changed, step=steps, **fields
            )

        several = [
            a_run("a", 9.0, "cifar10"),
            a_run("b", 9.5, "cifar10", seed=1),
            a_run("c", 8.0, "cifar10_modern"),
            a_run("other rate", 1.0, "cifar10", changed={"learning_rate": 1.0}),
            a_run("other seed", 1.0, "cifar10", seed=0),
            a_run(
                "arguments", 1.0, "cifar10", model_arguments={"shortcut": "B"}
            ),
            a_run("alone", 7.0, "cifar10", steps=2_000),
            a_run("other network", 2.0, "cifar10_modern", model="resnet32"),
        ]
        rows = tables.recipe_table(several).rows
        self.assertEqual(
            [row[1:-1] for row in rows],
            [
                ("resnet20", "cifar10", "1,000", "9.25 ± 0.35", "2"),
                ("resnet20", "cifar10_modern", "1,000", "8.00", "1"),
            ],
        )

    def test_the_last_error_counts_and_not_the_best(self):
        run = paper_runs.a_run("run", 95.0)
        (result,) = tables.results([run], "resnet20")
        self.assertEqual(result.errors, (95.0,))

    def test_a_table_has_the_papers_numbers_beside_ours(self):
        several = [
            paper_runs.a_run("a", 9.1),
            paper_runs.a_run("b", 9.2, model="resnet32"),
            paper_runs.a_run("c", 9.0, model="resnet56"),
        ]
        (table,) = (
            table
            for table in tables.paper_tables(several)
            if table.source == "[1, Table 6]"
        )
        self.assertEqual(
            [row[:4] for row in table.rows],
            [
                ("resnet20", "8.75", "9.10", "1"),
                ("resnet32", "7.51", "9.20", "1"),
                ("resnet56", "6.97", "9.00", "1"),
            ],
        )
        self.assertEqual(
            table.notes,
            ("Rows of the paper's table that were run: 3 of 12.",),
        )
        claim, finding = table.findings
        self.assertIn("[1, Sec. 4.2]", claim)
        self.assertEqual(
            finding,
            "Our runs of 1,000 steps in float32: 0 of 3 comparisons agree with "
            "the claim; one run of each row, so not decided: resnet56 < "
            "resnet32, resnet56 < resnet20, resnet32 < resnet20.",
        )

    def test_lengths_stand_side_by_side_and_are_not_mixed(self):
        long = {"recipe": recipes.RECIPES["cifar10"], "step": 64_000}
        short = {"recipe": long["recipe"].with_steps(16_000), "step": 16_000}
        several = [
            paper_runs.a_run("a", 10.5, **short),
            paper_runs.a_run("b", 8.6, **long),
            paper_runs.a_run("c", 10.9, seed=1, **short),
            paper_runs.a_run("d", 10.0, seed=2, **short),
        ]
        (table,) = (
            table
            for table in tables.paper_tables(several)
            if table.source == "[1, Table 6]"
        )
        self.assertEqual(
            table.header,
            ("experiment", "paper, %", "ours, %", "n")
            + (
                "steps",
                "dtype",
            ),
        )
        self.assertEqual(
            [row for row in table.rows if row[0] == "resnet20"],
            [
                ("resnet20", "8.75", "8.60", "1", "64,000", "float32"),
                ("resnet20", "8.75", "10.47 ± 0.45", "3", "16,000", "float32"),
            ],
        )

    def test_rows_that_were_not_run_are_no_results(self):
        own = paper_runs.a_run("own", 9.0, dataset="digits")
        unfinished = paper_runs.a_run("unfinished", 9.0, step=900)
        self.assertEmpty(tables.paper_tables([own, unfinished]))
        found = tables.paper_tables([own, paper_runs.a_run("alone", 9.0)])
        self.assertNotEmpty(found)
        for table in found:
            self.assertEqual([row[0] for row in table.rows], ["resnet20"])

    @pytest.mark.slow
    def test_a_cost_table_has_the_nets_of_the_paper(self):
        table = tables.cost_table()
        counts = {row[0]: row[1:4] for row in table.rows}
        self.assertEqual(
            list(counts),
            ["googlenet", "resnet18", "resnet34", "resnet50", "resnet101"]
            + ["resnet152", "vgg16", "vgg19", "prelu_net"],
        )
        self.assertEqual(
            counts["resnet152"], ("60,192,808", "11,282,415,616", "11.3")
        )
        for _, multiply_adds, printed in counts.values():
            counted = int(multiply_adds.replace(",", "")) / 1e9
            self.assertAlmostEqual(counted / float(printed), 1, delta=0.06)

    def test_a_row_is_left_until_each_seed_has_the_whole_recipe(self):
        whole = {"recipe": recipes.RECIPES["cifar10"], "step": 64_000}
        left = {
            row[0]: row[1:]
            for row in tables.remaining_table(
                [
                    paper_runs.a_run("a", 9.0, **whole),
                    paper_runs.a_run("short", 9.0, seed=1),
                    paper_runs.a_run("b", 9.0, model="resnet32", **whole),
                ]
            ).rows
        }
        self.assertNotIn("resnet32", left)
        # 3 seeds [2, Sec. 3], of which one was run; 40.55 million multiply-adds
        # for an image [1, Table 6] at 2.2e11 a second.
        counts = reference.counts(reference.layout("resnet20"), "A", "1x1")
        seconds = 2 * 64_000 * 128 * 3 * counts.multiply_adds / 2.2e11
        tables_of_20, runs_left, steps, hours, _ = left["resnet20"]
        self.assertIn("[1, Table 6]", tables_of_20)
        self.assertEqual((runs_left, steps), ("2", "64,000"))
        self.assertEqual(hours, f"{seconds / 3600:.1f}")
        self.assertLen(left, len(experiments.EXPERIMENTS) - 1)

    def test_every_run_is_listed_whatever_came_out(self):
        several = [
            paper_runs.a_run("good", 9.0),
            paper_runs.a_run("bad", 99.0, seed=1),
            paper_runs.a_run("unfinished", 50.0, step=700),
            paper_runs.a_run("own", 5.0, model="resnet18"),
        ]
        cells = [" ".join(row) for row in tables.run_table(several).rows]
        self.assertLen(cells, 4)
        self.assertIn("700 of 1,000", cells[2])
        self.assertIn("(resnet18)", cells[3])


class ClaimsTest(parameterized.TestCase):
    def test_every_table_has_a_claim_about_its_rows(self):
        self.assertSameElements(claims.CLAIMS, experiments.TABLES)
        for table, claim in claims.CLAIMS.items():
            for name in itertools.chain(*claim.pairs):
                self.assertIn(table, experiments.get_experiment(name).printed)

    def test_the_papers_errors_agree_with_every_claim(self):
        for table, claim in claims.CLAIMS.items():
            for lower, higher in claim.pairs:
                a, b = (
                    experiments.get_experiment(name).printed[table]
                    for name in (lower, higher)
                )
                if a is not None and b is not None:  # [1, Fig. 6] is drawn
                    self.assertLess(a, b, (lower, higher))

    @parameterized.parameters(
        ([9.0, 9.2], [8.0, 8.2], "1 of 1 comparisons agrees"),
        ([8.0, 8.2], [9.0, 9.2], "contradicted: resnet56 < resnet20"),
        # The standard error is 0.1 sqrt(2), the difference 0.2.
        ([9.1, 9.3], [8.9, 9.1], "not told apart: resnet56 < resnet20"),
        # The row with one run has the other's variance of 0.02: the standard
        # error is sqrt(0.01 + 0.02).
        ([9.0, 9.2], [8.7], "1 of 1 comparisons agrees"),
        ([9.0, 9.2], [8.8], "not told apart"),
        ([9.0], [1.0], "one run of each row, so not decided"),
    )
    def test_rows_differ_by_more_than_twice_the_standard_error(
        self, of_20, of_56, expected
    ):
        claim = claims.Claim("Deeper is better.", (("resnet56", "resnet20"),))
        errors = {"resnet20": of_20, "resnet56": of_56}
        self.assertIn(expected, claims.finding(claim, errors))

    def test_a_comparison_of_a_row_that_was_not_run_is_no_finding(self):
        claim = claims.CLAIMS["[1, Table 6]"]
        self.assertEqual(claims.finding(claim, {"resnet20": [9.0, 9.1]}), "")
        (table,) = (
            table
            for table in tables.paper_tables([paper_runs.a_run("alone", 9.0)])
            if table.source == "[1, Table 6]"
        )
        self.assertIn("do not compare", table.findings[1])


if __name__ == "__main__":
    absltest.main()
