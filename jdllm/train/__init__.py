"""Training on arrays: what is masked, the loss, the update."""
