"""Which of cuDNN's LSTM algorithms PyTorch selects, and why not the fast one.

The rule is that of aten/src/ATen/native/cudnn/RNN.cpp, as a pure function of sizes, so that a table can say beside
every figure of `torch.nn.LSTM` what was measured.
"""

from __future__ import annotations

from dataclasses import dataclass

STANDARD = "standard"
PERSISTENT = "persistent"  # CUDNN_RNN_ALGO_PERSIST_STATIC
PERSISTENT_SMALL = "persistent-small"  # CUDNN_RNN_ALGO_PERSIST_STATIC_SMALL_H
# Largest hidden sizes of the small persistent kernel.
SMALL_FORWARD, SMALL_BACKWARD = 192, 128


@dataclass(frozen=True)
class Selection:
    """The algorithm, and the first condition of the persistent one that is not met (empty: all are)."""

    algorithm: str
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.algorithm} ({self.reason})" if self.reason else self.algorithm


def select_algorithm(
    T: int,
    B: int,
    I: int,
    H: int,
    *,
    dtype: str,
    layers: int = 1,
    bidirectional: bool = False,
    proj_size: int = 0,
    packed: bool = False,
    backward: bool = False,
    capability: tuple[int, int] = (9, 0),
    multiprocessors: int = 132,
) -> Selection:
    """The algorithm of one LSTM call.

    Args:
        T, B, I, H: steps, batch, input width and hidden units.
        dtype: "float16", "bfloat16", "float32", "tf32" or "float64".
        packed: whether the input is a PackedSequence (as sequences with lengths are).
        backward: of the backward pass; the small kernel covers less there.
        capability, multiprocessors: of the GPU; the default is an H100 or H200.
    """
    if proj_size:
        return Selection(STANDARD, "it has a projection")
    if packed:
        return Selection(STANDARD, "the input is packed")
    largest = SMALL_BACKWARD if backward else SMALL_FORWARD
    if dtype != "float64" and capability >= (6, 0) and largest >= H:
        return Selection(PERSISTENT_SMALL)
    for wrong, reason in (
        (dtype != "float16", f"{dtype} is not float16"),
        (layers > 1, f"{layers} layers"),
        (bidirectional, "it is bidirectional"),
        (H > 1024, f"H={H} is more than 1024"),
        (H % 128, f"H={H} is no multiple of 128"),
        (I % 128, f"I={I} is no multiple of 128"),
    ):
        if wrong:
            return Selection(STANDARD, reason)
    reason = _why_not_on(capability, multiprocessors, T, B)
    return Selection(STANDARD, reason) if reason else Selection(PERSISTENT)


def _why_not_on(capability: tuple[int, int], multiprocessors: int, T: int, B: int) -> str:
    major, minor = capability
    if major == 7 and minor != 5:
        suits = (B % 16 == 0 and B not in (80, 112)) or B == 8
        long_enough = any(steps <= T and largest >= B for steps, largest in ((40, 128), (20, 96), (10, 32)))
        return "" if suits and long_enough else f"B={B}, T={T} on compute capability 7"
    if major < 8 or minor == 6:
        return f"compute capability {major}.{minor}"
    if multiprocessors < 98:
        return f"{multiprocessors} multiprocessors are fewer than 98"
    if B % 8:
        return f"B={B} is no multiple of 8"
    return f"B={B} is more than 128" if B > 128 else ""
