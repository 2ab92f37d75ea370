"""Weights on disk: checkpoints, and what identifies them."""
