"""Graders: they find answers in completions and compare them, or run programs."""
