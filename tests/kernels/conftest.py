"""A GPU for tests that have none: the kernels run on CPU tensors, in Triton's interpreter, programs interleaved."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
from tlstm_kernels.gpu import KNOWN_GPUS


class InterpretedKernel:
    """Takes launches as a Triton kernel does, and runs them on CPU tensors."""

    def __init__(self, kernel, launches):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        def run(*arguments, launch_cooperative_grid, **options):
            from interleaving.grid import run_interleaved

            compilers = {"num_warps", "num_stages", "enable_fp_fusion", "maxnreg"}
            constants = {name: value for name, value in options.items() if name not in compilers}
            assert launch_cooperative_grid == (grid[0] > 1)
            self.launches.append(grid)
            named = dict(zip(self.kernel.arg_names, arguments, strict=False))
            run_interleaved(self.kernel, grid, len(self.launches), **named, **constants)
            return SimpleNamespace(n_spills=0)

        return run


@pytest.fixture
def gpu(monkeypatch):
    """A GPU of nine multiprocessors; gives the list of launched grids."""
    kernel_calls = pytest.importorskip("tlstm_kernels.kernel_calls", reason="needs triton")
    pytest.importorskip("greenlet", reason="the interleaved interpreter needs greenlet")
    grids: list[tuple[int, int, int]] = []
    small = replace(KNOWN_GPUS["H100"], name="small", multiprocessors=9)
    monkeypatch.setattr("tlstm_kernels.plan_at_hand.gpu_of", lambda index: small)
    for name in ("persistent_forward_kernel", "persistent_backward_kernel"):
        monkeypatch.setattr(kernel_calls, name, InterpretedKernel(getattr(kernel_calls, name), grids))
    return grids
