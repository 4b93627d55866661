"""Exports trained networks, and predicts with exported networks."""
