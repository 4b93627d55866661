"""Runs, read from work directories for a report."""

import dataclasses
import functools
import json
import os
import stat
from collections.abc import Iterable
from pathlib import Path

from keras_resnet.papers import experiments
from keras_resnet.training import metrics
from keras_resnet.training.configs import Config

_MOST_BYTES = 2**26
_MOST_REASON = 200


@dataclasses.dataclass(frozen=True)
class Run:
    """Training run, read from the two small files of a work directory.

    Attributes:
        name: Name of the work directory.
        config: Configuration of the run (`config.json`).
        metrics: Rows of `metrics.csv`: numbers by column, without empty cells.
    """

    name: str
    config: Config
    metrics: tuple[dict[str, float], ...]

    @property
    def step(self) -> int:
        """Number of finished steps."""
        return int(self.metrics[-1]["step"]) if self.metrics else 0

    @property
    def is_finished(self) -> bool:
        """Whether all steps were taken, and the last one was tested."""
        return (
            self.step == self.config.recipe.steps
            and "test_top1_error" in self.metrics[-1]
        )

    @property
    def test_error(self) -> float:
        """Test error of the last step in percent, not that of the best step."""
        return self.metrics[-1]["test_top1_error"]

    @functools.cached_property
    def experiment(self) -> experiments.Experiment | None:
        """Row of the papers that was trained, of any length, or None."""
        name = self.config.experiment
        return None if name is None else experiments.get_experiment(name)

    @property
    def label(self) -> str:
        """Label in pictures: the name of the experiment, or of the run."""
        return self.experiment.name if self.experiment else self.name

    def column(self, name: str) -> tuple[list[float], list[float]]:
        """Returns the steps and values of a column, without empty cells."""
        rows = [row for row in self.metrics if name in row]
        return [row["step"] for row in rows], [row[name] for row in rows]


def load(workdir: str | os.PathLike) -> Run:
    """Reads the run of a work directory, or of a copy of its two files.

    Raises:
        ValueError: If `config.json` or `metrics.csv` is missing or damaged.
    """
    workdir = Path(workdir)
    path = workdir / "config.json"
    try:
        config = Config.from_json(json.loads(_text(path)))
        for name in ("model", "dataset", "dtype", "backend"):
            value = getattr(config, name)
            if not isinstance(value, str):
                raise ValueError(f"{name} must be text, received {value!r}")
        steps = config.recipe.steps
        if type(steps) is not int or steps < 1:
            raise ValueError(f"steps must be at least 1, received {steps!r}")
        if config.experiment is not None:
            experiments.get_experiment(config.experiment)  # raises if unknown
        path = workdir / "metrics.csv"
        rows = metrics.read_rows(_text(path))
    # A file that was changed by hand may raise nearly any error.
    except Exception as error:
        reason = str(error)[:_MOST_REASON] or type(error).__name__
        raise ValueError(
            f"{workdir} must hold config.json and metrics.csv, as training "
            f"writes them: {path.name}: {reason}"
        ) from error
    return Run(workdir.name, config, rows)


def _text(path: Path) -> str:
    """Returns the text of a small file, without a byte order mark."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait
        raise ValueError("it must be a regular file")
    if status.st_size > _MOST_BYTES:
        raise ValueError(
            f"it must be at most {_MOST_BYTES:,} bytes, received "
            f"{status.st_size:,}"
        )
    return path.read_text("utf-8-sig")


def find(
    directories: Iterable[str | os.PathLike],
) -> tuple[list[Run], list[str]]:
    """Reads work directories, and directories of work directories.

    Returns:
        The runs, and the reasons why other runs could not be read.

    Raises:
        ValueError: If a directory is neither a work directory nor contains one,
            or no run can be read.
    """
    found, damaged = [], []
    for directory in map(Path, directories):
        workdirs = [directory]
        if not (directory / "config.json").exists():
            workdirs = sorted(
                path.parent for path in directory.glob("*/config.json")
            )
        if not workdirs:
            raise ValueError(
                f"{directory} must be a work directory or contain one, but "
                "config.json is missing"
            )
        for workdir in workdirs:
            try:
                found.append(load(workdir))
            except ValueError as error:
                damaged.append(str(error))
    if not found:
        raise ValueError(damaged[0])
    return found, damaged
