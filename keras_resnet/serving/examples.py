"""Images as tf.train.Example, the input of the signature `classify`."""

import tensorflow as tf

FEATURE = "image/encoded"


def example(image_bytes: bytes) -> bytes:
    """Returns a serialized tf.train.Example of an encoded image.

    >>> tf.train.Example.FromString(example(b"GIF")).features.feature[
    ...     FEATURE].bytes_list.value[0]
    b'GIF'
    """
    feature = tf.train.Feature(
        bytes_list=tf.train.BytesList(value=[image_bytes])
    )
    features = tf.train.Features(feature={FEATURE: feature})
    return tf.train.Example(features=features).SerializeToString()
