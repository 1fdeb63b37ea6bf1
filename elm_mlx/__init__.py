"""OpenELM on MLX."""
