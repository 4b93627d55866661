"""Checkpoints: every variable is read or named, any path, own files only."""

import os
import tempfile
from pathlib import Path
from unittest import mock

import keras
import numpy as np
import tensorflow as tf
from absl.testing import absltest
from absl.testing import parameterized

from keras_resnet import atomic
from keras_resnet.training import checkpoints


class Hiding(keras.layers.Layer):
    """A layer whose weight TensorFlow's checkpoints do not find."""

    def build(self, shape):
        # TensorFlow tracks attributes, and what they hold, but no functions.
        hidden = self.add_weight(name="hidden", shape=(3,))
        self.hidden = lambda: hidden

    def call(self, x):
        return x + self.hidden()


class CheckpointsTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.root = Path(self.enter_context(tempfile.TemporaryDirectory()))
        self.directory = self.root / "checkpoints"
        self.lines = []

    def save(self, *steps, directory=None, **objects):
        for step in steps:
            objects["step"] = tf.Variable(step, dtype="int64")
            saved = tf.train.Checkpoint(**objects)
            checkpoints.save(
                saved.write, directory or self.directory, step, keep=None
            )

    def restore(self, variables=(), directory=None, **objects):
        step = tf.Variable(-1, dtype="int64")

        def read(path):
            checkpoints.read(
                tf.train.Checkpoint(step=step, **objects),
                path,
                [*variables, step],
            )
            return int(step.numpy())

        return checkpoints.restore(
            read, directory or self.directory, self.lines.append
        )

    @parameterized.parameters(
        "lr[0.1]",
        "[!a]",
        "*",
        "a?",
        "a\\b",
        "\\",
        "[",
        "a b",
        "a\nb",
        "50%25",
        "été 猫",
        "x\udcffy",
        "-x",
        "~",
        "{a,b}",
    )
    def test_any_path_is_taken_literally(self, name):
        (self.root / "other").mkdir()
        directory = self.root / name / name
        directory.parent.mkdir()
        self.save(3, 5, directory=directory)
        self.assertEqual(self.restore(directory=directory), 5)
        self.assertEmpty(self.lines)

    def test_variable_that_tensorflow_does_not_track_is_named(self):
        model = keras.Sequential([keras.Input((3,)), Hiding()])
        layer = model.layers[0]
        hidden = layer.variables[0]
        self.save(1, model=model)
        with self.assertRaisesRegex(
            checkpoints.StateError,
            "ckpt-1 lacks 1 of 2 variables .*hidden.*train again",
        ):
            self.restore([hidden], model=model)
        self.assertEmpty(self.lines)  # it is not damaged

    def test_untracked_variables_are_found_and_restored(self):
        model = keras.Sequential(
            [keras.Input((3,)), keras.layers.Dropout(0.5), Hiding()]
        )
        untracked = [v.value for v in checkpoints.untracked(model)]
        self.assertLen(untracked, 2)  # the seed and the weight
        values = [np.array(v) for v in untracked]
        self.save(1, model=model, untracked=untracked)
        for variable in untracked:
            variable.assign(tf.zeros_like(variable))
        self.restore(untracked, model=model, untracked=untracked)
        for variable, value in zip(untracked, values, strict=True):
            np.testing.assert_array_equal(variable, value)

    @parameterized.parameters(
        "float32", "float64", "float16", "bfloat16", "int64", "uint32", "string"
    )
    def test_variable_of_any_type_that_is_missing_is_noticed(self, dtype):
        value = tf.constant(["a"] if dtype == "string" else [1], dtype)
        self.save(1)
        variable = tf.Variable(value)
        with self.assertRaisesRegex(checkpoints.StateError, "lacks 1 of 2"):
            self.restore([variable])
        self.save(1, v=tf.Variable(value))
        self.restore([variable], v=variable)
        self.assertEqual(variable.numpy().tolist(), value.numpy().tolist())

    def test_checkpoint_of_another_network_is_an_error(self):
        small, large = tf.Variable([1.0]), tf.Variable([1.0, 2.0])
        self.save(1, v=large)
        with self.assertRaisesRegex(checkpoints.StateError, "another network"):
            self.restore([small], v=small)
        self.save(1, v=tf.Variable([1.0]), w=large)
        other = tf.Variable([1.0])
        with self.assertRaisesRegex(checkpoints.StateError, "holds more"):
            self.restore([other], v=other)

    @parameterized.parameters(3, 99, 10**30)
    def test_renamed_checkpoint_is_an_error(self, name):
        self.save(5)
        for path in self.directory.glob("ckpt-5.*"):
            path.rename(path.with_name(f"ckpt-{name}{path.suffix}"))
        with self.assertRaisesRegex(
            checkpoints.StateError, f"must hold step {name}, received step 5"
        ):
            self.restore()

    @parameterized.parameters("index", "data-00000-of-00001")
    def test_damaged_checkpoints(self, kind):
        self.save(3, 5)
        path = self.directory / f"ckpt-5.{kind}"
        path.write_bytes(path.read_bytes()[:10])
        self.assertEqual(self.restore(), 3)
        (line,) = self.lines
        self.assertIn("ckpt-5 is damaged", line)
        path = self.directory / f"ckpt-3.{kind}"
        path.write_bytes(b"")
        with self.assertRaisesRegex(
            checkpoints.StateError, "no checkpoint in .* can be read: .*damaged"
        ):
            self.restore()

    def test_checkpoint_that_cannot_be_opened_is_not_called_damaged(self):
        self.save(5)
        denied = PermissionError(13, "Permission denied", "ckpt-5.index")
        with (
            mock.patch.object(Path, "open", side_effect=denied),
            self.assertRaisesRegex(PermissionError, "ckpt-5.index"),
        ):
            self.restore()
        self.assertEmpty(self.lines)

    def test_checkpoint_that_is_removed_meanwhile_is_not_called_damaged(self):
        self.save(3, 5)
        step = tf.Variable(0, dtype="int64")

        def read(path):
            for file in self.directory.glob("ckpt-5.*"):
                file.unlink()
            tf.train.Checkpoint(step=step).read(path)
            return int(step.numpy())

        found = checkpoints.restore(read, self.directory, self.lines.append)
        self.assertEqual(found, 3)
        self.assertEmpty(self.lines)

    def test_only_files_of_this_package_are_removed(self):
        self.save(3, 5)
        users = (
            ".notes.2024",
            ".checkpoint.12",
            "ckpt-mine.txt",
            "ckpt-5.txt",
            "ckpt-05.index",
            "ckpt-٣.index",
            "ckpt-9.index.bak",
            "ckpt-9_temp.txt",
            ".keras_resnet-12-notes",
        )
        torn = (
            "ckpt-9.data-00000-of-00001",
            "ckpt-5.index.tempstate123",
            ".keras_resnet-12-checkpoint",
            ".keras_resnet-12-metrics.csv",
        )
        for name in users + torn:
            (self.directory / name).write_text("x")
        for name in ("ckpt-9_temp", "ckpt-folder", "ckpt-9.index"):
            (self.directory / name).mkdir()
        os.mkfifo(self.directory / "ckpt-8.index")
        before = set(os.listdir(self.directory))
        checkpoints.clean(self.directory)
        removed = before - set(os.listdir(self.directory))
        self.assertEqual(removed, {*torn, "ckpt-9_temp"})
        self.assertEqual(checkpoints.steps(self.directory), [3, 5])
        checkpoints.set_aside(self.directory, after=3)
        checkpoints.drop(self.directory, after=-1)
        left = set(os.listdir(self.directory))
        self.assertContainsSubset(users, left)
        self.assertIn("damaged-ckpt-5.index", left)

    @parameterized.product(
        kind=("pipe", "device", "nothing", "folder"),
        part=("index", "data-00000-of-00001"),
    )
    def test_part_that_is_not_a_file_is_damage(self, kind, part):
        self.save(3, 5)
        path = self.directory / f"ckpt-5.{part}"
        path.unlink()
        if kind == "pipe":
            os.mkfifo(path)
        elif kind == "folder":
            path.mkdir()
        else:
            path.symlink_to("/dev/zero" if kind == "device" else "none")
        self.assertEqual(self.restore(), 3)
        (line,) = self.lines
        self.assertIn(
            f"ckpt-5 is damaged (ckpt-5.{part} must be a regular", line
        )
        if part == "index":  # no file: it replaces no best network
            checkpoints.prune(self.directory, keep=1)
            self.assertEqual(self.restore(), 3)
        checkpoints.set_aside(self.directory, after=3)
        self.save(5)
        self.assertEqual(self.restore(), 5)

    def test_checkpoint_is_not_written_through_a_link(self):
        self.directory.mkdir()
        mine = self.root / "mine"
        folder = self.root / "folder"
        mine.write_text("mine")
        folder.mkdir()
        (self.directory / "ckpt-5.index").symlink_to(mine)
        (self.directory / "ckpt-5.data-00000-of-00001").symlink_to(mine)
        (self.directory / "ckpt-5_temp").symlink_to(folder)
        os.mkfifo(self.directory / "ckpt-6.index")
        self.save(5, 6)
        self.assertEqual(mine.read_text(), "mine")
        self.assertEmpty(list(folder.iterdir()))
        self.assertEqual(self.restore(), 6)

    def test_files_that_were_set_aside_are_kept(self):
        for text in ("a", "b", "c"):
            for name in ("ckpt-5.index", "ckpt-5.data-00000-of-00001"):
                self.directory.mkdir(exist_ok=True)
                (self.directory / name).write_text(text)
            checkpoints.set_aside(self.directory, after=3)
        for end in ("index", "data-00000-of-00001"):
            found = self.directory.glob(f"damaged-*ckpt-5.{end}")
            self.assertCountEqual(
                [path.read_text() for path in found], ["a", "b", "c"]
            )

    def test_full_disk_is_named_without_the_operation_of_tensorflow(self):
        error = tf.errors.ResourceExhaustedError(
            None, None, "{{function_node f}} a[0].tmp; File too large [Op:S]"
        )
        self.assertEqual(checkpoints.reason(error), "a[0].tmp; File too large")

    def test_directory_that_is_gone_is_not_made_again(self):
        with self.assertRaisesRegex(
            checkpoints.CheckpointError, "step 5 cannot be written"
        ):
            self.save(5, directory=self.root / "gone" / "checkpoints")
        self.assertFalse((self.root / "gone").exists())

    def test_killed_writer_leaves_a_name_that_is_known(self):
        killed = mock.patch.object(os, "replace", side_effect=KeyboardInterrupt)
        with killed, self.assertRaises(KeyboardInterrupt):
            atomic.write(self.root / "config.json", "{}")
        (left,) = self.root.iterdir()
        self.assertEqual(checkpoints.remains(self.root), [left])


if __name__ == "__main__":
    absltest.main()
