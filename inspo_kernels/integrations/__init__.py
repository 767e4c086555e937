"""Use this package's loss in trainers of other libraries: ``inspo_kernels.integrations.trl``."""
