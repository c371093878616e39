"""The decode kernel on trial, as `trial` has the layer's: a small model that generates, beside the equations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .decode_launch import ChoiceSettings, DecodeSession, Launcher
from .decode_plan import choose_decode_plan
from .decode_shape import Choice, DecodePlan, DecodeShape
from .decode_weights import ModelWeights, pack_weights
from .launch_options import launch_options
from .reference import lstm_forward
from .trial import FACTOR, MAX_SPINS, REPEATS, distance_reason, drawing

WIDTHS, VOCAB_SIZE, STREAMS, STEPS = (328, 328), 65, 3, 24


def decode_trial(
    device: torch.device,
    dtype: torch.dtype,
    plan: DecodePlan | None = None,
    launcher: Launcher | None = None,
    steps: int = STEPS,
) -> str | None:
    """Why generation should not run inside the kernel on this device in this dtype; None if nothing speaks against it.

    Every token must be the best by the equations in float64, or as good as the best within FACTOR times the error of
    the equations in `dtype`, and so must the states; and all of it the same bit for bit in every run.

    Args:
        plan: how to cut the kernel, in place of the plan that suits the GPU, and for a model of what sizes.
        launcher: what runs it (tests).
    """
    try:
        plan = plan or _plan(device, dtype)
        first = _generated(plan, device, dtype, launcher, steps)
        exact, own = (_scored(plan.shape, device, dtype, kind, first[0]) for kind in (torch.float64, dtype))
        for name, found, e, o in zip(("h", "c"), first[1:], exact, own, strict=False):
            if reason := distance_reason(f"{name} of the last layer", found, e, o):
                return reason
        missed = exact[2].amax(-1) - exact[2].gather(-1, first[0][..., None])[..., 0]
        close = FACTOR * max(float((own[2].double() - exact[2]).abs().max()), torch.finfo(dtype).eps)
        if not bool((missed <= close).all()):
            return f"a token misses the best score by {float(missed.max()):.2g}, and {close:.2g} were to be expected"
        for _ in range(REPEATS - 1):
            again = _generated(plan, device, dtype, launcher, steps)
            if not all(map(torch.equal, first, again)):
                return "tokens and states are not the same in every run"
    except Exception as error:  # whatever it is, the kernel does not run here
        return f"{type(error).__name__}: {error}"
    return None


def _plan(device: torch.device, dtype: torch.dtype) -> DecodePlan:
    from .plan_at_hand import gpu_of

    assert device.index is not None
    shape = DecodeShape(WIDTHS, VOCAB_SIZE, str(dtype).removeprefix("torch."))
    plan = choose_decode_plan(shape, Choice(), STREAMS, gpu_of(device.index))
    if plan is None:
        raise RuntimeError("no plan fits on this GPU")
    return plan


def _weights(shape: DecodeShape, device: torch.device, dtype: torch.dtype, drawn: torch.dtype) -> ModelWeights:
    draw, E = drawing(device, dtype, drawn), 24
    inputs = (E, *shape.widths[:-1])
    return ModelWeights(
        draw(shape.vocab_size, E),
        [draw(4 * H, I, scale=2 * I**-0.5) for H, I in zip(shape.widths, inputs, strict=True)],
        [draw(4 * H, H, scale=H**-0.5) for H in shape.widths],
        [draw(4 * H) for H in shape.widths],
        draw(shape.vocab_size, shape.widths[-1]),
        draw(shape.vocab_size),
    )


def _generated(
    plan: DecodePlan, device: torch.device, dtype: torch.dtype, launcher: Launcher | None, steps: int
) -> tuple[Tensor, Tensor, Tensor]:
    """What the kernel makes from token 0: ids (steps, B) int64; h and c of the last layer (steps, B, H)."""
    shape, B = plan.shape, plan.streams
    with launch_options(max_spins=MAX_SPINS):
        session = DecodeSession(
            plan, pack_weights(_weights(shape, device, dtype, dtype), plan), ChoiceSettings(), launcher=launcher
        )
    zeros = [torch.zeros(B, width, dtype=dtype, device=device) for width in shape.widths]
    fields: dict[str, Any] = dict.fromkeys(("seed", "return_index", "made", "least"), [0] * B)
    # Texts of different lengths, so that the streams do not move in step.
    fields |= {"position": list(range(B)), "token": list(range(B)), "limit": [steps] * B, "active": [1] * B}
    session.place(range(B), zeros, zeros, fields)
    chunk = session.launch(steps)
    last = slice(shape.columns[-2], shape.columns[-2] + shape.widths[-1])
    return chunk.tokens().to(device), chunk.h[..., last].clone(), chunk.c[..., last].clone()


def _scored(
    shape: DecodeShape, device: torch.device, drawn: torch.dtype, dtype: torch.dtype, made: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The equations in `dtype`, called for one token after another: h and c of the last layer, logits (steps, B, V)."""
    weights, B = _weights(shape, device, dtype, drawn), made.shape[1]
    states = [(weights.embedding.new_zeros(B, width), weights.embedding.new_zeros(B, width)) for width in shape.widths]
    token, kept = torch.arange(B, device=device), []
    for chosen in made:
        x = weights.embedding[token]
        for layer, (w_ih, w_hh, bias) in enumerate(zip(weights.w_ih, weights.w_hh, weights.bias, strict=True)):
            _, h, c, _ = lstm_forward(x[None], *states[layer], w_ih, w_hh, bias)
            states[layer], x = (h, c), h
        kept.append((*states[-1], torch.nn.functional.linear(x, weights.head, weights.head_bias)))
        token = chosen
    h, c, logits = (torch.stack(parts) for parts in zip(*kept, strict=True))
    return h, c, logits
