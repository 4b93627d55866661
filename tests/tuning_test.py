"""The search by keras-tuner: its space, its algorithms, its processes."""

import dataclasses
import itertools
import json
import math
import os
import shlex
import tempfile
import unittest
from unittest import mock

import keras
import keras_tuner
import numpy as np
import pytest
from absl.testing import absltest
from absl.testing import parameterized

from keras_resnet import models
from keras_resnet import specs
from keras_resnet.data import datasets
from keras_resnet.data import splits
from keras_resnet.training import configs
from keras_resnet.training import interrupts
from keras_resnet.training import loop
from keras_resnet.training import recipes
from keras_resnet.training import tuning
from keras_resnet.training import workdirs
from tests import programs

SMALL = tuning.Space(depth=(20,), width=(0.5,), optimizer=("momentum", "adam"))


def search(algorithm="random", trials=4, steps=2, space=SMALL, **kwargs):
    recipe = dataclasses.replace(recipes.RECIPES["digits"], batch_size=8)
    config = configs.Config("resnet20", "digits", recipe, **kwargs)
    return tuning.Search(config, space, algorithm, trials, steps)


def quality(config, workdir, **_):
    """In place of a training: an error that its choices decide."""
    recipe = config.recipe
    error = 10 * abs(math.log(recipe.learning_rate / 0.03))
    error += 10.0 * (str(config.model_arguments["shortcut"]) != "A")
    os.makedirs(workdir)
    return {"test_top1_error": error + 5 / recipe.steps}


# keras-tuner 1.4.8 asks for the name of a thread by an old name.
@pytest.mark.filterwarnings(
    "ignore:(currentThread|getName).*:DeprecationWarning"
)
class TuningTestCase(parameterized.TestCase):
    def folder(self):
        return self.enter_context(tempfile.TemporaryDirectory())

    def tune(self, *arguments, **kwargs):
        lines = []
        trials = tuning.tune(*arguments, report=lines.append, **kwargs)
        return trials, lines


class SearchTest(TuningTestCase):
    @parameterized.parameters("random", "bayesian")
    def test_trials_are_compared_by_their_error(self, algorithm):
        folder = self.folder()
        with mock.patch.object(loop, "train_and_evaluate", quality):
            trials, lines = self.tune(search(algorithm, 8, 90), folder)
        self.assertLen(lines, 8)
        self.assertLen(trials, 8)
        errors = [trial.validation_error for trial in trials]
        self.assertEqual(errors, sorted(errors))
        self.assertLen({str(trial.values()) for trial in trials}, 8)
        for trial in trials:
            self.assertEqual(trial.steps, 90)
            self.assertEqual(trial.config.recipe.steps, 800)  # to be trained
            self.assertEqual(trial.config.model, "resnet20x0.5")
            self.assertBetween(trial.config.recipe.learning_rate, 1e-3, 0.3)
            self.assertBetween(trial.config.recipe.weight_decay, 1e-5, 1e-3)

    def test_hyperband_trains_the_best_third_three_times_as_long(self):
        with mock.patch.object(loop, "train_and_evaluate", quality):
            trials, _ = self.tune(search("hyperband", 100, 90), self.folder())
        steps = [trial.steps for trial in trials]
        # Brackets of 9 from 10 steps on, 5 from 30 steps on, 3 of 90 steps.
        counts = {s: steps.count(s) for s in (10, 30, 90)}
        self.assertEqual(counts, {10: 9, 30: 3 + 5, 90: 1 + 2 + 3})

        def choices(trial):
            return {**trial.values(), "steps": None}

        shortest = [t for t in trials if t.steps == 10]
        longer = [choices(t) for t in trials if t.steps == 30]
        self.assertEqual(
            [choices(t) in longer for t in shortest][:3], [True] * 3
        )
        self.assertFalse(any(choices(t) in longer for t in shortest[3:]))

    def test_a_run_that_diverges_is_the_worst(self):
        def diverges(config, workdir, **kwargs):
            if config.recipe.optimizer == "adam":
                os.makedirs(workdir)
                raise loop.TrainingDivergedError("the loss is nan")
            return quality(config, workdir)

        with mock.patch.object(loop, "train_and_evaluate", diverges):
            trials, _ = self.tune(search(trials=8, steps=90), self.folder())
        optimizers = [trial.config.recipe.optimizer for trial in trials]
        self.assertEqual(trials[-1].validation_error, 100.0)
        self.assertEqual(optimizers, sorted(optimizers, reverse=True))

    def test_a_search_goes_on_with_what_it_has_and_with_more_trials(self):
        folder = self.folder()
        with mock.patch.object(loop, "train_and_evaluate", quality):
            first, _ = self.tune(search(), folder)
            again, lines = self.tune(search(), folder)
            self.assertEqual(again, first)
            self.assertEmpty(lines)
            more, lines = self.tune(search(trials=6), folder)
        self.assertLen(lines, 2)
        for trial in first:
            self.assertIn(trial, more)
        with self.assertRaisesRegex(workdirs.WorkdirError, "another steps"):
            self.tune(search(steps=3), folder)

    def test_a_trial_that_was_stopped_is_taken_up_again(self):
        def stops(config, workdir, **_):
            raise interrupts.Interrupted(15, 1)

        folder = self.folder()
        with (
            mock.patch.object(loop, "train_and_evaluate", stops),
            self.assertRaises(interrupts.Interrupted),
        ):
            self.tune(search(trials=2), folder)
        with mock.patch.object(loop, "train_and_evaluate", quality):
            trials, lines = self.tune(search(trials=2), folder)
        self.assertLen(lines, 2)
        self.assertCountEqual([trial.name for trial in trials], "01")

    def test_a_directory_of_something_else_is_refused(self):
        folder = self.folder()
        with open(os.path.join(folder, "letter.txt"), "w") as file:
            file.write("Dear")
        with self.assertRaisesRegex(
            workdirs.WorkdirError, "one without search.json"
        ):
            self.tune(search(), folder)

    def test_a_hypermodel_builds_what_a_trial_trains(self):
        hypermodel = tuning.HyperModel(
            search().config, SMALL, (8, 8, 1), classes=10
        )
        hp = keras_tuner.HyperParameters()
        hp.Fixed("unit", "pre_activation")
        hp.Fixed("learning_rate", 0.123456)
        model = hypermodel.build(hp)
        self.assertEqual(model.output_shape, (None, 10))
        self.assertEqual(model.layers[-1].activation.__name__, "linear")
        self.assertIsNotNone(model.get_layer("final_norm"))
        recipe = hypermodel.config(hp).recipe
        self.assertEqual(recipe.learning_rate, 0.123)

    def test_validation_images_are_training_images_and_no_trial_trains_on_them(
        self,
    ):
        folder = self.folder()
        for label, place in itertools.product("ab", range(30)):
            # Of different sizes, so that they stay files.
            image = np.full((140 + place, 150, 3), ord(label) + place)
            os.makedirs(f"{folder}/{label}", exist_ok=True)
            keras.utils.save_img(
                f"{folder}/{label}/{place}.png", image, scale=False
            )
        for name in ("digits", "synthetic", f"folder:{folder}"):
            whole = datasets.load(name)
            part = whole.with_validation()
            self.assertEqual(part.train_size + part.test_size, whole.train_size)
            self.assertAlmostEqual(part.test_size / whole.train_size, 0.1, 1)

            def images(split):
                return [(x.tobytes(), y) for x, y in split.decoded()]

            both = images(part._train) + images(part._test)
            self.assertCountEqual(both, images(whole._train))
            labels = [y for _, y in part._test.decoded()]
            self.assertLess(np.ptp(np.bincount(labels)), 3)  # every class

    @parameterized.parameters(
        ("train", 45_000, 5_000), ("train[:80%]", 36_000, 4_000)
    )
    def test_records_are_split_as_the_paper_splits_cifar_10(
        self, split, trained, held_out
    ):
        folder = os.environ.get("KERAS_RESNET_DATA", "")
        if not os.path.isdir(os.path.join(folder, "tfds", "cifar10")):
            raise unittest.SkipTest("KERAS_RESNET_DATA has no cifar10")
        import tensorflow_datasets as tfds

        builder = tfds.builder("cifar10", data_dir=f"{folder}/tfds")
        whole = splits.Records(builder, split, "image", "label")
        self.assertEqual(whole.part(is_held_out=False).size, trained)
        self.assertEqual(whole.part(is_held_out=True).size, held_out)


class ProcessesTest(TuningTestCase):
    @pytest.mark.slow
    def test_two_workers_share_six_trials_and_the_best_is_trained_again(self):
        folder = self.folder()
        outcome = programs.run(
            "tune",
            *("--trials=6", "--steps=2", "--workers=2", "--batch_size=8"),
            *("--set=space.depth=20", "--set=space.width=0.5"),
            f"--workdir={folder}/search",
        )
        self.assertEqual(outcome.code, 0, outcome.err)
        done = [line for line in outcome.out if line.startswith("trial ")]
        self.assertLen(done, 1 + 6)  # and the head of the table
        for i in range(6):
            trial = f"{folder}/search/trials/{i}"
            self.assertTrue(os.path.isfile(f"{trial}/config.json"))
            events = [n for n in os.listdir(trial) if "tfevents" in n]
            self.assertLen(events, 1)
            with open(f"{trial}/{events[0]}", "rb") as file:
                contents = file.read()
            self.assertIn(b"_hparams_/session_start_info", contents)
            self.assertIn(b"validation_top1_error", contents)
        with open(f"{folder}/search/worker1.log") as file:
            self.assertNotIn("Traceback", file.read())

        command = shlex.split(outcome.out[-1])
        self.assertEqual(command[:3], ["python", "-m", "apps.train"])
        table = [line.split() for line in outcome.out[-9:-3]]
        errors = [float(row[1].rstrip("%")) for row in table]
        self.assertEqual(errors, sorted(errors))
        with open(f"{folder}/search/trials/{table[0][0]}/config.json") as file:
            trial = json.load(file)
        outcome = programs.run("train", *command[3:], "--steps=2")
        self.assertEqual(outcome.code, 0, outcome.err)
        with open(f"{folder}/search/best/config.json") as file:
            self.assertEqual(json.load(file), trial)

    @parameterized.parameters(
        ("--algorithm=grid", "algorithm"),
        ("--set=space.depht=20", "depht.*allowed are depth"),
        ("--set=space.depth=21", "--set=space.depth=21: .*resnet21"),
        ("--set=recipe.learning_rate=1", "set space.learning_rate"),
        ("--set=space.depth=deep", "space.depth=deep"),
        ("--set=space.width=0.01", "whole numbers"),
        ("--set=space.shortcut=A,Q", "'Q'"),
        ("--set=space.optimizer=sgd", "'sgd'"),
        ("--set=space.augmentation=twist", "'twist'"),
        ("--set=space.learning_rate=0.1", "lowest and highest"),
        ("--recipe=digit", "did you mean 'digits'"),
        ("--workers=0", "workers"),
    )
    def test_a_flag_that_is_not_allowed_is_a_usage_error(self, flag, message):
        outcome = programs.run("tune", flag, f"--workdir={self.folder()}/x")
        self.assertEqual(outcome.code, 2)
        (line,) = outcome.err
        self.assertRegex(line, message)


class CommandTest(TuningTestCase):
    @parameterized.parameters(
        {},
        {"dtype": "mixed_bfloat16", "seed": 3, "deterministic": True},
        {"data_dir": "a folder", "model": "resnet32x2"},
        {"model_arguments": {"shortcut": "exclusive_gating(gate_bias=-7)"}},
        {"recipe": recipes.RECIPES["cifar10_warmup"].with_steps(640)},
        {"recipe": dataclasses.replace(
            recipes.RECIPES["digits"],
            decay_at_steps=(3, 4), batch_size=7, decay_norms=False,
        )},
    )  # fmt: skip
    def test_a_command_line_is_its_configuration(self, **kwargs):
        kwargs = {
            "model": "resnet20",
            "dataset": "synthetic",
            "recipe": recipes.RECIPES["digits"],
            **kwargs,
        }
        config = configs.Config(**kwargs)
        arguments = tuning.train_flags(config, "a workdir")
        with mock.patch.object(
            loop, "train_and_evaluate", return_value=programs.TRAINED
        ) as train:
            outcome = programs.run("train", *arguments)
        self.assertEqual(outcome.code, 0, outcome.err)
        self.assertEqual(train.call_args.args[:2], (config, "a workdir"))


class WidthTest(parameterized.TestCase):
    def test_a_width_multiplies_all_filters(self):
        spec = specs.get_spec("ResNet20x2")
        self.assertEqual(spec.filters, (32, 64, 128))
        self.assertEqual(spec.name, "resnet20x2")
        self.assertEqual(spec.units, specs.MODELS["resnet20"].units)
        model = models.resnet("resnet20x0.5", input_shape=(8, 8, 3))
        self.assertEqual(model.get_layer("stage3_unit3").output.shape[-1], 32)

    @parameterized.parameters(
        ("resnet20x0.01", "whole"), ("resnet21x2", "unknown network")
    )
    def test_a_width_without_a_network_is_refused(self, name, message):
        with self.assertRaisesRegex(ValueError, message):
            specs.get_spec(name)


if __name__ == "__main__":
    absltest.main()
