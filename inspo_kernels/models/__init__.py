"""Hidden states and a verified LM head of any causal LM, and which models read trees."""

from .forward import check_head, hidden_and_head

__all__ = ["check_head", "hidden_and_head"]
