"""What every program does alike: flags, errors, exit codes.

A usage error is one line on stderr that names the flag and the value, and exit
code 2. A failure while running is one line that says what to do, and exit code
1. A run that a signal stopped ends with 128 + the signal.
"""

import atexit
import contextlib
import difflib
import functools
import json
import os
import re
import resource
import sys
import unicodedata
from collections.abc import Callable
from collections.abc import Iterator

# TensorFlow reports its build on every start. Its errors come as exceptions
# too, so no level of its log is shown. It reads this when it is imported, so
# nothing above may import it.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from absl import app
from absl import flags
from absl import logging

from . import signals

# A longer error quotes a file or a server, which may send anything.
_LONGEST_ERROR = 2000


class UsageError(Exception):
    """A flag with a value that is not allowed.

    Args:
        flag: Name of the flag, without dashes.
        value: What was given.
        reason: The rule, and what is allowed.
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


@contextlib.contextmanager
def usage(flag: str, value) -> Iterator[None]:
    """Turns a ValueError about the value of a flag into a usage error."""
    try:
        yield
    except ValueError as error:
        raise UsageError(flag, value, error) from error


@contextlib.contextmanager
def extra(name: str) -> Iterator[None]:
    """Turns a missing package into the line that says what installs it."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise OSError(
            f"{error}: pip install 'keras-resnet[{name}]' brings it"
        ) from error


def text(flag: flags.FlagHolder | flags.Flag) -> str:
    """The value of a flag as it was given."""
    if isinstance(flag.value, list):
        return ",".join(flag.value)
    return "" if flag.value is None else str(flag.value)


def settings(
    values: list[str], *prefixes: str
) -> dict[str, list[tuple[str, str]]]:
    """The names and values of --set=PREFIX.NAME=VALUE, by prefix."""
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
    """A recipe or a space with the fields that --set=PREFIX.NAME=VALUE sets."""
    for name, text in given:
        with usage("set", f"{prefix}.{name}={text}"):
            owner = owner.with_field(name, text)
    return owner


def model_arguments(network, given: list[tuple[str, str]]) -> dict:
    """The arguments of a network that --set=model.NAME=VALUE gives."""
    from keras_resnet.training import configs

    arguments: dict = {}
    for name, text in given:
        with usage("set", f"model.{name}={text}"):
            arguments[name] = configs.parse_model_argument(name, text)
            configs.check_model_arguments(network, arguments)
    return arguments


def of_model(model: str, weights: str | None, arguments: dict, **others):
    """`model_sources.from_model`; its argument errors become flag errors."""
    from keras_resnet.serving import errors
    from keras_resnet.serving import model_sources

    try:
        return model_sources.from_model(model, weights, arguments, **others)
    except errors.ArgumentError as error:
        flag = flags.FLAGS[error.argument]
        raise UsageError(flag.name, text(flag), error) from error


def numbers(flag: flags.FlagHolder, kind=float) -> list | None:
    """The numbers of a flag; None where it was not given."""
    if flag.value is None:
        return None
    try:
        return [kind(number) for number in flag.value]
    except ValueError as error:
        examples = "1,8" if kind is int else "0.5,0.4,0.4"
        raise UsageError(
            flag.name,
            text(flag),
            f"numbers with commas between them are allowed, such as {examples}",
        ) from error


def strategy(name: str, num_devices: int | None, **arguments):
    """The strategy of --strategy, --num_devices and further arguments."""
    from keras_resnet.training import strategies

    with usage("strategy", name):
        strategies.check_name(name)
        if num_devices is None:
            return strategies.get_strategy(name, **arguments)
    with usage("num_devices", num_devices):
        return strategies.get_strategy(name, num_devices, **arguments)


def only_with(mode: flags.FlagHolder, *others: flags.FlagHolder) -> None:
    """Refuses flags that mean nothing beside the one that was given.

    Args:
        mode: The flag that was given.
        others: Flags that belong to another one.
    """
    for other in others:
        if other.present:
            raise UsageError(
                other.name,
                text(other),
                f"means nothing with --{mode.name}={text(mode)}: leave it out",
            )


def run(
    main: Callable[[list[str]], None],
    takes_arguments: bool = False,
    backends: tuple[str, ...] = ("tensorflow",),
) -> None:
    """Parses the flags, calls `main` and exits with the code of the outcome.

    Args:
        main: Is given the program's name and its arguments.
        takes_arguments: Whether there may be arguments that are no flags.
        backends: Which of Keras the program runs on.
    """

    def outcome(argv):
        if argv[1:] and not takes_arguments:
            _fail(f"unexpected argument {argv[1]}; flags are --NAME=VALUE")
            sys.exit(2)
        code = _outcome(main, argv, backends)
        signals.ignore()
        atexit.register(_drop)  # what TensorFlow may say of its own end
        sys.exit(signals.exit_code() or code)

    signals.install()
    app.run(outcome, flags_parser=functools.partial(_parse, main))


def _parse(main, arguments: list[str]) -> list[str]:
    logging.set_verbosity(logging.WARNING)
    if "--help" in arguments:
        # absl's own shows the flags of the file that was started, which is
        # not the program's where that is a console script.
        program = sys.modules[main.__module__]
        _, _, described = flags.FLAGS.module_help(program).partition("\n")
        print(f"{program.__doc__}\nflags:\n{described}")
        sys.exit(0)
    try:
        return flags.FLAGS(arguments)
    except flags.UnrecognizedFlagError as error:
        # Not keras_resnet.names, whose import takes seconds.
        near = difflib.get_close_matches(error.flagname, list(flags.FLAGS), 1)
        hint = f" (did you mean --{near[0]}?)" if near else ""
        _fail(f"unknown flag --{error.flagname}{hint}; --help lists them all")
        sys.exit(2)
    except flags.Error as error:
        _fail(error)
        sys.exit(2)


def _outcome(main, argv, backends) -> int:
    _check_memory()
    try:
        with quiet():
            import tensorflow as tf

            tf.config.list_physical_devices()

        from keras_resnet import training
        from keras_resnet.training import loop
        from keras_resnet.training import strategies

        training.require_backend("this program", *backends)
    except (ImportError, MemoryError) as error:  # or another backend of Keras
        _fail(error)
        return 1

    # What a user's data, disk and network can cause. Anything else is a
    # mistake of ours, whose trace a report needs.
    expected: tuple[type[Exception], ...] = (
        ValueError,
        OSError,
        ArithmeticError,
        strategies.WorkerLostError,
        tf.errors.OpError,
    )
    if "jax" in sys.modules:  # a GPU that is too small, for one
        expected += (sys.modules["jax"].errors.JaxRuntimeError,)
    try:
        signals.clean_up()
        main(argv)
        return 0
    except UsageError as error:
        _fail(error)
        return 2
    except loop.Interrupted as error:
        signals.ignore()
        _fail(f"{error}; the same command goes on from there")
        return 128 + error.signal_number
    except SystemExit:
        if signals.exit_code() is None:
            raise
        return 0  # it has said what stopped it
    except expected as error:
        _fail(error)
        return 1


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Drops what libraries write to stderr below Python.

    TensorFlow reports how it was built, and the lack of a GPU, whatever its
    log level: six lines before the one that a user needs. Decoders of images
    say there what they think of a damaged one.
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
    """Leads what is written to stderr, below Python too, nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    os.close(nowhere)


def _check_memory() -> None:
    """Rejects a limit at which the import of TensorFlow hangs or aborts."""
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
    """Writes one line on stderr: the program's name and what is wrong."""
    if signals.exit_code() is not None:
        return  # the line that says what stopped the program is there
    text = getattr(error, "message", None) or str(error) or repr(error)
    # Which kernel of TensorFlow failed does not help a user.
    text = re.sub(r"\{\{function_node [^}]*\}\}", "", text)
    line = " ".join(text.split())
    if len(line) > _LONGEST_ERROR:
        line = f"{line[:_LONGEST_ERROR]}..."
    print(
        f"{signals.program()}: {printable(line)}", file=sys.stderr, flush=True
    )
