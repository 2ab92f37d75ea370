"""The puzzles that are generated: sudoku and countdown."""
