"""Plans compiled for GPUs that are not here: no spills, shared memory within the limit, matrix units, weights kept.

A few on every commit; the benchmark's whole table, for four targets, in the slow tier. Figures that were committed are
in benchmarks/results/compiled/.
"""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from tlstm_kernels.gpu import KNOWN_GPUS
from tlstm_kernels.plan_choice import choose_plan

pytest.importorskip("triton", reason="needs triton's compiler")
from tlstm_kernels.ahead_of_time import compile_plan, settled_plan

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "compiled"
TARGETS = {"A100": "mma.sync", "H100": "mma", "B200": ("mma.sync", "tcgen05"), "MI300X": "mfma"}
WIDTHS = (64, 128, 256, 512, 650, 768, 1024, 1536, 2048)


def check(name, kernel, H, B, dtype, precision="ieee"):
    gpu = KNOWN_GPUS[name]
    plan, figures = settled_plan(kernel, H, B, dtype, gpu, precision)
    described = f"{plan.describe()} {figures}"
    assert figures.spills == 0, described
    assert figures.registers <= 255, described
    assert figures.shared_memory <= gpu.shared_memory, described
    if dtype == "float32" and precision == "ieee" and not gpu.is_amd:
        assert not figures.matrix_instructions, described  # exact products use no matrix unit
    else:
        assert any(kind in figures.matrix_instructions for kind in ("mma", "tcgen05", "mfma")), described
    kept = 0 if plan.regime == "streamed" else plan.chunks
    assert figures.weights_outside_loop == kept, described


FEW = [
    ("H100", "forward", 768, 16, "bfloat16"),
    ("H100", "backward", 768, 16, "bfloat16"),
    ("H100", "forward", 64, 7, "float16"),
    ("A100", "backward", 650, 7, "float16"),
    ("A100", "forward", 256, 16, "float32"),
    ("B200", "forward", 1024, 16, "bfloat16"),
    ("MI300X", "forward", 512, 16, "bfloat16"),
    ("H100", "forward", 2048, 16, "bfloat16"),
]


@pytest.mark.parametrize("case", FEW, ids=lambda case: "-".join(map(str, case)))
def test_compiled_code(case):
    check(*case)


@pytest.mark.parametrize("case", FEW, ids=lambda case: "-".join(map(str, case)))
def test_the_plan_chosen_first_spills_nothing_and_zoneout_adds_nothing(case):
    """What is passed over costs a compilation; of the common sizes nothing should be."""
    name, kernel, H, B, dtype = case
    gpu = KNOWN_GPUS[name]
    plan = choose_plan(kernel, H, B, dtype, gpu)
    figures = compile_plan(plan, gpu, zoneout=True)
    assert figures.spills == 0, f"{plan.describe()} {figures}"
    assert figures.shared_memory <= gpu.shared_memory


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "tf32"])
@pytest.mark.parametrize("B", [7, 16, 64])
@pytest.mark.parametrize("H", WIDTHS)
@pytest.mark.parametrize("kernel", ["forward", "backward"])
@pytest.mark.parametrize("name", TARGETS)
def test_compiled_code_of_the_whole_table(name, kernel, H, B, dtype):
    if dtype == "tf32":
        check(name, kernel, H, B, "float32", "tf32")
    else:
        check(name, kernel, H, B, dtype)


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.csv")), ids=lambda path: path.stem)
def test_committed_figures_hold_no_spill_and_keep_the_limits(path):
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert rows
    for row in rows:
        assert int(row["spills"]) == 0, row
        assert int(row["shared_memory"]) <= int(row["shared_limit"]), row
