import os
import pathlib
import socket
import struct
from unittest import mock

import numpy as np
import pytest
import tensorflow as tf
from absl.testing import absltest
from absl.testing import parameterized

from keras_resnet.data import datasets
from keras_resnet.data import folders
from tests import images as images_lib
from tests import records


class FolderTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.root = pathlib.Path(records.scratch(self))

    def write(self, name, image, encode=tf.io.encode_png):
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(image).numpy())

    def load(self, **kwargs):
        return datasets.load(f"folder:{self.root}", **kwargs)

    def test_of_small_images_has_their_size_and_the_mean_of_each_pixel(self):
        for i in range(20):
            self.write(
                f"{'no' if i % 2 else 'yes'}/{i}.png",
                images_lib.noise(12, 12, 1, seed=i),
            )
        dataset = self.load()
        self.assertEqual(dataset.labels, ["no", "yes"])
        self.assertEqual(dataset.image_shape, (12, 12, 1))
        self.assertEqual((dataset.train_size, dataset.test_size), (16, 4))
        ((images, _),) = images_lib.batches(dataset.train_batches(16, 0), 1)
        np.testing.assert_allclose(images.mean(0), 0.0, atol=1e-6)

    def test_of_grey_and_colour_is_colour(self):
        self.write("a/1.png", images_lib.noise(9, 9, 1))
        self.write("a/2.png", images_lib.noise(9, 9, 4))
        self.write("b/1.png", images_lib.noise(9, 9, 2))
        self.write("b/2.png", images_lib.noise(9, 9, 3))
        self.assertEqual(self.load().image_shape, (9, 9, 3))

    def test_of_oblong_small_images_is_resized_to_squares(self):
        for name in ("a/1.png", "a/2.png", "b/1.png", "b/2.png"):
            self.write(name, images_lib.noise(10, 16, 3))
        dataset = self.load()
        self.assertEqual(dataset.image_shape, (16, 16, 3))
        images, _ = dataset.test_images(1)
        np.testing.assert_allclose(
            images[0],
            images_lib.numpy_resize(images_lib.noise(10, 16, 3), 16, 16),
            atol=0.51,
        )

    def test_of_photos_is_224_of_256(self):
        dataset = datasets.load(images_lib.photos(self))
        self.assertEqual(dataset.image_shape, (224, 224, 3))
        self.assertEqual(dataset.preprocessing.shorter_side, 256)
        np.testing.assert_array_equal(
            dataset.preprocessing.mean, images_lib.PHOTO.mean
        )
        larger = datasets.load(images_lib.photos(self), image_size=448)
        self.assertEqual(larger.preprocessing.shorter_side, 512)

    def test_may_have_train_and_test(self):
        for i in range(3):
            self.write(f"train/a/{i}.png", images_lib.noise(8, 8, 3))
            self.write(
                f"train/b/{i}.JPG", images_lib.noise(8, 8, 3), tf.io.encode_jpeg
            )
            self.write(f"val/b/{i}.png", np.full((8, 8, 3), i, np.uint8))
            self.write(f"val/a/{i}.png", np.full((8, 8, 3), 9, np.uint8))
        (self.root / "train/a/notes.txt").write_text("no image")
        (self.root / "train/a/.hidden.png").write_text("no image")
        dataset = self.load()
        self.assertEqual((dataset.train_size, dataset.test_size), (6, 6))
        images, labels = dataset.test_images(6)
        self.assertEqual(labels.tolist(), [0, 0, 0, 1, 1, 1])
        self.assertEqual(images[:, 0, 0, 0].tolist(), [9, 9, 9, 0, 1, 2])

    def test_a_class_may_be_called_train(self):
        for word in ("train", "plane"):
            self.write(f"{word}/1.png", images_lib.noise(8, 8, 3))
            self.write(f"{word}/2.png", images_lib.noise(8, 8, 3))
        self.assertEqual(self.load().labels, ["plane", "train"])

    @parameterized.parameters(("train", "test"), ("Train", "test1", "val"))
    def test_whose_splits_have_no_classes(self, *names):
        """The classes are in the names of the files, as on some sites."""
        for name in names:
            for i in range(2):
                self.write(f"{name}/cat.{i}.png", images_lib.noise(9, 9, 1))
        with self.assertRaisesRegex(
            ValueError, "one folder for each class inside .*, received none"
        ):
            self.load()

    @parameterized.parameters(
        ("Cat", "cat"), ("caf\u00e9", "cafe\u0301"), ("a b", "a b ")
    )
    def test_classes_with_nearly_the_same_name_are_noted(self, *names):
        for name in names:
            for i in range(2):
                self.write(f"{name}/{i}.png", images_lib.noise(9, 9, 1))
        dataset = self.load()
        self.assertEqual(dataset.classes, 2)
        self.assertIn("nearly the name of another: '", dataset.summary)

    def test_whose_test_has_no_images(self):
        for name in ("a", "b"):
            for i in range(2):
                self.write(f"train/{name}/{i}.png", images_lib.noise(9, 9, 1))
            (self.root / "test" / name).mkdir(parents=True)
        with self.assertRaisesRegex(ValueError, "test must have images, rec"):
            self.load(skip_unreadable=True)

    def test_keeps_its_test_images_when_images_come_in(self):
        names = [f"a/{i}.png" for i in range(100)]
        for name in names + ["b/1.png", "b/2.png"]:
            self.write(name, images_lib.noise(4, 4, 1))
        before = set(folders.held_out([str(self.root / n) for n in names]))
        self.assertLen(before, 20)
        more = [str(self.root / f"a/{i}.png") for i in range(105)]
        self.assertGreaterEqual(len(before & set(folders.held_out(more))), 18)

    def test_that_is_not_there(self):
        with self.assertRaisesRegex(FileNotFoundError, "nowhere' is none"):
            datasets.load("folder:nowhere")

    def test_that_is_empty(self):
        with self.assertRaisesRegex(FileNotFoundError, "has no folder"):
            self.load()

    def test_with_an_empty_class(self):
        self.write("a/1.png", images_lib.noise(4, 4, 1))
        (self.root / "b").mkdir()
        with self.assertRaisesRegex(ValueError, r"1 empty \(b\)"):
            self.load()

    def test_of_one_class(self):
        self.write("only/1.png", images_lib.noise(4, 4, 1))
        with self.assertRaisesRegex(ValueError, "it has only only"):
            self.load()

    def test_without_an_image_for_test(self):
        self.write("a/1.png", images_lib.noise(4, 4, 1))
        self.write("b/1.png", images_lib.noise(4, 4, 1))
        with self.assertRaisesRegex(ValueError, "must have 2 images or more"):
            self.load()

    def test_whose_test_has_other_classes(self):
        for name in ("train/a/1.png", "train/b/1.png", "test/c/1.png"):
            self.write(name, images_lib.noise(4, 4, 1))
        with self.assertRaisesRegex(ValueError, "a, b; it has c"):
            self.load()

    def test_with_a_file_that_does_not_decode(self):
        for i in range(4):
            self.write(f"a/{i}.png", images_lib.noise(4, 4, 1))
            self.write(f"b/{i}.png", images_lib.noise(4, 4, 1))
        (self.root / "b/2.png").write_bytes(b"broken")
        with self.assertRaisesRegex(ValueError, r"1 undecodable \(b/2.png: "):
            self.load()

    @parameterized.parameters("training", "test", "examples", "loading")
    @pytest.mark.slow
    def test_image_that_promises_too_many_pixels_is_named(self, when):
        """It is rejected before its 3,600,000,000 pixels are unpacked."""
        sides = (8, 200 if when != "loading" else 8)
        for i in range(2):
            self.write(f"a/{i}.png", images_lib.noise(8, 8, 3))
            self.write(f"b/{i}.png", images_lib.noise(*sides, 3))
        dataset = None
        if when != "loading":
            dataset = self.load(image_size=8)
            dataset.test_images(2)
        for path in self.root.glob("b/*.png"):
            content = bytearray(path.read_bytes())
            content[16:24] = struct.pack(">II", 60_000, 60_000)
            path.write_bytes(content)
        line = (
            r"2 undecodable \(b/0.png: .*an image may have .* 3600000000; b/1"
            if when == "loading"
            else r"b/\d.png does not decode; it must be a .* image of at most "
            r"64,000,000 pixels \(too many pixels: an image may have at most "
            r"64000000 pixels, received 3600000000\)$"
        )
        with self.assertRaisesRegex(ValueError, line):
            if when == "loading":
                self.load()
            elif when == "examples":
                datasets.write_examples(dataset, self.root / "out", 2)
            else:
                dataset.check()
        if when in ("training", "test"):
            batches = (
                dataset.train_batches(4, 0, augmentation="scale_aspect")
                if when == "training"
                else dataset.test_batches(2)
            )
            with self.assertRaisesRegex(datasets.UNREADABLE, "64000000"):
                images_lib.batches(batches, 1)

    @parameterized.parameters("set [v2]", "a*b", "what?", "{a,b}", "[ab]")
    @pytest.mark.slow
    def test_path_may_have_the_characters_of_patterns(self, name):
        self.root /= name
        for i in range(4):
            self.write(f"a[1]/{i}*.png", images_lib.noise(8, 8 + i, 3, seed=i))
            self.write(f"b?/{i}.png", images_lib.noise(9, 8 + i, 3))
        dataset = self.load(image_size=8)
        self.assertEqual(dataset.labels, ["a[1]", "b?"])
        self.assertEqual((dataset.train_size, dataset.test_size), (6, 2))
        dataset.check()

    @parameterized.parameters(
        ("pipe", "received a pipe"),
        ("socket", "received a socket"),
        ("directory", "received a directory"),
        ("link to /dev/zero", "received a device"),
        ("link to a pipe", "received a pipe"),
        ("link to nothing", "cannot be opened"),
        ("file of 10 GB", "at most 268,435,456 bytes, received 10,000,000,000"),
    )
    def test_takes_regular_files_only(self, what, message):
        for name in ("a/1.png", "a/2.png", "b/1.png", "b/2.png"):
            self.write(name, images_lib.noise(4, 4, 1))
        odd, pipe = self.root / "b/odd.jpg", self.root / "pipe"
        os.mkfifo(pipe)
        if what == "pipe":
            os.mkfifo(odd)
        elif what == "socket":
            with socket.socket(socket.AF_UNIX) as opened:
                opened.bind(str(odd))
        elif what == "directory":
            odd.mkdir()
        elif what == "file of 10 GB":
            with open(odd, "wb") as file:
                file.truncate(10**10)
        else:
            places = {"/dev/zero": "/dev/zero", "a pipe": pipe, "nothing": "no"}
            odd.symlink_to(places[what.removeprefix("link to ")])
        with self.assertRaisesRegex(ValueError, f"odd.jpg must .*{message}"):
            self.load()

    def test_name_of_a_file_need_not_be_utf8(self):
        for name in ("a/1.png", "a/\udcff.png", "b/1.png", "b/\udcfe.png"):
            self.write(name, images_lib.noise(4, 4, 1))
        dataset = self.load()
        self.assertEqual(dataset.train_size + dataset.test_size, 4)
        (self.root / "a/\udcff.png").write_bytes(b"broken")
        with self.assertRaisesRegex(
            ValueError, r"undecodable \(a/\udcff.png: "
        ):
            self.load()

    def test_record_changes_with_the_images(self):
        names = [f"{word}/{i}.png" for word in "ab" for i in range(6)]
        self.enter_context(  # nothing has to be decoded
            mock.patch.object(folders, "_small_images", return_value=None)
        )

        def record():
            for i, name in enumerate(names):
                self.write(name, images_lib.noise(4, 4, 1, seed=i))
            return self.load().record

        before = record()
        self.assertEqual(record(), before)
        changes = {
            "moved": lambda: os.rename(
                self.root / names[0], self.root / "b/new.png"
            ),
            "deleted": lambda: os.remove(self.root / names[1]),
            "added": lambda: self.write("a/new.png", images_lib.noise(4, 4, 1)),
            "renamed": lambda: os.rename(
                self.root / names[2], self.root / "a/22.png"
            ),
            "exchanged": lambda: self.write(
                names[3], images_lib.noise(4, 4, 1, seed=9)
            ),
        }
        for what, change in changes.items():
            before = record()
            change()
            self.assertNotEqual(self.load().record, before, msg=what)

    def test_record_of_a_large_folder_is_of_names_and_sizes(self):
        for name in ("a/1.png", "a/2.png", "b/1.png", "b/2.png"):
            self.write(name, images_lib.noise(4, 4, 1))
        with (
            mock.patch.object(folders, "_DIGEST_BYTES", 0),
            mock.patch.object(folders.inspection, "_fault", return_value=None),
            mock.patch.object(folders, "_small_images", return_value=None),
        ):
            before = self.load().record
            path = self.root / "a/1.png"
            size = path.stat().st_size
            path.write_bytes(bytes(size))
            self.assertEqual(self.load().record, before)
            path.write_bytes(bytes(size + 1))
            self.assertNotEqual(self.load().record, before)

    def grey(self, *names):
        for i, name in enumerate(names):
            self.write(name, images_lib.noise(8, 8, 1, seed=i))

    @parameterized.parameters("val", "VALID", "Validation", "Test", "TEST")
    def test_names_of_splits_may_have_capitals(self, word):
        names = [f"{c}/{i}.png" for c in "ab" for i in range(3)]
        self.grey(*(f"Train/{n}" for n in names), f"{word}/a/1.png")
        (self.root / word / "b").mkdir()
        dataset = self.load(skip_unreadable=True)
        self.assertEqual((dataset.train_size, dataset.test_size), (6, 1))

    def test_test_images_are_those_of_test_if_there_are_others(self):
        for split in ("train", "val", "test"):
            self.grey(f"{split}/a/1.png", f"{split}/b/{split}.png")
        dataset = self.load()
        self.assertIn("val not used beside test", dataset.summary)

    def test_unknown_folder_beside_train(self):
        self.grey("train/a/1.png", "train/b/1.png", "eval/a/1.png")
        with self.assertRaisesRegex(ValueError, "received eval, train"):
            self.load()

    def test_one_summary_names_everything_that_cannot_be_used(self):
        for i in range(6):
            self.write(
                f"a/{i}.jpg",
                images_lib.noise(32, 32, 3, seed=i),
                tf.io.encode_jpeg,
            )
            self.write(f"b/{i}.png", images_lib.noise(32, 32, 3, seed=i))
        cut = self.root / "a/0.jpg"
        cut.write_bytes(cut.read_bytes()[:-400])
        (self.root / "b/.DS_Store").write_bytes(b"hidden")
        (self.root / "b/notes.txt").write_text("none")
        (self.root / "b/7.HEIC").write_bytes(b"\0\0\0\x18ftypheic")
        (self.root / "b/8.jpg").write_bytes(b"\0\0\0\x18ftypheic" + bytes(9))
        (self.root / "empty").mkdir()
        with self.assertRaisesRegex(
            ValueError,
            r"2 to be converted \(b/7.HEIC; b/8.jpg: HEIC "
            r"inside .jpg\), 1 undecodable \(a/0.jpg: a truncated .*\), 1 "
            r"empty \(empty\); convert them to JPEG, .*mogrify.*"
            "--skip_unreadable",
        ):
            self.load()
        dataset = self.load(skip_unreadable=True)
        self.assertEqual(dataset.labels, ["a", "b"])
        self.assertEqual((dataset.train_size, dataset.test_size), (9, 2))
        self.assertRegex(
            dataset.summary,
            r"^9 training images of 2 classes, 2 for validation, 6 entries "
            r"left out: 1 hidden \(b/.DS_Store\), .*1 of another type",
        )
        self.assertEqual(dataset.train_counts, [4, 5])

    def test_path_without_the_word_folder_is_named(self):
        self.grey("a/1.png", "a/2.png", "b/1.png", "b/2.png")
        with self.assertRaisesRegex(
            ValueError, f"did you mean folder:{self.root}"
        ):
            datasets.load(str(self.root))


if __name__ == "__main__":
    absltest.main()
