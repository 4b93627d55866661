"""The configuration of a run, and the network that it describes."""

import dataclasses
import json
import typing
from collections.abc import Mapping
from typing import Any

import keras

from keras_resnet import features
from keras_resnet import networks
from keras_resnet.data import augmentation
from keras_resnet.data import data_service
from keras_resnet.data import datasets
from keras_resnet.data import views
from keras_resnet.layers import normalization
from keras_resnet.training import fields as fields_lib
from keras_resnet.training.recipe import Recipe

# The layer that fine-tuning replaces.
CLASSIFIER = "predictions"

# float64 is for proofs: a difference that stays in it is not due to rounding.
DTYPES = ("float32", "mixed_bfloat16", "mixed_float16", "float64")


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything that the result of a training depends on.

    Attributes:
        model: Name of a network (`keras_resnet.networks.get_network`).
        dataset: Name of a data set (`keras_resnet.data.datasets.load`).
        recipe: How the network is trained.
        model_arguments: Arguments that choose a variant of the network, such as
            `{"shortcut": "C"}`. Those of the recipe are added. They are
            checked, and become a `networks.Arguments`.
        dtype: One of `DTYPES`.
        seed: Seed of the weights, the batches and the augmentation.
        deterministic: Whether equal runs are equal to the bit.
        data_dir: Directory of the data set. It does not change the result.
        sync_batch_norm: Whether normalization is by the batch of all devices
            together, not by the share of each device as in the papers.
        backend: Backend of Keras: `"tensorflow"` or `"jax"`.
        experiment: Name of the row of the papers' tables that is trained
            (`papers.experiments`), or None.
        exif: Whether the photos of a folder are turned as their EXIF
            orientation says.
        skip_unreadable: Whether a folder is used without the images that do
            not decode.
        weights: Name, file or work directory of the weights from which the
            training starts, or None.
        weights_sha256: Hash of these weights.
        freeze: Layers that are not trained: `"none"`, `"all"` for all but the
            classifier, or prefixes of names such as `"stem,stage1"`. Their
            batch normalizations are in inference mode.

    >>> gate = {"shortcut": "exclusive_gating(gate_bias=-7)"}
    >>> from keras_resnet.training.recipes import RECIPES
    >>> recipe = RECIPES["cifar10"]
    >>> config = Config("resnet20", "cifar10", recipe, gate)
    >>> config.to_json()["model_arguments"]
    {'shortcut': {'name': 'exclusive_gating', 'gate_bias': -7.0}}
    """

    model: str
    dataset: str
    recipe: Recipe
    model_arguments: Mapping[str, Any] = networks.Arguments()
    dtype: str = "float32"
    seed: int = 0
    deterministic: bool = False
    data_dir: str | None = None
    sync_batch_norm: bool = False
    backend: str = dataclasses.field(default_factory=keras.backend.backend)
    experiment: str | None = None
    exif: bool = True
    skip_unreadable: bool = False
    weights: str | None = None
    weights_sha256: str | None = None
    freeze: str = "none"

    def __post_init__(self):
        network = networks.get_network(self.model)
        arguments = network.arguments(
            {**self.recipe.model_arguments, **self.model_arguments}
        )
        object.__setattr__(self, "model_arguments", arguments)
        if self.dtype not in DTYPES:
            raise ValueError(
                f"dtype must be one of {DTYPES}, received {self.dtype!r}"
            )
        if not 0 <= self.seed < 2**32:
            raise ValueError(
                f"seed must be at least 0 and below 2**32, received {self.seed}"
            )
        if self.sync_batch_norm and arguments.get("looped"):
            raise ValueError(
                "sync_batch_norm needs model.looped=false, because TensorFlow "
                "adds nothing up over devices inside of a loop; received "
                "model.looped=true"
            )

    def to_json(self) -> dict[str, Any]:
        """Returns the fields as JSON has them."""
        fields = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
        }
        fields["recipe"] = self.recipe.to_json()
        fields["model_arguments"] = networks.to_json(self.model_arguments)
        return json.loads(json.dumps(fields))

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "Config":
        """Returns the configuration from the dict of `to_json`.

        Raises:
            TypeError: If a field is missing or unknown.
            ValueError: If a value is not allowed.
        """
        fields_lib.check_fields(typing.get_type_hints(cls), fields)
        if fields["backend"] not in ("jax", "tensorflow"):
            raise ValueError(
                "backend must be jax or tensorflow, received "
                f"{fields['backend']!r}"
            )
        recipe = Recipe.from_json(fields["recipe"])
        return cls(**{**fields, "recipe": recipe})


def check_devices(recipe: Recipe, devices: int) -> None:
    """Raises ValueError unless the devices can share a batch equally.

    >>> from keras_resnet.training.recipes import RECIPES
    >>> check_devices(RECIPES["cifar10"], devices=3)
    Traceback (most recent call last):
    ...
    ValueError: the batch is that of all devices together, which take equal \
shares; received 128 images for 3 devices
    """
    if recipe.batch_size % (devices * recipe.micro_batches):
        parts = f" of {recipe.micro_batches} micro-batches each"
        raise ValueError(
            "the batch is that of all devices together, which take equal "
            f"shares; received {recipe.batch_size} images for {devices} devices"
            f"{parts if recipe.micro_batches > 1 else ''}"
        )


def build_model(
    config: Config,
    image_shape: tuple[int, int, int],
    classes: int,
    classifier_activation=None,
) -> keras.Model:
    """Builds the network of a configuration, with its dtype and seed.

    Args:
        config: The configuration.
        image_shape: Height, width and channels of the input.
        classes: Number of classes.
        classifier_activation: As in `keras_resnet.resnet`.

    Returns:
        A `keras.Model`.
    """
    network = networks.get_network(config.model)
    arguments = dict(config.model_arguments)
    if config.sync_batch_norm and "looped" in network.takes:
        arguments["looped"] = False  # as `Config` requires
    before = keras.config.dtype_policy()
    keras.utils.set_random_seed(config.seed)
    keras.config.set_dtype_policy(config.dtype)
    try:
        model = network.build(
            input_shape=image_shape,
            classes=classes,
            classifier_activation=classifier_activation,
            **arguments,
        )
    finally:
        keras.config.set_dtype_policy(before)
    if config.sync_batch_norm:
        for layer in model._flatten_layers():
            if isinstance(layer, keras.layers.BatchNormalization):
                layer.synchronized = True
    freeze(model, config.freeze)
    return model


def freeze(model: keras.Model, layers: str) -> None:
    """Freezes layers; their batch normalizations are in inference mode.

    Args:
        model: A network.
        layers: As `Config.freeze`.

    Raises:
        ValueError: If a prefix matches no layer, or no weight is left.

    >>> import keras_resnet
    >>> model = keras_resnet.ResNet20()
    >>> freeze(model, "all")
    >>> [weight.path for weight in model.trainable_weights]
    ['predictions/kernel', 'predictions/bias']
    """
    if layers == "none":
        return
    if layers == "all":
        features.freeze(model, but=(CLASSIFIER,))
        return
    prefixes = layers.split(",")
    known = [layer.name for layer in model.layers]
    for prefix in prefixes:
        if not prefix or not any(name.startswith(prefix) for name in known):
            raise ValueError(
                "freeze must be all, none or names of layers such as "
                f"stem,stage1; received {prefix!r}, the network has "
                f"{', '.join(known)}"
            )
    for layer in model.layers:
        if layer.name.startswith(tuple(prefixes)):
            # Keras stops at a layer that has the value already.
            for part in layer._flatten_layers():
                part.trainable = False
            normalization.freeze(layer)
    if not model.trainable_weights:
        raise ValueError(
            f"freeze must leave a layer to train, received {layers!r}"
        )


def is_probe(config: Config) -> bool:
    """Returns whether only the classifier is trained, on unchanging features.

    >>> from keras_resnet.training.recipes import RECIPES
    >>> is_probe(Config("resnet20", "digits", RECIPES["digits"]))
    False
    """
    unchanged = augmentation.Augmentation()
    return (
        config.freeze == "all"
        and config.recipe.augmentation == unchanged
        and not config.recipe.progressive_sizes
    )


def load_dataset(
    config: Config, preprocessing: views.Preprocessing | None = None
) -> datasets.DataSet:
    """Returns the data set of a configuration.

    Args:
        config: The configuration.
        preprocessing: That of start weights; None for the data set's own.
    """
    return datasets.load(
        config.dataset,
        config.data_dir,
        image_size=None if preprocessing else config.recipe.image_size,
        preprocessing=preprocessing,
        test_crop_ratio=config.recipe.test_crop_ratio,
        skip_unreadable=config.skip_unreadable,
        exif=config.exif,
    )


def served(
    config: Config, dataset: datasets.DataSet, address: str
) -> data_service.ServedSet:
    """Returns the data set with training batches of a data service.

    Args:
        config: The configuration of the run.
        dataset: Its data set.
        address: `"HOST:PORT"` of the dispatcher.

    Raises:
        data_service.ServiceError: If the service or the images do not allow it.
    """
    if is_probe(config):
        raise data_service.ServiceError(
            "cannot be combined with features that are computed once "
            "(--freeze=all without augmentation)"
        )
    return data_service.ServedSet(dataset, address)
