"""Programs: flags in, one library call, words out."""

import os
import sys

from . import signals

# A program is starting, and not a test or a notebook that imports one.
if sys.argv[:1] == ["-m"] or os.path.basename(sys.argv[0]).startswith(
    "keras-resnet-"
):
    signals.install()
