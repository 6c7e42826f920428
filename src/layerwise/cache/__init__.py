"""The frozen prefix, computed once: cut, replay, store."""
