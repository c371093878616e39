"""The tuner with a fake timer: candidates that can run, no wrong plan written, and a table that the library reads."""

from __future__ import annotations

import json
from collections.abc import Sequence

import pytest
from tlstm_kernels import plan_choice, plan_table
from tlstm_kernels.gpu import KNOWN_GPUS
from tlstm_kernels.launch_plan import LaunchPlan
from tlstm_kernels.plan_choice import choose_plan, why_impossible

from benchmarks.tune_plans import Key, Trial, as_python, candidates, keys_of, main, pins_of, run, tune

H100 = KNOWN_GPUS["H100"]
KEY = Key("forward", "bfloat16", 768, 16)


@pytest.fixture
def own_table(monkeypatch):
    """Point TLSTM_PLAN_TABLE at a file."""

    def use(path) -> None:
        monkeypatch.setenv("TLSTM_PLAN_TABLE", str(path))
        forget()

    def forget() -> None:
        plan_table.plans_of_gpu.cache_clear()
        plan_choice._choose.cache_clear()

    yield use
    monkeypatch.delenv("TLSTM_PLAN_TABLE", raising=False)
    forget()


class FakeGpu:
    """Plans take what `us` says; the ones in `wrong` are refused. Remembers what it was asked for."""

    def __init__(self, us, wrong=lambda plan: False, until: int = 10**9) -> None:
        self.us, self.wrong, self.until, self.asked = us, wrong, until, []

    def __call__(self, key: Key, plans: Sequence[LaunchPlan]) -> list[Trial]:
        if len(self.asked) == self.until:
            raise KeyboardInterrupt
        self.asked.append(key)
        return [Trial(p, None, "WrongResultError: y") if self.wrong(p) else Trial(p, self.us(p)) for p in plans]


def test_candidates_begin_with_the_models_choice_and_can_all_run():
    found = candidates(KEY, H100, most=12)
    assert len(found) == 12
    assert found[0] == choose_plan(KEY.kernel, KEY.H, KEY.B, KEY.dtype, H100)
    assert len({tuple(pins_of(plan).items()) for plan in found}) == 12
    assert all(why_impossible(plan, H100) is None for plan in found)
    assert all((plan.H, plan.B, plan.kernel) == (768, 16, "forward") for plan in found)


def test_the_fastest_right_plan_wins_and_a_wrong_one_never():
    found = candidates(KEY, H100, most=6)
    times = {tuple(pins_of(plan).items()): us for plan, us in zip(found, (5.0, 1.0, 4.0, 3.0, 6.0, 7.0), strict=True)}
    gpu = FakeGpu(lambda p: times[tuple(pins_of(p).items())], wrong=lambda p: p == found[1])
    record = tune(KEY, H100, gpu, most=6, margin=0.02)
    assert record["plan"] == pins_of(found[3])
    assert (record["us"], record["model_us"], record["tried"]) == (3.0, 5.0, 6)
    assert len(record["refused"]) == 1
    assert "WrongResultError" in record["refused"][0]
    line = as_python([record])
    assert eval(f"{{{line.partition('#')[0]}}}") == {("sm_90", 132, "forward", "bfloat16", 768, 16): record["plan"]}


def test_no_entry_without_a_gain():
    chosen = candidates(KEY, H100, most=6)[0]
    gpu = FakeGpu(lambda p: 5.0 if p == chosen else 4.95)
    assert "plan" not in tune(KEY, H100, gpu, most=6, margin=0.02)
    assert "plan" in tune(KEY, H100, gpu, most=6, margin=0.005)
    assert "plan" not in tune(KEY, H100, FakeGpu(lambda p: 1.0, wrong=lambda p: True), most=6, margin=0.02)
    only_others = FakeGpu(lambda p: 9.0, wrong=lambda p: p == chosen)  # the model's choice itself does not run
    assert "plan" in tune(KEY, H100, only_others, most=6, margin=0.02)


def test_the_library_takes_its_plans_from_the_written_table(tmp_path, own_table):
    path = tmp_path / "plans.json"
    keys = [KEY, Key("backward", "bfloat16", 768, 16)]
    last = {key: pins_of(candidates(key, H100, most=5)[-1]) for key in keys}
    gpu = FakeGpu(lambda p: 1.0 if pins_of(p) in last.values() else 2.0)
    records = run(keys, H100, gpu, path, {}, most=5, margin=0.02)
    assert [record["plan"] for record in records] == list(last.values())
    own_table(path)
    for key in keys:
        plan = choose_plan(key.kernel, key.H, key.B, key.dtype, H100)
        assert plan.source == "measured"
        assert pins_of(plan) == last[key]
        assert choose_plan(key.kernel, key.H, key.B, key.dtype, KNOWN_GPUS["A100"]).source == "model"
        assert choose_plan(key.kernel, key.H, 17, key.dtype, H100).source == "model"  # more rows than measured
    assert choose_plan("forward", 768, 16, "float16", H100).source == "model"


def test_ctrl_c_keeps_what_is_done_and_the_next_run_goes_on(tmp_path):
    path = tmp_path / "plans.json"
    keys = [Key("forward", "bfloat16", H, 16) for H in (64, 128, 256)]
    first = FakeGpu(lambda p: 1.0, until=2)
    with pytest.raises(KeyboardInterrupt):
        run(keys, H100, first, path, {}, most=3, margin=0.02)
    second = FakeGpu(lambda p: 1.0)
    records = run(keys, H100, second, path, {}, most=3, margin=0.02)
    assert (first.asked, second.asked) == (keys[:2], keys[2:])
    assert [record["H"] for record in records] == [64, 128, 256]
    assert len(json.loads(path.read_text())["without_gain"]) == 3


def test_arguments(capsys):
    import argparse

    args = argparse.Namespace(H=[64], B=[1, 2], set=["capacity"], dtype=["bfloat16"])
    keys = keys_of(args)
    assert {(key.H, key.B) for key in keys} == {(64, 1), (64, 2), (1280, 16), (1536, 16), (1792, 16), (2048, 16)}
    assert {key.kernel for key in keys} == {"forward", "backward"}
    assert main(["--set", "capacity"]) == 2
    assert "torch sees none. Nothing was measured." in capsys.readouterr().err
