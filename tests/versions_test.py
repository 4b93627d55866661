"""Versions appear as a whole or not at all, even if an export fails."""

import os
import subprocess
import sys
import tempfile

from absl.testing import absltest
from absl.testing import parameterized

from keras_resnet.serving import versions


def write(directory):
    os.mkdir(os.path.join(directory, "variables"))
    for name in ("saved_model.pb", "variables/data"):
        with open(os.path.join(directory, name), "w") as file:
            file.write("whole")


class VersionsTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.export_dir = folder.name

    def names(self):
        return sorted(os.listdir(self.export_dir))

    def test_versions_number_up(self):
        for _ in range(11):
            path = versions.publish(self.export_dir, write)
        self.assertEqual(path, os.path.join(self.export_dir, "11"))
        self.assertEqual(
            list(versions.numbered(self.export_dir)), list(range(1, 12))
        )
        self.assertCountEqual(os.listdir(path), ["saved_model.pb", "variables"])

    def test_gap_is_not_filled_for_the_newest_must_be_the_highest(self):
        versions.publish(self.export_dir, write, version=5)
        path = versions.publish(self.export_dir, write)
        self.assertEqual(os.path.basename(path), "6")

    def test_other_names_are_no_versions(self):
        for name in ("model", "-1", "1.5", ".unfinished-1", "²"):
            os.mkdir(os.path.join(self.export_dir, name))
        self.assertEqual(versions.numbered(self.export_dir), {})

    def test_nothing_is_seen_before_it_is_whole(self):
        def look(directory):
            write(directory)
            self.assertEqual(versions.numbered(self.export_dir), {})

        versions.publish(self.export_dir, look)
        self.assertEqual(self.names(), ["1"])

    def test_failed_export_leaves_nothing(self):
        def fail(directory):
            write(directory)
            raise ValueError("no")

        with self.assertRaisesRegex(ValueError, "no"):
            versions.publish(self.export_dir, fail)
        self.assertEqual(self.names(), [])

    @parameterized.parameters("write", "rename")
    def test_killed_export_leaves_no_version_and_the_next_one_tidies(self, at):
        script = f"""
import os, signal, sys
from keras_resnet.serving import versions
def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)
def write(directory):
    open(os.path.join(directory, "saved_model.pb"), "w").close()
    if {at!r} == "write":
        die()
os.rename = die
versions.publish(sys.argv[1], write)
"""
        process = subprocess.run(
            [sys.executable, "-c", script, self.export_dir]
        )
        self.assertEqual(process.returncode, -9)
        self.assertEqual(versions.numbered(self.export_dir), {})
        self.assertLen(self.names(), 1)  # what the killed one had begun
        versions.publish(self.export_dir, write)
        self.assertEqual(self.names(), ["1"])

    def test_export_that_runs_at_the_same_time_is_left_alone(self):
        def write_while_others_write(directory):
            write(directory)
            for _ in range(2):
                versions.publish(self.export_dir, write)
            self.assertTrue(os.path.isdir(directory))

        path = versions.publish(self.export_dir, write_while_others_write)
        self.assertEqual(os.path.basename(path), "3")
        self.assertEqual(self.names(), ["1", "2", "3"])

    def test_version_that_appears_meanwhile_is_not_replaced(self):
        def write_slowly(directory):
            write(directory)
            versions.publish(self.export_dir, write, version=4)

        with self.assertRaisesRegex(FileExistsError, "version 4 .* one is 5"):
            versions.publish(self.export_dir, write_slowly, version=4)
        self.assertEqual(self.names(), ["4"])

    @parameterized.parameters(
        ("gs://bucket/m", "local directory.*received gs://bucket/m"),
        (__file__, "must be a directory, received the file"),
    )
    def test_what_is_no_local_directory_is_refused(self, path, message):
        with self.assertRaisesRegex(ValueError, message):
            versions.publish(path, write)
        self.assertFalse(os.path.exists("gs:"))

    def test_negative_version_is_refused(self):
        with self.assertRaisesRegex(ValueError, "0 or greater, received -1"):
            versions.publish(self.export_dir, write, version=-1)


if __name__ == "__main__":
    absltest.main()
