"""What one step of an LSTM language model computes with: for decoders that do it without calling the model."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class LayerWeights:
    """One layer, gates in the order i, f, g, o; H hidden units, output of width P (= H without `w_hr`).

    Fields:
        w_ih: `(4H, I)`. w_hh: `(4H, P)`. bias: `(4H,)`, both of torch's together, or None.
        w_hr: `(P, H)`, the recurrent projection, or None. residual: what follows gets the layer's input added.
    """

    w_ih: Tensor
    w_hh: Tensor
    bias: Tensor | None
    w_hr: Tensor | None
    residual: bool


@dataclass(frozen=True)
class StepWeights:
    """The model's own tensors, not copies (but for the sums of two biases), without their gradients.

    Fields:
        embedding: `(V, E)`. layers: first to last.
        projection: weight `(D, P)` and bias `(D,)` between the last layer and the head, or None.
        head: weight `(V, D)`. head_bias: `(V,)`, or None.
    """

    embedding: Tensor
    layers: tuple[LayerWeights, ...]
    projection: tuple[Tensor, Tensor] | None
    head: Tensor
    head_bias: Tensor | None

    @property
    def products(self) -> list[Tensor]:
        """The matrices that a step multiplies with, each once."""
        matrices = [matrix for layer in self.layers for matrix in (layer.w_ih, layer.w_hh, layer.w_hr)]
        matrices += [self.projection[0] if self.projection is not None else None, self.head]
        return [matrix for matrix in matrices if matrix is not None]
