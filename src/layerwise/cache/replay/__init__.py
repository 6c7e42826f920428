"""Replay: the model's own forward, its frozen calls answered from what is stored."""
