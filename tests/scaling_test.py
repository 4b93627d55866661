"""The model of the time of a step, and the tables of docs/scaling.md."""

import pathlib
import re

import numpy as np
from absl.testing import absltest
from absl.testing import parameterized

from keras_resnet.analysis import scaling
from tests import reference

PAGE = (pathlib.Path(__file__).parent.parent / "docs/scaling.md").read_text()


def ring(n, size):
    """Simulates an all-reduce. Returns the bytes of a device and the rounds."""
    parts = [[float(i == j) for j in range(n)] for i in range(n)]
    held = np.array(parts) + np.arange(n)[:, None]
    total = held.sum(0)
    sent, rounds = 0.0, 0
    for shift in range(2 * (n - 1)):
        is_sum = shift < n - 1
        moved = [(i, (i - shift) % n) for i in range(n)]
        if not is_sum:
            moved = [(i, (i + 1 - (shift - n + 1)) % n) for i in range(n)]
        values = [held[i, part] for i, part in moved]
        for (i, part), value in zip(moved, values, strict=True):
            to = (i + 1) % n
            held[to, part] = held[to, part] + value if is_sum else value
        sent, rounds = sent + size / n, rounds + 1
    np.testing.assert_allclose(held, np.broadcast_to(total, (n, n)))
    return sent, rounds


class ScalingTest(parameterized.TestCase):
    @parameterized.parameters(1, 2, 3, 8)
    def test_all_reduce_takes_the_bytes_and_rounds_of_a_ring(self, n):
        network = scaling.Network(bandwidth=3.0, latency=7.0)
        sent, rounds = ring(n, size=60.0)
        np.testing.assert_allclose(
            scaling.all_reduce_seconds(n, 60.0, network),
            sent / 3.0 + rounds * 7.0,
        )

    def test_one_device_waits_for_nobody(self):
        network = scaling.Network(bandwidth=1.0, latency=1.0)
        self.assertEqual(scaling.step_seconds(1, 2.0, 100, network), 2.0)
        self.assertEqual(scaling.efficiency(1, 2.0, 100, network), 1.0)

    def test_the_page_has_the_numbers_of_the_model(self):
        counts = reference.counts(reference.layout("resnet50"))
        size = 4 * (counts.parameters + 53_120)  # statistics: papers' layout
        self.assertIn(f"s is {size:,} bytes", PAGE)
        network = scaling.Network(bandwidth=12.5e9, latency=10e-6)
        rows = []
        for devices in (8, 64, 512, 4096):
            for share in (32, 8192 // devices):
                given = (devices, share / 1000, size, network)
                batch = devices * share
                wait = scaling.all_reduce_seconds(devices, size, network)
                rows.append(
                    [
                        f"{devices:,}",
                        f"{batch if share == 32 else share:,}",
                        f"{share:,}",
                        f"{1000 * wait:.1f}",
                        f"{batch / scaling.step_seconds(*given):,.0f}",
                        f"{scaling.efficiency(*given):.2f}",
                    ]
                )
        paper = PAGE.partition("## On paper")[2]
        found = [
            [cell.strip() for cell in line.strip("|").split("|")]
            for line in re.findall(r"(?m)^\| [\d,]+ \|.*$", paper)
        ]
        self.assertCountEqual(found, rows)


if __name__ == "__main__":
    absltest.main()
