"""Weights: published and shipped ones, and files of other packages.

A file becomes variables in this order:

1. `files` finds the format, and `hdf5`, `torch_files` or `safetensors` reads
   named arrays, within the bounds of `bounds`;
2. `source_names` translates the names of other packages, `matching` the
   layouts of Keras and of looped networks;
3. `matching` checks that every array fits, and `advice` names a network that
   does;
4. `loading` assigns the arrays to the variables of `model_paths`.

`keras_files` loads whole networks from `.keras` files. `shipped` has the
weights that come with the package.
"""

from keras_resnet.weights.loading import copy
from keras_resnet.weights.loading import load

__all__ = ["copy", "load"]
