"""The ways to make tokens, fastest first, and the choice among them. All give the same tokens for the same request.

    kernel   a GPU kernel that runs the whole loop: layers, head, sampling
    graph    the model's step as a CUDA graph, replayed for every token
    lean     the equations of a step over fixed buffers, on a CPU
    loop     a call of the model for every token; serves every model and every request

A kernel has to be compiled for each model's sizes on a machine that has not done so before. Unasked, that is done for
long texts or many; `decoder="kernel"` does it once, and from then on "auto" takes it for short ones, too.

"The same" is within rounding: two ways may round a logit differently, and where the best two tokens are that close to
each other, they may choose differently. A way whose rounding would be noticed refuses.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from tlstm.generation.config import GenerationConfig
from tlstm.generation.gpu_model import kernel_name, plan_for
from tlstm.generation.graph_step import GraphError, GraphStep
from tlstm.generation.kernel_rows import KernelRows
from tlstm.generation.lean_step import LeanStep, lean_refusal
from tlstm.generation.loop import DecodeLoop
from tlstm.generation.model_step import PlainStep, Step
from tlstm.generation.prefill import LanguageModel
from tlstm.generation.rows import Rows
from tlstm.generation.state import GenerationState
from tlstm.generation.step_weights import StepWeights
from tlstm.generation.stopping import StopStrings
from tlstm.generation.texts import TextRows, new_token_limits
from tlstm.trials import has_compiled, trial_refusal
from tlstm.validation import check_choice

DECODERS = ("auto", "kernel", "graph", "lean", "loop")
# Tokens for which a kernel is compiled unasked. That takes 9 to 32 s of a processor, once (for an H100: compile_seconds
# in benchmarks/results/compiled_decode.csv). How many tokens a graph makes meanwhile no GPU has told: a guess.
_WORTH_COMPILING = 50_000


@dataclass
class DecoderChoice:
    """Which decoder runs, and why the faster ones do not, name -> reason."""

    name: str = "loop"
    refused: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return "; ".join([self.name, *(f"not {name}: {reason}" for name, reason in self.refused.items())])


class DecoderRefusedError(Exception):
    """A decoder cannot serve a model or a request; the message is the reason."""


def choose_decoder(
    model: LanguageModel,
    state: GenerationState,
    config: GenerationConfig,
    *,
    stop: StopStrings | None = None,
    deadline: float | None = None,
    wanted: str = "auto",
) -> tuple[DecodeLoop, DecoderChoice]:
    """The texts of `state` in the fastest rows that can serve them, or in those of the decoder that is `wanted`.

    Arguments and errors as of `choose_rows`.
    """
    tokens = sum(new_token_limits(state, config))
    rows, choice = choose_rows(model, config, state.batch_size, tokens, stop=stop, deadline=deadline, wanted=wanted)
    return DecodeLoop(rows, state, config), choice


def choose_rows(
    model: LanguageModel,
    config: GenerationConfig,
    places: int,
    tokens: int,
    *,
    stop: StopStrings | None = None,
    deadline: float | None = None,
    wanted: str = "auto",
) -> tuple[TextRows, DecoderChoice]:
    """Rows for texts that may come and go, in the fastest way that can serve the request, or the one that is `wanted`.

    Args:
        places: most texts at once. tokens: about so many will be made.
        deadline: `time.perf_counter()` value after which every text ends, or None.

    Raises:
        ValueError: no decoder has the name `wanted`, or it cannot serve the request, with the reason.
    """
    check_choice("decoder", wanted, DECODERS)

    def rows(step: Step) -> Rows:
        return Rows(step, config, model.config.vocab_size, model.device, stop=stop, deadline=deadline)

    ways: dict[str, Callable[[], TextRows]] = {
        "kernel": lambda: kernel_rows(model, config, places, tokens, stop, deadline, by_name=wanted == "kernel"),
        "graph": lambda: rows(graph_step(model, places)),
        "lean": lambda: rows(lean_step(model, tokens)),
    }
    refused: dict[str, str] = {}
    for name, make in ways.items():
        if wanted not in ("auto", name):
            continue
        try:
            return make(), DecoderChoice(name, refused)
        except (DecoderRefusedError, GraphError) as error:
            if wanted == name:
                raise ValueError(f"decoder={name!r} cannot serve this request: {error}; use decoder='auto'") from None
            refused[name] = str(error)
    return rows(PlainStep(model)), DecoderChoice("loop", refused)


def kernel_rows(
    model: LanguageModel,
    config: GenerationConfig,
    places: int,
    tokens: int,
    stop: StopStrings | None,
    deadline: float | None,
    *,
    by_name: bool,
) -> KernelRows:
    """`KernelRows` of the model; unless asked for by name, where the kernel has passed its trial on the GPU, and is
    compiled already or will make many tokens.

    Raises `DecoderRefusedError`.
    """
    _check_on_gpu(model)
    weights = _weights(model)  # the kernel computes what they describe
    reason = KernelRows.refusal(model, config)
    if reason is None and not by_name:
        index = model.device.index
        assert index is not None
        plan = plan_for(model, config, places)
        if tokens < _WORTH_COMPILING and not has_compiled(kernel_name(plan, config), index):
            reason = (
                "it has not been compiled on this machine, which takes longer than so few tokens; decoder='kernel' "
                "compiles it for later calls, too"
            )
        else:
            reason = trial_refusal("decode", index, str(weights.head.dtype).removeprefix("torch."))
    if reason is not None:
        raise DecoderRefusedError(reason)
    return KernelRows(model, config, places, stop=stop, deadline=deadline)


def lean_step(model: LanguageModel, tokens: int) -> LeanStep:
    """A `LeanStep` of the model. Raises `DecoderRefusedError`."""
    weights = _weights(model)
    reason = lean_refusal(weights)
    if reason is not None:
        raise DecoderRefusedError(reason)
    return LeanStep(weights, tokens)


def graph_step(model: LanguageModel, places: int) -> GraphStep:
    """A `GraphStep` of the model. Raises `DecoderRefusedError`, or `GraphError` where the recording fails."""
    _check_on_gpu(model)
    _weights(model)  # a forward pass that they do not describe may do on the host what no graph records
    return GraphStep(model, places)


def _check_on_gpu(model: LanguageModel) -> None:
    if model.device.type != "cuda":
        raise DecoderRefusedError(f"it needs a CUDA GPU, and the model is on {model.device}")


def _weights(model: LanguageModel) -> StepWeights:
    described = getattr(model, "step_weights", None)
    weights = described() if callable(described) else f"{type(model).__name__} does not tell its step_weights()"
    if isinstance(weights, str):
        raise DecoderRefusedError(weights)
    return weights
