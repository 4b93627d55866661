"""Says what is on images.

    python -m apps.predict --saved_model=EXPORT_DIR photo.jpg drawing.png
    python -m apps.predict photo.jpg  # by the CIFAR-10 network of savedmodels/

A table for people, or with --json one JSON object a line for programs. An
image that cannot be used gets its own line, the others their answers, and the
exit code is then 1.
"""

import json
import pathlib

from absl import flags

from . import command_line

# Ships with the repository, but not with the wheel.
_SHIPPED = pathlib.Path(__file__).parents[1] / "savedmodels/resnet20_cifar10"
_SAVED_MODEL = flags.DEFINE_string(
    "saved_model",
    None,
    "What apps.export wrote; the newest version is asked. Default: "
    "savedmodels/resnet20_cifar10 of the repository, where that is there.",
)
_TOP = flags.DEFINE_integer(
    "top", 5, "How many labels an image gets, at most.", lower_bound=1
)
_JSON = flags.DEFINE_bool("json", False, "One JSON object a line.")


def main(argv):
    """Asks about the files in `argv[1:]`."""
    paths = argv[1:]
    if not _SAVED_MODEL.value and _SHIPPED.is_dir():
        flags.FLAGS.saved_model = str(_SHIPPED)
    if not _SAVED_MODEL.value:
        raise command_line.UsageError(
            "saved_model", "", "give the directory that apps.export wrote"
        )
    if not paths:
        raise command_line.UsageError(
            "saved_model", _SAVED_MODEL.value, "name images behind the flags"
        )
    from keras_resnet.serving import client

    with command_line.usage("saved_model", _SAVED_MODEL.value):
        network = client.SavedModel(_SAVED_MODEL.value)
    answers = client.Client(network).predict_files(paths, _TOP.value)
    show = _as_json if _JSON.value else _Table(paths)
    failed = 0
    for path, answer in zip(paths, answers, strict=True):
        show(path, answer)
        failed += answer.error is not None
    if failed:
        raise ValueError(f"{failed} of {len(paths)} images got no answer")


class _Table:
    """Prints an answer as rows: image, label, probability."""

    def __init__(self, paths):
        self._width = max(len("image"), *map(len, paths))
        print(f"{'image':{self._width}}  probability  label")

    def __call__(self, path, answer):
        if answer.error:
            print(f"{path:{self._width}}  error: {answer.error}", flush=True)
        for label, probability in answer.best:
            print(f"{path:{self._width}}  {probability:11.2%}  {label}")
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
    print(json.dumps(document, ensure_ascii=False), flush=True)


def cli():
    """The console script."""
    command_line.run(main, takes_arguments=True)


if __name__ == "__main__":
    cli()
