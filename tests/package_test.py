"""Imports, Bazel targets, programs and versions of the package."""

import ast
import configparser
import pathlib
import re
import subprocess
import sys
from collections.abc import Iterator

from absl.testing import absltest
from absl.testing import parameterized

import keras_resnet

ROOT = pathlib.Path(__file__).parent.parent
BUILD = (ROOT / "BUILD").read_text()

# Modules of this package that `import keras_resnet` may load.
LIGHT = {
    *("arguments", "atomic", "features", "graphs", "keras_resnet", "layers"),
    *("models", "names", "preprocessing", "specs", "weights"),
}

# Parts that a part may import, in addition to itself: only those below it.
MAY_IMPORT = {
    "names": set(),
    "atomic": set(),
    "graphs": set(),
    "layers": {"names"},
    "weights": {"atomic", "graphs", "layers", "names", "specs"},
    "specs": {"names"},
    "arguments": {"layers", "specs", "weights"},
    "models": {"arguments", "layers", "specs", "weights"},
    "features": {"graphs", "layers"},
    "preprocessing": {"weights"},
    "keras_resnet": LIGHT,
    "data": {"atomic", "names"},
    "baselines": {"models"},
    "analysis": LIGHT,
    "networks": {"analysis", "arguments", "baselines", "layers", "models"}
    | {"names", "specs"},
    "training": LIGHT | {"analysis", "baselines", "data", "networks"},
    "papers": LIGHT | {"analysis", "data", "networks", "training"},
    "serving": LIGHT | {"analysis", "data", "networks", "training"},
    "apps": LIGHT
    | {"analysis", "data", "networks", "training", "serving", "papers"},
}
MAY_IMPORT["benchmarks"] = set(MAY_IMPORT)

SOURCES = sorted(
    path.relative_to(ROOT)
    for folder in ("apps", "benchmarks", "keras_resnet")
    for path in (ROOT / folder).rglob("*.py")
)
PROGRAMS = {
    path.stem
    for path in SOURCES
    if path.parts[0] == "apps"
    and path.stem not in ("__init__", "command_line", "signals")
}


def part(module: str) -> str | None:
    """Returns the part of a dotted name, or None for other packages."""
    first, *rest = module.split(".")
    if first in ("apps", "benchmarks"):
        return first
    if first != "keras_resnet":
        return None
    return rest[0] if rest and rest[0] in MAY_IMPORT else "keras_resnet"


def imported(path: pathlib.Path) -> Iterator[str]:
    """Yields the dotted names that a module imports, also in functions."""
    package = path.parts[:-1]
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] * bool(node.level)
            base += (node.module,) * bool(node.module)
            yield from (".".join((*base, a.name)) for a in node.names)


def setup_cfg() -> configparser.ConfigParser:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    return config


class ImportsTest(parameterized.TestCase):
    def test_import_loads_keras_and_nothing_heavier(self):
        code = "import keras_resnet, sys; print(*sys.modules, sep='\\n')"
        loaded = subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        ).stdout.split()
        self.assertIn("keras", loaded)
        heavy = ("tensorflow_datasets", "keras_tuner", "tensorboard", "tqdm")
        self.assertNoCommonElements(heavy, loaded)
        ours = {part(module) for module in loaded} - {None}
        self.assertLessEqual(ours, LIGHT)

    @parameterized.parameters(*map(str, SOURCES))
    def test_nothing_imports_upward(self, source):
        path = pathlib.Path(source)
        here = part(".".join(path.with_suffix("").parts))
        parts = {part(module) for module in imported(path)} - {None, here}
        self.assertLessEqual(parts, MAY_IMPORT[here])

    @parameterized.parameters(
        ("keras_resnet/layers/units.py", "layers"),
        ("keras_resnet/models.py", "models"),
        ("keras_resnet/__init__.py", "keras_resnet"),
        ("apps/train.py", "apps"),
    )
    def test_parts_are_distinguished(self, source, expected):
        module = ".".join(pathlib.Path(source).with_suffix("").parts)
        self.assertEqual(part(module), expected)

    def test_relative_imports_are_resolved(self):
        self.assertIn(
            "apps.command_line", set(imported(pathlib.Path("apps/train.py")))
        )


class DeclarationsTest(parameterized.TestCase):
    def test_every_package_folder_is_installed(self):
        folders = {
            ".".join(path.parent.parts)
            for path in SOURCES
            if path.parts[0] == "keras_resnet"
        }
        packages = setup_cfg()["options"]["packages"].split()
        self.assertCountEqual(packages, folders | {"keras_resnet_apps"})

    def test_every_package_folder_is_a_py_library(self):
        for folder in {path.parent.as_posix() for path in SOURCES}:
            self.assertIn(f'srcs = glob(["{folder}/*.py"])', BUILD)

    def test_every_program_is_a_py_binary(self):
        binary = r'py_binary\(\s*name = "(.*)",\s*main_module = "(.*)",'
        self.assertCountEqual(
            re.findall(binary, BUILD),
            [
                ("benchmark", "benchmarks.__main__"),
                *((name, f"apps.{name}") for name in PROGRAMS),
            ],
        )

    def test_every_program_is_a_console_script(self):
        scripts = setup_cfg()["options.entry_points"]["console_scripts"]
        self.assertCountEqual(
            scripts.strip().splitlines(),
            [
                f"keras-resnet-{name} = keras_resnet_apps.{name}:cli"
                for name in PROGRAMS
            ],
        )

    def test_one_version_everywhere(self):
        module = (ROOT / "MODULE.bazel").read_text()
        version = re.search(r"    version = \"(.*)\",", module).group(1)
        self.assertEqual(version, keras_resnet.__version__)


if __name__ == "__main__":
    absltest.main()
