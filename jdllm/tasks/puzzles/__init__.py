"""Puzzles that are generated: sudoku and countdown."""
