"""Compile the decode kernel of a plan for a GPU that need not be there, and read from the code what it will cost."""

from __future__ import annotations

from typing import Any

from triton.compiler import ASTSource

from .ahead_of_time import CompiledFigures, figures_of
from .decode import decode_kernel
from .decode_launch import compile_options
from .decode_shape import DecodePlan
from .gpu import GPU

_TYPES = {"float16": "*fp16", "bfloat16": "*bf16", "float32": "*fp32"}
_OTHER_TYPES = {
    **dict.fromkeys(("bias_ptr", "logits_ptr", "scores_ptr"), "*fp32"),
    **dict.fromkeys(("streams_in_ptr", "streams_out_ptr", "keys_ptr", "results_ptr"), "*i64"),
    **dict.fromkeys(("flags_ptr", "seen_ptr"), "*i8"),
    **dict.fromkeys(("steps", "B", "top_k"), "i32"),
    **dict.fromkeys(("penalty", "temperature", "tail", "log_min_p"), "fp32"),
}


def compile_decode_plan(plan: DecodePlan, gpu: GPU, penalty: bool = False) -> CompiledFigures:
    """Compile the kernel as generation calls it: with ends of streams, and with a repetition penalty or without."""
    absent = {"error_ptr", *(() if penalty else ("seen_ptr",))}
    absent |= {"logits_ptr"} if plan.mode == "reduce" else set()
    absent |= set() if plan.long_rows else {"scores_ptr"}
    absent |= set() if plan.keys else {"keys_ptr"}
    fixed: dict[str, Any] = {**plan.constants(), "MAX_SPINS": 0, **dict.fromkeys(absent)}
    signature = {
        name: "constexpr" if name in fixed else _OTHER_TYPES.get(name, _TYPES[plan.shape.dtype])
        for name in decode_kernel.arg_names
    }
    aligned = {
        (n,): [["tt.divisibility", 16]] for n, name in enumerate(decode_kernel.arg_names) if signature[name][0] == "*"
    }
    source = ASTSource(fn=decode_kernel, signature=signature, constexprs=fixed, attrs=aligned)
    return figures_of(source, gpu, compile_options(plan, gpu.is_amd))
