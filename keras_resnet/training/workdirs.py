"""The work directory of a run: its files, its lock, its data set.

A run writes `config.json`, `dataset.json`, `checkpoints/`, `best/`,
`metrics.csv` and the events of TensorBoard.
"""

import collections
import contextlib
import errno
import fcntl
import json
import math
import os
import re
import socket
import stat
from collections.abc import Callable
from pathlib import Path

import numpy as np

from keras_resnet import atomic
from keras_resnet.data import datasets
from keras_resnet.data import views
from keras_resnet.training import checkpoints
from keras_resnet.training import configs

# The folders of a work directory that hold checkpoints.
CHECKPOINTS = {"last": "checkpoints", "best": "best"}

_LOCK = ".lock"
# Folders of a run and a search in which a program writes and removes files.
_FOLDERS = (*CHECKPOINTS.values(), "events", "trials", "tuner")
_LARGEST_FILE = 2**26  # bytes; dataset.json of ImageNet has less than a MB
_MOST_DIFFERENCES = 5  # named in one line
# The images of a class in the record of a folder.
_CLASS = re.compile(r"(\d{1,12}) images? \(sha256 \w+\)")


class WorkdirError(ValueError):
    """A work directory that cannot be used; the message says why."""


def local(path: str | os.PathLike) -> Path:
    """Returns the path of a local directory.

    Raises:
        WorkdirError: If the path is the URL of a bucket or a server.
    """
    try:
        return atomic.local(path, "a work directory")
    except ValueError as error:
        raise WorkdirError(str(error)) from error


def is_empty(directory: Path) -> bool:
    """Returns whether a directory is missing, empty or left by a kill."""
    if not directory.is_dir():
        return True
    left = {directory / _LOCK, *checkpoints.remains(directory)}
    return set(directory.iterdir()) <= left


class Lock:
    """Keeps other processes out of a directory until this one ends.

    The kernel releases the lock when the process ends, after a kill also. A
    missing directory is created.

    Args:
        directory: The work directory of a run or a search.
        report: Receives a line if the file system cannot lock.

    Raises:
        WorkdirError: If another process uses the directory, or a link in it
            would lead this process to write elsewhere.
        OSError: If it cannot be written.
    """

    def __init__(self, directory: Path, report: Callable[[str], None]):
        self.directory = directory
        self.report = report

    def __enter__(self):
        path = self.directory / _LOCK
        with _writing(self.directory):
            self.directory.mkdir(parents=True, exist_ok=True)
        _check_no_link_out(self.directory)
        with _writing(self.directory):
            self.descriptor = os.open(
                path,
                os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK,
                0o666,
            )
        try:
            self._lock()
        except BaseException:
            os.close(self.descriptor)
            raise
        return self

    def _lock(self):
        try:
            fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                holder = os.pread(self.descriptor, 200, 0).decode(
                    errors="replace"
                )
                raise WorkdirError(
                    f"{self.directory} is in use by {holder or 'a process'}: "
                    "wait until it ends, or choose another directory"
                ) from None
            self.report(
                f"{self.directory} cannot be locked ({error.strerror}): do "
                "not start another process in it before this one ends"
            )
        text = f"process {os.getpid()} on {socket.gethostname()}"
        if os.fstat(self.descriptor).st_nlink > 1:
            return  # it is a file of another place too, such as a backup
        with contextlib.suppress(OSError):  # it only serves the message
            os.ftruncate(self.descriptor, 0)
            os.pwrite(self.descriptor, text.encode(), 0)

    def check(self):
        """Raises OSError if the directory was removed or replaced."""
        try:
            found = os.stat(self.directory / _LOCK)
            is_same = os.path.samestat(found, os.fstat(self.descriptor))
        except FileNotFoundError:
            is_same = False
        if not is_same:
            raise OSError(
                f"{self.directory} was removed or replaced while the run used "
                "it: run the same command again to resume from the files there"
            )

    def __exit__(self, *_):
        os.close(self.descriptor)


def _check_no_link_out(directory):
    """Raises WorkdirError for a link through which a program would write.

    The author of a directory may have linked a part of it to any file of the
    user.
    """
    lock = directory / _LOCK
    if lock.is_symlink() or (lock.exists() and not lock.is_file()):
        raise WorkdirError(
            f"{lock} must be a regular file, received a link or a special "
            "file: remove it"
        )
    root = os.path.realpath(directory)
    folders = [directory / name for name in _FOLDERS]
    folders += (directory / "trials").glob("*")
    for folder in folders:
        if folder.is_symlink():
            found = os.path.realpath(folder)
            if os.path.commonpath([root, found]) != root:
                raise WorkdirError(
                    f"{folder} must be inside the work directory, received a "
                    f"link to {found}: replace the link by a directory; to use "
                    "another disk, link the whole work directory"
                )
    # keras-tuner writes its files in place.
    for folder, folders, files in os.walk(directory / "tuner"):
        for name in (*folders, *files):
            path = os.path.join(folder, name)
            if os.path.islink(path):
                raise WorkdirError(f"{path} must not be a link: remove it")


@contextlib.contextmanager
def _writing(workdir):
    """Explains what to do if a work directory cannot be written."""
    try:
        yield
    except OSError as error:
        raise OSError(
            f"the work directory {workdir} cannot be written "
            f"({error.strerror or error}); nothing in it was changed: make it "
            "writable or name another by --workdir"
        ) from error


def prepare(config, dataset, workdir):
    """Creates the work directory; `config.json` is its first file."""
    about = _about(dataset)
    path = workdir / "dataset.json"
    if path.exists() and has_steps(workdir):
        _check_same_data(path, about)
    with _writing(workdir):
        for remains in checkpoints.remains(workdir):
            remains.unlink(missing_ok=True)
        _write_json(workdir / "config.json", config.to_json())
        _write_json(path, about)


def _about(dataset):
    """Returns the object of `dataset.json`."""
    return {
        "image_shape": list(dataset.image_shape),
        "labels": list(dataset.labels),
        "preprocessing": json.loads(dataset.preprocessing.to_json()),
        "images": dataset.record,
    }


def has_steps(workdir: Path) -> bool:
    """Returns whether a run has saved a step.

    A run that failed before its first checkpoint does not block its directory.
    """
    return any(
        bool(checkpoints.steps(workdir / folder))
        for folder in CHECKPOINTS.values()
    )


def is_described(workdir: Path) -> bool:
    """Returns whether the files that `prepare` writes exist."""
    return all(
        (workdir / name).is_file() for name in ("config.json", "dataset.json")
    )


def check(config, workdir, dataset=None):
    """Raises WorkdirError for a directory of another configuration.

    Args:
        config: The configuration of the run.
        workdir: Its directory.
        dataset: Its data set, if it is known. The recipe of a folder follows
            the number of images, so images that changed are named first.
    """
    if not os.path.lexists(workdir / "config.json"):
        if not is_empty(workdir):
            raise WorkdirError(
                f"{workdir} must be empty or a work directory, received one "
                "without config.json: choose another directory"
            )
        return
    # Compares JSON values, so that the error also names fields of another
    # version.
    path = workdir / "config.json"
    old, new = _flat(read_json(path)), _flat(config.to_json())
    strangers = [
        name
        for name in sorted(old.keys() ^ new.keys())
        if not name.startswith("model_arguments.")
    ]
    if strangers:
        raise _other_version(path, ", ".join(strangers))
    differing = [
        _difference(name, old.get(name), new.get(name))
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name) and name != "data_dir"
    ]
    if differing and has_steps(workdir):
        described = workdir / "dataset.json"
        if dataset is not None and described.exists():
            _check_same_data(described, _about(dataset))
        raise WorkdirError(
            f"{workdir} belongs to another configuration: "
            f"{'; '.join(differing)}. Choose another directory or the old "
            "configuration"
        )


def _check_same_data(path, about):
    """Raises WorkdirError for a changed data set of the same name."""
    read_dataset(path.parent)
    old, new = read_json(path), dict(about)
    old.update(old.pop("preprocessing"))
    new.update(new.pop("preprocessing"))
    images = old.pop("images", None), new.pop("images")
    # The images come first: their record names the class.
    differing = _differing_images(*images) or [
        _difference(name, old.get(name), new.get(name))
        for name in sorted(old.keys() | new.keys())
        if not _is_close(old.get(name), new.get(name))
    ]
    if differing:
        raise WorkdirError(
            f"{path.parent} was trained on other data: {'; '.join(differing)}. "
            "Choose another directory or the old data"
        )


def check_same_images(record: dict | None, dataset: datasets.DataSet) -> None:
    """Raises if images changed since the training.

    Args:
        record: The record of a `TrainedNetwork`; None if an earlier version
            trained it.
        dataset: The data set of the same name, as it is now.

    Raises:
        WorkdirError: Names the differences.
    """
    differing = _differing_images(record, dataset.record)
    if differing:
        raise WorkdirError(
            f"the images of {dataset.name} must be those of the training: "
            f"{'; '.join(differing)}. Restore them; apps.evaluate uses the "
            f"images of today with --dataset={dataset.name}"
        )


def _differing_images(old, new):
    """Returns the differences between two records of images."""
    if old is None:  # an earlier version wrote none
        return []
    if not isinstance(old, dict):
        return [_difference("images", old, new)]
    old, new = _leaves(old), _leaves(new)
    before, now = _images_of_classes(old), _images_of_classes(new)
    changed = {
        name
        for name in before.keys() | now.keys()
        if before.get(name, 0) != now.get(name, 0)
    }
    differing = [
        f"class {name} had {_images(before.get(name, 0))}, has "
        f"{now.get(name, 0)}"
        for name in sorted(changed)
    ]
    differing += [
        _image_difference(
            name, old.get(name, "not there"), new.get(name, "not there")
        )
        for name in sorted(old.keys() | new.keys())
        if old.get(name, "") != new.get(name, "")
        and name.partition("/")[2] not in changed
    ]
    rest = len(differing) - _MOST_DIFFERENCES
    more = [f"and {rest} more"] if rest > 0 else []
    return differing[:_MOST_DIFFERENCES] + more


def _images_of_classes(leaves):
    """Returns the images of each class of a folder, for train and test."""
    found = collections.Counter()
    for name, value in leaves.items():
        if count := _CLASS.fullmatch(str(value)):
            found[name.partition("/")[2]] += int(count[1])
    return found


def _images(count):
    return f"{count} image{'s' * (count != 1)}"


def _image_difference(name, old, new):
    """Returns the difference of one class in one split, or of another leaf."""
    counts = [_CLASS.fullmatch(str(value)) for value in (old, new)]
    if not all(counts):
        return _difference(name, old, new)
    before, now = (int(count[1]) for count in counts)
    if before == now:
        return (
            f"{name} has {_images(now)} as before, with other names, sizes or "
            "contents"
        )
    return f"{name} had {_images(before)}, has {now}"


def _leaves(record, prefix=""):
    leaves = {}
    for name, value in record.items():
        if isinstance(value, dict):
            leaves.update(_leaves(value, f"{prefix}{name}/"))
        else:
            leaves[prefix + name] = value
    return leaves


def recorded_data_dir(
    config: configs.Config, workdir: str | os.PathLike
) -> str | None:
    """Returns the `data_dir` of the configuration of a work directory.

    Raises:
        WorkdirError: If it is inside the work directory. The author of the
            directory also wrote that data, and only the user can trust both.
    """
    if config.data_dir is None:
        return None
    found = os.path.expanduser(config.data_dir)
    for resolved in (os.path.abspath, os.path.realpath):
        root = resolved(workdir)
        if os.path.commonpath([root, resolved(found)]) == root:
            raise WorkdirError(
                f"{workdir}/config.json must not name a data_dir inside the "
                f"work directory, received {config.data_dir}: pass "
                f"--data_dir={config.data_dir} if you trust what is there"
            )
    return config.data_dir


def _difference(name, old, new):
    if _shown(old) == _shown(new):
        return f"{name} has other values"
    return f"{name} was {_shown(old)}, is {_shown(new)}"


def _shown(value):
    """Returns the start of a value: there may be a thousand labels."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}..."


def _is_close(a, b):
    """Returns whether values are equal, except the rounding of a machine."""
    try:
        return np.allclose(a, b, rtol=1e-5)
    except (TypeError, ValueError):
        return a == b


def _flat(fields, prefix=""):
    flat = {}
    for name, value in fields.items():
        if isinstance(value, dict) and name in ("recipe", "model_arguments"):
            flat.update(_flat(value, f"{name}."))
        else:
            flat[prefix + name] = value
    return flat


def read_config(workdir: Path) -> configs.Config:
    """Returns the configuration in `config.json`.

    Raises:
        WorkdirError: If it cannot be read.
    """
    path = workdir / "config.json"
    fields = read_json(path)
    try:
        return configs.Config.from_json(fields)
    except (TypeError, KeyError) as error:
        raise _other_version(path, error) from error
    except ValueError as error:
        raise WorkdirError(f"{path}: {error}") from error


def read_dataset(
    workdir: Path,
) -> tuple[views.Preprocessing, list[str], dict | None]:
    """Returns preprocessing, labels and record of images of `dataset.json`.

    Raises:
        WorkdirError: If the file cannot be read or has other values.
    """
    path = workdir / "dataset.json"
    about = read_json(path)
    labels = about.get("labels")
    if (
        not isinstance(labels, list)
        or not labels
        or not all(isinstance(label, str) for label in labels)
    ):
        raise WorkdirError(
            f"{path}: labels must be a list of text, received {_shown(labels)}"
        )
    try:
        preprocessing = views.Preprocessing.from_json(
            json.dumps(about["preprocessing"])
        )
        shape = list(preprocessing.image_shape)
    except (TypeError, KeyError, AttributeError, OverflowError) as error:
        raise _other_version(path, repr(error)) from error
    except ValueError as error:
        raise WorkdirError(f"{path}: {error}") from error
    if not all(type(n) is int and n <= 2**14 for n in shape):
        raise WorkdirError(
            f"{path}: image_size and channels must be whole numbers of at most "
            f"{2**14:,}, received {_shown(shape)}"
        )
    if about.get("image_shape") != shape:
        raise WorkdirError(
            f"{path}: image_shape must be {shape}, as preprocessing has it, "
            f"received {_shown(about.get('image_shape'))}"
        )
    record = about.get("images")
    if not isinstance(record, dict | None):
        raise WorkdirError(
            f"{path}: images must be an object, received {_shown(record)}"
        )
    return preprocessing, labels, record


def _other_version(path, what):
    return WorkdirError(
        f"{path} was changed by hand or written by another version of "
        f"keras_resnet, whose work directories this one does not read ({what})"
    )


def read_json(path: Path) -> dict:
    """Returns the object in a JSON file.

    Raises:
        WorkdirError: If the file cannot be read or is not a JSON object of
            finite numbers.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise ValueError("it must be a regular file")
        if path.stat().st_size > _LARGEST_FILE:
            raise ValueError(f"it must have at most {_LARGEST_FILE:,} bytes")
        value = json.loads(
            path.read_bytes().decode(),
            parse_float=_finite,
            parse_constant=_finite,
            object_pairs_hook=_unique,
        )
        if not isinstance(value, dict):
            raise ValueError("it must be a JSON object")
    except (OSError, ValueError) as error:
        raise WorkdirError(f"{path} cannot be read: {error}") from error
    except RecursionError:
        raise WorkdirError(f"{path} cannot be read: it is too deep") from None
    return value


def _finite(text):
    if not math.isfinite(float(text)):
        raise ValueError(f"numbers must be finite, received {text}")
    return float(text)


def _unique(pairs):
    if len(dict(pairs)) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{_shown(twice)} must be there once")
    return dict(pairs)


def _write_json(path, value):
    atomic.write(path, json.dumps(value, indent=1) + "\n")
