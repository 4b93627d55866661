"""Weights at an address of the Hugging Face hub."""

import json
import os
import sys
import types
import typing
from unittest import mock

from absl.testing import absltest
from absl.testing import parameterized

import keras_resnet
from keras_resnet import weights
from keras_resnet.weights import downloads
from tests.weight_files import WeightsTestCase
from tests.weight_files import randomized
from tests.weight_files import safetensors
from tests.weight_files import state_dict


class HubTest(WeightsTestCase):
    CONFIG: typing.ClassVar = {
        "architecture": "resnet18",
        "num_classes": 1000,
        "pretrained_cfg": {
            "tag": "a1_in1k",
            "input_size": [3, 224, 224],
            "interpolation": "bicubic",
            "crop_pct": 0.95,
            "mean": [0.485, 0.456, 0.406],
            "std": [0.229, 0.224, 0.225],
            "num_classes": 1000,
            "first_conv": "conv1",
            "classifier": "fc",
            "license": "apache-2.0",
        },
    }

    def hub(self, config, model=None):
        """A stand-in for huggingface_hub."""
        folder = self.folder()
        with open(os.path.join(folder, "config.json"), "w") as file:
            json.dump(config, file)
        if model is not None:
            with open(os.path.join(folder, "model.safetensors"), "wb") as file:
                file.write(safetensors(state_dict(model)))

        def hf_hub_download(repo_id, filename, revision=None):
            self.assertEqual(repo_id, "timm/resnet18.a1_in1k")
            return os.path.join(folder, filename)

        module = types.SimpleNamespace(hf_hub_download=hf_hub_download)
        return mock.patch.dict(sys.modules, {"huggingface_hub": module})

    def test_an_address_gives_the_network_with_its_preparation(self):
        saved = randomized(keras_resnet.ResNet18())
        address = "hf://timm/resnet18.a1_in1k"
        with self.hub(self.CONFIG, saved):
            model = keras_resnet.ResNet18(weights=address)
        self.assert_weights_equal(model, saved)
        card = weights.card(model)
        self.assertEqual(card.preparation.shorter_side, 235)
        self.assertEqual(card.preparation.interpolation, "bicubic")
        self.assertEqual(card.licence, "apache-2.0")
        self.assertEqual(card.label_set, "imagenet")

    @parameterized.parameters(
        ("resnet18d", "is resnet18d, a layout that this package does not have"),
        ("resnet34", r"build it by keras_resnet.resnet\('resnet34'"),
        ("seresnet50", "a layout that this package does not have"),
    )
    def test_layouts_that_are_not_ours_are_refused(self, architecture, message):
        config = {**self.CONFIG, "architecture": architecture}
        with self.hub(config), self.assertRaisesRegex(ValueError, message):
            keras_resnet.ResNet18(weights="hf://timm/resnet18.a1_in1k")

    @parameterized.parameters(
        ({"pretrained_cfg": {"interpolation": "lanczos"}}, "'lanczos'"),
        ({"pretrained_cfg": {"crop_mode": "squash"}}, "crop_mode center"),
        ({"global_pool": "max"}, "global_pool avg"),
        ({"model_args": {"output_stride": 8}}, "model_args"),
    )
    def test_what_would_be_another_function_is_refused(self, change, message):
        config = {**self.CONFIG, **change}
        entry = {**self.CONFIG["pretrained_cfg"]}
        config["pretrained_cfg"] = entry | change.get("pretrained_cfg", {})
        with self.hub(config), self.assertRaisesRegex(ValueError, message):
            keras_resnet.ResNet18(weights="hf://timm/resnet18.a1_in1k")

    @parameterized.parameters(
        ({}, "an architecture of timm"),
        ({"architecture": "resnet18"}, "without 'pretrained_cfg'"),
        (
            {"architecture": "resnet18", "pretrained_cfg": []},
            "config.json of timm",
        ),
    )
    def test_a_configuration_of_another_kind_is_refused(self, config, message):
        with self.hub(config), self.assertRaisesRegex(ValueError, message):
            keras_resnet.ResNet18(weights="hf://timm/resnet18.a1_in1k")

    def test_without_the_package_the_error_says_how_to_install_it(self):
        with (
            mock.patch.dict(sys.modules, {"huggingface_hub": None}),
            self.assertRaisesRegex(ValueError, "pip install huggingface_hub"),
        ):
            keras_resnet.ResNet18(weights="hf://timm/resnet18.a1_in1k")

    def test_an_address_of_another_form_is_refused(self):
        for address in ("hf://resnet18", "hf://a/b/c", "hf://../x"):
            with self.assertRaisesRegex(ValueError, "hf://OWNER/NAME"):
                keras_resnet.ResNet18(weights=address)

    def test_an_error_of_the_network_says_what_to_do_by_hand(self):
        def fails(*arguments, **kwargs):
            raise ConnectionError("offline\nno route")

        module = types.SimpleNamespace(hf_hub_download=fails)
        with (
            mock.patch.dict(sys.modules, {"huggingface_hub": module}),
            self.assertRaisesRegex(OSError, "offline no route. To get it by"),
        ):
            keras_resnet.ResNet18(weights="hf://timm/resnet18.a1_in1k")

    def test_a_folder_of_weights_is_taken_first(self):
        folder = self.folder()
        inside = os.path.join(folder, "timm", "resnet18.a1_in1k")
        os.makedirs(inside)
        saved = randomized(keras_resnet.ResNet18())
        with open(os.path.join(inside, "config.json"), "w") as file:
            json.dump(self.CONFIG, file)
        with open(os.path.join(inside, "model.safetensors"), "wb") as file:
            file.write(safetensors(state_dict(saved)))
        variables = {downloads.FOLDER_VARIABLE: folder}
        with (
            mock.patch.dict(os.environ, variables),
            mock.patch.dict(sys.modules, {"huggingface_hub": None}),
        ):
            model = keras_resnet.ResNet18(weights="hf://timm/resnet18.a1_in1k")
        self.assert_weights_equal(model, saved)


if __name__ == "__main__":
    absltest.main()
