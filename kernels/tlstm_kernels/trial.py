"""A layer's kernels on trial: small runs beside the equations, before a GPU's user is given their results unasked.

Programs that wait for one another rely on what the GPU, its driver and the compiler make of a load that must not be
answered from a cache. None of these is the same everywhere, and a fault would be a wrong number or a wait without end.
So the kernels are tried where they are to run: one layer of many programs, forward and backward, every wait bounded,
three times, because what depends on timing need not show at once.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .launch_options import launch_options
from .layer_op import lstm_layer

REPEATS = 3
MAX_SPINS = 1 << 20  # loads; about a second
FACTOR = 4  # tests grant 2; an element that is missing or stale is off by far more in any dtype
SIZES = (65, 7, 40, 650)  # T, B, I, H: no round number among them
_RESULTS = ("y", "h_n", "c_n")
_INPUTS = ("x", "h_0", "c_0", "W_ih", "W_hh", "b_ih", "b_hh")


def layer_trial(
    device: torch.device, dtype: torch.dtype, backend: str = "triton", sizes: tuple[int, int, int, int] = SIZES
) -> str | None:
    """Why a layer should not run on the kernels on this device in this dtype; None if nothing speaks against it.

    Outputs and all gradients must be as near to those in float64 as FACTOR times the distance of the equations in
    `dtype`, and the same bit for bit whenever they are computed. Two kernels are compiled for it.
    """
    try:
        exact = _results("reference", device, torch.float64, dtype, sizes)
        own = _results("reference", device, dtype, dtype, sizes)
        before: dict[str, Tensor] = {}
        for _ in range(REPEATS):
            with launch_options(forward={}, backward={}, max_spins=MAX_SPINS):
                found = _results(backend, device, dtype, dtype, sizes)
            for name, value in found.items():
                if reason := distance_reason(name, value, exact[name], own[name]):
                    return reason
                if before and not torch.equal(value, before[name]):
                    return f"{name} is not the same in every run"
            before = found
    except Exception as error:  # whatever it is, the kernels cannot be relied on here, and their user goes on without
        return f"{type(error).__name__}: {error}"
    return None


def distance_reason(name: str, found: Tensor, exact: Tensor, own: Tensor) -> str | None:
    """Says how far `found` is from `exact`, where that is more than FACTOR times what `own`, in the same dtype, is."""
    scale = float(exact.abs().max())
    error, expected = (float((values.double() - exact).abs().max()) for values in (found, own))
    bound = FACTOR * max(expected, torch.finfo(found.dtype).eps * scale)
    if error <= bound:
        return None
    return f"{name} is off by {error:.2g}, and {bound:.2g} were to be expected"  # also where the error is NaN


def _results(
    backend: str, device: torch.device, dtype: torch.dtype, drawn: torch.dtype, sizes: tuple[int, int, int, int]
) -> dict[str, Tensor]:
    """Outputs and gradients in `dtype` of a problem whose numbers are `drawn` exactly."""
    T, B, I, H = sizes
    draw = drawing(device, dtype, drawn)
    x, h_0, c_0 = draw(T, B, I), draw(1, B, H, scale=0.5), draw(1, B, H)
    weights = [draw(4 * H, I, scale=I**-0.5), draw(4 * H, H, scale=H**-0.5), draw(4 * H), draw(4 * H)]
    inputs = [t.requires_grad_() for t in (x, h_0, c_0, *weights)]
    outputs = lstm_layer(inputs[0], inputs[1], inputs[2], inputs[3:], backend=backend)[:3]
    gradients = torch.autograd.grad(outputs, inputs, [draw(*out.shape, scale=T**-0.5) for out in outputs])
    results = dict(zip(_RESULTS, outputs, strict=True))
    results |= {f"the gradient of {name}": d for name, d in zip(_INPUTS, gradients, strict=True)}
    return {name: value.detach() for name, value in results.items()}


def drawing(device: torch.device, dtype: torch.dtype, drawn: torch.dtype) -> Callable[..., Tensor]:
    """A function of a shape and a scale that draws normal numbers, the same in every process and on every device."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(shape, generator=generator)).to(drawn).to(device, dtype)

    return draw
