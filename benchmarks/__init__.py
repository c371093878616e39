"""Benchmarks and what they measured; `benchmarks.run` is the way in. The engine is `tlstm.benchmark`."""
