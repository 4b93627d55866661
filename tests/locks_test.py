"""The lock of a work directory, and links that lead out of it."""

import errno
import fcntl
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

from absl.testing import absltest
from absl.testing import parameterized

from keras_resnet.training import workdirs

# Locks a file as a run does, without the seconds that TensorFlow needs.
_HOLD = """
import fcntl, sys
with open(sys.argv[1], "w") as file:
    fcntl.flock(file, fcntl.LOCK_EX)
    file.write("process 5 on host7")
    file.flush()
    print("held", flush=True)
    sys.stdin.read()
"""


class LockTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        root = self.enter_context(tempfile.TemporaryDirectory())
        self.directory = Path(root) / "run"
        self.lines = []

    def lock(self):
        return workdirs.Lock(self.directory, self.lines.append)

    def test_second_process_learns_who_uses_the_directory(self):
        with self.lock():
            text = (self.directory / ".lock").read_text()
        self.assertEqual(
            text, f"process {os.getpid()} on {socket.gethostname()}"
        )
        holder = subprocess.Popen(
            [sys.executable, "-c", _HOLD, self.directory / ".lock"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self.addCleanup(holder.communicate)
        self.assertEqual(holder.stdout.readline(), b"held\n")
        for _ in range(2):
            with (
                self.assertRaisesRegex(
                    workdirs.WorkdirError,
                    "run is in use by process 5 on host7: wait",
                ),
                self.lock(),
            ):
                self.fail("two processes hold it")
        holder.kill()  # the kernel releases the lock
        holder.wait()
        with self.lock() as lock:
            lock.check()
        self.assertEmpty(self.lines)
        self.assertTrue(workdirs.is_empty(self.directory))

    def test_directory_that_is_replaced_is_noticed(self):
        with self.lock() as lock:
            shutil.rmtree(self.directory)
            with self.assertRaisesRegex(OSError, "removed or replaced"):
                lock.check()
            with self.lock() as other:
                other.check()
                with self.assertRaisesRegex(OSError, "removed or replaced"):
                    lock.check()

    def test_second_name_of_a_file_is_locked_and_not_written(self):
        self.directory.mkdir()
        mine = self.directory.parent / "mine"
        mine.write_text("mine")
        (self.directory / ".lock").hardlink_to(mine)
        with self.lock() as lock:
            lock.check()
        self.assertEqual(mine.read_text(), "mine")

    @parameterized.parameters("link", "pipe", "folder")
    def test_lock_is_a_file_of_the_directory(self, kind):
        self.directory.mkdir()
        mine = self.directory.parent / "mine"
        mine.write_text("mine")
        path = self.directory / ".lock"
        if kind == "link":
            path.symlink_to(mine)
        elif kind == "pipe":
            os.mkfifo(path)
        else:
            path.mkdir()
        with (
            self.assertRaisesRegex(
                workdirs.WorkdirError,
                "lock must be a regular file, .*remove it",
            ),
            self.lock(),
        ):
            self.fail("it holds the lock")
        self.assertEqual(mine.read_text(), "mine")

    @parameterized.parameters(
        "checkpoints", "best", "events", "trials", "trials/00", "tuner/a.json"
    )
    def test_links_that_lead_out_are_rejected(self, name):
        other = self.directory.parent / "other"
        other.mkdir()
        path = self.directory / name
        path.parent.mkdir(parents=True)
        path.symlink_to(other)
        with (
            self.assertRaisesRegex(workdirs.WorkdirError, f"{name} must "),
            self.lock(),
        ):
            self.fail("it holds the lock")

    def test_link_inside_and_the_link_to_the_directory_are_followed(self):
        place = self.directory.parent / "place"
        (place / "folder").mkdir(parents=True)
        (place / "checkpoints").symlink_to("folder")
        self.directory.symlink_to(place)
        with self.lock() as lock:
            lock.check()

    def test_file_system_that_cannot_lock_says_so(self):
        cannot = OSError(errno.ENOLCK, "No locks available")
        with (
            mock.patch.object(fcntl, "flock", side_effect=cannot),
            self.lock() as lock,
        ):
            lock.check()
        (line,) = self.lines
        self.assertRegex(line, "cannot be locked .No locks available.: do not")


if __name__ == "__main__":
    absltest.main()
