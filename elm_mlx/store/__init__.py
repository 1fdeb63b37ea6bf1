"""Model and adapter directories on disk: described, loaded, fused, written."""
