"""A thin loop that fine-tunes a causal language model on preference pairs with :mod:`inspo_kernels`."""
