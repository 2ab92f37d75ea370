"""One training step: what is masked, the loss, the update."""
