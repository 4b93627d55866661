"""The files that TensorFlow Serving and Docker are given are understood."""

import pathlib
import re
import subprocess

from absl.testing import absltest
from absl.testing import parameterized
from google.protobuf import text_format
from tensorflow_serving.config import model_server_config_pb2

ROOT = pathlib.Path(__file__).parent.parent
SERVING = ROOT / "serving"


def fields(name):
    """The settings of a text file: name -> numbers and words."""
    found = {}
    for line in (SERVING / name).read_text().splitlines():
        match = re.fullmatch(r" *(\w+)(?::| \{ value:) ([^ }]+)(?: \})?", line)
        if match:
            found.setdefault(match.group(1), []).append(match.group(2))
    return found


class DeploymentTest(parameterized.TestCase):
    def test_labels_name_versions_that_are_served(self):
        config = text_format.Parse(
            (SERVING / "models.config").read_text(),
            model_server_config_pb2.ModelServerConfig(),
        )
        (model,) = config.model_config_list.config
        self.assertEqual(model.base_path, f"/models/{model.name}")
        self.assertEqual(set(model.version_labels), {"stable", "canary"})
        served = model.model_version_policy.specific.versions
        self.assertContainsSubset(model.version_labels.values(), served)

    @parameterized.parameters("batching_cpu.config", "batching_gpu.config")
    def test_largest_allowed_batch_is_the_largest_batch(self, name):
        """Else the server does not start."""
        found = fields(name)
        self.assertEqual(
            set(found),
            {
                "max_batch_size",
                "batch_timeout_micros",
                "num_batch_threads",
                "max_enqueued_batches",
                "allowed_batch_sizes",
            },
        )
        sizes = list(map(int, found["allowed_batch_sizes"]))
        self.assertEqual(sizes, sorted(sizes))
        self.assertEqual([str(sizes[-1])], found["max_batch_size"])

    def test_files_that_are_named_to_a_server_are_there(self):
        for page in ("compose.yaml", "docs/serving.md", ".ci/serving_check"):
            text = (ROOT / page).read_text()
            names = re.findall(r"=/serving/([\w.]+)", text)
            self.assertNotEmpty(names)
            for name in names:
                self.assertTrue((SERVING / name).is_file(), name)

    def test_check_without_docker_says_what_is_missing(self):
        outcome = subprocess.run(
            ["/bin/bash", ".ci/serving_check", "python", "tests", "image.png"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            env={"PATH": "/bin:/usr/bin", "DOCKER_HOST": "tcp://127.0.0.1:1"},
        )
        self.assertEqual(outcome.returncode, 1)
        self.assertIn("serving-check: Docker has to run", outcome.stderr)


if __name__ == "__main__":
    absltest.main()
