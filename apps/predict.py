"""Says what is on images.

    python -m apps.predict --saved_model=EXPORT_DIR photo.jpg drawing.png
    python -m apps.predict --server=HOST:8500 --model_name=NAME FOLDER
    python -m apps.predict photo.jpg  # by the CIFAR-10 network of savedmodels/

An image is a file, a folder of files, a file: or data: URL, or - for the
standard input. A table for people, or with --json one JSON object a line for
programs. An image that cannot be used gets its own line, the others their
answers, and the exit code is then 1.
"""

import pathlib

from absl import flags

from . import command_line

_MAX_WIDTH = 80  # of the names; a longer one pushes its own answer
# Ships with the repository, but not with the wheel.
_SHIPPED = pathlib.Path(__file__).parents[1] / "savedmodels/resnet20_cifar10"
_SAVED_MODEL = flags.DEFINE_string(
    "saved_model",
    None,
    "What apps.export wrote; the newest version is asked, or --version. "
    "Default: savedmodels/resnet20_cifar10 of the repository, where that is "
    "there.",
)
_SERVER = flags.DEFINE_string(
    "server",
    None,
    "A TensorFlow Serving program: HOST:PORT (gRPC, 8500) or http://HOST:PORT "
    "(REST, 8501).",
)
_MODEL_NAME = flags.DEFINE_string(
    "model_name", None, "What the server calls the network."
)
_VERSION = flags.DEFINE_string(
    "version", None, "A number, or a label that the server knows."
)
_TIMEOUT = flags.DEFINE_float(
    "timeout",
    10.0,
    "Deadline of a request to a server, in seconds. A request is sent 6 times "
    "at most.",
    lower_bound=0.001,
    upper_bound=86_400.0,
)
_BATCH_SIZE = flags.DEFINE_integer(
    "batch_size", 32, "Images that are sent at once, at most.", lower_bound=1
)
_IN_FLIGHT = flags.DEFINE_integer(
    "in_flight", 4, "Batches on the way to a server at once.", lower_bound=1
)
_MAX_IMAGE_BYTES = flags.DEFINE_integer(
    "max_image_bytes",
    256_000_000,
    "Size of the largest image that is read.",
    lower_bound=1,
    upper_bound=1_000_000_000,
)
_TOP = flags.DEFINE_integer(
    "top", 5, "How many labels an image gets, at most.", lower_bound=1
)
_JSON = flags.DEFINE_bool("json", False, "One JSON object a line.")


def main(argv):
    """Asks about the images in `argv[1:]`."""
    from keras_resnet.serving import inputs

    for flag in (_SAVED_MODEL, _SERVER, _MODEL_NAME, _VERSION):
        if flag.value == "":  # as of a variable that is not set
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
            flag.name, flag.value, "name images behind the flags"
        )
    answers = client.predict_files(names, _TOP.value)
    names = [inputs.shown(name) for name in names]
    show = _as_json if _JSON.value else _Table(names)
    failed = 0
    with command_line.quiet():
        for name, answer in zip(names, answers, strict=True):
            show(name, answer)
            failed += answer.error is not None
    if failed:
        raise ValueError(f"{failed} of {len(names)} images got no answer")


def _client():
    """Asks what the flags name: a server, or a directory in this process."""
    from keras_resnet.serving import client
    from keras_resnet.serving import servers
    from keras_resnet.serving import versions

    if _SERVER.value and not _SAVED_MODEL.value:
        if not _MODEL_NAME.value:
            raise command_line.UsageError(
                "model_name", "", "give what the server calls the network"
            )
        try:
            network = servers.connect(
                _SERVER.value, _MODEL_NAME.value, _VERSION.value, _TIMEOUT.value
            )
        except servers.ArgumentError as error:
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
    """Prints an answer as rows: image, label, probability."""

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
