"""Configurations: parsed once, checked before any data is read."""

import dataclasses
import json
from unittest import mock

import keras
from absl.testing import absltest
from absl.testing import parameterized

import keras_resnet
from keras_resnet import layers
from keras_resnet import networks
from keras_resnet.training import configs
from tests import runs
from tests import tiny_runs


class ConfigTest(tiny_runs.TestCase):
    @parameterized.parameters(
        {},
        {"shortcut": "C", "survival_probability": 0.5},
        {"shortcut": "exclusive_gating(gate_bias=-7)", "looped": None},
        {"unit": "pre_activation", "first_norm": "both", "remat": True},
    )
    def test_comes_back_from_json(self, **arguments):
        described = tiny_runs.config(
            model_arguments=arguments, seed=3, experiment="resnet20"
        )
        text = json.dumps(described.to_json())
        self.assertEqual(configs.Config.from_json(json.loads(text)), described)

    @parameterized.parameters(
        ({"dtype": "int8"}, "dtype must be one of.*'int8'"),
        ({"model": "resnet21"}, "did you mean"),
        ({"model_arguments": {"unit": "orginal"}}, "mean 'original'"),
        ({"model_arguments": {"shortcut": "D"}}, "shortcut must be"),
        ({"model_arguments": {"survival_probability": 2.0}}, "in .0, 1."),
        ({"model_arguments": {"first_norm": "both"}}, "received OriginalUnit"),
        ({"model_arguments": {"padding": "valid"}}, "padding must be one of"),
        ({"model_arguments": {"shortcut": "dropout(rate=2)"}}, "takes rate"),
        ({"model": "nin", "model_arguments": {"remat": True}}, "takes no arg"),
        (
            {"sync_batch_norm": True, "model_arguments": {"looped": True}},
            "sync_batch_norm needs model.looped=false.*received model.looped=t",
        ),
    )
    def test_refuses_what_no_network_can_be(self, fields, message):
        fields = {"model": "resnet20", "recipe": tiny_runs.RECIPE, **fields}
        with self.assertRaisesRegex(ValueError, message):
            configs.Config(dataset="digits", **fields)

    def test_synchronized_normalization_needs_single_units(self):
        """41 units in a stage would else be a loop."""
        long = dataclasses.replace(runs.TINY, units=(1, 42), filters=(1, 1))
        with mock.patch.dict(keras_resnet.MODELS, {"tiny": long}):
            for is_synchronized in (False, True):
                described = tiny_runs.config(sync_batch_norm=is_synchronized)
                model = configs.build_model(described, (8, 8, 1), 10)
                stacks = [
                    layer
                    for layer in model.layers
                    if isinstance(layer, layers.UnitStack)
                ]
                self.assertLen(stacks, 0 if is_synchronized else 1)

    def test_a_shortcut_in_json_may_be_text(self):
        arguments = {"shortcut": "exclusive_gating(gate_bias=-7)"}
        described = tiny_runs.config(model_arguments=arguments)
        fields = {**described.to_json(), "model_arguments": arguments}
        self.assertEqual(configs.Config.from_json(fields), described)

    def test_making_one_makes_no_layer(self):
        with mock.patch.object(
            keras.layers.Layer, "__init__", side_effect=AssertionError
        ):
            config = configs.Config(
                "resnet20",
                "digits",
                tiny_runs.RECIPE,
                {"shortcut": "dropout(rate=0.1)", "unit": "pre_activation"},
            )
        self.assertEqual(
            config.to_json()["model_arguments"],
            {
                "shortcut": {"name": "dropout", "rate": 0.1},
                "unit": "pre_activation",
            },
        )

    def test_arguments_cannot_be_changed(self):
        config = tiny_runs.config(model_arguments={"shortcut": "C"})
        with self.assertRaises(TypeError):
            config.model_arguments["shortcut"] = "A"
        with self.assertRaises(dataclasses.FrozenInstanceError):
            config.model_arguments["shortcut"].name = "A"

    @parameterized.parameters(
        ("gate_bias='x'", "takes gate_bias"),
        ("gate_bias=True", "takes gate_bias"),
        ("rate=1", "takes gate_bias"),
        (f"gate_bias={10**400}", "takes gate_bias"),
    )
    def test_arguments_of_shortcuts_have_types(self, text, message):
        with self.assertRaisesRegex(ValueError, message):
            tiny_runs.config(
                model_arguments={"shortcut": f"exclusive_gating({text})"}
            )

    def test_model_arguments_come_from_text(self):
        parse = networks.get_network("resnet20").parse
        self.assertEqual(str(parse("shortcut", "C")), "C")
        self.assertEqual(parse("batch_norm_momentum", "0.99"), 0.99)
        with self.assertRaisesRegex(ValueError, "did you mean 'shortcut'"):
            parse("shortcuts", "C")
        self.assertIs(parse("remat", "true"), True)
        self.assertIs(parse("looped", "False"), False)
        with self.assertRaisesRegex(ValueError, "true or false.*'maybe'"):
            parse("remat", "maybe")
        with self.assertRaisesRegex(ValueError, "must be a number.*'high'"):
            parse("survival_probability", "high")


if __name__ == "__main__":
    absltest.main()
