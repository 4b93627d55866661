"""Files of weights that are damaged, or meant to do harm."""

import contextlib
import io
import json
import os
import pickle
import tracemalloc
import zipfile
from unittest import mock

import h5py
import numpy as np
from absl.testing import absltest
from absl.testing import parameterized

from keras_resnet import weights
from keras_resnet.weights import bounds
from keras_resnet.weights import files
from tests.weight_files import Malicious
from tests.weight_files import Tensor
from tests.weight_files import WeightsTestCase
from tests.weight_files import pickled
from tests.weight_files import safetensors
from tests.weight_files import small
from tests.weight_files import state_dict
from tests.weight_files import torch_file
from tests.weight_files import torch_legacy
from tests.weight_files import torch_zip
from tests.weight_files import untouched

MORE_THAN_ITS_SIZE = "must have at most (16 times|[0-9,]+ bytes, received)"


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
        self.assert_refused(
            untouched(),
            path,
            "must hold a state_dict, received .*; nothing was run",
        )
        self.assertFalse(os.path.exists(harm))
        # The same bytes do harm in Python's own unpickler.
        pickle.loads(pickled(checkpoint, protocol))
        self.assertTrue(os.path.exists(harm))

    def test_a_pickle_in_front_of_a_checkpoint_is_not_run_either(self):
        harm = os.path.join(self.folder(), "harm")
        for protocol in range(6):
            path = self.path(pickle.dumps(Malicious(harm), protocol))
            self.assert_refused(
                untouched(), path, "nothing was run|must be a file of weights"
            )
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
        self.assert_refused(
            untouched(), self.path(file.getvalue()), "state_dict"
        )

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
                    model,
                    path,
                    "cannot be read as weights|must be a file of weights",
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
        ({"shape": (3, 3)}, "must lie inside"),
        ({"strides": (3, 2)}, "must lie inside"),
        ({"shape": (6, 10**9), "strides": (1, 0)}, MORE_THAN_ITS_SIZE),
        ({"shape": (-1, 2)}, "a shape must be"),
        ({"shape": (2,)}, "longer"),
    )
    def test_a_tensor_stays_inside_its_storage(self, kwargs, message):
        tensor = Tensor(np.zeros((3, 2), "float32"), "0", **kwargs)
        for write in (torch_zip, torch_legacy):
            path = self.path(write({"conv1.weight": tensor}, [tensor]))
            if message == "truncated" and write is torch_legacy:
                continue  # there the length says how much is read
            self.assert_refused(untouched(), path, message)

    @parameterized.parameters(
        ("F32", [2], [0, 12], "end at most at"),
        ("F32", [9], [0, 8], "must have 36 bytes"),
        ("F32", [1], [4, 8], "must start at byte 0"),
        ("F32", [1], [0, 4], "must end with the file"),
        ("F32", [-2], [0, 8], "a shape must be"),
        ("F8", [8], [0, 8], "dtype of .* must be one of"),
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
        self.assert_refused(untouched(), self.path(data), message)

    def test_a_header_cannot_be_longer_than_its_file(self):
        data = (2**62).to_bytes(8, "little") + b"{}" + bytes(8)
        self.assert_refused(
            untouched(), self.path(data), "header must have at most"
        )

    def test_a_file_cannot_claim_to_hold_far_more_than_its_size(self):
        path = self.path(None)
        with h5py.File(path, "w") as file:
            file.create_dataset(
                "stem_conv/stem_conv/kernel", (10**6, 10**6), chunks=(10, 10)
            )
        self.assert_refused(untouched(), path, MORE_THAN_ITS_SIZE)
        data = io.BytesIO()
        with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("archive/data.pkl", bytes(10**7))
        path = self.path(data.getvalue())
        self.assert_refused(untouched(), path, MORE_THAN_ITS_SIZE)

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
            untouched(), self.path(data), "a shape must be"
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
                    untouched(),
                    path,
                    "must be at most 8 integers|received LONG4",
                )

    @parameterized.parameters(
        ["0", "8"], [0.0, 8.0], [0, 10**300], [-8, 0], [0, 8, 8], [[0], 8]
    )
    def test_offsets_are_two_integers(self, *offsets):
        entry = {"dtype": "F32", "shape": [2], "data_offsets": offsets}
        text = json.dumps({"conv1.weight": entry}).encode()
        data = len(text).to_bytes(8, "little") + text + bytes(8)
        self.assert_refused(untouched(), self.path(data), "offsets")

    @parameterized.parameters(
        (b'{"a":' + b"[" * 10**5, "nested too deep"),
        (b'{"a":1,"a":2}', "one key twice"),
        (b'{"a":[1]}', "must have dtype"),
        (b'{"\xff":1}', "damaged"),
        (b'{"a":[' + b"[]," * 3 * 10**6 + b"[]]}", "header must have at most"),
    )
    def test_a_header_is_small_json_of_entries(self, text, message):
        data = len(text).to_bytes(8, "little") + text + bytes(8)
        self.assert_refused(untouched(), self.path(data), message)

    def test_arrays_and_the_letters_of_their_names_are_few(self):
        entries = {
            f"a{i}": {
                "dtype": "F32",
                "shape": [1],
                "data_offsets": [4 * i, 4 * i + 4],
            }
            for i in range(bounds.MOST_ARRAYS + 1)
        }
        text = json.dumps(entries).encode()
        data = len(text).to_bytes(8, "little") + text + bytes(4 * len(entries))
        self.assert_refused(
            untouched(), self.path(data), "at most 20,000 arrays"
        )
        tensor = Tensor(np.zeros(2, "float32"), "0")
        path = self.path(torch_zip({"\x1b" * 10**6: tensor}, [tensor]))
        message = self.assert_refused(untouched(), path, "1 to 256 letters")
        self.assertLess(len(message), 500)
        self.assertNotIn("\x1b", message)

    @parameterized.parameters(b"}" * 5_000, b"\x85" * 5_000)
    @mock.patch.object(bounds, "MOST_INSTRUCTIONS", 4_000)
    def test_the_instructions_of_a_pickle_are_counted(self, instructions):
        data = b"\x80\x02)" + instructions + b"."
        path = self.path(data)
        self.assert_refused(untouched(), path, "instructions")
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", data)
        self.assert_refused(untouched(), path, "instructions")

    @mock.patch.object(bounds, "MOST_INSTRUCTIONS", 50_000)
    def test_lists_that_a_pickle_copies_are_counted(self):
        pairs = b"]q\x00(" + b"X\x01\0\0\0kK\x01\x86" * 100 + b"e"
        data = b"\x80\x02" + pairs
        data += b"ccollections\nOrderedDict\nh\x00\x85R" * 1_000 + b"."
        self.assert_refused(untouched(), self.path(data), "instructions")

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
        self.assert_refused(untouched(), path, message)

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
        self.assert_refused(untouched(), self.path(bytes(data)), "CRC")
        self.assertLess(tracemalloc.get_traced_memory()[1], 5e7)

    def test_a_directory_of_very_many_members_is_not_read(self):
        path = self.path(None)
        with zipfile.ZipFile(path, "w") as archive:
            for i in range(50):
                archive.writestr(f"{i:0200}", b"")
        with (
            mock.patch.object(bounds, "MOST_DIRECTORY_BYTES", 10_000),
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
            "a shape must be",
        ),
        (
            "no shape",
            lambda f: f.create_dataset("a/b/c", data=h5py.Empty("f")),
            "a shape must be",
        ),
        (
            "dimensions",
            lambda f: f.create_dataset("a/b/c", data=np.ones([1] * 20)),
            "a shape must be",
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
            "bytes in the file, received 0",
        ),
        (
            "virtual",
            lambda f: f.create_virtual_dataset(
                "a/b/c", h5py.VirtualLayout((3,), "f")
            ),
            "must not refer to another file",
        ),
        *(
            (
                f"dtype {number}",
                lambda f, dtype=dtype: f.create_dataset("a/b/c", (3,), dtype),
                "must hold numbers",
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
        text = self.assert_refused(untouched(), self.hdf5(fill), message)
        self.assertLess(len(text), 500)

    @parameterized.parameters("n" * 10**6, 3.5, [["a"]])
    def test_the_name_of_a_layer_is_a_short_text(self, name):
        path = self.path(None)
        with h5py.File(path, "w", libver="latest") as file:
            group = file.create_group("layers/x/vars")
            group["0"] = np.ones(3, "float32")
            group.attrs["name"] = name
        self.assert_refused(
            untouched(), path, "attribute name must be a text of at most"
        )

    @parameterized.parameters(
        (b"\xe9\xff", r"\udce9\udcff"),
        (b"\x1b[2J", r"\x1b[2J"),
        ("\u202egpj".encode(), r"\u202egpj"),
        (b"a\nb", r"a\nb"),
    )
    def test_names_are_one_line_without_control_characters(self, name, shown):
        path = self.path(None)
        with h5py.File(path, "w") as file:
            group = file.create_group("layers/x/vars")
            group["0"] = np.ones(3, "float32")
            group.attrs["name"] = "#" * len(name)
        with open(path, "rb") as file:
            data = file.read().replace(b"#" * len(name), name)
        self.assertEqual(list(files.read(self.path(data))), [f"{shown}/0"])
        text = self.assert_refused(untouched(), self.path(data), "")
        self.assertTrue(text.isprintable(), ascii(text))

    def test_one_dataset_under_many_names_is_counted_each_time(self):
        def fill(file):
            array = file.create_dataset("a/b/0", data=np.ones(2**16, "float32"))
            for i in range(100):
                file[f"a/b/x{i}"] = array

        self.assert_refused(untouched(), self.hdf5(fill), MORE_THAN_ITS_SIZE)

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
            self.assert_refused(untouched(), self.path(bytes(damaged)), "heap")
            damaged[heap] = 1
            if length:
                self.assert_refused(
                    untouched(), self.path(bytes(damaged)), "heap"
                )

    def test_members_of_hdf5_are_few(self):
        path = self.hdf5(
            lambda file: [file.create_group(f"a/{i}") for i in range(50)]
        )
        with (
            mock.patch.object(bounds, "MOST_MEMBERS", 40),
            self.assertRaisesRegex(ValueError, "at most 40 members"),
        ):
            files.read(path)

    def test_stacks_hold_the_weights_of_few_units(self):
        path = self.hdf5(
            lambda file: file.create_dataset(
                "a/stage1_stack/0", data=np.zeros(2**20, "uint8")
            )
        )
        self.assert_refused(untouched(), path, "at most 20,000 arrays of units")

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
            self.assert_refused(untouched(), path, "must be a regular file")

    def test_files_that_are_nearly_right_are_errors_too(self):
        path = self.path(None)
        small().save_weights(path + ".weights.h5")
        with h5py.File(path + ".weights.h5", "a") as file:
            del file["layers/dense/vars"].attrs["name"]
        self.assert_refused(
            untouched(), path + ".weights.h5", "layers must have names"
        )
        with h5py.File(path, "w") as file:
            file["stem_conv/stem_conv/kernel"] = "text"
        self.assert_refused(untouched(), path, "must hold numbers")
        for entries, message in (
            ({"readme.txt": b""}, "must hold model.weights.h5"),
            (
                {"a/data.pkl": b"", "a/byteorder": b"big"},
                "must be little-endian",
            ),
        ):
            data = io.BytesIO()
            with zipfile.ZipFile(data, "w") as archive:
                for name, content in entries.items():
                    archive.writestr(name, content)
            self.assert_refused(
                untouched(), self.path(data.getvalue()), message
            )
        pickles = [0x1950A86A20F9469CFC6C, 1002, {"little_endian": True}]
        data = b"".join(pickle.dumps(value, 2) for value in pickles)
        self.assert_refused(
            untouched(), self.path(data), "version must be 1001, received 1002"
        )
        data = pickle.dumps({"conv1.weight": [1.0]}, 2)
        self.assert_refused(
            untouched(), self.path(data), "must start with torch's magic"
        )

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
        self.assert_refused(untouched(), path, "must not refer to another file")
        other = self.path(None)
        small().save_weights(other + ".weights.h5")
        with h5py.File(path, "w") as file:
            file["layers"] = h5py.ExternalLink(other + ".weights.h5", "layers")
        self.assert_refused(
            untouched(), path, "must be those of a residual network"
        )

    @parameterized.parameters(
        b"", b"x", b"{}", b"\x80", b"PK\x03\x04", bytes(9)
    )
    def test_what_is_no_file_of_weights_is_an_error(self, data):
        self.assert_refused(
            small(), self.path(data), "must be a file of weights|cannot be read"
        )

    def test_a_file_that_does_not_exist_is_not_found(self):
        with self.assertRaises(FileNotFoundError):
            weights.load(small(), self.path(None))


if __name__ == "__main__":
    absltest.main()
