"""Images are read by name, and any name is safe to read."""

import base64
import io
import os
import socket
import sys
import tempfile
from unittest import mock

from absl.testing import absltest
from absl.testing import parameterized

from keras_resnet.serving import inputs


class Endless(io.RawIOBase):
    """A standard input without end."""

    def __init__(self):
        self.taken = 0

    def readable(self):
        return True

    def readinto(self, buffer):
        self.taken += len(buffer)
        return len(buffer)


class InputsTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = folder.name

    def path(self, name, content=None):
        path = os.path.join(self.folder, name)
        if content is not None:
            with open(path, "wb") as file:
                file.write(content)
        return path

    def stdin(self, file):
        self.enter_context(mock.patch.object(sys, "stdin", file))

    @parameterized.parameters(
        ("fifo", "a FIFO"),
        ("socket", "a socket"),
        ("link to a device", "a character device"),
        ("link to a FIFO", "a FIFO"),
        ("directory", "a directory"),
    )
    def test_only_regular_files_are_read(self, kind, received):
        path = self.path("x.png")
        if kind == "socket":
            server = socket.socket(socket.AF_UNIX)
            self.addCleanup(server.close)
            server.bind(path)
        elif kind == "directory":
            os.mkdir(path)
        elif kind == "fifo":
            os.mkfifo(path)
        elif kind == "link to a device":
            os.symlink("/dev/zero", path)
        else:
            os.mkfifo(path + "1")
            os.symlink(path + "1", path)
        for name in (path, f"file://{path}", f"FILE:{path}#end"):
            with self.assertRaisesRegex(
                ValueError, f"must be a regular file, received {received}"
            ):
                inputs.read(name)

    def test_folder_with_what_is_no_file_is_listed_whole(self):
        self.path("a.png", b"a")
        os.mkfifo(self.path("b.png"))
        os.symlink("/dev/zero", self.path("c.png"))
        found = inputs.expand([self.folder])
        self.assertLen(found, 3)
        self.assertEqual(inputs.read(found[0]), b"a")

    def test_folder_that_cannot_be_listed_is_an_error(self):
        self.path("a.png", b"a")
        error = PermissionError(13, "Permission denied", "inner")

        def walk(top, onerror):
            onerror(error)
            return iter(())

        with (
            mock.patch.object(os, "walk", walk),
            self.assertRaises(PermissionError),
        ):
            inputs.expand([self.folder])

    def test_file_above_the_limit_is_not_read(self):
        path = self.path("x.png")
        with open(path, "wb") as file:
            file.truncate(2**40)
        with (
            mock.patch.object(os, "open", side_effect=AssertionError),
            self.assertRaisesRegex(
                ValueError,
                r"at most 256,000,000 bytes \(max_image_bytes\), received "
                "1,099,511,627,776",
            ),
        ):
            inputs.read(path)

    @parameterized.parameters(0, 1, 99, 100)
    def test_file_up_to_the_limit_is_read(self, size):
        path = self.path("x.png", bytes(size))
        self.assertEqual(inputs.read(path, 100), bytes(size))

    def test_file_that_grows_is_read_up_to_the_limit(self):
        """As those of /proc, whose size is said to be 0."""
        path = self.path("x.png", bytes(101))
        status = os.stat(self.path("empty", b""))
        with (
            mock.patch.object(os, "stat", return_value=status),
            mock.patch.object(os, "fstat", return_value=status),
            self.assertRaisesRegex(ValueError, "at most 100 bytes"),
        ):
            inputs.read(path, 100)

    def test_standard_input_without_end_is_read_up_to_the_limit(self):
        endless = Endless()
        self.stdin(io.TextIOWrapper(io.BufferedReader(endless)))
        with self.assertRaisesRegex(ValueError, "at most 3,000,000 bytes"):
            inputs.read("-", 3_000_000)
        self.assertLess(endless.taken, 5_000_000)

    def test_standard_input_that_is_closed_or_empty_is_an_error(self):
        closed = io.TextIOWrapper(io.BytesIO(b"x"))
        closed.close()
        with open(os.devnull, "w") as written:
            for file in (None, closed, written):
                self.stdin(file)
                with self.assertRaisesRegex(ValueError, "input is closed"):
                    inputs.read("-")
        self.stdin(io.TextIOWrapper(io.BytesIO(b"")))
        with self.assertRaisesRegex(ValueError, "input is empty"):
            inputs.read("-")
        with self.assertRaisesRegex(ValueError, "named once"):
            inputs.expand(["-", "a.png", "-"])

    @parameterized.parameters(
        ("data:,x", b"x"),
        ("data:,%00%ff", b"\0\xff"),
        ("DATA:image/png;BASE64,eHk=", b"xy"),
        ("data:image/png;base64,eH k%3D", b"xy"),
    )
    def test_data_url_is_its_content(self, url, content):
        self.assertEqual(inputs.read(url), content)

    @parameterized.parameters(
        ("data:", "no comma"),
        ("data:image/png;base64", "no comma"),
        ("data:;base64,@@@@", "valid base64"),
        ("data:;base64,eHk", "valid base64"),
        ("data:," + "x" * 11, "at most 10 bytes"),
        ("data:," + "x" * 1000, "at most 10 bytes"),
        ("data:;base64," + base64.b64encode(bytes(11)).decode(), "at most 10"),
        ("https://host/x.png", "start with file: or data:"),
        ("gs://bucket/x.png", "start with file: or data:"),
        ("file://host/x.png", "of this machine"),
        ("file:///%00", "null"),
        ("file:///none", "No such file"),
        ("none\0", "null"),
        ("x" * 5000, "File name too long"),
        ("", "No such file"),
    )
    def test_what_cannot_be_read_is_a_short_sentence(self, name, message):
        with self.assertRaisesRegex(ValueError, message) as caught:
            inputs.read(name, 10)
        self.assertLess(len(str(caught.exception)), 200)

    def test_file_url_asks_no_proxy_and_no_other_opener(self):
        path = self.path("grün é#.png", b"x")
        url = "file://localhost" + path.replace("#", "%23")
        proxies = {"file_proxy": "http://127.0.0.1:9"}
        with mock.patch.dict(os.environ, proxies):
            self.assertEqual(inputs.read(url), b"x")

    def test_names_that_are_no_utf_8_are_read(self):
        path = os.fsencode(self.folder) + b"/\xff.png"
        with open(path, "wb") as file:
            file.write(b"x")
        (name,) = inputs.expand([self.folder])
        self.assertEqual(inputs.read(name), b"x")
        self.assertEqual(
            inputs.read("file://" + self.folder + "/%ff.png"), b"x"
        )


if __name__ == "__main__":
    absltest.main()
