"""Training: fine-tuning, preference tuning and pretraining, and the files of a run."""
