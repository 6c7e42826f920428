"""Open models and data sets by name."""
