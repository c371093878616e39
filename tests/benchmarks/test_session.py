"""A run over a set: columns, ratios, resumption after Ctrl-C, and figures of a CPU that say so."""

from __future__ import annotations

import json
from collections.abc import Sequence

import pytest
import torch

from tlstm.benchmark import session
from tlstm.benchmark.results import COLUMNS, Table, key_of, read_rows
from tlstm.benchmark.runner import measure
from tlstm.benchmark.session import Settings, describe_rows, exit_code, run_set
from tlstm.benchmark.sets import SETS, WorkloadSet
from tlstm.benchmark.workload import Workload

TINY = (Workload(T=5, B=3, H=7, I=4), Workload(T=2, B=1, H=9, I=9), Workload(T=3, B=2, H=5, I=5, resets=0.5))


@pytest.fixture(autouse=True)
def tiny_set(monkeypatch):
    monkeypatch.setitem(SETS, "tiny", WorkloadSet("tiny", "sizes for tests", TINY))
    monkeypatch.setattr(session, "commit_of", lambda root: "0123456789")


def settings(**changes) -> Settings:
    return Settings("cpu", seconds=0.001, full_size=True, **changes)


def test_rows_of_a_real_run(tmp_path):
    shown = []
    table = run_set("tiny", settings(modes=("forward", "train")), tmp_path, show=shown.append)
    assert table.path == tmp_path / "tiny-0123456789.csv"
    rows = read_rows(table.path)
    assert rows == table.rows
    assert set(rows[0]) == set(COLUMNS)
    assert len(shown) == 6  # three workloads in two modes
    names = {"tlstm", "tlstm:reference", "torch", "torch-loop"}
    assert {row["provider"] for row in rows} == names | {"tlstm:native", "tlstm:recompute"}
    assert {row["mode"] for row in rows if row["provider"] == "tlstm:recompute"} == {"train"}
    assert {(row["device"], row["machine"], row["set"]) for row in rows} == {("cpu", "cpu", "tiny")}
    for row in rows:
        if row["provider"] == "torch" and row["resets"] == "0.5":
            assert row["status"] == "unavailable"
            continue
        assert row["status"] == "ok", row
        assert float(row["ms_p20"]) <= float(row["ms_p50"]) <= float(row["ms_p80"])
        assert float(row["us_per_step"]) == pytest.approx(1e3 * float(row["ms_p50"]) / int(row["T"]), rel=1e-4)
        without = 1e3 * (float(row["ms_p50"]) - float(row["input_ms"])) / int(row["T"])
        assert float(row["us_per_step_without_input"]) == pytest.approx(without, rel=1e-3, abs=1e-4)
        assert 0 <= float(row["error_share"]) <= 1
        assert row["baseline"] == ("tlstm:native" if row["resets"] == "0.5" else "torch")
        assert (row["saved_bytes"] != "") == (row["mode"] == "train")
        assert row["floor_us_per_step"] == row["times_floor"] == row["cudnn_algorithm"] == ""  # of a GPU
        if row["provider"] == row["baseline"]:
            assert float(row["speedup_p50"]) == 1
    about = json.loads(table.path.with_suffix(".json").read_text())
    assert about["complete"] is True
    assert about["device"] == about["machine"] == "cpu"
    assert about["torch"] == torch.__version__
    assert about["source"] == "sizes for tests"
    assert exit_code([table]) == 0
    assert "on the cpu" in describe_rows(rows[:4])


def test_saved_bytes_are_what_autograd_keeps(tmp_path):
    """Of `y = (x * a).sigmoid()`: x is the input, a a parameter; the sigmoid keeps its result."""
    from tlstm.benchmark.memory import memory_of
    from tlstm.benchmark.problem import Problem
    from tlstm.benchmark.providers import Built

    problem = Problem(TINY[0], "train", "float32", "cpu")
    a = torch.ones(4, requires_grad=True)
    problem.d_ys[0] = torch.ones(5, 3, 4)
    built = Built(lambda x: (x * a).sigmoid(), {"a": a})
    assert memory_of(built, problem) == {"saved_bytes": 5 * 3 * 4 * 4}


class Interrupted:
    """Measures until the n-th workload, then Ctrl-C; counts what it was asked for."""

    def __init__(self, after: int) -> None:
        self.after, self.asked = after, []

    def __call__(self, workload: Workload, mode: str, dtype: str, names: Sequence[str], *rest) -> list[dict]:
        if len(self.asked) == self.after:
            raise KeyboardInterrupt
        self.asked.append((mode, workload))
        return measure(workload, mode, dtype, names, *rest)


def test_ctrl_c_keeps_the_rows_and_the_next_run_goes_on(tmp_path):
    wanted = settings(modes=("forward", "train"), providers=("tlstm:reference", "torch-loop"))
    first = Interrupted(after=4)
    with pytest.raises(KeyboardInterrupt):
        run_set("tiny", wanted, tmp_path, measure_one=first)
    path = tmp_path / "tiny-0123456789.csv"
    kept = read_rows(path)
    assert len(kept) == 4 * 2
    assert json.loads(path.with_suffix(".json").read_text())["complete"] is False

    second = Interrupted(after=99)
    table = run_set("tiny", wanted, tmp_path, measure_one=second)
    assert set(first.asked) & set(second.asked) == set()
    assert set(first.asked) | set(second.asked) == {(mode, w) for mode in ("forward", "train") for w in TINY}
    assert table.rows[: len(kept)] == kept
    assert json.loads(path.with_suffix(".json").read_text())["complete"] is True
    assert not list(tmp_path.glob("*.part"))

    third = Interrupted(after=99)
    run_set("tiny", wanted, tmp_path, measure_one=third)
    assert third.asked == []
    fresh = Interrupted(after=99)
    run_set("tiny", settings(modes=("forward",), providers=("torch",), resume=False), tmp_path, measure_one=fresh)
    assert len(fresh.asked) == 3
    more = Interrupted(after=99)  # a provider that was not asked for before: its workloads are measured again, together
    run_set("tiny", settings(modes=("forward",), providers=("torch", "torch-loop")), tmp_path, measure_one=more)
    assert len(more.asked) == 3


def test_a_time_limit_ends_a_set_between_workloads(tmp_path):
    wanted = settings(modes=("forward",), providers=("torch-loop",), time_limit=0)
    first = Interrupted(after=99)
    table = run_set("tiny", wanted, tmp_path, measure_one=first)
    assert (first.asked, table.about["complete"]) == ([], False)
    rest = Interrupted(after=99)
    assert run_set("tiny", settings(modes=("forward",), providers=("torch-loop",)), tmp_path, measure_one=rest).rows
    assert [w for _, w in rest.asked] == list(TINY)  # the first ones of a set first


def test_what_failed_is_tried_again(tmp_path):
    row = {"set": "tiny", "mode": "forward", "dtype": "float32", **TINY[0].to_row(), "provider": "torch"}
    table = Table(tmp_path / "t.csv", {})
    for status, finished in (("failed", False), ("wrong", True), ("unavailable", True), ("ok", True)):
        table.add([row | {"status": status}])
        assert table.finished(key_of(row), ["torch"]) == finished
        assert len(table.rows) == 1
    assert not table.finished(key_of(row), ["torch", "tlstm"])


def test_a_wrong_provider_of_ours_is_an_exit_code(tmp_path):
    table = Table(None, {})
    row = {
        "set": "tiny",
        "mode": "forward",
        "dtype": "float32",
        **TINY[0].to_row(),
        "status": "wrong",
        "error": "y: error 1",
    }
    table.add([row | {"provider": "flashrnn"}])
    assert exit_code([table]) == 0
    table.add([row | {"provider": "tlstm:streamed"}])
    assert exit_code([table]) == 1
    assert "WRONG, no time: y: error 1" in describe_rows(table.rows)


@pytest.mark.parametrize(
    ("set_name", "changes", "message"),
    [
        ("decode", {"modes": ("train",)}, r"expected decode for the set 'decode'; received train"),
        ("headline", {"modes": ("decode",)}, r"expected forward, backward or train for the set 'headline'"),
        ("headline", {"providers": ("cudnn",)}, r"expected one of tlstm, torch, .*received 'cudnn'"),
        (
            "decode",
            {"providers": ("haste",)},
            r"expected one of tlstm, tlstm:kernel, .* in decode mode; received 'haste'",
        ),
        ("nonsense", {}, r"received 'nonsense'"),
    ],
)
def test_mistakes_are_told_before_anything_is_measured(tmp_path, set_name, changes, message):
    with pytest.raises(ValueError, match=message):
        run_set(set_name, settings(**changes), tmp_path, measure_one=Interrupted(after=0))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("changes", "message"), [({"modes": ("both",)}, "mode"), ({"dtypes": ("int8",)}, "dtype")])
def test_settings_are_checked(changes, message):
    with pytest.raises(ValueError, match=f"{message}: expected one of .*received"):
        settings(**changes)
    with pytest.raises(ValueError, match="seconds: expected more than 0; received 0"):
        Settings("cpu", seconds=0)


def test_a_table_of_another_version_is_not_continued(tmp_path):
    path = tmp_path / "tiny-0123456789.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="Move the file away"):
        run_set("tiny", settings(), tmp_path)
    assert path.read_text() == "a,b\n1,2\n"


def test_decode_mode_counts_tokens(tmp_path, monkeypatch):
    w = Workload(T=6, B=2, H=9, I=9, vocab=11)
    monkeypatch.setitem(SETS, "tiny-decode", WorkloadSet("tiny-decode", "", (w,), decode=True))
    table = run_set("tiny-decode", settings(), tmp_path)
    rows = {row["provider"]: row for row in table.rows}
    assert {name for name, row in rows.items() if row["status"] == "unavailable"} == {
        "tlstm:kernel", "tlstm:graph", "torch-graph",
    }  # fmt: skip
    for row in (rows["tlstm"], rows["tlstm:lean"], rows["tlstm:loop"], rows["torch"]):
        assert row["status"] == "ok"
        assert float(row["tokens_per_s"]) == pytest.approx(1e3 * 2 * 6 / float(row["ms_p50"]), rel=1e-4)
        assert row["input_ms"] == ""
    assert rows["tlstm:loop"]["plan"].startswith("loop")
    assert rows["tlstm:lean"]["plan"].startswith("lean")
