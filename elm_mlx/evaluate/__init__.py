"""Evaluation: the paper's tasks as LM Evaluation Harness scores them, perplexity, and comparison of models."""
