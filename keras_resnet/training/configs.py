"""What is trained: the configuration of a run, and the network it describes."""

import dataclasses
import inspect
import json

import keras

from keras_resnet import baselines
from keras_resnet import layers
from keras_resnet import models
from keras_resnet import names
from keras_resnet.training import recipes
from keras_resnet.training.recipes import Recipe

# float64 is for proofs: a difference that stays in it is no rounding.
DTYPES = ("float32", "mixed_bfloat16", "mixed_float16", "float64")


@dataclasses.dataclass(frozen=True)
class Config:
    """What is trained: everything that the result depends on.

    Attributes:
        model: A name in `keras_resnet.MODELS` or `baselines.BASELINES`.
        dataset: A name that `training.data.load` knows.
        recipe: How.
        model_arguments: Further arguments of `keras_resnet.resnet`, such as
            `{"shortcut": "C"}`.
        dtype: One of `DTYPES`.
        seed: Seed of the weights, the batches and the augmentation.
        deterministic: Whether equal runs are equal to the bit.
        sync_batch_norm: Whether normalization is by the batch of all devices
            together, not by each device's share as in the papers.
        data_dir: Where the data set is; no part of the result.
    """

    model: str
    dataset: str
    recipe: Recipe
    model_arguments: dict = dataclasses.field(default_factory=dict)
    dtype: str = "float32"
    seed: int = 0
    deterministic: bool = False
    data_dir: str | None = None
    sync_batch_norm: bool = False
    backend: str = dataclasses.field(default_factory=keras.backend.backend)

    def __post_init__(self):
        network = baselines.get_network(self.model)
        if self.dtype not in DTYPES:
            raise ValueError(
                f"dtype must be one of {DTYPES}, received {self.dtype!r}"
            )
        if not 0 <= self.seed < 2**32:
            raise ValueError(
                f"seed must be at least 0 and below 2**32, received {self.seed}"
            )
        check_model_arguments(network, self.model_arguments)
        if self.sync_batch_norm and self.model_arguments.get("looped"):
            raise ValueError(
                "sync_batch_norm needs model.looped=false, because TensorFlow "
                "adds nothing up over devices inside of a loop; received "
                "model.looped=true"
            )

    def to_json(self) -> dict:
        """The fields as JSON has them."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def from_json(cls, fields: dict) -> "Config":
        """The configuration from the dict of `to_json`.

        Raises:
            TypeError: If a field is missing or unknown.
            ValueError: If a value is not allowed.
        """
        recipes.check_fields(cls, fields)
        if fields["backend"] not in ("jax", "tensorflow"):
            raise ValueError(
                "backend must be jax or tensorflow, received "
                f"{fields['backend']!r}"
            )
        for name, value in fields["model_arguments"].items():
            _check_type(name, value)
        recipe = Recipe.from_json(fields["recipe"])
        return cls(**{**fields, "recipe": recipe})


def check_model_arguments(
    network: models.Spec | baselines.Baseline, arguments: dict
) -> None:
    """Refuses values that no network can have, before any data is read.

    Raises:
        ValueError: As the units and shortcuts raise it, or if a network that
            is not residual is given arguments.
    """
    if isinstance(network, baselines.Baseline):
        network.check_arguments(arguments)
        return
    arguments = {"unit": network.unit, **arguments}
    for name in ("looped", "first_norm"):  # of the network, not of a unit
        arguments.pop(name, None)
    layers.units.get(arguments.pop("unit"))(1, **arguments)


def _check_type(name, value):
    """Raises ValueError for a value that `parse_model_argument` never gives."""
    default = inspect.signature(models.resnet).parameters.get(name)
    kinds: tuple[type, ...] = (str, type(None))
    if name in ("looped", "remat"):
        kinds = (bool, type(None))
    elif default is not None and isinstance(default.default, float):
        kinds = (int, float)
    if type(value) not in kinds:
        allowed = " or ".join(kind.__name__ for kind in kinds)
        raise ValueError(
            f"model_arguments.{name} must be of type {allowed}, received "
            f"{repr(value)[:100]}"
        )


def parse_model_argument(name: str, text: str) -> str | float | bool | None:
    """The value of a keyword argument of `keras_resnet.resnet` from text.

    Raises:
        ValueError: If there is no such argument or its value is no number.

    >>> parse_model_argument("survival_probability", "0.8")
    0.8
    """
    allowed = {
        parameter.name: parameter
        for parameter in inspect.signature(models.resnet).parameters.values()
        if parameter.kind is parameter.KEYWORD_ONLY
    }
    if name not in allowed:
        raise ValueError(names.unknown("model argument", name, allowed))
    words = {"true": True, "false": False, "none": None}
    if name in ("looped", "remat"):
        if text.lower() in words:
            return words[text.lower()]
        raise ValueError(f"{name} must be true or false, received {text!r}")
    if not isinstance(allowed[name].default, float):
        return text
    try:
        return float(text)
    except ValueError:
        raise ValueError(
            f"{name} must be a number, received {text!r}"
        ) from None


def check_devices(recipe: Recipe, devices: int) -> None:
    """Refuses a number of devices that cannot share a batch equally.

    Raises:
        ValueError: With the rule.

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
    """The network of a configuration, in its dtype, with weights by its seed.

    Args:
        config: The configuration.
        image_shape: Height, width and channels of the input.
        classes: Number of classes.
        classifier_activation: As in `keras_resnet.resnet`.

    Returns:
        A `keras.Model`.
    """
    arguments = dict(config.model_arguments)
    if config.sync_batch_norm and config.model not in baselines.BASELINES:
        arguments["looped"] = False  # as `Config` says
    before = keras.config.dtype_policy()
    keras.utils.set_random_seed(config.seed)
    keras.config.set_dtype_policy(config.dtype)
    try:
        model = baselines.build(
            config.model,
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
    return model
