"""Fine-tuning: data in, an adapter out."""
