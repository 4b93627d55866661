"""Weights: published and shipped ones, and files of other packages."""

from keras_resnet.weights.loading import copy
from keras_resnet.weights.loading import load

__all__ = ["copy", "load"]
