"""Files of text and records to batches of token ids."""
