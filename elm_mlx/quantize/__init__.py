"""Quantization: a model in fewer bits, with what that lost. `quantization.quantize` does it."""
