"""Labels and preprocessing inside the files for other runtimes."""

import json
from collections.abc import Sequence
from typing import NamedTuple

from keras_resnet.data import views


class Metadata(NamedTuple):
    """Facts that a client needs beside the network.

    Attributes:
        labels: One line of text for each class.
        preprocessing: Preprocessing of the network. A client makes the view
            of its image (size, crop, channels); the file normalizes it.
    """

    labels: Sequence[str]
    preprocessing: views.Preprocessing

    def texts(self) -> dict[str, str]:
        """Returns the entries of a file's metadata, as JSON by name.

        >>> grey = views.Preprocessing(8, 1, None, mean=[0.2])
        >>> Metadata(["cat", "dog"], grey).texts()["labels"]
        '["cat", "dog"]'
        """
        return {
            "labels": json.dumps(list(self.labels), ensure_ascii=False),
            "preprocessing": self.preprocessing.to_json(),
        }
