"""On a live model: freezing, normalisation, param groups, the Tuner, regularisers, the audit."""
