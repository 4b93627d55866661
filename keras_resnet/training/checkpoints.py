"""Checkpoints of a run: written atomically, verified when they are read.

The checkpoint of step 8 is `ckpt-8.index` and `ckpt-8.data-00000-of-00001`. The
index is renamed to its place last, so a program that is killed while it saves
leaves an incomplete checkpoint, which is ignored. TensorFlow stores a checksum
of every tensor. If a checkpoint was damaged, the run resumes from the previous
one.
"""

import contextlib
import os
import re
import shutil
import stat
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
from pathlib import Path

import keras
import tensorflow as tf

from keras_resnet import atomic

# Errors that TensorFlow raises for damaged bytes. Those of _NO_DAMAGE have
# another reason, and the file may be good.
_DAMAGE = (tf.errors.OpError, IndexError)
_NO_DAMAGE = (
    tf.errors.AbortedError,
    tf.errors.CancelledError,
    tf.errors.DeadlineExceededError,
    tf.errors.PermissionDeniedError,
    tf.errors.ResourceExhaustedError,
    tf.errors.UnavailableError,
)
_PART = re.compile(
    r"ckpt-(0|[1-9][0-9]*)\.(index|data-[0-9]{5}-of-[0-9]{5})", re.ASCII
)
_TORN_FILE = re.compile(_PART.pattern + r"(\.tempstate[0-9]+)?", re.ASCII)
_TORN_FOLDER = re.compile(r"ckpt-[0-9]+_temp", re.ASCII)
# The files that `atomic.write` writes where runs and searches are kept.
_REMAINS = re.compile(
    r"\.keras_resnet-[0-9]+-"
    r"((config|dataset|search)\.json|metrics\.csv|checkpoint)",
    re.ASCII,
)


class CheckpointError(OSError):
    """A checkpoint that could not be written; the earlier ones stay."""


class StateError(ValueError):
    """A checkpoint that holds another state than the run needs."""


def steps(directory: str | os.PathLike) -> list[int]:
    """Returns the steps of the checkpoints in a directory, in order."""
    return _steps(directory, stat.S_ISREG)


def _steps(directory, is_kind=bool):
    """Returns the steps whose index is a file of a kind; bool means any."""
    return sorted(
        int(match[1])
        for match, _ in _matches(directory, _PART, is_kind)
        if match[2] == "index"
    )


def largest_bytes(directory: str | os.PathLike) -> int:
    """Returns the bytes of the largest checkpoint in a directory."""
    sizes: dict[int, int] = {}
    for match, path in _matches(directory, _PART):
        with contextlib.suppress(FileNotFoundError):
            step = int(match[1])
            sizes[step] = sizes.get(step, 0) + path.stat().st_size
    return max(sizes.values(), default=0)


def save(
    write: Callable[[str], None],
    directory: str | os.PathLike,
    step: int,
    keep: int | None,
) -> None:
    """Writes a checkpoint, and removes all but the last ones.

    Args:
        write: Writes a checkpoint to a path, as TensorFlow does.
        directory: Its place, made if only this folder is missing.
        step: The step of the checkpoint.
        keep: Number of checkpoints to keep; None keeps all of them.

    Raises:
        CheckpointError: If it cannot be written. Its parts are removed, and the
            earlier checkpoints stay.
    """
    directory = Path(directory)
    before = steps(directory)
    try:
        # Not its parents: a run whose directory is gone must not start a new
        # one that lacks the other files.
        directory.mkdir(exist_ok=True)
        _clear_way(directory, step)
        with literal(directory) as place:
            write(f"{place}/ckpt-{step}")
        for path in _parts(directory, step):
            _flush(path)
        _flush(directory)
        prune(directory, keep)
    except (tf.errors.OpError, OSError) as error:
        with contextlib.suppress(OSError):
            clean(directory)
        last = f"step {before[-1]}" if before else "the start"
        raise CheckpointError(
            f"the checkpoint of step {step} cannot be written to {directory} "
            f"({reason(error)}); solve that, then run the same command again "
            f"to resume from {last}"
        ) from error


def prune(directory: str | os.PathLike, keep: int | None) -> None:
    """Removes all but the last checkpoints, and lists those that are left."""
    directory = Path(directory)
    kept = steps(directory)
    if keep is not None:
        for old in kept[:-keep]:
            _remove(directory, old)
        kept = kept[-keep:]
    # The file is for tf.train.latest_checkpoint and TensorBoard.
    if kept:
        atomic.write(
            directory / "checkpoint",
            f'model_checkpoint_path: "ckpt-{kept[-1]}"\n'
            + "".join(
                f'all_model_checkpoint_paths: "ckpt-{step}"\n' for step in kept
            ),
        )


def restore(
    read: Callable[[str], int],
    directory: str | os.PathLike,
    report: Callable[[str], None],
) -> int | None:
    """Reads the newest checkpoint that is not damaged.

    Args:
        read: Reads the checkpoint of a path, and returns the step in it.
        directory: The folder of the checkpoints.
        report: Receives a line for each damaged one.

    Returns:
        The step of the checkpoint, or None if the folder holds none.

    Raises:
        StateError: If a checkpoint holds another state, or all are damaged.
        OSError: If a file cannot be opened.
    """
    directory = Path(directory)
    damaged: list[str] = []
    place = str(directory)
    tried = set()
    # A run that trains may remove checkpoints while another program reads.
    while left := [step for step in _steps(directory) if step not in tried]:
        step = left[-1]
        path = directory / f"ckpt-{step}"
        tried.add(step)
        try:
            _check_parts(directory, step)
            with literal(directory) as place:
                found = read(f"{place}/ckpt-{step}")
        except (_NotRegularError, *_DAMAGE) as error:
            if isinstance(error, _NO_DAMAGE):
                raise
            if step in _steps(directory):
                why = reason(error).replace(str(place), str(directory))
                damaged.append(f"{path} is damaged ({why})")
                report(f"{damaged[-1]}; resuming from the previous one")
            continue
        except StateError as error:
            raise StateError(f"{path} {error}") from error
        if found != step:
            raise StateError(
                f"{path} must hold step {step}, received step {found}: the "
                "file was renamed; give it its old name, or move it away"
            )
        return step
    if damaged:
        raise StateError(
            f"no checkpoint in {directory} can be read: {damaged[0]}; put a "
            "copy of one there, or start again in another work directory"
        )
    return None


def read(
    checkpoint: tf.train.Checkpoint,
    path: str,
    variables: Iterable[tf.Variable | keras.Variable],
    is_partial: bool = False,
) -> None:
    """Reads a checkpoint, and verifies that every variable got its value.

    TensorFlow's own checks pass over a variable that it does not track, and
    that variable would keep a random value. Each variable therefore gets a
    value first that no run can have.

    Args:
        checkpoint: The objects to restore.
        path: Prefix of the checkpoint's files, from `restore`.
        variables: All variables that must be in the checkpoint.
        is_partial: Whether the checkpoint may hold more than the objects.

    Raises:
        StateError: If a variable is not in the checkpoint, its shape is
            another one there, or there is more in the checkpoint.
    """
    variables = list(variables)
    for variable in variables:
        dtype = tf.as_dtype(variable.dtype)
        variable.assign(tf.fill(variable.shape, _unread(dtype)))
    try:
        status = checkpoint.read(path)
    except ValueError as error:
        raise StateError(
            f"is of another network than the run's ({reason(error)}): name "
            "another work directory"
        ) from error
    status.expect_partial()  # or TensorFlow logs what it does not restore
    missing = [v for v in variables if not _is_read(v)]
    if missing:
        names = [getattr(v, "path", v.name) for v in missing]
        raise StateError(
            f"lacks {len(missing)} of {len(variables)} variables "
            f"({', '.join(names[:5])}{', ...' if names[5:] else ''}): they are "
            "not in the checkpoint, so their values are lost; train again in "
            "another work directory"
        )
    if not is_partial:
        try:
            status.assert_consumed()
        except AssertionError as error:
            raise StateError(
                f"holds more than the run's network ({reason(error)}): name "
                "another work directory"
            ) from error


def _unread(dtype):
    """Returns a value that no variable of a run has in all its elements."""
    return tf.constant("\0" if dtype == tf.string else dtype.min, dtype)


def _is_read(variable):
    value = tf.convert_to_tensor(variable)
    is_left = tf.reduce_all(tf.equal(value, _unread(value.dtype)))
    return not tf.size(value) or not is_left


def untracked(model: keras.Model) -> list[keras.Variable]:
    """Returns the variables that `tf.train.Checkpoint` does not find.

    They are the seeds of random layers, and the weights of a layer that keeps
    them where TensorFlow does not look. A checkpoint must list them.
    """
    found = set(map(id, tf.train.TrackableView(model).descendants()))
    return [v for v in model.variables if id(v) not in found]


def set_aside(directory: str | os.PathLike, after: int) -> None:
    """Renames the checkpoints after a step, all of them damaged.

    They keep their bytes for an inspection, and the next checkpoints can have
    their names. No file that was set aside earlier is overwritten.
    """
    for step in _steps(directory):
        if step > after:
            for path in _parts(directory, step):
                atomic.set_aside(path, "damaged")


def drop(directory: str | os.PathLike, after: int) -> None:
    """Removes the checkpoints after a step, which the run will repeat."""
    for step in steps(directory):
        if step > after:
            _remove(Path(directory), step)


def clean(directory: str | os.PathLike) -> None:
    """Removes incomplete files of a program that was killed while it saved.

    Only files with names of `save` and TensorFlow are removed. Other files in
    the folder belong to the user.
    """
    whole = set(steps(directory))
    for match, path in _matches(directory, _TORN_FILE):
        if match[3] or int(match[1]) not in whole:
            path.unlink(missing_ok=True)
    for _, path in _matches(directory, _TORN_FOLDER, stat.S_ISDIR):
        shutil.rmtree(path, ignore_errors=True)
    for path in remains(directory):
        path.unlink(missing_ok=True)


def remains(directory: str | os.PathLike) -> list[Path]:
    """Returns the incomplete files of `atomic.write` in a directory."""
    return [path for _, path in _matches(directory, _REMAINS)]


@contextlib.contextmanager
def literal(directory: str | os.PathLike) -> Iterator[str]:
    r"""Gives a path of an existing directory that TensorFlow reads literally.

    TensorFlow takes the path of a checkpoint as a pattern, in which `[`, `*`,
    `?` and `\` are special, and rejects a path that is not UTF-8. Linux names
    the open directory by a number instead.

    Raises:
        OSError: If the system does not have such names.
    """
    path = str(directory)
    if not re.search(r"[\[*?\\\ud800-\udfff]", path):
        yield path
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        place = f"/proc/self/fd/{descriptor}"
        if not os.path.isdir(place):
            raise OSError(
                f"the path {path} must not contain any of [ * ? \\ on this "
                "system, because TensorFlow takes them as a pattern"
            )
        yield place
    finally:
        os.close(descriptor)


def reason(error: Exception) -> str:
    """Returns the first line of an error, without TensorFlow's own names."""
    text = getattr(error, "message", None) or str(error) or repr(error)
    text = re.sub(r"\{\{function_node [^}]*\}\}\s*", "", text)
    text = text.strip().partition("\n")[0]
    return re.sub(r"\s*\[Op:\w+\](?= ?(name: )?$)", "", text)


def _matches(directory, pattern, is_kind=stat.S_ISREG):
    """Returns the files whose whole name matches, with the matches."""
    found = []
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        for path in sorted(Path(directory).iterdir()):
            match = pattern.fullmatch(path.name)
            if match and is_kind(_mode(path)):
                found.append((match, path))
    return found


def _mode(path):
    """Returns the kind of a file, of a link to nothing that of the link."""
    for look in (os.stat, os.lstat):
        with contextlib.suppress(OSError):
            return look(path).st_mode
    return 0  # removed meanwhile


def _parts(directory, step):
    return [
        path
        for match, path in _matches(directory, _PART, bool)
        if int(match[1]) == step
    ]


class _NotRegularError(Exception):
    """A part of a checkpoint that TensorFlow may never read to its end."""


def _check_parts(directory, step):
    """Raises if a part of a checkpoint is not a regular file.

    Raises:
        _NotRegularError: If it is a pipe, a device, a folder or a link to
            nothing.
        OSError: If a file is not damaged but cannot be opened.
    """
    for path in _parts(directory, step):
        mode = _mode(path)
        if mode and not stat.S_ISREG(mode):
            raise _NotRegularError(f"{path.name} must be a regular file")
        with contextlib.suppress(FileNotFoundError), path.open("rb"):
            pass


def _clear_way(directory, step):
    """Sets aside the links, pipes and folders where a checkpoint is written.

    TensorFlow would write through them.
    """
    for pattern in (_TORN_FILE, _TORN_FOLDER):
        for _, path in _matches(directory, pattern, bool):
            is_of_step = re.match(f"ckpt-{step}[._]", path.name)
            if is_of_step and not stat.S_ISREG(os.lstat(path).st_mode):
                atomic.set_aside(path, "damaged")


def _remove(directory, step):
    # The index goes first: without it, the other parts are ignored.
    for path in sorted(
        _parts(directory, step), key=lambda path: path.suffix != ".index"
    ):
        if stat.S_ISDIR(_mode(path)):
            atomic.set_aside(path, "damaged")
        else:
            path.unlink(missing_ok=True)


def _flush(path):
    """Flushes a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
