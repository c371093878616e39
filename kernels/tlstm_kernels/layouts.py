"""The two ways in which a sequence (T, B, N) lies in memory: time first, or batch first as a view of (B, T, N).

The kernels step through either (`steps`), so that a batch-first layer copies nothing: what x is, everything else is.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def is_batch_first(x: Tensor) -> bool:
    """Whether (T, B, N) is a view of a contiguous (B, T, N), and not time first as well."""
    return not x.is_contiguous() and x.transpose(0, 1).is_contiguous()


def laid_out(x: Tensor, batch_first: bool) -> Tensor:
    """(T, B, ...) in this layout, copied if it is not."""
    return x.transpose(0, 1).contiguous().transpose(0, 1) if batch_first else x.contiguous()


def new_sequence(like: Tensor, shape: Sequence[int], batch_first: bool, dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised (T, B, ...) in this layout, of the device and dtype of `like`."""
    T, B, *rest = shape
    if batch_first:
        return like.new_empty((B, T, *rest), dtype=dtype).transpose(0, 1)
    return like.new_empty((T, B, *rest), dtype=dtype)


def rows_of(x: Tensor, batch_first: bool) -> Tensor:
    """(T, B, N) in this layout as its rows (T * B, N), in the order of the memory: a view."""
    return (x.transpose(0, 1) if batch_first else x).flatten(0, 1)


def sequence_of(rows: Tensor, T: int, batch_first: bool) -> Tensor:
    """The inverse of `rows_of`: (T, B, ...)."""
    return rows.unflatten(0, (-1, T)).transpose(0, 1) if batch_first else rows.unflatten(0, (T, -1))


def joined(parts: Sequence[Tensor], dim: int, batch_first: bool) -> Tensor:
    """Sequences (T, B, ...) in this layout, put together along a later dimension."""
    if batch_first:
        return torch.cat([part.transpose(0, 1) for part in parts], dim).transpose(0, 1)
    return torch.cat(list(parts), dim)


def from_row(tensor: Tensor, rows: slice) -> Tensor:
    """A (T, B, ...) tensor from its first row of these: the kernel steps over the whole batch from time to time."""
    return tensor[:, rows] if rows.start else tensor


def batch_rows(tensor: Tensor | None, rows: slice, whole: bool) -> Tensor | None:
    """These rows of the batch, of a tensor whose second dimension it is."""
    return tensor if tensor is None or whole else tensor[:, rows].contiguous()
