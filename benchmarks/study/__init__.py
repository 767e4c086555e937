"""A controlled study of how conditioning on the other response affects what a model learns."""
