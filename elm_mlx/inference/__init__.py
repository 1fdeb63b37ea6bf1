"""Prompts to answers: prefill, decode, sampling, batches, conversations."""
