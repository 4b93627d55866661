"""Weights of other packages: the same function, or one clear error."""

import base64
import os
import unittest
import zlib
from unittest import mock

import h5py
import keras
import numpy as np
import pytest
from absl.testing import absltest
from absl.testing import parameterized

import keras_resnet
from keras_resnet import weights
from keras_resnet.weights import files
from tests.weight_files import SCHEMES
from tests.weight_files import WeightsTestCase
from tests.weight_files import keras_application
from tests.weight_files import like_keras_application
from tests.weight_files import randomized
from tests.weight_files import safetensors
from tests.weight_files import small
from tests.weight_files import state_dict
from tests.weight_files import torch_file
from tests.weight_files import torch_legacy
from tests.weight_files import torch_zip
from tests.weight_files import untouched
from tests.weight_files import values

# What torch 2.13 and safetensors 0.8 themselves wrote of the tensors below
# (of a strided view, of a parameter, next to an optimizer's state).
ZIP = (
    "eNqlVstvG0UYHz9iu05wklIICSSU8nIgdfx2nKRxspRN6RaamodWlYrZ2BN7xdrrb3ccoJKlSF"
    "UC/AnlgPgvELdIvfbSS8UBqZWQQJxA4oLEhXk47u5GrkUy8ezam/k9vpnv+7RbSiCIUCSCjo0J"
    "dBZpVrWh7+LFmka0RPtzQ5Zi6KZr7Pm7gOLqCAXgtlltgE8JqJQRbWObgH9z/ZPHnE2N0otNNI"
    "IrNb1KIFCtmoaBq0Q3W3b0ulXDFq5dpv+JQnC+DCNxNcwBll7DNQhViUmtJCodoht2tGLh7Y5u"
    "1CoEt2zTquymoxCOH0FMS6tjiAhIVDZMjXwoHkbhjOqja5IQVQP0Xm13YFQZIzB2Q/EpfiVwAM"
    "/QL8EDiH3bYDbGCUyUYVI9Qxe3NUtrYoItODvATX9FFJ5tUD+NSEPopeBcY1TxE3juhoIU/z48"
    "r/j2YUpovEBgugwz3/AfL34NL5VhVmXnsb3DrKfyMCfIegFJsnjcj+llrpGG80LjFa6h+A7gAo"
    "2F3l4VOq8ReL0Mb/CjqpqdFoE3XbzXzFa9zxnnnBmYp5w+Am9Rzvl5wfM2gYUyXOSH3NCMHUi4"
    "aK7QR32aRU6ThaSgSTFrNPI0u2QEXZZArgz5ThcKfJsrdAc1lm+w1IWiynIHlruwwg93F1s2TR"
    "hYVXy2bW9zgNkmelO/Tc/lUhfWRCryRINSF9YV1IUN7qIJkutQcvCO2LDLvUN5l7mShatNAlfK"
    "8J5tqyG6tG6ZnbYNV2+B0oVrcdVPnxkWvL9Z+ukuG9/xVfz4bfjgFlxXkNbROp3ElhKOrN7Fd+"
    "ZotrG5NbDaptBsv9oSO6bV1EilF60sTXuKzjFSTOLHP3+5w0Jic7DEDCo8keiVSUUz9HqriVtE"
    "ljKDVQaPfJYZKH0Bf7BN8T/VwCQq9Q1sf0WwyapellZOons0DJ0QAzMP+5d+nWbHEHqqhxhac3"
    "W1xaQsLZ/CgGDdK9HLOv3QuUfnD3Qe0vmYTrRBeymd5+lMbjCnX3Z31pKsDQ1xes7tNCVLE+i4"
    "/iHTPmS8ywuP7jOiyBDeVTdvWpaWTrwDqLTOtYN/tTDrCMEh2utu7YwsrZ7m+G+Ge8zMQ/vh7+"
    "YJ4s+eKn6e/1d/a342PP9jSHIr52Rp7VTRH+WfiF9/dAEPj38crfRd9DtM4aQ2MlGm/OD7+sfD"
    "459D6ScNiG+AjS2ddqDbGnsNqOg1WUr8TyOpdH4ply9kivliPkv/0vlUKplfKrBRzBTy2VxxqZ"
    "BOZZjL2bF7n8apjzh36WNm+z6dXXrimHPve5AX7WzAUy5kK4AG9XUvibOJzrhIHjhJjnVuL4+z"
    "EU66eMpBdLwBe+HO7hRzwR8Gkad3erHODuTG7o14sCkv1tlB3Nifvdi0F+usfDf2o5AHm/Finb"
    "Xr0fVis16ss+Lc2HLYg815sc6aGXfrOrADcsWZynNu4QgaUmRbSii0cFSSgYt95Jjn/q9f3P+J"
    "HLWYEO+2f4+K3+JtYyQkMGN8vVj7H3xKxT4="
)
LEGACY = (
    "eNp1U0lv01AQtp2tdVsoO2Ute8ISGidtGrakpaSF14UGCflSWa7zWhu5ccZ+rgSSpVxaCv8AxI"
    "Ejf4Fbf0qv/AQkDsyzk6gpYeR59hvPzDdrS/os23++VX+Pv/vxeizbkpZ+xfAMQEiro4IgNF2H"
    "OYZja9vU9SynASIqqCP4x7YYs6lGG3VLb4C0p8ooZO+bVPOsD9SDWADxtJpAoWc6LoMEkdQY3q"
    "wGgySJq3Huw2lsQorEfb+DyfVp0zFMEEks1FmnHgNpvvL2QOAUwnhMZ1SrWwaDmIHR2dRgGJwn"
    "r7h16tL6HP6RIZ6pQSKtpkID16rTOiQN5riGmdV8ZtmerLl03bfsusZow3NcbVuRIZXumDiuvk"
    "lhIDKRq7ajszeRUIZB9RjqlArFkpKbzCulUr6kgBwmaDR9GCLDywyGV4lIJBLbhRH8iO/CsU8m"
    "D+o4g9EanFAHeYF1V9+ijLpw8j+xdTVkOGVidOaAeQh9Il8s5XPFnAKnzSEiIeqZVSIQaQfOEn"
    "EHzkWI5xmM1eDCXni5+BEu1eCyOsCru8HTyk3Blch1O9nZaiTu5nu1J99JJcfzHW8jXgsRibgL"
    "1zFPfN2IUG8yuFWD22FTDcfHxt/pQVnE9ncR0kcRpgrTkEEEERHuIkImE3m9x+B+DR6Ew2Hq9g"
    "Zke5wuoKjr9OERp4oyPQ0Tbac5HjbWSOFHPnJeYDBZgyk/gGLYHg0rr9d1psN0ACWVTyA8CuBx"
    "OCKdnXhCRM/z1kMDp8msLVwAF54G8Ky9AHxcoRxAhQgBzKgiyrZg9t9mhjEWSlja5+3SzrWb+Y"
    "LHWI1inGewUIOXnqcm0XDTdfymB6/WgASwmFYlvlcuLM2Xf37h9DXUCofIg+U1WCGC7uvhxq3x"
    "jeszSWK/4Zb6TUCsX9Pi/Yqe6JdlkmYloUP7ZX4MC4epxWUVfJBbyN+R95EPkIUZQRhFHkeemO"
    "n6KVf2xfZnqv3u3IWCJPTSXwxSQqM="
)
SAFETENSORS = (
    "eNp9zsEKgkAQBuDt1LVHiDnPQW2R6JJ2ELp1j5ApdynQFJ0OIUKP0qP4aM0GgWE0sDvMwPfv7i"
    "bqXS2kaWGYMmJKU1i1YMu6IIYVVAwdwqm8XdntM75XRtbbUANCcyY37Q8Ib1pa2xhuZOPh8iCu"
    "opok2NRDmyyCgQ3GeIl+6HTD9SUz2R+Li7H2Q9Se40ebl8R+OPSbROZhgD8O0B5q7QLOlNuvx7"
    "/sL6lRy8+7qfpUv3aXUg/pz0ipWSyz9F7OPFbrqFf6BblCcNc="
)
WRITTEN = {
    "strided": [[1.0, 5.0, 9.0], [2.0, 6.0, 10.0]],
    "parameter": [1.5, -2.0],
    "bfloat16": [[0.5], [-3.0]],
    "count": 7,
    "half": [0.25],
}


class KerasApplicationsTest(WeightsTestCase):
    """Given the same weights, keras.applications' ResNet50 and ours agree."""

    def check(self, theirs, path, x=None, builder="ResNet50", **kwargs):
        if isinstance(builder, str):
            builder = getattr(keras_resnet, builder)
        ours = builder(
            weights=path, input_shape=theirs.input_shape[1:], **kwargs
        )
        if x is None:
            x = np.random.default_rng(1).normal(0.0, 50.0, (2, 64, 64, 3))
        expected = np.array(theirs(x))
        np.testing.assert_allclose(
            ours(x), expected, rtol=0, atol=1e-5 * abs(expected).max()
        )
        self.assertGreater(expected.std(), 0.1 * abs(expected).max())

    def published(self, model):
        """A file of a model in the layout of those that are published.

        A group for each layer, and in it "conv1_conv/kernel:0" and so on.
        """
        path = self.path(None, "published.h5")
        with h5py.File(path, "w") as file:
            for layer in model.layers:
                group = file.create_group(layer.name)
                for weight in layer.weights:
                    name = f"{layer.name}/{weight.name}:0"
                    group.create_dataset(name, data=weight.numpy())
        return path

    @parameterized.product(
        builder=("ResNet50", "ResNet101", "ResNet152"), top=(True, False)
    )
    @pytest.mark.large
    def test_every_network_agrees_on_random_and_on_real_images(
        self, builder, top
    ):
        kwargs = {"include_top": top}
        kwargs |= {"classifier_activation": None} if top else {"pooling": "avg"}
        theirs = randomized(
            getattr(keras.applications, builder)(
                weights=None, input_shape=(224, 224, 3), **kwargs
            )
        )
        path = self.published(theirs)
        x = np.random.default_rng(1).normal(0.0, 50.0, (2, 224, 224, 3))
        self.check(theirs, path, x, builder, **kwargs)
        folder = os.path.join(os.environ.get("KERAS_RESNET_DATA", ""), "photos")
        if not os.path.isdir(folder):
            return
        photos = [
            keras.utils.img_to_array(
                keras.utils.load_img(
                    os.path.join(folder, name), target_size=(224, 224)
                )
            )
            for name in sorted(os.listdir(folder))[:4]
        ]
        x = keras_resnet.preprocess_input(np.stack(photos))
        self.check(theirs, path, x, builder, **kwargs)

    def test_files_with_a_classifier_in_every_format_of_keras(self):
        kwargs = {
            "classes": 10,
            "classifier_activation": None,  # a softmax would hide errors
        }
        theirs = randomized(
            keras_application(input_shape=(64, 64, 3), **kwargs)
        )
        for ending in (".weights.h5", ".keras", ".h5"):
            path = self.path(None, f"model{ending}")
            save = theirs.save_weights if "we" in ending else theirs.save
            with mock.patch("absl.logging.warning"):  # "legacy format"
                save(path)
            self.check(theirs, path, builder=like_keras_application, **kwargs)

    def test_a_file_without_a_classifier_in_the_published_layout(self):
        theirs = randomized(
            keras.applications.ResNet50(
                weights=None,
                input_shape=(64, 64, 3),
                include_top=False,
                pooling="avg",
            )
        )
        path = self.published(theirs)
        self.check(theirs, path, include_top=False, pooling="avg")

    def test_the_networks_called_v2_there_are_refused(self):
        path = self.path(None)
        with h5py.File(path, "w") as file:
            file["conv2_block1_preact_bn/conv2_block1_preact_bn/gamma:0"] = [1]
        self.assert_refused(untouched(), path, "V2 networks, .* another layout")


class TorchTest(WeightsTestCase):
    @parameterized.parameters(ZIP, LEGACY, SAFETENSORS)
    def test_files_that_torch_wrote_are_read_without_torch(self, text):
        data = zlib.decompress(base64.b64decode(text))
        arrays = files.read(self.path(data))
        self.assertCountEqual(arrays, WRITTEN)
        for name, value in WRITTEN.items():
            np.testing.assert_array_equal(arrays[name], value)
            self.assertEqual(arrays[name].shape, np.shape(value))

    @parameterized.product(
        scheme=tuple(SCHEMES),
        write=(safetensors, torch_zip, torch_legacy),
        bottleneck=(True, False),
    )
    @pytest.mark.slow
    def test_every_name_finds_its_weight(self, scheme, write, bottleneck):
        saved = randomized(small(bottleneck=bottleneck), seed=1)
        model = small(bottleneck=bottleneck)
        arrays = state_dict(saved, scheme)
        if write is safetensors:
            data = safetensors(arrays)
        else:
            data = torch_file(arrays, write)
        weights.load(model, self.path(data))
        self.assert_weights_equal(model, saved)

    @parameterized.parameters("state_dict", "model", "net")
    def test_a_state_dict_may_lie_in_the_dict_of_a_checkpoint(self, key):
        saved, model = randomized(small(), seed=1), small()
        data = torch_file(
            state_dict(saved),
            wrap=lambda state: {
                **{"epoch": 3, "arch": "resnet18", "accuracy": 0.5},
                "best_acc1": state["bn1.weight"],  # a tensor beside
                key: state,
            },
        )
        weights.load(model, self.path(data))
        self.assert_weights_equal(model, saved)

    def test_a_newer_pickle_protocol_is_understood(self):
        saved, model = randomized(small(), seed=1), small()
        data = torch_file(
            state_dict(saved),
            lambda state, tensors: torch_zip(state, tensors, protocol=4),
        )
        weights.load(model, self.path(data))
        self.assert_weights_equal(model, saved)

    def test_biases_of_convolutions_move_into_the_moving_means(self):
        saved, model = randomized(small(), seed=1), small()
        arrays = state_dict(saved)
        bias = np.arange(4.0, dtype="float32")
        arrays["layer1.0.conv2.bias"] = bias
        arrays["layer1.0.bn2.running_mean"] += bias
        weights.load(model, self.path(safetensors(arrays)))
        for name, value in values(model).items():
            np.testing.assert_allclose(value, values(saved)[name], atol=1e-6)

    def test_unknown_names_can_be_translated(self):
        saved, model = randomized(small(), seed=1), small()
        arrays = {f"x{name}": a for name, a in state_dict(saved).items()}
        path = self.path(safetensors(arrays))
        self.assert_refused(model, path, r"xconv1.weight, .* rename=")
        weights.load(model, path, rename=lambda name: name[1:])
        self.assert_weights_equal(model, saved)

    def test_a_translation_gives_no_two_arrays_one_name(self):
        state = state_dict(small())
        arrays = {f"model.{name}": a for name, a in state.items()}
        arrays |= {f"ema.{name}": a for name, a in state.items()}
        path = self.path(safetensors(arrays))
        model = small()
        with self.assertRaisesRegex(
            ValueError, r"does not fit .*: rename must .* for '\w+\..*' and for"
        ):
            weights.load(model, path, lambda name: name.partition(".")[2])

    def pre_activation_state(self, model):
        """Names of the usual pre-activation code: every unit has bn1."""
        state = state_dict(model)
        for leaf in ("weight", "bias", "running_mean", "running_var"):
            state[f"layer1.0.bn1.{leaf}"] = state.pop(f"bn1.{leaf}")
            state[f"bn.{leaf}"] = state.pop(f"final.{leaf}")
        return state

    def test_the_first_norm_of_a_pre_activation_bottleneck_is_the_stems(self):
        # The first unit projects, so that both of its paths are normalized.
        saved, model = (small(unit="pre_activation") for _ in range(2))
        randomized(saved, seed=1)
        with mock.patch.dict(SCHEMES["torchvision"], final_norm="final"):
            state = self.pre_activation_state(saved)
        weights.load(model, self.path(safetensors(state)))
        self.assert_weights_equal(model, saved)

    @parameterized.product(where=("unit", "both"), bottleneck=(True, False))
    def test_other_places_of_the_first_norm_are_an_argument(
        self, where, bottleneck
    ):
        kwargs = {"unit": "pre_activation", "bottleneck": bottleneck}
        saved, model = (small(first_norm=where, **kwargs) for _ in range(2))
        randomized(saved, seed=1)
        names = {"final_norm": "features.post_activ.bn"}
        with mock.patch.dict(SCHEMES["pytorchcv"], names):
            data = safetensors(state_dict(saved, "pytorchcv"))
        weights.load(model, self.path(data))
        self.assert_weights_equal(model, saved)
        if not (bottleneck and where == "unit"):  # there it is the stem's too
            other = small(**kwargs)
            advice = f"first_norm={where!r}"
            self.assert_refused(other, self.path(data), advice)


class PublicWeightsTest(WeightsTestCase):
    def test_a_public_resnet20_makes_its_827_errors_on_cifar10(self):
        data = os.environ.get("KERAS_RESNET_DATA", "")
        path = os.path.join(data, "weights", "resnet20-12fca82f.th")
        if not data or not os.path.exists(path):
            raise unittest.SkipTest("KERAS_RESNET_DATA has no such weights")
        import tensorflow_datasets as tfds

        model = keras_resnet.ResNet20(weights=path)
        mean, deviation = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
        errors = count = 0
        for images, labels in tfds.load(
            "cifar10",
            split="test",
            data_dir=os.path.join(data, "tfds"),
            download=False,
            as_supervised=True,
            batch_size=500,
        ):
            x = (images.numpy() / np.float32(255) - mean) / deviation
            p = np.array(model(x.astype("float32")))
            errors += int(np.sum(p.argmax(-1) != labels.numpy()))
            count += len(p)
        self.assertEqual((errors, count), (827, 10_000))


if __name__ == "__main__":
    absltest.main()
