"""A model in fewer bits, and what that lost. `quantize.quantize` does it."""
