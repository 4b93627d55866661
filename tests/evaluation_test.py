"""Errors are counted once for every image."""

import numpy as np
import tensorflow as tf
from absl.testing import absltest
from absl.testing import parameterized

from keras_resnet.training import evaluation


def batches(logits, labels, size):
    """Batches of one size; the last is filled with NaN that must not count."""
    for start in range(0, len(labels), size):
        x, y = logits[start : start + size], labels[start : start + size]
        missing = size - len(y)
        counted = np.r_[np.ones(len(y)), np.zeros(missing)].astype("float32")
        x = np.concatenate([x, np.full((missing, x.shape[1]), np.nan)])
        y = np.r_[y, np.zeros(missing, "int32")].astype("int32")
        yield tf.constant(x, "float32"), tf.constant(y), tf.constant(counted)


class EvaluationTest(parameterized.TestCase):
    @parameterized.parameters(1, 7, 64, 100, 1000)
    def test_errors_are_those_of_numpy_for_every_batch_size(self, size):
        rng = np.random.default_rng(0)
        logits = rng.normal(size=(100, 10)).astype("float32")
        labels = rng.integers(0, 10, 100)
        result = evaluation.evaluate(lambda x: x, batches(logits, labels, size))
        order = np.argsort(-logits, axis=1)
        self.assertEqual(result.images, 100)
        self.assertEqual(result.top1_errors, np.sum(order[:, 0] != labels))
        in_top5 = (order[:, :5] == labels[:, None]).any(1)
        self.assertEqual(result.top5_errors, np.sum(~in_top5))
        log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        loss = -log_p[np.arange(100), labels].mean()
        np.testing.assert_allclose(result.loss, loss, rtol=1e-5)
        self.assertEqual(result.top1_error, float(result.top1_errors))

    def test_few_classes_have_no_top5_errors(self):
        logits = np.eye(3, dtype="float32")
        result = evaluation.evaluate(
            lambda x: x, batches(logits, np.array([1, 1, 1]), 2)
        )
        self.assertEqual((result.top1_errors, result.top5_errors), (2, 0))

    def test_no_images_are_refused(self):
        with self.assertRaisesRegex(ValueError, "no test images"):
            evaluation.evaluate(lambda x: x, [])


if __name__ == "__main__":
    absltest.main()
