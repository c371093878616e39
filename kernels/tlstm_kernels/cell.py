"""Gate math inside a kernel: activations, one cell step and its derivative. Everything here is float32 on tiles."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def sigmoid(x):
    # exp overflows to infinity for very negative x, and 1 / inf is the right answer.
    return 1 / (1 + tl.exp(-x))


@triton.jit
def tanh(x):
    """tanh to about one unit in the last place of float32 over the whole line; NaN stays NaN.

    Near zero 1 - 2 / (exp(2x) + 1) cancels, so an odd polynomial (least maximum relative error on |x| < 0.55) takes
    over there.
    """
    a = tl.abs(x)
    large = 1 - 2 / (tl.exp(2 * a) + 1)
    large = tl.where(x < 0, -large, large)
    s = x * x
    p = 1.5713601e-02
    p = p * s - 5.2291520e-02
    p = p * s + 1.3314801e-01
    p = p * s - 3.3332768e-01
    small = p * s * x + x
    return tl.where(a < 0.55, small, large)


@triton.jit
def split_gates(z):
    """Columns ordered (gate, unit), as torch stores them: (BLOCK_B, 4 * UNITS) -> i, f, g, o, each (BLOCK_B, UNITS)."""
    BLOCK_B: tl.constexpr = z.shape[0]
    UNITS: tl.constexpr = z.shape[1] // 4
    z = tl.permute(tl.reshape(z, (BLOCK_B, 4, UNITS)), (0, 2, 1))
    i_and_g, f_and_o = tl.split(tl.reshape(z, (BLOCK_B, UNITS, 2, 2)))  # by the low bit of the gate's number
    i, g = tl.split(i_and_g)
    f, o = tl.split(f_and_o)
    return i, f, g, o


@triton.jit
def activate(z_i, z_f, z_g, z_o):
    return sigmoid(z_i), sigmoid(z_f), tanh(z_g), sigmoid(z_o)


@triton.jit
def cell_backward(
    i, f, g, o,  # (BLOCK_B, UNITS) gates after their activation
    c, c_prev,  # (BLOCK_B, UNITS) cell state after and before the step
    d_h, d_c,  # (BLOCK_B, UNITS) gradients of h_t and c_t, d_c still without its part through h_t
):  # fmt: skip
    """Gradients of the four pre-activations and of c_{t-1}."""
    tanh_c = tanh(c)
    d_c += d_h * o * (1 - tanh_c * tanh_c)
    d_o = d_h * tanh_c * o * (1 - o)
    d_i = d_c * g * i * (1 - i)
    d_f = d_c * c_prev * f * (1 - f)
    d_g = d_c * i * (1 - g * g)
    return d_i, d_f, d_g, d_o, d_c * f
