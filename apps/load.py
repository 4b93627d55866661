"""Load test: sends requests at a fixed rate and reports latencies.

    python -m apps.load --server=HOST:8500 --model_name=NAME --rate=20 PHOTOS
    python -m apps.load --saved_model=EXPORT_DIR --rate=20 --seconds=30 PHOTOS

PHOTOS are files or folders, whose images are sent in turn. Before the load, a
few requests measure how much of the time of a request is decoding, network and
protocol. The latency of a request includes its wait for slower requests. The
last line of stdout is a JSON object.
"""

import contextlib
import json
import threading

from absl import flags

from . import command_line

_SAVED_MODEL = flags.DEFINE_string(
    "saved_model",
    None,
    "Directory that apps.export wrote, to test in this process.",
)
_SERVER = flags.DEFINE_string(
    "server", None, "HOST:PORT (gRPC) or http://HOST:PORT (REST)."
)
_MODEL_NAME = flags.DEFINE_string(
    "model_name", None, "Name of the model on the server."
)
_RATE = flags.DEFINE_float(
    "rate", 10.0, "Requests per second.", lower_bound=0.001
)
_SECONDS = flags.DEFINE_float("seconds", 10.0, "Duration.", lower_bound=0.001)
_BATCH_SIZE = flags.DEFINE_integer(
    "batch_size", 1, "Images in a request.", lower_bound=1
)
_IN_FLIGHT = flags.DEFINE_integer(
    "in_flight", 64, "Largest number of requests in flight.", lower_bound=1
)
_TIMEOUT = flags.DEFINE_float(
    "timeout",
    10.0,
    "Deadline of a request to a server, in seconds.",
    lower_bound=0.001,
    upper_bound=86_400.0,
)
_SHARES = flags.DEFINE_bool(
    "shares",
    True,
    "Measure the shares of decoding, network and protocol before the load. A "
    "third of these requests count as failed in the metrics of the server.",
)


def main(argv):
    """Sends the images in `argv[1:]`."""
    from keras_resnet.serving import errors
    from keras_resnet.serving import inputs
    from keras_resnet.serving import load_testing

    network = _network()
    names = inputs.expand(argv[1:])
    if not names:
        flag = _SERVER if _SERVER.value else _SAVED_MODEL
        raise command_line.UsageError(
            flag.name, flag.value, "name images after the flags"
        )
    images = _read(names)
    stopped = threading.Event()

    def predict(batch):
        found = network.predict(batch, stopped=stopped)
        for status in filter(None, found.status):
            raise errors.RejectedError(status)

    try:  # before the test: a server that responds, and an accepted image
        with command_line.quiet():
            predict(images[:1])
            shares = _shares(network, images, stopped)
    except errors.RejectedError as error:
        raise ValueError(
            f"the network rejects {inputs.shown(names[0])}: {error}"
        ) from error
    try:
        with command_line.quiet():
            report = load_testing.run_load_test(
                predict,
                images,
                _RATE.value,
                _SECONDS.value,
                _BATCH_SIZE.value,
                _IN_FLIGHT.value,
            )
    finally:
        stopped.set()
    found = report.to_json()
    if shares:
        found["idle_server"] = shares.to_json()
        command_line.show(
            f"one request on the idle server took {shares.milliseconds:.1f} ms:"
            f" decoding {shares.decoding:.0%}, network {shares.network:.0%}, "
            f"protocol {shares.protocol:.0%}"
        )
    failed = sum(report.errors.values())
    command_line.show(
        f"{report.requests:,} requests in {report.seconds:.1f} seconds: "
        f"{found['images_per_second']:.1f} images per second, "
        f"{failed:,} failed requests"
    )
    if "p50_ms" in found:
        command_line.show(
            f"half of the responses took {found['p50_ms']:.0f} ms or less, "
            f"95% took {found['p95_ms']:.0f} ms or less, "
            f"99% took {found['p99_ms']:.0f} ms or less"
        )
    command_line.show(json.dumps(found))


def _shares(network, images, stopped):
    """Shares of a request, or None without --shares."""
    from keras_resnet.serving import errors
    from keras_resnet.serving import load_testing

    if not _SHARES.value:
        return None

    def predict(batch):
        with contextlib.suppress(errors.RejectedError):
            network.predict(batch, stopped)

    def reject(batch):
        network.reject(batch, stopped)

    return load_testing.measure_shares(
        predict,
        reject if _SERVER.value else None,
        images,
        _BATCH_SIZE.value,
    )


def _read(names):
    """The images, which stay in memory during the test."""
    from keras_resnet.serving import client
    from keras_resnet.serving import inputs

    images, left = [], client.MAX_BYTES_IN_FLIGHT
    for name in names:
        try:
            image = inputs.read(name)
        except ValueError as error:
            raise ValueError(f"{inputs.shown(name)}: {error}") from error
        left -= len(image)
        if left < 0:
            raise ValueError(
                "the images must have at most "
                f"{client.MAX_BYTES_IN_FLIGHT:,} bytes together, received more "
                f"with {inputs.shown(name)}: name fewer"
            )
        images.append(image)
    return images


def _network():
    """A server, or a directory in this process."""
    from keras_resnet.serving import client
    from keras_resnet.serving import connection
    from keras_resnet.serving import errors

    if bool(_SERVER.value) == bool(_SAVED_MODEL.value):
        raise command_line.UsageError(
            "server", _SERVER.value or "", "give it or --saved_model"
        )
    if _SAVED_MODEL.value:
        command_line.only_with(_SAVED_MODEL, _MODEL_NAME, _TIMEOUT)
        with command_line.usage("saved_model", _SAVED_MODEL.value):
            return client.SavedModel(_SAVED_MODEL.value)
    if not _MODEL_NAME.value:
        raise command_line.UsageError(
            "model_name", "", "give the name of the model on the server"
        )
    # One attempt: retries would hide lost requests.
    try:
        return connection.connect(
            _SERVER.value,
            _MODEL_NAME.value,
            timeout_seconds=_TIMEOUT.value,
            attempts=1,
        )
    except errors.ArgumentError as error:
        flag = {
            "address": _SERVER,
            "model_name": _MODEL_NAME,
            "timeout_seconds": _TIMEOUT,
        }[error.argument]
        raise command_line.UsageError(flag.name, flag.value, error) from error


def cli():
    """The console script."""
    command_line.run(main, takes_arguments=True)


if __name__ == "__main__":
    cli()
