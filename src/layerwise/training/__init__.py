"""The training loop, its files and its metrics."""
