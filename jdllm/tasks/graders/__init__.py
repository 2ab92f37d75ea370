"""Verdicts: answers read out of completions, and programs that are run."""
