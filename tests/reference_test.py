"""The reference against totals that papers and other packages print."""

import numpy as np
import pytest
from absl.testing import parameterized

from tests import reference

# Trainable parameters, 10 classes: depth, options A, B and C, and millions of
# multiply-adds with option A. [1, Table 6] prints 0.27M, 0.46M, ... 19.4M.
CIFAR = (
    (20, 269_722, 272_474, 283_962, 40.55),
    (32, 464_154, 466_906, 489_594, 68.86),
    (44, 658_586, 661_338, 695_226, 97.17),
    (56, 853_018, 855_770, 900_858, 125.49),
    (110, 1_727_962, 1_730_714, 1_826_202, 252.89),
    (1202, 19_421_274, 19_424_026, 20_538_714, 2829),
)

# Depth, options A, B, C, pre-activation with B, moving statistics, and 10^9
# multiply-adds with the stride on the 1x1 [1] and on the 3x3 convolution.
IMAGENET = (
    (18, 11_515_688, 11_689_512, 12_043_816, 11_687_720, 9_600, 1.814, 1.814),
    (34, 21_623_848, 21_797_672, 22_716_840, 21_795_880, 17_024, 3.664, 3.664),
    (50, 22_780_456, 25_557_032, 40_128_552, 25_549_352, 53_120, 3.858, 4.089),
    (
        *(101, 41_772_584, 44_549_160, 76_981_288, 44_541_480, 105_344),
        *(7.570, 7.801),
    ),
    (
        *(152, 57_416_232, 60_192_808, 107_335_720, 60_185_128, 151_424),
        *(11.282, 11.514),
    ),
    (200, 61_897_256, 64_673_832, None, 64_666_152, 176_000, 14.78, None),
)


class ReferenceTest(parameterized.TestCase):
    @parameterized.parameters(*CIFAR)
    def test_cifar_networks_have_the_published_totals(self, depth, a, b, c, m):
        net = reference.layout(f"resnet{depth}")
        totals = {s: reference.counts(net, s) for s in "ABC"}
        self.assertEqual([t.parameters for t in totals.values()], [a, b, c])
        digits = 0 if depth == 1202 else 2
        self.assertEqual(round(totals["A"].multiply_adds / 1e6, digits), m)
        v2 = reference.counts(reference.layout(f"resnet{depth}v2"), "A")
        self.assertEqual(v2.parameters, a)
        plain = net._replace(shortcut="none")
        self.assertEqual(reference.counts(plain)[:3], totals["A"][:3])

    @parameterized.parameters(*IMAGENET)
    def test_imagenet_networks_have_the_published_totals(
        self, depth, a, b, c, v2, moving_statistics, billions, billions_3x3
    ):
        net = reference.layout(f"resnet{depth}")
        totals = {s: reference.counts(net, s) for s in ("A", "B", "C", "none")}
        self.assertEqual(totals["A"].parameters, a)
        self.assertEqual(totals["B"].parameters, b)
        if c is not None:
            self.assertEqual(totals["C"].parameters, c)
        self.assertEqual(totals["none"].parameters, a)
        self.assertEqual(totals["B"].moving_statistics, moving_statistics)
        digits = 2 if depth == 200 else 3
        for stride, printed in (("1x1", billions), ("3x3", billions_3x3)):
            if printed is not None:
                m = reference.counts(net, "B", stride).multiply_adds
                self.assertEqual(round(m / 1e9, digits), printed)
        net = reference.layout(f"resnet{depth}v2")
        self.assertEqual(reference.counts(net, "B").parameters, v2)

    @parameterized.parameters(
        ("resnet164", "B", 1_704_154),
        ("resnet164v2", "B", 1_703_258),
        ("resnet1001", "B", 10_328_602),
        ("resnet1001v2", "B", 10_327_706),
        ("resnet110", "convolution", 1_822_170),
    )
    def test_networks_of_the_second_paper_have_its_totals(
        self, name, shortcut, parameters
    ):
        net = reference.layout(name)
        self.assertEqual(reference.counts(net, shortcut).parameters, parameters)

    def test_googlenet_has_the_published_totals(self):
        """Szegedy et al. 2015: 1.5 billion; 6,998,552 in Caffe's zoo."""
        parameters, multiply_adds = reference.googlenet()
        self.assertEqual(parameters, 6_998_552)
        self.assertAlmostEqual(multiply_adds / 1e9, 1.5, delta=0.1)

    def test_prelu_net_has_the_published_totals(self):
        """He et al. 2015, Table 3, model C: 22 layers, 5.30 x 10^10."""
        layers, _, multiply_adds = reference.prelu_net()
        self.assertEqual(layers, 22)
        self.assertAlmostEqual(multiply_adds / 5.30e10, 1, delta=0.01)

    def test_vgg_nets_have_the_published_totals(self):
        parameters, convolutions, _ = reference.vgg(16)
        self.assertEqual(parameters, 138_357_544)
        self.assertEqual(round(convolutions / 1e9, 1), 15.3)
        parameters, _, everything = reference.vgg(19)
        self.assertEqual(parameters, 143_667_240)
        self.assertEqual(round(everything / 1e9, 1), 19.6)

    def test_convolution_is_the_sum_over_its_window(self):
        x = np.arange(2 * 5 * 4 * 1).reshape(2, 5, 4, 1)
        kernel = np.zeros((3, 3, 1, 1))
        kernel[0, 1] = 1.0  # the pixel above
        y = reference.convolution(x, kernel)
        np.testing.assert_array_equal(y[:, 1:], x[:, :-1])
        np.testing.assert_array_equal(y[:, 0], 0)
        kernel[0, 1], kernel[1, 1] = 0.0, 1.0  # the pixel itself
        y = reference.convolution(x, kernel, stride=2)
        np.testing.assert_array_equal(y, x[:, ::2, ::2])

    def test_normalization_by_the_batch_has_mean_zero_and_variance_one(self):
        x = np.random.default_rng(0).normal(3.0, 2.0, (4, 5, 5, 3))
        y = reference.batch_normalization(
            x, 1.0, 0.0, *reference.batch_statistics(x), epsilon=0.0
        )
        mean, variance = reference.batch_statistics(y)
        np.testing.assert_allclose(mean, 0.0, atol=1e-12)
        np.testing.assert_allclose(variance, 1.0)


if __name__ == "__main__":
    pytest.main([__file__])
