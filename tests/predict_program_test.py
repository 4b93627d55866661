"""apps.predict with networks that were not exported."""

import json
import os
import pathlib
import tempfile
from unittest import mock

import numpy as np
from absl.testing import absltest
from absl.testing import parameterized

import keras_resnet
from keras_resnet.weights import downloads
from keras_resnet.weights import published
from tests import programs
from tests.weight_files import randomized
from tests.weight_files import state_dict
from tests.weight_files import torch_file

CAT = str(pathlib.Path(__file__).parent / "cat.png")


class PredictTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.folder = self.enter_context(tempfile.TemporaryDirectory())
        environment = {"KERAS_HOME": self.folder}
        self.enter_context(mock.patch.dict(os.environ, environment))
        os.environ.pop(downloads.FOLDER_VARIABLE, None)

    def predict(self, *arguments):
        outcome = programs.run("predict", "--json", "--top=1", *arguments)
        self.assertEqual(outcome.code, 0, outcome.err)
        (line,) = outcome.out
        (best,) = json.loads(line)["predictions"]
        return best, outcome.err

    @parameterized.parameters(
        ("--model=resnet20",), ("--model=resnet20", "--weights=cifar10")
    )
    def test_a_network_with_published_weights_needs_no_export(self, *flags):
        best, err = self.predict(*flags, CAT)
        self.assertEqual(best["label"], "cat")
        self.assertEmpty(err)

    def test_a_keras_file_with_a_card_needs_no_flag_of_preprocessing(self):
        path = os.path.join(self.folder, "model.keras")
        keras_resnet.ResNet20(weights="cifar10").save(path)
        best, _ = self.predict(f"--model={path}", CAT)
        self.assertEqual(best["label"], "cat")

    def test_an_image_that_is_none_gets_its_error(self):
        outcome = programs.run("predict", "--model=resnet20", CAT, __file__)
        self.assertEqual(outcome.code, 1)
        self.assertIn(
            "error: not an image: an image must be", "\n".join(outcome.out)
        )

    def test_heic_photos_of_a_folder_are_named_with_the_remedy(self):
        folder = pathlib.Path(self.folder, "photos")
        folder.mkdir()
        (folder / "1.HEIC").write_bytes(b"\0\0\0\x18ftypheic" + bytes(40))
        (folder / "2.png").write_bytes(pathlib.Path(CAT).read_bytes())
        (folder / "notes.txt").write_text("none")
        outcome = programs.run("predict", "--model=resnet20", str(folder))
        self.assertEqual(outcome.code, 1)
        self.assertRegex(
            "\n".join(outcome.out),
            r"1\.HEIC +error: format not supported: HEIC .* to JPEG, .*mogrify",
        )
        self.assertIn("cat", "\n".join(outcome.out))
        self.assertNotIn("notes", "\n".join(outcome.out))

    def test_a_keras_file_without_a_card_is_refused_with_the_remedy(self):
        path = os.path.join(self.folder, "model.keras")
        keras_resnet.ResNet20().save(path)
        outcome = programs.run("predict", f"--model={path}", CAT)
        self.assertEqual(outcome.code, 2)
        self.assertRegex(
            outcome.err[-1], "does not contain the preprocessing .*apps.export"
        )

    def test_without_a_network_the_one_of_cifar_is_taken_and_named(self):
        best, err = self.predict(CAT)
        self.assertEqual(best["label"], "cat")
        self.assertRegex(err[0], "network: .*resnet20_cifar10, .*ten classes")

    def test_weights_of_imagenet_in_the_cache_are_taken_and_named(self):
        models = pathlib.Path(self.folder, "models")
        models.mkdir()
        saved = randomized(keras_resnet.ResNet18())
        (models / "resnet18-00000000.pth").write_bytes(
            torch_file(state_dict(saved))
        )
        digest = downloads.digest_of(models / "resnet18-00000000.pth")
        index = {str(i): [f"n{i}", f"label {i}"] for i in range(1000)}
        path = models / "imagenet_class_index.json"
        path.write_text(json.dumps(index))
        row = published.dataclasses.replace(
            published.find("resnet18", "imagenet"),
            url="https://example.com/resnet18-00000000.pth",
            digest=f"sha256:{digest}",
        )
        others = (published.find("resnet50", "imagenet1k_v2"),)
        with (
            mock.patch.object(published, "_rows", lambda: (*others, row)),
            mock.patch(
                "keras_resnet.weights.labels._INDEX_DIGEST",
                f"md5:{downloads.digest_of(path, 'md5')}",
            ),
        ):
            best, err = self.predict(CAT)
            model = keras_resnet.ResNet18(weights="imagenet")
        self.assertEqual(
            err, ["network: resnet18 with imagenet1k_v1 of torchvision"]
        )
        with open(CAT, "rb"):
            import keras

            image = np.array(keras.utils.load_img(CAT))
        p = model(keras_resnet.preprocess(model)(image)[None])[0]
        self.assertEqual(best["label"], f"label {np.argmax(p)}")
        self.assertAlmostEqual(
            best["probability"], float(np.max(p)), delta=0.02
        )

    @parameterized.parameters(
        (("--weights=imagenet", CAT), "--weights=imagenet: give --model"),
        (
            ("--model=resnet18v2", CAT),
            "--weights=: no weights of resnet18v2 are published",
        ),
        (("--model=resnet5O", CAT), "--model=resnet5O: unknown network"),
        (("--model=", CAT), "--model=: give a value"),
        (
            ("--model=resnet20", "--saved_model=x", CAT),
            "--saved_model=x: cannot be combined with --model=resnet20",
        ),
        (("--model=resnet20",), "--model=resnet20: name images"),
        (
            ("--model=resnet20", "--weights=imagenet", CAT),
            "--weights=imagenet: .*exist for resnet50",
        ),
    )
    def test_flags_that_contradict_are_a_usage_error(self, flags, message):
        outcome = programs.run("predict", *flags)
        self.assertEqual(outcome.code, 2)
        self.assertRegex(outcome.err[-1], message)

    def test_the_list_of_weights_is_the_registry(self):
        outcome = programs.run("predict", "--list_weights")
        self.assertEqual(outcome.code, 0)
        self.assertLen(outcome.out, len(published.rows()) + 1)
        for line, row in zip(outcome.out, published.table(), strict=True):
            self.assertEqual(line.split(), " ".join(row).split())


if __name__ == "__main__":
    absltest.main()
