"""The rule by which PyTorch selects cuDNN's algorithm, condition by condition."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from tlstm.benchmark.cudnn_rule import PERSISTENT, PERSISTENT_SMALL, STANDARD, select_algorithm
from tlstm.benchmark.runner import _algorithm
from tlstm.benchmark.workload import Workload

CALL = {"T": 512, "B": 16, "I": 768, "H": 768, "dtype": "float16"}  # meets every condition of the persistent kernel


def algorithm(**changes) -> str:
    return select_algorithm(**(CALL | changes)).algorithm


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dtype": "bfloat16"}, "bfloat16 is not float16"),
        ({"dtype": "float32"}, "float32 is not float16"),
        ({"dtype": "tf32"}, "tf32 is not float16"),
        ({"layers": 2}, "2 layers"),
        ({"bidirectional": True}, "bidirectional"),
        ({"packed": True}, "packed"),
        ({"proj_size": 64}, "projection"),
        ({"H": 1152}, "more than 1024"),
        ({"H": 650}, "H=650 is no multiple of 128"),
        ({"I": 65}, "I=65 is no multiple of 128"),
        ({"B": 12}, "B=12 is no multiple of 8"),
        ({"B": 1}, "B=1 is no multiple of 8"),
        ({"B": 136}, "B=136 is more than 128"),
        ({"capability": (8, 6)}, "compute capability 8.6"),
        ({"capability": (7, 5)}, "compute capability 7.5"),
        ({"multiprocessors": 56}, "56 multiprocessors"),
    ],
)
def test_one_unmet_condition_means_the_standard_algorithm(changes, reason):
    assert algorithm() == PERSISTENT
    selection = select_algorithm(**(CALL | changes))
    assert selection.algorithm == STANDARD
    assert reason in selection.reason
    assert str(selection) == f"standard ({selection.reason})"


@pytest.mark.parametrize("B", [8, 16, 24, 64, 128])
@pytest.mark.parametrize("H", [256, 384, 512, 1024])
def test_the_persistent_kernel_inside_its_bounds(H, B):
    for backward in (False, True):
        assert algorithm(H=H, B=B, backward=backward) == PERSISTENT


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "tf32"])
@pytest.mark.parametrize(("H", "forward", "backward"), [(128, True, True), (129, True, False), (192, True, False)])
def test_the_small_persistent_kernel_covers_any_batch(H, forward, backward, dtype):
    for B in (1, 7, 136):
        for in_backward, small in ((False, forward), (True, backward)):
            call = {"H": H, "B": B, "dtype": dtype, "layers": 3, "bidirectional": True, "backward": in_backward}
            assert (algorithm(**call) == PERSISTENT_SMALL) == small
    assert algorithm(H=193, B=7, dtype=dtype) == STANDARD
    assert algorithm(H=64, dtype="float64") == STANDARD
    assert algorithm(H=64, packed=True) == STANDARD
    assert algorithm(H=64, proj_size=8) == STANDARD


def test_a_volta_wants_certain_batches_and_long_sequences():
    volta = {"capability": (7, 0), "multiprocessors": 80}
    assert algorithm(**volta) == PERSISTENT
    assert algorithm(**volta, B=80) == STANDARD
    assert algorithm(**volta, B=24) == STANDARD
    assert algorithm(**volta, T=9) == STANDARD
    assert algorithm(**volta, T=20, B=128) == STANDARD


class OnH200:
    """As much of a problem on a GPU as the rule needs."""

    device = torch.device("cuda")

    def __init__(self, mode: str, dtype: str, H: int) -> None:
        self.mode, self.dtype_name, self.workload = mode, dtype, Workload(T=512, B=16, H=H, I=H)


def test_a_row_names_the_algorithm_of_what_it_timed(monkeypatch):
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda _: SimpleNamespace(major=9, minor=0, multi_processor_count=132)
    )
    found = {mode: _algorithm(OnH200(mode, "float16", 160)) for mode in ("forward", "backward", "train")}
    assert found["forward"] == "persistent-small"
    assert found["backward"] == "standard (H=160 is no multiple of 128)"
    assert found["train"] == f"forward: {found['forward']}; backward: {found['backward']}"
    assert {_algorithm(OnH200(mode, "float16", 768)) for mode in ("forward", "backward", "train")} == {"persistent"}
    assert _algorithm(OnH200("train", "bfloat16", 768)) == "standard (bfloat16 is not float16)"
