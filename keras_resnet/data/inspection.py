"""The files of class folders: images to use, files to leave out, and faults.

All files are checked before the first step. A photo that does not decode would
stop a run late, when a batch reaches it.
"""

import collections
import concurrent.futures
import dataclasses
import os
from collections.abc import Iterable

import tensorflow as tf

from keras_resnet.data import decoding
from keras_resnet.data import files
from keras_resnet.data import limits
from keras_resnet.data import splits

IMAGE_FILES = (".jpg", ".jpeg", ".png", ".gif", ".bmp", ".webp")

# Files with photos that TensorFlow does not decode.
_FOREIGN_FILES = (".heic", ".heif", ".avif", ".tif", ".tiff", ".dng", ".jxl")
_CONVERT = (
    "convert them to JPEG, for example by `mogrify -format jpg *.heic` of "
    "ImageMagick or `sips -s format jpeg *.heic --out .` of macOS"
)

# Largest set whose images are all decoded; of larger sets the sizes are read.
_DECODED_BYTES = 2**30

_NAMED = 3  # files of each kind that a summary names

# Kinds of files and folders that are left out.
HIDDEN = "hidden"
OTHER = "of another type"
UNREADABLE = "undecodable"
FOREIGN = "to be converted"
IRREGULAR = "irregular"
EMPTY = "empty"
FOLDERS = "inside a class"

# Kinds that nobody misses. The others stop a run without `skip_unreadable`.
_HARMLESS = (HIDDEN, OTHER)


@dataclasses.dataclass
class Findings:
    """The names of files and folders that are left out, by kind.

    Attributes:
        names: For each kind, the names with their reasons, in order.

    >>> findings = Findings()
    >>> findings.add(HIDDEN, "train/a/.DS_Store")
    >>> findings.words()
    '1 file left out: 1 hidden (train/a/.DS_Store)'
    """

    names: dict[str, list[str]] = dataclasses.field(
        default_factory=lambda: collections.defaultdict(list)
    )

    def add(self, kind: str, name: str) -> None:
        """Adds a file or a folder of a kind."""
        self.names[kind].append(name)

    def words(self, kinds: Iterable[str] | None = None) -> str:
        """Returns the numbers and the first names; empty for none.

        Args:
            kinds: The kinds that are named; None for all.
        """
        found = {
            kind: found
            for kind, found in self.names.items()
            if kinds is None or kind in kinds
        }
        total = sum(map(len, found.values()))
        if not total:
            return ""
        noun = "file" if set(found) <= {HIDDEN, OTHER, UNREADABLE} else "entry"
        plural = {"file": "files", "entry": "entries"}
        parts = [
            f"{len(n):,} {kind} ({_first(n)})" for kind, n in found.items()
        ]
        return (
            f"{total:,} {noun if total == 1 else plural[noun]} left out: "
            f"{', '.join(parts)}"
        )

    def check(self, root: str) -> None:
        """Raises ValueError if a file or a class must be mended.

        Args:
            root: The folder of the set.
        """
        kinds = [kind for kind in self.names if kind not in _HARMLESS]
        if not kinds:
            return
        parts = [
            f"{len(self.names[kind]):,} {kind} ({_first(self.names[kind])})"
            for kind in kinds
        ]
        advice = f"; {_CONVERT}" if FOREIGN in kinds else ""
        raise ValueError(
            f"all files and classes of {root} must be usable, received "
            f"{', '.join(parts)}{advice}; repair or remove them, or train "
            "without them by --skip_unreadable"
        )


def _first(names):
    rest = len(names) - _NAMED
    more = [f"and {rest:,} more"] if rest > 0 else []
    return "; ".join(names[:_NAMED] + more)


def images_of_class(root: str, path: str, findings: Findings) -> list[str]:
    """Returns the images of a class by their names, in order.

    Args:
        root: The folder of the set; findings are named inside it.
        path: The folder of the class.
        findings: Receives the files that are left out.
    """
    found = []
    with os.scandir(path) as opened:
        entries = sorted(opened, key=lambda entry: entry.name)
    for entry in entries:
        name = os.path.relpath(entry.path, root)
        ending = os.path.splitext(entry.name)[1].lower()
        if entry.name.startswith("."):
            findings.add(HIDDEN, name)
        elif ending in _FOREIGN_FILES:
            findings.add(FOREIGN, name)
        elif ending in IMAGE_FILES:
            try:
                files.check_file(entry.path, files.IMAGE_BYTES)
            except ValueError as error:
                rule = str(error).removeprefix(entry.path)
                findings.add(IRREGULAR, f"{name}{rule}")
            else:
                found.append(entry.path)
        elif entry.is_dir():
            findings.add(FOLDERS, name)
        else:
            findings.add(OTHER, name)
    return found


def without_unreadable(
    root: str, classes: list[list[str]], findings: Findings
) -> list[list[str]]:
    """Returns the images of each class that decode.

    Images of up to 1 GiB in all are decoded. Of larger sets, whose decoding
    would delay every start, the header of each file is read.

    Args:
        root: The folder of the set; findings are named inside it.
        classes: The paths of the images of each class.
        findings: Receives the images that do not decode.
    """
    paths = [path for found in classes for path in found]
    decodes = sum(map(os.path.getsize, paths)) <= _DECODED_BYTES
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        faults = pool.map(lambda path: _fault(path, decodes), paths)
        fault_of = dict(zip(paths, faults, strict=True))
    for path in paths:
        if fault_of[path] is not None:
            kind, reason = fault_of[path]
            findings.add(kind, f"{os.path.relpath(path, root)}: {reason}")
    return [
        [path for path in found if fault_of[path] is None] for found in classes
    ]


def _fault(path, decodes):
    """Returns the kind and the reason if an image cannot be used."""
    try:
        with open(path, "rb") as file:
            content = file.read()
    except OSError as error:
        return UNREADABLE, error.strerror
    if content[4:8] == b"ftyp" and content[8:12] in limits.HEIC:
        return FOREIGN, f"HEIC inside {os.path.splitext(path)[1]}"
    try:
        with tf.device("CPU"):
            image = limits.check_cheaply(tf.constant(content))
            if decodes and content[:3] == b"\xff\xd8\xff":
                # All bits are read, but an eighth of each side is computed.
                tf.io.decode_jpeg(image, ratio=8)
            elif decodes:
                decoding.decode(image)
    except tf.errors.OpError as error:
        reason = splits.reason(error)
        if "jpeg::" in reason or "Invalid JPEG" in reason:
            reason = "a truncated or damaged JPEG"
        return UNREADABLE, reason
    return None
