"""A fine-tuned network answers alike from every form that it is kept in."""

import dataclasses
import io
import json
import pathlib
import shutil
import tempfile

import keras
import numpy as np
import PIL.Image
import pytest
import tensorflow as tf
from absl.testing import absltest
from absl.testing import parameterized

import keras_resnet
from keras_resnet.training import trained_networks
from keras_resnet.training import workdirs
from keras_resnet.weights import cards
from keras_resnet.weights import published
from tests import programs
from tests.weight_files import randomized

PREPARATION = published.Preparation(
    24, 30, "bicubic", (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
)


def photo(seed, height, width):
    """Coarse squares of random colours: a photo has few high frequencies."""
    coarse = np.random.default_rng(seed).integers(0, 256, (7, 9, 3), np.uint8)
    image = PIL.Image.fromarray(coarse)
    return image.resize((width, height), PIL.Image.Resampling.NEAREST)


def jpeg(image, orientation=1):
    """Encodes an image whose pixels are stored turned, as a phone does."""
    if orientation == 6:
        image = image.transpose(PIL.Image.Transpose.ROTATE_90)
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    image.save(file, "JPEG", quality=95, exif=exif)
    return file.getvalue()


def write_photos(root, count=6):
    for i in range(2 * count):
        path = pathlib.Path(root, "ab"[i % 2], f"{i}.jpg")
        path.parent.mkdir(parents=True, exist_ok=True)
        image = photo(i, 60 + 5 * i, 90 - 3 * i)
        path.write_bytes(jpeg(image, 6 if i % 4 == 1 else 1))


def run(program, *flags):
    outcome = programs.run(program, *flags)
    if outcome.code:
        raise AssertionError(outcome.err)
    return outcome.out


def difference(found, expected):
    """The largest difference of a probability."""
    return max(
        abs(a[label] - b[label])
        for a, b in zip(found, expected, strict=True)
        for label in b
    )


@pytest.mark.slow
class PhotosTest(parameterized.TestCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.root = tempfile.mkdtemp()
        cls.addClassCleanup(shutil.rmtree, cls.root)
        write_photos(f"{cls.root}/photos")
        start = randomized(keras_resnet.ResNet20(classes=7), seed=3)
        cards.attach(
            start,
            published.Card(
                "start", "resnet20", "this test", preparation=PREPARATION
            ),
        )
        start.save(f"{cls.root}/start.keras")
        cls.workdir = f"{cls.root}/run"
        run(
            "train",
            "--model=resnet20",
            f"--dataset=folder:{cls.root}/photos",
            f"--weights={cls.root}/start.keras",
            f"--workdir={cls.workdir}",
            "--steps=2",
            "--batch_size=4",
        )
        trained = trained_networks.load_workdir(cls.workdir)
        trained.model.save(f"{cls.root}/photos.keras")
        cls.trained = trained
        run(
            "export",
            f"--workdir={cls.workdir}",
            f"--export_dir={cls.root}/export",
        )
        upright, turned = photo(50, 80, 57), photo(51, 70, 101)
        cls.files = {
            "upright.jpg": jpeg(upright),
            "turned.jpg": jpeg(turned, 6),
        }
        for name, content in cls.files.items():
            pathlib.Path(cls.root, name).write_bytes(content)

    def predictions(self, flag):
        """Probabilities by label of the two photos, from apps.predict."""
        names = [f"{self.root}/{name}" for name in self.files]
        out = run("predict", "--json", flag, *names)
        return [
            {row["label"]: row["probability"] for row in answer["predictions"]}
            for answer in map(json.loads, out)
        ]

    def in_python(self, model, transposes=True):
        """The same by `preprocess`, of photos that are turned by hand."""
        prepare = keras_resnet.preprocess(model)
        found = []
        for name, content in self.files.items():
            # Pillow decodes JPEG to other levels.
            image = tf.io.decode_jpeg(content).numpy()
            if transposes and name == "turned.jpg":
                image = np.rot90(image, -1)
            p = model(prepare(image)[None])
            rows = keras_resnet.decode_predictions(p, top=2, model=model)
            found.append({label: p for _, label, p in rows[0]})
        return found

    def assert_close(self, found, expected, tolerance):
        self.assertLess(difference(found, expected), tolerance)
        for a, b in zip(found, expected, strict=True):
            self.assertEqual([*a], [*b])  # the best label first

    def test_preprocessing_of_the_weights_reaches_the_training(self):
        found, labels, _ = workdirs.read_dataset(pathlib.Path(self.workdir))
        self.assertEqual(labels, ["a", "b"])
        self.assertEqual(found.image_shape, (24, 24, 3))
        self.assertEqual(found.shorter_side, 30)
        self.assertEqual(found.interpolation, "bicubic")
        np.testing.assert_allclose(found.mean, PREPARATION.mean)
        np.testing.assert_allclose(
            found.standard_deviation, PREPARATION.deviation
        )
        card = keras_resnet.weights.card(self.trained.model)
        self.assertEqual(card.labels, ("a", "b"))
        np.testing.assert_allclose(card.preparation.mean, PREPARATION.mean)

    def test_file_export_and_directory_answer_alike(self):
        of_file = self.predictions(f"--model={self.root}/photos.keras")
        of_export = self.predictions(f"--saved_model={self.root}/export")
        self.assert_close(of_export, of_file, 1e-5)
        of_workdir = []
        for content in self.files.values():
            view = self.trained.preprocessing.decode(tf.constant(content))
            p = self.trained.model(self.trained.preprocessing(view)[None])[0]
            order = np.argsort(-np.array(p))
            of_workdir.append(
                {self.trained.labels[i]: float(p[i]) for i in order}
            )
        self.assert_close(of_workdir, of_file, 1e-5)

    def test_exports_resize_as_the_preprocessing_in_python_does(self):
        """Bicubically, with antialiasing, and turned as EXIF says."""
        of_export = self.predictions(f"--saved_model={self.root}/export")
        model = keras.models.load_model(f"{self.root}/photos.keras")
        expected = self.in_python(model)
        self.assert_close(of_export, expected, 1e-3)
        # Other views would be seen.
        as_stored = self.in_python(model, transposes=False)
        self.assertGreater(
            difference(as_stored, expected), 5 * difference(of_export, expected)
        )
        card = keras_resnet.weights.card(model)
        bilinear = dataclasses.replace(
            card.preparation, interpolation="bilinear"
        )
        cards.attach(model, dataclasses.replace(card, preparation=bilinear))
        self.assertGreater(
            difference(self.in_python(model), expected),
            2 * difference(of_export, expected),
        )


if __name__ == "__main__":
    absltest.main()
