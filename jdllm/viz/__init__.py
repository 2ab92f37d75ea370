"""Shows runs: their records, a view in the terminal, and a page that replays them."""
