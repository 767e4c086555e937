"""Benchmarks: run from the repository root, results as files in ``benchmarks/results/``."""
