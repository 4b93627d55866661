"""Weights by name, address and file: the function that was trained."""

import hashlib
import os
import warnings
import zipfile
from unittest import mock

import h5py
import keras
import numpy as np
from absl.testing import absltest
from absl.testing import parameterized

import keras_resnet
from keras_resnet import weights
from keras_resnet.layers import OptionA
from keras_resnet.weights import downloads
from keras_resnet.weights import published
from tests.weight_files import WeightsTestCase
from tests.weight_files import keras_application
from tests.weight_files import randomized
from tests.weight_files import state_dict
from tests.weight_files import torch_file

# --- A network of torchvision's names and form, in NumPy ---------------------


def convolve(x, kernel, stride=1):
    """Torch's convolution of [h, w, c] with [out, in, k, k], padded by k//2."""
    size = kernel.shape[-1]
    pad = size // 2
    x = np.pad(x, ((pad, pad), (pad, pad), (0, 0)))
    height = (x.shape[0] - size) // stride + 1
    width = (x.shape[1] - size) // stride + 1
    y = np.zeros((height, width, kernel.shape[0]))
    for i in range(height):
        for j in range(width):
            window = x[i * stride :, j * stride :][:size, :size]
            y[i, j] = np.einsum("hwc,ochw->o", window, kernel)
    return y


def normalize(x, state, name, epsilon=1e-5):
    mean, variance = state[f"{name}.running_mean"], state[f"{name}.running_var"]
    y = (x - mean) / np.sqrt(variance + epsilon)
    return y * state[f"{name}.weight"] + state[f"{name}.bias"]


def pool(x):
    """Largest value of 3x3 with stride 2, padded by 1."""
    x = np.pad(x, ((1, 1), (1, 1), (0, 0)), constant_values=-np.inf)
    size = (x.shape[0] - 3) // 2 + 1
    return np.array(
        [
            [x[2 * i : 2 * i + 3, 2 * j : 2 * j + 3].max((0, 1))
             for j in range(size)]
            for i in range(size)
        ]
    )  # fmt: skip


def torchvision(state, x, units, strides_3x3=True):
    """Logits of torchvision's ResNet with bottlenecks, from its state_dict."""
    x = normalize(convolve(x, state["conv1.weight"], 2), state, "bn1")
    x = pool(np.maximum(x, 0))
    for s, count in enumerate(units, 1):
        for u in range(count):
            name = f"layer{s}.{u}"
            stride = 2 if s > 1 and u == 0 else 1
            strides = (1, stride, 1) if strides_3x3 else (stride, 1, 1)
            residual = x
            for k, step in enumerate(strides, 1):
                residual = convolve(
                    residual, state[f"{name}.conv{k}.weight"], step
                )
                residual = normalize(residual, state, f"{name}.bn{k}")
                if k < 3:
                    residual = np.maximum(residual, 0)
            if f"{name}.downsample.0.weight" in state:
                x = convolve(x, state[f"{name}.downsample.0.weight"], stride)
                x = normalize(x, state, f"{name}.downsample.1")
            x = np.maximum(x + residual, 0)
    return state["fc.weight"] @ x.mean((0, 1)) + state["fc.bias"]


SPEC = keras_resnet.Spec("tiny", (1, 2), (4, 8), bottleneck=True, classes=5)
WIDE = keras_resnet.Spec(
    *("tiny_2", (1, 2), (4, 8)), bottleneck=True, classes=5, width=2
)
CIFAR = keras_resnet.Spec(
    *("cifar", (1, 2), (4, 8)), shortcut="A", stem="cifar", classes=5,
    image_size=16,
)  # fmt: skip


def built(spec, **kwargs):
    kwargs = {
        "input_shape": (spec.image_size if spec is CIFAR else 32,) * 2 + (3,),
        "classifier_activation": None,
        **kwargs,
    }
    return keras_resnet.resnet(spec, **kwargs)


class IndependentTest(WeightsTestCase):
    @parameterized.product(spec=(SPEC, WIDE), size=(32, 33))
    def test_a_file_of_torchvision_gives_its_logits_without_an_argument(
        self, spec, size
    ):
        state = state_dict(randomized(built(spec)))
        path = self.path(torch_file(state), "tiny.pth")
        x = np.random.default_rng(1).normal(size=(size, size, 3))
        with self.assertWarnsRegex(UserWarning, "bottleneck_stride='3x3'"):
            model = built(spec, weights=path, input_shape=(size, size, 3))
        expected = torchvision(state, x, spec.units)
        other = torchvision(state, x, spec.units, strides_3x3=False)
        np.testing.assert_allclose(
            model(x[None])[0], expected, atol=1e-4 * np.abs(expected).max()
        )
        self.assertGreater(np.abs(other - expected).max(), 1e-2)

    def test_a_file_of_keras_applications_has_its_stride_and_epsilon(self):
        theirs = randomized(
            keras_application(
                input_shape=(32, 32, 3), classes=5, classifier_activation=None
            )
        )
        path = self.path(None, "theirs.weights.h5")
        theirs.save_weights(path)
        spec = keras_resnet.Spec(
            *("like", (1, 2), (64, 8)), bottleneck=True, classes=5
        )
        ours = built(spec, weights=path)
        x = np.random.default_rng(2).normal(0, 50, (1, 32, 32, 3))
        expected = np.array(theirs(x))
        np.testing.assert_allclose(
            ours(x), expected, atol=1e-5 * np.abs(expected).max()
        )
        self.assertEqual(
            ours.get_layer("stage1_unit1").batch_norm_epsilon, 1.001e-5
        )
        self.assertEqual(weights.card(ours).preparation.order, "bgr")


class FilesTest(WeightsTestCase):
    """What a file leaves open is said, and what it decides is kept."""

    def torch(self, spec=SPEC, scheme="torchvision", **kwargs):
        state = state_dict(randomized(built(spec, **kwargs)), scheme)
        return self.path(torch_file(state), "file.pth")

    @parameterized.parameters("1x1", "3x3")
    def test_a_stride_that_is_given_is_taken_without_a_word(self, stride):
        model = built(SPEC, weights=self.torch(), bottleneck_stride=stride)
        self.assertEqual(
            model.get_layer("stage2_unit1").bottleneck_stride, stride
        )

    def test_a_warning_names_the_alternatives_and_the_caller(self):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            keras_resnet.ResNet164(
                weights=self.torch(keras_resnet.MODELS["resnet164"])
            )
        (warning,) = caught
        self.assertEqual(warning.filename, __file__)
        self.assertRegex(
            str(warning.message), "torchvision.*='3x3'.*='1x1' if .* Caffe"
        )

    def test_zeros_of_option_a_are_those_of_the_usual_code(self):
        path = self.torch(CIFAR, "cifar")
        arrays = state_dict(built(CIFAR), "cifar")
        self.assertIn("module.linear.weight", arrays)
        for shortcut in (None, "A", "A(zeros='both')"):
            model = built(CIFAR, weights=path, shortcut=shortcut)
            unit = model.get_layer("stage2_unit1")
            self.assertEqual(unit.shortcut.zeros, "both")
        for shortcut in ("A(zeros='end')", OptionA()):
            with self.assertRaisesRegex(
                ValueError, "shortcut=\"A.zeros='both'"
            ):
                built(CIFAR, weights=path, shortcut=shortcut)

    def test_zeros_that_the_names_leave_open_are_doubted(self):
        path = self.torch(CIFAR)
        with self.assertWarnsRegex(UserWarning, "both.*'end'.*fb.resnet.torch"):
            built(CIFAR, weights=path)
        for zeros in ("both", "end"):
            model = built(CIFAR, weights=path, shortcut=OptionA(zeros=zeros))
            unit = model.get_layer("stage2_unit1")
            self.assertEqual(unit.shortcut.zeros, zeros)

    def test_the_place_of_the_first_norm_is_read_from_the_names(self):
        spec = keras_resnet.Spec(
            *("v2", (1, 2), (4, 8)), stem="cifar", unit="pre_activation",
            classes=5, image_size=16,
        )  # fmt: skip
        for where in ("stem", "unit", "both"):
            saved = randomized(built(spec, first_norm=where))
            path = self.path(None, "own.weights.h5")
            saved.save_weights(path)
            self.assert_weights_equal(built(spec, weights=path), saved)

    def test_a_keras_file_has_its_function_and_its_card(self):
        kwargs = {"bottleneck_stride": "3x3", "batch_norm_epsilon": 1e-3}
        saved = randomized(built(SPEC, **kwargs))
        path = self.path(None, "own.keras")
        saved.save(path)
        model = built(SPEC, weights=path)
        x = np.random.default_rng(0).normal(size=(1, 32, 32, 3))
        np.testing.assert_allclose(model(x), saved(x), atol=1e-5)
        with self.assertRaisesRegex(ValueError, "trained with .*='3x3'"):
            built(SPEC, weights=path, bottleneck_stride="1x1")
        saved = keras_resnet.ResNet20(weights="cifar10")
        saved.save(path)
        model = keras_resnet.ResNet20(weights=path)
        self.assertEqual(weights.card(model), weights.card(saved))

    @parameterized.parameters(
        (SPEC, {"bottleneck_stride": "3x3", "padding": "same"}),
        (SPEC, {"batch_norm_epsilon": 1e-3}),
        (CIFAR, {"shortcut": "A(zeros='both')"}),
        (CIFAR, {"looped": True, "padding": "same"}),
    )
    def test_a_file_of_weights_has_its_function(self, spec, kwargs):
        saved = randomized(built(spec, **kwargs))
        path = self.path(None, "own.weights.h5")
        saved.save_weights(path)
        looped = {"looped": kwargs.get("looped")}
        model = built(spec, weights=path, **looped)
        size = spec.image_size if spec is CIFAR else 32
        x = np.random.default_rng(0).normal(size=(1, size, size, 3))
        np.testing.assert_allclose(model(x), saved(x), atol=1e-5)
        other = built(spec, **looped)
        with (
            warnings.catch_warnings(),
            self.assertRaisesRegex(ValueError, "of a network with"),
        ):
            warnings.simplefilter("ignore")  # Keras' own words about it
            other.load_weights(path)
        with self.assertWarnsRegex(UserWarning, "another function"):
            weights.load(other, path)
        again = built(spec, **kwargs)
        again.load_weights(path)
        np.testing.assert_array_equal(again(x), saved(x))
        image = keras.Input((size, size, 3))
        outer = keras.Sequential([image, saved])
        outer.save_weights(path)
        model = built(spec, weights=path, **looped)
        np.testing.assert_allclose(model(x), saved(x), atol=1e-5)

    @parameterized.parameters(
        *(b"[1]", b"{", b"\xff", b'{"padding": [1]}', b"[" * 5000),
        b'{"padding": "' + b"x" * 10_000 + b'"}',
    )
    def test_damaged_arguments_of_a_network_are_refused(self, text):
        path = self.path(None, "own.weights.h5")
        built(SPEC).save_weights(path)
        with h5py.File(path, "r+") as file:
            names = []
            file.visit(names.append)
            (name,) = (n for n in names if n.endswith("/network"))
            del file[name]
            file[name] = np.frombuffer(text, "uint8")
        with self.assertRaisesRegex(ValueError, "arguments of the network"):
            built(SPEC, weights=path)

    def test_a_damaged_configuration_of_a_keras_file_is_refused(self):
        """Its arrays are whole, and the checksum of the rest is not."""
        path = self.path(None, "own.keras")
        built(SPEC).save(path)
        with zipfile.ZipFile(path) as archive:
            start = archive.getinfo("config.json").header_offset + 100
        with open(path, "r+b") as file:
            file.seek(start)
            file.write(b"\xff" * 8)
        with self.assertRaisesRegex(
            ValueError, f"{path} cannot be read as weights: Bad CRC-32"
        ):
            built(SPEC, weights=path)

    def test_load_warns_about_a_model_of_another_function(self):
        model = built(SPEC)
        with self.assertWarnsRegex(
            UserWarning, "bottleneck_stride='3x3' and not '1x1'"
        ):
            weights.load(model, self.torch())
        weights.load(built(SPEC, bottleneck_stride="3x3"), self.torch())

    def test_a_published_file_is_known_by_its_hash(self):
        path = self.torch()
        with open(path, "rb") as file:
            digest = hashlib.sha256(file.read()).hexdigest()
        row = published.Card(
            "imagenet1k_v1", "tiny", "torchvision", digest=f"sha256:{digest}",
            details=published.Details(bottleneck_stride="3x3"), classes=5,
            url="https://example.com/tiny-00000000.pth",
        )  # fmt: skip
        with mock.patch.object(published, "_rows", lambda: (row,)):
            model = built(SPEC, weights=path)
            self.assertEqual(weights.card(model), row)
            with self.assertRaisesRegex(ValueError, "trained with .*'3x3'"):
                built(SPEC, weights=path, bottleneck_stride="1x1")
            with self.assertRaisesRegex(ValueError, "with shortcut='B'"):
                built(SPEC, weights=path, shortcut="C")
            with self.assertRaisesRegex(
                ValueError, "published weights of tiny"
            ):
                built(WIDE, weights=path)

    def test_a_published_name_with_another_hash_is_said(self):
        row = published.Card(
            "imagenet1k_v1", "tiny", "torchvision", digest="sha256:01234567",
            details=published.Details(bottleneck_stride="3x3"),
            url="https://example.com/file.pth",
        )  # fmt: skip
        with (
            mock.patch.object(published, "_rows", lambda: (row,)),
            self.assertWarnsRegex(UserWarning, "must start with 01234567"),
        ):
            model = built(SPEC, weights=self.torch())
        self.assertIsNone(weights.card(model).top1)


class AdaptedTest(WeightsTestCase):
    """Other classes and channels: the rest is loaded, and that is said."""

    def setUp(self):
        super().setUp()
        self.saved = randomized(built(SPEC))
        path = self.path(None, "own.weights.h5")
        self.saved.save_weights(path)
        self.file = path

    def test_other_classes_keep_a_new_classifier(self):
        with self.assertWarnsRegex(
            UserWarning, "predictions was not loaded: the file has 5 .* model 7"
        ):
            model = built(SPEC, weights=self.file, classes=7)
        for name in ("stem_conv", "stage2_unit2"):
            for ours, theirs in zip(
                model.get_layer(name).weights,
                self.saved.get_layer(name).weights,
                strict=True,
            ):
                np.testing.assert_array_equal(ours, theirs)
        self.assertEqual(model.output_shape, (None, 7))

    def test_a_file_of_other_classes_without_a_word_is_refused(self):
        path = self.path(None, "seven.weights.h5")
        built(SPEC, classes=7).save_weights(path)
        with self.assertRaisesRegex(ValueError, "classes=7"):
            built(SPEC, weights=path)

    @parameterized.parameters(1, 2, 4)
    def test_a_stem_of_other_channels_sees_the_sum_or_the_repetition(self, n):
        how = "summed" if n == 1 else "repeated"
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model = built(SPEC, weights=self.file, input_shape=(32, 32, n))
        text = str(caught[-1].message)
        self.assertIn(f"stem_conv/kernel was {how} for {n} channels", text)
        # Grey images, each channel the same, give what they gave.
        grey = np.random.default_rng(0).normal(size=(1, 32, 32, 1))
        expected = self.saved(np.repeat(grey, 3, -1))
        if n == 1:
            np.testing.assert_allclose(model(grey), expected, atol=1e-4)
        kernel = self.saved.get_layer("stem_conv").kernel.numpy()
        ours = model.get_layer("stem_conv").kernel.numpy()
        if n == 4:
            np.testing.assert_allclose(ours[:, :, 3], kernel[:, :, 0] * 0.75)
            np.testing.assert_allclose(ours[:, :, :3], kernel * 0.75)

    def test_another_size_and_no_top_load_in_silence(self):
        model = built(
            SPEC, weights=self.file, include_top=False,
            input_shape=(64, 48, 3), pooling="avg",
        )  # fmt: skip
        self.assertEqual(model.output_shape, (None, 32))


class NamesTest(WeightsTestCase):
    """Published files, here of random weights in a folder of weights."""

    def setUp(self):
        super().setUp()
        folder = self.folder()
        variables = {downloads.FOLDER_VARIABLE: folder}
        self.enter_context(mock.patch.dict(os.environ, variables))
        self.saved = randomized(keras_resnet.ResNet18())
        data = torch_file(state_dict(self.saved))
        with open(os.path.join(folder, "resnet18-f37072fd.pth"), "wb") as file:
            file.write(data)
        self.digest = hashlib.sha256(data).hexdigest()

    def rows(self):
        rows = [
            row
            if row.file_name != "resnet18-f37072fd.pth"
            else published.dataclasses.replace(
                row, digest=f"sha256:{self.digest[:8]}"
            )
            for row in published.rows()
        ]
        return mock.patch.object(published, "_rows", lambda: tuple(rows))

    def test_a_name_builds_the_network_and_the_card(self):
        with self.rows():
            for name in ("imagenet", "imagenet1k_v1"):
                model = keras_resnet.ResNet18(weights=name)
                self.assert_weights_equal(model, self.saved)
                self.assertEqual(weights.card(model).top1, 69.758)
            with self.assertWarnsRegex(UserWarning, "predictions was not"):
                model = keras_resnet.ResNet18(
                    weights="imagenet1k_v1", classes=3, input_shape=(64, 64, 3)
                )
            self.assertEqual(model.output_shape, (None, 3))
            with self.assertRaisesRegex(ValueError, "`classes` should be 1000"):
                keras_resnet.ResNet18(weights="imagenet", classes=3)

    def test_a_file_with_another_hash_is_not_read(self):
        with self.assertRaisesRegex(OSError, "must have the sha256 f37072fd"):
            keras_resnet.ResNet18(weights="imagenet")

    @parameterized.parameters(
        ("ResNet18", "imagenet1k_v2", {}, "exist for resnet50, resnet101"),
        ("ResNet20", "imagenet", {}, "exist for resnet50.*: resnet20"),
        ("ResNet32", "cifar10", {}, "exist for resnet20. Received: resnet32"),
        (
            *("ResNet50", "imagenet1k_v1", {"bottleneck_stride": "1x1"}),
            "trained with bottleneck_stride='3x3'. Received: .*='1x1'",
        ),
        (
            *("ResNet50", "imagenet1k_v2", {"padding": "same"}),
            "trained with padding='symmetric'",
        ),
        (
            *("ResNet20", "cifar10_akamaster", {"shortcut": "none"}),
            r"trained with shortcut=\"A\(zeros='both'\)\"",
        ),
    )
    def test_what_does_not_exist_or_fit_is_refused_before_a_download(
        self, builder, name, kwargs, message
    ):
        with (
            mock.patch.object(downloads, "get", side_effect=AssertionError),
            self.assertRaisesRegex(ValueError, message),
        ):
            getattr(keras_resnet, builder)(weights=name, **kwargs)

    def test_rows_of_keras_have_the_addresses_and_hashes_of_keras(self):
        row = published.find("resnet50", "imagenet", include_top=False)
        ending = "resnet50_weights_tf_dim_ordering_tf_kernels_notop.h5"
        self.assertEqual(row.file_name, ending)
        self.assertIn("/keras-applications/resnet/", row.url)
        self.assertEqual(row.digest, "md5:4d473c1dd8becc155b73f8504c6f6626")

    def test_every_row_is_of_a_network_with_what_it_needs(self):
        self.assertEqual(weights.list(), published.rows())
        self.assertEqual(weights.list("ResNet18"), published.rows("resnet18"))
        for row in weights.list():
            self.assertIn(row.network, keras_resnet.MODELS)
            self.assertRegex(row.digest, "^(sha256|md5):[0-9a-f]{8,64}$")
            self.assertTrue(row.licence)
            self.assertEqual(published.Card.from_json(row.to_json()), row)
            stem, _, digits = row.file_name.rpartition("-")
            if stem:
                self.assertEqual(row.digest, f"sha256:{digits[:8]}")
        with self.assertRaisesRegex(ValueError, "did you mean 'resnet50'"):
            weights.list("rsnet50")

    def test_every_network_has_at_most_one_default(self):
        for network in keras_resnet.MODELS:
            rows = [
                row
                for row in published.rows()
                if row.network == network and row.is_default and row.classes
            ]
            self.assertLessEqual(len(rows), 1)


if __name__ == "__main__":
    absltest.main()
