"""The masks that a kernel draws, bit for bit those of torch."""

from __future__ import annotations

import pytest
import torch
from tlstm_kernels.zoneout import Zoneout, kept_units

pytest.importorskip("triton", reason="needs triton's interpreter")
import triton
import triton.language as tl
from interleaving.grid import run_interleaved
from tlstm_kernels import zoneout_kernel


@triton.jit
def masks(
    seed_ptr, limit_h, limit_c, first_row, first_unit, backwards, out_h_ptr, out_c_ptr,
    UNITS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Program t writes what step t keeps of h and of c: (T, ROWS, UNITS)."""
    rows, units = tl.arange(0, ROWS), tl.arange(0, UNITS)
    kept_h, kept_c = zoneout_kernel.kept_units(
        seed_ptr, limit_h, limit_c, tl.program_id(0), first_row + rows, first_unit + units, backwards
    )
    at = tl.program_id(0) * ROWS * UNITS + rows[None, :] * UNITS + units[:, None]
    tl.store(out_h_ptr + at, kept_h)
    tl.store(out_c_ptr + at, kept_c)


@pytest.mark.parametrize("backwards", [0, 1])
@pytest.mark.parametrize("seed", [0, -1, 2**62 + 3, -(2**63)])
@pytest.mark.parametrize("p", [(0.0, 1.0), (0.5, 2.0**-24), (0.1, 0.9)])
def test_a_kernels_masks_are_torchs(p, seed, backwards):
    steps, (first_row, rows), (first_unit, units) = 3, (5, 4), (13, 8)
    zoneout = Zoneout(*p, torch.tensor(seed))
    out_h, out_c = torch.full((2, steps, rows, units), -1.0)
    run_interleaved(
        masks, (steps,), seed_ptr=zoneout.seed, limit_h=zoneout.limits[0], limit_c=zoneout.limits[1],
        first_row=first_row, first_unit=first_unit, backwards=backwards, out_h_ptr=out_h, out_c_ptr=out_c,
        UNITS=units, ROWS=rows,
    )  # fmt: skip
    shape = (steps, first_row + rows, first_unit + units)
    kept_h, kept_c = kept_units(zoneout, shape, shape[2], reverse=bool(backwards))
    assert torch.equal(out_h.bool(), kept_h[:, first_row:, first_unit:])
    assert torch.equal(out_c.bool(), kept_c[:, first_row:, first_unit:])
    assert set(out_h.unique().tolist()) <= {0.0, 1.0}
