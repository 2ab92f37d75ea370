"""Evaluation: tasks on models, their verdicts and costs, sweeps and reports."""
