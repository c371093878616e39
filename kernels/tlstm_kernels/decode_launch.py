"""Streams of tokens from the decode kernel: state on the GPU, launches of some steps each, results as they come.

A `DecodeSession` holds what one launch leaves for the next. `launch()` queues the next steps without waiting for the
GPU; the `Chunk` it returns waits when its tokens are asked for, and knows the state of every stream after each of its
steps. So the host can queue the next chunk, read this one meanwhile, and go back to any token of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources

from .decode import STREAM_FIELDS, decode_kernel
from .decode_shape import DecodePlan
from .decode_weights import PackedWeights
from .kernel_calls import ExchangeError
from .launch_options import current_options
from .launch_plan import PlanError

FORBIDDEN, ENDS = 1, 2  # what `flags` says of a token
ACTIVE = STREAM_FIELDS.index("active")
Launcher = Callable[..., None]
# Plans whose compiled kernel turned out to need more than the GPU has: the estimates they were chosen by were too low.
too_large: set[DecodePlan] = set()


class PlanTooLargeError(PlanError):
    """The compiled kernel of a plan does not fit; it is in `too_large` now, so choose another one."""


@dataclass(frozen=True)
class ChoiceSettings:
    """The numbers behind a choice. What is off has the value that changes nothing."""

    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    log_min_p: float = 0.0


class Chunk:
    """The steps of one launch. Each stream makes a token in every step until it has ended.

    Attributes:
        steps: how many.
        h, c: (steps, B, STRIDE), the state after each step; unspecified where a stream made no token.
    """

    def __init__(self, h: Tensor, c: Tensor, results: Tensor, check: Callable[[], None]) -> None:
        self.steps, self.h, self.c, self._check = len(results), h, c, check
        self._event: torch.cuda.Event | None = None
        self._keys = results
        if results.is_cuda:
            self._keys = torch.empty_like(results, device="cpu", pin_memory=True)
            self._keys.copy_(results, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def _arrived(self) -> Tensor:
        if self._event is not None:
            self._event.synchronize()
            self._event = None
            self._check()
        return self._keys

    def tokens(self) -> Tensor:
        """(steps, B) int64 on the CPU: token ids, -1 where a stream had ended; waits for the GPU."""
        keys = self._arrived()
        return torch.where(keys == -1, -1, 0x7FFFFFFF - (keys & 0x7FFFFFFF))

    def scores(self) -> Tensor:
        """(steps, B) float32: what each token was chosen by. Not finite: there was none to choose, or NaN came up."""
        bits = (self._arrived() >> 32).to(torch.int32)
        return torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).view(torch.float32)


class DecodeSession:
    """B slots, each of which holds a stream or is free.

    Args:
        plan: with `streams` = B.
        flags: (V,) int8 of FORBIDDEN and ENDS, or None.
        launcher: runs the kernel; tests put the interpreter here.
    """

    def __init__(
        self,
        plan: DecodePlan,
        weights: PackedWeights,
        settings: ChoiceSettings,
        flags: Tensor | None = None,
        launcher: Launcher | None = None,
    ) -> None:
        self.plan, self._weights, self._settings, self._flags = plan, weights, settings, flags
        self._launcher = launcher or self._launch_on_gpu
        self._max_spins = current_options().max_spins
        B, like = plan.streams, weights.w
        self._h, self._c = (like.new_zeros(B, plan.shape.stride) for _ in range(2))
        self._streams = like.new_zeros(len(STREAM_FIELDS), B, dtype=torch.int64)
        self._seen: Tensor | None = None
        if settings.repetition_penalty != 1.0:
            self._seen = like.new_zeros(B, plan.shape.vocab_size, dtype=torch.int8)

    def place(
        self,
        slots: Sequence[int],
        h: Sequence[Tensor],  # per layer (n, H)
        c: Sequence[Tensor],
        fields: Mapping[str, Sequence[int]],  # STREAM_FIELDS, n numbers each
        texts: Sequence[Tensor] = (),  # per stream its token ids so far, where a repetition penalty looks at them
    ) -> None:
        """Put streams into slots, in place of what was there, from the next launch on."""
        device = self._h.device
        index = torch.tensor(slots, device=device)
        for start, width, h_rows, c_rows in zip(self.plan.shape.columns, self.plan.shape.widths, h, c, strict=False):
            self._h[index, start : start + width] = h_rows.to(self._h)
            self._c[index, start : start + width] = c_rows.to(self._c)
        rows = torch.tensor([list(fields[name]) for name in STREAM_FIELDS], dtype=torch.int64)
        self._streams[:, index] = rows.to(device)
        if self._seen is not None:
            self._seen[index] = 0
            for slot, ids in zip(slots, texts, strict=True):
                self._seen[slot, ids.to(device)] = 1

    def release(self, slots: Sequence[int]) -> None:
        """Nothing more for these streams."""
        self._streams[ACTIVE, torch.tensor(slots, device=self._streams.device)] = 0

    def launch(self, steps: int) -> Chunk:
        """Queue the next `steps` tokens of every active stream."""
        plan, weights, settings, like = self.plan, self._weights, self._settings, self._h
        B, shape = plan.streams, plan.shape
        h = _unwritten(like, steps, B, shape.stride)
        c, h_out, c_out = like.new_empty(steps, B, shape.stride), torch.empty_like(like), torch.empty_like(like)
        results = like.new_empty(steps, B, dtype=torch.int64)
        streams_out = torch.empty_like(self._streams)
        keys = logits = scores = errors = None
        if plan.keys:
            keys = like.new_full((steps, B, plan.keys), -1, dtype=torch.int64)
        if plan.mode != "reduce":
            logits = _unwritten(like.float(), steps, B, plan.row_stride)
        if plan.long_rows:
            scores = _unwritten(like.float(), steps, B, plan.row_stride)
        if self._max_spins:
            errors = like.new_zeros(plan.programs * plan.groups, 4, dtype=torch.int32)
        self._launcher(
            decode_kernel,
            plan.grid,
            w_ptr=weights.w,
            bias_ptr=weights.bias,
            table_ptr=weights.table,
            head_ptr=weights.head,
            head_bias_ptr=weights.head_bias,
            h_in_ptr=self._h,
            c_in_ptr=self._c,
            h_out_ptr=h_out,
            c_out_ptr=c_out,
            streams_in_ptr=self._streams,
            streams_out_ptr=streams_out,
            flags_ptr=self._flags,
            seen_ptr=self._seen,
            h_ptr=h,
            c_ptr=c,
            logits_ptr=logits,
            scores_ptr=scores,
            keys_ptr=keys,
            results_ptr=results,
            error_ptr=errors,
            steps=steps,
            B=B,
            penalty=settings.repetition_penalty,
            temperature=settings.temperature,
            top_k=settings.top_k,
            tail=1.0 - settings.top_p,
            log_min_p=settings.log_min_p,
            MAX_SPINS=self._max_spins,
            **plan.constants(),
        )
        self._h, self._c, self._streams = h_out, c_out, streams_out

        def check() -> None:
            if errors is not None:
                _raise_if_stuck(errors, plan)

        return Chunk(h, c, results, check)

    def _launch_on_gpu(self, kernel: Any, grid: tuple[int, int], **arguments: Any) -> None:
        plan = self.plan
        with torch.cuda.device_of(self._h):
            try:
                kernel[grid](**arguments, **compile_options(plan, torch.version.hip is not None))
            except OutOfResources as error:
                too_large.add(plan)
                raise PlanTooLargeError(f"plan: the compiled decode kernel does not fit: {error}") from error
            except RuntimeError as error:
                if "cooperative" not in str(error):
                    raise
                raise PlanError(
                    f"plan: expected {grid} programs to fit on the GPU at the same time; received the driver's "
                    f"refusal: {error}. Is the GPU shared or partitioned? Generate fewer streams at a time."
                ) from error


def compile_options(plan: DecodePlan, is_amd: bool = False) -> dict[str, Any]:
    """The options of Triton's compiler. A grid that waits for itself is launched as a whole: what does not fit on the
    GPU at once is refused, not stuck.
    """
    # One program runs on each multiprocessor, so that its threads may have all the registers there are: the assembler
    # would rather spill some than pass what allows for a second program.
    registers = {} if is_amd else {"maxnreg": 255}
    return {
        "num_warps": plan.num_warps,
        "num_stages": 1,
        "launch_cooperative_grid": plan.programs > 1,
        "enable_fp_fusion": True,  # said, because Triton's own default for it is about to change
        **registers,
    }


def _unwritten(like: Tensor, *shape: int) -> Tensor:
    """A tensor of `like`'s dtype full of the sentinel, all bits one."""
    bits = torch.int16 if like.element_size() == 2 else torch.int32
    return like.new_full(shape, -1, dtype=bits).view(like.dtype)


def _raise_if_stuck(errors: Tensor, plan: DecodePlan) -> None:
    stuck = errors[:, 0].nonzero().flatten().tolist()
    if not stuck:
        return
    first = min(stuck, key=lambda program: int(errors[program, 0]))
    stage, _, column = (int(value) for value in errors[first, :3])
    step, part = divmod(stage - 1, plan.shape.layers + 1)
    what = f"h of layer {part}" if part < plan.shape.layers else "what chooses the token"
    raise ExchangeError(
        f"{len(stuck)} of {len(errors)} programs gave up waiting. The first: program {first % plan.programs} of group "
        f"{first // plan.programs}, in step {step}, for {what}, near column {column}."
    )
