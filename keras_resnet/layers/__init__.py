"""Layers of residual networks, for every Keras backend."""

from keras_resnet.layers.convolutions import Convolution
from keras_resnet.layers.normalization import BatchNormalization
from keras_resnet.layers.shortcuts import ConstantScaling
from keras_resnet.layers.shortcuts import ConvolutionShortcut
from keras_resnet.layers.shortcuts import DropoutShortcut
from keras_resnet.layers.shortcuts import ExclusiveGating
from keras_resnet.layers.shortcuts import NoShortcut
from keras_resnet.layers.shortcuts import OptionA
from keras_resnet.layers.shortcuts import OptionB
from keras_resnet.layers.shortcuts import OptionC
from keras_resnet.layers.shortcuts import Shortcut
from keras_resnet.layers.shortcuts import ShortcutOnlyGating
from keras_resnet.layers.stacks import UnitStack
from keras_resnet.layers.units import BatchNormAfterAdditionUnit
from keras_resnet.layers.units import OriginalUnit
from keras_resnet.layers.units import PreActivationUnit
from keras_resnet.layers.units import ReLUBeforeAdditionUnit
from keras_resnet.layers.units import ReLUOnlyPreActivationUnit
from keras_resnet.layers.units import Unit

__all__ = [
    "BatchNormAfterAdditionUnit",
    "BatchNormalization",
    "ConstantScaling",
    "Convolution",
    "ConvolutionShortcut",
    "DropoutShortcut",
    "ExclusiveGating",
    "NoShortcut",
    "OptionA",
    "OptionB",
    "OptionC",
    "OriginalUnit",
    "PreActivationUnit",
    "ReLUBeforeAdditionUnit",
    "ReLUOnlyPreActivationUnit",
    "Shortcut",
    "ShortcutOnlyGating",
    "Unit",
    "UnitStack",
]
