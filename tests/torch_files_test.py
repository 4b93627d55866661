"""Torch checkpoints: the pickles that `torch.load(weights_only=True)` takes."""

import collections
import io
import os
import random
import zipfile

import numpy as np
from absl.testing import absltest
from absl.testing import parameterized

from keras_resnet import weights
from keras_resnet.weights import files
from tests import weight_files
from tests.weight_files import Call
from tests.weight_files import Malicious
from tests.weight_files import Storage
from tests.weight_files import Tensor
from tests.weight_files import WeightsTestCase
from tests.weight_files import torch_legacy
from tests.weight_files import torch_zip

VALUES = np.arange(6, dtype="float32").reshape(2, 3)


def untyped(key):
    """A tensor of torch.uint16 or another dtype without a storage class."""
    tensor = Tensor(np.zeros(4, "uint8"), key)
    call = Call(
        weight_files._rebuild_tensor_v3,
        *(Storage(tensor), 0, (2,), (1,), False, None, weight_files.FLOAT32),
    )
    return call, tensor


class TrainingProgramsTest(WeightsTestCase):
    """Values that a training program keeps beside the tensors."""

    @parameterized.product(
        write=(torch_zip, torch_legacy),
        protocol=(2, 4),
        beside=(
            collections.Counter({30: 1, 60: 1}),
            collections.Counter(),
            collections.OrderedDict([(("a", 1), 2.5), (None, True)]),
            weight_files.Size((2, 3)),
            weight_files.Size(),
            weight_files.Device(),
            weight_files.FLOAT32,
            {weight_files.FLOAT32: 1, 0.5: 2, b"key": 3},
            {1, 2, "three"},
            set(),
            b"bytes",
            b"",
            bytearray(b"bytes"),
            1 + 2j,
            (2**200, -(2**63), 10**300, float("nan")),
            random.Random(0).getstate(),
            Call(weight_files._get_layout, "torch.strided"),
        ),
    )
    def test_values_beside_a_state_dict_are_accepted(
        self, write, protocol, beside
    ):
        tensor = Tensor(VALUES, "0")
        checkpoint = {
            "scheduler": {"milestones": beside, "list": [beside, {1: beside}]},
            "state_dict": {"conv1.weight": tensor, "beside": beside},
            "beside": beside,
        }
        path = self.path(write(checkpoint, [tensor], protocol))
        arrays = files.read(path)
        self.assertEqual(list(arrays), ["conv1.weight"])
        np.testing.assert_array_equal(arrays["conv1.weight"], VALUES)

    @parameterized.product(
        write=(torch_zip, torch_legacy),
        wrap=(
            lambda tensor: Call(
                weight_files._rebuild_parameter,
                *(tensor, True, collections.OrderedDict()),
            ),
            lambda tensor: Call(
                weight_files._rebuild_parameter_with_state,
                *(tensor, True, collections.OrderedDict(), {"name": "x"}),
            ),
            lambda tensor: Call(
                weight_files._rebuild_from_type_v2,
                weight_files._rebuild_tensor_v2,
                weight_files.FLOAT32,
                tensor.__reduce__()[1],
                {"attribute": 1},
            ),
        ),
    )
    def test_parameters_and_subclasses_are_tensors(self, write, wrap):
        tensor = Tensor(VALUES, "0")
        path = self.path(write({"conv1.weight": wrap(tensor)}, [tensor]))
        (array,) = files.read(path).values()
        np.testing.assert_array_equal(array, VALUES)

    @parameterized.parameters(torch_zip, torch_legacy)
    def test_tensors_of_other_dtypes_may_lie_beside(self, write):
        tensor = Tensor(VALUES, "0")
        complex_tensor = Tensor(np.zeros(3, "complex64"), "1")
        other, other_tensor = untyped("2")
        optimizer = [complex_tensor, other]
        checkpoint = {"model": {"w": tensor}, "optimizer": optimizer}
        data = write(checkpoint, [complex_tensor, other_tensor, tensor])
        (array,) = files.read(self.path(data)).values()
        np.testing.assert_array_equal(array, VALUES)

    def test_tensors_of_a_state_dict_are_dense_and_real(self):
        tensor, model = Tensor(VALUES, "0"), weight_files.untouched()
        sparse = Call(weight_files._rebuild_sparse_tensor, None, ())
        complex_tensor = Tensor(np.zeros(3, "complex64"), "1")
        other, other_tensor = untyped("2")
        tensors = [tensor, complex_tensor, other_tensor]
        for value in (sparse, complex_tensor, other):
            state = {"conv1.weight": tensor, "fc.weight": value}
            self.assert_refused(
                model,
                self.path(torch_zip(state, tensors)),
                "'fc.weight' must be a dense tensor of real numbers, received",
            )


class RefusalTest(WeightsTestCase):
    """Everything else is rejected, and nothing runs."""

    @parameterized.product(
        write=(torch_zip, torch_legacy),
        wrap=(
            lambda harm: {"epoch": {harm}},
            lambda harm: collections.Counter({"a": harm}),
            lambda harm: weight_files.Size((1, harm)),
            lambda harm: Call(weight_files._rebuild_parameter, harm, True, {}),
            lambda harm: Call(
                weight_files._rebuild_from_type_v2, harm, None, (), {}
            ),
            lambda harm: {(1, harm): 2},
        ),
    )
    def test_code_beside_the_tensors_is_rejected_and_not_run(self, write, wrap):
        harm = os.path.join(self.folder(), "harm")
        tensor = Tensor(VALUES, "0")
        checkpoint = {"state_dict": {"w": tensor}, "x": wrap(Malicious(harm))}
        path = self.path(write(checkpoint, [tensor]))
        self.assert_refused(
            weight_files.untouched(), path, "system; nothing was run"
        )
        self.assertFalse(os.path.exists(harm))

    @parameterized.parameters(
        (np.float64(0.5), "received numpy"),  # as torch rejects it
        (frozenset([1]), r"received (builtins\.frozenset|FROZENSET)"),
        (collections.defaultdict(list), r"received collections\.defaultdict"),
        (2**4000, "received LONG4"),
    )
    def test_values_that_torch_rejects_are_rejected(self, value, message):
        tensor = Tensor(VALUES, "0")
        for protocol in (2, 4):
            checkpoint = {"state_dict": {"w": tensor}, "beside": value}
            path = self.path(torch_zip(checkpoint, [tensor], protocol))
            self.assert_refused(weight_files.untouched(), path, message)

    @parameterized.parameters(
        (b"ctorch\nfloat32\n)R.", "must call functions of tensors alone"),
        (b"ctorch\nFloatStorage\n)\x81.", "must call functions of tensors"),
        (b"ccollections\nCounter\n)R(K\x01e.", "out of place"),
        (b")(K\x01\x90.", "out of place"),
        (b"ctorch._tensor\n_rebuild_from_type_v2\n(h\x00NN)tR.", ""),
        (
            b"ctorch._tensor\n_rebuild_from_type_v2\nq\x00(h\x00N)tR.",
            "must not nest",
        ),
        (b"ctorch\nSize\n(K\x01tR.", "out of place"),
        (b"ctorch\nfloat32;evil\n.", "must hold a state_dict"),
    )
    def test_damaged_pickles_are_one_line(self, program, message):
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("a/data.pkl", b"\x80\x02" + program)
        path = self.path(file.getvalue())
        text = self.assert_refused(weight_files.untouched(), path, message)
        self.assertNotIn("\n", text)

    def test_a_key_of_nested_tuples_ends(self):
        # Python hashes such a tuple in 2^60 steps.
        nested = b"()q\x00" + b"h\x00h\x00\x86q\x00" * 60 + b"t"
        tensor = Tensor(VALUES, "0")
        data = torch_zip({"w": tensor}, [tensor])
        path = self.path(data)
        with zipfile.ZipFile(path) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
        pickle = members["archive/data.pkl"]
        self.assertEndsWith(pickle, b"s.")
        members["archive/data.pkl"] = pickle[:-1] + nested + b"K\x01s."
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in members.items():
                archive.writestr(name, content)
        self.assertEqual(list(files.read(path)), ["w"])

    def test_a_checkpoint_without_a_state_dict_is_rejected(self):
        path = self.path(torch_zip({"epoch": 1, "best": {1, 2}}))
        with self.assertRaisesRegex(ValueError, "must hold a state_dict"):
            weights.load(weight_files.untouched(), path)


if __name__ == "__main__":
    absltest.main()
