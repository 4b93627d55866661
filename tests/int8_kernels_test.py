"""Kernels of 8 bits compute the integers of Jacob et al. (2018).

Truth is the formula in integers of 64 bits and float64.
"""

import os
import subprocess
import sys

import numpy as np
import tensorflow as tf
from absl.testing import absltest
from absl.testing import parameterized

from keras_resnet.serving import int8_kernels
from tests import reference


def run(function, *arrays):
    """The result of a function of tensors, in a session as a server's."""
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        inputs = [
            tf.compat.v1.placeholder(array.dtype, [None, *array.shape[1:]])
            for array in arrays
        ]
        return session.run(
            function(*inputs), dict(zip(inputs, arrays, strict=True))
        )


def integers(rng, shape, is_signed=False):
    low, kind = (-127, "int8") if is_signed else (0, "uint8")
    limit = int8_kernels.limit(is_signed)
    return rng.integers(low, limit + 1, shape).astype(kind)


def rounded(y, largest, is_signed=False):
    """The integers of 8 bits of real numbers."""
    limit = int8_kernels.limit(is_signed)
    low = -128 if is_signed else 0
    return np.clip(np.rint(y / largest * limit), low, limit)


def stored(values, largest):
    kind = tf.qint8 if values.dtype == tf.int8 else tf.quint8
    return int8_kernels.Int8Tensor(tf.bitcast(values, kind), largest)


def plain(tensor):
    kind = tf.int8 if tensor.is_signed else tf.uint8
    return tf.bitcast(tensor.values, kind)


class ConvolutionTest(parameterized.TestCase):
    @parameterized.product(
        layer=((1, 1), (1, 2), (3, 1), (3, 2), (7, 2)),
        is_signed=((False, False), (False, True), (True, False), (True, True)),
    )
    def test_kernel_computes_the_formula(self, layer, is_signed):
        self.check(*layer, *is_signed)

    @parameterized.parameters((1, 1), (3, 1), (1, 2), (3, 2))
    def test_summand_is_added_before_the_relu(self, size, stride):
        self.check(size, stride, False, False, has_summand=True)

    def check(self, size, stride, signed_x, signed_y, has_summand=False):
        seed = size + 10 * stride + 100 * signed_x + 200 * signed_y
        rng = np.random.default_rng(seed + 400 * has_summand)
        pixels = integers(rng, (2, 9, 9, 5), signed_x)
        kernel = rng.normal(size=(size, size, 5, 6)).astype("float32")
        # Filters of very different sizes, one of them zero.
        kernel *= np.array([1.0, 1e-3, 0.0, 1e-30, 30.0, 0.1], "float32")
        bias = rng.normal(size=6).astype("float32")
        largest_x, largest_h = rng.uniform(1.0, 3.0, 2)
        weights, scale = int8_kernels.quantized_kernel(kernel)
        scale = scale / 127.0 * largest_x / int8_kernels.limit(signed_x)
        y = reference.convolution(pixels, weights, stride) * scale + bias
        arrays = [pixels]
        if has_summand:
            arrays.append(integers(rng, y.shape))
            y = y + arrays[1] * (largest_h / 255.0)
        if not signed_y:
            y = reference.relu(y)
        largest_y = float(0.7 * np.abs(y).max())  # some numbers exceed it
        sides = [size // 2] * 2

        def convolved(pixels, *others):
            x = int8_kernels.pad(
                stored(pixels, largest_x), [[0, 0], sides, sides, [0, 0]]
            )
            # A copy, since the caller still holds its own tensor.
            summand = [
                int8_kernels.max_pool(stored(other, largest_h), 1, 1, "SAME")
                for other in others
            ]
            return plain(
                int8_kernels.convolution(
                    x,
                    kernel,
                    bias,
                    stride,
                    "VALID",
                    largest_y,
                    is_signed=signed_y,
                    summand=summand[0] if summand else None,
                )
            )

        found = run(convolved, *arrays)
        expected = rounded(y, largest_y, signed_y)
        self.assertGreater(np.std(expected), 10)
        # A half may be rounded up or down, since float32 computes it.
        difference = np.abs(found - expected)
        self.assertLessEqual(difference.max(), 1)
        self.assertLess(np.mean(difference > 0), 1e-2)

    def test_kernel_of_zeros_returns_the_bias(self):
        pixels = np.full([1, 2, 2, 1], 255, "uint8")

        def convolved(pixels):
            return plain(
                int8_kernels.convolution(
                    stored(pixels, 1.0),
                    np.zeros([1, 1, 1, 2], "float32"),
                    np.array([0.4, 1e6], "float32"),
                    1,
                    "SAME",
                    1.0,
                )
            )

        found = run(convolved, pixels)
        self.assertEqual(np.unique(found[..., 0]).tolist(), [102])
        self.assertEqual(np.unique(found[..., 1]).tolist(), [255])


class MoveTest(parameterized.TestCase):
    def test_real_numbers_become_the_nearest_integers(self):
        x = np.linspace(-3.0, 3.0, 1000, dtype="float32")[None]
        for is_signed in (False, True):

            def there(x, is_signed=is_signed):
                return plain(int8_kernels.quantize(x, 2.0, is_signed))

            def back(x, is_signed=is_signed):
                return int8_kernels.dequantize(
                    int8_kernels.quantize(x, 2.0, is_signed)
                )

            expected = rounded(x, 2.0, is_signed)
            found = run(there, x)
            self.assertLessEqual(np.abs(found - expected).max(), 1)
            self.assertLess(np.mean(found != expected), 0.01)
            step = 2.0 / int8_kernels.limit(is_signed)
            np.testing.assert_allclose(run(back, x), found * step, rtol=1e-6)

    @parameterized.product(
        window=((3, 2, "VALID"), (1, 2, "VALID"), (1, 2, "SAME")),
        is_signed=(False, True),
    )
    def test_pool_returns_the_largest_integers(self, window, is_signed):
        size, stride, padding = window
        pixels = integers(np.random.default_rng(0), (2, 7, 7, 5), is_signed)

        def pooled(pixels):
            x = stored(pixels, 1.0)
            return plain(int8_kernels.max_pool(x, size, stride, padding))

        views = np.lib.stride_tricks.sliding_window_view(
            pixels, (size, size), (1, 2)
        )
        expected = views[:, ::stride, ::stride].max((-2, -1))
        np.testing.assert_array_equal(run(pooled, pixels), expected)


class CheckTest(parameterized.TestCase):
    def test_this_machine_has_the_kernels(self):
        int8_kernels.check()

    @parameterized.parameters(
        ({"TF_ENABLE_ONEDNN_OPTS": "0"}, "no such kernels"),
    )
    def test_machine_without_the_kernels_is_named(self, environment, received):
        code = """
from keras_resnet.serving import int8_kernels
try:
    int8_kernels.check()
except ValueError as error:
    print(error)
"""
        line = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, **environment},
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        self.assertRegex(
            line, f"int8 must run on .*, received {received} .* int8_weights\n"
        )


if __name__ == "__main__":
    absltest.main()
