"""A model's weights in the order in which the programs of a decode plan read them; built once for a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .decode_shape import DecodePlan


@dataclass(frozen=True)
class ModelWeights:
    """The weights of a language model as it has them.

    Fields:
        embedding: (V, E).
        w_ih, w_hh: per layer (4H, I) and (4H, H), rows in torch's gate order.
        bias: per layer (4H,) or None: b_ih + b_hh.
        head: (V, H of the last layer), contiguous. head_bias: (V,) or None.
    """

    embedding: Tensor
    w_ih: Sequence[Tensor]
    w_hh: Sequence[Tensor]
    bias: Sequence[Tensor | None]
    head: Tensor
    head_bias: Tensor | None


@dataclass(frozen=True)
class PackedWeights:
    """What the kernel reads: see its arguments of the same names."""

    w: Tensor
    bias: Tensor
    table: Tensor
    head: Tensor
    head_bias: Tensor | None


@torch.no_grad()
def pack_weights(weights: ModelWeights, plan: DecodePlan) -> PackedWeights:
    """Fold the embedding into the first layer's input product, and lay each program's rows side by side."""
    w_ih, w_hh = weights.w_ih, weights.w_hh
    matrices = [w_hh[0]]
    for layer in range(1, plan.shape.layers):
        matrices += [w_ih[layer], w_hh[layer]]
    parts = [pack_rows(w, plan, (m + 1) // 2, plan.padded(m)).flatten() for m, w in enumerate(matrices)]
    zero = weights.embedding.new_zeros(1, dtype=torch.float32)
    biases = [zero[:0]]
    for layer in range(1, plan.shape.layers):
        bias = weights.bias[layer]
        column = w_hh[layer].new_zeros(len(w_hh[layer]), 1) if bias is None else bias[:, None]
        biases.append(pack_rows(column.float(), plan, layer, 1).flatten())
    table = torch.nn.functional.linear(weights.embedding, w_ih[0], weights.bias[0])  # (V, 4H)
    return PackedWeights(
        w=torch.cat(parts),
        bias=torch.cat(biases) if plan.shape.layers > 1 else zero,
        table=pack_rows(table.T, plan, 0, len(table)).flatten(0, 1).T.contiguous(),
        head=weights.head.contiguous(),
        head_bias=weights.head_bias,
    )


def pack_rows(
    matrix: Tensor,  # (4H, K)
    plan: DecodePlan,
    layer: int,
    width: int,
) -> Tensor:  # (P, 4 * UNITS, width)
    """Each program's rows, ordered (gate, unit); zero where there is no unit or no column."""
    H, units, (_, K) = plan.shape.widths[layer], plan.units[layer], matrix.shape
    packed = matrix.new_zeros(4, plan.programs * units, width)
    packed[:, :H, :K] = matrix.view(4, H, K) if matrix.is_contiguous() else matrix.reshape(4, H, K)
    return packed.view(4, plan.programs, units, width).transpose(0, 1).reshape(plan.programs, 4 * units, width)
