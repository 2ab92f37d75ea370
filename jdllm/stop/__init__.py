"""Stop rules: when a row has its answer."""
