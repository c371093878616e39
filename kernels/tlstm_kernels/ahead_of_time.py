"""Compile the kernel of a plan for a GPU that need not be there, and read from the code what it will cost.

figures = compile_plan(plan, KNOWN_GPUS["H100"])
figures.registers, figures.spills, figures.shared_memory, figures.matrix_instructions
"""

from __future__ import annotations

import io
import re
from contextlib import redirect_stdout
from dataclasses import dataclass
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from .gpu import GPU
from .kernel_calls import compile_options, constants
from .launch_plan import LaunchPlan, PlanError
from .persistent_backward import persistent_backward_kernel
from .persistent_forward import persistent_forward_kernel
from .plan_choice import choose_plan

_TYPES = {"float16": "*fp16", "bfloat16": "*bf16", "float32": "*fp32"}
_ZONEOUT = {"zoneout_seed_ptr", "zoneout_h", "zoneout_c", "first_row"}
# In the plain call: no resets, no gradient of the cell sequence, no bound on waiting, every row of full length.
_ABSENT = {
    *("lengths_ptr", "resets_ptr", "h_reset_ptr", "c_reset_ptr", "error_ptr"),
    *("d_cells_ptr", "d_h_reset_ptr", "d_c_reset_ptr"),
}
_MATRIX_INSTRUCTIONS = {
    "wgmma": r"wgmma\.mma_async",
    "mma.sync": r"mma\.sync",
    "tcgen05": r"tcgen05\.mma",
    "mfma": r"v_mfma",
}


@dataclass(frozen=True)
class CompiledFigures:
    """What the compiler made of one plan."""

    target: str
    registers: int  # of one thread
    spills: int  # bytes of one thread that went to memory instead
    shared_memory: int  # bytes of one program
    matrix_instructions: str  # "wgmma 24", "mma.sync 48", ... as they stand in the code; empty for none
    weights_outside_loop: int  # tiles in shared memory before the loop over time begins


def compile_plan(plan: LaunchPlan, gpu: GPU, zoneout: bool = False) -> CompiledFigures:
    """Compile the kernel of `plan` for `gpu` as training calls it, without lengths; no GPU is used."""
    kernel = persistent_forward_kernel if plan.kernel == "forward" else persistent_backward_kernel
    fixed: dict[str, Any] = {**constants(plan), "H": plan.H, "N": plan.heads, "D": plan.D, "REVERSE": 0, "MAX_SPINS": 0}
    if plan.kernel == "backward":
        fixed["PRE_ACTIVATION"] = 0
    signature: dict[str, str] = {}
    for name in kernel.arg_names:
        absent = name in _ABSENT or ("_1_" in name and plan.D == 1) or (name in _ZONEOUT and not zoneout)
        if name in fixed or absent:
            signature[name] = "constexpr"
            fixed.setdefault(name, None)
        elif name.endswith("_ptr"):
            signature[name] = {"cells_ptr": "*fp32", "zoneout_seed_ptr": "*i64"}.get(name, _TYPES[plan.dtype])
        else:
            signature[name] = "i32"
    aligned = {(n,): [["tt.divisibility", 16]] for n, name in enumerate(kernel.arg_names) if signature[name][0] == "*"}
    return figures_of(
        ASTSource(fn=kernel, signature=signature, constexprs=fixed, attrs=aligned),
        gpu,
        compile_options(plan, gpu.is_amd),
    )


def settled_plan(
    kernel: str, H: int, B: int, dtype: str, gpu: GPU, precision: str = "ieee"
) -> tuple[LaunchPlan, CompiledFigures]:
    """The plan that a GPU settles on with this compiler (`plan_at_hand.with_plan`): the best one without spills."""
    excluded: frozenset[LaunchPlan] = frozenset()
    while True:
        plan = choose_plan(kernel, H, B, dtype, gpu, precision=precision, excluded=excluded)
        if plan.regime == "per_step":
            raise PlanError(f"every plan of {kernel}, H={H}, B={B}, {dtype} spills registers on {gpu.name}.")
        figures = compile_plan(plan, gpu)
        if not figures.spills and figures.shared_memory <= gpu.shared_memory:
            return plan, figures
        excluded |= {plan}


def figures_of(source: ASTSource, gpu: GPU, options: dict[str, Any]) -> CompiledFigures:
    """Compile a kernel's source for `gpu` and read the figures from the code."""
    arch: int | str = gpu.arch if gpu.is_amd else int(gpu.arch.removeprefix("sm_"))
    target = GPUTarget("hip" if gpu.is_amd else "cuda", arch, gpu.warp_size)
    log = io.StringIO()
    # What the assembler says of registers and spills is said only while it runs, so that no cache may answer for it.
    with triton.knobs.nvidia.scope(), triton.knobs.compilation.scope(), redirect_stdout(log):
        triton.knobs.nvidia.dump_ptxas_log = triton.knobs.compilation.always_compile = True
        compiled = triton.compile(source, target=target, options=options)
    return _figures(compiled, gpu, log.getvalue())


def _figures(compiled: Any, gpu: GPU, log: str) -> CompiledFigures:
    text = compiled.asm["amdgcn" if gpu.is_amd else "ptx"]
    counts = {name: len(re.findall(pattern, text)) for name, pattern in _MATRIX_INSTRUCTIONS.items()}
    registers, spills = _amd_resources(text) if gpu.is_amd else _nvidia_resources(log)
    return CompiledFigures(
        target=gpu.arch,
        registers=registers,
        spills=spills,
        shared_memory=compiled.metadata.shared,
        matrix_instructions=", ".join(f"{name} {count}" for name, count in counts.items() if count),
        weights_outside_loop=_before_the_loop_over_steps(compiled.asm["ttgir"]).count("ttg.local_alloc"),
    )


def _before_the_loop_over_steps(code: str) -> str:
    """What stands before the last loop that is inside no other one, without the loops in it."""
    outermost = [match.start() for match in re.finditer(r"^ {4}\S.* = scf\.for", code, re.MULTILINE)]
    return re.sub(r"^ {5,}.*\n", "", code[: outermost[-1]], flags=re.MULTILINE) if outermost else code


def _amd_resources(text: str) -> tuple[int, int]:
    def value(name: str) -> int:
        return int(re.findall(rf"\.{name}:\s+(\d+)", text)[-1])

    return value("vgpr_count"), 4 * value("vgpr_spill_count")


def _nvidia_resources(log: str) -> tuple[int, int]:
    """Registers, and bytes stored to memory for want of one, as the assembler reports them."""
    return int(re.findall(r"Used (\d+) registers", log)[-1]), int(re.findall(r"(\d+) bytes spill stores", log)[-1])
