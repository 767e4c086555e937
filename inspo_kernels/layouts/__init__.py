"""Turn preference pairs into sequences: padded rows, packed rows, and trees that hold the prompt once."""

from .conditioning import condition_pairs
from .preference_batch import condition_batch

__all__ = ["condition_batch", "condition_pairs"]
