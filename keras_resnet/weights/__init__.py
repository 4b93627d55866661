"""Weights: published and shipped ones, and files of other packages.

What `weights=` of a builder takes goes this way (`pretrained`):

1. `published` has a row for each name, `hub` reads the card of an address;
2. `downloads` brings a file that is not here, and checks its hash;
3. `files` finds the format, and `hdf5`, `torch_files` or `safetensors` reads
   named arrays, within the bounds of `bounds`;
4. `origins` recognizes the source of a file, and what its network was;
5. `source_names` translates the names of other packages, `matching` the
   layouts of Keras and of looped networks;
6. `matching` checks that every array fits, and `advice` names a network that
   does;
7. `loading` assigns the arrays to the variables of `model_paths`;
8. `cards` keeps what is known about the weights in the model.

`keras_files` loads whole networks from `.keras` files. `shipped` has the
weights that come with the package.
"""

from keras_resnet.weights.cards import card
from keras_resnet.weights.loading import copy
from keras_resnet.weights.loading import load
from keras_resnet.weights.published import rows as list

__all__ = ["card", "copy", "list", "load"]
