"""Advice on files that do not fit a model."""

import dataclasses
import functools

import numpy as np
from absl.testing import absltest
from absl.testing import parameterized

import keras_resnet
from keras_resnet import weights
from keras_resnet.weights import advice
from tests.weight_files import WeightsTestCase
from tests.weight_files import randomized
from tests.weight_files import safetensors
from tests.weight_files import small
from tests.weight_files import state_dict
from tests.weight_files import untouched


@functools.cache
def built_once(builder, **kwargs):
    """One network for all files that are rejected."""
    return getattr(keras_resnet, builder)(**kwargs)


class AdviceTest(WeightsTestCase):
    @parameterized.parameters(
        ("ResNet20", {}, "ResNet20", {"classes": 100}, "predictions/kernel has "
         r"shape \(64, 10\) in the file and \(64, 100\) in the model .*"
         r"ResNet20\(classes=10, shortcut='A'\) \(or 'none'"),
        ("ResNet32", {}, "ResNet20", {}, r"stage1_unit4/conv1/kernel .* is not "
         r"in the model .*ResNet32\(classes=10, shortcut='A'\)"),
        ("ResNet20", {}, "ResNet32", {}, r"stage1_unit4/conv1/kernel .* is not "
         r"in the file .*ResNet20\("),
        ("ResNet20", {"shortcut": "C"}, "ResNet20", {},
         r"stage1_unit1/shortcut/.*shortcut='C'\)"),
        ("ResNet20", {"shortcut": "B"}, "ResNet20", {}, "shortcut='B'"),
        ("ResNet20", {"shortcut": "convolution"}, "ResNet20", {},
         "shortcut='convolution'"),
        ("ResNet20", {"shortcut": "shortcut_only_gating"}, "ResNet20", {},
         r"shortcut='exclusive_gating'\) \(or 'shortcut_only_gating'"),
        ("ResNet20V2", {}, "ResNet20", {}, r"ResNet20V2\("),
        ("ResNet164", {"looped": True}, "ResNet20", {},
         r"ResNet164\(.*shortcut='B'"),
        ("ResNet20", {"include_top": False}, "ResNet20", {},
         r"ResNet20\(include_top=False"),
        ("ResNet20", {"input_shape": (32, 32, 1)}, "ResNet20", {},
         r"input_shape=\(32, 32, 1\)"),
        ("ResNet18", {}, "ResNet20", {}, r"ResNet18\(classes=1000"),
    )  # fmt: skip
    def test_a_misfit_names_the_weight_and_what_would_fit(
        self, saved, saved_kwargs, built, kwargs, message
    ):
        path = self.path(None, "other.weights.h5")
        getattr(keras_resnet, saved)(**saved_kwargs).save_weights(path)
        model = built_once(built, **kwargs)
        text = self.assert_refused(model, path, message)
        self.assertIn(f"{path} does not fit the model '{model.name}'", text)

    def test_a_network_of_no_paper_is_described_by_a_spec(self):
        path = self.path(None, "other.weights.h5")
        # The default of a Spec. The sentence does not name a stride.
        network = small(unit="pre_activation", bottleneck_stride="1x1")
        saved = randomized(network, seed=1)
        saved.save_weights(path)
        text = self.assert_refused(built_once("ResNet20"), path, "Spec")
        expression = text.partition("It would fit ")[2]
        model = eval(expression, {"keras_resnet": keras_resnet})
        weights.load(model, path)
        self.assert_weights_equal(model, saved)

    @parameterized.parameters(
        {"units": (2, 2, 2)},
        {"units": (12, 12, 12), "bottleneck": True, "looped": True},
        {"units": (4, 4, 4), "looped": True},
    )
    def test_advice_is_a_builder_only_where_it_is_that_network(
        self, looped=False, **fields
    ):
        """Other depths, and other units of the same depth, are described."""
        spec = keras_resnet.Spec(
            "other", filters=(16, 32, 64), stem="cifar", classes=10,
            image_size=32, **fields,
        )  # fmt: skip
        path = self.path(None, "other.weights.h5")
        saved = keras_resnet.resnet(spec, shortcut="A", looped=looped)
        saved.save_weights(path)
        one = dataclasses.replace(spec, units=(1, 1, 1))
        text = self.assert_refused(
            keras_resnet.resnet(one, shortcut="A"), path, "Spec"
        )
        self.assertIn(f"units={spec.units}", text)

    @parameterized.parameters(
        *(name for name in keras_resnet.MODELS if name.startswith("resnet"))
    )
    def test_every_network_with_shortcuts_is_advised_by_its_name(self, name):
        spec = keras_resnet.MODELS[name]
        size = 7 if spec.stem == "imagenet" else 3
        is_v2 = name.endswith("v2")
        shapes = {"stem_conv/kernel": (size, size, 3, spec.filters[0])}
        channels = spec.filters[0]
        for s, (count, filters) in enumerate(
            zip(spec.units, spec.filters, strict=True), 1
        ):
            for unit in (f"stage{s}_unit{u + 1}" for u in range(count)):
                shapes[f"{unit}/conv1/kernel"] = (3, 3, channels, filters)
                normalized = channels if is_v2 else filters
                if unit != "stage1_unit1" or not is_v2:  # the stem's there
                    shapes[f"{unit}/norm1/gamma"] = (normalized,)
                channels = filters * (4 if spec.bottleneck else 1)
                if spec.bottleneck:
                    shapes[f"{unit}/conv3/kernel"] = (1, 1, filters, channels)
        arrays = {
            path: np.broadcast_to(np.float32(0), shape)
            for path, shape in shapes.items()
        }
        builder = name.replace("resnet", "ResNet").replace("v2", "V2")
        self.assertTrue(hasattr(keras_resnet, builder))
        self.assertStartsWith(
            advice.advice(arrays), f"It would fit keras_resnet.{builder}("
        )

    def test_two_arrays_for_one_weight_are_an_error(self):
        arrays = state_dict(small())
        arrays["linear.weight"] = arrays["fc.weight"]
        path = self.path(safetensors(arrays))
        self.assert_refused(
            untouched(), path, "one array for predictions/kernel, received two"
        )


if __name__ == "__main__":
    absltest.main()
