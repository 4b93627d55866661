"""Flags, messages and exit codes of all programs.

A usage error prints one line on stderr that names the flag and the value, and
exits with code 2. A failure while running prints one line with the remedy, and
exits with code 1. A run that a signal stopped exits with 128 + the signal.
"""

import atexit
import contextlib
import difflib
import functools
import io
import json
import math
import os
import re
import resource
import shlex
import sys
import unicodedata
from collections.abc import Callable
from collections.abc import Iterator

# TensorFlow logs its build on every start. It also raises its errors as
# exceptions, so all levels of its log are hidden. TensorFlow reads the variable
# when it is imported, so no import above may load it.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from absl import app
from absl import flags
from absl import logging

from . import flag_files
from . import signals

# The installed programs are called keras-resnet-train and so on.
_COMMAND_PREFIX = "keras-resnet-"

# Longest time without a line of progress, unless a terminal has a bar.
QUIET_SECONDS = 30.0

# A longer error quotes a file or a server, and both may contain any text.
_LONGEST_ERROR = 2000

# Endings of files of weights.
_WEIGHTS = (
    ".weights.h5",
    ".h5",
    ".keras",
    ".pth",
    ".pt",
    ".th",
    ".safetensors",
)


class UsageError(Exception):
    """A flag with a value that is not allowed.

    Args:
        flag: Name of the flag, without dashes.
        value: The value that was received.
        reason: The rule and the allowed values.
    """

    def __init__(self, flag: str, value, reason):
        super().__init__(f"--{flag}={value}: {reason}")


def printable(text: str) -> str:
    """Returns the text with its control characters written as escapes.

    Labels, file names and error messages come from files and servers of other
    people. A terminal obeys the control characters in them.
    """
    return "".join(
        character if _is_printable(character) else _escape(character)
        for character in text
    )


def _is_printable(character: str) -> bool:
    return (
        character.isprintable()
        or character in "\u200c\u200d"  # joins letters and emoji
        or unicodedata.category(character) == "Zs"
    )


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode()


def printable_json(document: object) -> str:
    r"""Returns JSON with control characters as JSON's own escapes.

    >>> printable_json({"é": "\x1b[2J"})
    '{"é": "\\u001b[2J"}'
    """
    return "".join(
        character
        if _is_printable(character)
        else json.dumps(character).strip('"')
        for character in json.dumps(document, ensure_ascii=False)
    )


def show(*lines: object) -> None:
    """Prints lines, each with its control characters written as escapes."""
    for line in lines:
        print(printable(str(line)), flush=True)


def command(program: str, *arguments: object) -> str:
    """Returns a command line that starts another program in the same way.

    A program that was installed from the wheel names the installed command. In
    a clone the command is `python -m apps.PROGRAM`.

    Args:
        program: Name of the program, such as "evaluate".
        arguments: Flags and other words, quoted where a shell needs it.

    >>> command("evaluate", "--workdir=my runs")
    "python -m apps.evaluate '--workdir=my runs'"
    """
    is_installed = os.path.basename(sys.argv[0]).startswith(_COMMAND_PREFIX)
    start = (
        [f"{_COMMAND_PREFIX}{program}"]
        if is_installed
        else ["python", "-m", f"apps.{program}"]
    )
    return shlex.join([*start, *map(str, arguments)])


@contextlib.contextmanager
def usage(flag: str, value) -> Iterator[None]:
    """Turns a ValueError about the value of a flag into a UsageError."""
    try:
        yield
    except ValueError as error:
        raise UsageError(flag, value, error) from error


@contextlib.contextmanager
def needs(package: str) -> Iterator[None]:
    """Turns a missing module into an OSError with the command that installs it.

    Args:
        package: Name of the optional package, as pip knows it.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise OSError(f"{error}: pip install {package}") from error


def text(flag: flags.FlagHolder | flags.Flag) -> str:
    """Returns the value of a flag as text, in the form of the command line."""
    if isinstance(flag.value, list):
        return ",".join(flag.value)
    return "" if flag.value is None else str(flag.value)


def check_not_empty(*given: flags.FlagHolder) -> None:
    """Rejects flags with an empty value, as from a variable that is not set."""
    for flag in given:
        if flag.value == "":
            raise UsageError(flag.name, "", "give a value, or leave it out")


def settings(
    values: list[str], *prefixes: str
) -> dict[str, list[tuple[str, str]]]:
    """Returns the names and values of --set=PREFIX.NAME=VALUE, by prefix."""
    found: dict[str, list[tuple[str, str]]] = {p: [] for p in prefixes}
    for value in values:
        prefix, _, rest = value.partition(".")
        name, equals, text = rest.partition("=")
        if prefix not in prefixes or not equals:
            allowed = " or ".join(f"{p}.NAME=VALUE" for p in prefixes)
            raise UsageError("set", value, f"expected {allowed}")
        found[prefix].append((name, text))
    return found


def with_fields(owner, prefix: str, given: list[tuple[str, str]]):
    """Returns a recipe or a space with the fields of --set changed."""
    for name, text in given:
        with usage("set", f"{prefix}.{name}={text}"):
            owner = owner.with_field(name, text)
    return owner


def model_arguments(network, given: list[tuple[str, str]], others=()):
    """Returns the arguments of a network from --set=model.NAME=VALUE.

    Args:
        network: A `keras_resnet.networks.Network`.
        given: Names and texts.
        others: Further arguments by name, which `given` overrides.

    Returns:
        A `keras_resnet.networks.Arguments`.
    """
    arguments = network.arguments(dict(others))
    for name, text in given:
        with usage("set", f"model.{name}={text}"):
            value = network.parse(name, text)
            arguments = network.arguments({**arguments, name: value})
    return arguments


def of_model(model: str, weights: str | None, arguments: dict, **others):
    """Calls `model_sources.from_model`, and names the flag in its errors."""
    from keras_resnet.serving import errors
    from keras_resnet.serving import model_sources

    try:
        return model_sources.from_model(model, weights, arguments, **others)
    except errors.ArgumentError as error:
        if error.argument not in flags.FLAGS:
            raise UsageError(
                "model",
                model,
                f"{error}. They are flags of apps.export: export the network, "
                "and predict by --saved_model",
            ) from error
        flag = flags.FLAGS[error.argument]
        raise UsageError(flag.name, text(flag), error) from error


def numbers(flag: flags.FlagHolder, kind=float) -> list | None:
    """Returns the numbers of a flag, or None if the flag was not set."""
    if flag.value is None:
        return None
    try:
        found = [kind(number) for number in flag.value]
        if not all(map(math.isfinite, found)):
            raise ValueError("a number is not finite")
        return found
    except (ValueError, OverflowError) as error:
        examples = "1,8" if kind is int else "0.5,0.4,0.4"
        raise UsageError(
            flag.name,
            text(flag),
            f"must be numbers separated by commas, such as {examples}",
        ) from error


def strategy(name: str, num_devices: int | None, **arguments):
    """Returns the strategy that --strategy and --num_devices describe."""
    from keras_resnet.training import strategies

    with usage("strategy", name):
        strategies.check_name(name)
        if num_devices is None:
            return strategies.get_strategy(name, **arguments)
    with usage("num_devices", num_devices):
        return strategies.get_strategy(name, num_devices, **arguments)


def short_name(value: str) -> str:
    """Returns the name of a data set or of weights, for a directory.

    >>> short_name("folder:../my photos/cats"), short_name("mnist:3.0.1")
    ('cats', 'mnist_3.0.1')
    >>> short_name("resnet50-0676ba61.pth")
    'resnet50-0676ba61'
    """
    kind, _, path = value.partition(":")
    if kind == "folder" or os.path.exists(value) or value.endswith(_WEIGHTS):
        path = path if kind == "folder" else value
        value = os.path.basename(os.path.abspath(os.path.expanduser(path)))
        for ending in _WEIGHTS:
            value = value.removesuffix(ending)
    return re.sub(r"[^\w.+-]+", "_", value)


def only_with(mode: flags.FlagHolder, *others: flags.FlagHolder) -> None:
    """Raises UsageError if a flag was set that `mode` excludes.

    Args:
        mode: A flag that was set.
        others: Flags that cannot be combined with it.
    """
    for other in others:
        if other.present:
            raise UsageError(
                other.name,
                text(other),
                f"cannot be combined with --{mode.name}={text(mode)}",
            )


def run(
    main: Callable[[list[str]], None],
    takes_arguments: bool = False,
    backends: tuple[str, ...] = ("tensorflow",),
) -> None:
    """Parses the flags, calls `main` and exits with the code of the outcome.

    Args:
        main: Function of the program's name and its arguments.
        takes_arguments: Whether the program accepts arguments without dashes.
        backends: Keras backends that the program supports.
    """

    def outcome(argv):
        if argv[1:] and not takes_arguments:
            _fail(f"unexpected argument {argv[1]}; flags are --NAME=VALUE")
            sys.exit(2)
        code = _outcome(main, argv, backends)
        signals.ignore()
        atexit.register(_drop)  # hides TensorFlow's messages at its exit
        sys.exit(signals.exit_code() or code)

    signals.install()
    if isinstance(sys.stdout, io.TextIOWrapper):
        # The encoding of a terminal may lack the letters of a label.
        sys.stdout.reconfigure(errors="backslashreplace")
    app.run(outcome, flags_parser=functools.partial(_parse, main))


def _parse(main, arguments: list[str]) -> list[str]:
    logging.set_verbosity(logging.WARNING)
    if "--help" in arguments:
        # absl lists the flags of the script that was started. For an installed
        # command this is not the module of the program.
        program = sys.modules[main.__module__]
        _, _, described = flags.FLAGS.module_help(program).partition("\n")
        usage = re.sub(
            r"python -m apps\.(\w+)",
            lambda match: command(match[1]),
            program.__doc__ or "",
        )
        print(f"{usage}\nflags:\n{described}")
        sys.exit(0)
    try:
        name, *words = arguments
        rest = flags.FLAGS([name, *flag_files.expand(words)])
        _check_finite()
        return rest
    except flags.UnrecognizedFlagError as error:
        # The import of keras_resnet.names would take seconds.
        near = difflib.get_close_matches(error.flagname, list(flags.FLAGS), 1)
        hint = f" (did you mean --{near[0]}?)" if near else ""
        _fail(f"unknown flag --{error.flagname}{hint}; --help lists all flags")
        sys.exit(2)
    except (flags.Error, flag_files.FlagFileError, UsageError) as error:
        _fail(error)
        sys.exit(2)


def _check_finite() -> None:
    """Raises UsageError for NaN and infinity, which pass absl's bounds."""
    for name in flags.FLAGS:
        value = flags.FLAGS[name].value
        if isinstance(value, float) and not math.isfinite(value):
            raise UsageError(name, value, "must be a finite number")


def _outcome(main, argv, backends) -> int:
    _check_memory()
    try:
        with quiet():
            import tensorflow as tf

            tf.config.list_physical_devices()

        from keras_resnet import training
        from keras_resnet.training import interrupts
        from keras_resnet.training import strategies

        training.require_backend("this program", *backends)
    except (ImportError, MemoryError) as error:  # or another backend of Keras
        _fail(error)
        return 1

    # A user's data, disk and network can cause these errors. Any other error
    # is a bug of this package, and its report needs the trace.
    expected: tuple[type[Exception], ...] = (
        ValueError,
        OSError,
        ArithmeticError,
        strategies.WorkerLostError,
        tf.errors.OpError,
    )
    if "jax" in sys.modules:  # for example, a GPU without enough memory
        expected += (sys.modules["jax"].errors.JaxRuntimeError,)
    try:
        signals.clean_up()
        main(argv)
        return 0
    except UsageError as error:
        _fail(error)
        return 2
    except interrupts.Interrupted as error:
        signals.ignore()
        _fail(f"{error}; run the same command again to resume")
        return 128 + error.signal_number
    except SystemExit:
        if signals.exit_code() is None:
            raise
        return 0  # the line about the signal has been printed
    except expected as error:
        _fail(error)
        return 1


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Drops the text that libraries write to stderr below Python.

    TensorFlow reports its build and the lack of a GPU at every log level: six
    lines before the one that a user needs. Image decoders print warnings about
    damaged images there.
    """
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        _drop()
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _drop() -> None:
    """Redirects stderr, also below Python, to the null device."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    os.close(nowhere)


def _check_memory() -> None:
    """Exits if TensorFlow would hang or abort under the memory limit."""
    for kind, option, least in (
        (resource.RLIMIT_AS, "-v", 2**31),
        (resource.RLIMIT_DATA, "-d", 2**29),
    ):
        limit, _ = resource.getrlimit(kind)
        if limit != resource.RLIM_INFINITY and limit < least:
            _fail(
                f"the memory of the process must be at least {least >> 10:,} "
                f"KiB, received a limit of {limit >> 10:,}: ulimit {option} "
                "unlimited"
            )
            sys.exit(1)


def _fail(error) -> None:
    """Writes one line on stderr: the program's name and the error."""
    if signals.exit_code() is not None:
        return  # the line about the signal has been printed
    text = getattr(error, "message", None) or str(error) or repr(error)
    # The name of the failed TensorFlow kernel does not help a user.
    text = re.sub(
        r"\{\{function_node [^}]*\}\}|\[Op:\w+\]( name: $)?", "", text
    )
    line = " ".join(text.split())
    if len(line) > _LONGEST_ERROR:
        line = f"{line[:_LONGEST_ERROR]}..."
    print(
        f"{signals.program()}: {printable(line)}", file=sys.stderr, flush=True
    )
