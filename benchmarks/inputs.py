"""Contenders that decode and augment photos on one core.

A step of each returns a batch of float32 images, cropped, mirrored and
normalized as for ImageNet.
"""

import os
import tempfile
from typing import Any

import numpy as np

# By name: fields of `keras_resnet.data.augmentation.Augmentation` beside a crop
# of scale and aspect ratio, and the size of the image in pixels.
AUGMENTATIONS: dict[str, tuple[dict[str, Any], int]] = {
    "crop": ({}, 224),
    "trivial_augment_wide": ({"policy": "trivial_augment_wide"}, 224),
    "rand_augment_9": ({"policy": "rand_augment_9"}, 224),
    "colour_jitter": ({"colour_jitter": 0.4}, 224),
    "erasing": ({"erase_probability": 0.1}, 224),
    "mixup": ({"mixup_alpha": 0.2}, 224),
    "cutmix": ({"cutmix_alpha": 1.0}, 224),
    # All of imagenet_torchvision_v2, without repeats.
    "torchvision_v2": (
        {
            "policy": "trivial_augment_wide",
            "erase_probability": 0.1,
            "mixup_alpha": 0.2,
            "cutmix_alpha": 1.0,
        },
        176,
    ),
}
_MEAN = (0.485, 0.456, 0.406)
_STANDARD_DEVIATION = (0.229, 0.224, 0.225)


def _photos(data_dir) -> list[str]:
    folder = os.path.join(data_dir, "photos")
    return sorted(
        os.path.join(folder, name)
        for name in os.listdir(folder)
        if name.lower().endswith((".jpg", ".jpeg"))
    )


def _pin():
    """Restricts all threads of the process to one core."""
    core = {min(os.sched_getaffinity(0))}
    for thread in os.listdir("/proc/self/task"):
        os.sched_setaffinity(int(thread), core)


def keras_resnet(work, data_dir):
    """Returns batches of training views of `keras_resnet.data`."""
    from keras_resnet.data import augmentation
    from keras_resnet.data import datasets

    _pin()
    folder = tempfile.TemporaryDirectory()
    for i, path in enumerate(_photos(data_dir)):
        for split in ("train", "test"):
            place = os.path.join(folder.name, split, str(i % 2))
            os.makedirs(place, exist_ok=True)
            os.symlink(
                os.path.abspath(path), os.path.join(place, f"{i:04}.jpg")
            )
    fields, size = AUGMENTATIONS[work.augmentation]
    dataset = datasets.load(f"folder:{folder.name}", image_size=size)
    row = augmentation.Augmentation("scale_aspect", **fields)
    batches = iter(
        dataset.train_batches(work.batch_size, seed=0, augmentation=row)
    )

    def step(folder=folder):  # keeps the folder as long as the step
        return next(batches)[0].numpy()

    return step, {}


def pillow(work, data_dir):
    """Decodes, crops and resizes bilinearly, as torchvision does."""
    from PIL import Image

    _pin()
    photos = _photos(data_dir)
    random = np.random.default_rng(0)
    # The values of torchvision for ImageNet's channels.
    mean = np.array([123.675, 116.28, 103.53], "float32")
    standard_deviation = np.array([58.395, 57.12, 57.375], "float32")

    def view(path):
        with Image.open(path) as image:
            image = image.convert("RGB")
        area = image.width * image.height * random.uniform(0.08, 1.0)
        aspect = np.exp(random.uniform(np.log(3 / 4), np.log(4 / 3)))
        width = min(round((area * aspect) ** 0.5), image.width)
        height = min(round((area / aspect) ** 0.5), image.height)
        left = random.integers(image.width - width + 1)
        top = random.integers(image.height - height + 1)
        window = image.crop((left, top, left + width, top + height))
        window = window.resize((224, 224), Image.Resampling.BILINEAR)
        if random.random() < 0.5:
            window = window.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        pixels = np.asarray(window, "float32")
        return (pixels - mean) / standard_deviation

    def step():
        return np.stack(
            [view(random.choice(photos)) for _ in range(work.batch_size)]
        )

    return step, {}


def torchvision(work, data_dir):
    """Returns batches of torchvision's transforms of Pillow's images.

    The transforms and their order are those of torchvision's reference
    training of ImageNet.
    """
    return _of_transforms(work, data_dir, _policy_of_torchvision)


def timm(work, data_dir):
    """Returns the same batches, with the policy of timm."""
    return _of_transforms(work, data_dir, _policy_of_timm)


def _policy_of_torchvision(name):
    from torchvision import transforms

    bilinear = transforms.InterpolationMode.BILINEAR
    return {
        "trivial_augment_wide": transforms.TrivialAugmentWide(
            interpolation=bilinear
        )
    }[name]


def _policy_of_timm(name):
    from PIL import Image
    from timm.data import auto_augment

    return {
        "rand_augment_9": auto_augment.rand_augment_transform(
            "rand-m9-mstd0.5-inc1",
            {"interpolation": Image.Resampling.BILINEAR},
        )
    }[name]


def _of_transforms(work, data_dir, policy):
    import torch
    from PIL import Image
    from torchvision import transforms
    from torchvision.transforms import v2

    _pin()
    torch.set_num_threads(1)
    fields, size = AUGMENTATIONS[work.augmentation]
    single = [
        transforms.RandomResizedCrop(size),
        transforms.RandomHorizontalFlip(),
    ]
    if "policy" in fields:
        single.append(policy(fields["policy"]))
    if "colour_jitter" in fields:
        single.append(transforms.ColorJitter(*[fields["colour_jitter"]] * 3))
    single += [
        transforms.PILToTensor(),
        transforms.ConvertImageDtype(torch.float),
        transforms.Normalize(_MEAN, _STANDARD_DEVIATION),
    ]
    if "erase_probability" in fields:
        single.append(transforms.RandomErasing(fields["erase_probability"]))
    view = transforms.Compose(single)
    mixing = []
    if "mixup_alpha" in fields:
        mixing.append(v2.MixUp(alpha=fields["mixup_alpha"], num_classes=1000))
    if "cutmix_alpha" in fields:
        mixing.append(v2.CutMix(alpha=fields["cutmix_alpha"], num_classes=1000))
    mix = v2.RandomChoice(mixing) if mixing else lambda *batch: batch
    photos = _photos(data_dir)
    random = np.random.default_rng(0)
    labels = torch.zeros([work.batch_size], dtype=torch.int64)

    def read(path):
        with Image.open(path) as image:
            return view(image.convert("RGB"))

    def step():
        paths = random.choice(photos, work.batch_size)
        images, _ = mix(torch.stack([read(path) for path in paths]), labels)
        return images.numpy()

    return step, {}
