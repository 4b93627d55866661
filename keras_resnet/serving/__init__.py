"""Trained networks for programs that know nothing of Keras."""
