"""Thin wrappers for other people's training loops; the only importers of those packages."""
