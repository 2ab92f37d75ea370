"""The model: its facts, its weights and one forward pass."""
