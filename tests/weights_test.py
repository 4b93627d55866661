"""Weights from elsewhere: the same function, or one clear error."""

import base64
import collections
import contextlib
import dataclasses
import io
import json
import os
import pickle
import sys
import tempfile
import tracemalloc
import types
import unittest
import zipfile
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
from keras_resnet.weights import archives
from keras_resnet.weights import files

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

# The names that others give to `stage{s}_unit{u}/...`; u0 is u - 1.
SCHEMES = {
    "torchvision": {
        "stem_conv": "conv1",
        "stem_norm": "bn1",
        "conv": "layer{s}.{u0}.conv{k}",
        "norm": "layer{s}.{u0}.bn{k}",
        "shortcut/projection": "layer{s}.{u0}.downsample.0",
        "shortcut/norm": "layer{s}.{u0}.downsample.1",
        "predictions": "fc",
    },
    "cifar": {
        "stem_conv": "module.conv1",
        "stem_norm": "module.bn1",
        "conv": "module.layer{s}.{u0}.conv{k}",
        "norm": "module.layer{s}.{u0}.bn{k}",
        "shortcut/projection": "module.layer{s}.{u0}.shortcut.0",
        "shortcut/norm": "module.layer{s}.{u0}.shortcut.1",
        "predictions": "module.linear",
    },
    "pytorchcv": {
        "stem_conv": "features.init_block.conv",
        "stem_norm": "features.init_block.bn",
        "conv": "features.stage{s}.unit{u}.body.conv{k}.conv",
        "norm": "features.stage{s}.unit{u}.body.conv{k}.bn",
        "shortcut/projection": "features.stage{s}.unit{u}.identity_conv.conv",
        "shortcut/norm": "features.stage{s}.unit{u}.identity_conv.bn",
        "predictions": "output",
    },
    "transformers": {
        "stem_conv": "resnet.embedder.embedder.convolution",
        "stem_norm": "resnet.embedder.embedder.normalization",
        "conv": "resnet.encoder.stages.{s0}.layers.{u0}.layer.{k0}.convolution",
        "norm": "resnet.encoder.stages.{s0}.layers.{u0}.layer.{k0}"
        ".normalization",
        "shortcut/projection": "resnet.encoder.stages.{s0}.layers.{u0}"
        ".shortcut.convolution",
        "shortcut/norm": "resnet.encoder.stages.{s0}.layers.{u0}"
        ".shortcut.normalization",
        "predictions": "classifier.1",
    },
}
LEAVES = {
    "kernel": "weight",
    "bias": "bias",
    "gamma": "weight",
    "beta": "bias",
    "moving_mean": "running_mean",
    "moving_variance": "running_var",
}


def small(name="small", bottleneck=True, **kwargs):
    """A network of a few thousand weights, all of them random."""
    spec = keras_resnet.Spec(
        name,
        units=(1, 3),
        filters=(4, 8),
        bottleneck=bottleneck,
        stem="cifar",
        classes=3,
        image_size=8,
    )
    return randomized(keras_resnet.resnet(spec, **kwargs))


def randomized(model, seed=0):
    """Gives every weight a value of its own, those of norms near 1."""
    rng = np.random.default_rng(seed)
    for variable in model.weights:
        values = rng.normal(0.0, 0.1, variable.shape)
        if variable.name in ("gamma", "moving_variance"):
            values = rng.uniform(0.5, 1.5, variable.shape)
        elif variable.name == "kernel":
            values *= 10 / np.sqrt(np.prod(variable.shape[:-1]))
        variable.assign(values)
    return model


def values(model):
    return {variable.path: variable.numpy() for variable in model.weights}


def torch_name(path, scheme):
    """The name in a scheme of one of our weight paths."""
    layer, leaf = path.rsplit("/", 1)
    names = SCHEMES[scheme]
    if not layer.startswith("stage"):
        return f"{names[layer]}.{LEAVES[leaf]}"
    unit, layer = layer.split("/", 1)
    s, u = (int(part.lstrip("stageuni")) for part in unit.split("_"))
    k = int(layer[-1]) if layer[-1].isdecimal() else 0
    name = names[layer.rstrip("0123456789")]
    numbers = {"s": s, "u": u, "k": k, "s0": s - 1, "u0": u - 1, "k0": k - 1}
    return f"{name.format(**numbers)}.{LEAVES[leaf]}"


def state_dict(model, scheme="torchvision"):
    """The weights of a model as torch would name and lay them out."""
    state = collections.OrderedDict()
    for path, value in values(model).items():
        if value.ndim == 4:
            value = value.transpose(3, 2, 0, 1)
        state[torch_name(path, scheme)] = np.ascontiguousarray(
            value.T if value.ndim == 2 else value
        )
        if path.endswith("moving_variance"):
            count = torch_name(path, scheme).replace(
                "running_var", "num_batches_tracked"
            )
            state[count] = np.int64(5)
    return state


def safetensors(arrays):
    """The bytes of a safetensors file."""
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for name, array in arrays.items():
        array = np.asarray(array)
        header[name] = {
            "dtype": {"f": "F", "i": "I"}[array.dtype.kind]
            + str(8 * array.itemsize),
            "shape": list(array.shape),
            "data_offsets": [len(data), len(data) + array.nbytes],
        }
        data += array.tobytes()
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def torch_module(name, *classes):
    """A stand-in for a module of torch, so that pickle writes its names."""
    module = types.ModuleType(name)
    for part in classes:
        part.__module__ = name
        setattr(module, part.__name__, part)
    return module


class FloatStorage:
    pass


class LongStorage:
    pass


def _rebuild_tensor_v2(*arguments):
    raise AssertionError("a pickle was run")


class Tensor:
    """Pickles as a torch tensor does."""

    def __init__(self, array, key, length=None, strides=None, shape=None):
        self.array = np.asarray(array)
        self.key = key
        self.length = self.array.size if length is None else length
        self.shape = self.array.shape if shape is None else shape
        self.strides = strides or tuple(
            stride // self.array.itemsize for stride in self.array.strides
        )

    def __reduce__(self):
        hooks = collections.OrderedDict()
        arguments = (self, 0, self.shape, self.strides, False, hooks)
        return _rebuild_tensor_v2, (Storage(self), *arguments[1:])


class Storage:
    def __init__(self, tensor):
        self.tensor = tensor


class Pickler(pickle.Pickler):
    def persistent_id(self, value):
        if not isinstance(value, Storage):
            return None
        is_float = value.tensor.array.dtype.kind == "f"
        kind = FloatStorage if is_float else LongStorage
        return ("storage", kind, value.tensor.key, "cpu", value.tensor.length)


def pickled(value, protocol=2):
    modules = {
        "torch": torch_module("torch", FloatStorage, LongStorage),
        "torch._utils": torch_module("torch._utils", _rebuild_tensor_v2),
    }
    file = io.BytesIO()
    with mock.patch.dict(sys.modules, modules):
        Pickler(file, protocol).dump(value)
    return file.getvalue()


def torch_zip(checkpoint, tensors=(), protocol=2):
    """The bytes of a file as torch saves it since 1.6."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", pickled(checkpoint, protocol))
        archive.writestr("archive/byteorder", "little")
        for tensor in tensors:
            data = tensor.array.tobytes()
            archive.writestr(f"archive/data/{tensor.key}", data)
    return file.getvalue()


def torch_legacy(checkpoint, tensors=(), protocol=2):
    """The bytes of a file as torch saved it before 1.6."""
    file = b"".join(
        pickled(value, protocol)
        for value in (
            0x1950A86A20F9469CFC6C,
            1001,
            {"protocol_version": 1001, "little_endian": True},
            checkpoint,
            [tensor.key for tensor in tensors],
        )
    )
    for tensor in tensors:
        file += tensor.length.to_bytes(8, "little") + tensor.array.tobytes()
    return file


def torch_file(arrays, write=torch_zip, wrap=lambda state: state):
    """A checkpoint of arrays, with one storage for each."""
    state = collections.OrderedDict(
        (name, Tensor(array, str(i)))
        for i, (name, array) in enumerate(arrays.items())
    )
    return write(wrap(state), list(state.values()))


class WeightsTestCase(parameterized.TestCase):
    def folder(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        return folder.name

    def path(self, data, name="weights"):
        path = os.path.join(self.folder(), name)
        if data is not None:
            with open(path, "wb") as file:
                file.write(data)
        return path

    def assert_weights_equal(self, model, other):
        expected = values(other)
        self.assertEqual(list(values(model)), list(expected))
        for path, value in values(model).items():
            np.testing.assert_array_equal(value, expected[path], path)

    def assert_refused(self, model, path, message):
        """`load` raises, and leaves every weight as it was."""
        before = values(model)
        with self.assertRaisesRegex(ValueError, message) as context:
            weights.load(model, path)
        for name, value in values(model).items():
            np.testing.assert_array_equal(value, before[name], name)
        return str(context.exception)


class OwnFilesTest(WeightsTestCase):
    @parameterized.product(
        ending=(".weights.h5", ".keras", ".h5"),
        kwargs=(
            {"shortcut": "B"},
            {"shortcut": "exclusive_gating", "bottleneck": False},
            {"shortcut": "dropout", "bottleneck": False},
            {"unit": "pre_activation", "survival_probability": 0.5},
        ),
    )
    def test_what_a_model_saved_is_loaded_into_another(self, ending, kwargs):
        saved, model = small(**kwargs), small(**kwargs)
        randomized(saved, seed=1)
        path = self.path(None, f"model{ending}")
        if ending == ".weights.h5":
            saved.save_weights(path)
        elif ending == ".keras":
            saved.save(path)
        else:
            with mock.patch("absl.logging.warning"):  # "legacy format"
                saved.save(path)
        weights.load(model, path)
        self.assert_weights_equal(model, saved)

    @parameterized.product(
        ending=(".weights.h5", ".keras", ".h5"),
        saved_looped=(True, False),
        shortcut=("A", "C", "shortcut_only_gating"),
    )
    def test_a_looped_network_and_an_unrolled_one_share_their_files(
        self, ending, saved_looped, shortcut
    ):
        kwargs = {"shortcut": shortcut, "bottleneck": False}
        saved = small(looped=saved_looped, **kwargs)
        randomized(saved, seed=1)
        path = self.path(None, f"model{ending}")
        if ending == ".weights.h5":
            saved.save_weights(path)
        else:
            with mock.patch("absl.logging.warning"):  # "legacy format"
                saved.save(path)
        x = np.random.default_rng(2).normal(size=(2, 8, 8, 3))
        for looped in (True, False):
            model = small(looped=looped, **kwargs)
            weights.load(model, path)
            np.testing.assert_allclose(model(x), saved(x), atol=1e-6)

    @parameterized.product(saved_p=(0.5, 1.0), looped=(True, False))
    def test_a_looped_network_is_loaded_without_its_stochastic_depth(
        self, saved_p, looped
    ):
        kwargs = {"bottleneck": False, "looped": True}
        saved = small(survival_probability=saved_p, **kwargs)
        randomized(saved, seed=1)
        path = self.path(None, "model.weights.h5")
        saved.save_weights(path)
        kwargs["looped"] = looped
        model = small(survival_probability=1.5 - saved_p, **kwargs)
        weights.load(model, path)
        x = np.random.default_rng(2).normal(size=(2, 8, 8, 3))
        np.testing.assert_allclose(model(x), saved(x), atol=1e-6)

    def test_weights_are_copied_between_looped_and_unrolled_networks(self):
        looped, unrolled = small(looped=True), small(looped=False)
        randomized(looped, seed=1)
        weights.copy(looped, unrolled)
        kernel = looped.get_layer("stage2_stack").stacked[0]
        np.testing.assert_array_equal(
            unrolled.get_layer("stage2_unit2").conv1.kernel, kernel[0]
        )
        again = small(looped=True)
        weights.copy(unrolled, again)
        self.assert_weights_equal(again, looped)

    def test_weights_of_another_network_are_not_copied(self):
        source, target = keras_resnet.ResNet20(), small()
        with self.assertRaisesRegex(ValueError, "'resnet20' does not fit"):
            weights.copy(source, target)

    def test_the_state_of_an_optimizer_is_left_aside(self):
        saved, model = small(), randomized(small(), seed=1)
        saved.compile("adam", "sparse_categorical_crossentropy")
        saved.fit(np.zeros((2, 8, 8, 3)), np.zeros(2), verbose=0)
        path = self.path(None, "model.keras")
        saved.save(path)
        weights.load(model, path)
        self.assert_weights_equal(model, saved)

    def test_a_builder_loads_a_path(self):
        path = self.path(None, "model.weights.h5")
        saved = randomized(keras_resnet.ResNet20())
        saved.save_weights(path)
        model = keras_resnet.ResNet20(weights=path)
        self.assert_weights_equal(model, saved)

    def test_a_file_with_a_classifier_fits_a_model_without_one(self):
        saved = randomized(small(), seed=1)
        model = small(include_top=False)
        path = self.path(None, "model.weights.h5")
        saved.save_weights(path)
        weights.load(model, path)
        expected = values(saved)
        for name, value in values(model).items():
            np.testing.assert_array_equal(value, expected[name])

    def test_a_file_of_bfloat16_is_read(self):
        policy = keras.config.dtype_policy()
        keras.config.set_dtype_policy("bfloat16")
        try:
            saved = small()
        finally:
            keras.config.set_dtype_policy(policy)
        path = self.path(None, "model.weights.h5")
        saved.save_weights(path)
        model = small()
        weights.load(model, path)
        for name, value in values(model).items():
            expected = values(saved)[name].astype("float32")
            np.testing.assert_array_equal(value, expected)

    def test_a_shortcut_of_ones_own_keeps_its_weights(self):
        class Scales(keras_resnet.layers.Shortcut):
            def build(self, x_shape, residual_shape):
                super().build(x_shape, residual_shape)
                for name in ("a", "b", "c"):
                    self.add_weight(shape=(2,), name=name)

            def call(self, x, residual):
                return self.matched(x, residual) + residual

        saved, model = (small(shortcut=Scales()) for _ in range(2))
        randomized(saved, seed=1)
        path = self.path(None, "model.weights.h5")
        saved.save_weights(path)
        weights.load(model, path)
        self.assert_weights_equal(model, saved)


def nested(*names, looped=False, top="top"):
    """A model with a network of each name, all of them the same but in weights.

    A name with a slash puts the network into one more model.
    """
    image = keras.Input((8, 8, 3))
    features = []
    for seed, name in enumerate(names):
        outer, _, inner = name.rpartition("/")
        network = keras_resnet.resnet(
            keras_resnet.Spec(
                "small", (1, 3), (4, 8), stem="cifar", image_size=8
            ),
            include_top=False,
            pooling="avg",
            input_shape=(8, 8, 3),
            looped=looped,
            name=inner,
        )
        randomized(network, seed=seed)
        if outer:
            network = keras.Sequential(
                [keras.Input((8, 8, 3)), network], name=outer
            )
        features.append(network(image))
    if len(features) > 1:
        features = [keras.layers.Concatenate()(features)]
    return keras.Model(image, keras.layers.Dense(3, name=top)(features[0]))


class NetworksInsideTest(WeightsTestCase):
    """Weights are known by the path in their own network."""

    def save(self, model, ending):
        path = self.path(None, f"model{ending}")
        with mock.patch("absl.logging.warning"):  # "legacy format"
            save = model.save_weights if "weights" in ending else model.save
            save(path)
        return path

    def check(self, model, source):
        x = np.random.default_rng(2).normal(size=(2, 8, 8, 3))
        expected = np.array(source(x))
        np.testing.assert_allclose(model(x), expected, atol=1e-5)

    @parameterized.parameters(
        (("left", "right"), ("left", "right")),
        (("left",), ("right",)),
        (("left",), ("deep/right",)),
        (("a/left", "b/left"), ("a/left", "b/left")),
    )
    def test_each_network_gets_its_own_weights(self, names, others):
        source = randomized(nested(*names), seed=9)
        files = [self.save(source, e) for e in (".weights.h5", ".keras")]
        if "/" not in names[0]:  # such files leave out the names inside
            files.append(self.save(source, ".h5"))
        for looped in (True, False):
            target = nested(*others, looped=looped)
            weights.copy(source, target)
            self.check(target, source)
            back = nested(*names)
            weights.copy(target, back)
            self.check(back, source)
            for path in files:
                target = nested(*others, looped=looped)
                weights.load(target, path)
                self.check(target, source)

    @parameterized.parameters(".weights.h5", ".keras", ".h5")
    def test_what_is_ambiguous_is_refused_with_the_way_out(self, ending):
        two, renamed = nested("left", "right"), nested("a", "b")
        one = two.get_layer("left")
        for source, target, message in (
            (two, renamed, r"received 2 \(left, right\) for 2 \(a, b\)"),
            (two, one, r"copy\(source.get_layer\('left'\), target\)"),
            (one, two, r"\(.*target.get_layer\('left'\)"),
        ):
            with self.assertRaisesRegex(ValueError, message):
                weights.copy(source, target)
            self.assert_refused(target, self.save(source, ending), message)

    def test_the_ways_out_work(self):
        source, target = nested("left", "right"), nested("a", "b")
        weights.copy(source.get_layer("left"), target.get_layer("a"))
        path = self.save(source.get_layer("right"), ".keras")
        weights.load(target.get_layer("b"), path)
        for ours, theirs in (("a", "left"), ("b", "right")):
            self.check(target.get_layer(ours), source.get_layer(theirs))

    def test_classifiers_inside_and_around_a_network_are_two(self):
        def model(name):
            image = keras.Input((8, 8, 3))
            network = small()
            network = keras.Model(network.input, network.output, name=name)
            top = keras.layers.Dense(3, name="predictions")
            return keras.Model(image, top(network(image)))

        source, target = randomized(model("a"), seed=9), model("b")
        weights.copy(source, target)
        self.check(target, source)
        target = model("b")
        weights.load(target, self.save(source, ".keras"))
        self.check(target, source)

    @parameterized.parameters(".weights.h5", ".keras", ".h5")
    def test_a_layer_around_may_have_a_name_that_torch_gives(self, ending):
        def model():
            image = keras.Input((8, 8, 1))
            x = keras.layers.Conv2D(3, 1, name="conv1")(image)
            x = nested("base").get_layer("base")(x)
            return keras.Model(image, keras.layers.Dense(2, name="fc")(x))

        source, target = randomized(model(), seed=9), model()
        weights.load(target, self.save(source, ending))
        x = np.ones((1, 8, 8, 1))
        np.testing.assert_allclose(target(x), source(x), atol=1e-5)

    def test_a_network_of_keras_applications_inside_a_model_is_found(self):
        def model(builder, **kwargs):
            image = keras.Input((32, 32, 3))
            base = builder(
                weights=None,
                include_top=False,
                pooling="avg",
                input_shape=(32, 32, 3),
                **kwargs,
            )
            return keras.Model(
                image, keras.layers.Dense(2, name="fc")(base(image))
            )

        theirs = model(keras.applications.ResNet50)
        ours = model(
            keras_resnet.ResNet50, name="ours", batch_norm_epsilon=1.001e-5
        )
        x = np.random.default_rng(2).normal(size=(1, 32, 32, 3))
        for ending in (".weights.h5", ".h5"):
            weights.load(ours, self.save(theirs, ending))
            np.testing.assert_allclose(ours(x), theirs(x), rtol=1e-3, atol=1e-4)

    def test_torch_names_behind_the_name_of_a_module(self):
        left, right = small(), randomized(small(), seed=1)
        arrays = {
            f"module.{name}.{path}": array
            for name, network in (("query", left), ("key", right))
            for path, array in state_dict(network).items()
        }
        image = keras.Input((8, 8, 3))
        towers = [
            keras.Model(network.input, network.output, name=name)
            for name, network in (
                ("query", randomized(small(), seed=5)),
                ("key", randomized(small(), seed=6)),
            )
        ]
        both = keras.Model(image, [tower(image) for tower in towers])
        path = self.path(safetensors(arrays))
        weights.load(both, path)
        self.check(towers[0], left)
        self.check(towers[1], right)
        self.assert_refused(small(), path, r"2 \(.*\) for 1")
        one = {k: v for k, v in arrays.items() if ".key." in k}
        model = small()
        weights.load(model, self.path(safetensors(one)))
        self.check(model, right)


class KerasApplicationsTest(WeightsTestCase):
    """Given the same weights, keras.applications' ResNet50 and ours agree."""

    def check(self, theirs, path, x=None, builder="ResNet50", **kwargs):
        ours = getattr(keras_resnet, builder)(
            weights=path,
            input_shape=theirs.input_shape[1:],
            batch_norm_epsilon=1.001e-5,
            **kwargs,
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
        theirs = randomized(
            keras.applications.ResNet50(
                weights=None,
                input_shape=(64, 64, 3),
                classes=10,
                classifier_activation=None,  # a softmax would hide errors
            )
        )
        for ending in (".weights.h5", ".keras", ".h5"):
            path = self.path(None, f"model{ending}")
            save = theirs.save_weights if "we" in ending else theirs.save
            with mock.patch("absl.logging.warning"):  # "legacy format"
                save(path)
            self.check(theirs, path, classes=10, classifier_activation=None)

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
        self.assert_refused(small(), path, "V2 networks have another layout")

    def test_published_files_are_asked_for_by_keras_own_names_and_hashes(self):
        with mock.patch.object(keras.utils, "get_file") as get_file:
            weights.imagenet_file("resnet50", include_top=False)
        (name, address), options = get_file.call_args
        ending = "resnet50_weights_tf_dim_ordering_tf_kernels_notop.h5"
        self.assertEqual(name, ending)
        self.assertEndsWith(address, f"/keras-applications/resnet/{ending}")
        self.assertEqual(
            options["file_hash"], "4d473c1dd8becc155b73f8504c6f6626"
        )


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


class AdviceTest(WeightsTestCase):
    @parameterized.parameters(
        ("ResNet20", {}, "ResNet20", {"classes": 100}, "predictions/kernel has "
         r"shape \(64, 10\) in the file and \(64, 100\) in the model .*"
         r"ResNet20\(classes=10, shortcut='A'\) \(or 'none'"),
        ("ResNet32", {}, "ResNet20", {}, r"stage1_unit4/conv1/kernel .* no "
         r"place in the model .*ResNet32\(classes=10, shortcut='A'\)"),
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
        ("ResNet164", {}, "ResNet20", {}, r"ResNet164\(.*shortcut='B'"),
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
        model = getattr(keras_resnet, built)(**kwargs)
        text = self.assert_refused(model, path, message)
        self.assertIn(f"{path} does not fit the model '{model.name}'", text)

    def test_a_network_of_no_paper_is_described_by_a_spec(self):
        path = self.path(None, "other.weights.h5")
        saved = randomized(small(unit="pre_activation"), seed=1)
        saved.save_weights(path)
        text = self.assert_refused(keras_resnet.ResNet20(), path, "Spec")
        advice = text.partition("It would fit ")[2]
        model = eval(advice, {"keras_resnet": keras_resnet})
        weights.load(model, path)
        self.assert_weights_equal(model, saved)

    @parameterized.parameters(
        {"units": (2, 2, 2)},
        {"units": (12, 12, 12), "bottleneck": True},
        {"units": (4, 4, 4), "looped": True},
    )
    def test_advice_is_a_builder_only_where_it_is_that_network(
        self, looped=False, **fields
    ):
        """Neither of a depth that has none, nor of one with other units."""
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

    def test_two_arrays_for_one_weight_are_an_error(self):
        arrays = state_dict(small())
        arrays["linear.weight"] = arrays["fc.weight"]
        path = self.path(safetensors(arrays))
        self.assert_refused(small(), path, "two arrays for predictions/kernel")


class Malicious:
    """Makes a directory when a pickle of it is run."""

    def __init__(self, path, function=os.system):
        self.path, self.function = path, function

    def __reduce__(self):
        if self.function is os.system:
            return os.system, (f"mkdir {self.path}",)
        return self.function, (f"__import__('os').mkdir({self.path!r})",)


class RefusalTest(WeightsTestCase):
    """Files that are damaged, or meant to do harm."""

    @parameterized.product(
        write=(torch_zip, torch_legacy),
        protocol=(2, 4),
        function=(os.system, eval, exec),
        wrap=(
            lambda harm: harm,
            lambda harm: {"state_dict": {"conv1.weight": harm}},
            lambda harm: {"epoch": [1, (2, {"a": harm})], "state_dict": {}},
        ),
    )
    def test_a_pickle_with_code_is_refused_and_not_run(
        self, write, protocol, function, wrap
    ):
        harm = os.path.join(self.folder(), "harm")
        checkpoint = wrap(Malicious(harm, function))
        path = self.path(write(checkpoint, protocol=protocol))
        self.assert_refused(small(), path, r"refused: .*; nothing was run")
        self.assertFalse(os.path.exists(harm))
        # The same bytes do harm in Python's own unpickler.
        pickle.loads(pickled(checkpoint, protocol))
        self.assertTrue(os.path.exists(harm))

    def test_a_pickle_in_front_of_a_checkpoint_is_not_run_either(self):
        harm = os.path.join(self.folder(), "harm")
        for protocol in range(6):
            path = self.path(pickle.dumps(Malicious(harm), protocol))
            self.assert_refused(small(), path, "refused|no file of weights")
        self.assertFalse(os.path.exists(harm))

    def test_the_functions_of_a_tensor_cannot_be_altered(self):
        # GLOBAL and BUILD would set attributes of a function, for ever.
        data = (
            b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n"
            b"}X\x0c\x00\x00\x00__defaults__)sb."
        )
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("a/data.pkl", data)
        self.assert_refused(small(), self.path(file.getvalue()), "state_dict")

    def test_every_truncated_file_is_one_clear_error(self):
        model = small(bottleneck=False)
        h5 = self.path(None, "whole.weights.h5")
        model.save_weights(h5)
        with open(h5, "rb") as file:
            whole = [file.read()]
        arrays = state_dict(model)
        whole.append(safetensors(arrays))
        whole.append(torch_file(arrays))
        whole.append(torch_file(arrays, torch_legacy))
        for data in whole:
            weights.load(model, self.path(data))
            for share in (0, 0.001, 0.01, 0.1, 0.3, 0.6, 0.9, 0.999):
                path = self.path(data[: int(share * len(data))])
                self.assert_refused(
                    model, path, "cannot be read as weights|no file of weights"
                )

    def test_no_damaged_checkpoint_raises_anything_but_value_errors(self):
        model = small(bottleneck=False)
        arrays = state_dict(model)
        rng = np.random.default_rng(0)
        for data in (
            safetensors(arrays),
            torch_file(arrays),
            torch_file(arrays, torch_legacy),
        ):
            for _ in range(150):
                damaged = bytearray(data)
                for place in rng.integers(0, len(data) // 2, 3):
                    damaged[place] = rng.integers(256)
                with contextlib.suppress(ValueError):
                    files.read(self.path(bytes(damaged)))

    @parameterized.parameters(
        ({"length": 7}, "truncated"),
        ({"shape": (3, 3)}, "reaches beyond"),
        ({"strides": (3, 2)}, "reaches beyond"),
        ({"shape": (6, 10**9), "strides": (1, 0)}, "far more than its size"),
        ({"shape": (-1, 2)}, "makes no sense"),
        ({"shape": (2,)}, "longer"),
    )
    def test_a_tensor_stays_inside_its_storage(self, kwargs, message):
        tensor = Tensor(np.zeros((3, 2), "float32"), "0", **kwargs)
        for write in (torch_zip, torch_legacy):
            path = self.path(write({"conv1.weight": tensor}, [tensor]))
            if message == "truncated" and write is torch_legacy:
                continue  # there the length says how much is read
            self.assert_refused(small(), path, message)

    @parameterized.parameters(
        ("F32", [2], [0, 12], "room"),
        ("F32", [9], [0, 8], "another shape"),
        ("F32", [1], [4, 8], "room"),
        ("F32", [1], [0, 4], "after its end"),
        ("F32", [-2], [0, 8], "makes no sense"),
        ("F8", [8], [0, 8], "unknown dtype"),
        ("F32", None, [0, 8], "cannot be read"),
        ("F32", [2], None, "cannot be read"),
    )
    def test_a_safetensors_header_must_describe_its_data(
        self, dtype, shape, offsets, message
    ):
        entry = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        header = {"conv1.weight": entry}
        text = json.dumps(header).encode()
        data = len(text).to_bytes(8, "little") + text + bytes(8)
        self.assert_refused(small(), self.path(data), message)

    def test_a_header_cannot_be_longer_than_its_file(self):
        data = (2**62).to_bytes(8, "little") + b"{}" + bytes(8)
        self.assert_refused(small(), self.path(data), "header of")

    def test_a_file_cannot_claim_to_hold_far_more_than_its_size(self):
        path = self.path(None)
        with h5py.File(path, "w") as file:
            file.create_dataset(
                "stem_conv/stem_conv/kernel", (10**6, 10**6), chunks=(10, 10)
            )
        self.assert_refused(small(), path, "far more than its size")
        data = io.BytesIO()
        with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("archive/data.pkl", bytes(10**7))
        path = self.path(data.getvalue())
        self.assert_refused(small(), path, "far more than its size")

    @parameterized.parameters(
        ([10**4000] * 8,),
        ([1] * 100_000,),
        (["x" * 20],),
        ([True, 2],),
        ([2.0],),
        ([None],),
        ({"2": 1},),
        ("22",),
        ([10**18, 0],),
        ([-1, -2],),
    )
    def test_every_number_of_a_shape_is_checked_before_it_is_used(self, shape):
        entry = {"dtype": "F32", "shape": shape, "data_offsets": [0, 8]}
        text = json.dumps({"conv1.weight": entry}).encode()
        data = len(text).to_bytes(8, "little") + text + bytes(8)
        message = self.assert_refused(
            small(), self.path(data), "makes no sense"
        )
        self.assertLess(len(message), 500)
        if not isinstance(shape, list):
            return
        for kwargs in (
            {"shape": tuple(shape), "strides": (1,) * len(shape)},
            {"strides": tuple(shape) if 0 not in shape else (-1, 1)},
        ):
            tensor = Tensor(np.zeros((3, 2), "float32"), "0", **kwargs)
            for write in (torch_zip, torch_legacy):
                path = self.path(write({"conv1.weight": tensor}, [tensor]))
                # A protocol has no instruction for longer integers.
                self.assert_refused(
                    small(), path, "makes no sense|refused: no tensor needs"
                )

    @parameterized.parameters(
        ["0", "8"], [0.0, 8.0], [0, 10**300], [-8, 0], [0, 8, 8], [[0], 8]
    )
    def test_offsets_are_two_integers(self, *offsets):
        entry = {"dtype": "F32", "shape": [2], "data_offsets": offsets}
        text = json.dumps({"conv1.weight": entry}).encode()
        data = len(text).to_bytes(8, "little") + text + bytes(8)
        self.assert_refused(small(), self.path(data), "offsets")

    @parameterized.parameters(
        (b'{"a":' + b"[" * 10**5, "too deep"),
        (b'{"a":1,"a":2}', "one key twice"),
        (b'{"a":[1]}', "must have dtype"),
        (b'{"\xff":1}', "damaged"),
        (b'{"a":[' + b"[]," * 3 * 10**6 + b"[]]}", "too long for it"),
    )
    def test_a_header_is_small_json_of_entries(self, text, message):
        data = len(text).to_bytes(8, "little") + text + bytes(8)
        self.assert_refused(small(), self.path(data), message)

    def test_arrays_and_the_letters_of_their_names_are_few(self):
        entries = {
            f"a{i}": {
                "dtype": "F32",
                "shape": [1],
                "data_offsets": [4 * i, 4 * i + 4],
            }
            for i in range(files.MOST_ARRAYS + 1)
        }
        text = json.dumps(entries).encode()
        data = len(text).to_bytes(8, "little") + text + bytes(4 * len(entries))
        self.assert_refused(small(), self.path(data), "at most 20,000 arrays")
        tensor = Tensor(np.zeros(2, "float32"), "0")
        path = self.path(torch_zip({"\x1b" * 10**6: tensor}, [tensor]))
        message = self.assert_refused(small(), path, "1 to 256 letters")
        self.assertLess(len(message), 500)
        self.assertNotIn("\x1b", message)

    @parameterized.parameters(b"}" * 5_000, b"\x85" * 5_000)
    @mock.patch.object(files, "_MOST_INSTRUCTIONS", 4_000)
    def test_the_instructions_of_a_pickle_are_counted(self, instructions):
        data = b"\x80\x02)" + instructions + b"."
        path = self.path(data)
        self.assert_refused(small(), path, "instructions")
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", data)
        self.assert_refused(small(), path, "instructions")

    @mock.patch.object(files, "_MOST_INSTRUCTIONS", 50_000)
    def test_lists_that_a_pickle_copies_are_counted(self):
        pairs = b"]q\x00(" + b"X\x01\0\0\0kK\x01\x86" * 100 + b"e"
        data = b"\x80\x02" + pairs
        data += b"ccollections\nOrderedDict\nh\x00\x85R" * 1_000 + b"."
        self.assert_refused(small(), self.path(data), "instructions")

    @parameterized.parameters(
        ({"archive/../x": b""}, 0, "inside the archive"),
        ({"/x": b""}, 0, "inside the archive"),
        ({"x": b"x" * 100}, zipfile.ZIP_BZIP2, "stored or deflated"),
        ({"x": b"x" * 100}, zipfile.ZIP_LZMA, "stored or deflated"),
    )
    def test_members_of_an_archive_are_plain(self, members, method, message):
        path = self.path(None)
        with zipfile.ZipFile(path, "w", method) as archive:
            for name, content in members.items():
                archive.writestr(name, content)
        self.assert_refused(small(), path, message)

    def test_a_member_does_not_expand_beyond_its_declared_size(self):
        tensor = Tensor(np.zeros(2, "float32"), "0")
        path = self.path(torch_zip({"conv1.weight": tensor}, [tensor]))
        with zipfile.ZipFile(path) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
        (storage,) = (name for name in members if "/data/" in name)
        members[storage] = bytes(10**8)
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in members.items():
                archive.writestr(name, content)
            offset = archive.getinfo(storage).header_offset
        with open(path, "rb") as file:
            data = bytearray(file.read())
        entry = data.rfind(storage.encode()) - 46
        for at in (offset + 22, entry + 24):
            data[at : at + 4] = (8).to_bytes(4, "little")
        tracemalloc.start()
        self.addCleanup(tracemalloc.stop)
        self.assert_refused(small(), self.path(bytes(data)), "CRC")
        self.assertLess(tracemalloc.get_traced_memory()[1], 5e7)

    def test_a_directory_of_very_many_members_is_not_read(self):
        path = self.path(None)
        with zipfile.ZipFile(path, "w") as archive:
            for i in range(50):
                archive.writestr(f"{i:0200}", b"")
        with (
            mock.patch.object(archives, "_MOST_DIRECTORY_BYTES", 10_000),
            self.assertRaisesRegex(ValueError, "directory must be at most"),
        ):
            files.read(path)

    def hdf5(self, fill):
        path = self.path(None)
        with h5py.File(path, "w") as file:
            fill(file)
        return path

    @parameterized.named_parameters(
        ("deep", lambda f: f.create_group("g/" * 3_000), "at most 32 deep"),
        (
            "cycle",
            lambda f: f.create_group("a/b").__setitem__("a", f["a"]),
            "at most 32 deep",
        ),
        (
            "long name",
            lambda f: f.create_dataset("a/" + "n" * 60_000, data=1.0),
            "short names",
        ),
        (
            "empty shape",
            lambda f: f.create_dataset("a/b/c", (10**9, 0), "f"),
            "makes no sense",
        ),
        (
            "no shape",
            lambda f: f.create_dataset("a/b/c", data=h5py.Empty("f")),
            "makes no sense",
        ),
        (
            "dimensions",
            lambda f: f.create_dataset("a/b/c", data=np.ones([1] * 20)),
            "makes no sense",
        ),
        (
            "compressed",
            lambda f: f.create_dataset(
                "a/b/c", data=np.ones(100, "f"), compression="gzip"
            ),
            "h5repack",
        ),
        (
            "never written",
            lambda f: f.create_dataset("a/b/c", (10,), "f"),
            "never written",
        ),
        (
            "virtual",
            lambda f: f.create_virtual_dataset(
                "a/b/c", h5py.VirtualLayout((3,), "f")
            ),
            "another file",
        ),
        *(
            (
                f"dtype {number}",
                lambda f, dtype=dtype: f.create_dataset("a/b/c", (3,), dtype),
                "no numbers",
            )
            for number, dtype in enumerate(
                (
                    np.dtype([("a", "f4"), ("b", "i8")]),
                    h5py.vlen_dtype(np.float32),
                    h5py.string_dtype(),
                    h5py.ref_dtype,
                    np.dtype("V1000"),
                    np.dtype("c16"),
                    np.dtype(("f4", (1000,))),
                )
            )
        ),
    )
    def test_hdf5_is_checked_before_it_is_read(self, fill, message):
        text = self.assert_refused(small(), self.hdf5(fill), message)
        self.assertLess(len(text), 500)

    @parameterized.parameters("n" * 10**6, 3.5, [["a"]])
    def test_the_name_of_a_layer_is_a_short_text(self, name):
        path = self.path(None)
        with h5py.File(path, "w", libver="latest") as file:
            group = file.create_group("layers/x/vars")
            group["0"] = np.ones(3, "float32")
            group.attrs["name"] = name
        self.assert_refused(
            small(), path, "attribute name must be a short text"
        )

    def test_one_dataset_under_many_names_is_counted_each_time(self):
        def fill(file):
            array = file.create_dataset("a/b/0", data=np.ones(2**16, "float32"))
            for i in range(100):
                file[f"a/b/x{i}"] = array

        self.assert_refused(small(), self.hdf5(fill), "far more than its size")

    def test_a_heap_of_texts_ends(self):
        path = self.path(None, "own.weights.h5")
        small().save_weights(path)
        with open(path, "rb") as file:
            data = bytearray(file.read())
        heap = data.index(b"GCOL") + 16
        weights.load(small(), path)
        for length in (0, 2**64 - 16, 2**64 - 1, 2**40):
            damaged = bytearray(data)
            damaged[heap : heap + 8] = bytes(8)
            damaged[heap + 8 : heap + 16] = length.to_bytes(8, "little")
            self.assert_refused(small(), self.path(bytes(damaged)), "heap")
            damaged[heap] = 1
            if length:
                self.assert_refused(small(), self.path(bytes(damaged)), "heap")

    def test_members_of_hdf5_are_few(self):
        path = self.hdf5(
            lambda file: [file.create_group(f"a/{i}") for i in range(50)]
        )
        with (
            mock.patch.object(files, "_MOST_MEMBERS", 40),
            self.assertRaisesRegex(ValueError, "at most 40 members"),
        ):
            files.read(path)

    def test_stacks_hold_the_weights_of_few_units(self):
        path = self.hdf5(
            lambda file: file.create_dataset(
                "a/stage1_stack/0", data=np.zeros(2**20, "uint8")
            )
        )
        self.assert_refused(small(), path, "at most 20,000 arrays of units")

    def test_a_big_endian_array_is_read(self):
        value = np.arange(6, dtype=">f4")
        path = self.hdf5(lambda file: file.create_dataset("a/b/c", data=value))
        (array,) = files.read(path).values()
        np.testing.assert_array_equal(array, value)
        self.assertTrue(array.dtype.isnative)

    def test_what_is_no_regular_file_is_not_opened(self):
        pipe = os.path.join(self.folder(), "pipe")
        os.mkfifo(pipe)
        for path in (pipe, self.folder(), os.devnull):
            self.assert_refused(small(), path, "must be a regular file")

    def test_files_that_are_nearly_right_are_errors_too(self):
        path = self.path(None)
        small().save_weights(path + ".weights.h5")
        with h5py.File(path + ".weights.h5", "a") as file:
            del file["layers/dense/vars"].attrs["name"]
        self.assert_refused(small(), path + ".weights.h5", "no names of layers")
        with h5py.File(path, "w") as file:
            file["stem_conv/stem_conv/kernel"] = "text"
        self.assert_refused(small(), path, "no numbers")
        for entries, message in (
            ({"readme.txt": b""}, "neither model.weights.h5 nor"),
            ({"a/data.pkl": b"", "a/byteorder": b"big"}, "big-endian"),
        ):
            data = io.BytesIO()
            with zipfile.ZipFile(data, "w") as archive:
                for name, content in entries.items():
                    archive.writestr(name, content)
            self.assert_refused(small(), self.path(data.getvalue()), message)
        pickles = [0x1950A86A20F9469CFC6C, 1002, {"little_endian": True}]
        data = b"".join(pickle.dumps(value, 2) for value in pickles)
        self.assert_refused(small(), self.path(data), "version is not 1001")
        data = pickle.dumps({"conv1.weight": [1.0]}, 2)
        self.assert_refused(small(), self.path(data), "none that torch")

    def test_data_outside_the_file_are_not_looked_at(self):
        outside = self.path(bytes(1000), "outside")
        path = self.path(None)
        with h5py.File(path, "w") as file:
            file.create_dataset(
                "stem_conv/stem_conv/kernel",
                (3, 3, 3, 4),
                "float32",
                external=[(outside, 0, 432)],
            )
        self.assert_refused(small(), path, "refers to another file")
        other = self.path(None)
        small().save_weights(other + ".weights.h5")
        with h5py.File(path, "w") as file:
            file["layers"] = h5py.ExternalLink(other + ".weights.h5", "layers")
        self.assert_refused(small(), path, "none of a residual network")

    @parameterized.parameters(
        b"", b"x", b"{}", b"\x80", b"PK\x03\x04", bytes(9)
    )
    def test_what_is_no_file_of_weights_is_an_error(self, data):
        self.assert_refused(
            small(), self.path(data), "no file of weights|cannot be read"
        )

    def test_a_file_that_does_not_exist_is_not_found(self):
        with self.assertRaises(FileNotFoundError):
            weights.load(small(), self.path(None))


class PublicWeightsTest(WeightsTestCase):
    def test_a_public_resnet20_makes_its_827_errors_on_cifar10(self):
        data = os.environ.get("KERAS_RESNET_DATA", "")
        path = os.path.join(data, "weights", "resnet20-12fca82f.th")
        if not data or not os.path.exists(path):
            raise unittest.SkipTest("KERAS_RESNET_DATA has no such weights")
        import tensorflow_datasets as tfds

        model = keras_resnet.ResNet20(
            weights=path, shortcut=keras_resnet.layers.OptionA(zeros="both")
        )
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
