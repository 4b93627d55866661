"""Files of weights as other packages write them, for the tests.

Torch is not needed: pickles are written with stand-ins for its modules.
"""

import collections
import functools
import io
import json
import os
import pickle
import sys
import tempfile
import types
import zipfile
from unittest import mock

import numpy as np
from absl.testing import parameterized

import keras_resnet
from keras_resnet import weights

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
    if bottleneck:  # as in torchvision, whose names most of the files have
        kwargs.setdefault("bottleneck_stride", "3x3")
    return randomized(keras_resnet.resnet(spec, **kwargs))


def keras_application(**kwargs):
    """A network of keras.applications' own layers, with fewer of them."""
    from keras.src.applications import resnet

    def stages(x):
        x = resnet.stack_residual_blocks_v1(x, 64, 1, stride1=1, name="conv2")
        return resnet.stack_residual_blocks_v1(x, 8, 2, name="conv3")

    return resnet.ResNet(
        stages, preact=False, use_bias=True, weights=None, **kwargs
    )


def like_keras_application(name="like", weights=None, **kwargs):
    """The network of this package with the layout of `keras_application`."""
    spec = keras_resnet.Spec(name, (1, 2), (64, 8), bottleneck=True)
    return keras_resnet.resnet(
        spec, weights=weights, batch_norm_epsilon=1.001e-5, **kwargs
    )


@functools.cache
def untouched():
    """One network for all files that are rejected: none changes its weights."""
    return small()


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


class ComplexFloatStorage:
    pass


class UntypedStorage:
    pass


class Size(tuple):
    def __reduce__(self):
        return Size, (tuple(self),)


class Device:
    """Pickles as torch.device does."""

    def __reduce__(self):
        return Device, ("cuda", 0)


class Dtype:
    """Pickles as torch.float32 does."""

    def __reduce__(self):
        return "float32"


FLOAT32 = Dtype()


def _never(*arguments):
    raise AssertionError("a pickle was run")


def _rebuild_tensor_v2(*arguments):
    _never()


def _rebuild_tensor_v3(*arguments):
    _never()


def _rebuild_sparse_tensor(*arguments):
    _never()


def _rebuild_parameter(*arguments):
    _never()


def _rebuild_parameter_with_state(*arguments):
    _never()


def _rebuild_from_type_v2(*arguments):
    _never()


def _get_layout(*arguments):
    _never()


class Call:
    """Pickles as a call of a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


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
        tensor = value.tensor
        kinds = {
            "f": FloatStorage,
            "i": LongStorage,
            "c": ComplexFloatStorage,
            "u": UntypedStorage,
        }
        kind = kinds[tensor.array.dtype.kind]
        return ("storage", kind, tensor.key, "cpu", tensor.length)


def pickled(value, protocol=2):
    """Returns the pickle that torch writes of a value."""
    torch = torch_module(
        *("torch", FloatStorage, LongStorage, ComplexFloatStorage, Size, Device)
    )
    # torch.device is a lower-case name, and torch.float32 an object.
    torch.device, torch.float32 = Device, FLOAT32
    Device.__name__ = Device.__qualname__ = "device"
    Dtype.__module__ = "torch"
    modules = {
        "torch": torch,
        "torch._utils": torch_module(
            "torch._utils",
            _rebuild_tensor_v2,
            _rebuild_tensor_v3,
            _rebuild_sparse_tensor,
            _rebuild_parameter,
            _rebuild_parameter_with_state,
        ),
        "torch._tensor": torch_module("torch._tensor", _rebuild_from_type_v2),
        "torch.storage": torch_module("torch.storage", UntypedStorage),
        "torch.serialization": torch_module("torch.serialization", _get_layout),
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


class Malicious:
    """Makes a directory when a pickle of it is run."""

    def __init__(self, path, function=os.system):
        self.path, self.function = path, function

    def __reduce__(self):
        if self.function is os.system:
            return os.system, (f"mkdir {self.path}",)
        return self.function, (f"__import__('os').mkdir({self.path!r})",)


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
