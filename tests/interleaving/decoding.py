"""Language models generating through the decode kernel on a CPU, in the interpreter, beside the loop in Python.

The two compute the same equations with roundings of their own. Tokens are equal where no choice is so close that
rounding decides it, which `margin` measures: models with a closer choice are passed over.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from tlstm_kernels.decode_shape import DecodePlan
from torch import Tensor

from tlstm import LSTMConfig, LSTMForCausalLM
from tlstm.generation.gpu_model import choice_of, shape_of
from tlstm.generation.inputs import resolve_config
from tlstm.generation.kernel_rows import KernelRows
from tlstm.generation.loop import DecodeLoop
from tlstm.generation.philox import seed_words, token_noise
from tlstm.generation.state import GenerationState

from .grid import run_interleaved

SEED = 2**63 + 12345  # more than a signed word holds


@dataclass
class DecodeCase:
    """A model, a request, and the tiles to cut the kernel into."""

    widths: tuple[int, ...] = (7,)
    V: int = 13
    B: int = 1
    dtype: torch.dtype = torch.float32
    model: dict[str, Any] = field(default_factory=dict)  # settings of LSTMConfig
    settings: dict[str, Any] = field(default_factory=dict)  # of generate
    steps: int = 4
    chunk: int = 3
    programs: int = 2
    rows: int = 1
    block_k: int = 8
    block_v: int = 16
    keep_tile: int = 1
    split_k: int = 1
    filter_block: int = 4096
    on_chip: tuple[bool, ...] | None = None  # None: all that may be
    mode: str | None = None  # None: "reduce", or "owner" for what looks at whole rows of logits
    slots: int | None = None  # None: one for each text

    def make_model(self, seed: int = 0) -> LSTMForCausalLM:
        torch.manual_seed(seed)
        config = LSTMConfig(
            self.V, **{"layer_sizes": list(self.widths), "embedding_size": 5, "initializer_range": 1.0, **self.model}
        )
        return LSTMForCausalLM(config).eval().to(self.dtype)

    def config(self, model: LSTMForCausalLM) -> Any:
        given: dict[str, Any] = {"max_new_tokens": self.steps, "pad_token_id": 0, **self.settings}
        if given.get("do_sample"):
            given.setdefault("seed", [SEED + text for text in range(self.B)])
        return resolve_config(None, model.generation_config, model.config, given)

    def plan(self, model: LSTMForCausalLM) -> DecodePlan:
        choice, shape = choice_of(self.config(model)), shape_of(model)
        slots = self.slots or self.B
        head_fits = -(-self.V // self.block_v) <= self.programs
        on_chip = self.on_chip or (True,) * (2 * shape.layers - 1) + (head_fits,)
        mode = self.mode or ("owner" if choice.filters else "reduce")
        return DecodePlan(
            shape, choice, slots, self.programs, self.rows, self.block_k, self.block_v, 4, self.keep_tile, on_chip,
            mode, self.split_k, self.filter_block,
        )  # fmt: skip

    def prompts(self) -> list[list[int]]:
        return [[(3 * text + place) % self.V for place in range(1 + text % 3)] for text in range(self.B)]


@dataclass
class Run:
    """What came out."""

    tokens: list[list[int]]
    reasons: list[str]
    state: GenerationState


def decoder_of(
    case: DecodeCase,
    model: LSTMForCausalLM,
    seed: int,
    *,
    start: GenerationState | None = None,
    launch_options: dict[str, Any] | None = None,
    **options: Any,
) -> DecodeLoop:
    """The decoder, its kernel under one schedule. `options` are those of KernelRows."""
    config = case.config(model)
    if start is None:
        start = model.prefill(case.prompts())
        if config.do_sample:
            start = replace(start, seeds=tuple(config.seed))
    return DecodeLoop(kernel_rows(case, model, seed, launch_options, **options), start, config)


def kernel_rows(
    case: DecodeCase, model: LSTMForCausalLM, seed: int, launch_options: dict[str, Any] | None = None, **options: Any
) -> KernelRows:
    """Rows of the kernel, under one schedule."""
    launcher, plan = partial(run_interleaved, seed=seed, **(launch_options or {})), case.plan(model)
    return KernelRows(
        model, case.config(model), plan.streams, plan=plan, launcher=launcher, chunk=case.chunk, **options
    )


def with_kernel(case: DecodeCase, model: LSTMForCausalLM, seed: int, steps: int | None = None, **options: Any) -> Run:
    """What the decoder makes: in so many steps where that is given, else token by token, or for odd seeds at once."""
    decoder, done = decoder_of(case, model, seed, **options), 0
    if steps is None and seed % 2:
        decoder.run()
    while not decoder.finished and (steps is None or done < steps):
        decoder.step()
        done += 1
    return Run(decoder.new_tokens, list(decoder.finish_reasons), decoder.state())


def clear_case(case: DecodeCase) -> tuple[LSTMForCausalLM, Run]:
    """A model whose choices are all clear, and what the loop in Python makes with it."""
    for seed in range(50):
        model = case.make_model(seed)
        config = case.config(model).replace(return_dict_in_generate=True, output_scores=True)
        output = model.generate(case.prompts(), generation_config=config)
        if margin(case, config, output) > (0.02 if case.dtype == torch.float16 else 1e-4):
            return model, Run(output.new_tokens, output.finish_reasons, output.state)
    raise AssertionError("every model had a close choice")


def margin(case: DecodeCase, config: Any, output: Any) -> float:
    """How far the best score of any step was above the next one."""
    smallest = torch.inf
    for text, prompt in enumerate(case.prompts()):
        for step in range(len(output.new_tokens[text])):
            scores = output.scores[step][text]
            if config.do_sample:
                scores = scores + noise(config.seed[text], len(prompt) + step, case.V)
            best, second = scores.topk(2).values.tolist()
            smallest = min(smallest, best - second)
    return smallest


def noise(seed: int, position: int, V: int) -> Tensor:
    one = torch.zeros(1, dtype=torch.int64)
    return token_noise(seed_words([seed]), one + position, one, V)[0]


def assert_same(found: Run, expected: Run, dtype: torch.dtype) -> None:
    """Tokens and reasons are equal; states within rounding."""
    assert found.tokens == expected.tokens
    assert found.reasons == expected.reasons
    tolerance = 4 * torch.finfo(dtype).eps
    for kind in ("h", "c"):
        for a, b in zip(getattr(found.state.recurrent, kind), getattr(expected.state.recurrent, kind), strict=True):
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
    for a, b in zip(found.state.tokens, expected.state.tokens, strict=True):
        assert torch.equal(a, b)
