"""Text to token ids and back: tokenizers, chat templates, what ends a text."""
