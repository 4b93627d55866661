"""Runs a program of apps/ as its command line does, in this process."""

import contextlib
import importlib
import io
import signal
import sys
from collections.abc import Iterator
from typing import NamedTuple
from unittest import mock

from absl import flags

# Result of `loop.train_and_evaluate` for tests that do not train.
TRAINED = {
    "test_top1_error": 0.0,
    "test_images": 1,
    "best_step": 1,
    "best_test_top1_error": 0.0,
    "images_per_second": None,
    "seconds": 1.0,
    "device": "none",
    "multiply_adds": None,
}


class Outcome(NamedTuple):
    code: int
    out: list[str]
    err: list[str]


def run(name: str, *arguments: str) -> Outcome:
    """`python -m apps.<name> <arguments>`: exit code, stdout and stderr.

    The name "benchmarks" is that of `python -m benchmarks`.
    """
    module = "benchmarks.__main__" if name == "benchmarks" else f"apps.{name}"
    out, err = io.StringIO(), io.StringIO()
    code = 0
    numbers = (signal.SIGTERM, signal.SIGINT)
    handlers = [signal.getsignal(number) for number in numbers]
    with (
        _imported(module) as program,
        mock.patch.object(sys, "argv", [f"{name}.py", *arguments]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            program.cli()
        except SystemExit as end:
            code = end.code or 0
        finally:  # a program takes over the signals of its process
            for number, handler in zip(numbers, handlers, strict=True):
                signal.signal(number, handler)
    return Outcome(
        code, out.getvalue().splitlines(), err.getvalue().splitlines()
    )


@contextlib.contextmanager
def _imported(name: str) -> Iterator:
    """A program whose flags go with it: others define the same names."""
    program = importlib.import_module(name)
    try:
        yield program
    finally:
        for flag in flags.FLAGS.get_flags_for_module(program):
            delattr(flags.FLAGS, flag.name)
        flags.FLAGS.unparse_flags()
        del sys.modules[name]
