"""Downloads: a whole file with its hash, or one line that says what to do."""

import contextlib
import hashlib
import http.server
import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from unittest import mock

from absl.testing import absltest
from absl.testing import parameterized

from keras_resnet.weights import bounds
from keras_resnet.weights import downloads

CONTENT = bytes(range(256)) * 4096  # 1 MiB
DIGEST = f"sha256:{hashlib.sha256(CONTENT).hexdigest()[:8]}"


class Handler(http.server.BaseHTTPRequestHandler):
    """Responds as the path says: /FAULT/file.bin."""

    def log_message(self, *arguments):
        pass

    def do_GET(self):
        fault = self.path.split("/")[1]
        self.server.requests.append((fault, self.headers.get("Range")))
        count = len(self.server.requests)
        match = re.match(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(match[1]) if match else 0
        if fault == "missing":
            self.send_error(404)
            return
        if fault == "busy" and count < 3:
            self.send_error(503)
            return
        if fault == "moved":
            self.send_response(302)
            self.send_header("Location", "/whole/file.bin")
            self.end_headers()
            return
        if fault in ("endless", "huge"):
            self.send_response(200)
            if fault == "huge":
                self.send_header("Content-Length", str(2**40))
            self.end_headers()
            with contextlib.suppress(OSError):
                while True:
                    self.wfile.write(CONTENT)
        content = CONTENT
        if fault == "wrong":
            content = CONTENT[::-1]
        if fault == "short":
            content = CONTENT[:-10]
        if fault == "restarts":
            start = 0
        if start >= len(content):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        length = "many" if fault == "words" else str(len(content) - start)
        self.send_header("Content-Length", length)
        self.end_headers()
        rest = content[start:]
        if (fault == "interrupted" and count < 3) or fault == "broken":
            rest = rest[: len(rest) // 2]
        if fault == "slow":
            for i in range(0, len(rest), 2**14):
                with contextlib.suppress(OSError):
                    self.wfile.write(rest[i : i + 2**14])
                    time.sleep(0.05)
            return
        self.wfile.write(rest)


class DownloadsTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.requests = []
        thread = threading.Thread(target=self.server.serve_forever, args=[0.01])
        thread.start()
        self.addCleanup(self.server.server_close)
        self.addCleanup(thread.join)
        self.addCleanup(self.server.shutdown)
        self.home = self.enter_context(tempfile.TemporaryDirectory())
        environment = {"KERAS_HOME": self.home, "no_proxy": "127.0.0.1"}
        self.enter_context(mock.patch.dict(os.environ, environment))
        os.environ.pop(downloads.FOLDER_VARIABLE, None)
        self.enter_context(mock.patch.object(downloads, "PAUSE_SECONDS", 0.0))

    def url(self, fault):
        port = self.server.server_address[1]
        return f"http://127.0.0.1:{port}/{fault}/file.bin"

    def files(self):
        folder = pathlib.Path(self.home, "models")
        return sorted(path.name for path in folder.iterdir())

    @parameterized.parameters(
        *(("whole", 1), ("interrupted", 3), ("busy", 3), ("moved", 2)),
        *(("slow", 1), ("words", 1)),
    )
    def test_a_file_arrives_whole_and_once(self, fault, requests):
        for _ in range(2):
            path = downloads.get(self.url(fault), DIGEST)
            self.assertEqual(path.read_bytes(), CONTENT)
        self.assertLen(self.server.requests, requests)
        self.assertEqual(path, pathlib.Path(self.home, "models", "file.bin"))

    @parameterized.parameters("endless", "huge")
    def test_a_file_without_end_is_left(self, fault):
        with (
            mock.patch.object(bounds, "MOST_BYTES", 2**22),
            self.assertRaisesRegex(
                downloads.DownloadError, "at most 4,194,304 bytes"
            ),
        ):
            downloads.get(self.url(fault), DIGEST)
        self.assertLen(self.server.requests, 1)
        part = pathlib.Path(self.home, "models", "file.bin.part")
        self.assertEqual(part.stat().st_size, 0)

    def test_an_interrupted_download_resumes_where_it_ended(self):
        downloads.get(self.url("interrupted"), DIGEST)
        self.assertEqual(
            [part for _, part in self.server.requests],
            [None, "bytes=524288-", "bytes=786432-"],
        )

    @parameterized.parameters(
        ("missing", "the server responds 404 Not Found"),
        ("wrong", "must have the sha256 {d}, received .*nothing of it was"),
        ("short", "must have the sha256 {d}, received .*nothing of it was"),
        ("broken", "the connection ended after .* of 1,048,576 bytes"),
    )
    def test_a_fault_leaves_no_file_and_says_what_to_do(self, fault, message):
        message = message.format(d=DIGEST.partition(":")[2])
        with self.assertRaisesRegex(downloads.DownloadError, message) as caught:
            downloads.get(self.url(fault), DIGEST)
        text = str(caught.exception)
        self.assertNotIn("\n", text)
        self.assertIn(f"save {self.url(fault)} as {self.home}/models/", text)
        self.assertIn("KERAS_RESNET_WEIGHTS_DIR", text)
        self.assertNotIn("file.bin", self.files())

    def test_without_a_network_the_line_has_the_address_and_the_place(self):
        url = "http://127.0.0.1:9/file.bin"  # nothing listens there
        with self.assertRaisesRegex(
            downloads.DownloadError, f"{url} cannot be downloaded: .*refused"
        ):
            downloads.get(url, DIGEST)

    def test_a_damaged_beginning_is_not_used(self):
        folder = pathlib.Path(self.home, "models")
        folder.mkdir()
        (folder / "file.bin.part").write_bytes(b"something else")
        path = downloads.get(self.url("whole"), DIGEST)
        self.assertEqual(path.read_bytes(), CONTENT)
        self.assertEqual(self.files(), ["file.bin"])

    def test_a_server_that_cannot_resume_starts_again(self):
        folder = pathlib.Path(self.home, "models")
        folder.mkdir()
        (folder / "file.bin.part").write_bytes(CONTENT[:1000])
        self.server.requests.clear()
        path = downloads.get(self.url("restarts"), DIGEST)
        self.assertEqual(path.read_bytes(), CONTENT)
        self.assertLen(self.server.requests, 1)

    def test_a_damaged_file_of_the_cache_is_downloaded_again(self):
        folder = pathlib.Path(self.home, "models")
        folder.mkdir()
        (folder / "file.bin").write_bytes(CONTENT[:-1])
        path = downloads.get(self.url("whole"), DIGEST)
        self.assertEqual(path.read_bytes(), CONTENT)

    def test_a_folder_of_weights_needs_no_network(self):
        folder = self.enter_context(tempfile.TemporaryDirectory())
        path = pathlib.Path(folder, "file.bin")
        path.write_bytes(CONTENT)
        os.environ[downloads.FOLDER_VARIABLE] = folder
        self.assertEqual(downloads.get(self.url("missing"), DIGEST), path)
        self.assertEmpty(self.server.requests)
        path.write_bytes(CONTENT[:-1])
        with self.assertRaisesRegex(downloads.DownloadError, "must have the"):
            downloads.get(self.url("whole"), DIGEST)

    def test_a_download_that_was_killed_leaves_nothing_that_is_used(self):
        code = (
            "from keras_resnet.weights import downloads; "
            f"downloads.get({self.url('slow')!r}, {DIGEST!r})"
        )
        process = subprocess.Popen([sys.executable, "-c", code])
        part = pathlib.Path(self.home, "models", "file.bin.part")
        try:
            while not part.exists() or part.stat().st_size == 0:
                self.assertIsNone(process.poll())
                time.sleep(0.01)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
        self.assertEqual(self.files(), ["file.bin.part"])
        self.assertIsNone(downloads.find("file.bin", DIGEST))
        path = downloads.get(self.url("whole"), DIGEST)
        self.assertEqual(path.read_bytes(), CONTENT)
        self.assertNotEqual(self.server.requests[-1], ("whole", None))
        self.assertEqual(self.files(), ["file.bin"])


if __name__ == "__main__":
    absltest.main()
