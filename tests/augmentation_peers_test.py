"""Distributions of augmentations beside those of torchvision and timm.

Both sides draw with fixed seeds. Two samples are of one distribution if a test
at the level 0.001 does not reject it: chi-squared for operations, Kolmogorov
and Smirnov for numbers (with equal numbers in a sample it rejects less often).
"""

import dataclasses
import random as python_random
from unittest import mock

import numpy as np
import pytest
import tensorflow as tf
from absl.testing import absltest
from absl.testing import parameterized

from keras_resnet.data import augmentation
from keras_resnet.data import operations

stats = pytest.importorskip("scipy.stats")
torch = pytest.importorskip("torch")
autoaugment = pytest.importorskip("torchvision.transforms.autoaugment")
transforms = pytest.importorskip("torchvision.transforms")
timm_augment = pytest.importorskip("timm.data.auto_augment")
timm_erasing = pytest.importorskip("timm.data.random_erasing")
timm_mixup = pytest.importorskip("timm.data.mixup")

LEVEL = 1e-3
DRAWS = 6000
SIDE = 224

# The names of torchvision, and the number of ours for its magnitude.
TRIVIAL = {
    "Identity": None,
    "ShearX": lambda m: m,
    "ShearY": lambda m: m,
    # torch.linspace has 15.999999 for 16.
    "TranslateX": lambda m: int(round(m, 4)),
    "TranslateY": lambda m: int(round(m, 4)),
    "Rotate": lambda m: m,
    "Brightness": lambda m: 1 + m,
    "Color": lambda m: 1 + m,
    "Contrast": lambda m: 1 + m,
    "Sharpness": lambda m: 1 + m,
    "Posterize": int,
    "Solarize": lambda m: m,
    "AutoContrast": None,
    "Equalize": None,
}
# The names of timm, and the number of ours for its argument.
INCREASING = {
    "AutoContrast": None,
    "Equalize": None,
    "Invert": None,
    "Rotate": lambda v: v,
    "PosterizeIncreasing": lambda v: v,
    "SolarizeIncreasing": lambda v: v,
    "SolarizeAdd": lambda v: v,
    "ColorIncreasing": lambda v: v,
    "ContrastIncreasing": lambda v: v,
    "BrightnessIncreasing": lambda v: v,
    "SharpnessIncreasing": lambda v: v,
    "ShearX": lambda v: v,
    "ShearY": lambda v: v,
    "TranslateXRel": lambda v: SIDE * v,
    "TranslateYRel": lambda v: SIDE * v,
}


def drawn(policy, count):
    """(index, number) of the operations that one draw of a policy applies.

    The operations write both into the image instead of changing it. The index
    is -1 if none is applied.
    """

    def writer(index):
        return lambda image, value, *fill: tf.broadcast_to(
            tf.stack([float(index), tf.cast(value, tf.float32)]), image.shape
        )

    recording = dataclasses.replace(
        policy,
        count=1,
        choices=tuple(
            dataclasses.replace(choice, apply=writer(index))
            for index, choice in enumerate(policy.choices)
        ),
    )
    blank = tf.fill([SIDE, 1, 2], -1.0)
    draws = tf.data.Dataset.range(count).map(
        lambda i: recording(blank, tf.stack([tf.constant(11, tf.int64), i]))[
            0, 0
        ]
    )
    found = np.stack(list(draws.as_numpy_iterator()))
    return found[:, 0].astype(int), found[:, 1]


class DistributionsTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        torch.manual_seed(0)
        np.random.seed(0)
        python_random.seed(0)

    def assert_same_frequencies(self, ours, theirs):
        """Counts of each kind, by a chi-squared test."""
        result = stats.chi2_contingency(np.stack([ours, theirs]))
        self.assertGreater(result.pvalue, LEVEL, (ours, theirs))

    def assert_same_distribution(self, ours, theirs, name=""):
        result = stats.ks_2samp(np.asarray(ours), np.asarray(theirs))
        self.assertGreater(result.pvalue, LEVEL, (name, result))

    def assert_same_operations(self, policy, theirs, converted):
        """`theirs`: (name, number) of each draw, or None for no operation."""
        names = list(converted)
        indices, values = drawn(policy, len(theirs))
        their_indices = np.array(
            [-1 if each is None else names.index(each[0]) for each in theirs]
        )
        kinds = sorted({*indices, *their_indices})
        self.assertContainsSubset(range(len(names)), kinds)
        self.assert_same_frequencies(
            *(
                [np.sum(each == k) for k in kinds]
                for each in (indices, their_indices)
            )
        )
        for index, (name, convert) in enumerate(converted.items()):
            if convert is not None:
                self.assert_same_distribution(
                    values[indices == index],
                    [convert(e[1]) for e in theirs if e and e[0] == name],
                    name,
                )

    def test_trivial_augment_wide_is_that_of_torchvision(self):
        theirs = []

        def record(image, name, magnitude, interpolation, fill):
            theirs.append((name, magnitude))
            return image

        transform = autoaugment.TrivialAugmentWide()
        image = torch.zeros([3, SIDE, SIDE], dtype=torch.uint8)
        with mock.patch.object(autoaugment, "_apply_op", record):
            for _ in range(DRAWS):
                transform(image)
        policy = operations.get_policy("trivial_augment_wide")
        self.assert_same_operations(policy, theirs, TRIVIAL)

    def test_every_number_of_trivial_augment_wide_is_one_of_torchvision(self):
        space = autoaugment.TrivialAugmentWide()._augmentation_space(31)
        indices, values = drawn(
            operations.get_policy("trivial_augment_wide"), DRAWS
        )
        for index, (name, convert) in enumerate(TRIVIAL.items()):
            if convert is None:
                continue
            magnitudes, is_signed = space[name]
            allowed = [
                convert(sign * float(m))
                for m in magnitudes
                for sign in ((1, -1) if is_signed else (1,))
            ]
            found = np.unique(values[indices == index])
            distance = np.abs(found[:, None] - np.array(allowed)).min(1)
            self.assertLess(distance.max(), 1e-4, name)
            np.testing.assert_allclose(found.min(), min(allowed), atol=1e-4)
            np.testing.assert_allclose(found.max(), max(allowed), atol=1e-4)

    def test_rand_augment_is_that_of_timm(self):
        transform = timm_augment.rand_augment_transform("rand-m9-mstd0.5-inc1")
        self.assertLen(transform.ops, len(INCREASING))
        theirs = []
        for op in transform.ops:
            op.aug_fn = lambda image, *value, name=op.name, **_: theirs.append(
                (name, *value)
            )
        for _ in range(DRAWS):
            for op in np.random.choice(transform.ops, 1):
                before = len(theirs)
                op(None)
                if len(theirs) == before:
                    theirs.append(None)
        policy = operations.get_policy("rand_augment_9")
        self.assertEqual(policy.count, transform.num_layers)
        self.assert_same_operations(policy, theirs, INCREASING)

    @parameterized.parameters("timm", "torchvision")
    def test_erased_rectangles_are_those_of_the_peer(self, peer):
        if peer == "timm":
            erase = timm_erasing.RandomErasing(
                probability=1.0, max_area=0.33, max_aspect=3.3, device="cpu"
            )
        else:
            erase = transforms.RandomErasing(p=1.0)
        size, count = 48, 3000
        theirs = np.stack(
            [
                erase(torch.ones([1, size, size])).numpy()[0]
                for _ in range(count)
            ]
        )
        random = tf.random.stateless_uniform([count, 23], [1, 2])
        ours = augmentation.erase(tf.ones([count, size, size, 1]), random)
        ours = ours.numpy()[..., 0]
        for name, measured in (
            ("area", lambda x: np.sum(x == 0, (1, 2))),
            ("height", lambda x: np.sum(np.any(x == 0, 2), 1)),
            ("width", lambda x: np.sum(np.any(x == 0, 1), 1)),
            ("top", lambda x: np.argmax(np.any(x == 0, 2), 1)),
            ("left", lambda x: np.argmax(np.any(x == 0, 1), 1)),
        ):
            a, b = measured(ours), measured(theirs)
            self.assert_same_distribution(a, b, name)

    def test_share_of_erased_images_is_that_of_timm(self):
        count = 4000
        erase = timm_erasing.RandomErasing(probability=0.25, device="cpu")
        theirs = erase(torch.ones([count, 1, 16, 16])).numpy()
        random = tf.random.stateless_uniform([count, 23], [3, 4])
        ours = augmentation.erase(tf.ones([count, 16, 16, 1]), random, 0.25)
        erased = [
            np.sum(np.any(x == 0, (1, 2, 3))) for x in (ours.numpy(), theirs)
        ]
        self.assert_same_frequencies(*([n, count - n] for n in erased))

    @parameterized.parameters((0.2, 0.0), (0.0, 1.0), (0.8, 1.0))
    def test_shares_of_mixed_images_are_those_of_timm(self, mixup, cutmix):
        count, size = 3000, 32
        row = augmentation.Augmentation(mixup_alpha=mixup, cutmix_alpha=cutmix)
        pair = tf.concat(
            [tf.zeros([1, size, size, 1]), tf.ones([1, size, size, 1])], 0
        )

        def mixed(i):
            images, (_, _, shares) = augmentation.mix(
                row, pair, tf.range(2), tf.stack([tf.constant(5, tf.int64), i])
            )
            is_whole = tf.reduce_all((images == 0) | (images == 1))
            return shares[0], is_whole

        draws = tf.data.Dataset.range(count).map(mixed).as_numpy_iterator()
        ours, are_cut = map(np.array, zip(*draws, strict=True))
        peer = timm_mixup.Mixup(mixup, cutmix)
        theirs, their_cut = [], []
        for _ in range(count):
            share, is_cut = peer._params_per_batch()
            if is_cut:
                _, share = timm_mixup.cutmix_bbox_and_lam(
                    (2, 1, size, size), share, correct_lam=True
                )
            theirs.append(share)
            their_cut.append(is_cut)
        theirs, their_cut = np.array(theirs), np.array(their_cut)
        if mixup and cutmix:
            self.assert_same_frequencies(
                *([np.sum(x), np.sum(~x)] for x in (are_cut, their_cut))
            )
        for is_cut in np.unique(their_cut):
            self.assert_same_distribution(
                ours[are_cut == is_cut], theirs[their_cut == is_cut]
            )


if __name__ == "__main__":
    absltest.main()
