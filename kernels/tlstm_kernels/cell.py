"""Gate math inside a kernel: activations, one cell step and its derivative. Everything here is float32 on tiles."""

# The body of a kernel is Triton, not Python, and has no types.
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def sigmoid(x):
    # exp overflows to infinity for very negative x, and 1 / inf is the right answer.
    return 1 / (1 + tl.exp(-x))


@triton.jit
def tanh(x):
    """tanh to within 2 units in the last place of float32, on the whole line; NaN stays NaN.

    Near zero the quotient cancels, so an odd polynomial takes over there: x + x^3 p(x^2) with the smallest maximum
    relative error (1.6e-8) on |x| < 0.7, from a Lawson fit in float64.
    """
    a = tl.abs(x)
    large = 1 - 2 / (1 + tl.exp(2 * a))
    large = tl.where(x < 0, -large, large)
    s = x * x
    p = -0.0051387124
    p = p * s + 0.0200920259
    p = p * s - 0.0535588826
    p = p * s + 0.133291111
    p = p * s - 0.333331899
    return tl.where(a < 0.7, x + x * (s * p), large)


@triton.jit
def split_gates(z):
    """Rows ordered (gate, unit), as torch stores them: (4 * UNITS, BLOCK_B) -> i, f, g, o, each (UNITS, BLOCK_B)."""
    UNITS: tl.constexpr = z.shape[0] // 4
    BLOCK_B: tl.constexpr = z.shape[1]
    z = tl.permute(tl.reshape(z, (4, UNITS, BLOCK_B)), (1, 2, 0))
    i_and_g, f_and_o = tl.split(tl.reshape(z, (UNITS, BLOCK_B, 2, 2)))  # by the low bit of the gate's number
    i, g = tl.split(i_and_g)
    f, o = tl.split(f_and_o)
    return i, f, g, o


@triton.jit
def activate(z_i, z_f, z_g, z_o):
    return sigmoid(z_i), sigmoid(z_f), tanh(z_g), sigmoid(z_o)


@triton.jit
def cell_backward(
    i, f, g, o,  # (UNITS, BLOCK_B) gates after their activation
    c, c_prev,  # (UNITS, BLOCK_B) cell state after and before the step
    d_h, d_c,  # (UNITS, BLOCK_B) gradients of h_t and c_t, d_c still without its part through h_t
):  # fmt: skip
    """Gradients of the four pre-activations and of c_{t-1}."""
    tanh_c = tanh(c)
    d_c += d_h * o * (1 - tanh_c * tanh_c)
    d_o = d_h * tanh_c * o * (1 - o)
    d_i = d_c * g * i * (1 - i)
    d_f = d_c * c_prev * f * (1 - f)
    d_g = d_c * i * (1 - g * g)
    return d_i, d_f, d_g, d_o, d_c * f
