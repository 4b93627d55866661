"""Images and labels: sources, splits, views, augmentation, batches."""

from keras_resnet.data.datasets import DataSet
from keras_resnet.data.datasets import load
from keras_resnet.data.datasets import write_examples
from keras_resnet.data.views import Preprocessing

__all__ = ["DataSet", "Preprocessing", "load", "write_examples"]
