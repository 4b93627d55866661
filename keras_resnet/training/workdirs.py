"""Work directories: what a run leaves, and what others read of it.

`config.json`, `dataset.json`, `checkpoints/`, `best/`, `metrics.csv` and the
events of TensorBoard.
"""

import csv
import dataclasses
import io
import json
import math
import os
from collections.abc import Callable
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

from keras_resnet import training
from keras_resnet.training import checkpoints
from keras_resnet.training import configs
from keras_resnet.training import data
from keras_resnet.training import optimizers

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

# The folders of a work directory that hold checkpoints.
CHECKPOINTS = {"last": "checkpoints", "best": "best"}

_MOST_DIFFERENCES = 5  # that one line names


class WorkdirError(ValueError):
    """A work directory that cannot be used as asked; one line says why."""


@dataclasses.dataclass
class Trained:
    """What a work directory holds: see `load_workdir`."""

    model: keras.Model
    config: configs.Config
    preprocessing: data.Preprocessing
    labels: list[str]
    step: int
    record: dict | None = None  # of its images, see `data.DataSet.record`


def load_workdir(
    workdir: str | os.PathLike,
    classifier_activation="softmax",
    checkpoint: str = "last",
    report: Callable[[str], None] = print,
) -> Trained:
    """The network of a work directory as a checkpoint of it has it.

    Args:
        workdir: A directory that `train_and_evaluate` wrote.
        classifier_activation: None for logits.
        checkpoint: `"last"`, or `"best"` for that of the lowest test error.
        report: Is told of damaged checkpoints, which are passed over.

    Returns:
        A `Trained`; its model computes in float32.

    Raises:
        WorkdirError: If it is no work directory or has no checkpoint yet.
        ImportError: If Keras does not run on TensorFlow; what trained may
            have been either.
    """
    training.require_backend(__name__, "tensorflow")
    workdir = Path(workdir)
    if checkpoint not in CHECKPOINTS:
        raise ValueError(
            f"checkpoint must be one of {', '.join(CHECKPOINTS)}, received "
            f"{checkpoint!r}"
        )
    if not (workdir / "config.json").is_file():
        raise WorkdirError(
            f"{workdir} is no work directory: it has no config.json, which "
            "apps.train writes"
        )
    config = _read_config(workdir)
    directory = workdir / CHECKPOINTS[checkpoint]
    if not checkpoints.steps(directory):
        raise WorkdirError(
            f"{workdir} has no checkpoint yet: train for some steps first"
        )
    about = _read_json(workdir / "dataset.json")

    def build(dtype):
        return configs.build_model(
            dataclasses.replace(config, dtype=dtype),
            tuple(about["image_shape"]),
            len(about["labels"]),
            classifier_activation,
        )

    model = build("float64" if config.dtype == "float64" else "float32")
    step = _restore(model, config, directory, report)
    if config.dtype == "float64":
        weights = model.get_weights()
        model = build("float32")
        model.set_weights(weights)
    return Trained(
        model,
        config,
        data.Preprocessing.from_json(json.dumps(about["preprocessing"])),
        about["labels"],
        step,
        about.get("images"),
    )


def _restore(model, config, directory, report):
    """Reads the newest checkpoint that is whole; gives its step."""
    averages = optimizers.averages(config.recipe, model)
    saved = tf.train.Checkpoint(model=model, averages=averages)
    if config.backend == "jax":
        saved = tf.train.Checkpoint(weights=[v.value for v in model.weights])
    step = checkpoints.restore(
        lambda path: (
            saved.read(path).assert_existing_objects_matched().expect_partial()
        ),
        directory,
        report,
    )
    if step is None:
        raise WorkdirError(f"every checkpoint in {directory} is damaged")
    for variable, value in zip(
        model.trainable_variables, averages, strict=False
    ):
        variable.assign(value)
    return step


def prepare(config, dataset, workdir):
    """Makes the work directory; the configuration is the first thing in it."""
    about = {
        "image_shape": list(dataset.image_shape),
        "labels": list(dataset.labels),
        "preprocessing": json.loads(dataset.preprocessing.to_json()),
        "images": dataset.record,
    }
    path = workdir / "dataset.json"
    if path.exists():
        _check_same_data(path, about)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        for remains in checkpoints.remains(workdir):
            remains.unlink()
        _write_json(workdir / "config.json", config.to_json())
        _write_json(path, about)
    except OSError as error:
        raise OSError(
            f"the work directory {workdir} cannot be written "
            f"({error.strerror or error}); nothing in it was changed: make it "
            "writable or name another by --workdir"
        ) from error


def check(config, workdir):
    """Refuses a directory of another configuration, and says what differs."""
    if not (workdir / "config.json").exists():
        if workdir.is_dir() and (
            set(workdir.iterdir()) - set(checkpoints.remains(workdir))
        ):
            raise WorkdirError(
                f"{workdir} is neither empty nor a work directory (it has no "
                "config.json): choose another"
            )
        return
    # Not a Config: to make one, Keras makes layers, which it numbers, and the
    # bytes of a checkpoint would depend on how often a run was started.
    path = workdir / "config.json"
    old, new = _flat(_read_json(path)), _flat(config.to_json())
    strangers = [
        name
        for name in sorted(old.keys() ^ new.keys())
        if not name.startswith("model_arguments.")
    ]
    if strangers:
        raise _other_version(path, ", ".join(strangers))
    differing = [
        f"{name} was {old.get(name)!r}, is {new.get(name)!r}"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name) and name != "data_dir"
    ]
    if differing:
        raise WorkdirError(
            f"{workdir} belongs to another configuration: "
            f"{'; '.join(differing)}. Choose another directory or the old "
            "configuration"
        )


def _check_same_data(path, about):
    """Refuses data whose name is the old one's and whose images are not."""
    old, new = _read_json(path), dict(about)
    old.update(old.pop("preprocessing", {}))
    new.update(new.pop("preprocessing"))
    images = old.pop("images", None), new.pop("images")
    differing = [
        f"{name} was {_shown(old.get(name))}, is {_shown(new.get(name))}"
        for name in sorted(old.keys() | new.keys())
        if not _is_close(old.get(name), new.get(name))
    ] or _differing_images(*images)
    if differing:
        raise WorkdirError(
            f"{path.parent} was trained on other data: {'; '.join(differing)}. "
            "Choose another directory or the old data"
        )


def check_same_images(record: dict | None, dataset: data.DataSet) -> None:
    """Raises if the images of a data set are not those of the training.

    Args:
        record: That of a `Trained`; None if an earlier version trained it.
        dataset: The data set of its name, as it is now.

    Raises:
        WorkdirError: Says what differs.
    """
    differing = _differing_images(record, dataset.record)
    if differing:
        raise WorkdirError(
            f"the images of {dataset.name} must be those of the training: "
            f"{'; '.join(differing)}. Restore them; apps.evaluate takes what "
            f"is there now with --dataset={dataset.name}"
        )


def _differing_images(old, new):
    """What differs between two records of images, in a few words each."""
    if old is None:  # an earlier version wrote none
        return []
    if not isinstance(old, dict):
        return [f"images was {_shown(old)}, is {_shown(new)}"]
    old, new = _leaves(old), _leaves(new)
    differing = [
        f"{name} was {_shown(old.get(name, 'not there'))}, "
        f"is {_shown(new.get(name, 'not there'))}"
        for name in sorted(old.keys() | new.keys())
        if old.get(name, "") != new.get(name, "")
    ]
    rest = len(differing) - _MOST_DIFFERENCES
    more = [f"and {rest} more"] if rest > 0 else []
    return differing[:_MOST_DIFFERENCES] + more


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
    """Returns the `data_dir` of a configuration that was found in a directory.

    Raises:
        WorkdirError: If it is inside the work directory. Whoever wrote the
            directory wrote the data too, and only the user can trust both.
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


def _shown(value):
    """The beginning of a value: there may be a thousand labels."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}..."


def _is_close(a, b):
    """Equal, or numbers that differ by the rounding of another machine."""
    try:
        return np.allclose(a, b, rtol=1e-5)
    except (TypeError, ValueError):
        return a == b


class Metrics:
    """`metrics.csv` and the events of TensorBoard, one row at a time.

    The rows hold nothing but what the configuration decides: a run that was
    stopped and went on writes the same file as one that was not.

    Args:
        workdir: Where they are.
        step: The last step that is done.
        is_due: Whether the row of that step is still to be made.
        writes: Whether this process writes them.
    """

    def __init__(self, workdir, step, is_due, writes):
        self.path = workdir / "metrics.csv"
        self.rows = []
        self.events = None
        if self.path.exists():
            # A row after the checkpoint, whole or not, will be made again.
            for row in csv.DictReader(io.StringIO(self.path.read_text())):
                is_whole = None not in row.values() and None not in row
                if is_whole and int(row["step"]) <= step - is_due:
                    self.rows.append(row)
        if writes:
            text = io.StringIO()
            writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(self.rows)
            checkpoints.replace_file(self.path, text.getvalue())
            self.events = tf.summary.create_file_writer(str(workdir / "events"))

    def best_error(self):
        """The lowest test error of all rows."""
        errors = (row["test_top1_error"] for row in self.rows)
        return min((float(e) for e in errors if e), default=math.inf)

    def add(self, row):
        text = {
            name: value if name == "step" else f"{value:.8g}"
            for name, value in row.items()
        }
        text = {name: text.get(name, "") for name in COLUMNS}
        self.rows.append(text)
        if self.events is None:
            return
        with self.path.open("a", newline="") as file:
            csv.DictWriter(file, COLUMNS, lineterminator="\n").writerow(text)
            file.flush()
            os.fsync(file.fileno())
        with self.events.as_default(step=row["step"]):
            for name, value in row.items():
                tf.summary.scalar(name, value)
        self.events.flush()


def _flat(fields, prefix=""):
    flat = {}
    for name, value in fields.items():
        if isinstance(value, dict) and name in ("recipe", "model_arguments"):
            flat.update(_flat(value, f"{name}."))
        else:
            flat[prefix + name] = value
    return flat


def _read_config(workdir):
    path = workdir / "config.json"
    fields = _read_json(path)
    try:
        return configs.Config.from_json(fields)
    except (TypeError, KeyError) as error:
        raise _other_version(path, error) from error


def _other_version(path, what):
    return WorkdirError(
        f"{path} was written by another version of keras_resnet, whose work "
        f"directories this one does not read ({what})"
    )


def _read_json(path):
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise WorkdirError(f"{path} cannot be read: {error}") from error


def _write_json(path, value):
    checkpoints.replace_file(path, json.dumps(value, indent=1) + "\n")
