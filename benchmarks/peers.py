"""The networks of [1], written with the layers of other packages.

The code is that of a user of these packages, so that a ratio compares layers
and not networks.
"""

from keras_resnet.models import Spec


def cifar_of_keras_layers(units: tuple[int, ...]):
    """Returns a CIFAR network of [1, Sec. 4.2], option A, of Keras' layers.

    Args:
        units: Number of units in each stage.

    Returns:
        A `keras.Model` from images to logits.
    """
    import keras

    def convolve(x, filters, stride=1):
        return keras.layers.Conv2D(
            filters,
            3,
            stride,
            "same",
            use_bias=False,
            kernel_initializer="he_normal",
        )(x)

    def normalize(x):
        return keras.layers.BatchNormalization(momentum=0.9, epsilon=1e-5)(x)

    image = keras.Input((32, 32, 3))
    x = keras.layers.ReLU()(normalize(convolve(image, 16)))
    for stage, n in enumerate(units):
        filters = 16 * 2**stage
        for i in range(n):
            stride = 2 if stage and not i else 1
            residual = normalize(convolve(x, filters, stride))
            residual = keras.layers.ReLU()(residual)
            residual = normalize(convolve(residual, filters))
            if stride == 2:
                x = x[:, ::2, ::2, :]
                x = keras.ops.pad(x, ((0, 0),) * 3 + ((0, filters // 2),))
            x = keras.layers.ReLU()(keras.layers.Add()([x, residual]))
    x = keras.layers.GlobalAveragePooling2D()(x)
    return keras.Model(image, keras.layers.Dense(10, dtype="float32")(x))


def torch_network(spec: Spec):
    """Returns the original network of a spec, of torch's layers.

    Args:
        spec: A row of `MODELS` with the unit `"original"` and the shortcut
            `"A"` or `"B"`.

    Returns:
        A `torch.nn.Module` from images `[batch, 3, height, width]` to logits.
    """
    import torch
    from torch import nn

    def convolve(before, after, size, stride=1):
        return nn.Sequential(
            nn.Conv2d(before, after, size, stride, size // 2, bias=False),
            nn.BatchNorm2d(after),
        )

    class Unit(nn.Module):
        def __init__(self, before, filters, stride):
            super().__init__()
            relu = nn.ReLU(inplace=True)
            if spec.bottleneck:
                after = 4 * filters
                self.residual = nn.Sequential(
                    convolve(before, filters, 1, stride),
                    relu,
                    convolve(filters, filters, 3),
                    relu,
                    convolve(filters, after, 1),
                )
            else:
                after = filters
                self.residual = nn.Sequential(
                    convolve(before, filters, 3, stride),
                    relu,
                    convolve(filters, filters, 3),
                )
            self.missing = after - before
            self.stride = stride
            self.projection = None
            if spec.shortcut == "B" and (stride > 1 or self.missing):
                self.projection = convolve(before, after, 1, stride)

        def forward(self, x):
            residual = self.residual(x)
            if self.projection is not None:
                x = self.projection(x)
            elif self.missing:
                x = x[:, :, :: self.stride, :: self.stride]
                x = nn.functional.pad(x, (0, 0, 0, 0, 0, self.missing))
            return torch.relu_(residual + x)

    is_imagenet = spec.stem == "imagenet"
    filters = spec.filters[0]
    parts = [
        convolve(3, filters, *((7, 2) if is_imagenet else (3, 1))),
        nn.ReLU(inplace=True),
    ]
    if is_imagenet:
        parts.append(nn.MaxPool2d(3, 2, 1))
    before = filters
    stages = zip(spec.units, spec.filters, strict=True)
    for stage, (n, filters) in enumerate(stages):
        for i in range(n):
            unit = Unit(before, filters, 2 if stage and not i else 1)
            parts.append(unit)
            before = filters * (4 if spec.bottleneck else 1)
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*parts, *head, nn.Linear(before, spec.classes))
