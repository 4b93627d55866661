"""The state of a run on disk: written whole, read back or passed over.

A checkpoint of step 8 is `ckpt-8.index` and `ckpt-8.data-00000-of-00001`. The
index is renamed to its place last, so a program that dies while it saves
leaves no checkpoint that looks whole. TensorFlow keeps a checksum of every
tensor; one that was damaged afterwards is noticed when it is read, and the one
before it is taken.
"""

import contextlib
import os
import re
import shutil
from collections.abc import Callable
from collections.abc import Iterator
from pathlib import Path

import tensorflow as tf


class CheckpointError(OSError):
    """A checkpoint that could not be written; the earlier ones are there."""


def steps(directory: str | os.PathLike) -> list[int]:
    """The steps of the checkpoints in a directory, the oldest first."""
    found = (
        re.fullmatch(r"ckpt-(\d+)\.index", path.name)
        for path in Path(directory).glob("ckpt-*.index")
    )
    return sorted(int(match[1]) for match in found if match)


def prefix(directory: str | os.PathLike, step: int) -> str:
    """The path of a checkpoint, as TensorFlow has it."""
    return str(Path(directory) / f"ckpt-{step}")


def save(
    write: Callable[[str], None],
    directory: str | os.PathLike,
    step: int,
    keep: int,
) -> None:
    """Writes a checkpoint, and removes all but the last ones.

    Args:
        write: Writes one, given its path, as TensorFlow does.
        directory: Where; made if it is not there.
        step: Its number.
        keep: How many there are to be.

    Raises:
        CheckpointError: If it cannot be written. What was written of it is
            removed, and what was there before is untouched.
    """
    directory = Path(directory)
    before = steps(directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        write(prefix(directory, step))
        for path in directory.glob(f"ckpt-{step}.*"):
            _flush(path)
        _flush(directory)
    except (tf.errors.OpError, OSError) as error:
        with contextlib.suppress(OSError):
            clean(directory)
        reason = getattr(error, "message", None) or str(error)
        last = f"step {before[-1]}" if before else "the start"
        raise CheckpointError(
            f"the checkpoint of step {step} cannot be written to {directory} "
            f"({reason.splitlines()[0]}); mend that and give the same command: "
            f"it goes on from {last}"
        ) from error
    for old in steps(directory)[:-keep]:
        _remove(directory, old)
    # What tf.train.latest_checkpoint and TensorBoard look for.
    replace_file(
        directory / "checkpoint",
        f'model_checkpoint_path: "ckpt-{step}"\n'
        + "".join(
            f'all_model_checkpoint_paths: "ckpt-{kept}"\n'
            for kept in steps(directory)
        ),
    )


def restore(
    read: Callable[[str], None],
    directory: str | os.PathLike,
    report: Callable[[str], None],
) -> int | None:
    """Reads the newest checkpoint that is whole.

    Args:
        read: Reads the checkpoint of a path, all of it.
        directory: Where they are.
        report: Is told of each one that is damaged.

    Returns:
        The step of the checkpoint, or None if there is none that is whole.
    """
    for step in reversed(steps(directory)):
        path = prefix(directory, step)
        try:
            read(path)
            return step
        except (tf.errors.OpError, ValueError, IndexError) as error:
            reason = getattr(error, "message", None) or str(error)
            report(
                f"{path} is damaged ({reason.splitlines()[0]}); going back to "
                "the one before"
            )
    return None


def tidy(
    directory: str | os.PathLike,
    step: int | None,
    report: Callable[[str], None],
) -> None:
    """Leaves the checkpoints up to the one that was restored.

    Args:
        directory: Where they are.
        step: What `restore` gave.
        report: Is told if every one is damaged.
    """
    if step is None and steps(directory):
        report("every checkpoint is damaged; starts at step 0")
    set_aside(directory, after=-1 if step is None else step)
    clean(directory)


def set_aside(directory: str | os.PathLike, after: int) -> None:
    """Renames the checkpoints after a step, all of them damaged.

    They keep their bytes, for somebody who wants to look, and are out of the
    way of the next ones.
    """
    for step in steps(directory):
        if step > after:
            for path in Path(directory).glob(f"ckpt-{step}.*"):
                os.replace(path, path.with_name(f"damaged-{path.name}"))


def drop(directory: str | os.PathLike, after: int) -> None:
    """Removes the checkpoints after a step: of a run that went another way."""
    for step in steps(directory):
        if step > after:
            _remove(Path(directory), step)


def clean(directory: str | os.PathLike) -> None:
    """Removes what a program left that died while it saved."""
    whole = {f"ckpt-{step}" for step in steps(directory)}
    for path in Path(directory).glob("ckpt-*"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        elif path.name.partition(".")[0] not in whole or "temp" in path.name:
            path.unlink(missing_ok=True)


def replace_file(path: str | os.PathLike, content: str | bytes) -> None:
    """Writes a file so that it is there as a whole or not at all."""
    path = Path(path)
    if isinstance(content, str):
        content = content.encode()
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_bytes(content)
        os.replace(beside, path)
    except OSError:
        beside.unlink(missing_ok=True)
        raise


def remains(directory: Path) -> Iterator[Path]:
    """What `replace_file` left in a directory when it was killed."""
    for path in directory.glob(".*.*"):
        if re.fullmatch(r"\.(.+)\.\d+", path.name):
            yield path


def _remove(directory, step):
    # Without its index it is no checkpoint, whatever is left of it.
    path = Path(prefix(directory, step))
    path.with_name(f"{path.name}.index").unlink(missing_ok=True)
    for part in directory.glob(f"{path.name}.data-*"):
        part.unlink(missing_ok=True)


def _flush(path):
    """Has the file system keep a file, or the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
