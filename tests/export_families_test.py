"""Exports of every kind of network, and exports that are killed."""

import os
import subprocess
import sys
import time

import numpy as np
import pytest
import tensorflow as tf
from absl.testing import absltest
from absl.testing import parameterized

import keras_resnet
from keras_resnet.data import views
from keras_resnet.serving import export as export_lib
from keras_resnet.serving import model_card
from keras_resnet.serving import verification
from keras_resnet.serving import versions
from tests import exports


def family(name, image_size, **arguments):
    spec = keras_resnet.MODELS.get(name) or keras_resnet.Spec(
        name, (2, 3), (8, 16), stem="cifar", image_size=image_size
    )
    shape = (image_size, image_size, 3)
    return keras_resnet.resnet(
        spec, input_shape=shape, classes=len(exports.LABELS), **arguments
    )


FAMILIES = {
    "cifar": ("resnet20", 32, {}),
    "cifar_pre_activation": ("resnet20v2", 32, {}),
    "bottleneck_cifar": ("resnet164", 32, {}),
    "bottleneck_cifar_pre_activation": ("resnet164v2", 32, {}),
    "looped": ("resnet56", 32, {"looped": True}),
    "looped_pre_activation": ("resnet56v2", 32, {"looped": True}),
    "imagenet": ("resnet18", 64, {}),
    "imagenet_pre_activation": ("resnet18v2", 64, {}),
    "imagenet_bottleneck": ("resnet50", 64, {}),
    "torchvision": ("resnet50", 64, {"bottleneck_stride": "3x3"}),
    "plain": ("plainnet20", 32, {}),
    "plain_imagenet": ("plainnet18", 64, {}),
    **{
        f"shortcut_{shortcut}": ("small", 16, {"shortcut": shortcut})
        for shortcut in keras_resnet.layers.shortcuts.SHORTCUTS
    },
    **{
        f"unit_{unit}": ("small", 16, {"unit": unit})
        for unit in keras_resnet.layers.units.UNITS
    },
}


class FamilyTest(parameterized.TestCase):
    """Every kind of network runs in a process that cannot import Keras."""

    SCRIPT = """
import sys
sys.modules["keras"] = sys.modules["keras_resnet"] = None  # not importable
import numpy as np, tensorflow as tf
directory, questions, answers = sys.argv[1:]
found = {}
with tf.Graph().as_default(), tf.compat.v1.Session() as session:
    signatures = tf.compat.v1.saved_model.loader.load(
        session, ["serve"], directory).signature_def
    with np.load(questions, allow_pickle=True) as inputs:
        for key in inputs:
            signature, name = key.split(":")
            described = signatures[signature]
            outputs = {k: v.name for k, v in described.outputs.items()}
            found.update({
                f"{signature}:{k}": v for k, v in session.run(
                    outputs, {described.inputs[name].name: inputs[key]}
                ).items()})
np.savez(answers, **found)
"""

    @parameterized.named_parameters(
        (key, *value) for key, value in FAMILIES.items()
    )
    @pytest.mark.large
    def test_every_signature_answers_as_the_model(self, name, size, arguments):
        self.check(name, size, arguments)

    @pytest.mark.slow
    def test_a_looped_network_of_bottlenecks_answers_as_the_model(self):
        self.check("small", 16, {"looped": True, "shortcut": "B"})

    def check(self, name, size, arguments):
        model = family(name, size, **arguments)
        rng = np.random.default_rng(3)
        for weight in model.weights:  # statistics that are not 0 and 1
            if weight.name in ("gamma", "moving_variance"):
                weight.assign(rng.uniform(0.8, 1.2, weight.shape))
            elif weight.name in ("beta", "moving_mean"):
                weight.assign(rng.normal(0.0, 0.1, weight.shape))
        preprocessing = views.photo_preprocessing(size, resizes_whole=True)
        folder = exports.scratch(self)
        path = export_lib.export(model, preprocessing, exports.LABELS, folder)
        images = rng.integers(0, 256, [3, size, size, 3], np.uint8)
        encoded = [tf.io.encode_png(image).numpy() for image in images]
        questions = {
            "serving_default:image_bytes": np.array(encoded, object),
            "images:images": images,
            "features:images": images,
            "classify:inputs": exports.serialized(images),
        }
        np.savez(os.path.join(folder, "questions.npz"), **questions)
        answers = os.path.join(folder, "answers.npz")
        subprocess.run(
            [sys.executable, "-c", self.SCRIPT, path]
            + [os.path.join(folder, "questions.npz"), answers],
            check=True,
            capture_output=True,
        )
        inputs = preprocessing(images)
        probabilities = np.asarray(model(inputs))
        features = np.asarray(exports.pooled(model)(inputs))
        best = [exports.LABELS[i].encode() for i in probabilities.argmax(-1)]
        with np.load(answers, allow_pickle=True) as found:
            for key in (
                "serving_default:probabilities",
                "images:probabilities",
                "classify:scores",
            ):
                np.testing.assert_allclose(found[key], probabilities, atol=1e-4)
            for key in ("serving_default:classes", "images:classes"):
                self.assertEqual(found[key].tolist(), best)
            np.testing.assert_allclose(
                found["features:features"],
                features,
                atol=1e-4 * np.abs(features).max(),
            )


class KilledTest(parameterized.TestCase):
    @pytest.mark.large
    def test_export_that_is_killed_leaves_no_version_that_does_not_load(self):
        self.kill(times=20, seed=0)

    def kill(self, times, seed):
        """Exports one version after the other, until it is killed."""
        script = """
import sys
from tests import colours
print("ready", flush=True)
while True:
    print(colours.export(sys.argv[1]), flush=True)
"""
        export_dir = exports.scratch(self)
        rng = np.random.default_rng(seed)
        for _ in range(times):
            process = subprocess.Popen(
                [sys.executable, "-c", script, export_dir],
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
            process.stdout.readline()  # until it starts to export
            time.sleep(rng.uniform(0.0, 8.0))
            process.kill()
            process.communicate()
        paths = versions.numbered(export_dir)
        for path in paths.values():
            with verification.loaded(path) as ask:
                images = np.zeros([1, 4, 4, 3], np.uint8)
                answer = ask("images", {"images": images})
                self.assertEqual(answer["classes"].tolist(), [b"dark"])
            self.assertEqual(model_card.read(path)["classes"], 4)
        left = len(os.listdir(export_dir)) - len(paths)
        print(f"{times} kills: {len(paths)} versions, all load; {left} begun")
        self.assertNotEmpty(paths)


if __name__ == "__main__":
    absltest.main()
