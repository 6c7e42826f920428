"""Proof that a cut is exact, on the first batch of a phase."""
