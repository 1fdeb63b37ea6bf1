"""Documents of one's own: their passages in an index on disk, and the passages that a question is answered from."""
