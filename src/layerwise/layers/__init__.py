"""What is there: the layer map of a model, from one recording of its real dependency graph."""
