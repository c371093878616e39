"""The floor's kernels: right under random schedules, compilable for every target; its arithmetic with a fake meter."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("triton")

import triton
from interleaving.grid import run_interleaved
from tlstm_kernels.gpu import KNOWN_GPUS
from tlstm_kernels.plan_choice import choose_plan
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tlstm.benchmark import floor_kernels
from tlstm.benchmark.floor import (
    FloorMeter,
    Geometry,
    chain_constants,
    exchange_constants,
    geometry_of,
    hop_geometry,
)

H100 = KNOWN_GPUS["H100"]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("keep_tile", [0, 1])
def test_the_exchange_under_random_schedules(seed, keep_tile):
    T, B, K = 5, 3, 26
    buffer = torch.full((T, B, K), -1, dtype=torch.int32).view(torch.float32)
    run_interleaved(
        floor_kernels.exchange_kernel, (4, 2), seed,
        buffer_ptr=buffer, error_ptr=None, T=T, B=B, K=K, COLUMNS=8, BLOCK_B=2, BLOCK_K=16, KEEP_TILE=keep_tile,
        MAX_SPINS=0,
    )  # fmt: skip
    assert torch.equal(buffer, torch.arange(T, dtype=torch.float32)[:, None, None].expand(T, B, K))


def test_the_hop_is_the_exchange_of_two_programs():
    buffer = torch.full((7, 8, 32), -1, dtype=torch.int16).view(torch.float16)
    run_interleaved(
        floor_kernels.exchange_kernel, (2, 1), 1,
        buffer_ptr=buffer, error_ptr=None, T=7, B=8, K=32, COLUMNS=16, BLOCK_B=8, BLOCK_K=32, KEEP_TILE=1, MAX_SPINS=0,
    )  # fmt: skip
    assert torch.equal(buffer[:, 0, 0], torch.arange(7, dtype=torch.float16))


@pytest.mark.parametrize(("chunks", "held"), [(2, 2), (3, 1)])
def test_the_chain_multiplies_every_chunk_at_every_step(chunks, held):
    M, K, BLOCK_B, BLOCK_K, T = 16, 26, 4, 16, 3
    w, h = torch.randn(M, K), torch.randn(BLOCK_B, BLOCK_K)
    z = torch.full((2, M, BLOCK_B), math.nan)
    run_interleaved(
        floor_kernels.chain_kernel, (2,), 0,
        w_ptr=w, h_ptr=h, z_ptr=z, T=T, K=K, M=M, CHUNKS=chunks, HELD=held, BLOCK_B=BLOCK_B, BLOCK_K=BLOCK_K,
        INPUT_PRECISION="ieee",
    )  # fmt: skip
    first, second = w[:, :16], torch.nn.functional.pad(w[:, 16:], (0, 6))
    total = first + second if held == 2 else 3 * first
    assert torch.allclose(z, (T * total @ h.T).expand(2, -1, -1), rtol=1e-5, atol=1e-5)


def test_the_empty_loop_runs_all_its_steps():
    out = torch.full((2, 32), math.nan)
    run_interleaved(floor_kernels.loop_kernel, (2,), 0, out_ptr=out, T=11, factor=1.0, summand=0.5, LANES=32)
    assert (out == 5.5).all()


SHAPES = [
    ("forward", 768, 16),
    ("forward", 64, 16),
    ("backward", 768, 16),
    ("forward", 2048, 16),
    ("backward", 1024, 64),
]


@pytest.mark.parametrize(
    ("shape", "gpu"), [*((shape, "H100") for shape in SHAPES), (SHAPES[0], "A100"), (SHAPES[0], "B200")], ids=str
)
def test_the_parts_compile_ahead_of_time(shape, gpu):
    kernel, H, B = shape
    g = geometry_of(choose_plan(kernel, H, B, "bfloat16", KNOWN_GPUS[gpu]))
    for part, fixed in (
        ("exchange_kernel", {"error_ptr": None, **exchange_constants(g)}),
        ("exchange_kernel", {"error_ptr": None, **exchange_constants(hop_geometry(g))}),
        ("chain_kernel", chain_constants(g)),
        ("loop_kernel", {"LANES": 128}),
    ):
        function = getattr(floor_kernels, part)
        types = {"z_ptr": "*fp32", "out_ptr": "*fp32", "factor": "fp32", "summand": "fp32", "T": "i32", "B": "i32"}
        signature = {n: "constexpr" if n in fixed else types.get(n, "*bf16") for n in function.arg_names}
        pointers = [n for n, name in enumerate(function.arg_names) if signature[name][0] == "*"]
        attrs = {(n,): [["tt.divisibility", 16]] for n in pointers}
        source = ASTSource(fn=function, signature=signature, constexprs=fixed, attrs=attrs)
        target = GPUTarget("cuda", int(KNOWN_GPUS[gpu].arch.removeprefix("sm_")), 32)
        compiled = triton.compile(source, target=target, options={"num_warps": g.num_warps, "num_stages": 1})
        assert compiled.metadata.shared <= KNOWN_GPUS[gpu].shared_memory
        ptx = compiled.asm["ptx"]
        if part == "chain_kernel":  # products in the loop, weights outside
            assert any(name in ptx for name in ("wgmma.mma_async", "mma.sync", "tcgen05.mma"))
            assert compiled.asm["ttgir"].partition("scf.for")[0].count("ttg.local_alloc") >= g.held
        if part == "exchange_kernel":
            assert "ld.volatile" in ptx


class FakeMeter(FloorMeter):
    """Hop 0.5, exchange 1, chain 0.25 and loop 0.01 microseconds, and what was asked for."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, Geometry]] = []
        super().__init__(self._fake)

    def _fake(self, part: str, geometry: Geometry) -> float:
        self.asked.append((part, geometry))
        return {"hop": 0.5, "exchange": 1.0, "chain": 0.25, "loop": 0.01}[part]


def test_the_floor_of_a_plan_is_its_exchange_and_its_chain():
    meter, plan = FakeMeter(), choose_plan("forward", 768, 16, "bfloat16", H100)
    assert meter.of_plan(plan).total == 1.25 * plan.launches
    assert meter.of_plan(plan) == meter.of_plan(plan)
    assert [part for part, _ in meter.asked] == ["exchange", "chain"]  # each measured once
    geometry = meter.asked[0][1]
    assert (geometry.columns, geometry.programs, geometry.sent) == (768, plan.programs, plan.units)
    backward = geometry_of(choose_plan("backward", 768, 16, "bfloat16", H100))
    assert (backward.columns, backward.sent) == (4 * 768, 4 * backward.products)


def test_one_program_exchanges_nothing_and_several_launches_add_up():
    meter = FakeMeter()
    alone = choose_plan("forward", 64, 16, "bfloat16", H100, pinned={"regime": "single"})
    assert meter.of_plan(alone).exchange == 0.01 * alone.launches
    many = choose_plan("forward", 1024, 4096, "bfloat16", H100)
    assert many.launches > 1
    assert meter.of_plan(many).total == pytest.approx(1.25 * many.launches)
    assert meter.of_plan(choose_plan("forward", 7, 3, "float64", H100)) is None


def test_a_part_that_cannot_be_measured_leaves_the_floor_open():
    def measure(part: str, geometry: Geometry) -> float:
        if part == "chain":
            raise RuntimeError("out of resources")
        return 1.0

    meter, plan = FloorMeter(measure), choose_plan("forward", 768, 16, "bfloat16", H100)
    assert meter.of_plan(plan) is None
    assert meter.of_plan(plan) is None
    assert meter.errors == ["chain: RuntimeError: out of resources"]  # tried once


@pytest.mark.parametrize("H", [64, 650, 768, 1150, 2048, 4096])
@pytest.mark.parametrize("kernel", ["forward", "backward"])
def test_the_chain_of_every_regime_fits_on_the_chip(kernel, H):
    """Weights that the kernel streams are not held by the floor either."""
    plan = choose_plan(kernel, H, 16, "bfloat16", H100)
    g = geometry_of(plan)
    assert g.held == (1 if plan.regime == "streamed" else g.chunks)
    assert g.held * g.block_k * g.products * 2 <= H100.shared_memory
