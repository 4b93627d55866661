"""The plan of a folder's training: its recipe follows the number of images.

[1] He et al. 2016, "Deep Residual Learning for Image Recognition".

The papers' recipes are for 50,000 images of 32 x 32 pixels and for 1.28 million
photos. A folder of 292 photos would see each of them 526,000 times.
"""

import dataclasses
import math
from typing import NamedTuple

from keras_resnet import networks
from keras_resnet import specs
from keras_resnet.data import datasets
from keras_resnet.data import views
from keras_resnet.data.augmentation import Augmentation
from keras_resnet.training import recipe as recipe_lib
from keras_resnet.training import recipes


class Size(NamedTuple):
    """A row of `SIZES`: what a number of training images decides.

    Attributes:
        below: The row is for fewer training images than these.
        batch_size: Images in a batch: an epoch has 20 steps or more.
        epochs: Passes over the images from random weights.
        tuning_epochs: Passes over the images from trained weights.
        photo_size: Height and width of the input for photos of several sizes.
    """

    below: float
    batch_size: int
    epochs: int
    tuning_epochs: int
    photo_size: int


# Few images need more epochs, and many images more pixels. The last row has
# the numbers of ImageNet, [1, Sec. 3.4], and 90 epochs as in [2, Sec. 5].
SIZES = (
    Size(1_000, 16, 60, 30, 128),
    Size(10_000, 32, 30, 20, 128),
    Size(100_000, 128, 30, 10, views.PHOTO_SIZE),
    Size(math.inf, 256, 90, 5, views.PHOTO_SIZE),
)

# Height and width of the input of a network for CIFAR, for photos. It has no
# pooling in its stem, and costs 16 times as much as one for ImageNet.
_CIFAR_PHOTO_SIZE = 64

# Rate for one image of the batch: 0.1 for 256 [1, Sec. 3.4], 0.1 for 128
# [1, Sec. 4.2].
_RATES = {"imagenet": 0.1 / 256, "cifar": 0.1 / 128}


# From random weights, from trained weights, and of the classifier alone.
MODES = ("train", "fine_tune", "probe")

# The classifier alone: its features are computed once, so that an epoch takes a
# second, and its loss is convex, so that its rate can be high.
_PROBE_EPOCHS = 50
_PROBE_RATE = 10


@dataclasses.dataclass(frozen=True)
class Plan:
    """The recipe of a folder, with the reason of its numbers.

    Attributes:
        recipe: The recipe. Its `source` has the reason too, for `config.json`.
        reason: One line for the reader.
    """

    recipe: recipe_lib.Recipe
    reason: str


def plan(
    images: int,
    image_size: int,
    network: networks.Network,
    has_photos: bool = False,
    mode: str = "train",
    keeps_size: bool = False,
) -> Plan:
    """Returns the plan of a folder.

    Args:
        images: Number of training images.
        image_size: Height and width of the network's input, in pixels. For
            photos of several sizes, the plan chooses it unless weights do.
        network: The network.
        has_photos: Whether the images have several sizes.
        mode: One of `MODES`.
        keeps_size: Whether start weights have decided the size.

    >>> resnet18 = networks.get_network("resnet18")
    >>> recipe = plan(2_000, 64, resnet18).recipe
    >>> recipe.batch_size, recipe.steps, recipe.learning_rate
    (32, 1875, 0.0125)
    """
    row = next(size for size in SIZES if images < size.below)
    stem = _stem(network)
    batch_size = min(row.batch_size, images)
    epochs = {
        "train": row.epochs,
        "fine_tune": row.tuning_epochs,
        "probe": _PROBE_EPOCHS,
    }[mode]
    steps = steps_of(epochs, images, batch_size)
    base = recipes.RECIPES["folder" if mode == "train" else "fine_tune"]
    recipe = base.with_steps(steps)
    rate = base.learning_rate * min(batch_size / base.batch_size, 4)
    if mode == "train":
        rate = _RATES[stem] * batch_size
    elif mode == "probe":
        rate *= _PROBE_RATE
    size = None
    if has_photos and not keeps_size:
        size = row.photo_size
        if stem == "cifar":
            size = _CIFAR_PHOTO_SIZE
    augmentation = Augmentation(
        "scale_aspect" if has_photos else "pad_crop_flip"
    )
    if mode == "probe":
        augmentation = Augmentation()
    if network.recipe is not None and mode == "train":  # without normalization
        rate = min(rate, recipes.RECIPES[network.recipe].learning_rate)
    reason = (
        f"planned for {images:,} images: {epochs} epochs of {batch_size} images"
        f" a step, rate {rate:.4g}, {size or image_size}x{size or image_size} "
        "pixels; --epochs, --batch_size and --set=recipe.FIELD=VALUE change it"
    )
    recipe = dataclasses.replace(
        recipe,
        batch_size=batch_size,
        learning_rate=float(f"{rate:.4g}"),
        augmentation=augmentation,
        image_size=size,
        source=f"{base.source}; {reason.partition(';')[0]}",
    )
    return Plan(recipe, reason)


def recipe_of(
    dataset: datasets.DataSet, network: networks.Network
) -> recipe_lib.Recipe:
    """Returns the recipe of a data set when none is named, without weights.

    >>> digits = datasets.load("digits")
    >>> recipe_of(digits, networks.get_network("resnet20")).name
    'digits'
    """
    size = dataset.image_shape[0]
    if not dataset.name.startswith("folder:"):
        return recipes.default_recipe(dataset.name, size, network)
    return plan(dataset.train_size, size, network, dataset.has_photos).recipe


def fine_tuning_recipe(
    dataset: datasets.DataSet, model: str, keeps_size: bool
) -> recipe_lib.Recipe:
    """Returns the recipe of a data set from start weights.

    Args:
        dataset: The data set, with the preprocessing of the weights.
        model: Name of the network.
        keeps_size: Whether the weights decide the size of the images.
    """
    return plan(
        dataset.train_size,
        dataset.image_shape[0],
        networks.get_network(model),
        dataset.has_photos,
        "fine_tune",
        keeps_size,
    ).recipe


def mode(is_tuned: bool, freeze: str) -> str:
    """Returns one of `MODES`.

    Args:
        is_tuned: Whether training starts from trained weights.
        freeze: As in `configs.Config`.
    """
    if not is_tuned:
        return "train"
    return "probe" if freeze == "all" else "fine_tune"


def steps_of(epochs: float, images: int, batch_size: int) -> int:
    """Returns the number of steps of some epochs, rounded up.

    >>> steps_of(30, 2_000, 32)
    1875
    """
    return max(math.ceil(epochs * images / batch_size), 1)


def _stem(network):
    try:
        return specs.get_spec(network.name).stem
    except ValueError:  # a baseline
        return "cifar"
