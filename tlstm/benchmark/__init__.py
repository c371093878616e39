"""Measuring LSTM layers against one another: workloads, providers, interleaved timing, verification, floors.

The engine behind `tlstm bench` and, in a clone, `python -m benchmarks.run`. It imports of `tlstm` only what a workload
runs, when it runs it, so that one harness can measure two versions of the library.
"""
