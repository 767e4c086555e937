"""Benchmarks. Run them from the repository root; their result files are in ``benchmarks/results/``."""
