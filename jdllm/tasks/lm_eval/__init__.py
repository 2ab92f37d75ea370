"""Tasks as lm-eval knows them (ours, its own and a user's), and their documents."""
