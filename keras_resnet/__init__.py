"""Residual networks that are faithful to the papers, for Keras 3.

[1] He, Zhang, Ren, Sun 2016, "Deep Residual Learning for Image Recognition".
[2] He, Zhang, Ren, Sun 2016, "Identity Mappings in Deep Residual Networks".
"""

from keras_resnet import layers
from keras_resnet import models
from keras_resnet import weights
from keras_resnet.features import feature_extractor
from keras_resnet.features import freeze
from keras_resnet.models import PlainNet18
from keras_resnet.models import PlainNet20
from keras_resnet.models import PlainNet32
from keras_resnet.models import PlainNet34
from keras_resnet.models import PlainNet44
from keras_resnet.models import PlainNet56
from keras_resnet.models import PlainNet110
from keras_resnet.models import ResNet18
from keras_resnet.models import ResNet18V2
from keras_resnet.models import ResNet20
from keras_resnet.models import ResNet20V2
from keras_resnet.models import ResNet32
from keras_resnet.models import ResNet32V2
from keras_resnet.models import ResNet34
from keras_resnet.models import ResNet34V2
from keras_resnet.models import ResNet44
from keras_resnet.models import ResNet44V2
from keras_resnet.models import ResNet50
from keras_resnet.models import ResNet50V2
from keras_resnet.models import ResNet56
from keras_resnet.models import ResNet56V2
from keras_resnet.models import ResNet101
from keras_resnet.models import ResNet101V2
from keras_resnet.models import ResNet110
from keras_resnet.models import ResNet110V2
from keras_resnet.models import ResNet152
from keras_resnet.models import ResNet152V2
from keras_resnet.models import ResNet164
from keras_resnet.models import ResNet164V2
from keras_resnet.models import ResNet200
from keras_resnet.models import ResNet200V2
from keras_resnet.models import ResNet1001
from keras_resnet.models import ResNet1001V2
from keras_resnet.models import ResNet1202
from keras_resnet.models import ResNet1202V2
from keras_resnet.models import WideResNet50_2
from keras_resnet.models import WideResNet101_2
from keras_resnet.models import resnet
from keras_resnet.preprocessing import decode_predictions
from keras_resnet.preprocessing import preprocess
from keras_resnet.preprocessing import preprocess_input
from keras_resnet.specs import MODELS
from keras_resnet.specs import Spec

__version__ = "0.1.0"

__all__ = [
    "MODELS",
    "PlainNet18",
    "PlainNet20",
    "PlainNet32",
    "PlainNet34",
    "PlainNet44",
    "PlainNet56",
    "PlainNet110",
    "ResNet18",
    "ResNet18V2",
    "ResNet20",
    "ResNet20V2",
    "ResNet32",
    "ResNet32V2",
    "ResNet34",
    "ResNet34V2",
    "ResNet44",
    "ResNet44V2",
    "ResNet50",
    "ResNet50V2",
    "ResNet56",
    "ResNet56V2",
    "ResNet101",
    "ResNet101V2",
    "ResNet110",
    "ResNet110V2",
    "ResNet152",
    "ResNet152V2",
    "ResNet164",
    "ResNet164V2",
    "ResNet200",
    "ResNet200V2",
    "ResNet1001",
    "ResNet1001V2",
    "ResNet1202",
    "ResNet1202V2",
    "Spec",
    "WideResNet50_2",
    "WideResNet101_2",
    "decode_predictions",
    "feature_extractor",
    "freeze",
    "layers",
    "models",
    "preprocess",
    "preprocess_input",
    "resnet",
    "weights",
]
