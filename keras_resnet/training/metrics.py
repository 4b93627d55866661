"""The rows of a run in `metrics.csv`: their reader and their writer."""

import contextlib
import csv
import io
import math
import os
import re

import tensorflow as tf

from keras_resnet import atomic
from keras_resnet.training import checkpoints

COLUMNS = (
    "step",
    "learning_rate",
    "train_loss",
    "train_top1_error",
    "train_top5_error",
    "test_loss",
    "test_top1_error",
    "test_top5_error",
)


_ERRORS = ("train_top1_error", "test_top1_error")
_MAX_LATER_BYTES = 2**26  # read after the rows of the checkpoint


def read_rows(text: str) -> tuple[dict[str, float], ...]:
    r"""Returns the rows of `metrics.csv`: numbers by column.

    An empty cell is left out, and so is a last row that a kill cut off.

    Raises:
        ValueError: If a column is missing or a number is outside its range.

    >>> read_rows("step,train_top1_error,test_top1_error\n2,90.0,\n4,8")
    ({'step': 2.0, 'train_top1_error': 90.0},)
    """
    # The last number of a row without a line end may lack digits.
    lines = [line for line in text.splitlines(True) if line.endswith("\n")]
    reader = csv.DictReader(lines, strict=True)
    columns = reader.fieldnames or []
    missing = [name for name in ("step", *_ERRORS) if name not in columns]
    if lines and missing:
        raise ValueError(f"its first line must name the column {missing[0]}")
    rows = []
    for cells in reader:
        row = {name: float(text) for name, text in cells.items() if text}
        if not row.get("step", -1.0).is_integer() or row["step"] < 0:
            raise ValueError(
                f"line {reader.line_num}: step must be a number of steps"
            )
        for name in _ERRORS:
            if not 0 <= row.get(name, 0.0) <= 100:
                raise ValueError(
                    f"line {reader.line_num}: {name} must be in [0, 100], "
                    f"received {row[name]}"
                )
        rows.append(row)
    return tuple(rows)


class MetricsFile:
    """`metrics.csv` and the events of TensorBoard, one row at a time.

    The rows depend only on the configuration: a resumed run writes the same
    file as one that never stopped. Each checkpoint holds the rows up to its
    step, so that no row is lost with the file.

    Args:
        workdir: The work directory.
        rows: The `text()` of the checkpoint; empty without a checkpoint.
        writes: Whether this process writes them.
        report: Receives a line if the file was changed.

    Attributes:
        logged: The last step in the file, maybe after the checkpoint.
    """

    def __init__(self, workdir, rows, writes, report):
        self.path = workdir / "metrics.csv"
        self.workdir = workdir
        self.rows = list(csv.DictReader(io.StringIO(rows)))
        self.logged = 0
        self.events = None
        if not writes:
            return
        self._compare(report)
        atomic.write(self.path, self.text())
        events = workdir / "events"
        events.mkdir(exist_ok=True)
        self._open = contextlib.ExitStack()
        place = self._open.enter_context(checkpoints.literal(events))
        self.events = tf.summary.create_file_writer(place)

    def _compare(self, report):
        """Sets aside a file that lacks rows of the checkpoint."""
        expected, found = self.text().encode(), b""
        with contextlib.suppress(FileNotFoundError):
            if self.path.is_file():
                with self.path.open("rb") as file:
                    found = file.read(len(expected) + _MAX_LATER_BYTES)
        if found.startswith(expected):
            later = found[len(expected) :]
            steps = re.findall(rb"^([0-9]{1,18}),", later, re.MULTILINE)
            self.logged = max(map(int, steps), default=0)
            return
        aside = ""
        if os.path.lexists(self.path):
            place = atomic.set_aside(self.path, "changed")
            aside = f", and the file is {place.name} now"
        if self.rows or aside:
            report(
                f"{self.path} was changed since the run wrote it: its "
                f"{len(self.rows)} rows are restored from the checkpoint{aside}"
            )

    def close(self):
        """Closes the events of TensorBoard."""
        if self.events is not None:
            self.events.close()
            self._open.close()

    def text(self):
        """Returns the rows as text of the file."""
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        return text.getvalue()

    def error_at(self, step):
        """Returns the test error of a step; infinite without a row."""
        for row in self.rows:
            if int(row["step"]) == step and row["test_top1_error"]:
                return float(row["test_top1_error"])
        return math.inf

    def best(self):
        """Returns step and test error of the best row; None without a test."""
        tested = [row for row in self.rows if row["test_top1_error"]]
        if not tested:
            return None
        row = min(tested, key=lambda row: float(row["test_top1_error"]))
        return int(row["step"]), float(row["test_top1_error"])

    def show_images(self, images):
        """Adds images to the events: float `[count, height, width, c]`."""
        if self.events is None or images is None:
            return
        with self.events.as_default(step=0):
            tf.summary.image("first_batch", images, max_outputs=len(images))
        self.events.flush()

    def add(self, row, events=None):
        """Appends a row: numbers by column.

        Args:
            row: The numbers of the row.
            events: Further numbers by name, for TensorBoard only.
        """
        text = {
            name: value if name == "step" else f"{value:.8g}"
            for name, value in row.items()
        }
        text = {name: text.get(name, "") for name in COLUMNS}
        self.rows.append(text)
        if self.events is None:
            return
        line = io.StringIO()
        csv.DictWriter(line, COLUMNS, lineterminator="\n").writerow(text)
        try:
            atomic.append(self.path, line.getvalue())
        except FileNotFoundError:  # removed while the run used it
            atomic.write(self.path, self.text())
        with self.events.as_default(step=row["step"]):
            for name, value in {**row, **(events or {})}.items():
                tf.summary.scalar(name, value)
        self.events.flush()
