import json
import os
import pathlib
from unittest import mock

import pytest
import tensorflow as tf
from absl.testing import absltest

from keras_resnet.data import datasets
from keras_resnet.serving import model_sources
from keras_resnet.training import configs
from keras_resnet.training import memory
from keras_resnet.training import workdirs
from tests import images as images_lib
from tests import programs
from tests import records
from tests import tiny_runs


class WorkdirTest(tiny_runs.TestCase):
    """A run remembers its images, and trusts no data in its directory."""

    def setUp(self):
        super().setUp()
        # Python 3.10 has no contextlib.chdir.
        self.addCleanup(os.chdir, os.getcwd())
        os.chdir(records.scratch(self))

    def config(self, **fields):
        recipe = tiny_runs.RECIPE.with_steps(2)
        return configs.Config("tiny", "folder:images", recipe, **fields)

    def change_json(self, name, change):
        path = self.workdir / name
        fields = json.loads(path.read_text())
        change(fields)
        path.write_text(json.dumps(fields))

    def assert_evaluates(self, *arguments, line=None):
        outcome = programs.run(
            "evaluate", f"--workdir={self.workdir}", *arguments
        )
        self.assertEqual(outcome.code, 2 if line else 0)
        if line:
            self.assertLen(outcome.err, 1)
            self.assertRegex(outcome.err[0], line)

    @pytest.mark.slow
    def test_changed_images_are_noticed(self):
        images = pathlib.Path("images")
        for i in range(24):
            path = images / "ab"[i % 2] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            image = images_lib.noise(8, 8, 1, seed=i)
            path.write_bytes(tf.io.encode_png(image).numpy())
        name = "folder:images"
        self.train(self.config(), dataset=datasets.load(name))
        workdirs.prepare(self.config(), datasets.load(name), self.workdir)
        with self.assertRaisesRegex(workdirs.WorkdirError, "seed was 0, is 1"):
            workdirs.check(
                self.config(seed=1), self.workdir, datasets.load(name)
            )
        moved = next((images / "a").iterdir())
        moved.rename(images / "b" / moved.name)
        changed = datasets.load(name)
        line = "class a had 12 images, has 11; class b had 12 images, has 13"
        # A planned recipe follows the number of images.
        planned = self.config(seed=1)
        for config in (self.config(), planned):
            with self.assertRaisesRegex(
                workdirs.WorkdirError, f"trained on other data: {line}"
            ):
                workdirs.check(config, self.workdir, changed)
                workdirs.prepare(config, changed, self.workdir)
        self.assert_evaluates(line=line)
        self.assert_evaluates(f"--dataset={name}")
        with mock.patch.object(memory, "available_bytes", return_value=100):
            self.assert_evaluates(
                f"--dataset={name}", line="--batch_size=100: a batch of 4 ima"
            )
        source = model_sources.from_workdir(self.workdir)
        with self.assertRaisesRegex(ValueError, line):
            source.images(10)
        # An earlier version of this package recorded no images.
        self.change_json("dataset.json", lambda about: about.pop("images"))
        workdirs.check_same_images(None, changed)
        workdirs.prepare(self.config(), changed, self.workdir)
        inside = str(self.workdir / "data")
        self.change_json("config.json", lambda c: c.update(data_dir=inside))
        self.assert_evaluates(line=f"--data_dir={inside} if you trust")

    def test_differences_of_records_are_by_class(self):
        def record(digest="0", **counts):
            """Of (train, test) images of each class."""
            return {
                split: {
                    label: f"{count[i]} images (sha256 {digest})"
                    for label, count in counts.items()
                }
                for i, split in enumerate(("train", "test"))
            }

        before = record(cat=(24, 6), dog=(1, 6))
        for now, expected in (
            (before, []),
            (
                record(cat=(24, 5), dog=(2, 6)),
                [
                    "class cat had 30 images, has 29",
                    "class dog had 7 images, has 8",
                ],
            ),
            (
                record(cat=(25, 5), dog=(1, 6)),
                [
                    "test/cat had 6 images, has 5",
                    "train/cat had 24 images, has 25",
                ],
            ),
            (
                record(cat=(24, 6)),
                ["class dog had 7 images, has 0"],
            ),
        ):
            self.assertEqual(workdirs._differing_images(before, now), expected)
        now = record(digest="1", cat=(24, 6), dog=(1, 6))
        self.assertIn(
            "test/cat has 6 images as before, with other names, sizes or "
            "contents",
            workdirs._differing_images(before, now),
        )
        huge = workdirs._differing_images(record(cat=("9" * 5000, 1)), before)
        self.assertIn("class dog had 0 images, has 7", huge)
        self.assertLess(max(map(len, huge)), 300)
        version = workdirs._differing_images(
            {"version": "3.0.1", "train": 5}, {"version": "3.0.2", "train": 5}
        )
        self.assertEqual(version, ["version was '3.0.1', is '3.0.2'"])

    def test_data_in_the_directory_are_not_trusted(self):
        self.workdir.mkdir()
        (self.workdir / "link").symlink_to(pathlib.Path.cwd())
        pathlib.Path("way_in").symlink_to(self.workdir)
        for path in (
            str(self.workdir),
            f"{self.workdir}/data",
            os.path.relpath(self.workdir / "data"),
            f"{self.workdir}/none/../data",
            f"{self.workdir}/link/data",
            "way_in/data",
        ):
            config = self.config(data_dir=path)
            with self.assertRaisesRegex(
                workdirs.WorkdirError, "must not name a data_dir inside"
            ):
                workdirs.recorded_data_dir(config, self.workdir)
        for path in (None, "data", f"{self.workdir}_beside", "~/data", "/"):
            config = self.config(data_dir=path)
            self.assertEqual(
                workdirs.recorded_data_dir(config, self.workdir), path
            )


if __name__ == "__main__":
    absltest.main()
