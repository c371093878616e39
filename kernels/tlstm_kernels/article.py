"""The LSTM as articles print it: one matrix per gate over the concatenation [h_{t-1}, x_t].

    f_t = sigmoid(W_f [h_{t-1}, x_t] + b_f)        forget gate
    i_t = sigmoid(W_i [h_{t-1}, x_t] + b_i)        input gate
    c'_t = tanh(W_c [h_{t-1}, x_t] + b_c)          candidate
    c_t = f_t * c_{t-1} + i_t * c'_t               cell state
    o_t = sigmoid(W_o [h_{t-1}, x_t] + b_o)        output gate
    h_t = o_t * tanh(c_t)

(For example Olah, "Understanding LSTM Networks", 2015.) The same map as `reference.lstm_forward`, whose stacked
matrices split each W into the columns of x and the columns of h: `ArticleWeights` converts both ways. Written a second
time, line by line, so that one can be tested against the other.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class ArticleWeights:
    """One matrix and one bias per gate. The first H columns of a matrix meet h_{t-1}, the other I columns x_t."""

    w_f: Tensor  # (H, H + I)
    w_i: Tensor  # (H, H + I)
    w_c: Tensor  # (H, H + I)
    w_o: Tensor  # (H, H + I)
    b_f: Tensor  # (H,)
    b_i: Tensor  # (H,)
    b_c: Tensor  # (H,)
    b_o: Tensor  # (H,)

    @classmethod
    def from_torch(
        cls,
        w_ih: Tensor,  # (4H, I)
        w_hh: Tensor,  # (4H, H)
        b_ih: Tensor | None = None,  # (4H,)
        b_hh: Tensor | None = None,  # (4H,)
    ) -> ArticleWeights:
        """From the parameters of `torch.nn.LSTM`, gates stacked i, f, g, o; its two biases are added."""
        w_i, w_f, w_c, w_o = torch.cat((w_hh, w_ih), dim=1).chunk(4)
        b = w_ih.new_zeros(w_ih.shape[0])
        for bias in (b_ih, b_hh):
            if bias is not None:
                b = b + bias
        b_i, b_f, b_c, b_o = b.chunk(4)
        return cls(w_f, w_i, w_c, w_o, b_f, b_i, b_c, b_o)

    def to_torch(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The parameters of `torch.nn.LSTM`: w_ih (4H, I), w_hh (4H, H), b_ih (4H,), b_hh (4H,).

        The whole bias goes into b_ih and b_hh is zero: how torch had split it cannot be known from the sum.
        """
        H = self.w_f.shape[0]
        w = torch.cat((self.w_i, self.w_f, self.w_c, self.w_o))
        b = torch.cat((self.b_i, self.b_f, self.b_c, self.b_o))
        return w[:, H:], w[:, :H], b, torch.zeros_like(b)


def article_forward(
    x: Tensor,  # (T, B, I)
    h_0: Tensor,  # (B, H)
    c_0: Tensor,  # (B, H)
    w: ArticleWeights,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the article's equations, in the dtype of the tensors; differentiable by autograd.

    Returns:
        h at every step (T, B, H), h_n (B, H), c_n (B, H).
    """
    h, c = h_0, c_0
    hidden = []
    for x_t in x:
        hx = torch.cat((h, x_t), dim=-1)
        f = torch.sigmoid(hx @ w.w_f.T + w.b_f)
        i = torch.sigmoid(hx @ w.w_i.T + w.b_i)
        candidate = torch.tanh(hx @ w.w_c.T + w.b_c)
        c = f * c + i * candidate
        o = torch.sigmoid(hx @ w.w_o.T + w.b_o)
        h = o * torch.tanh(c)
        hidden.append(h)
    y = torch.stack(hidden) if hidden else h_0.new_zeros(0, *h_0.shape)
    return y, h, c
