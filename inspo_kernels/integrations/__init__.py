"""Trainers of other libraries that use this package's loss: ``inspo_kernels.integrations.trl``."""
