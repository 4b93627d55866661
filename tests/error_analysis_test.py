"""Classes, pairs and images with errors, against a loop over all images."""

import os

import numpy as np
import tensorflow as tf
from absl.testing import absltest
from absl.testing import parameterized

from keras_resnet.data import datasets
from keras_resnet.training import error_analysis
from keras_resnet.training import evaluation
from tests import images as images_lib
from tests import programs
from tests import records


class ErrorAnalysisTest(parameterized.TestCase):
    def test_worst_images_are_the_most_certain_errors(self):
        root = records.scratch(self)
        for i in range(20):
            image = np.full((8, 8, 3), 12 * i, np.uint8)
            images_lib.write_bytes(
                root, f"{'ab'[i % 2]}/{i}.png", tf.io.encode_png(image).numpy()
            )
        dataset = datasets.load(f"folder:{root}")

        def predict(images):
            light = tf.reduce_mean(images, (1, 2, 3))
            return tf.stack([light, -light], 1) * 9

        calls = []

        def counted(images):
            tf.py_function(calls.append, [tf.shape(images)[0]], [])
            return predict(images)

        result = evaluation.Evaluator(counted)(dataset, 3, counts_classes=True)
        self.assertEqual(len(calls), -(-dataset.test_size // 3))  # one pass
        found = error_analysis.worst(result.answers, dataset, ["a", "b"], 50)
        expected = []
        for i, (images, labels) in enumerate(dataset.test_batches(1)):
            p = tf.nn.softmax(predict(images))[0].numpy()
            if p.argmax() != labels[0]:
                expected.append((dataset.test_name(i), float(p.max())))
        expected.sort(key=lambda pair: -pair[1])
        self.assertNotEmpty(expected)
        self.assertEqual(
            [mistake.name for mistake in found], [name for name, _ in expected]
        )
        self.assertTrue(all(m.name.endswith(".png") for m in found))
        self.assertTrue(all(m.label != m.prediction for m in found))
        np.testing.assert_allclose(
            [mistake.probability for mistake in found],
            [probability for _, probability in expected],
            rtol=1e-5,
        )

    def test_tables_add_up(self):
        confusion = np.array([[5, 1, 0], [4, 6, 0], [0, 2, 8]])
        result = evaluation.Evaluation(26, 7, 0, 1.0, confusion)
        labels = ["cat", "dog", "fox"]
        nothing = evaluation.Evaluation(1, 0, 0, 1.0, np.diag([0, 1]))
        self.assertIn(
            ["a", "0", "-"], error_analysis.class_rows(nothing, ["a", "b"])
        )
        rows = error_analysis.class_rows(result, labels)
        self.assertEqual(rows[1], ["dog", "10", "40.00%"])
        self.assertEqual([row[0] for row in rows[1:]], ["dog", "fox", "cat"])
        pairs = error_analysis.confused_pairs(result, labels, 9)
        self.assertEqual(
            pairs, [("dog", "cat", 4), ("fox", "dog", 2), ("cat", "dog", 1)]
        )

    def test_program_prints_tables_and_writes_a_picture(self):
        root = records.scratch(self)
        flags = ("--model=resnet20", f"--workdir={root}/run", "--steps=2")
        self.assertEqual(programs.run("train", *flags).code, 0)
        workdir = f"--workdir={root}/run"
        outcome = programs.run(
            "evaluate",
            workdir,
            "--per_class",
            f"--confusion_matrix={root}/errors.png",
        )
        self.assertEqual(outcome.code, 0, outcome.err)
        text = "\n".join(outcome.out)
        for words in ("class  images", "most confused:", "most certain of"):
            self.assertIn(words, text)
        with open(f"{root}/errors.png", "rb") as file:
            self.assertEqual(file.read(4), b"\x89PNG")
        outcome = programs.run(
            "evaluate", workdir, f"--confusion_matrix={root}/errors.pdf"
        )
        self.assertEqual(outcome.code, 2)
        self.assertIn("must end in .csv or .png", outcome.err[0])

    @parameterized.parameters("folder", "pipe", "nowhere")
    def test_place_of_a_matrix_is_checked_before_the_evaluation(self, kind):
        path = os.path.join(records.scratch(self), "errors.csv")
        if kind == "folder":
            os.mkdir(path)
        elif kind == "pipe":
            os.mkfifo(path)
        else:
            path = os.path.join(path, "errors.csv")
        outcome = programs.run(
            "evaluate", "--workdir=none", f"--confusion_matrix={path}"
        )
        self.assertEqual(outcome.code, 2)
        (line,) = outcome.err
        self.assertRegex(line, "--confusion_matrix=.*: must (be in|not be) a")


if __name__ == "__main__":
    absltest.main()
