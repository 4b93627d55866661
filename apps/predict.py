"""Predicts the labels of images.

    python -m apps.predict --saved_model=EXPORT_DIR photo.jpg drawing.png
    python -m apps.predict --server=HOST:8500 --model_name=NAME FOLDER
    python -m apps.predict --model=resnet50 --weights=imagenet1k_v2 photo.jpg
    python -m apps.predict photo.jpg
    python -m apps.predict --list_weights

The fourth line takes the best ImageNet weights in the cache. If there are none,
it takes the CIFAR-10 network that ships with this package.

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
    "--version.",
)
_MODEL = flags.DEFINE_string(
    "model", None, "Name of the network, or a .keras file, without an export."
)
_WEIGHTS = flags.DEFINE_string(
    "weights",
    None,
    "With --model: a name of --list_weights, an address hf://OWNER/NAME or a "
    "file. By default the published weights of the network.",
)
_LIST_WEIGHTS = flags.DEFINE_bool(
    "list_weights", False, "Print the published weights, and stop."
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

    if _LIST_WEIGHTS.value:
        _list_weights()
        return
    for flag in (
        *(_SAVED_MODEL, _SERVER, _MODEL_NAME, _VERSION, _MODEL, _WEIGHTS),
    ):
        if flag.value == "":  # for example from an unset variable
            raise command_line.UsageError(
                flag.name, "", "give a value, or leave it out"
            )
    names = inputs.expand(argv[1:])
    given = (_SERVER, _SAVED_MODEL, _MODEL, _WEIGHTS)
    if not names:
        flag = next((f for f in given if f.value), _SAVED_MODEL)
        raise command_line.UsageError(
            flag.name, flag.value or "", "name images after the flags"
        )
    if not any(flag.value for flag in given):
        _choose()
    client = _built() if _MODEL.value or _WEIGHTS.value else _client()
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


def _list_weights():
    """Prints the table of published weights, with spaces between columns."""
    from keras_resnet.weights import published

    rows = published.table()
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = zip(row, widths, strict=True)
        command_line.show("  ".join(f"{c:{w}}" for c, w in cells).rstrip())


def _choose():
    """Sets the flags of the network that is on this machine already."""
    from keras_resnet.weights import pretrained
    from keras_resnet.weights import published

    best_first = sorted(
        (row for row in published.rows() if row.classes == 1000),
        key=lambda row: -(row.top1 or 0),
    )
    for row in best_first:
        if pretrained.find_downloaded(row):
            flags.FLAGS.model, flags.FLAGS.weights = row.network, row.name
            title = f"{row.network} with {row.name} of {row.source}"
            break
    else:
        if _SHIPPED.is_dir():
            flags.FLAGS.saved_model = str(_SHIPPED)
            title = "savedmodels/resnet20_cifar10"
        else:
            flags.FLAGS.model, flags.FLAGS.weights = "resnet20", "cifar10"
            title = "resnet20 with cifar10"
        title += ", which knows ten classes; for those of ImageNet: "
        title += command_line.command(
            "predict", "--model=resnet50", "--weights=imagenet1k_v2", "IMAGE"
        )
    print(f"network: {title}", file=sys.stderr, flush=True)


def _built():
    """A client of a network that was not exported."""
    from keras_resnet import specs
    from keras_resnet.serving import built_networks
    from keras_resnet.serving import client
    from keras_resnet.weights import published

    if not _MODEL.value:
        raise command_line.UsageError(
            "weights", _WEIGHTS.value, "give --model, the network that has them"
        )
    command_line.only_with(
        *(_MODEL, _SAVED_MODEL, _SERVER, _MODEL_NAME, _VERSION),
        *(_TIMEOUT, _IN_FLIGHT),
    )
    weights = _WEIGHTS.value
    if weights is None and not _MODEL.value.endswith(".keras"):
        with command_line.usage("model", _MODEL.value):
            network = specs.get_spec(_MODEL.value).name
        rows = [row for row in published.rows() if row.network == network]
        if not rows:
            raise command_line.UsageError(
                "weights",
                "",
                f"no weights of {network} are published: give a file",
            )
        weights = next((row for row in rows if row.is_default), rows[0]).name
    source = command_line.of_model(_MODEL.value, weights, {})
    return client.Client(
        built_networks.BuiltNetwork(source),
        _BATCH_SIZE.value,
        max_image_bytes=_MAX_IMAGE_BYTES.value,
    )


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
