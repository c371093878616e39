"""What is compared: tlstm's own backends and regimes, `torch.nn.LSTM`, plain loops; foreign packages in `foreign`.

tlstm                    the kernels with the plan that they choose (on a CPU: what `auto` means there)
tlstm:REGIME             single, persistent, streamed or per_step, pinned; tlstm:native and tlstm:reference likewise
tlstm:recompute          as tlstm, with the gates computed again in the backward pass
tlstm[PINS]              any fields of both plans, as in TLSTM_PLAN: "tlstm[forward: units=8; backward: rows=16]"
torch                    torch.nn.LSTM: cuDNN on an NVIDIA GPU, oneDNN or ATen on a CPU
torch-graph              the same, captured in a CUDA graph
torch-loop               one product and a few element-wise operations per step, in Python
torch-compile            the same, each step compiled by torch.compile
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tlstm.benchmark.plans import describe_plans
from tlstm.benchmark.problem import Problem

REGIMES = ("single", "persistent", "streamed", "per_step")
BACKENDS = ("native", "reference")
RECOMPUTE = "recompute"
Step = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass
class Built:
    """A provider ready to run one problem."""

    run: Callable[[Tensor], Tensor]  # x (T, B, I) -> y (T, B, P * directions)
    parameters: Mapping[str, Tensor]  # the leaves whose gradients a training step computes
    torch_layout: bool = True  # whether they are torch.nn.LSTM's, by name and by shape
    plan: Callable[[], str] = lambda: ""  # how it runs, asked once it has run
    keep_alive: list[object] = field(default_factory=list)


@dataclass(frozen=True)
class Provider:
    """A way to run an LSTM. `why_not` says why it cannot run a problem here, None if it can."""

    name: str
    summary: str
    why_not: Callable[[Problem], str | None]
    build: Callable[[Problem], Built]


def provider(name: str) -> Provider:
    """The provider of that name.

    Raises:
        ValueError: there is none.
    """
    if name.startswith("tlstm"):
        return _tlstm(name)
    known = registry()
    if name not in known:
        expected = ", ".join([*known, *(f"tlstm:{kind}" for kind in (*REGIMES, *BACKENDS, RECOMPUTE)), "tlstm[PINS]"])
        raise ValueError(f"provider: expected one of {expected}; received {name!r}.")
    return known[name]


def registry() -> dict[str, Provider]:
    """All providers but those with pins in their name."""
    from tlstm.benchmark.foreign import FOREIGN

    own = (
        _tlstm("tlstm"),
        Provider("torch", "torch.nn.LSTM", lambda p: _no_resets(p), _torch),
        Provider("torch-graph", "torch.nn.LSTM in a CUDA graph", _why_no_graph, _torch_graph),
        Provider("torch-loop", "a loop in Python", lambda p: None, lambda p: textbook_loop(p, plain_step)),
        Provider("torch-compile", "the loop, its step compiled", lambda p: None, _compiled_loop),
    )
    return {p.name: p for p in (*own, *FOREIGN)}


def default_providers(device: str, mode: str) -> list[str]:
    """What is compared unless asked otherwise; what is not installed is left out with its reason."""
    recomputed = [f"tlstm:{RECOMPUTE}"] if mode == "train" else []
    if torch.device(device).type == "cuda":
        return ["tlstm", *recomputed, *(name for name in registry() if name != "tlstm")]
    return ["tlstm", *recomputed, "tlstm:reference", "torch", "torch-loop"]


# ---- tlstm -----------------------------------------------------------------------------------------------------------


def _tlstm(name: str) -> Provider:
    rest = name.removeprefix("tlstm")
    pins: dict[str, dict[str, int | str]] = {}
    backend = ""
    if rest.startswith("[") and rest.endswith("]"):
        from tlstm_kernels.launch_options import parse_pins

        pins = parse_pins(rest[1:-1])
    elif rest.removeprefix(":") in REGIMES and rest[:1] == ":":
        pins = {kernel: {"regime": rest[1:]} for kernel in ("forward", "backward")}
    elif rest.removeprefix(":") in BACKENDS and rest[:1] == ":":
        backend = rest[1:]
    elif rest and rest != f":{RECOMPUTE}":
        raise ValueError(
            f"provider: expected 'tlstm', 'tlstm:' and one of {', '.join((*REGIMES, *BACKENDS, RECOMPUTE))}, or "
            f"'tlstm[PINS]' with the fields of TLSTM_PLAN; received {name!r}."
        )

    def why_not(problem: Problem) -> str | None:
        if pins and problem.device.type != "cuda":
            return "launch plans are for a GPU"
        if not backend and problem.device.type == "cuda":
            from tlstm.functional import why_unavailable

            return why_unavailable("triton", problem.device)
        return None

    def build(problem: Problem) -> Built:
        return _build_tlstm(problem, backend, pins, {"recompute": True} if rest == f":{RECOMPUTE}" else {})

    return Provider(name, "tlstm.LSTM", why_not, build)


def _build_tlstm(
    problem: Problem, backend: str, pins: dict[str, dict[str, int | str]], options: dict[str, Any]
) -> Built:
    from tlstm.layer import LSTM

    w, on_gpu = problem.workload, problem.device.type == "cuda"
    chosen = backend or ("triton" if on_gpu else "auto")
    layer = LSTM(w.I, w.H, **w.options, **options, backend=chosen, dtype=problem.dtype, device=problem.device)
    layer.load_state_dict(problem.module.state_dict())
    layer.train(problem.mode != "forward")
    resets = {} if problem.resets is None else {"resets": problem.resets}

    def run(x: Tensor) -> Tensor:
        return layer(x, **resets)[0]

    def run_pinned(x: Tensor) -> Tensor:
        from tlstm_kernels.launch_options import launch_options

        with launch_options(pins.get("forward"), pins.get("backward")):
            return run(x)

    def plan() -> str:
        return describe_plans(problem, pins) if chosen == "triton" else chosen

    return Built(run_pinned if pins else run, dict(layer.named_parameters()), plan=plan)


# ---- torch -----------------------------------------------------------------------------------------------------------


def _no_resets(problem: Problem) -> str | None:
    return "torch.nn.LSTM has no resets; tlstm:native runs it on the pieces" if problem.workload.resets else None


def _torch(problem: Problem) -> Built:
    module = problem.module
    return Built(lambda x: module(x)[0], dict(module.named_parameters()))


def _why_no_graph(problem: Problem) -> str | None:
    return "CUDA graphs need a GPU" if problem.device.type != "cuda" else _no_resets(problem)


class _OutputOnly(torch.nn.Module):
    def __init__(self, module: torch.nn.LSTM) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x)[0]


def _torch_graph(problem: Problem) -> Built:
    module, parameters = problem.module, dict(problem.module.named_parameters())
    if problem.mode != "forward":
        sample = problem.xs[0].detach().clone().requires_grad_()
        graphed: Any = torch.cuda.make_graphed_callables(_OutputOnly(module), (sample,))
        return Built(graphed, parameters)
    given, stream, graph = problem.xs[0].clone(), torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.no_grad(), torch.cuda.stream(stream):
        for _ in range(3):
            module(given)
    torch.cuda.current_stream().wait_stream(stream)
    with torch.no_grad(), torch.cuda.graph(graph):
        result = module(given)[0]

    def run(x: Tensor) -> Tensor:
        given.copy_(x)
        graph.replay()
        return result

    return Built(run, parameters, keep_alive=[graph])


def plain_step(x_proj: Tensor, h: Tensor, c: Tensor, w_hh: Tensor) -> tuple[Tensor, Tensor]:
    """One step as a textbook has it, in the dtype given: x_proj (B, 4H), h (B, P), c (B, H), w_hh (4H, P)."""
    i, f, g, o = (x_proj + h @ w_hh.T).chunk(4, dim=-1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def textbook_loop(problem: Problem, step: Step) -> Built:
    """All layers and directions with `step` in a Python loop over time; the input's product is one for all steps."""
    w = problem.workload
    groups = [[tensor.requires_grad_(problem.mode != "forward") for tensor in group] for group in problem.weights]
    names = [name for name, _ in problem.module.named_parameters()]
    keep = None if problem.resets is None else (~problem.resets).to(problem.dtype).unsqueeze(-1)  # (T, B, 1)

    def direction(x: Tensor, group: list[Tensor], backwards: bool) -> Tensor:
        w_ih, w_hh, b_ih, b_hh, *w_hr = group
        x_proj = F.linear(x, w_ih, b_ih + b_hh)
        h, c = x.new_zeros(w.B, w.proj_size or w.H), x.new_zeros(w.B, w.H)
        outputs: list[Tensor] = [h] * w.T
        for t in reversed(range(w.T)) if backwards else range(w.T):
            if keep is not None:
                h, c = h * keep[t], c * keep[t]
            h, c = step(x_proj[t], h, c, w_hh)
            if w_hr:
                h = h @ w_hr[0].T
            outputs[t] = h
        return torch.stack(outputs)

    def run(x: Tensor) -> Tensor:
        for layer in range(w.layers):
            parts = [direction(x, groups[layer * w.directions + d], d == 1) for d in range(w.directions)]
            x = torch.cat(parts, -1) if len(parts) > 1 else parts[0]
        return x

    return Built(run, dict(zip(names, (t for group in groups for t in group), strict=True)))


def _compiled_loop(problem: Problem) -> Built:
    torch._dynamo.reset()  # each workload is a new one, not one more recompilation of the last
    return textbook_loop(problem, torch.compile(plain_step, dynamic=False))
