"""Reports of a run: its first images, its device, a table at its end."""

from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_resnet.analysis import complexity
from keras_resnet.data import datasets
from keras_resnet.training import configs
from keras_resnet.training import evaluation
from keras_resnet.training import recipe_table

_IMAGES = 16  # of the first batch
_PROCESSORS = Path("/proc/cpuinfo")


def first_images(
    config: configs.Config, dataset: datasets.DataSet
) -> np.ndarray | None:
    """Returns the first images of the first training batch, as they are seen.

    Args:
        config: The configuration of the run.
        dataset: Its data set.

    Returns:
        float32 `[count, height, width, channels]` of 0 to 1; None if an image
        does not decode, which the first step reports.
    """
    recipe = config.recipe
    parts = recipe.batch_size // _IMAGES
    if parts * _IMAGES != recipe.batch_size:
        parts = 1
    batches = dataset.train_batches(
        recipe.batch_size,
        config.seed,
        augmentation=recipe.augmentation_at(0),
        shard=(0, parts),
    )
    try:
        images, _ = next(iter(batches))
    except datasets.UNREADABLE:
        return None
    preprocessing = dataset.preprocessing
    deviation = preprocessing.standard_deviation
    images = images[:_IMAGES].numpy()
    if deviation is not None:
        images = images * deviation
    return np.clip(images + preprocessing.mean, 0, 1)


def device() -> str:
    """Returns the name of the processor or accelerator that trains."""
    if keras.backend.backend() == "jax":
        import jax

        found = jax.devices()[0]
        if found.platform != "cpu":
            return found.device_kind
    for gpu in tf.config.list_physical_devices("GPU"):
        details = tf.config.experimental.get_device_details(gpu)
        return details.get("device_name", "GPU")
    try:
        lines = _PROCESSORS.read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2] for line in lines if "model name" in line]
    return names[0].strip() if names else "processor"


def multiply_adds(config: configs.Config, model: keras.Model) -> int | None:
    """Returns the multiply-adds of all steps, backward passes included.

    Args:
        config: The configuration of the run.
        model: Its network.

    Returns:
        The number, or None if a layer is of an unknown kind.
    """
    recipe = config.recipe
    own = model.input_shape[1]
    size = recipe.augmentation.train_image_size or own
    sizes = recipe.progressive_sizes or (size,)
    networks = (
        model if each == own else evaluation.any_size(model, each)
        for each in sizes
    )
    try:
        forward = sum(
            complexity.complexity(network)["multiply_adds"]
            for network in networks
        )
    except ValueError:
        return None
    images = recipe.batch_size * recipe.steps
    return recipe_table.PASSES * forward * images // len(sizes)


def table(result: dict[str, Any]) -> list[str]:
    """Returns the lines of the table at the end of a run.

    Args:
        result: The dict of `loop.train_and_evaluate`.
    """
    minutes, seconds = divmod(round(result["seconds"]), 60)
    speed, cost = result["images_per_second"], result["multiply_adds"]
    rows = [
        ("last test error", f"{result['test_top1_error']:.2f}%"),
        (
            "best test error",
            f"{result['best_test_top1_error']:.2f}% at step "
            f"{result['best_step']:,}, which the test images chose",
        ),
        ("time of this process", f"{minutes}:{seconds:02d} minutes"),
        ("speed", f"{speed:,.0f} images/s" if speed else "not measured"),
        ("device", result["device"]),
        ("cost", f"{cost:.1e} multiply-adds" if cost else "not counted"),
    ]
    return [f"{name:22}{value}" for name, value in rows]


def imbalance(dataset: datasets.DataSet) -> list[str]:
    """Returns a line if some classes have many more images than others."""
    counts = dataset.train_counts
    if not counts or max(counts) < 3 * max(min(counts), 1):
        return []
    least, most = min(counts), max(counts)
    rare = dataset.labels[counts.index(least)]
    common = dataset.labels[counts.index(most)]
    return [
        f"the classes have {least:,} ({rare}) to {most:,} ({common}) images: "
        "the error hides rare classes, apps.evaluate --per_class shows them"
    ]
