"""Layers inside tf.distribute.MirroredStrategy, on two logical processors."""

from absl.testing import absltest

from tests import runs
from tests import two_devices


class MirroredTest(absltest.TestCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.differences = runs.call(two_devices.differences)

    def test_training_changes_the_weights(self):
        self.assertGreater(self.differences["moved"], 1e-3)

    def test_batch_normalization_equals_that_of_keras(self):
        """Law 3 of the design: weights and moving statistics."""
        self.assertLess(self.differences["norm"], 1e-5)

    def test_synchronized_normalization_equals_one_device(self):
        """Law 6 of the design, and the same layer of Keras."""
        self.assertLess(self.differences["synchronized norm"], 1e-5)
        self.assertLess(self.differences["that of Keras"], 1e-5)

    def test_synchronized_variance_keeps_its_digits(self):
        """mean(x^2) - mean(x)^2 would lose all of them."""
        self.assertLess(self.differences["far"], 1e-3)

    def test_looped_stack_equals_the_unrolled_one(self):
        """Law 4 of the design, the activations kept or computed again."""
        self.assertLess(self.differences["stack"], 1e-5)
        self.assertLess(self.differences["recomputed stack"], 1e-5)


if __name__ == "__main__":
    absltest.main()
