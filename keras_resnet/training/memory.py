"""Lower bounds of the memory of a step, and the available memory.

The kernel kills a process that needs more memory, without a message and often
after minutes. The estimates here are lower bounds: a step that fits is always
accepted, and an accepted step may still be too large.
"""

import dataclasses
import math
import os
from collections.abc import Callable
from pathlib import Path

import keras
import tensorflow as tf

from keras_resnet.analysis import complexity
from keras_resnet.data import datasets
from keras_resnet.training import configs
from keras_resnet.training import evaluation
from keras_resnet.training import workdirs

_GB = 10**9
_CGROUPS = Path("/sys/fs/cgroup")
_PROCESS = Path("/proc")


class DoesNotFitError(ValueError):
    """A batch that cannot fit in memory.

    Attributes:
        field: The field of the recipe that has to change: `"batch_size"`, or
            `"image_size"` if not even one image fits.
        fitting: The largest batch that may fit; 0 if not even one image fits.
    """

    def __init__(self, field: str, message: str, fitting: int = 0):
        super().__init__(message)
        self.field = field
        self.fitting = fitting


def available_bytes() -> int | None:
    """Returns the memory that this process may still take, in bytes.

    The result is the free memory of the machine, with caches and swap, or the
    rest of a limit of a Linux control group if that is smaller. It is None if
    that is unknown, or an accelerator has memory of its own.
    """
    if _has_accelerator():
        return None
    system = _numbers(_PROCESS / "meminfo")
    if "MemAvailable" not in system:
        return None
    swap = system.get("SwapFree", 0)
    left = [1024 * system["MemAvailable"], *_left_by_groups()]
    return 1024 * swap + min(left)


def _has_accelerator():
    if keras.backend.backend() == "jax":
        import jax

        return jax.devices()[0].platform != "cpu"
    devices = tf.config.list_logical_devices()
    return any(device.device_type != "CPU" for device in devices)


def _left_by_groups():
    """Yields the rest of the limit of each control group, in bytes."""
    try:
        lines = (_PROCESS / "self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        # Version 2 of control groups has one tree, version 1 one for memory.
        if not controllers:
            root, limit, used = _CGROUPS, "memory.max", "anon"
        elif "memory" in controllers.split(","):
            root, limit = _CGROUPS / "memory", "memory.limit_in_bytes"
            used = "total_rss"
        else:
            continue
        group = root / path.lstrip("/")
        for directory in (group, *group.parents):
            try:
                most = int((directory / limit).read_text())
            except (OSError, ValueError):  # no limit is written as "max"
                continue
            # Without caches, which the kernel drops when memory is short.
            taken = _numbers(directory / "memory.stat").get(used, 0)
            yield max(most - taken, 0)


def _numbers(path):
    """Returns the numbers of a file of lines such as `NAME: NUMBER kB`."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return {}
    words = [line.replace(":", " ").split() for line in lines]
    return {
        name: int(number) for name, number, *_ in words if number.isdecimal()
    }


def check_training(
    config: configs.Config,
    model: keras.Model,
    workers: int = 1,
    available: int | None = None,
) -> None:
    """Raises if a training step cannot fit in the memory of a processor.

    A step holds its images, the gradients, and activations for the backward
    pass. At least half of all activations count, with `remat` the outputs of
    the units.

    Args:
        config: The configuration of the run.
        model: The network of the configuration. One for images of any size
            is measured at the largest of `progressive_sizes`.
        workers: Number of machines that share a batch.
        available: Available memory in bytes; None to measure it now.

    Raises:
        DoesNotFitError: With the estimate, and a batch that would fit.
    """
    available = available_bytes() if available is None else available
    if available is None:
        return
    recipe = config.recipe
    if model.input_shape[1] is None:
        model = evaluation.any_size(model, max(recipe.progressive_sizes))
    batch_size = recipe.batch_size // workers
    image = _image_bytes(model)
    kept = _kept_bytes(config, model)
    gradients = sum(4 * math.prod(v.shape) for v in model.trainable_variables)
    each = image + kept / recipe.micro_batches
    needed = gradients + batch_size * each
    if needed <= available:
        return
    size = model.input_shape[1]
    words = (
        f"a step of {batch_size:,} images of {size}x{size} pixels needs at "
        f"least {needed / _GB:,.1f} GB of memory, "
        f"{available / _GB:,.1f} GB are available"
    )
    if gradients + image + kept > available:
        raise DoesNotFitError(
            "image_size",
            f"{words}, too few for one image: pass "
            "--set=recipe.image_size=PIXELS with fewer, or a smaller --model",
        )
    fitting = int((available - gradients) / each) * workers
    advice = f"pass --batch_size={fitting} or less"
    if gradients + batch_size * image + kept <= available:
        advice += ", or more parts by --set=recipe.micro_batches=PARTS"
    raise DoesNotFitError("batch_size", f"{words}: {advice}", fitting)


def planned_batch(
    config: configs.Config, model: keras.Model, available: int | None = None
) -> int:
    """Returns the batch of the recipe, or a smaller one that should fit.

    `check_training` rejects only a batch that cannot fit. A planned batch needs
    all activations, the gradients and the momentum, with a fifth to spare.

    Args:
        config: The configuration of the run.
        model: The network of the configuration.
        available: Available memory in bytes; None to measure it now.

    Returns:
        The recipe's batch, or its largest half, quarter, ... that fits.
    """
    batch_size = config.recipe.batch_size
    available = available_bytes() if available is None else available
    if available is None:
        return batch_size
    kept = 2 * _kept_bytes(config, model)
    each = _image_bytes(model) + kept / config.recipe.micro_batches
    gradients = sum(8 * math.prod(v.shape) for v in model.trainable_variables)
    while batch_size > 1 and 1.2 * (gradients + batch_size * each) > available:
        batch_size //= 2
    return batch_size


def with_fitting_batch(
    config: configs.Config,
    dataset: datasets.DataSet,
    workdir: str | os.PathLike,
    report: Callable[[str], None],
) -> configs.Config:
    """Returns the configuration with the batch of `planned_batch`.

    The rate and the steps are scaled with the batch. A run that resumes keeps
    its batch, also if the memory has changed.

    Args:
        config: The configuration of the run.
        dataset: Its data set.
        workdir: The work directory.
        report: Receives a line if the batch is smaller than that of the recipe.
    """
    recipe = config.recipe
    path = workdirs.local(workdir)
    if workdirs.is_described(path) and workdirs.has_steps(path):
        batch_size = workdirs.read_config(path).recipe.batch_size
        if batch_size < recipe.batch_size:
            recipe = recipe.scaled_to(batch_size)
        return dataclasses.replace(config, recipe=recipe)
    model = configs.build_model(config, dataset.image_shape, dataset.classes)
    batch_size = planned_batch(config, model)
    if batch_size == recipe.batch_size:
        return config
    report(
        f"a step of {recipe.batch_size} images would not fit in the memory of "
        f"this machine: {batch_size} a step, with the rate and the steps "
        "scaled; --batch_size sets another"
    )
    return dataclasses.replace(config, recipe=recipe.scaled_to(batch_size))


def check_evaluation(
    image_shape: tuple[int, int, int],
    batch_size: int,
    model: keras.Model | None = None,
    available: int | None = None,
) -> None:
    """Raises if a batch of test images cannot fit in the memory of a processor.

    Args:
        image_shape: `(height, width, channels)` of an image.
        batch_size: Images in a batch.
        model: The network, whose largest activation counts; None if unknown.
        available: Available memory in bytes; None to measure it now.

    Raises:
        DoesNotFitError: With the estimate, and a batch that would fit.
    """
    available = available_bytes() if available is None else available
    if available is None:
        return
    image = 4 * math.prod(image_shape)
    if model is not None:
        image += max(
            (row["activation_bytes"] for row in _rows(model)), default=0
        )
    needed = batch_size * image
    if needed <= available:
        return
    raise DoesNotFitError(
        "batch_size",
        f"a batch of {batch_size:,} images needs at least {needed / _GB:,.1f} "
        f"GB of memory, {available / _GB:,.1f} GB are available: pass "
        f"--batch_size={max(available // image, 1)} or less",
    )


def _image_bytes(model):
    """Returns the bytes of one image as float32."""
    return 4 * math.prod(model.input_shape[1:])


def _kept_bytes(config, model):
    """Returns the least bytes of activations of one image in training."""
    rows = _rows(model)
    if config.freeze != "none":  # the frozen layers keep none
        return max((row["activation_bytes"] for row in rows), default=0)
    # With `remat`, only the outputs of the units are kept.
    if config.model_arguments.get("remat"):
        rows = [row for row in rows if row["kind"] == "addition"]
        return sum(row["activation_bytes"] for row in rows)
    # In TensorFlow 2.21 a step took 0.9 to 1.2 times all activations.
    return sum(row["activation_bytes"] for row in rows) // 2


def _rows(model):
    try:
        return complexity.complexity(model)["layers"]
    except ValueError:  # an unknown layer, or an open size
        return []
