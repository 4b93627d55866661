"""SavedModels as a server loads them."""

import tensorflow as tf


def load(directory):
    """A session and the signatures, from the C++ loader.

    It knows the saved graph and nothing of Python, as TensorFlow Serving does.
    """
    with tf.Graph().as_default():
        session = tf.compat.v1.Session()
        loaded = tf.compat.v1.saved_model.loader.load(
            session, ["serve"], directory
        )
    return session, loaded.signature_def
