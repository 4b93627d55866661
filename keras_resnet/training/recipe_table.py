"""The recipes as lines of text: expected error, steps, cost."""

from collections.abc import Iterator

from keras_resnet import networks
from keras_resnet.training.recipe import Recipe

# A backward pass computes two products for each one of the forward pass.
PASSES = 3

_SMALL_SIZE = 32  # pixels, of recipes for the images as they are: CIFAR


def multiply_adds(recipe: Recipe, network: str) -> int:
    """Returns the multiply-adds of a whole training, backward pass included.

    >>> from keras_resnet.training.recipes import RECIPES
    >>> f"{multiply_adds(RECIPES['cifar10'], 'resnet20'):.1e}"
    '1.0e+15'
    """
    size = recipe.augmentation.train_image_size or recipe.image_size
    sizes = recipe.progressive_sizes or (size or _SMALL_SIZE,)
    row = networks.get_network(network)
    arguments = row.arguments(recipe.model_arguments)
    forward = sum(row.multiply_adds(each, None, arguments) for each in sizes)
    images = recipe.batch_size * recipe.steps
    return PASSES * forward * images // len(sizes)


def lines(recipes: dict[str, Recipe]) -> Iterator[str]:
    """Yields a heading, and a line for each network of each recipe.

    Args:
        recipes: Recipes by name.
    """
    form = "{:28}{:12}{:>16}{:>12}{:>16}"
    yield form.format(
        "recipe", "network", "test error, %", "steps", "multiply-adds"
    )
    for name, recipe in recipes.items():
        steps = f"{recipe.steps:,}"
        if not recipe.expected_errors:
            yield form.format(name, "any", "not measured", steps, "").rstrip()
        for network, error in recipe.expected_errors.items():
            cost = f"{multiply_adds(recipe, network):.1e}"
            yield form.format(name, network, f"{error:g}", steps, cost)
