"""From rows to figures, plots and the README: against hand-made tables, and the real README is up to date."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from benchmarks import plots, readme
from benchmarks.report import newest_tables, slopes, summarize, summary_text, write_summary
from tlstm.benchmark.results import COLUMNS, Table
from tlstm.benchmark.workload import Workload

ROOT = Path(__file__).parents[2]
ABOUT = {
    "set": "headline", "source": "", "machine": "cpu", "device": "cpu", "cpu": "A CPU", "threads": 1, "torch": "2.13.0",
    "commit": "0123456789", "shrunk": True, "started": "2026-01-01T00:00:00+00:00", "complete": True,
}  # fmt: skip
GPU = {"machine": "nvidia-h200", "device": "cuda", "shrunk": False}


def row(provider: str, speedup: float, B: int = 16, **changes) -> dict:
    workload = Workload(T=changes.pop("T", 64), B=B, H=96, I=96)
    ms = 2.0 / speedup
    made = {
        "set": "headline", "device": "cpu", "machine": "cpu", "mode": "train", "dtype": "float32", **workload.to_row(),
        "provider": provider, "status": "ok", "ms_p20": ms, "ms_p50": ms, "ms_p80": ms,
        "us_per_step": 1e3 * ms / workload.T,
        "speedup_p20": speedup, "speedup_p50": speedup, "speedup_p80": speedup, "baseline": "torch",
    }  # fmt: skip
    return made | changes


def table(path: Path, rows: list[dict], **about) -> Table:
    made = Table(path, ABOUT | about, resume=False)
    made.add(rows)
    write_summary(made)
    return made


ROWS = [
    *(row("torch", 1.0, B) for B in (1, 16, 64)),
    *(row("tlstm", speedup, B) for B, speedup in ((1, 0.5), (16, 2.0), (64, 4.0))),
    {**row("haste", 1.0), "status": "unavailable", "error": "not installed", "ms_p50": "", "speedup_p50": ""},
    {**row("tlstm:streamed", 1.0), "status": "wrong", "error": "y: error 1", "ms_p50": "", "speedup_p50": ""},
]


def text_of(rows: list[dict]) -> list[dict]:
    made = Table(None, {})
    made.add(rows)
    return made.rows


def test_a_summary_counts_and_averages():
    found = {entry["provider"]: entry for entry in summarize(text_of(ROWS))}
    ours = found["tlstm"]
    assert ours["geometric_mean"] == pytest.approx(4 ** (1 / 3), abs=1e-4)
    assert (ours["lowest"], ours["highest"], ours["below"], ours["timed"]) == (0.5, 4.0, 1, 3)
    assert found["torch"]["geometric_mean"] == 1
    assert (found["haste"]["timed"], found["haste"]["unavailable"]) == (0, 1)
    assert found["tlstm:streamed"]["wrong"] == 1
    assert "geometric_mean" not in found["tlstm:streamed"]
    assert "times_floor" not in ours
    with_floor = text_of([row("tlstm", 2.0, B, times_floor=floor) for B, floor in ((1, 2.0), (16, 8.0))])
    assert summarize(with_floor)[0]["times_floor"] == {"geometric_mean": 4.0, "highest": 8.0}


def test_slopes_of_time_and_memory():
    rows = [row("tlstm", 1.0, T=T, ms_p50=0.003 * T + 0.1, saved_bytes=4000 * T) for T in (16, 32, 64)]
    found = {entry["of"]: entry for entry in slopes(text_of(rows), "T")}
    assert found["us"]["per_unit"] == pytest.approx(3.0)
    assert found["us"]["intercept"] == pytest.approx(100.0)
    assert found["saved_bytes"]["per_unit"] == pytest.approx(4000)
    assert found["saved_bytes"]["exponent"] == pytest.approx(1)
    assert "peak_bytes" not in found
    assert slopes(text_of(rows[:1]), "T") == []


def test_the_summary_as_text(tmp_path):
    text = summary_text(table(tmp_path / "t.csv", ROWS))
    assert text.startswith("headline on cpu (shrunk)")
    assert "geometric mean 1.59x torch, lowest 0.50x" in text
    assert "1 wrong" in text


def test_plots_are_drawn_and_the_same_each_time(tmp_path):
    rows = [each | {"times_floor": 3.0, "floor_us_per_step": 0.5} for each in ROWS[:6]]
    path = table(tmp_path / "headline-0123456789.csv", rows).path
    written = plots.draw(path)
    assert [each.name for each in written] == [
        f"headline-0123456789-{kind}.svg" for kind in ("ratios", "curves", "floor")
    ]
    first = [each.read_bytes() for each in written]
    assert [each.read_bytes() for each in plots.draw(path)] == first
    heat_map = first[0].decode()
    assert "0.50" in heat_map
    assert "they say nothing about a GPU" in heat_map
    no_floor = table(tmp_path / "other.csv", ROWS[:2]).path
    assert plots.draw(no_floor) == []  # no provider but the baseline, one curve of two points, no floor
    gpu = table(tmp_path / "gpu.csv", ROWS[:6], **GPU).path
    assert "they say nothing" not in plots.draw(gpu)[0].read_text()


def test_a_curve_shows_memory_beside_time(tmp_path):
    rows = [row("tlstm", 1.0, T=T, saved_bytes=4000 * T, set="curve-T") for T in (16, 32, 64)]
    (curve,) = plots.draw(table(tmp_path / "c.csv", [*rows], set="curve-T").path)[1:]
    assert "bytes saved for backward" in curve.read_text()


def results_of(tmp_path: Path, *tables: tuple[str, str, list[dict], dict]) -> Path:
    for machine, name, rows, about in tables:
        table(tmp_path / "benchmarks" / "results" / machine / f"{name}.csv", rows, **about)
    return tmp_path / "benchmarks" / "results"


def test_the_newest_complete_run_of_each_set_counts(tmp_path):
    old, new = ({"started": f"2026-01-0{day}T00:00:00+00:00"} for day in (1, 2))
    results = results_of(
        tmp_path,
        ("cpu", "a", ROWS, new),
        ("cpu", "b", ROWS[:2], old),
        ("cpu", "c", ROWS[:1], {"started": "2026-01-03T00:00:00+00:00", "complete": False}),
    )
    (results / "cpu" / "compare-1-2.json").write_text(json.dumps({"complete": True, "base_commit": "1"}))
    (results / "cpu" / "speed.json").write_text("[1]")
    found = newest_tables(results)
    assert set(found) == {("cpu", "headline")}
    about, rows = found["cpu", "headline"]
    assert about["started"] == new["started"]
    assert len(rows) == len(ROWS)
    assert set(rows[0]) == set(COLUMNS)


def test_the_section_says_what_was_not_measured(tmp_path):
    text = readme.section(newest_tables(results_of(tmp_path, ("cpu", "a", ROWS, {}))), tmp_path)
    assert text.startswith("**Not measured yet: everything on a GPU.**")
    assert "### On a CPU (A CPU, one thread, torch 2.13.0)" in text
    # Ours and what is wrong with any way of ours; other providers are in the plots.
    assert "| headline | float32 |  |  | 1.59 (0.50), **1 wrong or failed** |  |" in text
    assert "Not measured yet" in readme.section({}, tmp_path)
    assert "CPU" not in readme.section({}, tmp_path)


def test_a_gpu_has_a_table_of_its_own(tmp_path):
    rows = [each | {"machine": "nvidia-h200", "device": "cuda", "times_floor": 2.0} for each in ROWS[:6]]
    results = results_of(tmp_path, ("nvidia-h200", "a", rows, GPU), ("cpu", "a", ROWS, {}))
    gpu, cpu = readme.section(newest_tables(results), tmp_path).split("### On a CPU")
    assert gpu.startswith("### nvidia-h200")
    assert "| headline | float32 |  |  | 1.59 (0.50), 2.0 floors |  |" in gpu
    assert "Not measured there yet: cliffs, deepbench-train" in gpu
    assert "everything on a GPU" not in gpu
    assert "2.0 floors" not in cpu


def test_the_section_is_written_between_its_markers(tmp_path, capsys):
    path = tmp_path / "README.md"
    results_of(tmp_path, ("cpu", "a", ROWS, {}))
    path.write_text(f"before\n{readme.BEGIN}\nold\n{readme.END}\nafter\n")
    assert readme.main(["--check"], tmp_path) == 1
    assert "old: python -m benchmarks.readme" in capsys.readouterr().out
    assert readme.main([], tmp_path) == 0
    assert path.read_text().startswith(f"before\n{readme.BEGIN}\n**Not measured")
    assert path.read_text().endswith(f"{readme.END}\nafter\n")
    assert readme.main(["--check"], tmp_path) == 0
    for broken in ("no markers", f"{readme.END} {readme.BEGIN}", f"{readme.BEGIN} {readme.BEGIN} {readme.END}"):
        with pytest.raises(ValueError, match="expected one"):
            readme.rewritten(broken, "")


def test_the_readme_is_up_to_date(capsys):
    assert readme.main(["--check"]) == 0, capsys.readouterr().out


def test_no_recorded_figure_of_a_cpu_stands_for_a_gpu():
    for (machine, name), (about, rows) in newest_tables(ROOT / "benchmarks" / "results").items():
        assert (machine == "cpu") == (about["device"] == "cpu"), name
        assert {(each["machine"], each["device"]) for each in rows} == {(machine, about["device"])}
        for each in rows:
            assert not (machine == "cpu" and each["times_floor"]), name
            assert each["status"] != "ok" or math.isfinite(float(each["ms_p50"]))
