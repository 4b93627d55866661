"""Data, recipes, the training loop and evaluation."""
