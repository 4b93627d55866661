"""No shape of a convolution aborts the process in its gradient.

TensorFlow 2.21 does in the kernel gradient of a strided 1x1 convolution, on a
processor with AMX, with 8 input channels and an odd batch. Here a child process
computes the gradients, and names each shape before it does.
"""

import itertools
import json
import subprocess
import sys

import pytest
from absl.testing import absltest
from absl.testing import parameterized

_CHILD = """
import json
import sys

import keras
import tensorflow as tf
from keras_resnet import layers

for line in sys.stdin:
    print(line.strip(), flush=True)
    batch, size, channels, *arguments, dtype = json.loads(line)
    layer = layers.Convolution(*arguments, dtype=dtype)
    x = tf.ones((batch, size, size, channels), layer.compute_dtype)
    for training in (False, True):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x, training=training)
        dx, kernel = tape.gradient(y, [x, layer.kernel.value])
        # Of ones, every product of the kernel's gradient is a pixel.
        assert float(tf.reduce_max(kernel)) == batch * y.shape[1] * y.shape[2]
"""


def failures(shapes):
    """Returns the shapes whose gradient aborts the process, or is wrong."""
    found, rest = [], list(shapes)
    while rest:
        child = subprocess.run(
            [sys.executable, "-c", _CHILD],
            input="\n".join(map(json.dumps, rest)),
            capture_output=True,
            text=True,
        )
        if not child.returncode:
            break
        done = len(child.stdout.splitlines())
        if not done:
            raise RuntimeError(child.stderr)
        cause = (child.stderr.splitlines() or [""])[-1]
        found.append((rest[done - 1], child.returncode, cause))
        rest = rest[done:]
    return found


class GradientTest(parameterized.TestCase):
    def test_a_strided_1x1_convolution_of_8_channels_has_one(self):
        shapes = itertools.product(
            (1, 3, 5, 7), (16, 32), (8,), (8, 16), (1,), (2,), ("float32",)
        )
        self.assertEmpty(failures(shapes))

    @pytest.mark.large
    def test_every_shape_has_one(self):
        shapes = itertools.product(
            (1, 2, 7, 8),
            (16, 17),
            range(1, 65),
            (8, 16),
            (1, 3),
            (1, 2),
            ("float32", "mixed_bfloat16"),
        )
        self.assertEmpty(failures(shapes))


if __name__ == "__main__":
    absltest.main()
