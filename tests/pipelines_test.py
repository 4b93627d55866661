import os
import pathlib

import numpy as np
import pytest
import tensorflow as tf
from absl.testing import absltest
from absl.testing import parameterized

from keras_resnet.data import augmentation as augmentations
from keras_resnet.data import datasets
from keras_resnet.data import decoding
from keras_resnet.data import views
from tests import images as images_lib
from tests import records


def seen(preprocessing, image):
    """Returns the normalized test view of a stored image."""
    return preprocessing(preprocessing.view(decoding.decode(image)))


# Everything at once, so that each has to be a function of (seed, step).
MODERN = augmentations.Augmentation(
    "pad_crop_flip",
    policy="rand_augment_9",
    colour_jitter=0.4,
    erase_probability=0.5,
    cutout_size=4,
    mixup_alpha=0.2,
    cutmix_alpha=1.0,
    repeats=3,
)


def flat(batches):
    """Batches of mixed images with their labels in one tuple."""
    return batches.map(lambda images, labels: (images, *labels))


def of_each_kind(test):
    """Returns data sets in memory, of files and of records."""
    directory = records.tfds_set(test, (None, None, 3), train=40, test=11)
    records_set = datasets.load("tiny", directory, image_size=32)
    return {
        "memory": datasets.load("digits"),
        "files": datasets.load(images_lib.photos(test), image_size=32),
        "records": records_set,
        "validation": records_set.with_validation(),
    }


class PipelinesTest(parameterized.TestCase):
    """Laws of training and test batches, for every way to read images."""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.sets = of_each_kind(cls)

    @parameterized.product(
        kind=["memory", "files", "records"],
        augmentation=["pad_crop_flip", "scale_jitter"],
    )
    def test_training_batch_is_a_pure_function_of_seed_and_step(
        self, kind, augmentation
    ):
        dataset = self.sets[kind]

        def taken(seed, first_step, count):
            return images_lib.batches(
                dataset.train_batches(8, seed, first_step, augmentation), count
            )

        tf.random.set_seed(1)
        from_start = taken(seed=3, first_step=0, count=9)
        tf.random.set_seed(2)
        images_lib.assert_same(
            taken(seed=3, first_step=7, count=2), from_start[7:]
        )
        other = taken(seed=4, first_step=0, count=1)
        self.assertFalse(np.array_equal(other[0][0], from_start[0][0]))
        self.assertEqual(from_start[0][0].dtype, np.float32)
        self.assertEqual(from_start[0][1].dtype, np.int32)
        self.assertEqual(from_start[0][0].shape, (8, *dataset.image_shape))

    @parameterized.parameters("memory", "files", "records")
    @pytest.mark.slow
    def test_mixed_batch_is_a_pure_function_of_seed_step_and_share(self, kind):
        dataset = self.sets[kind]

        def taken(first_step, count, shard=(0, 1)):
            batches = dataset.train_batches(12, 3, first_step, MODERN, shard)
            return images_lib.batches(flat(batches), count)

        from_start = taken(0, 4)
        images_lib.assert_same(taken(2, 2), from_start[2:])
        shares = [taken(1, 2, (index, 3)) for index in range(3)]
        together = [
            tuple(map(np.concatenate, zip(*parts, strict=True)))
            for parts in zip(*shares, strict=True)
        ]
        images_lib.assert_same(together, from_start[1:3])
        images, labels, others, parts = from_start[0]
        self.assertEqual(images.shape, (12, *dataset.image_shape))
        np.testing.assert_array_equal(labels[np.arange(12) ^ 1], others)
        self.assertEqual(parts.dtype, np.float32)
        self.assertTrue(np.all((parts >= 0) & (parts <= 1)))

    @parameterized.product(
        kind=["memory", "files", "records"], policy=["none", "rand_augment_9"]
    )
    @pytest.mark.slow
    def test_repeated_augmentation_shows_each_image_several_times(
        self, kind, policy
    ):
        """Hoffer et al. 2020: a batch has several views of each image."""
        dataset = self.sets[kind]
        repeated = augmentations.Augmentation(repeats=3, policy=policy)
        views = images_lib.batches(dataset.train_batches(12, 1, 0, repeated), 2)
        once = images_lib.batches(dataset.train_batches(4, 1, 0), 2)
        for (images, labels), (first, numbers) in zip(views, once, strict=True):
            np.testing.assert_array_equal(labels, np.tile(numbers, 3))
            if policy == "none":
                np.testing.assert_array_equal(
                    images, np.tile(first, (3, 1, 1, 1))
                )
            else:
                self.assertFalse(np.array_equal(images[:4], images[4:8]))
        ((_, labels),) = images_lib.batches(
            dataset.train_batches(11, 1, 0, repeated), 1
        )
        np.testing.assert_array_equal(labels, np.tile(once[0][1], 3)[:11])

    def test_mixing_needs_pairs_on_each_worker(self):
        with self.assertRaisesRegex(ValueError, "even number.*received 3"):
            self.sets["memory"].train_batches(6, 0, 0, MODERN, (0, 2))

    def test_training_images_have_their_own_size(self):
        """Touvron et al. 2019 (FixRes)."""
        row = augmentations.Augmentation(train_image_size=24)
        ((images, _),) = images_lib.batches(
            self.sets["files"].train_batches(4, 0, 0, row), 1
        )
        self.assertEqual(images.shape, (4, 24, 24, 3))
        with self.assertRaisesRegex(ValueError, "trained at that size, 8; rec"):
            self.sets["memory"].train_batches(4, 0, 0, row)

    @parameterized.parameters("memory", "files", "records")
    def test_every_epoch_has_every_image_once_in_another_order(self, kind):
        dataset = self.sets[kind]
        size = dataset.train_size
        # One batch is an epoch and a half: batches reach over its end.
        pairs = images_lib.batches(
            dataset.train_batches(size + size // 2, seed=0), 2
        )
        images = np.concatenate([images for images, _ in pairs])
        labels = np.concatenate([labels for _, labels in pairs])
        epochs = [
            [
                (image.tobytes(), int(label))
                for image, label in zip(
                    images[size * e : size * (e + 1)],
                    labels[size * e : size * (e + 1)],
                    strict=True,
                )
            ]
            for e in range(3)
        ]
        views = dataset._train.stored().map(
            lambda image, label: (seen(dataset.preprocessing, image), label)
        )
        stored = sorted(
            (image.tobytes(), int(label))
            for image, label in views.as_numpy_iterator()
        )
        for epoch in epochs:
            self.assertEqual(sorted(epoch), stored)
        self.assertNotEqual(epochs[0], epochs[1])
        self.assertNotEqual(epochs[1], epochs[2])

    @parameterized.parameters("seeds", "epochs")
    def test_the_orders_of_epochs_and_of_seeds_are_unrelated(self, of):
        split = self.sets["memory"]._train
        size, count = split.size, 200
        position = tf.range(size, dtype=tf.int64)
        orders = np.stack(
            [
                split.index(position, seed=i)
                if of == "seeds"
                else split.index(position + i * size, seed=0)
                for i in range(count)
            ]
        )
        np.testing.assert_array_equal(
            np.sort(orders), np.broadcast_to(position, orders.shape)
        )
        # Two random orders have 1 +- 1 images in the same place, neighbours
        # are a third of the size apart, an image's place is uniform.
        kept = np.sum(orders[1:] == orders[:-1], axis=1)
        self.assertAlmostEqual(kept.mean(), 1.0, delta=0.35)
        apart = np.abs(np.diff(orders)).mean()
        self.assertAlmostEqual(apart / size, 1 / 3, delta=0.01)
        places = np.histogram(orders[:, :100], bins=20, range=(0, size))[0]
        np.testing.assert_allclose(places / places.mean(), 1.0, atol=0.2)

    @parameterized.product(
        kind=["memory", "files", "records"],
        augmentation=["pad_crop_flip", "scale_jitter"],
    )
    @pytest.mark.slow
    def test_training_shares_of_the_workers_are_the_batch(
        self, kind, augmentation
    ):
        dataset = self.sets[kind]

        def taken(shard):
            return images_lib.batches(
                dataset.train_batches(12, 1, 2, augmentation, shard), 2
            )

        shares = [taken((index, 3)) for index in range(3)]
        together = [
            tuple(map(np.concatenate, zip(*parts, strict=True)))
            for parts in zip(*shares, strict=True)
        ]
        images_lib.assert_same(together, taken((0, 1)))

    @parameterized.parameters((0, 3), (2, 2), (-1, 2))
    def test_shard_that_does_not_divide_the_batch_is_an_error(self, *shard):
        with self.assertRaisesRegex(ValueError, f"received .{shard[0]}, "):
            self.sets["memory"].train_batches(8, 0, shard=shard)
        with self.assertRaisesRegex(ValueError, "shard must be"):
            self.sets["memory"].padded_test_batches(8, shard=shard)

    def test_starting_inside_an_epoch_decodes_nothing_before(self):
        folder = images_lib.photos(self)
        dataset = datasets.load(folder, image_size=32)
        # The file at position 4 of the first epoch is broken.
        index = dataset._train.index(tf.constant(4, tf.int64), seed=0)
        broken = dataset._train.name(int(index))
        pathlib.Path(broken).write_bytes(b"broken")
        self.assertLen(images_lib.batches(dataset.train_batches(1, 0, 5), 5), 5)
        with self.assertRaises(tf.errors.InvalidArgumentError):
            images_lib.batches(dataset.train_batches(1, 0, 4), 1)
        with self.assertRaisesRegex(ValueError, broken):
            dataset.check()

    @parameterized.product(
        kind=["memory", "files", "records"], batch_size=[1, 4, 100]
    )
    def test_padded_batches_have_every_image_once_in_order(
        self, kind, batch_size
    ):
        dataset = self.sets[kind]
        padded = dataset.padded_test_batches(batch_size)
        found = list(padded.as_numpy_iterator())
        for images, _, counted in found:
            self.assertEqual(images.shape, (batch_size, *dataset.image_shape))
            self.assertEqual(counted.dtype, np.float32)
        images, labels, counted = map(np.concatenate, zip(*found, strict=True))
        self.assertLen(found, -(-dataset.test_size // batch_size))
        self.assertEqual(counted.sum(), dataset.test_size)
        stored = list(dataset._test.stored())
        self.assertLen(stored, dataset.test_size)
        for i, (image, label) in enumerate(stored):
            self.assertEqual(counted[i], 1.0)
            self.assertEqual(labels[i], label)
            np.testing.assert_array_equal(
                images[i], seen(dataset.preprocessing, image)
            )

    @parameterized.parameters("memory", "files", "records")
    @pytest.mark.slow
    def test_test_shares_of_the_workers_are_the_batches(self, kind):
        dataset = self.sets[kind]
        shares = [
            list(dataset.padded_test_batches(8, (index, 4)).as_numpy_iterator())
            for index in range(4)
        ]
        together = [
            tuple(map(np.concatenate, zip(*parts, strict=True)))
            for parts in zip(*shares, strict=True)
        ]
        whole = dataset.padded_test_batches(8).as_numpy_iterator()
        images_lib.assert_same(together, list(whole))

    @parameterized.product(
        kind=["memory", "files", "records", "validation"],
        batch_size=[1, 4, 10**15],
        protocol=views.PROTOCOLS,
    )
    @pytest.mark.slow
    def test_test_batches_are_the_padded_ones_without_filler(
        self, kind, batch_size, protocol
    ):
        if kind == "memory" and batch_size == 1:
            self.skipTest("355 batches, which say nothing new")
        dataset = self.sets[kind]
        size = dataset.test_size
        of_scales = protocol == "multi_scale" and dataset.has_photos
        found = dataset.test_batches(batch_size, protocol)
        self.assertLen(found, size if of_scales else -(-size // batch_size))
        padded = dataset.padded_test_batches(
            min(batch_size, size), protocol=protocol
        )
        count = 0
        for (seen, labels), (expected, numbers, counted) in zip(
            found, padded, strict=False
        ):
            real = counted.numpy() > 0
            tf.nest.map_structure(
                lambda a, b, real=real: np.testing.assert_array_equal(
                    a, b.numpy()[real]
                ),
                (seen, labels),
                (expected, numbers),
            )
            count += len(labels)
        self.assertEqual(count, size)

    @parameterized.parameters("memory", "files", "records")
    def test_test_images_are_the_first_views(self, kind):
        dataset = self.sets[kind]
        images, labels = dataset.test_images(2)
        ((expected, numbers),) = images_lib.batches(dataset.test_batches(2), 1)
        self.assertEqual(images.dtype, np.uint8)
        np.testing.assert_array_equal(dataset.preprocessing(images), expected)
        np.testing.assert_array_equal(labels, numbers)

    def test_examples_are_png_files_named_by_their_labels(self):
        digits = datasets.load("digits")
        directory = os.path.join(records.scratch(self), "new")
        paths = datasets.write_examples(digits, directory, 4)
        images, labels = digits.test_images(4)
        self.assertEqual(
            sorted(os.listdir(directory)),
            [f"{i:02d}_label_{label}.png" for i, label in enumerate(labels)],
        )
        for path, image in zip(paths, images, strict=True):
            decoded = digits.preprocessing.decode(tf.io.read_file(path))
            np.testing.assert_array_equal(decoded, image)


if __name__ == "__main__":
    absltest.main()
