"""Asks a network at a given rate; the last line of stdout is one JSON object.

    python -m apps.load --server=HOST:8500 --model_name=NAME --rate=20 PHOTOS
    python -m apps.load --saved_model=EXPORT_DIR --rate=20 --seconds=30 PHOTOS

PHOTOS are files, or folders of them; they are sent in turn. A request that is
late because others were slow is charged for its wait.
"""

import json

from absl import flags

from . import command_line

_SAVED_MODEL = flags.DEFINE_string(
    "saved_model", None, "What apps.export wrote, asked in this process."
)
_SERVER = flags.DEFINE_string(
    "server", None, "HOST:PORT (gRPC) or http://HOST:PORT (REST)."
)
_MODEL_NAME = flags.DEFINE_string(
    "model_name", None, "What the server calls the network."
)
_RATE = flags.DEFINE_float("rate", 10.0, "Requests a second.")
_SECONDS = flags.DEFINE_float("seconds", 10.0, "How long.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 1, "Images of a request.")
_IN_FLIGHT = flags.DEFINE_integer(
    "in_flight", 64, "Requests on the way at once, at most."
)
_TIMEOUT = flags.DEFINE_float(
    "timeout", 10.0, "Seconds until a request to a server has failed."
)


def main(argv):
    """Sends the images in `argv[1:]`."""
    from keras_resnet.serving import client
    from keras_resnet.serving import inputs
    from keras_resnet.serving import load
    from keras_resnet.serving import servers

    if bool(_SERVER.value) == bool(_SAVED_MODEL.value):
        raise command_line.UsageError(
            "server", _SERVER.value or "", "give it or --saved_model"
        )
    if _SERVER.value:
        # Once: a request that is asked again would hide what was lost.
        with command_line.usage("server", _SERVER.value):
            network = servers.connect(
                _SERVER.value,
                _MODEL_NAME.value or "",
                timeout_seconds=_TIMEOUT.value,
                attempts=1,
            )
    else:
        with command_line.usage("saved_model", _SAVED_MODEL.value):
            network = client.SavedModel(_SAVED_MODEL.value)
    images = [inputs.read(name) for name in inputs.expand(argv[1:])]
    if images:
        network.probabilities(images[:1])  # it is there, and knows its labels
    report = load.hold(
        network.probabilities,
        images,
        _RATE.value,
        _SECONDS.value,
        _BATCH_SIZE.value,
        _IN_FLIGHT.value,
    )
    found = report.to_json()
    errors = sum(report.errors.values())
    print(
        f"{report.requests:,} requests in {report.seconds:.1f} seconds: "
        f"{found['images_per_second']:.1f} images a second, "
        f"{errors:,} requests without an answer"
    )
    if "p50_ms" in found:
        print(
            f"half of the answers took {found['p50_ms']:.0f} ms or less, "
            f"99% took {found['p99_ms']:.0f} ms or less"
        )
    print(json.dumps(found))


def cli():
    """The console script."""
    command_line.run(main, takes_arguments=True)


if __name__ == "__main__":
    cli()
