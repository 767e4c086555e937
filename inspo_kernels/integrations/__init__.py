"""Trainers of other libraries, on this package's loss: ``inspo_kernels.integrations.trl``."""
