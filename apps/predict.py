"""Predicts the labels of images.

    python -m apps.predict --saved_model=EXPORT_DIR photo.jpg drawing.png
    python -m apps.predict --server=HOST:8500 --model_name=NAME FOLDER
    python -m apps.predict photo.jpg  # with savedmodels/resnet20_cifar10

An image is a file, a folder of files, a file: or data: URL, or - for the
standard input. The output is a table, or one JSON object per line with --json.
An image that cannot be used gets a line with its error, and the exit code is 1;
the other images get their predictions.
"""

import pathlib
import sys

from absl import flags

from . import command_line

_MAX_WIDTH = 80  # of the column of names; longer names move their row
# In the repository, but not in the wheel.
_SHIPPED = pathlib.Path(__file__).parents[1] / "savedmodels/resnet20_cifar10"
_SAVED_MODEL = flags.DEFINE_string(
    "saved_model",
    None,
    "Directory that apps.export wrote; the newest version is used, or "
    "--version. In a clone of the repository, savedmodels/resnet20_cifar10 by "
    "default.",
)
_SERVER = flags.DEFINE_string(
    "server",
    None,
    "A TensorFlow Serving program: HOST:PORT (gRPC, 8500) or http://HOST:PORT "
    "(REST, 8501).",
)
_MODEL_NAME = flags.DEFINE_string(
    "model_name", None, "Name of the model on the server."
)
_VERSION = flags.DEFINE_string(
    "version", None, "A number, or a label of the server."
)
_TIMEOUT = flags.DEFINE_float(
    "timeout",
    10.0,
    "Deadline of a request to a server, in seconds. A request is sent at most "
    "6 times.",
    lower_bound=0.001,
    upper_bound=86_400.0,
)
_BATCH_SIZE = flags.DEFINE_integer(
    "batch_size", 32, "Largest number of images in a batch.", lower_bound=1
)
_IN_FLIGHT = flags.DEFINE_integer(
    "in_flight",
    4,
    "Largest number of batches in flight to a server.",
    lower_bound=1,
)
_MAX_IMAGE_BYTES = flags.DEFINE_integer(
    "max_image_bytes",
    256_000_000,
    "Size of the largest image file.",
    lower_bound=1,
    upper_bound=1_000_000_000,
)
_TOP = flags.DEFINE_integer(
    "top", 5, "Largest number of labels for an image.", lower_bound=1
)
_JSON = flags.DEFINE_bool("json", False, "Print one JSON object per line.")


def main(argv):
    """Predicts the images in `argv[1:]`."""
    from keras_resnet.serving import inputs

    for flag in (_SAVED_MODEL, _SERVER, _MODEL_NAME, _VERSION):
        if flag.value == "":  # for example from an unset variable
            raise command_line.UsageError(
                flag.name, "", "give a value, or leave it out"
            )
    if not (_SAVED_MODEL.value or _SERVER.value) and _SHIPPED.is_dir():
        flags.FLAGS.saved_model = str(_SHIPPED)
    client = _client()
    names = inputs.expand(argv[1:])
    if not names:
        flag = _SERVER if _SERVER.value else _SAVED_MODEL
        raise command_line.UsageError(
            flag.name, flag.value, "name images after the flags"
        )
    answers = client.predict_files(names, _TOP.value)
    names = [inputs.shown(name) for name in names]
    show = _as_json if _JSON.value else _Table(names)
    failed = 0
    with command_line.quiet():
        for name, answer in zip(names, answers, strict=True):
            show(name, answer)
            failed += answer.error is not None
    if client.note:
        print(f"note: {client.note}", file=sys.stderr, flush=True)
    if failed:
        raise ValueError(f"{failed} of {len(names)} images have no prediction")


def _client():
    """A client of a server, or of a directory in this process."""
    from keras_resnet.serving import client
    from keras_resnet.serving import connection
    from keras_resnet.serving import errors
    from keras_resnet.serving import versions

    if _SERVER.value and not _SAVED_MODEL.value:
        if not _MODEL_NAME.value:
            raise command_line.UsageError(
                "model_name", "", "give the name of the model on the server"
            )
        try:
            network = connection.connect(
                _SERVER.value, _MODEL_NAME.value, _VERSION.value, _TIMEOUT.value
            )
        except errors.ArgumentError as error:
            flag = {
                "address": _SERVER,
                "model_name": _MODEL_NAME,
                "version": _VERSION,
                "timeout_seconds": _TIMEOUT,
            }[error.argument]
            raise command_line.UsageError(
                flag.name, flag.value, error
            ) from error
        return client.Client(
            network,
            _BATCH_SIZE.value,
            _IN_FLIGHT.value,
            _MAX_IMAGE_BYTES.value,
        )
    if _SERVER.value or not _SAVED_MODEL.value:
        raise command_line.UsageError(
            "saved_model",
            _SAVED_MODEL.value or "",
            "give the directory that apps.export wrote, or --server",
        )
    command_line.only_with(_SAVED_MODEL, _MODEL_NAME, _TIMEOUT, _IN_FLIGHT)
    directory = _SAVED_MODEL.value
    if _VERSION.value:
        with command_line.usage("version", _VERSION.value):
            directory = versions.find(directory, _VERSION.value)
    with command_line.usage("saved_model", _SAVED_MODEL.value):
        network = client.SavedModel(directory)
    return client.Client(
        network, _BATCH_SIZE.value, max_image_bytes=_MAX_IMAGE_BYTES.value
    )


class _Table:
    """Prints rows of image, probability and label."""

    def __init__(self, names):
        printed = map(command_line.printable, names)
        longest = max(len("image"), *map(len, printed))
        self._width = min(longest, _MAX_WIDTH)
        command_line.show(f"{'image':{self._width}}  probability  label")

    def __call__(self, name, answer):
        path = command_line.printable(name)
        if answer.error:
            command_line.show(f"{path:{self._width}}  error: {answer.error}")
        for label, probability in answer.best:
            command_line.show(
                f"{path:{self._width}}  {probability:11.2%}  {label}"
            )
            path = ""


def _as_json(path, answer):
    document = {"image": path}
    if answer.error:
        document["error"] = answer.error
    else:
        document["predictions"] = [
            {"label": label, "probability": probability}
            for label, probability in answer.best
        ]
    command_line.show(command_line.printable_json(document))


def cli():
    """The console script."""
    command_line.run(main, takes_arguments=True)


if __name__ == "__main__":
    cli()
