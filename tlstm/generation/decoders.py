"""The ways to make tokens, fastest first, and the choice among them. All give the same tokens for the same request.

    kernel   a GPU kernel that runs the whole loop: layers, head, sampling
    graph    the model's step as a CUDA graph, replayed for every token
    lean     the equations of a step over fixed buffers, on a CPU
    loop     a call of the model for every token; serves every model and every request

"The same" is within rounding: two ways may round a logit differently, and where the best two tokens are that close to
each other, they may choose differently. A way whose rounding would be noticed refuses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from tlstm.generation.config import GenerationConfig
from tlstm.generation.gpu_decoder import GpuDecoder
from tlstm.generation.graph_step import GraphError, GraphStep
from tlstm.generation.lean_step import LeanStep, lean_refusal
from tlstm.generation.loop import DecodeLoop
from tlstm.generation.model_step import PlainStep, Step
from tlstm.generation.prefill import LanguageModel
from tlstm.generation.rows import FinishReason, new_token_limits
from tlstm.generation.state import GenerationState
from tlstm.generation.step_weights import StepWeights
from tlstm.generation.stopping import StopStrings
from tlstm.validation import check_choice

DECODERS = ("auto", "kernel", "graph", "lean", "loop")
# Whether `auto` may mean the kernel. It passes every test that needs no GPU, but has met none yet: to be switched on
# with the first recorded run of benchmarks/gpu_check.sh. Until then ask for it by name. A graph tries itself at once.
KERNEL_BY_DEFAULT = False


class TokenDecoder(Protocol):
    """What `generate` asks of a decode path; `DecodeLoop` documents it."""

    new_tokens: list[list[int]]
    scores: list[Tensor]
    logits: list[Tensor]

    @property
    def finished(self) -> bool: ...

    @property
    def finish_reasons(self) -> Sequence[FinishReason | None]: ...

    @property
    def seconds(self) -> float: ...

    def step(self) -> list[int | None]: ...

    def state(self) -> GenerationState: ...


@dataclass
class DecoderChoice:
    """Which decoder runs, and why the faster ones do not, name -> reason."""

    name: str = "loop"
    refused: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return "; ".join([self.name, *(f"not {name}: {reason}" for name, reason in self.refused.items())])


def choose_decoder(
    model: LanguageModel,
    state: GenerationState,
    config: GenerationConfig,
    *,
    stop: StopStrings | None = None,
    deadline: float | None = None,
    wanted: str = "auto",
) -> tuple[TokenDecoder, DecoderChoice]:
    """The fastest decoder that can serve the request, or the one that is `wanted`; arguments as of `DecodeLoop`.

    Raises:
        ValueError: no decoder has the name `wanted`, or it cannot serve the request, with the reason.
    """
    check_choice("decoder", wanted, DECODERS)
    choice = DecoderChoice()
    if wanted in ("auto", "kernel"):
        reason = _kernel_refusal(model, config, by_name=wanted == "kernel")
        if reason is None:
            return GpuDecoder(model, state, config, stop=stop, deadline=deadline), DecoderChoice("kernel")
        _refuse(choice, "kernel", reason, wanted)
    tokens = sum(new_token_limits(state, config))

    def loop(step: Step) -> DecodeLoop:
        return DecodeLoop(step, state, config, stop=stop, deadline=deadline)

    if wanted in ("auto", "graph"):
        try:
            return loop(graph_step(model)), DecoderChoice("graph", choice.refused)
        except (DecoderRefusedError, GraphError) as error:
            _refuse(choice, "graph", str(error), wanted)
    if wanted in ("auto", "lean"):
        try:
            return loop(lean_step(model, tokens)), DecoderChoice("lean", choice.refused)
        except DecoderRefusedError as error:
            _refuse(choice, "lean", str(error), wanted)
    return loop(PlainStep(model)), choice


class DecoderRefusedError(Exception):
    """A decoder cannot serve a model; the message is the reason."""


def choose_step(model: LanguageModel, tokens: int, wanted: str = "auto") -> tuple[Step, DecoderChoice]:
    """As `choose_decoder`, the step alone, for rows that come and go: about `tokens` tokens will be fed.

    The kernel, which ends a batch as a whole, takes no part; nor does a graph whose recording could fail later.
    """
    check_choice("decoder", wanted, tuple(name for name in DECODERS if name not in ("kernel", "graph")))
    choice = DecoderChoice()
    if wanted in ("auto", "lean"):
        try:
            return lean_step(model, tokens), DecoderChoice("lean", choice.refused)
        except DecoderRefusedError as error:
            _refuse(choice, "lean", str(error), wanted)
    return PlainStep(model), choice


def lean_step(model: LanguageModel, tokens: int) -> LeanStep:
    """A `LeanStep` of the model. Raises `DecoderRefusedError`."""
    weights = _weights(model)
    reason = lean_refusal(weights)
    if reason is not None:
        raise DecoderRefusedError(reason)
    return LeanStep(weights, tokens)


def graph_step(model: LanguageModel) -> GraphStep:
    """A `GraphStep` of the model. Raises `DecoderRefusedError`."""
    if model.device.type != "cuda":
        raise DecoderRefusedError(f"it needs a CUDA GPU, and the model is on {model.device}")
    _weights(model)  # a forward pass that they do not describe may do on the host what no graph records
    return GraphStep(model)


def _weights(model: LanguageModel) -> StepWeights:
    described = getattr(model, "step_weights", None)
    weights = described() if callable(described) else f"{type(model).__name__} does not tell its step_weights()"
    if isinstance(weights, str):
        raise DecoderRefusedError(weights)
    return weights


def _kernel_refusal(model: LanguageModel, config: GenerationConfig, *, by_name: bool) -> str | None:
    if model.device.type != "cuda":
        return f"it needs a CUDA GPU, and the model is on {model.device}"
    if not by_name and not KERNEL_BY_DEFAULT:
        return "it has never run on a GPU yet, and is taken only where it is asked for by name"
    try:
        _weights(model)  # the kernel computes what they describe
    except DecoderRefusedError as error:
        return str(error)
    return GpuDecoder.refusal(model, config)


def _refuse(choice: DecoderChoice, name: str, reason: str, wanted: str) -> None:
    if wanted == name:
        raise ValueError(f"decoder={name!r} cannot serve this request: {reason}; use decoder='auto'")
    choice.refused[name] = reason
