"""Training data of a model's own: answers that it samples, a program judges and it is trained on, round by round."""
