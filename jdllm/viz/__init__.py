"""Runs to look at: records, the terminal, and a page that replays them."""
