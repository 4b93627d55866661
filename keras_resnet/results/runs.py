"""Work directories, as a report reads them: what was trained, and its rows."""

import csv
import dataclasses
import functools
import json
import os
from collections.abc import Iterable
from pathlib import Path

from keras_resnet.training import experiments
from keras_resnet.training.configs import Config


@dataclasses.dataclass(frozen=True)
class Run:
    """One training, of which nothing but two small files is needed.

    Attributes:
        name: Name of the work directory.
        config: What was trained (`config.json`).
        metrics: The rows of `metrics.csv`: numbers by column, without those
            that a row has not.
    """

    name: str
    config: Config
    metrics: tuple[dict[str, float], ...]

    @property
    def step(self) -> int:
        """How many steps were taken."""
        return int(self.metrics[-1]["step"]) if self.metrics else 0

    @property
    def is_finished(self) -> bool:
        """Whether all steps of the recipe were taken, and tested."""
        return (
            self.step == self.config.recipe.steps
            and "test_top1_error" in self.metrics[-1]
        )

    @property
    def test_error(self) -> float:
        """Of the last step, in percent: no step is chosen by its error."""
        return self.metrics[-1]["test_top1_error"]

    @functools.cached_property
    def experiment(self) -> experiments.Experiment | None:
        """The row that was trained, at its own length or another."""
        return experiments.of_config(self.config)

    @property
    def label(self) -> str:
        """What pictures call it: its experiment, where it has one."""
        return self.experiment.name if self.experiment else self.name

    def column(self, name: str) -> tuple[list[float], list[float]]:
        """The steps and values of a column, where it has values."""
        rows = [row for row in self.metrics if name in row]
        return [row["step"] for row in rows], [row[name] for row in rows]


def load(workdir: str | os.PathLike) -> Run:
    """The run of a work directory, or of a copy of its two files.

    Raises:
        ValueError: If it has not both `config.json` and `metrics.csv`, or
            these cannot be read.
    """
    workdir = Path(workdir)
    try:
        fields = json.loads((workdir / "config.json").read_text())
        lines = (workdir / "metrics.csv").read_text().splitlines(True)
        # A row without an end is one that a kill cut short: its last number
        # may lack digits.
        whole = [line for line in lines if line.endswith("\n")]
        metrics = [
            {name: float(text) for name, text in row.items() if text}
            for row in csv.DictReader(whole)
        ]
        config = Config.from_json(fields)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{workdir} must hold config.json and metrics.csv, as apps.train "
            f"writes them: {error}"
        ) from error
    return Run(workdir.name, config, tuple(metrics))


def find(directories: Iterable[str | os.PathLike]) -> list[Run]:
    """The runs of work directories, and of directories of work directories.

    Raises:
        ValueError: If one of the directories is neither.
    """
    found = []
    for directory in map(Path, directories):
        workdirs = [directory]
        if not (directory / "config.json").exists():
            workdirs = sorted(
                path.parent for path in directory.glob("*/config.json")
            )
        if not workdirs:
            raise ValueError(
                f"{directory} is no work directory and holds none: "
                "config.json is missing, which apps.train writes"
            )
        found += [load(workdir) for workdir in workdirs]
    return found
