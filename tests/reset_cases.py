"""A layer's arguments with resets, and gradients of its results: shared by the tests of the reference."""

from __future__ import annotations

import torch

T, B, I, H = 5, 4, 3, 7
LENGTHS = (5, 0, 3, 4)
# One row that resets at each step, one without steps, one that resets at its first step and in the padding, one at its
# last step; as integers.
MASK = torch.tensor([[1, 1, 2, 0], [1, 0, 0, 0], [1, 1, 0, 0], [-1, 0, 1, 7], [1, 0, 1, 0]])


def make_inputs(P=None, to_a_state=False, lengths=None, reverse=False, dtype=torch.float64, size=(T, B, I, H)):
    """The arguments of `lstm`."""
    steps, rows, features, units = size
    width = P or units

    def draw(*shape):
        return torch.randn(*shape, dtype=dtype, requires_grad=True)

    tensors = (draw(steps, rows, features), draw(rows, width), draw(rows, units))
    weights = (draw(4 * units, features), draw(4 * units, width), draw(4 * units), draw(4 * units))
    w_hr = draw(P, units) if P else None
    given = (draw(rows, width), draw(rows, units)) if to_a_state else (None, None)
    lengths = None if lengths is None else torch.tensor(lengths[:rows]).clamp(max=steps)
    return *tensors, *weights, w_hr, lengths, reverse, MASK[:steps, :rows], *given


def cell_of_gates(gates, c, eye):
    """torch's LSTM cell with the pre-activations for its input, and nothing from its h."""
    nothing = torch.zeros_like(c)
    return torch.lstm_cell(gates, (nothing, c), eye, torch.zeros(eye.shape[0], c.shape[1], dtype=c.dtype))


def gradients(outputs, inputs):
    outer = [torch.linspace(-1, 2, output.numel(), dtype=output.dtype).view_as(output) for output in outputs]
    tensors = [t for t in inputs if torch.is_tensor(t) and t.requires_grad]
    return torch.autograd.grad(outputs, tensors, outer, materialize_grads=True)
