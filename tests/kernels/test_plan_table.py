"""A user's table of measured plans: what it overrules, and what is wrong with a wrong one."""

from __future__ import annotations

import json

import pytest
from tlstm_kernels import plan_choice
from tlstm_kernels.checks import ArgumentError
from tlstm_kernels.gpu import KNOWN_GPUS
from tlstm_kernels.launch_plan import PlanError
from tlstm_kernels.plan_choice import choose_plan
from tlstm_kernels.plan_table import FORMAT, plans_of_gpu, read_plan_table

H100 = KNOWN_GPUS["H100"]
ENTRY = {"arch": "sm_90", "multiprocessors": 132, "kernel": "forward", "dtype": "bfloat16", "H": 768, "B": 16}
PLAN = {"regime": "persistent", "units": 8, "rows": 16, "block_k": 256, "num_warps": 8, "split_k": 1, "keep_tile": 1}


@pytest.fixture
def table(tmp_path, monkeypatch):
    """Write a table and point the environment at it."""

    def write(*entries: object, text: str | None = None):
        path = tmp_path / "plans.json"
        path.write_text(json.dumps({"format": FORMAT, "entries": list(entries)}) if text is None else text)
        monkeypatch.setenv("TLSTM_PLAN_TABLE", str(path))
        forget()
        return path

    def forget() -> None:
        plans_of_gpu.cache_clear()
        plan_choice._choose.cache_clear()

    yield write
    monkeypatch.delenv("TLSTM_PLAN_TABLE", raising=False)
    forget()


def test_the_smallest_batch_that_covers_a_call_decides(table):
    table(ENTRY | {"plan": PLAN}, ENTRY | {"B": 64, "plan": PLAN | {"units": 16, "block_k": 128, "num_warps": 4}})
    assert choose_plan("forward", 768, 16, "bfloat16", H100).units == 8
    large = choose_plan("forward", 768, 33, "bfloat16", H100)
    assert (large.units, large.source) == (16, "measured")
    pinned = choose_plan("forward", 768, 16, "bfloat16", H100, pinned={"units": 16})
    assert (pinned.units, pinned.source) == (16, "pinned")  # pins come before any table


def test_an_own_table_comes_before_the_librarys(table, monkeypatch):
    key = ("sm_90", 132, "forward", "bfloat16", 768, 16)
    monkeypatch.setitem(plan_choice.MEASURED, key, PLAN | {"units": 16, "block_k": 128, "num_warps": 4})
    table()
    assert choose_plan("forward", 768, 16, "bfloat16", H100).units == 16
    table(ENTRY | {"plan": PLAN})
    assert choose_plan("forward", 768, 16, "bfloat16", H100).units == 8


def test_a_plan_that_cannot_run_leaves_the_choice_to_the_model(table):
    table(ENTRY | {"plan": PLAN | {"units": 4, "groups": 1}})  # 192 programs on 132 multiprocessors
    assert choose_plan("forward", 768, 16, "bfloat16", H100).source == "model"


def test_the_file_is_read_once_for_a_gpu(table):
    path = table(ENTRY | {"plan": PLAN})
    assert len(plans_of_gpu("sm_90", 132)) == 1
    path.unlink()
    assert len(plans_of_gpu("sm_90", 132)) == 1
    with pytest.raises(ArgumentError, match="expected a readable file"):
        plans_of_gpu("sm_80", 108)


def test_without_the_variable_there_is_no_table(monkeypatch):
    monkeypatch.delenv("TLSTM_PLAN_TABLE", raising=False)
    plans_of_gpu.cache_clear()
    assert plans_of_gpu("sm_90", 132) == {}


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([3], r"entry 0: expected an object; received 3"),
        ([ENTRY], r"entry 0: expected plan; received"),
        ([{"plan": PLAN}], r"entry 0: expected arch, multiprocessors, kernel, dtype, H, B; received \['plan'\]"),
        ([ENTRY | {"plan": PLAN, "H": "768"}], r"entry 0: expected H to be a whole number; received '768'"),
        ([ENTRY | {"plan": PLAN, "B": True}], r"entry 0: expected B to be a whole number; received True"),
        ([ENTRY | {"plan": PLAN | {"regime": 1}}], r"entry 0, plan: expected regime to be a string; received 1"),
        ([ENTRY | {"plan": {"warps": 4}}], r"entry 0, plan: expected fields among .*received warps"),
        ([ENTRY | {"plan": PLAN}] * 2, r"entry 1: expected one entry for .*received a second one"),
    ],
)
def test_a_wrong_entry_is_named(table, entries, message):
    path = table(*entries)
    with pytest.raises(ArgumentError, match=message):
        read_plan_table(path)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": "tlstm-plans-2", "entries": []}', '{"format": 3}'])
def test_a_file_that_is_no_table_is_refused(table, text):
    path = table(text=text)
    with pytest.raises(ArgumentError, match="TLSTM_PLAN_TABLE: expected"):
        read_plan_table(path)


def test_values_that_no_plan_has_are_refused_when_they_are_used(table):
    table(ENTRY | {"plan": PLAN | {"units": 12}})
    with pytest.raises(PlanError, match=r"expected units to be one of .*received 12"):
        choose_plan("forward", 768, 16, "bfloat16", H100)
