"""Costs of networks, and signals and gradients in them."""
