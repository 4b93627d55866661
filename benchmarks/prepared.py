"""Images and networks that the contenders share."""

import numpy as np


def batch(work) -> tuple[np.ndarray, np.ndarray]:
    """Returns normal noise as images, `[batch, size, size, 3]`, and labels."""
    random = np.random.default_rng(0)
    spec = work.spec()
    shape = (work.batch_size, spec.image_size, spec.image_size, 3)
    labels = random.integers(0, spec.classes, work.batch_size)
    return random.normal(size=shape).astype("float32"), labels.astype("int32")


def pictures(work, count: int, seed: int = 0) -> np.ndarray:
    """Returns uint8 `[count, size, size, 3]`: random colours, with noise.

    The colours of a picture vary over 4 x 4 fields, so that the features of two
    pictures differ more than those of two arrays of noise.
    """
    random = np.random.default_rng(seed)
    size = work.spec().image_size
    colours = random.uniform(0, 255, (count, 4, 4, 3))
    field = np.arange(size) * 4 // size
    noise = random.normal(0, 20, (count, size, size, 3))
    values = colours[:, field][:, :, field] + noise
    return np.clip(values, 0, 255).astype("uint8")


def _normalization(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Returns values for a weight of a normalization, as after training.

    A new network adds zeros and multiplies by ones, and TensorFlow skips some
    of these operations.
    """
    random = np.random.default_rng(0)
    if name in ("beta", "moving_mean"):
        return random.normal(0.0, 0.1, shape).astype("float32")
    return random.uniform(0.5, 1.5, shape).astype("float32")


def as_trained(model):
    """Returns a Keras model in which TensorFlow skips no operation."""
    for variable in model.variables:
        name = variable.name
        if name in ("gamma", "beta", "moving_mean", "moving_variance"):
            variable.assign(_normalization(name, variable.shape))
    return model


def torch_network(work):
    """Returns the network of torch's layers, with images and labels."""
    import torch

    from benchmarks import peers

    images, labels = map(torch.from_numpy, batch(work))
    images = images.permute(0, 3, 1, 2)
    images = images.contiguous(memory_format=torch.channels_last)
    model = peers.torch_network(work.spec())
    names = {
        "weight": "gamma",
        "bias": "beta",
        "running_mean": "moving_mean",
        "running_var": "moving_variance",
    }
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                for theirs, ours in names.items():
                    values = getattr(module, theirs)
                    values.copy_(
                        torch.from_numpy(_normalization(ours, values.shape))
                    )
    return model.to(memory_format=torch.channels_last), images, labels.long()
