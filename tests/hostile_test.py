"""Damaged and hostile inputs against the exported signatures.

Each input leads to a status or to the prediction for the decoded pixels, and
never to a crash, a hang, or gigabytes of memory. The other images of a batch
get their predictions.
"""

import collections
import io
import json
import os
import struct
import subprocess
import sys
import tempfile

import numpy as np
import pytest
from absl.testing import absltest
from absl.testing import parameterized
from PIL import Image

from keras_resnet.data import datasets
from tests import colours

# Asks a version about files of a folder, mixed with as many copies of the first
# one into batches of 32, in a process that may die of it; says how each ended,
# and the most memory there was.
SCRIPT = """
import json, os, re, sys, time
import numpy as np
from tests import tf_serving
directory, folder = sys.argv[1:]
def megabytes(name):
    with open("/proc/self/status") as file:
        return int(re.search(name + r":\\s+(\\d+)", file.read()).group(1)) / 1e3
loaded = tf_serving.Loaded(directory)
names = sorted(os.listdir(folder))
def ask(content):
    value = np.array(content, object if isinstance(content[0], bytes) else None)
    return loaded.ask("serving_default", {"image_bytes": value})
def read(name):
    with open(os.path.join(folder, name), "rb") as file:
        return file.read()
good = read(names[0])
expected = ask([good])["probabilities"][0]
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # forget the most memory that there was
idle = megabytes("VmRSS")
def show(name, end, start):
    seconds = time.perf_counter() - start
    memory = megabytes("VmHWM") - idle
    print(json.dumps([name, end, seconds, memory]), flush=True)
random = np.random.default_rng(0)
files = [name for name in names if not name.endswith(".json")]
for i in range(0, len(files), 16):
    part = files[i : i + 16]
    batch = [(name, read(name)) for name in part] + [("", good)] * 16
    batch = [batch[k] for k in random.permutation(len(batch))]
    start = time.perf_counter()
    found = ask([content for _, content in batch])
    for (name, _), row, status in zip(
        batch, found["probabilities"], found["status"]
    ):
        if status:
            assert name and not row.any(), status
            show(name, status.decode(), start)
        elif name:
            show(name, row.tolist(), start)
        else:
            np.testing.assert_allclose(row, expected, atol=1e-6)
for name in sorted(set(names) - set(files)):
    start = time.perf_counter()
    try:
        end = ask(json.loads(read(name)))["probabilities"][0].tolist()
    except tf_serving.Error as error:
        end = error.code
    show(name, end, start)
"""


def pictures():
    """Files of every kind, of one picture of noise and colours."""
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, [12, 16, 3], np.uint8))
    picture = noise.resize((64, 48), Image.Resampling.BICUBIC)
    others = [picture.rotate(90 * i) for i in range(3)]
    found = []
    for kind, mode, options in (
        ("JPEG", "RGB", {}),
        ("JPEG", "RGB", {"progressive": True}),
        ("JPEG", "L", {}),
        ("JPEG", "CMYK", {}),
        ("PNG", "RGB", {}),
        ("PNG", "RGBA", {}),
        ("PNG", "LA", {}),
        ("PNG", "P", {}),
        ("PNG", "1", {}),
        ("GIF", "P", {}),
        ("GIF", "P", {"save_all": True, "append_images": others}),
        ("BMP", "RGB", {}),
        ("BMP", "P", {}),
        ("BMP", "L", {}),
        ("WEBP", "RGB", {}),
        ("WEBP", "RGBA", {}),
        ("WEBP", "RGB", {"lossless": True}),
        ("WEBP", "RGB", {"save_all": True, "append_images": others}),
    ):
        file = io.BytesIO()
        picture.convert(mode).save(file, kind, **options)
        found.append(file.getvalue())
    deep = np.asarray(picture.convert("L")).astype(np.uint16) * 257
    file = io.BytesIO()
    Image.fromarray(deep).save(file, "PNG")
    return [*found, file.getvalue()]


def huge():
    """The pictures, promising 60,000 x 60,000 pixels."""
    side, found = 60_000, []
    for content in pictures():
        content = bytearray(content)
        if content[:4] == b"\x89PNG":
            content[16:24] = struct.pack(">II", side, side)
        elif content[:2] == b"\xff\xd8":
            for marker in (b"\xff\xc0", b"\xff\xc2"):
                at = content.find(marker)
                if at > 0:
                    content[at + 5 : at + 9] = struct.pack(">HH", side, side)
        elif content[:3] == b"GIF":
            content[6:10] = struct.pack("<HH", side, side)
            at = content.find(b"\x2c", 13)
            content[at + 5 : at + 9] = struct.pack("<HH", side, side)
        elif content[:2] == b"BM":
            content[18:26] = struct.pack("<ii", side, side)
        elif content[12:16] == b"VP8X":
            size = struct.pack("<I", side - 1)[:3]
            content[24:30] = size + size
        elif content[12:16] == b"VP8 ":
            content[26:30] = struct.pack("<HH", 0x3FFF, 0x3FFF)
        else:
            content[21:25] = struct.pack("<I", 0x0FFFFFFF)
        found.append(bytes(content))
    return found


def large():
    """Small files of as many pixels as are allowed, in several shapes."""
    for width, height in ((8000, 8000), (64_000, 1000), (1000, 64_000)):
        for kind in ("PNG", "JPEG", "GIF", "WEBP"):
            if kind == "WEBP" and max(width, height) > 16_383:
                continue
            file = io.BytesIO()
            Image.new("L", (width, height)).save(file, kind)
            yield file.getvalue()


def frames_across():
    """A GIF of a wide and a high frame, of which no image has both sides."""
    content = b"GIF89a" + struct.pack("<HH", 1, 1) + b"\x80\0\0" + b"RGBRGB"
    for size in ((60_000, 1), (1, 60_000)):
        content += b"\x2c\0\0\0\0" + struct.pack("<HH", *size) + b"\0"
        content += b"\x02\x02\x44\x01\0"
    return content + b"\x3b"


def damaged(count, seed):
    """Files to ask about, a good one first: bytes, or JSON of wrong types."""
    rng = np.random.default_rng(seed)
    good = pictures()
    yield good[0]
    yield from good
    yield from huge()
    yield frames_across()
    yield from (
        b"",
        b"\0",
        b"text",
        "Gämse".encode(),
        b"GIF89a",
        b"BM",
        b"RIFF",
    )
    yield from ([1, 2], [1.5], [[1], [2]], [True])
    for _ in range(count):
        content = bytearray(good[rng.integers(len(good))])
        match rng.integers(5):
            case 0 | 1:  # bytes flipped anywhere, or in the header
                end = len(content) if rng.integers(2) else 64
                for at in rng.integers(0, end, rng.integers(1, 20)):
                    content[at % len(content)] = rng.integers(256)
            case 2:
                content = content[: rng.integers(len(content))]
            case 3:  # a piece of another file
                other = good[rng.integers(len(good))]
                at = rng.integers(len(content))
                content[at:] = other[rng.integers(len(other)) :]
            case 4:
                content[4:] = rng.bytes(rng.integers(0, 2000))
        yield bytes(content)


class HostileTest(parameterized.TestCase):
    """In a process of its own, whose memory is measured."""

    def ask(self, contents):
        folder = self.enter_context(tempfile.TemporaryDirectory())
        path = colours.publish(os.path.join(folder, "exported"))
        asked = os.path.join(folder, "asked")
        os.mkdir(asked)
        for i, content in enumerate(contents):
            is_bytes = isinstance(content, bytes)
            name = f"{i:05d}" + ("" if is_bytes else ".json")
            with open(os.path.join(asked, name), "wb") as file:
                file.write(
                    content if is_bytes else json.dumps(content).encode()
                )
        process = subprocess.run(
            [sys.executable, "-c", SCRIPT, path, asked],
            capture_output=True,
            text=True,
            timeout=3000,
        )
        ends = sorted(json.loads(line) for line in process.stdout.splitlines())
        self.assertEqual(process.returncode, 0, process.stderr[-2000:])
        self.assertLen(ends, len(os.listdir(asked)))
        model = colours.colour_network()
        answered, reasons = 0, collections.Counter()
        for name, end, _, _ in ends:
            if isinstance(end, str):
                self.assertRegex(
                    end,
                    "^INVALID_ARGUMENT$"
                    if name.endswith(".json")
                    else "^(not an image|format not supported|too many pixels|"
                    "too many scans|too many texts|truncated|damaged): ",
                )
                reasons.update([end.partition(":")[0]])
                continue
            with open(os.path.join(asked, name), "rb") as file:
                view = colours.PREPROCESSING.decode(
                    datasets.tf.constant(file.read())
                )
            expected = model(colours.PREPROCESSING(view[None]))[0]
            np.testing.assert_allclose(end, expected, atol=1e-4, err_msg=name)
            answered += 1
        print(
            f"{len(ends)} inputs: {answered} answered, {dict(reasons)}; the "
            f"slowest batch took {max(e[2] for e in ends):.2f} "
            f"s, {max(e[3] for e in ends):.0f} MB above the idle process"
        )
        self.assertLess(max(e[3] for e in ends), 1500)
        return ends

    @pytest.mark.slow
    def test_damaged_inputs_are_refused_or_answered(self):
        ends = self.ask(damaged(100, seed=1))
        good = len(pictures())
        refused = [isinstance(e[1], str) for e in ends]
        # Of the good ones only the animated WebP is rejected. All headers that
        # promise too many pixels are rejected.
        self.assertEqual(sum(refused[: good + 1]), 1)
        self.assertTrue(all(refused[good + 1 : 2 * good + 2]))

    @pytest.mark.large
    def test_two_thousand_damaged_inputs_and_large_ones(self):
        self.ask([*damaged(2000, seed=2), *large()])


if __name__ == "__main__":
    absltest.main()
