"""Text to token ids and back, over the `tokenizers` library. `tokenizer.py` is the way in."""
