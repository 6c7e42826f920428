"""Measurements that make the figures in the documentation: ``python -m benchmarks [name]``."""
