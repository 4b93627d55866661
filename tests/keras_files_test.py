""".keras files of strangers: a network, or one line that names the file."""

import copy
import io
import json
import os
import pathlib
import tempfile
import zipfile

import h5py
import keras
import numpy as np
from absl.testing import absltest
from absl.testing import parameterized

import keras_resnet
from keras_resnet.weights import keras_files
from tests import programs


@keras.saving.register_keras_serializable("keras_files_test")
class Scale(keras.layers.Layer):
    """A layer of one's own, with a variable that has no initializer."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.scale = keras.Variable(2.0)

    def call(self, x):
        return x * self.scale


def network(*layers):
    return keras.Sequential(
        [
            keras.Input((8, 8, 3)),
            keras.layers.Conv2D(4, 3, name="conv"),
            *layers,
            keras.layers.GlobalAveragePooling2D(),
            keras.layers.Dense(3, name="dense"),
        ]
    )


class KerasFilesTestCase(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.folder = pathlib.Path(
            self.enter_context(tempfile.TemporaryDirectory())
        )
        self.path = self.folder / "network.keras"

    def assert_refused(self, message, path=None):
        path = path or self.path
        with self.assertRaisesRegex(ValueError, message) as context:
            keras_files.load(path)
        text = str(context.exception)
        self.assertStartsWith(text, str(path))
        self.assertNotIn("\n", text)
        self.assertLess(len(text), len(str(path)) + 300)

    def rewrite(self, change=None, **members):
        """Saves a network; `change` alters its configuration."""
        network().save(self.path)
        with zipfile.ZipFile(self.path) as archive:
            old = {name: archive.read(name) for name in archive.namelist()}
        if change is not None:
            config = json.loads(old["config.json"])
            change(config)
            old["config.json"] = json.dumps(config).encode()
        old |= {name.replace("__", "."): v for name, v in members.items()}
        with zipfile.ZipFile(self.path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in old.items():
                if content is not None:
                    archive.writestr(name, content)
        return old


class LoadTest(KerasFilesTestCase):
    @parameterized.named_parameters(
        ("unrolled", lambda: keras_resnet.ResNet20(looped=False)),
        ("looped", lambda: keras_resnet.ResNet20(looped=True, remat=True)),
        (
            "random",
            lambda: keras_resnet.ResNet20(
                shortcut="dropout", survival_probability=0.8
            ),
        ),
        ("of_ones_own", lambda: network(Scale())),
        ("half", lambda: network(keras.layers.Conv2D(4, 3, dtype="bfloat16"))),
    )
    def test_a_network_is_loaded_as_it_was_saved(self, build):
        model = build()
        model.compile("adam", "mse")
        model.save(self.path)
        loaded = keras_files.load(self.path)
        self.assertLen(loaded.weights, len(model.weights))
        for ours, theirs in zip(loaded.weights, model.weights, strict=True):
            np.testing.assert_array_equal(
                keras.ops.convert_to_numpy(ours),
                keras.ops.convert_to_numpy(theirs),
            )

    def test_a_compressed_archive_is_loaded(self):
        self.rewrite()
        self.assertEqual(keras_files.load(self.path).output_shape, (None, 3))

    def test_new_variables_are_bounded_while_a_file_is_loaded_alone(self):
        create = keras.Variable.__init__
        self.rewrite(lambda config: _layer(config, "dense", units=10**9))
        self.assert_refused("more weights than the file holds")
        self.assertIs(keras.Variable.__init__, create)


def _layer(config, known, **fields):
    for layer in config["config"]["layers"]:
        if layer["config"].get("name") == known:
            layer["config"].update(fields)


class RefusalTest(KerasFilesTestCase):
    @parameterized.parameters(
        (b"", "the JSON is damaged"),
        (b"{", "the JSON is damaged"),
        (b"[]", "must be an object"),
        (b"3", "must be an object"),
        (b"[" * 10**6, "the JSON is nested too deep"),
        (b'{"a":' * 200 + b"1" + b"}" * 200, "at most 64 deep"),
        (b'{"config": 1, "config": 2}', "one key twice"),
        (b" " * 2**24 + b"{}", "members of an archive|at most 8,388,608 bytes"),
        (
            b'{"a": "' + os.urandom(2**23).hex().encode() + b'"}',
            "at most 8,388",
        ),
    )
    def test_a_configuration_must_be_small_json(self, config, message):
        self.rewrite(config__json=config)
        self.assert_refused(message)

    @parameterized.parameters(
        {"class_name": "system", "module": "os"},
        {"class_name": "Popen", "module": "subprocess"},
        {"class_name": "get_file", "module": "keras.utils"},
        {"class_name": "TFSMLayer", "module": "keras.layers"},
        {"class_name": "Adam", "module": "keras.optimizers"},
        {"class_name": "Unknown", "registered_name": "some>Unknown"},
        {"class_name": 3},
        {"class_name": ["Dense"]},
        {"module": 3},
        {"registered_name": ["x"], "module": "x"},
        {"config": "x"},
        {"config": None},
        {"config": {"units": None}},
        {"config": {"units": "x" * 10**5}},
    )
    def test_any_value_anywhere_is_one_line(self, **fields):
        self.rewrite(
            lambda config: config["config"]["layers"][-1].update(fields)
        )
        self.assert_refused("cannot be loaded as a network")
        self.rewrite(lambda config: config.update(fields))
        self.assert_refused("cannot be loaded as a network")

    @parameterized.parameters(
        {"filters": 10**9},
        {"filters": 10**30},
        {"filters": 5_000_000},
        {"filters": -1},
        {"filters": "x"},
        {"kernel_size": [10**6, 10**6]},
        {"padding": "evil" * 50_000},
        {"dtype": {"a": 1}},
        {"name": {"a": 1}},
        {"activation": {"class_name": "__lambda__", "config": {"value": "x"}}},
        {
            "kernel_initializer": {
                "class_name": "__numpy__",
                "config": {"value": ["a"], "dtype": "U1000000000"},
            }
        },
    )
    def test_a_field_of_a_layer_is_one_line(self, **fields):
        self.rewrite(lambda config: _layer(config, "conv", **fields))
        self.assert_refused("cannot be loaded as a network")

    def test_a_lambda_never_runs(self):
        network(keras.layers.Lambda(lambda x: x + 1)).save(self.path)
        scope = keras.src.saving.serialization_lib.SafeModeScope
        self.assert_refused(
            "must not have a Lambda.*register_keras_serializable"
        )
        with scope(False):  # as enable_unsafe_deserialization leaves it
            self.assert_refused("must not have a Lambda")
            tfsm = {"class_name": "TFSMLayer", "module": "keras.layers"}
            self.rewrite(lambda c: c["config"]["layers"][1].update(tfsm))
            self.assert_refused("TFSMLayer")

    def test_layers_and_objects_are_counted_first(self):
        def more(config):
            layers = config["config"]["layers"]
            layers += [copy.deepcopy(layers[1]) for _ in range(2_000)]

        self.rewrite(more)
        self.assert_refused("at most 2,000 layers")

    @parameterized.parameters(
        ({"model__weights__h5": None}, "has no 'model.weights.h5'"),
        ({"config__json": None}, "has no 'config.json'"),
        (
            {"assets/x": b"1"},
            "alone, received 'assets/x', the file of a lookup layer: save the",
        ),
        ({"notes": b"1"}, "alone, received 'notes'$"),
        ({"../x": b"1"}, "inside the archive"),
        (
            {"model__weights__h5": bytes(10**7)},
            r"archive of .* must have at most",
        ),
        ({"model__weights__h5": b"x" * 100}, "cannot be loaded"),
    )
    def test_an_archive_holds_a_network_alone(self, members, message):
        self.rewrite(**members)
        self.assert_refused(message)

    @parameterized.parameters(
        (
            lambda file: h5py.SoftLink("/layers/conv/vars/0"),
            "must not be a link",
        ),
        (
            lambda file: h5py.ExternalLink("/etc/passwd", "/"),
            "must not be a link",
        ),
        (lambda file: np.zeros((5, 3), "float32"), "could not be loaded"),
        (lambda file: "text", "must hold numbers"),
    )
    def test_weights_are_numbers_in_the_file(self, value, message):
        contents = io.BytesIO(self.rewrite()["model.weights.h5"])
        with h5py.File(contents, "a") as file:
            del file["layers/dense/vars/0"]
            file["layers/dense/vars/0"] = value(file)
        self.rewrite(model__weights__h5=contents.getvalue())
        self.assert_refused(message)

    def test_what_is_no_archive_is_one_line(self):
        self.rewrite()
        whole = self.path.read_bytes()
        for content in (b"", b"text", whole[:1000], whole[1000:]):
            self.path.write_bytes(content)
            self.assert_refused("cannot be loaded as a network")
        pipe = self.folder / "pipe.keras"
        os.mkfifo(pipe)
        self.assert_refused("regular file", pipe)
        self.assert_refused("regular file", self.folder)

    @parameterized.parameters(600, 5_000)
    def test_activations_of_any_size_are_refused_before_they_are_computed(
        self, scale
    ):
        image = keras.Input((8, 8, 3))
        x = keras.layers.UpSampling2D(scale)(image)
        x = keras.layers.GlobalAveragePooling2D()(x)
        x = keras.layers.Dense(10, "softmax")(x)
        inner = keras.Model(image, x)
        for number, model in enumerate(
            (inner, keras.Sequential([image, inner]))
        ):
            path = self.folder / f"large{number}.keras"
            model.save(path)
            outcome = programs.run(
                "export",
                f"--model={path}",
                f"--export_dir={self.folder}/exported",
            )
            self.assertEqual(outcome.code, 2)
            (line,) = outcome.err
            self.assertRegex(
                line, f"--model={path}: .* at most .* of up_sampling2d"
            )
        self.assertFalse((self.folder / "exported").exists())

    def test_a_program_says_one_line(self):
        self.rewrite(lambda config: _layer(config, "dense", units=10**9))
        outcome = programs.run(
            "export",
            f"--model={self.path}",
            f"--export_dir={self.folder}/exported",
        )
        self.assertEqual(outcome.code, 2)
        self.assertLen(outcome.err, 1)
        self.assertIn("--model=", outcome.err[0])
        self.assertIn("more weights than the file holds", outcome.err[0])
        self.assertFalse((self.folder / "exported").exists())


if __name__ == "__main__":
    absltest.main()
