"""How good a model is: the paper's tasks as LM Evaluation Harness scores them, perplexity, and models compared."""
