"""Training runs: data, and how it becomes rows."""
