"""Files that TensorFlow Serving, Docker and Kubernetes are given are right."""

import json
import os
import pathlib
import re
import subprocess
import tempfile
import textwrap
from unittest import mock

from absl.testing import absltest
from absl.testing import parameterized
from google.protobuf import text_format
from tensorflow_serving.config import model_server_config_pb2

from keras_resnet.training import rendezvous
from keras_resnet.training import strategies

ROOT = pathlib.Path(__file__).parent.parent
SERVING = (ROOT / "deploy/tensorflow_serving").resolve()
MONITORING = ROOT / "deploy/monitoring"
# Metrics that TensorFlow Serving exports; a histogram has three names each.
COUNTERS = {
    ":tensorflow:serving:request_count",
    ":tensorflow:cc:saved_model:load_attempt_count",
}
HISTOGRAMS = {
    ":tensorflow:serving:request_latency",
    ":tensorflow:serving:runtime_latency",
    ":tensorflow:serving:batching_session:queuing_latency",
    ":tensorflow:serving:batching_session:input_batch_size",
    ":tensorflow:serving:batching_session:processed_batch_size",
    ":tensorflow:serving:batching_session:padding_size",
}
METRICS = COUNTERS | {
    f"{name}_{part}"
    for name in HISTOGRAMS
    for part in ("bucket", "sum", "count")
}
TRAIN = (ROOT / "apps" / "train.py").read_text()


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
        for page in (
            "deploy/compose.yaml",
            "docs/serving.md",
            ".ci/serving_check",
        ):
            text = (ROOT / page).read_text()
            names = re.findall(r"=/serving/([\w.]+)", text)
            self.assertNotEmpty(names)
            for name in names:
                self.assertTrue((SERVING / name).is_file(), name)

    @parameterized.parameters("rules.yaml", "grafana_dashboard.json")
    def test_metrics_are_those_of_tensorflow_serving(self, name):
        text = (MONITORING / name).read_text()
        used = set(re.findall(r":tensorflow:[\w:]+", text))
        self.assertNotEmpty(used)
        self.assertContainsSubset(used, METRICS)

    def test_dashboard_is_valid_json_with_an_expression_in_every_panel(self):
        found = json.loads((MONITORING / "grafana_dashboard.json").read_text())
        panels = found["panels"]
        self.assertLen({panel["id"] for panel in panels}, len(panels))
        for panel in panels:
            self.assertNotEmpty(panel["targets"])
            for target in panel["targets"]:
                expression = target["expr"]
                for opening, closing in ("()", "[]", "{}"):
                    self.assertEqual(
                        expression.count(opening), expression.count(closing)
                    )

    def test_rules_have_an_expression_and_the_runbook_every_alert(self):
        text = (MONITORING / "rules.yaml").read_text()
        self.assertNotIn("\t", text)
        rules = re.findall(
            r"^      - (record|alert): (\S+)\n"
            r"        expr: (?:>-\n((?: {10}\S.*\n)+)|(\S.*)\n)",
            text,
            re.MULTILINE,
        )
        self.assertLen(rules, text.count("\n      - "))
        recorded = set()
        for kind, name, *expressions in rules:
            expression = "".join(expressions)
            for opening, closing in ("()", "[]", "{}"):
                self.assertEqual(
                    expression.count(opening), expression.count(closing), name
                )
            used = re.findall(r"(?<![:\w])serving:[\w:]+", expression)
            self.assertContainsSubset(used, recorded)
            if kind == "record":
                recorded.add(name)
                continue
            page = (ROOT / "docs/runbook.md").read_text()
            self.assertIn(f"| `{name}` |", page)
        self.assertEqual(text.count("severity: "), text.count("- alert: "))

    def test_compose_mounts_the_files_beside_it(self):
        page = ROOT / "deploy/compose.yaml"
        mounted = re.findall(r"- (\.[\w./]+):/(\w+):ro", page.read_text())
        found = {name: (page.parent / p).resolve() for p, name in mounted}
        self.assertEqual(
            found, {"models": ROOT.resolve() / "exports", "serving": SERVING}
        )

    def test_worker_of_kubernetes_is_that_of_its_pod(self):
        manifest = (ROOT / "deploy/kubernetes.yaml").read_text()
        _, _, script = manifest.partition("- |\n")
        script = textwrap.dedent(script.partition("          volumeMounts")[0])
        folder = pathlib.Path(self.enter_context(tempfile.TemporaryDirectory()))
        fake = folder / "python"
        fake.write_text('#!/bin/sh\necho "$@"\necho "$TF_CONFIG"\n')
        fake.chmod(0o755)
        outcome = subprocess.run(
            ["/bin/sh", "-c", script],
            capture_output=True,
            check=True,
            text=True,
            env={
                "PATH": f"{folder}:/bin:/usr/bin",
                "WORKERS": re.search('value: "([0-9]+)"', manifest).group(1),
                "JOB_COMPLETION_INDEX": "2",
            },
        )
        command, _, config = outcome.stdout.partition("\n")
        with (
            mock.patch.dict(os.environ, {"TF_CONFIG": config}),
            mock.patch.object(
                rendezvous, "wait_for_workers", side_effect=TimeoutError
            ) as met,
            self.assertRaises(TimeoutError),
        ):
            strategies.get_strategy("multi_worker")
        addresses, index, _ = met.call_args.args
        self.assertEqual(
            addresses, [f"resnet50-{i}.resnet50:2222" for i in range(4)]
        )
        self.assertEqual(index, 2)
        self.assertIn("kind: Service\nmetadata:\n  name: resnet50\n", manifest)
        self.assertIn("kind: Job\nmetadata:\n  name: resnet50\n", manifest)
        self.assertIn("subdomain: resnet50\n", manifest)
        self.assertEqual(manifest.count("ort: 2222\n"), 2)
        self.assertIn("completions: 4\n  parallelism: 4\n", manifest)
        known = set(re.findall(r'DEFINE_\w+[(]\s*"(\w+)"', TRAIN))
        used = re.findall("--([a-z_]+)", command)
        self.assertContainsSubset(used, known)
        self.assertIn("strategy", used)

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
