"""Calls that make up a functional or sequential model.

Several models may call one layer, and one model may call it several times, so
`layer.input` and `layer.output` can belong to another model. The nodes of the
model's own graph do not.
"""

from typing import Any

import keras


def has_graph(operation: Any) -> bool:
    """Whether an operation is a functional or a built sequential model."""
    return isinstance(operation, keras.Model) and hasattr(
        getattr(operation, "_functional", operation), "_nodes_by_depth"
    )


def graph(model: keras.Model) -> Any:
    """Returns the functional model behind a functional or sequential model.

    Raises:
        ValueError: If `model` is a subclassed model, or a sequential model
            before it is built.
    """
    if not has_graph(model):
        name = getattr(model, "name", model)
        raise ValueError(
            "model must be a functional model, or a sequential model that "
            f"starts with keras.Input, received {name!r}, a "
            f"{type(model).__name__}"
        )
    return getattr(model, "_functional", model)


def nodes(model: keras.Model) -> list[Any]:
    """Returns Keras' nodes of the calls of `model`, from inputs to outputs.

    >>> image = keras.Input((4,))
    >>> dense = keras.layers.Dense(4, name="dense")
    >>> model = keras.Model(image, dense(dense(image)))
    >>> [node.operation.name for node in nodes(model)]
    ['dense', 'dense']
    """
    by_depth = graph(model)._nodes_by_depth
    return [
        node
        for depth in sorted(by_depth, reverse=True)
        for node in by_depth[depth]
        if not node.is_input
    ]
