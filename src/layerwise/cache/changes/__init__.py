"""Whether something is what it was: data sets, settings of modules, weights."""
