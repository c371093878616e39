"""From logits to tokens: settings, sampling, beam search, streaming, and the exact state of a generation.

Token ids only: nothing here knows a tokenizer or a model class. `generate.py` is the way in.
"""
