"""Fine-tune a causal language model on preference pairs with ``inspo_kernels``."""
