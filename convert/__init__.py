"""File formats in, arrays by canonical name out.

Turns checkpoints of OpenELM, in whatever file they come, into an MLX model directory.
Knows no model class and imports no MLX.
"""
