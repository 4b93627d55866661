"""Command-line programs: each parses flags and calls the library once."""

import os
import sys

from . import signals

# True if a program starts; false if a test or a notebook imports one.
if sys.argv[:1] == ["-m"] or os.path.basename(sys.argv[0]).startswith(
    "keras-resnet-"
):
    signals.install()
